"""Surgery: which entries of which tensors stay when channels are cut, as plain integers.

A surgery is a description; it holds no tensors and replays on any freshly built model of the same architecture. It
keeps for each parameter or buffer and each of its dimensions the indices that stay, in the ORIGINAL model's
coordinates, and which attributes of modules (out_channels, num_features, ...) count what stayed. Cuts of different
groups of one model therefore combine by intersection, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .site import storage_key, unwrap

Slices = dict[str, dict[int, tuple[int, ...]]]
Counts = dict[str, dict[str, tuple[str, int, int]]]


@dataclass(frozen=True)
class Surgery:
    """A cut of a model.

    Args:
        slices: By parameter or buffer name and dimension: ascending indices that stay, in the original tensor.
        shapes: By the same names: shapes of the original tensors.
        counts: By module name and attribute: (tensor name, dimension, divisor); the attribute becomes the number of
            indices that stay there, divided by `divisor`.

    Raises:
        ValueError: if the three do not fit together.
    """

    slices: Slices = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.slices.keys() != self.shapes.keys():
            odd = sorted(self.slices.keys() ^ self.shapes.keys())
            raise ValueError(f"Surgery needs slices and shapes for the same tensors; only one of them has {odd}.")
        for name, by_dim in self.slices.items():
            for dim, kept in by_dim.items():
                _check_kept(name, self.shapes[name], dim, kept)
        for module, attributes in self.counts.items():
            for attribute, (name, dim, divisor) in attributes.items():
                kept = self.slices.get(name, {}).get(dim, ())
                if not kept or len(kept) % divisor:
                    raise ValueError(
                        f"Surgery counts {module}.{attribute} on dimension {dim} of {name!r} in units of {divisor}, "
                        f"where {len(kept)} indices stay."
                    )

    @property
    def attributes(self) -> dict[str, dict[str, int]]:
        """New values of module attributes, by module name."""
        return {
            module: {attribute: len(self.slices[name][dim]) // unit for attribute, (name, dim, unit) in counts.items()}
            for module, counts in self.counts.items()
        }

    @property
    def removed(self) -> int:
        """Number of entries of parameters and buffers that it removes."""
        total = 0
        for name, shape in self.shapes.items():
            left = [len(self.slices[name].get(dim, range(size))) for dim, size in enumerate(shape)]
            total += torch.Size(shape).numel() - torch.Size(left).numel()
        return total

    def then(self, other: Surgery) -> Surgery:
        """Return the combination with a cut of the same original model: what both keep stays.

        Raises:
            ValueError: if they were made for different shapes, or nothing would be left of a dimension.
        """  # noqa: DOC502
        return Surgery.merge((self, other))

    @staticmethod
    def merge(surgeries: Iterable[Surgery]) -> Surgery:
        """Return the combination of any number of cuts of one original model; none gives the empty surgery.

        Raises:
            ValueError: if they were made for different shapes, or nothing would be left of a dimension.
        """
        cuts: dict[str, dict[int, list[tuple[int, ...]]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        counts: Counts = {}
        for surgery in surgeries:
            for name, by_dim in surgery.slices.items():
                if shapes.setdefault(name, surgery.shapes[name]) != surgery.shapes[name]:
                    raise ValueError(
                        f"The surgeries were made for different models: {name!r} has shape {shapes[name]} in one and "
                        f"{surgery.shapes[name]} in another."
                    )
                mine = cuts.setdefault(name, {})
                for dim, kept in by_dim.items():
                    mine.setdefault(dim, []).append(kept)
            for module, attributes in surgery.counts.items():
                counts.setdefault(module, {}).update(attributes)
        slices = {name: {dim: _common(name, dim, kept) for dim, kept in by.items()} for name, by in cuts.items()}
        return Surgery(slices, shapes, counts)

    def apply_(self, model: nn.Module) -> None:
        """Cut a model in place.

        Parameters are replaced by new, smaller ones (requires_grad and memory format kept, `.grad` dropped: make the
        optimizer afterwards); tied parameters stay tied.

        Args:
            model: A model of the architecture that the surgery was made for.

        Raises:
            ValueError: if the model does not fit; it is then unchanged.
        """  # noqa: DOC502
        model = unwrap(model)
        places = {name: _place(model, name) for name in self.slices}
        self._check_fit(model, places)
        new: dict[int, Tensor] = {}
        for name, (module, attribute) in places.items():
            old = _get(module, attribute)
            assert old is not None
            if id(old) not in new:
                new[id(old)] = _sliced(old, self.slices[name])
            if isinstance(module, nn.RNNBase):
                setattr(module, attribute, new[id(old)])  # also in its own list of parameters
                continue
            target = module._parameters if attribute in module._parameters else module._buffers
            target[attribute] = new[id(old)]  # type: ignore[assignment]
        for module_name, attributes in self.attributes.items():
            for attribute, value in attributes.items():
                setattr(model.get_submodule(module_name), attribute, value)

    def _check_fit(self, model: nn.Module, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        for name, (module, attribute) in places.items():
            tensor = _get(module, attribute)
            found = None if tensor is None else tuple(tensor.shape)
            if found != self.shapes[name]:
                raise ValueError(
                    f"This surgery was made for a model whose {name!r} has shape {self.shapes[name]}, this model has "
                    f"{'none' if found is None else found}. Build the architecture that it was made for, uncut."
                )
        for module_name in self.counts:
            if _submodule(model, module_name) is None:
                raise ValueError(
                    f"This surgery was made for a model with a module {module_name!r}, this model has none."
                )
        named = {(id(module), attribute): name for name, (module, attribute) in places.items()}
        owners: dict[tuple[object, ...], list[str | None]] = {}
        labels: dict[tuple[object, ...], list[str]] = {}
        for full_name, module in model.named_modules():
            for attribute, tensor in module._parameters.items():
                if tensor is not None:
                    key = storage_key(tensor)
                    owners.setdefault(key, []).append(named.get((id(module), attribute)))
                    labels.setdefault(key, []).append(f"{full_name}.{attribute}".lstrip("."))
        for key, names in owners.items():
            cuts = [self.slices[name] if name is not None else None for name in names]
            if any(cut != cuts[0] for cut in cuts):
                raise ValueError(f"{' and '.join(labels[key])} are one tied tensor: a surgery must cut them alike.")

    def to_json(self) -> dict[str, object]:
        """Return dictionaries, lists, strings and ints only, ready for `json.dumps`."""
        slices = {name: {str(dim): list(kept) for dim, kept in by_dim.items()} for name, by_dim in self.slices.items()}
        counts = {module: {a: list(where) for a, where in by.items()} for module, by in self.counts.items()}
        return {"slices": slices, "shapes": {n: list(s) for n, s in self.shapes.items()}, "counts": counts}

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> Surgery:
        """Return the surgery that `to_json` described.

        Raises:
            ValueError: if the document is not one of a surgery.
        """
        try:
            slices = {
                str(name): {int(dim): tuple(map(int, kept)) for dim, kept in by_dim.items()}
                for name, by_dim in document["slices"].items()  # type: ignore[attr-defined]
            }
            shapes = {str(n): tuple(map(int, s)) for n, s in document["shapes"].items()}  # type: ignore[attr-defined]
            counts = {
                str(module): {str(a): (str(n), int(dim), int(unit)) for a, (n, dim, unit) in by.items()}
                for module, by in document["counts"].items()  # type: ignore[attr-defined]
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"This is not a surgery: it needs slices, shapes and counts as written by to_json ({error!r})."
            ) from error
        return cls(slices, shapes, counts)


def _common(name: str, dim: int, cuts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if len(cuts) == 1:
        return cuts[0]
    left = tuple(sorted(set(cuts[0]).intersection(*cuts[1:])))
    if not left:
        raise ValueError(f"The surgeries together leave nothing of dimension {dim} of {name!r}.")
    return left


def _check_kept(name: str, shape: tuple[int, ...], dim: int, kept: tuple[int, ...]) -> None:
    if not 0 <= dim < len(shape):
        raise ValueError(f"Surgery cuts dimension {dim} of {name!r}, which has shape {shape}.")
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= shape[dim]:
        raise ValueError(
            f"Surgery needs ascending indices from 0 to {shape[dim] - 1} for dimension {dim} of {name!r}, "
            f"at least one, got {kept[:8]}{'...' if len(kept) > 8 else ''}."
        )


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module_name, _, attribute = name.rpartition(".")
    module = _submodule(model, module_name)
    if module is None or _get(module, attribute) is None:
        raise ValueError(
            f"This surgery was made for a model with a parameter or buffer {name!r}, this model has none. "
            "Build the architecture that it was made for."
        )
    return module, attribute


def _get(module: nn.Module, attribute: str) -> Tensor | None:
    found = module._parameters.get(attribute)
    return found if found is not None else module._buffers.get(attribute)


def _sliced(tensor: Tensor, by_dim: Mapping[int, tuple[int, ...]]) -> Tensor:
    values = tensor.detach()
    for dim, kept in by_dim.items():
        values = values.index_select(dim, torch.tensor(kept, device=tensor.device))
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        values = values.contiguous(memory_format=torch.channels_last)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values
