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


class Norm(NamedTuple):
    """A norm over the last dimension: of layers (mean and variance) or rms (mean of squares)."""

    kind: Literal["layer", "rms"]
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class Feed(NamedTuple):
    """The feed-forward part: down(activation(up(norm(x))))."""

    norm: Norm | None
    up: Projection
    down: Projection


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
class Block:
    """One layer: x + out(attention(projections(norm(x)))), then x + feed(x).

    Args:
        norm: Before the attention, or None.
        projections: To queries, keys and values, (3 width, width).
        attention: `Linear` or `Softmax`.
        out: Behind the attention, (width, width).
        feed: The feed-forward part.
    """

    norm: Norm | None
    projections: Projection
    attention: Linear | Softmax
    out: Projection
    feed: Feed

    def tensors(self) -> list[Tensor]:
        """Return every parameter that a step reads, in a fixed order."""
        feed = self.feed
        parts: list[Norm | Projection | None] = [self.norm, self.projections, self.out, feed.norm, feed.up, feed.down]
        found: list[Tensor | None] = []
        if isinstance(self.attention, Linear):
            parts += [self.attention.gate, self.attention.rate, self.attention.norm]
            found.append(self.attention.retention)
        found += [x for part in parts if part is not None for x in (part.weight, part.bias)]
        return [x for x in found if x is not None]


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
