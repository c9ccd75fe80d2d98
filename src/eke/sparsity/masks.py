"""Masks: which entries of which parameters are kept.

A mask set knows names and booleans, nothing of a model: it is applied to one, re-applied after each optimizer step, put
in as a parametrization that can be taken out again, and stored with one bit an entry.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._errors import suggest
from ..cost import read_tensors, write_tensors

_FORMAT = "eke masks 1"
_VALUES = "values of "


@dataclass(frozen=True)
class PruneStep:
    """One step of pruning.

    Args:
        kept: Entries kept after it.
        predicted: Change of the loss that the criterion predicted for what was removed; None if it predicts none.
        before: Loss before the step, None where the criterion has no data.
        after: Loss after it.
        damping: Weight of 1/2 w^2 in the scores of the step.
        magnitude: Sum of the absolute changes that the criterion predicted, entry by entry: where `after - before` is
            above it, the model of the loss was left behind.
    """

    kept: int
    predicted: float | None = None
    before: float | None = None
    after: float | None = None
    damping: float = 0.0
    magnitude: float | None = None

    @property
    def ratio(self) -> float | None:
        """Actual change of the loss for each unit of predicted absolute change; None where nothing was predicted."""
        if self.magnitude is None or self.before is None or self.after is None:
            return None
        return (self.after - self.before) / max(self.magnitude, 1e-300)


class MaskSet(Mapping[str, Tensor]):
    """Masks by parameter name; True is kept.

    Args:
        masks: Boolean tensors in the shapes of the parameters.
        steps: How pruning went.
        values: What kept entries become, where survivors made up for what was removed; by parameter name.

    Raises:
        TypeError: if a mask is not boolean.
        ValueError: if values are of other shapes than the masks.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        steps: tuple[PruneStep, ...] = (),
        *,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"The mask of {name!r} must be boolean, got {mask.dtype}.")
        self._masks = dict(masks)
        self.steps = steps
        self.values_of = dict(values or {})
        for name, value in self.values_of.items():
            if name not in masks or value.shape != masks[name].shape:
                raise ValueError(
                    f"Values of {name!r} have shape {tuple(value.shape)}, its mask "
                    f"{tuple(masks[name].shape) if name in masks else 'does not exist'}."
                )

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} parameters, {self.kept} of {self.total} entries kept)"

    @property
    def kept(self) -> int:
        """Number of entries kept."""
        return sum(int(mask.sum()) for mask in self.values())

    @property
    def total(self) -> int:
        """Number of entries."""
        return sum(mask.numel() for mask in self.values())

    @property
    def density(self) -> float:
        """Share of entries kept."""
        return self.kept / max(1, self.total)

    def apply_(self, model: nn.Module) -> None:
        """Set the entries that are not kept to 0 and kept ones to their values, if they have new ones, in place."""
        with torch.no_grad():
            for (name, mask), (parameter, _) in zip(self.items(), self._pairs(model)):
                if name in self.values_of:
                    parameter.copy_(self.values_of[name])
                parameter.mul_(mask.to(parameter.device))

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Keep entries at 0 through training: after each step of the optimizer, parameters and what its state holds in
        their shape (momentum) are masked.

        Args:
            model: Its parameters are masked now, too; their values stay (`apply_` writes those of the set).
            optimizer: Of these parameters.

        Returns:
            A handle; `handle.remove()` ends it.
        """  # noqa: D205
        pairs = [(parameter, mask.to(parameter.device)) for parameter, mask in self._pairs(model)]

        def after(_optimizer: torch.optim.Optimizer | None, _arguments: Any, _keywords: Any) -> None:
            with torch.no_grad():
                for parameter, mask in pairs:
                    parameter.mul_(mask)
                    for value in optimizer.state.get(parameter, {}).values():
                        if isinstance(value, Tensor) and value.shape == mask.shape:
                            value.mul_(mask)

        after(None, (), {})
        return optimizer.register_step_post_hook(after)

    def parametrize_(self, model: nn.Module) -> None:
        """Put masks in front of the parameters: `model.layer.weight` is the masked one, what is trained stays whole.

        Take them out with `unparametrize_`.

        Raises:
            ValueError: if a parameter is parametrized already.
        """
        for name, mask in self.items():
            owner, _, attribute = name.rpartition(".")
            if parametrize.is_parametrized(model.get_submodule(owner), attribute):
                raise ValueError(f"{name!r} is parametrized already; take that out first (unparametrize_).")
            self._parameter(model, name)
            parametrize.register_parametrization(model.get_submodule(owner), attribute, _Masked(mask))

    def unparametrize_(self, model: nn.Module) -> None:
        """Take the masks out again; the masked values stay.

        Raises:
            ValueError: if a parameter carries none.
        """
        for name in self:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            if not parametrize.is_parametrized(module, attribute):
                raise ValueError(f"{name!r} carries no mask to take out; call parametrize_ first.")
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write masks, one bit an entry, and new values of kept entries to a safetensors file, whole or not at all."""
        packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().ravel())) for name, mask in self.items()}
        packed |= {_VALUES + name: value[self[name]].cpu() for name, value in self.values_of.items()}
        about = {name: list(mask.shape) for name, mask in self.items()}
        write_tensors(Path(path), packed, {"format": _FORMAT, "shapes": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The masks, on the CPU.

        Raises:
            ValueError: if the file is something else.
        """
        packed, metadata = read_tensors(Path(path))
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{os.fspath(path)!r} is no {_FORMAT!r} file (format {metadata.get('format')!r}).")
        found = {}
        for name, shape in json.loads(metadata["shapes"]).items():
            bits = np.unpackbits(packed[name].numpy(), count=math.prod(shape))
            found[name] = torch.from_numpy(bits.astype(bool)).reshape(shape)
        values = {}
        for name, mask in found.items():
            if _VALUES + name in packed:
                kept = packed[_VALUES + name]
                values[name] = kept.new_zeros(mask.shape).masked_scatter_(mask, kept)
        return cls(found, values=values)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        return [(self._parameter(model, name), mask) for name, mask in self.items()]

    def _parameter(self, model: nn.Module, name: str) -> Tensor:
        known = dict(model.named_parameters())
        if name not in known:
            raise ValueError(f"This model has no parameter {name!r}." + suggest(name, known))
        if known[name].shape != self[name].shape:
            raise ValueError(
                f"The mask of {name!r} has shape {tuple(self[name].shape)}, the parameter {tuple(known[name].shape)}."
            )
        return known[name]


class _Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        kept: Tensor = weight * self.mask
        return kept
