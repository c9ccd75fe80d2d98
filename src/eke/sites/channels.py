"""Channel groups: channels of several modules that can only be cut together.

If channel j of a convolution goes, so do entry j of the normalisation after it, the input columns that read it (several
after a flatten, shifted after a concatenation) and channel j of whatever is added to it. A `ChannelGroup` holds one row
of indices per unit and member; a unit is the smallest set of channels that can go alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from .surgery import Surgery

Side = Literal["out", "in", "both"]


class NotCuttableError(ValueError):
    """A module whose channels cannot be cut; its text is the reason."""


@dataclass(frozen=True)
class Axes:
    """What one side of a module consists of.

    Args:
        side: "both" where inputs and outputs are the same channels (normalisation, depthwise convolution).
        tensors: (attribute, dimension) of the parameters and buffers that run along the channels.
        counts: (module attribute, tensor attribute, dimension, divisor) of the attributes that count them.
        matrix: Whether a matrix runs along them.
        kernel: Columns of the site's matrix per input channel.
        block: Channels that must go together (those of one group of a GroupNorm).
    """

    side: Side
    tensors: tuple[tuple[str, int], ...]
    counts: tuple[tuple[str, str, int, int], ...]
    matrix: bool = False
    kernel: int = 1
    block: int = 1


@dataclass(frozen=True, eq=False)
class Member:
    """One side of one module in a group.

    Args:
        module_name: Name of the module.
        side: Which of its channels.
        indices: (size, r) long tensor: the channels on that side that unit i stands for.
        axes: The tensors along that side.
        shapes: Shapes of these tensors in the original model, in the order of `axes.tensors`.
    """

    module_name: str
    side: Side
    indices: Tensor
    axes: Axes
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: nn.Module, name: str, indices: Tensor, axes: Axes) -> Member:
        """Return the member of a module; tensors may be those of its children ("proj.weight")."""
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return cls(
            name, axes.side, indices, axes, tuple(tuple(tensors[attribute].shape) for attribute, _ in axes.tensors)
        )

    @property
    def parameter(self) -> str:
        """Full name of its first tensor; of a consumer that of its matrix."""
        return self._full(self.axes.tensors[0][0])

    @property
    def columns(self) -> Tensor:
        """Columns of the site's (m, n) matrix that unit i feeds, (size, r * kernel); for side "in"."""
        inner = torch.arange(self.axes.kernel)
        return (self.indices.unsqueeze(-1) * self.axes.kernel + inner).flatten(1)

    def cut(self, dropped: Tensor) -> Surgery:
        """Return the surgery of this member alone.

        Args:
            dropped: Long tensor of units.

        Returns:
            Surgery of its tensors and attributes.
        """
        gone = self.indices[dropped].flatten().tolist()
        lengths = {shape[dim] for (_, dim), shape in zip(self.axes.tensors, self.shapes)}
        left = {length: tuple(sorted(set(range(length)).difference(gone))) for length in lengths}
        slices, shapes = {}, {}
        for (attribute, dim), shape in zip(self.axes.tensors, self.shapes):
            name = self._full(attribute)
            slices[name] = {dim: left[shape[dim]]}
            shapes[name] = shape
        counts = {a: (self._full(tensor), dim, unit) for a, tensor, dim, unit in self.axes.counts}
        return Surgery(slices, shapes, {self.module_name: counts} if counts else {})

    def _full(self, attribute: str) -> str:
        return f"{self.module_name}.{attribute}" if self.module_name else attribute


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of several modules that go together.

    Args:
        name: Name of the module whose output channels they are; "#1", "#2" are added where these fall into parts.
        size: Number of units.
        members: All sides of all modules that change.
        unit: What a unit is, in the plural: "channels", "heads", "hidden units".
    """

    name: str
    size: int
    members: tuple[Member, ...]
    unit: str = "channels"

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members whose matrix reads the channels."""
        return tuple(member for member in self.members if member.side == "in" and member.axes.matrix)

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members that make the channels."""
        return tuple(member for member in self.members if member.side == "out")

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that change, each once."""
        return tuple(dict.fromkeys(member.module_name for member in self.members))

    def dropped(self, keep: Sequence[int]) -> Tensor:
        """Return the units that are not in `keep`, ascending.

        Raises:
            ValueError: if `keep` is empty, repeats a unit or names one that does not exist.
        """
        kept = set(map(int, keep))
        if not kept or len(kept) != len(keep) or min(kept) < 0 or max(kept) >= self.size:
            raise ValueError(
                f"Channel group {self.name!r} has units 0 to {self.size - 1}; keep must name at least one, each once, "
                f"got {sorted(kept)[:8]} ({len(keep)} entries)."
            )
        return torch.tensor(sorted(set(range(self.size)) - kept), dtype=torch.long)

    def cut(self, keep: Sequence[int]) -> Surgery:
        """Return the surgery that leaves the units `keep`.

        Raises:
            ValueError: if `keep` is empty, repeats a unit or names one that does not exist.
        """  # noqa: DOC502
        dropped = self.dropped(keep)
        return Surgery.merge(member.cut(dropped) for member in self.members)


