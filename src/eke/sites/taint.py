"""Which inputs of which layers hold a channel, seen by marking the channel with NaN.

NaN passes through everything that handles channels one by one (activations, pooling, permutations, reshapes,
concatenations, normalisation with running statistics) and spreads over everything that mixes them. Units are marked by
the bits of their numbers, once those with the bit set and once those without: 2 log2(units) forward passes tell for
each input of each layer which unit it holds, or that it holds several. Layers that mix channels by a matrix read the
marks and get zeros instead, so that marks end there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .channels import Member, axes_of, is_conv1d, is_depthwise

BOTH = (nn.modules.batchnorm._NormBase, nn.PReLU)
MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.MultiheadAttention)


MIXED = -2
"""In place of a unit: several of them."""

STATE = "#state"
"""Added to the name of a recurrent layer: the state that it starts from."""

Sources = Mapping[str, tuple[Tensor, Tensor]]
"""By name of a layer: numbers of units (units,), and the output channels (units, r) that each stands for. Of recurrent
layers: indices of the hidden state of one direction."""


class MixedError(ValueError):
    """Channels that cannot be told apart somewhere; its text says where."""


def follow(
    model: nn.Module, call: Callable[[nn.Module], object], sources: Sources, *, strict: bool = False
) -> dict[str, Tensor]:
    """Find the layers that hold the units of some layers.

    Args:
        model: In evaluation mode, its statistics finite; only hooks are added, and removed again.
        call: Runs the model on example inputs.
        sources: Layers and their units; the same number may stand at several layers.
        strict: Whether to give up as soon as a layer that averages over channels holds a unit.

    Returns:
        By name of a layer that holds any: for each of its input channels the number of the unit, -1 for none, `MIXED`
        for several; the states that recurrent layers start from under their own names (`STATE`).

    Raises:
        MixedError: if units arrive at the model's output, or the marked model does not run.
    """  # noqa: DOC502
    bits = max(1, int(max(ids.max() for ids, _ in sources.values())).bit_length())
    ones: list[dict[str, Tensor]] = []
    zeros: list[dict[str, Tensor]] = []
    for bit in range(bits):
        for value, passes_found in ((True, ones), (False, zeros)):
            marked = {name: i[((ids >> bit) & 1).bool() == value].flatten() for name, (ids, i) in sources.items()}
            passes_found.append(_marked(model, call, marked, strict=strict))
    held = {}
    for name in dict.fromkeys(name for found in (*ones, *zeros) for name in found):
        one, zero = torch.stack([found[name] for found in ones]), torch.stack([found[name] for found in zeros])
        unit = (one.long() << torch.arange(bits)[:, None]).sum(0)
        unit = unit.where((one | zero).any(0), -1).where(~(one & zero).any(0), MIXED)
        if bool((unit != -1).any()):
            held[name] = unit
    return held


def split_by_source(held: Mapping[str, Tensor], units: Tensor) -> dict[str, Tensor]:
    """Return what layers hold of some units alone, numbered from 0; layers that hold none are left out.

    Args:
        held: From `follow`.
        units: Consecutive ascending numbers.

    Returns:
        By name of a layer: the unit of each input channel, -1 for none, `MIXED` for several.
    """
    first, last = int(units[0]), int(units[-1])
    found = {}
    for name, unit in held.items():
        inside = (unit >= first) & (unit <= last)
        if bool(inside.any()) or bool((unit == MIXED).any()):
            found[name] = torch.where(inside, unit - first, torch.where(unit == MIXED, MIXED, -1))
    return found


def reading_members(model: nn.Module, held: Mapping[str, Tensor]) -> list[Member]:
    """Return the members of layers that hold units.

    Args:
        model: The model.
        held: By name of a layer: the unit of each input channel, see `split_by_source`.

    Returns:
        One member a matrix that reads them, or a layer that passes them on.

    Raises:
        MixedError: if several units arrive at one input, or units at different numbers of inputs.
        NotCuttableError: if a layer that holds them cannot be cut.
    """  # noqa: DOC502
    members = []
    for name, unit in held.items():
        if name.endswith(STATE):
            raise MixedError(f"{name.removesuffix(STATE)}: it starts from them")
        module = model.get_submodule(name)
        if bool((unit == MIXED).any()):
            averages = f"{type(module).__name__} averages over the channels"
            why = averages if isinstance(module, MIXING) else "they arrive mixed"
            raise MixedError(f"{name}: {why}")
        order = torch.argsort(unit, stable=True)
        order = order[unit[order] >= 0]
        units = torch.arange(int(unit.max()) + 1)
        times = len(order) // len(units)
        if not times or not torch.equal(unit[order], units.repeat_interleave(times)):
            raise MixedError(f"{name}: they arrive at different numbers of its inputs")
        axes = axes_of(module, "in")
        indices = order.view(len(units), times)
        # A consumer is one matrix: of a layer with two directions there are two.
        parts = [replace(axes, tensors=(tensor,)) for tensor in axes.tensors] if axes.side == "in" else [axes]
        members += [Member.of(module, name, indices, part) for part in parts]
    return members


def _marked(
    model: nn.Module, call: Callable[[nn.Module], object], channels: Mapping[str, Tensor], *, strict: bool
) -> dict[str, Tensor]:
    """Return which input channels hold NaN by layer, when some output channels of the sources are NaN.

    Raises:
        MixedError: if the outputs of the model hold NaN, or it does not run.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if _is_layer(module):
                handle = module.register_forward_pre_hook(_reading(name, module, found, strict=strict))
                stack.callback(handle.remove)
            if name in channels:
                handle = module.register_forward_hook(_marking(module, channels[name]))
                stack.callback(handle.remove)
        try:
            outputs = pytree.tree_leaves(call(model))
        except MixedError:
            raise
        except Exception as error:
            raise MixedError(f"the marked model does not run ({type(error).__name__}: {error})") from error
    if any(isinstance(o, Tensor) and o.is_floating_point() and bool(o.isnan().any()) for o in outputs):
        raise MixedError("they arrive at the model's output")
    return found


