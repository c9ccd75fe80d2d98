"""One token through all layers in one call: what a transformer does for each position that it generates.

    decoder = Decoder(blocks, heads=8, last=Norm("layer", w, b), head=Projection(weight))
    states = decoder.states(batch, capacity=3072)     # a matrix for linear attention, room for keys with softmax
    logits = decoder(embedded, states)                # (batch, width) -> (batch, vocabulary); the states move on

Norms, projections, feature map, update of the state, read-out, feed-forward part and head run in one native kernel,
with linear attention and its family, with softmax over kept keys, or both in turns. Weights are read where the
parameters lie: every change of them counts from the next step on, and nothing is copied. Elsewhere (other types or
devices, no compiler) torch does the same. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear_attention import LinearAttentionState
from . import native, reference
from .blocks import Activation, Block, Feed, KeyValues, Linear, Norm, Projection, Softmax

__all__ = ["Block", "Decoder", "Feed", "KeyValues", "Linear", "Norm", "Projection", "Softmax"]

State = LinearAttentionState | KeyValues


class Decoder:
    """All layers of a transformer for one position at a time.

    Args:
        blocks: Layers, all of one width.
        heads: Of every attention.
        activation: Of every feed-forward part: "gelu", "gelu_tanh", "relu" or "silu".
        last: Norm behind the last block, or None.
        head: Projection to the outputs, or None.

    Raises:
        ValueError: if shapes do not fit each other.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        heads: int,
        activation: Activation = "gelu",
        last: Norm | None = None,
        head: Projection | None = None,
    ) -> None:
        if not blocks:
            raise ValueError(f"A decoder needs at least one block, got {len(blocks)}.")
        self.blocks, self.heads, self.activation, self.last, self.head = tuple(blocks), heads, activation, last, head
        if activation not in reference.ACTIVATIONS:
            known = ", ".join(map(repr, reference.ACTIVATIONS))
            raise ValueError(f"activation is one of {known}, got {activation!r}.")
        self.width = blocks[0].out.weight.shape[0]
        ends = [x for part in (last, head) if part is not None for x in (part.weight, part.bias) if x is not None]
        self._tensors = [x for block in blocks for x in block.tensors()] + ends
        self._addresses: list[int] = []
        self._native: native.Native | None = None
        self._check()

    def states(self, batch: int, *, capacity: int = 0) -> list[State]:
        """Return what the layers remember before the first position.

        Args:
            batch: Samples.
            capacity: Positions that softmax attention has room for.
        """
        size = self.width // self.heads
        weight = self.blocks[0].out.weight
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        states: list[State] = []
        for block in self.blocks:
            if isinstance(block.attention, Linear):
                memory = torch.zeros(batch, self.heads, size, size, dtype=kind, device=weight.device)
                states.append(LinearAttentionState(memory, memory.new_zeros(batch, self.heads, size)))
            else:
                room = weight.new_zeros(2, batch, self.heads, capacity, size, requires_grad=False)
                states.append(KeyValues(room[0], room[1]))
        return states

    @torch.no_grad()
    def __call__(self, x: Tensor, states: Sequence[State]) -> Tensor:
        """Take one position of every sample through all layers.

        Args:
            x: (batch, width): embedded tokens.
            states: What each layer has read so far, from `states` or an earlier step; changed in place.

        Returns:
            (batch, outputs of the head), or (batch, width) without one.

        Raises:
            ValueError: if x or a state does not fit, or there is no room for another position.
        """
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"A step takes (batch, width) = (batch, {self.width}), got {tuple(x.shape)}.")
        if len(states) != len(self.blocks):
            raise ValueError(f"A step needs a state for each of {len(self.blocks)} layers, got {len(states)}.")
        for number, (block, state) in enumerate(zip(self.blocks, states)):
            _fits(number, block, state, (x.shape[0], self.heads, self.width // self.heads))
        run = self._kernel(x, states)
        if run is not None:
            return run(x.contiguous(), states)
        return reference.step(
            x, self.blocks, states, heads=self.heads, activation=self.activation, last=self.last, head=self.head
        )

    def fused(self) -> bool:
        """Return whether the native kernel can read all parameters: float32, contiguous, on the CPU."""
        return native.available() and all(map(native.reads, self._tensors))

    def _kernel(self, x: Tensor, states: Sequence[State]) -> native.Native | None:
        if x.dtype != torch.float32 or not x.is_cpu:
            return None
        if [t.data_ptr() for t in self._tensors] != self._addresses:
            self._check()  # somebody put other memory in their place
            self._native = None
            if self.fused():
                self._native = native.Native(
                    self.blocks, heads=self.heads, activation=self.activation, last=self.last, head=self.head
                )
            self._addresses = [t.data_ptr() for t in self._tensors]
        if self._native is None or not all(map(_plain, states)):
            return None
        return self._native

    def _check(self) -> None:
        """Refuse parameters that do not fit each other.

        Raises:
            ValueError: naming the part and its shape.
        """
        width, inner = self.width, self.blocks[0].feed.up.weight.shape[0]
        if self.heads < 1 or width % self.heads:
            raise ValueError(f"The width must be a multiple of heads, got {width} and {self.heads}.")
        size = width // self.heads
        for number, block in enumerate(self.blocks):
            wanted = {
                "projections": (block.projections, (3 * width, width)), "out": (block.out, (width, width)),
                "up": (block.feed.up, (inner, width)), "down": (block.feed.down, (width, inner)),
            }  # fmt: skip
            norms = {"norm": (block.norm, width), "norm of the feed-forward part": (block.feed.norm, width)}
            if isinstance(block.attention, Linear):
                gate, rate = block.attention.gate, block.attention.rate
                if gate is not None:
                    rows = width if gate.weight.shape[0] == width else self.heads
                    wanted["gate"] = (gate, (rows, width))
                if rate is not None:
                    wanted["rate"] = (rate, (self.heads, width))
                norms["norm of the attention"] = (block.attention.norm, size)
                factors = block.attention.retention
                if factors is not None and factors.shape != (self.heads,):
                    raise ValueError(f"Layer {number}: retention must be ({self.heads},), got {tuple(factors.shape)}.")
            for name, (part, shape) in wanted.items():
                _shaped(f"Layer {number}: {name}", part, shape)
            for name, (norm, last) in norms.items():
                _norm_shaped(f"Layer {number}: {name}", norm, last)
        _norm_shaped("The last norm", self.last, width)
        if self.head is not None:
            _shaped("The head", self.head, (self.head.weight.shape[0], width))


def _shaped(name: str, part: Projection, shape: tuple[int, int]) -> None:
    if tuple(part.weight.shape) != shape or (part.bias is not None and tuple(part.bias.shape) != shape[:1]):
        bias = None if part.bias is None else tuple(part.bias.shape)
        raise ValueError(
            f"{name} needs weight {shape} and bias {shape[:1]}, got {tuple(part.weight.shape)} and {bias}."
        )


def _norm_shaped(name: str, norm: Norm | None, size: int) -> None:
    if norm is None:
        return
    shapes = [tuple(x.shape) for x in (norm.weight, norm.bias) if x is not None]
    if any(shape != (size,) for shape in shapes):
        raise ValueError(f"{name} needs weight and bias of shape {(size,)}, got {shapes}.")


def _plain(state: State) -> bool:
    """Return whether the kernel can change a state where it lies."""
    if isinstance(state, LinearAttentionState):
        memory, keys = state
        return native.reads(memory) and native.reads(keys)
    keys, values = state.keys, state.values
    if keys.dtype != torch.float32 or values.dtype != torch.float32 or not keys.is_cpu or not values.is_cpu:
        return False
    inner = keys.stride()[2:] == (keys.shape[3], 1)
    return inner and keys.stride() == values.stride() and (state.starts is None or state.starts.is_contiguous())


def _fits(number: int, block: Block, state: State, sizes: tuple[int, int, int]) -> None:
    batch, heads, size = sizes
    if isinstance(block.attention, Linear):
        if not isinstance(state, LinearAttentionState):
            raise ValueError(
                f"Layer {number} is linear: its state is a LinearAttentionState, got {type(state).__name__}."
            )
        if state.memory.shape != (batch, heads, size, size) or state.keys.shape != (batch, heads, size):
            raise ValueError(
                f"Layer {number} needs S {(batch, heads, size, size)} and z {sizes}, got "
                f"{tuple(state.memory.shape)} and {tuple(state.keys.shape)}: the batch "
                "may not change while a sequence goes on."
            )
        return
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
