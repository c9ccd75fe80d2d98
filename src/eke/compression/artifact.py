"""The artifact: a folder that rebuilds the compressed model on the user's own architecture, bit for bit.

    model.safetensors  codes and scales of packed matrices, everything else as it is
    plan.json          surgery, folded pairs, memory format, grids, and the SHA-256 of the weights
    recipe.yaml        what to run to get it again
    report.json/.html  what was measured

Loading builds nothing by name and unpickles nothing: the user's freshly built model is cut as the plan says, its
normalisations are folded away, and its tensors are filled from the file.
"""

from __future__ import annotations

import copy
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..sites import Site, Surgery, find, unwrap
from ..structures import Packed, UniformGrid
from .checkpoint import read_json, read_tensors, sha256, write_json, write_tensors
from .deploy import Pair, fold_batchnorm_, set_memory_format_

FORMAT = "eke artifact 1"
WEIGHTS, PLAN = "model.safetensors", "plan.json"


@dataclass(frozen=True)
class Blueprint:
    """What was done to the architecture.

    Args:
        surgery: Channels that stay.
        folded: Pairs of layer and normalisation.
        memory_format: "contiguous" or "channels_last".
        grids: Grid of each packed matrix by site name.
    """

    surgery: Surgery
    folded: tuple[Pair, ...]
    memory_format: str
    grids: Mapping[str, UniformGrid]

    def reshape_(self, model: nn.Module) -> None:
        """Cut, fold and lay out a model of the original architecture in place; its values are not yet right."""
        self.surgery.apply_(model)
        fold_batchnorm_(model, self.folded)
        set_memory_format_(model, self.memory_format)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "surgery": self.surgery.to_json(),
            "folded": [list(pair) for pair in self.folded],
            "memory_format": self.memory_format,
            "grids": {name: {"bits": grid.code_bits, "group": grid.group} for name, grid in self.grids.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Blueprint:
        """Rebuild from `to_json`.

        Args:
            document: Its result.

        Returns:
            The blueprint.

        Raises:
            ValueError: if a key is missing.
        """
        missing = {"surgery", "folded", "memory_format", "grids"} - set(document)
        if missing:
            raise ValueError(f"The plan lacks {sorted(missing)}: it is not a plan of this version of eke.")
        return cls(
            Surgery.from_json(document["surgery"]),
            tuple((str(layer), str(norm)) for layer, norm in document["folded"]),
            str(document["memory_format"]),
            {name: UniformGrid(int(g["bits"]), g["group"]) for name, g in document["grids"].items()},
        )


def _by_name(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in find(model)}


def pack(model: nn.Module, grids: Mapping[str, UniformGrid]) -> dict[str, Tensor]:
    """Return the tensors to store: matrices on grids as codes and scales, tied tensors once.

    Args:
        model: The compressed model, its matrices on their grids.
        grids: Grid by site name.

    Returns:
        Tensors by name.
    """
    sites = _by_name(model)
    packed = {sites[name].parameter_name: grid for name, grid in grids.items()}
    aliases = {other for site in sites.values() for other in site.tied}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in packed or name in aliases:
            continue
        tensors[name] = tensor
    for name, grid in grids.items():
        stored = grid.encode(sites[name].read(model))
        tensors[f"{sites[name].parameter_name}:codes"] = stored.codes
        tensors[f"{sites[name].parameter_name}:scales"] = stored.scales
    return tensors


def unpack_(model: nn.Module, tensors: Mapping[str, Tensor], grids: Mapping[str, UniformGrid]) -> None:
    """Fill a reshaped model from stored tensors.

    Args:
        model: The user's architecture after `Blueprint.reshape_`.
        tensors: From `pack`.
        grids: Grid by site name.

    Raises:
        ValueError: if a tensor is missing, unknown, or of another shape or dtype.
    """
    sites = _by_name(model)
    unknown = sorted(set(grids) - set(sites))
    if unknown:
        raise ValueError(
            f"The artifact packs {unknown[:4]}, which this model does not have: build the same architecture."
        )
    state = model.state_dict()
    packed = {sites[name].parameter_name for name in grids}
    aliases = {other for site in sites.values() for other in site.tied}
    plain = {name for name in state if name not in packed and name not in aliases}
    wanted = plain | {f"{name}:{part}" for name in packed for part in ("codes", "scales")}
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
        for name, grid in grids.items():
            site = sites[name]
            stored = Packed(tensors[f"{site.parameter_name}:codes"], tensors[f"{site.parameter_name}:scales"])
            site.write_(model, grid.decode(stored, site.shape))


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
    write_tensors(folder / WEIGHTS, pack(model, blueprint.grids), {"format": FORMAT})
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


def load(folder: str | pathlib.Path, model: nn.Module) -> nn.Module:
    """Rebuild the compressed model from an artifact.

    Args:
        folder: The artifact.
        model: A model of the original architecture, with any weights; it is not changed.

    Returns:
        A new model in evaluation mode, equal to the saved one bit for bit.

    Raises:
        FileNotFoundError: if the folder holds no artifact.
        ValueError: if a file was changed, or the model has another architecture.
    """  # noqa: DOC502
    folder = pathlib.Path(folder)
    document = read_plan(folder)
    blueprint = Blueprint.from_json(document)
    tensors, _ = read_tensors(folder / WEIGHTS)
    rebuilt = copy.deepcopy(unwrap(model)).eval()
    blueprint.reshape_(rebuilt)
    unpack_(rebuilt, tensors, blueprint.grids)
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
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            unfinished = (
                " A run that was interrupted there continues with --resume." if (folder / ".run").exists() else ""
            )
            raise FileNotFoundError(f"{folder} is not an eke artifact: it has no {name}.{unfinished}")
    document = read_json(folder / PLAN)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{folder / PLAN} must have the format {FORMAT!r}, got {found!r}.")
    digest, wanted = sha256(folder / WEIGHTS), str(document.get("sha256", {}).get(WEIGHTS, "none"))
    if digest != wanted:
        raise ValueError(
            f"{folder / WEIGHTS} was changed: its SHA-256 is {digest[:12]}..., the plan names {wanted[:12]}...; "
            "restore the file or compress again."
        )
    return document
