"""The artifact: a folder that rebuilds the compressed model on the user's own architecture, bit for bit.

    model.safetensors  packed matrices (codes, scales, supports), everything else as it is
    plan.json          surgery, folded pairs, memory format, structures, and the SHA-256 of the weights
    recipe.yaml        what to run to get it again
    report.json/.html  what was measured

Loading builds nothing by name and unpickles nothing: the user's freshly built model is cut as the plan says, its
normalisations are folded away, and its tensors are filled from the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import error_line
from .._version import __version__
from ..cost import read_tensors, write_tensors
from ..patterns import Chain
from ..sites import Site, Surgery, find, unwrap
from ..structures import NM, Both, EntrySparse, LowRank, Packable, Rows, Structure, UniformGrid, Unstructured
from .attention_forms import check_form, put_in_
from .blocks import leave_out_
from .candidates import BlockKind
from .checkpoint import read_json, sha256, write_json
from .deploy import Pair, fold_batchnorm_, set_memory_format_
from .entries import skip_zeros_, with_zeros
from .factor import StandIn, factor_
from .original import check_filled, check_module, private_copy

FORMAT = "eke artifact 2"
WEIGHTS, PLAN = "model.safetensors", "plan.json"
_DAMAGED = (KeyError, TypeError, AttributeError, IndexError, RuntimeError)
"""What plain values of another form than written, or modules that are not there, end in."""


@dataclass(frozen=True)
class Blueprint:
    """What was done to the architecture.

    Args:
        surgery: Channels that stay.
        folded: Pairs of layer and normalisation.
        memory_format: "contiguous" or "channels_last".
        structures: Structure of each packed matrix by site name, in the reshaped model.
        removed: What the modules became that were left out, by name.
        factored: Rank of each module that became two, or chain of each that became `KSLinear`, by name.
        converted: What each softmax attention became that is linear or clustered now, by name of its module.
    """

    surgery: Surgery
    folded: tuple[Pair, ...]
    memory_format: str
    structures: Mapping[str, Structure]
    removed: Mapping[str, BlockKind] = field(default_factory=dict)
    factored: Mapping[str, StandIn] = field(default_factory=dict)
    converted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def shape_(self, model: nn.Module) -> None:
        """Cut, leave out and factor a model of the original architecture in place.

        Args:
            model: The model.

        Raises:
            ValueError: if the model lacks a module that is factored.
        """
        self.surgery.apply_(model)
        for name, kind in self.removed.items():
            leave_out_(model, name, kind)
        put_in_(model, self.converted)
        if self.factored:
            by_module = {site.module_name: site for site in find(model)}
            unknown = sorted(set(self.factored) - set(by_module))
            if unknown:
                raise ValueError(
                    f"The plan factors {unknown[:4]}, which this model lacks: build the same architecture."
                )
            for name, form in self.factored.items():
                factor_(model, by_module[name], form)

    def finish_(self, model: nn.Module) -> None:
        """Fold and lay out a model after `shape_` in place."""
        fold_batchnorm_(model, self.pairs)
        set_memory_format_(model, self.memory_format)

    def reshape_(self, model: nn.Module) -> None:
        """Bring a model of the original architecture into this form in place; its values are not yet right."""
        self.shape_(model)
        self.finish_(model)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs to fold in the reshaped model: of two layers for one the second, none in what was left out."""

        def gone(name: str) -> bool:
            return any(name == module or name.startswith(f"{module}.") for module in self.removed)

        stay = [pair for pair in self.folded if not gone(pair[0]) and not gone(pair[1])]
        two = {name for name, form in self.factored.items() if isinstance(form, int)}
        return tuple((f"{layer}.1" if layer in two else layer, norm) for layer, norm in stay)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "surgery": self.surgery.to_json(),
            "folded": [list(pair) for pair in self.folded],
            "memory_format": self.memory_format,
            "structures": {name: structure_to_json(s) for name, s in self.structures.items()},
            "removed": dict(self.removed),
            "factored": {
                name: form if isinstance(form, int) else [list(pattern) for pattern in form]
                for name, form in self.factored.items()
            },
            "converted": {name: dict(form) for name, form in self.converted.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, structures: Sequence[Structure] = ()) -> Blueprint:
        """Rebuild from `to_json`.

        Args:
            document: Its result.
            structures: Structures from outside eke that it may name.

        Returns:
            The blueprint.

        Raises:
            ValueError: if a key is missing, a value has another form, or a structure is not known.
        """
        missing = {"surgery", "folded", "memory_format", "structures", "removed", "factored"} - set(document)
        if missing:
            raise ValueError(f"The plan lacks {sorted(missing)}: it is not a plan of this version of eke.")
        if any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in document["folded"]):
            raise ValueError(f"The plan folds {document['folded']!r:.80}, where pairs of names are needed: restore it.")
        if any(not _is_form(form) for form in document["factored"].values()):
            raise ValueError(
                f"The plan has the ranks {document['factored']!r:.80}, where whole numbers are needed or, for chains, "
                "lists of four: restore it."
            )
        return cls(
            Surgery.from_json(document["surgery"]),
            tuple((str(layer), str(norm)) for layer, norm in document["folded"]),
            str(document["memory_format"]),
            {name: structure_from_json(found, outside=structures) for name, found in document["structures"].items()},
            dict(document["removed"]),
            {
                str(name): form if isinstance(form, int) else Chain([tuple(pattern) for pattern in form])
                for name, form in document["factored"].items()
            },
            _forms(document.get("converted", {})),
        )


