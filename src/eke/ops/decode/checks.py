"""What a step of decoding refuses: parameters that do not fit each other, states that do not fit the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear_attention import LinearAttentionState
from . import native
from .blocks import Block, Hybrid, KeyValues, Linear, Map, Norm, Projection, Ring, Separate

_PARAMETERS: dict[str, tuple[bool, bool]] = {
    "elu": (False, False), "relu": (False, False), "t2r": (True, True), "hedgehog": (True, False),
}  # fmt: skip
"""Which feature maps have a weight, and may have a bias."""


def check_block(number: int, block: Block, sizes: tuple[int, int, int]) -> None:
    """Refuse parameters of a layer that do not fit each other.

    Args:
        number: Of the layer.
        block: It.
        sizes: Width of all layers, heads, size inside the feed-forward part.

    Raises:
        ValueError: naming the part and its shape.
    """
    width, heads, inner = sizes
    size = width // heads
    wanted = {
        "out": (block.out, (width, width)), "up": (block.feed.up, (inner, width)),
        "down": (block.feed.down, (width, inner)),
    }  # fmt: skip
    if block.feed.gate is not None:
        wanted["gate of the feed-forward part"] = (block.feed.gate, (inner, width))
    norms = {"norm": (block.norm, width), "norm of the feed-forward part": (block.feed.norm, width)}
    if isinstance(block.attention, Linear):
        gate, rate = block.attention.gate, block.attention.rate
        if gate is not None:
            rows = width if gate.weight.shape[0] == width else heads
            wanted["gate"] = (gate, (rows, width))
        if rate is not None:
            wanted["rate"] = (rate, (heads, width))
        norms["norm of the attention"] = (block.attention.norm, size)
        factors = block.attention.retention
        if factors is not None and factors.shape != (heads,):
            raise ValueError(f"Layer {number}: retention must be ({heads},), got {tuple(factors.shape)}.")
    elif isinstance(block.attention, Hybrid):
        _check_hybrid(number, block.attention, heads, size)
    _check_projections(number, block, heads, size)
    for name, (part, shape) in wanted.items():
        shaped(f"Layer {number}: {name}", part, shape)
    for name, (norm, last) in norms.items():
        norm_shaped(f"Layer {number}: {name}", norm, last)


def _check_projections(number: int, block: Block, heads: int, size: int) -> None:
    width, given = heads * size, block.projections
    if not isinstance(given, Separate):
        shaped(f"Layer {number}: projections", given, (3 * width, width))
        return
    rows = given.keys.weight.shape[0]
    if rows % size or not 0 < rows <= width or width % rows:
        raise ValueError(
            f"Layer {number}: {heads} heads of {size} share keys of as many heads or of a divisor, got keys "
            f"{tuple(given.keys.weight.shape)}."
        )
    if rows < width and not isinstance(block.attention, Hybrid):
        raise ValueError(
            f"Layer {number}: heads share keys with Hybrid alone, got {type(block.attention).__name__} and "
            f"{rows // size} heads of keys for {heads}."
        )
    for name, part, many in zip(Separate._fields, given, (width, rows, rows)):
        shaped(f"Layer {number}: {name}", part, (many, width))


def _check_hybrid(number: int, kind: Hybrid, heads: int, size: int) -> None:
    if kind.window < 0:
        raise ValueError(f"Layer {number}: window is a number of positions, 0 for none, got {kind.window!r}.")
    if kind.window and (kind.balance is None or kind.balance.shape != (heads,)):
        given = None if kind.balance is None else tuple(kind.balance.shape)
        raise ValueError(f"Layer {number}: a window of {kind.window} needs balance ({heads},), got {given}.")
    for name, part in (("query_map", kind.query_map), ("key_map", kind.key_map)):
        _check_map(f"Layer {number}: {name}", part, heads, size)
    names = kind.query_map.name, kind.key_map.name
    sizes = kind.query_map.features(size), kind.key_map.features(size)
    if len(set(names)) > 1 or len(set(sizes)) > 1:
        raise ValueError(
            f"Layer {number}: maps of queries and keys are of one kind and size, got {names[0]!r} of {sizes[0]} and "
            f"{names[1]!r} of {sizes[1]} features."
        )


def _check_map(name: str, f: Map, heads: int, size: int) -> None:
    if f.name not in _PARAMETERS:
        raise ValueError(f"{name} is one of {', '.join(map(repr, _PARAMETERS))}, got {f.name!r}.")
    weighted, biased = _PARAMETERS[f.name]
    many = f.features(size)
    matrix = (heads, size, many if f.name == "t2r" else size)
    found = [None if x is None else tuple(x.shape) for x in (f.weight, f.bias)]
    bias = (heads, many) if biased else None
    if found[0] != (matrix if weighted else None) or found[1] not in {None, bias}:
        raise ValueError(
            f"{name}: {f.name!r} has weight {matrix if weighted else None} and bias {bias}, got {found[0]} and "
            f"{found[1]}."
        )


def shaped(name: str, part: Projection, shape: tuple[int, int]) -> None:
    """Refuse a projection of another shape.

    Args:
        name: Where it stands.
        part: It.
        shape: (outputs, inputs).

    Raises:
        ValueError: naming the shapes.
    """
    if tuple(part.weight.shape) != shape or (part.bias is not None and tuple(part.bias.shape) != shape[:1]):
        bias = None if part.bias is None else tuple(part.bias.shape)
        raise ValueError(
            f"{name} needs weight {shape} and bias {shape[:1]}, got {tuple(part.weight.shape)} and {bias}."
        )


def norm_shaped(name: str, norm: Norm | None, size: int) -> None:
    """Refuse a norm of another size.

    Args:
        name: Where it stands.
        norm: It.
        size: What it norms.

    Raises:
        ValueError: naming the shapes.
    """
    if norm is None:
        return
    shapes = [tuple(x.shape) for x in (norm.weight, norm.bias) if x is not None]
    if any(shape != (size,) for shape in shapes):
        raise ValueError(f"{name} needs weight and bias of shape {(size,)}, got {shapes}.")


def rotation_fits(rotation: tuple[Tensor, Tensor], x: Tensor, size: int) -> None:
    """Refuse a rotation that does not fit the inputs.

    Args:
        rotation: Cosines and sines.
        x: (batch, width).
        size: Of a head.

    Raises:
        ValueError: naming the shapes.
    """
    if size % 2:
        raise ValueError(f"A rotation turns pairs of elements: heads need an even size, got {size}.")
    for name, part in zip(("cosines", "sines"), rotation):
        fitting = part.ndim == 2 and part.shape[1] == size and part.shape[0] in {1, len(x)}
        if not fitting or part.shape != rotation[0].shape or part.dtype != x.dtype or part.device != x.device:
            raise ValueError(
                f"A rotation's {name} are {x.dtype} of (batch or 1, size) = ({len(x)} or 1, {size}) on {x.device}, got "
                f"{part.dtype} of {tuple(part.shape)} on {part.device}."
            )


def plain(state: LinearAttentionState | KeyValues | Ring) -> bool:
    """Return whether the kernel can change a state where it lies.

    Args:
        state: Of a layer.
    """
    if isinstance(state, LinearAttentionState):
        memory, keys = state
        return native.reads(memory) and native.reads(keys)
    if isinstance(state, Ring):
        parts = (state.memory, state.sums, state.keys, state.values)
        return all(map(native.reads, parts)) and state.real.is_cpu and state.real.is_contiguous()
    keys, values = state.keys, state.values
    if keys.dtype != torch.float32 or values.dtype != torch.float32 or not keys.is_cpu or not values.is_cpu:
        return False
    inner = keys.stride()[2:] == (keys.shape[3], 1)
    return inner and keys.stride() == values.stride() and (state.starts is None or state.starts.is_contiguous())


def fits(
    number: int, block: Block, state: LinearAttentionState | KeyValues | Ring, sizes: tuple[int, int, int]
) -> None:
    """Refuse a state that is not the layer's.

    Args:
        number: Of the layer.
        block: It.
        state: What it is to go on from.
        sizes: Batch, heads and size of a head.

    Raises:
        ValueError: naming what was given.
    """  # noqa: DOC502
    if isinstance(block.attention, Linear):
        _linear_fits(number, state, sizes)
    elif isinstance(block.attention, Hybrid):
        _ring_fits(number, block.attention, state, sizes)
    else:
        _kept_fits(number, state, sizes)


def _linear_fits(number: int, state: object, sizes: tuple[int, int, int]) -> None:
    batch, heads, size = sizes
    if not isinstance(state, LinearAttentionState):
        raise ValueError(f"Layer {number} is linear: its state is a LinearAttentionState, got {type(state).__name__}.")
    if state.memory.shape != (batch, heads, size, size) or state.keys.shape != (batch, heads, size):
        raise ValueError(
            f"Layer {number} needs S {(batch, heads, size, size)} and z {sizes}, got "
            f"{tuple(state.memory.shape)} and {tuple(state.keys.shape)}: the batch "
            "may not change while a sequence goes on."
        )


def _ring_fits(number: int, kind: Hybrid, state: object, sizes: tuple[int, int, int]) -> None:
    batch, heads, size = sizes
    if not isinstance(state, Ring):
        raise ValueError(f"Layer {number} is hybrid: its state is a Ring, got {type(state).__name__}.")
    many, window = kind.key_map.features(size), kind.window
    near = (batch, heads, window, size)
    wanted = ((batch, heads, many, size), (batch, heads, many), near, near, (batch, window))
    found = tuple(tuple(x.shape) for x in (state.memory, state.sums, state.keys, state.values, state.real))
    if found != wanted or state.real.dtype != torch.bool:
        raise ValueError(
            f"Layer {number} needs S, z, near keys, near values and which are real (bool) of shapes {wanted}, got "
            f"{found} and {state.real.dtype}: neither batch nor window may change while a sequence goes on."
        )
    if not 0 <= state.slot < max(1, window):
        raise ValueError(f"Layer {number} has {window} slots, from 0 on, got slot={state.slot!r}.")


def _kept_fits(number: int, state: object, sizes: tuple[int, int, int]) -> None:
    batch, heads, size = sizes
    if not isinstance(state, KeyValues):
        raise ValueError(f"Layer {number} is softmax: its state is KeyValues, got {type(state).__name__}.")
    shape, keys, starts = (batch, heads, size), state.keys.shape, state.starts
    if keys != state.values.shape or len(keys) != 4 or (keys[0], keys[1], keys[3]) != shape:
        raise ValueError(
            f"Layer {number} needs keys and values (batch, heads, capacity, size) = ({batch}, {heads}, capacity, "
            f"{size}), got {tuple(keys)} and {tuple(state.values.shape)}: the batch may not "
            "change while a sequence goes on."
        )
    if not 0 <= state.filled < keys[2]:
        raise ValueError(
            f"Layer {number} has room for {keys[2]} positions and {state.filled} are filled: make states with a larger "
            "capacity."
        )
    if starts is not None and (starts.shape != (batch,) or starts.dtype != torch.int64):
        raise ValueError(
            f"Layer {number}: starts must be int64 of shape ({batch},), got {starts.dtype} of {tuple(starts.shape)}."
        )
