"""Estimates of a mean over all positions from the features of a few: Phi = sum_i a_i f_i, from N drawn positions.

With replacement: (1/N) sum f_q. Without, in the order of the draw (Des Raj): (1/N) sum_n c_n f_n with
c_n = P_n + (N - 1 - n) a_n, P_n the mass that is left before draw n. Without, whatever the order (Murthy):
sum_{i in S} a_i R_i f_i with R_i = P(S | i first) / P(S), which varies least.

The derivative by a_i that is unbiased is the weight of f_i divided by a_i, held fixed; the one that was published with
the method ("paper_code") is not, and is here for comparison alone. P(S) is an integral over the time at which the first
position that was not drawn would arrive, were position i to arrive after an exponential time of rate a_i.
Sources: Katharopoulos and Fleuret, "Processing megapixel images with deep attention-sampling models", 2019; Des Raj,
1956; Murthy, 1957; Kool and others, "Estimating gradients for discrete random variables by sampling without
replacement", 2020. The derivative was derived here and is tested by enumeration.
Cost: O(K log N) for a draw from K positions; O(N) for the weights, O(N (60 + 10 sqrt(N))) for Murthy's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["corrected", "murthy", "paper_code"]
_ESTIMATORS = ("corrected", "murthy", "paper_code")
_SUM_TOLERANCE = 1e-4
_NATS = 40
"""How far below its peak the integrand is cut: exp(-40) is less than the rounding of float64."""


def draw(
    logits: Tensor, samples: int, *, replacement: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Draw positions in proportion to softmax(logits), in the order of the draw.

    Without replacement the largest of logits plus Gumbel noise are taken, in float64: no position is lost to underflow.

    Args:
        logits: (batch, positions); -inf where nothing may be drawn.
        samples: Positions to draw for each row.
        replacement: Whether a position can be drawn again.
        generator: Of the randomness, on the device of the logits.

    Returns:
        Indices, (batch, samples), int64.

    Raises:
        ValueError: if the logits are not (batch, positions) or hold NaN or +inf, or there are fewer positions than
            draws.
    """
    if samples < 1:
        raise ValueError(f"At least one position must be drawn, got samples={samples}.")
    _check_logits(logits, samples, replacement=replacement)
    scores = logits.detach().to(torch.float64)
    shape = (len(scores), samples, scores.shape[1]) if replacement else scores.shape
    # Exponential times as -log(1 - u); none is 0. Tensor.exponential_ takes three times as long.
    noise = torch.rand(shape, dtype=torch.float64, device=logits.device, generator=generator)
    noise = noise.neg_().log1p_().neg_().clamp_min_(torch.finfo(torch.float64).tiny)
    if replacement:
        # One race for each draw costs K numbers; multinomial would need probabilities, which underflow.
        return (scores.unsqueeze(1) - noise.log()).argmax(-1)
    return (scores - noise.log()).topk(samples, dim=-1, sorted=True).indices


def _check_logits(logits: Tensor, samples: int, *, replacement: bool) -> None:
    """Refuse logits from which so many positions cannot be drawn.

    Raises:
        ValueError: naming shape, value or number.
    """
    if logits.ndim != 2:
        raise ValueError(f"Logits must be (batch, positions), got {tuple(logits.shape)}.")
    bad = logits.isnan() | (logits == math.inf)
    if bool(bad.any()):
        row, place = (int(part) for part in bad.nonzero()[0])
        raise ValueError(f"Logits hold {float(logits[row, place])} at row {row}, position {place}.")
    open_ = int((logits > -math.inf).sum(-1).min()) if len(logits) else samples
    if open_ < (1 if replacement else samples):
        raise ValueError(
            f"{samples} positions cannot be drawn {'with' if replacement else 'without'} replacement from {open_}."
        )


def expectation(
    features: Tensor,
    attention: Tensor,
    order: Tensor,
    *,
    estimator: Estimator = "corrected",
    replacement: bool = False,
) -> Tensor:
    """Estimate sum_i a_i f_i over all positions from the features of those drawn.

    Value and both derivatives are unbiased, but for the derivative by the attention of "paper_code".

    Args:
        features: f of the drawn positions in the order of the draw, (batch, N, ...); differentiable.
        attention: a, (batch, K), each row sums to 1; differentiable.
        order: Positions in the order of the draw, (batch, N).
        estimator: "corrected"; "murthy", which varies less; or "paper_code", whose derivative by a is biased.
        replacement: Whether the draw was with replacement.

    Returns:
        The estimate, (batch, ...).

    Raises:
        ValueError: if shapes do not fit, the attention is negative, NaN or does not sum to 1, a position was drawn
            twice without replacement or has no attention, the estimator is unknown, or Murthy's is asked for a draw
            with replacement.
    """
    if estimator not in _ESTIMATORS:
        raise ValueError(f"An estimator is one of {', '.join(_ESTIMATORS)}, got {estimator!r}.")
    if replacement and estimator == "murthy":
        raise ValueError(f"estimator={estimator!r} is for draws without replacement: use 'corrected' with it.")
    _check(features, attention, order, replacement=replacement)
    drawn = attention.gather(1, order).to(torch.float64)
    if replacement:
        weight = 1 / (order.shape[1] * drawn.detach())
        return mixed(drawn * weight, features)
    exact = attention.detach().to(torch.float64)
    a = exact.gather(1, order)
    rest = exact.scatter(1, order, 0.0).sum(-1)
    if estimator == "murthy":
        return mixed(drawn * murthy_ratios(a, rest), features)
    left = rest.unsqueeze(-1) + a.flip(-1).cumsum(-1).flip(-1)
    left = left / left[:, :1]  # a row that sums to 1 + 1e-7 has mass 1 before the first draw all the same
    size = order.shape[1]
    behind = torch.arange(size - 1, -1, -1, dtype=torch.float64, device=a.device)
    c = left + behind * a
    if estimator == "corrected":
        return mixed(drawn * (c / (size * a)), features)
    held = mixed((c / size), features)
    slope = _published_slope(features.detach(), a, left)
    return held + mixed(drawn - drawn.detach(), slope)