def _forms(document: Any) -> dict[str, Mapping[str, Any]]:
    """Return what attentions became, as a plan says it; older plans convert none.

    Raises:
        ValueError: if a value has another form.
    """  # noqa: DOC502
    for form in document.values():
        check_form(form)
    return {str(name): dict(form) for name, form in document.items()}


def _is_form(form: object) -> bool:
    """Return whether a plain value is a rank or a chain."""
    if not isinstance(form, list):
        return isinstance(form, int)
    return bool(form) and all(isinstance(p, list) and len(p) == 4 and all(isinstance(n, int) for n in p) for p in form)


def structure_to_json(structure: Structure) -> dict[str, Any]:
    """Return a structure as plain values: class and arguments of eke's own, the text of others."""
    if isinstance(structure, UniformGrid):
        return {"kind": "UniformGrid", "bits": structure.code_bits, "group": structure.group}
    if type(structure) in _KINDS.values() and dataclasses.is_dataclass(structure):
        parts = {f.name: getattr(structure, f.name) for f in dataclasses.fields(structure)}
        plain = {k: structure_to_json(v) if isinstance(v, Structure) else v for k, v in parts.items()}
        return {"kind": type(structure).__name__, **plain}
    return {"kind": "outside", "text": repr(structure)}


def structure_from_json(document: Mapping[str, Any], *, outside: Sequence[Structure] = ()) -> Structure:
    """Rebuild a structure from `structure_to_json`.

    Args:
        document: Its result.
        outside: Structures from outside eke, recognised by their text.

    Returns:
        The structure.

    Raises:
        ValueError: if it is not known.
    """
    kind = document.get("kind")
    if kind == "outside":
        for structure in outside:
            if repr(structure) == document["text"]:
                return structure
        raise ValueError(
            f"The plan uses the structure {document['text']!r}, which is not eke's own: pass it, "
            "load(folder, model, structures=[...])."
        )
    if kind not in _KINDS:
        raise ValueError(f"The plan names the structure {kind!r}; this version of eke knows {sorted(_KINDS)}.")
    found: Structure = _KINDS[kind](**{
        k: structure_from_json(v) if isinstance(v, Mapping) else v for k, v in document.items() if k != "kind"
    })
    return found


