"""HyperLISTA's three numbers found by forward passes alone: successive halving, then a shrinking search near the best.

Candidates fill the box c1 in [1, 20] / n (logarithmic), c2 in [0, 0.5] / s, c3 in [0, 1] evenly (s: mean nonzeros of
the answers): n and s are the scales on which |A^+ r|_1 and |x|_0 grow. Every round drops most candidates and shows the
rest more samples; then neighbours of the best are drawn, nearer in every round. Candidates run side by side as one
batch. Cost: about 33 000 problems solved.
Source of halving: Jamieson and Talwalkar, "Non-stochastic best arm identification", 2016.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .fit import check_pairs
from .hyperlista import HyperLISTA, Tuning, layer, size_of, usual_numbers
from .operators import Operator

_ROWS = 1024
"""Problems solved side by side."""
_HALVINGS = ((32, 64), (96, 4))
"""Samples shown to candidates, and candidates that stay."""
_ZOOMS = 4
_BEST, _NEIGHBOURS, _SHOWN = 4, 8, 128


def tune_hyperlista(
    A: Tensor | Operator,
    x: Tensor,
    b: Tensor,
    *,
    layers: int = 16,
    candidates: int = 256,
    weight: Tensor | None = None,
    pinv: bool = False,
    seed: int = 0,
    callback: Callable[[Tuning], None] | None = None,
) -> HyperLISTA:
    """Return HyperLISTA with the numbers that fit problems with known answers best.

    Args:
        A: (m, n), or an operator that can be written out.
        x: Answers, (samples, n); 200 are enough, those beyond 512 are left out.
        b: Right-hand sides, (samples, m).
        layers: Layers.
        candidates: Of the first round.
        weight: As for `HyperLISTA`.
        pinv: As for `HyperLISTA`.
        seed: Of the neighbours drawn.
        callback: Called with the best so far after each round.

    Returns:
        The solver; its `tuning` says how the search went.

    Raises:
        ValueError: if candidates is below 1, or x and b do not fit.
    """
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"candidates must be 1 or more, got {candidates!r}.")
    start = time.perf_counter()
    solver = HyperLISTA(A, layers=layers, weight=weight, pinv=pinv)
    check_pairs(solver.operator, x, b)
    with torch.no_grad():
        search = _Search(solver, x[:512].detach(), b[:512].detach(), seed)
        numbers = search.box(candidates)
        for round_ in range(len(_HALVINGS) + _ZOOMS + 1):
            if round_ < len(_HALVINGS):
                samples, keep = _HALVINGS[round_]
            elif round_ < len(_HALVINGS) + _ZOOMS:
                numbers = search.near(numbers, 0.4 * 0.5 ** (round_ - len(_HALVINGS)))
                samples, keep = _SHOWN, _BEST
            else:
                samples, keep = len(search.b), 1
            scores = search.scores(numbers, samples)
            order = scores.argsort()[:keep]
            numbers = numbers[order]
            c1, c2, c3 = numbers[0].tolist()
            tuning = Tuning(c1, c2, c3, float(scores[order[0]]), time.perf_counter() - start, search.solved)
            if callback is not None:
                callback(tuning)
    for parameter, value in zip((solver.c1, solver.c2, solver.c3), (c1, c2, c3), strict=True):
        parameter.data.fill_(value)
    solver.tuning = tuning
    return solver


class _Search:
    """Candidates (count, 3), float64, and what they score."""

    def __init__(self, solver: HyperLISTA, x: Tensor, b: Tensor, seed: int) -> None:
        self.solver, self.x, self.b = solver, x, b
        self.n = solver.operator.shape[1]
        self.nonzeros = max(1.0, float((x != 0).sum(-1).double().mean()))
        self.generator = torch.Generator().manual_seed(seed)
        self.solved = 0

    def box(self, count: int) -> Tensor:
        """Return evenly spread candidates and the usual numbers."""
        sobol = torch.quasirandom.SobolEngine(3)  # type: ignore[no-untyped-call]
        unit = sobol.draw(count + 1, dtype=torch.float64)[1:]
        c1 = (unit[:, 0] * math.log(20)).exp() / self.n
        spread = torch.stack([c1, unit[:, 1] * 0.5 / self.nonzeros, unit[:, 2]], 1)
        return torch.cat([torch.tensor([usual_numbers(self.n)], dtype=torch.float64), spread])

    def near(self, numbers: Tensor, width: float) -> Tensor:
        """Return candidates and neighbours of each: relative ones of c1, c2 and c3 on the scales of the box."""
        noise = torch.randn(len(numbers), _NEIGHBOURS, 3, generator=self.generator, dtype=torch.float64) * width
        c1, c2, c3 = numbers[:, None].unbind(-1)
        moved = [
            c1 * noise[..., 0].exp(),
            (c2 + noise[..., 1] * 0.2 / self.nonzeros).clamp_min(0),
            (c3 + noise[..., 2] * 0.3).clamp_min(0),
        ]
        return torch.cat([numbers, torch.stack(moved, -1).reshape(-1, 3)])

    def scores(self, numbers: Tensor, samples: int) -> Tensor:
        """Return the error of each candidate in decibels on the first samples, infinite where it diverges."""
        x, b = self.x[:samples], self.b[:samples]
        group = max(1, _ROWS // len(b))
        found = []
        for part in torch.split(numbers, group):
            columns = part.to(b.device, b.real.dtype).repeat_interleave(len(b), 0)
            out = self._run(b.repeat(len(part), 1), columns).reshape(len(part), *x.shape)
            found.append((out - x).abs().square().double().sum((1, 2)))
            self.solved += len(columns)
        ratio = torch.cat(found).cpu() / float(x.abs().square().double().sum())
        return (10 * torch.log10(ratio)).nan_to_num(nan=torch.inf)

    def _run(self, b: Tensor, columns: Tensor) -> Tensor:
        """Return what every row's own numbers make of it."""
        solver = self.solver
        c1, c2, c3 = columns.unsqueeze(-1).unbind(1)
        x = last = b.new_zeros(len(b), self.n)
        inner = solver.weights.adjoint(-b)
        first = size_of(inner[:, self.n :])
        for k in range(solver.iterations):
            if k:
                inner = solver.weights.adjoint(solver.operator.forward(x) - b)
            x, last = layer(x, last, inner, first=first, numbers=(c1, c2, c3), gamma=solver.gamma), x
        return x