def murthy_ratios(drawn: Tensor, rest: Tensor) -> Tensor:
    """Return R_i = P(S | i first) / P(S) for the attention of the set S that was drawn and of all that was not.

    With t the time of arrival of the rest, of rate r: P(S) = E prod_j (1 - exp(-a_j t)), and P(S | i first) leaves i
    out. The integral over log(r t) is a trapezoidal sum, which converges beyond every power of its step: to rounding.

    Args:
        drawn: a_i of the drawn positions, (batch, N), positive, float64.
        rest: Attention of all others, (batch,), float64.

    Returns:
        R, (batch, N), at least 1; exactly 1 where nothing is left.
    """
    size = drawn.shape[1]
    step = min(0.2, 0.7 / math.sqrt(size + 1))
    top = math.log(size + 60 + 12 * math.sqrt(size))
    nodes = torch.arange(-_NATS, top, step, dtype=torch.float64, device=drawn.device)
    tau = nodes.exp()
    whole = rest <= 0
    ratio = drawn / torch.where(whole, 1.0, rest).unsqueeze(-1)  # (batch, N)
    each = (-torch.expm1(-ratio.unsqueeze(-1) * tau)).log()  # (batch, N, nodes)
    total = each.sum(1) + nodes - tau
    found = (torch.logsumexp(total.unsqueeze(1) - each, -1) - torch.logsumexp(total, -1).unsqueeze(-1)).exp()
    return torch.where(whole.unsqueeze(-1), 1.0, found)


def entropy_penalty(attention: Tensor) -> Tensor:
    """Return sum a log(a + 1e-6), the mean over the batch: added to a loss with a positive weight it spreads attention.

    Args:
        attention: (batch, K).

    Returns:
        A scalar; its least value is -log K. The method's own scripts weigh it by 1e-4.
    """
    return (attention * (attention + 1e-6).log()).sum(-1).mean()


def mixed(weights: Tensor, features: Tensor) -> Tensor:
    """Return sum_n w_n f_n for weights (batch, N), features (batch, N, ...)."""
    return torch.einsum("bn,bn...->b...", weights.to(features.dtype), features)


def _published_slope(features: Tensor, a: Tensor, left: Tensor) -> Tensor:
    """Return (1/N) (F_n P_n / a_n + sum_{j<n} f_j - n f_n), F_n = sum_{j<n} a_j f_j + P_n f_n: the published one."""
    size = a.shape[1]
    shape = (*a.shape, *[1] * (features.ndim - 2))
    a, left = a.to(features.dtype).reshape(shape), left.to(features.dtype).reshape(shape)
    weighed, plain = a * features, features.cumsum(1) - features
    value = weighed.cumsum(1) - weighed + left * features
    count = torch.arange(size, dtype=features.dtype, device=features.device).reshape(1, size, *shape[2:])
    return (value * left / a + plain - count * features) / size


def _check(features: Tensor, attention: Tensor, order: Tensor, *, replacement: bool) -> None:
    """Refuse what is no draw.

    Raises:
        ValueError: naming what does not fit.
    """
    if attention.ndim != 2 or order.ndim != 2 or features.ndim < 2 or features.shape[:2] != order.shape:
        raise ValueError(
            "expectation needs features (batch, N, ...), attention (batch, K), order (batch, N), got "
            f"{tuple(features.shape)}, {tuple(attention.shape)}, {tuple(order.shape)}."
        )
    if len(attention) != len(order):
        raise ValueError(f"Attention has {len(attention)} rows and order {len(order)}.")
    batch, size = order.shape
    if size < 1:
        raise ValueError(f"At least one position must be drawn, got order of shape {tuple(order.shape)}.")
    if not replacement and size > attention.shape[1]:
        raise ValueError(f"{size} positions cannot be drawn without replacement from {attention.shape[1]}.")
    if not batch:
        return
    if int(order.min()) < 0 or int(order.max()) >= attention.shape[1]:
        raise ValueError(
            f"Order must lie in 0 … {attention.shape[1] - 1}, got {int(order.min())} … {int(order.max())}."
        )
    values = attention.detach()
    least = float(values.min())
    if not least >= 0:
        raise ValueError(f"Attention must be at least 0 and not NaN, got {least}.")
    off = float((values.sum(-1, dtype=torch.float64) - 1).abs().max())
    if not off <= _SUM_TOLERANCE:
        raise ValueError(
            f"Each row of the attention must sum to 1 within {_SUM_TOLERANCE:g}, got one that is {off:g} off."
        )
    if not bool((values.gather(1, order) > 0).all()):
        row, n = (int(part) for part in (values.gather(1, order) == 0).nonzero()[0])
        raise ValueError(
            f"Position {int(order[row, n])} of row {row} has attention 0 and stands in order: it was not drawn."
        )
    ranked = order.sort(-1).values
    twice = ranked[:, 1:][ranked.diff(dim=-1) == 0]
    if not replacement and twice.numel():
        raise ValueError(f"Position {int(twice[0])} stands twice in order: pass replacement=True if it was drawn so.")