_KINDS: dict[str, Any] = {k.__name__: k for k in (Both, EntrySparse, LowRank, NM, Rows, UniformGrid, Unstructured)}


def _by_name(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in find(model)}


def packed_parts(structure: Structure, matrix: Tensor) -> dict[str, Tensor]:
    """Return the tensors that a member (m, n) is stored as; float32 values where the structure does not pack."""
    if isinstance(structure, Packable):
        return dict(structure.encode(matrix))
    return {"values": matrix.float()}


def stored_bits(structure: Structure | None, shape: tuple[int, int]) -> int:
    """Return the bits that a matrix (m, n) takes in an artifact."""
    if structure is None or not isinstance(structure, Packable):
        return 32 * shape[0] * shape[1]
    return structure.bits(shape)


def pack(model: nn.Module, structures: Mapping[str, Structure]) -> dict[str, Tensor]:
    """Return the tensors to store: matrices of a structure packed, tied tensors once.

    Args:
        model: The compressed model, its matrices members of their structures.
        structures: Structure by site name.

    Returns:
        Tensors by name.
    """
    model = with_zeros(model, structures)
    sites = _by_name(model)
    packed = {sites[name].parameter_name for name in structures}
    aliases = {other for site in sites.values() for other in site.tied}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in packed or name in aliases:
            continue
        tensors[name] = tensor
    for name, structure in structures.items():
        for part, values in packed_parts(structure, sites[name].read(model)).items():
            tensors[f"{sites[name].parameter_name}:{part}"] = values
    return tensors


def unpack_(model: nn.Module, tensors: Mapping[str, Tensor], structures: Mapping[str, Structure]) -> None:
    """Fill a reshaped model from stored tensors.

    Args:
        model: The user's architecture after `Blueprint.reshape_`.
        tensors: From `pack`.
        structures: Structure by site name.

    Raises:
        ValueError: if a tensor is missing, unknown, or of another shape or dtype.
    """
    sites = _by_name(model)
    unknown = sorted(set(structures) - set(sites))
    if unknown:
        raise ValueError(
            f"The artifact packs {unknown[:4]}, which this model does not have: build the same architecture."
        )
    state = model.state_dict()
    packed = {sites[name].parameter_name: s for name, s in structures.items()}
    aliases = {other for site in sites.values() for other in site.tied}
    plain = {name for name in state if name not in packed and name not in aliases}
    parts = {name: [key for key in tensors if key.startswith(f"{name}:")] for name in packed}
    wanted = plain | {key for name, keys in parts.items() for key in keys or [f"{name}:codes"]}
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))[:6]
        raise ValueError(f"Model and artifact differ in the tensors {odd}: build the architecture that was compressed.")
    with torch.no_grad():
        for name in sorted(plain):
            ours, theirs = state[name], tensors[name]
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise ValueError(
                    f"{name!r} is {ours.dtype} {tuple(ours.shape)} in the model and {theirs.dtype} "
                    f"{tuple(theirs.shape)} in the artifact: build the architecture that was compressed, in its dtype."
                )
            ours.copy_(theirs)
        for name, structure in structures.items():
            site = sites[name]
            stored = {key.rpartition(":")[2]: tensors[key] for key in parts[site.parameter_name]}
            try:
                matrix = structure.decode(stored, site.shape) if isinstance(structure, Packable) else stored["values"]
            except KeyError as error:
                raise ValueError(
                    f"The artifact stores {sorted(stored)} of {name!r}, which {structure} does not decode without "
                    f"{error}: restore the plan or compress again."
                ) from error
            site.write_(model, matrix)


