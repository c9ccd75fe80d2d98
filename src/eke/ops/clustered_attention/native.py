"""The native kernel of clustered attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def serves(x: Tensor) -> bool:
    """Return whether the kernel computes on this tensor."""
    return False


def attend(
    inputs: tuple[Tensor, ...], groups: Tensor, *, topk: Sequence[int], mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Refuse."""
    raise NotImplementedError