def _marking(module: nn.Module, channels: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    recurrent = isinstance(module, nn.RNNBase | nn.RNNCellBase)

    def mark(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        def marked(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            dim = -1 if recurrent else channel_dim(module, leaf)
            places = channels.to(leaf.device)
            size = int(module.hidden_size) if recurrent else leaf.shape[-1]  # type: ignore[arg-type]
            if recurrent and leaf.shape[-1] > size:  # both directions side by side
                places = torch.cat([places, places + size])
            return leaf.index_fill(dim, places, float("nan"))

        return pytree.tree_map(marked, output)

    return mark


def _reading(
    name: str, module: nn.Module, found: dict[str, Tensor], *, strict: bool
) -> Callable[[nn.Module, Any], Any]:
    def note(x: Tensor, where: str) -> Tensor:
        dim = channel_dim(module, x) % x.dim()
        here = x.isnan().transpose(0, dim).flatten(1).any(1).cpu()
        found[where] = found[where] | here if where in found else here
        return here

    def read(_module: nn.Module, inputs: Any) -> Any:
        if inputs and isinstance(inputs[0], nn.utils.rnn.PackedSequence):
            note(inputs[0].data, name)
            return (inputs[0]._replace(data=torch.nan_to_num(inputs[0].data, nan=0.0)), *_states(inputs[1:]))
        if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
            return None
        x = inputs[0]
        here = note(x, name)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for leaf in pytree.tree_leaves(inputs[1:]):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    note(leaf, name + STATE)
            return (torch.nan_to_num(x, nan=0.0), *_states(inputs[1:]))
        if passes(module) or not bool(here.any()):
            return None
        if strict and isinstance(module, MIXING):
            raise MixedError(f"{name}: {type(module).__name__} averages over the channels")
        return (torch.nan_to_num(x, nan=0.0), *inputs[1:])

    return read


def _states(inputs: Any) -> Any:
    """Return the states that a recurrent layer starts from, without marks."""
    return pytree.tree_map(
        lambda x: torch.nan_to_num(x, nan=0.0) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """Return the dimension of a layer's input or output that holds its channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    if isinstance(module, (*BOTH, nn.GroupNorm)):
        return 1 if x.dim() > 1 else 0
    return -1


def passes(module: nn.Module) -> bool:
    """Return whether a layer handles channels one by one, with parameters for each."""
    return isinstance(module, BOTH) or is_depthwise(module)


def _is_layer(module: nn.Module) -> bool:
    known = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, *BOTH, *MIXING)
    return isinstance(module, known) or is_conv1d(module)
