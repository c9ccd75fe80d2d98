"""ZiCo: how large gradients are against how much they vary from batch to batch, in a network that was never trained.

With the gradients g_i of batches i = 1..B at a weight w of layer l, over the weights with sd > 0,

    S_l = sum_w mean_i |g_i[w]| / sd_i(g_i[w]),     ZiCo = sum over layers with S_l > 0 of ln S_l.

sd is that of a population. With two batches every ratio is at least 1 (in general 1 / sqrt(B - 1)), so ZiCo is at
least the sum of ln(number of active weights): the size of the layers explains most of it, see `log_numel`. What is
left is `LayerStatistic.log_mean`.

Source: G. Li, Y. Yang, K. Bhardwaj, R. Marculescu, "ZiCo: Zero-shot NAS via Inverse Coefficient of Variation on
Gradients", 2023, and its code. Cost: one forward and backward pass a batch, four float64 numbers a weight for any B
(Welford's update, exactly zero for equal gradients; the code keeps all gradients).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from .._types import Batch, Loss
from .subject import apart, cross_entropy, gradients, loss_of, weights


class Spread:
    """Mean, mean absolute value and variance of tensors that come one by one."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._absolute = self._squares = torch.empty(0)

    def add(self, value: Tensor) -> None:
        """Take one more tensor; all have one shape."""
        value = value.detach().to(torch.float64)
        if self.count == 0:
            self._mean, self._absolute, self._squares = torch.zeros_like(value), torch.zeros_like(value), value * 0
        self.count += 1
        before = value - self._mean
        self._mean += before / self.count
        self._squares += before * (value - self._mean)
        self._absolute += (value.abs() - self._absolute) / self.count

    def ratios(self) -> Tensor:
        """Return mean |value| / standard deviation of those entries that vary, flat."""
        deviation = (self._squares / self.count).sqrt()
        varies = deviation != 0
        return self._absolute[varies] / deviation[varies]

    @property
    def is_zero(self) -> bool:
        """Whether all tensors were zero."""
        return not bool(self._absolute.any())


@dataclass(frozen=True)
class LayerStatistic:
    """What one layer adds to ZiCo.

    Args:
        name: Of the weight.
        entries: Number of weights.
        active: Those whose gradient varies.
        ratio_sum: S of the layer.
    """

    name: str
    entries: int
    active: int
    ratio_sum: float

    @property
    def log_sum(self) -> float:
        """What the layer adds to ZiCo: ln S, 0 for S = 0."""
        return log(self.ratio_sum) if self.ratio_sum > 0 else 0.0

    @property
    def log_mean(self) -> float:
        """The part that is not size: ln(S / active), 0 without active weights."""
        return log(self.ratio_sum / self.active) if self.active else 0.0


def zico(model: nn.Module, batches: Iterable[Batch], *, loss: Loss = cross_entropy) -> float:
    """Score an untrained network by the inverse coefficient of variation of its gradients.

    The model, its gradients, its buffers and the global random numbers stay as they are.

    Args:
        model: Module with its initial weights.
        batches: Two or more batches, (inputs, labels) or mappings with "labels"; read once.
        loss: `loss(model, batch)`, the mean loss.

    Returns:
        The score, larger is better; 0 if no weight has any influence (disconnected networks).

    Raises:
        ValueError: if there are fewer than two batches, they all give the same gradients, a batch has no labels or one
            that is no class, or nothing can be scored.
        FloatingPointError: if a loss or a gradient is not finite.
    """  # noqa: DOC502
    return sum(layer.log_sum for layer in zico_layers(model, batches, loss=loss))


def zico_layers(model: nn.Module, batches: Iterable[Batch], *, loss: Loss = cross_entropy) -> list[LayerStatistic]:
    """Return what each layer adds to `zico`.

    Args:
        model: As for `zico`.
        batches: As for `zico`.
        loss: As for `zico`.

    Returns:
        One entry a layer, in the order of the modules.

    Raises:
        ValueError: as for `zico`.
        FloatingPointError: as for `zico`.
    """  # noqa: DOC502
    with apart(model) as double:
        chosen = weights(double)
        spreads = [Spread() for _ in chosen]
        for number, batch in enumerate(batches):
            grads = gradients(loss_of(double, batch, loss, number), chosen.values())
            for spread, grad in zip(spreads, grads):
                spread.add(grad)
        return statistics(list(chosen), spreads)


def statistics(names: Sequence[str], spreads: Sequence[Spread]) -> list[LayerStatistic]:
    """Return the statistics of layers whose gradients were gathered.

    Args:
        names: Of the weights.
        spreads: Their gradients.

    Returns:
        One entry a layer.

    Raises:
        ValueError: if fewer than two batches came, or all gave the same gradients.
        FloatingPointError: if a gradient was not finite.
    """
    count = spreads[0].count
    if count < 2:
        raise ValueError(f"ZiCo compares gradients of at least 2 batches, got {count}; give two or more.")
    layers = []
    for name, spread in zip(names, spreads):
        ratios = spread.ratios()
        total = float(ratios.sum())
        if not torch.isfinite(spread._absolute).all():
            raise FloatingPointError(f"The gradient of {name!r} is not finite in one of {count} batches.")
        layers.append(LayerStatistic(name, spread._absolute.numel(), ratios.numel(), total))
    if not any(layer.active for layer in layers) and not all(spread.is_zero for spread in spreads):
        raise ValueError(
            f"All {count} batches give the same gradients, so nothing varies: give batches of different samples."
        )
    return layers