def axes_of(module: nn.Module, side: Side) -> Axes:
    """Say which tensors of a module run along its input or output channels.

    Args:
        module: Module of the model.
        side: "out" or "in" as the dependency graph sees it.

    Returns:
        The axes; without tensors if nothing of the module changes.

    Raises:
        NotCuttableError: if eke cannot cut this module; the text says why.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        axes = _conv_axes(module, side)
    elif isinstance(module, nn.Linear):
        axes = _matrix_axes(side, ("out_features", 0), ("in_features", 1))
    elif is_conv1d(module):
        axes = _matrix_axes(side, ("nf", 1), ("nx", 0))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        axes = _shared_axes(("weight", "bias", "running_mean", "running_var"), "num_features")
    elif isinstance(module, nn.PReLU):
        axes = _shared_axes(("weight",) if module.num_parameters > 1 else (), "num_parameters")
    elif isinstance(module, nn.GroupNorm):
        axes = _group_norm_axes(module)
    elif isinstance(module, nn.Embedding):
        axes = Axes("out", (("weight", 1),), (("embedding_dim", "weight", 1, 1),))
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase) and side == "in":
        ends = [name for name in module._parameters if name in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")]
        counts = (("input_size", ends[0], 1, 1),)
        return Axes("in", tuple((name, 1) for name in ends), counts, matrix=True)
    elif isinstance(module, nn.LayerNorm):
        raise NotCuttableError(f"{type(module).__name__} averages over the channels")
    else:
        raise NotCuttableError(f"{type(module).__name__} is kept whole")
    if axes.matrix and not any(name.startswith("weight") for name in module._parameters):
        raise NotCuttableError(f"the weight of this {type(module).__name__} is parametrized")
    if axes.side == "out" and axes.matrix:
        axes = replace(axes, tensors=(*axes.tensors, *_own_entries(module, axes)))
    present = tuple((a, d) for a, d in axes.tensors if module._parameters.get(a, module._buffers.get(a)) is not None)
    counted = tuple(c for c in axes.counts if (c[1], c[2]) in present and hasattr(module, c[0]))
    return Axes(axes.side, present, counted, axes.matrix, axes.kernel, axes.block)


def _own_entries(module: nn.Module, axes: Axes) -> list[tuple[str, int]]:
    """Return the parameters that a class of the user's adds with one entry an output channel (a gain, a scale)."""
    known = {attribute for attribute, _ in axes.tensors} | {"weight"}
    ((_, weight, dim, _),) = axes.counts[:1]
    size = module.get_parameter(weight).shape[dim]
    added = {**module._parameters, **module._buffers}
    return [(a, 0) for a, t in added.items() if a not in known and t is not None and t.dim() and t.shape[0] == size]


def _conv_axes(module: nn.modules.conv._ConvNd, side: Side) -> Axes:
    kernel = torch.Size(module.kernel_size).numel()
    if is_depthwise(module):
        counts = tuple((name, "weight", 0, 1) for name in ("in_channels", "out_channels", "groups"))
        return Axes("both", (("weight", 0), ("bias", 0)), counts)
    if module.groups > 1:
        return _grouped_axes(module, side)
    out, into = (1, 0) if module.transposed else (0, 1)
    return _matrix_axes(side, ("out_channels", out), ("in_channels", into), kernel=kernel)


def _grouped_axes(module: nn.modules.conv._ConvNd, side: Side) -> Axes:
    """Return the axes of a convolution whose groups go as wholes, inputs and outputs together."""  # noqa: DOC501
    into, out = module.in_channels // module.groups, module.out_channels // module.groups
    if module.transposed or out % into:
        raise NotCuttableError(f"convolution in {module.groups} groups of {into} inputs and {out} outputs")
    if side == "in":
        return Axes("in", (), (), block=into)
    counts = (("out_channels", "weight", 0, 1), ("in_channels", "weight", 0, out // into), ("groups", "weight", 0, out))
    return Axes("out", (("weight", 0), ("bias", 0)), counts, block=out)


def is_depthwise(module: nn.Module) -> bool:
    """Return whether it is a convolution of each channel alone."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def is_conv1d(module: nn.Module) -> bool:
    """Return whether it is GPT-2's transposed linear layer, without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _matrix_axes(side: Side, out: tuple[str, int], into: tuple[str, int], *, kernel: int = 1) -> Axes:
    if side == "out":
        return Axes("out", (("weight", out[1]), ("bias", 0)), ((out[0], "weight", out[1], 1),), matrix=True)
    return Axes("in", (("weight", into[1]),), ((into[0], "weight", into[1], 1),), matrix=True, kernel=kernel)


def _shared_axes(tensors: tuple[str, ...], count: str) -> Axes:
    return Axes("both", tuple((name, 0) for name in tensors), tuple((count, name, 0, 1) for name in reversed(tensors)))


def _group_norm_axes(module: nn.GroupNorm) -> Axes:
    if module.weight is None:
        raise NotCuttableError(f"GroupNorm in {module.num_groups} groups without weights")
    block = module.num_channels // module.num_groups
    counts = (("num_channels", "weight", 0, 1), ("num_groups", "weight", 0, block))
    return Axes("both", (("weight", 0), ("bias", 0)), counts, block=block)