def state_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all names, shapes, dtypes and values of a model's state, in order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(
    folder: pathlib.Path,
    model: nn.Module,
    blueprint: Blueprint,
    *,
    decisions: Sequence[Mapping[str, Any]] = (),
    checks: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and plan; each file is whole or absent, and the plan, written last, names the weights' digest.

    Args:
        folder: Made if it is not there.
        model: The compressed model.
        blueprint: What was done to the architecture.
        decisions: What was chosen, for readers.
        checks: What a later verification compares with, such as the score on the selection split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, pack(model, blueprint.structures), {"format": FORMAT})
    document = {
        "format": FORMAT,
        "eke": __version__,
        "architecture": type(unwrap(model)).__qualname__,
        "sha256": {WEIGHTS: sha256(folder / WEIGHTS)},
        "checks": {"state_sha256": state_digest(model), **(checks or {})},
        "decisions": list(decisions),
        **blueprint.to_json(),
    }
    write_json(folder / PLAN, document)


def load(folder: str | pathlib.Path, model: nn.Module, *, structures: Sequence[Structure] = ()) -> nn.Module:
    """Rebuild the compressed model from an artifact.

    Args:
        folder: The artifact.
        model: A model of the original architecture, with any weights; it is not changed.
        structures: Structures from outside eke that the artifact uses.

    Returns:
        A new model in evaluation mode, equal to the saved one bit for bit.

    Raises:
        TypeError: if the first argument is no path, or the second no module.
        FileNotFoundError: if the folder holds no artifact.
        ValueError: if a file was changed, or the model has another architecture, no values, or cannot be copied.
    """  # noqa: DOC502
    if not isinstance(folder, (str, pathlib.Path)):
        raise TypeError(f"load(folder, model) takes the path of the artifact first, got {type(folder).__name__}.")
    folder = pathlib.Path(folder)
    rebuilt = private_copy(check_filled(check_module(model))).eval()
    document = read_plan(folder)
    try:
        blueprint = Blueprint.from_json(document, structures=structures)
    except ValueError as error:
        raise ValueError(f"{folder / PLAN}: {error}") from error
    except _DAMAGED as error:
        raise ValueError(f"{folder / PLAN} is damaged ({error_line(error)}): restore it or compress again.") from error
    tensors, _ = read_tensors(folder / WEIGHTS)
    try:
        blueprint.reshape_(rebuilt)
    except _DAMAGED as error:
        raise ValueError(
            f"The plan in {folder} does not fit this {type(rebuilt).__name__} ({error_line(error)}): build the "
            f"architecture that was compressed, {document.get('architecture')}."
        ) from error
    unpack_(rebuilt, tensors, blueprint.structures)
    skip_zeros_(rebuilt, blueprint.structures)
    return rebuilt


def read_plan(folder: pathlib.Path) -> dict[str, Any]:
    """Read and check an artifact's plan.

    Args:
        folder: The artifact.

    Returns:
        The content of plan.json.

    Raises:
        FileNotFoundError: if the folder holds no artifact.
        ValueError: if it is of another format or the weights do not have the digest it names.
    """
    if folder.is_file():
        place = f", {folder.parent}" if (folder.parent / PLAN).is_file() else ""
        raise FileNotFoundError(f"{folder} is a file: give the artifact's folder{place}.")
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            unfinished = (
                " A run that was interrupted there continues with --resume." if (folder / ".run").exists() else ""
            )
            there = "it has" if folder.is_dir() else "there is no such folder, and so"
            raise FileNotFoundError(f"{folder} is not an eke artifact: {there} no {name}.{unfinished}")
    document = read_json(folder / PLAN)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{folder / PLAN} must have the format {FORMAT!r}, got {found!r}.")
    digests = document.get("sha256")
    wanted = str(digests.get(WEIGHTS, "none")) if isinstance(digests, dict) else "none"
    digest = sha256(folder / WEIGHTS)
    if digest != wanted:
        raise ValueError(
            f"{folder / WEIGHTS} was changed: its SHA-256 is {digest[:12]}..., the plan names {wanted[:12]}...; "
            "restore the file or compress again."
        )
    return document
