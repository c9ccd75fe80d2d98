"""One token through all layers in one call: what a transformer does for each position that it generates.

    decoder = Decoder(blocks, heads=8, last=Norm("layer", w, b), head=Projection(weight))
    states = decoder.states(batch, capacity=3072)     # a matrix for linear attention, room for keys with softmax
    logits = decoder(embedded, states)                # (batch, width) -> (batch, vocabulary); the states move on

Norms, projections, feature map, update of the state, read-out, feed-forward part and head run in one native kernel,
with linear attention and its family, with softmax over kept keys, in turns, or both at once with one denominator
(`Hybrid`: what `eke.nn.linearize` makes of softmax attention). Queries and keys may be rotated by their positions,
heads may share keys (with `Hybrid`), and the feed-forward part may have a gate. Weights are read where the
parameters lie: every change of them counts from the next step on, and nothing is copied. Elsewhere (other types or
devices, no compiler) torch does the same. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear_attention import LinearAttentionState
from . import native, reference
from .blocks import (
    Activation,
    Block,
    Feed,
    Hybrid,
    KeyValues,
    Linear,
    Map,
    Norm,
    Projection,
    Ring,
    Separate,
    Softmax,
)
from .checks import check_block, fits, norm_shaped, plain, rotation_fits, shaped

__all__ = [
    "Block", "Decoder", "Feed", "Hybrid", "KeyValues", "Linear", "Map", "Norm", "Projection", "Ring", "Separate",
    "Softmax",
]  # fmt: skip

State = LinearAttentionState | KeyValues | Ring


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
            elif isinstance(block.attention, Hybrid):
                many, window = block.attention.key_map.features(size), block.attention.window
                memory = torch.zeros(batch, self.heads, many, size, dtype=kind, device=weight.device)
                near = memory.new_zeros(2, batch, self.heads, window, size)
                real = torch.zeros(batch, window, dtype=torch.bool, device=weight.device)
                states.append(Ring(memory, memory.new_zeros(batch, self.heads, many), near[0], near[1], real))
            else:
                room = weight.new_zeros(2, batch, self.heads, capacity, size, requires_grad=False)
                states.append(KeyValues(room[0], room[1]))
        return states

    @torch.no_grad()
    def __call__(self, x: Tensor, states: Sequence[State], *, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Take one position of every sample through all layers.

        Args:
            x: (batch, width): embedded tokens.
            states: What each layer has read so far, from `states` or an earlier step; changed in place.
            rotation: Cosines and sines by which each head's queries and keys are turned, (batch or 1, size): element e
                of the first half with element e of the second. None for none.

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
            fits(number, block, state, (x.shape[0], self.heads, self.width // self.heads))
        if rotation is not None:
            rotation_fits(rotation, x, self.width // self.heads)
        run = self._kernel(x, states)
        if run is not None:
            turned = None if rotation is None else (rotation[0].contiguous(), rotation[1].contiguous())
            return run(x.contiguous(), states, rotation=turned)
        return reference.step(
            x, self.blocks, states, heads=self.heads, activation=self.activation, last=self.last, head=self.head,
            rotation=rotation,
        )  # fmt: skip

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
        if self._native is None or not all(map(plain, states)):
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
        for number, block in enumerate(self.blocks):
            check_block(number, block, (width, self.heads, inner))
        norm_shaped("The last norm", self.last, width)
        if self.head is not None:
            shaped("The head", self.head, (self.head.weight.shape[0], width))
