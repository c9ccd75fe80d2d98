"""What a step of decoding is made of: the parts of a pre-norm block, and what each attention remembers.

Tensors are referred to, never copied: a change of a parameter is a change of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


class Projection(NamedTuple):
    """A linear map: weight (outputs, inputs) and, if any, bias (outputs,)."""

    weight: Tensor
    bias: Tensor | None = None


class Separate(NamedTuple):
    """Projections to queries, keys and values, each of its own; heads may share keys: (key heads x size, width)."""

    queries: Projection
    keys: Projection
    values: Projection


class Norm(NamedTuple):
    """A norm over the last dimension: of layers (mean and variance) or rms (mean of squares)."""

    kind: Literal["layer", "rms"]
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class Feed(NamedTuple):
    """The feed-forward part: down(activation(up(norm(x)))), with a gate down(activation(gate(norm(x))) up(norm(x)))."""

    norm: Norm | None
    up: Projection
    down: Projection
    gate: Projection | None = None


class Map(NamedTuple):
    """A feature map: "elu" and "relu" without parameters, or with some for each head.

    "t2r" is relu(x W + b), W (heads, size, features) and b (heads, features); "hedgehog" is [softmax(x W),
    softmax(-x W)], W (heads, size, size).
    """

    name: Literal["elu", "relu", "t2r", "hedgehog"]
    weight: Tensor | None = None
    bias: Tensor | None = None

    def features(self, size: int) -> int:
        """Return how many features a head has.

        Args:
            size: Of a head's queries and keys.
        """
        if self.name == "t2r" and self.weight is not None:
            return int(self.weight.shape[-1])
        return 2 * size if self.name == "hedgehog" else size


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear attention as `ops.linear_attention` defines it.

    Args:
        feature_map: "elu", "relu" or "identity".
        normalize: Whether to divide by the sum of weights.
        retention: Factor by which each head's state shrinks, (heads,), or None.
        gate: Projection to gates, whose sixteenth root of the sigmoid is the factor: a row a head or a row a feature.
        rate: Projection to rates of the delta rule, a row a head; None to add.
        norm: Of each head's output, or None.
    """

    feature_map: Literal["elu", "relu", "identity"] = "elu"
    normalize: bool = True
    retention: Tensor | None = None
    gate: Projection | None = None
    rate: Projection | None = None
    norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Softmax:
    """Softmax attention over keys and values that are kept.

    Args:
        window: How many positions are seen, the own one included; None for all.
    """

    window: int | None = None


@dataclass(frozen=True, slots=True)
class Hybrid:
    """Softmax over the last positions and linear attention to those before, as `eke.nn.HybridAttention` defines it.

    Args:
        query_map: Features of queries.
        key_map: Features of keys, as many.
        window: Positions that are seen through the softmax, the own one included; 0 for linear attention alone.
        balance: Logarithm of what far keys weigh, (heads,); needed with a window.
    """

    query_map: Map
    key_map: Map
    window: int = 0
    balance: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: x + out(attention(projections(norm(x)))), then x + feed(x).

    Args:
        norm: Before the attention, or None.
        projections: To queries, keys and values, (3 width, width), or three of them.
        attention: `Linear`, `Softmax` or `Hybrid`.
        out: Behind the attention, (width, width).
        feed: The feed-forward part.
    """

    norm: Norm | None
    projections: Projection | Separate
    attention: Linear | Softmax | Hybrid
    out: Projection
    feed: Feed

    def tensors(self) -> list[Tensor]:
        """Return every parameter that a step reads, in a fixed order."""
        feed, kind = self.feed, self.attention
        parts: list[Norm | Projection | Map | None] = [self.norm, self.out, feed.norm, feed.up, feed.down, feed.gate]
        parts += self.projections if isinstance(self.projections, Separate) else (self.projections,)
        found: list[Tensor | None] = []
        if isinstance(kind, Linear):
            parts += [kind.gate, kind.rate, kind.norm]
            found.append(kind.retention)
        elif isinstance(kind, Hybrid):
            parts += [kind.query_map, kind.key_map]
            found.append(kind.balance)
        found += [x for part in parts if part is not None for x in (part.weight, part.bias)]
        return [x for x in found if x is not None]

    def key_heads(self, heads: int) -> int:
        """Return how many heads of keys there are.

        Args:
            heads: Of queries.
        """
        if not isinstance(self.projections, Separate):
            return heads
        return self.projections.keys.weight.shape[0] * heads // self.out.weight.shape[0]


@dataclass(slots=True)
class KeyValues:
    """Keys and values of the positions so far, with room for more.

    Args:
        keys: (batch, heads, capacity, size); a step writes position `filled`.
        values: The same.
        filled: Positions read so far.
        starts: First position of each sample that is no padding, (batch,), int64; None for 0.
    """

    keys: Tensor
    values: Tensor
    filled: int = 0
    starts: Tensor | None = None


@dataclass(slots=True)
class Ring:
    """What hybrid attention remembers: the linear state of far keys, and the near ones in a ring.

    Args:
        memory: S, (batch, heads, features, size).
        sums: z, (batch, heads, features).
        keys: The last `window` keys, (batch, heads, window, size), the oldest at `slot`.
        values: The same.
        real: Which of them are positions, (batch, window), bool.
        slot: Which one leaves next.
    """

    memory: Tensor
    sums: Tensor
    keys: Tensor
    values: Tensor
    real: Tensor
    slot: int = 0

    def ordered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and which are real, the oldest first."""
        if not self.slot:
            return self.keys, self.values, self.real
        return self.keys.roll(-self.slot, 2), self.values.roll(-self.slot, 2), self.real.roll(-self.slot, 1)

    def move(self) -> None:
        """Count the position that was written into the slot."""
        self.slot = (self.slot + 1) % max(1, self.real.shape[1])
