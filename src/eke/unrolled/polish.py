"""From a nearly right answer to the exact one: least squares on a generous support, corrected until b is explained.

    x = least squares of b on S;   S = the K largest of x + A^+ (b - A x);   and again

K is somewhat above the likely number of nonzeros: without noise entries too many come out as zero, one too few spoils
all. Samples leave as soon as |A x - b| is rounding, or falls no more. An answer is taken where it explains b far better
than what came in: with noise none is. Cost a round: 4 m n + K^3 / 3 for the samples left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import Operator
from .pursuit import ROUNDING, least_squares

_GROUP = 128
"""Samples of like size that share one K."""
_HOPELESS = 0.6
"""A round that leaves more than this share of the residual has met noise, or a wrong support: the sample gives up."""
_LONGEST = 10
"""Answers longer than so many times the shortest solution of A x = b are not taken."""
_BETTER = 0.3
"""An answer that is not exact is taken if its residual is at most this share of the old one."""


def polish(
    operator: Operator,
    b: Tensor,
    x: Tensor,
    *,
    score: Tensor,
    count: Tensor,
    correct: Callable[[Tensor, Tensor], Tensor],
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Return x with exact answers where they are found.

    Args:
        operator: A.
        b: (batch, m).
        x: (batch, n), kept where nothing better is found.
        score: Larger where a nonzero is likelier, (batch, n).
        count: Likely number of nonzeros, (batch,).
        correct: A^+ r for (residuals r (rows, m), their rows in the batch).
        rounds: At most so many.

    Returns:
        x (batch, n), and which answers explain b down to rounding, (batch,).
    """
    result, found = x.clone(), torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for rows in torch.split(count.argsort(), _GROUP):
        most = int(1.2 * float(count[rows].max())) + 10
        k = min(most, 3 * operator.shape[0] // 4 or 1, operator.shape[1])
        group = _Group(operator.select(rows), b[rows], rows, k)
        group.run(result, found, score[rows], correct, rounds)
    return result, found


@dataclass
class _Group:
    """Samples that share the size of their supports, as long as they improve."""

    operator: Operator
    b: Tensor
    rows: Tensor
    k: int

    def run(
        self,
        result: Tensor,
        found: Tensor,
        score: Tensor,
        correct: Callable[[Tensor, Tensor], Tensor],
        rounds: int,
    ) -> None:
        """Write better answers into result, and into found which ones are exact."""
        last = torch.linalg.vector_norm(self.b - self.operator.forward(result[self.rows]), dim=-1)
        best = _BETTER * last
        # what is nearly singular explains b with huge entries: the truth is not far above the shortest solution
        longest = _LONGEST * torch.linalg.vector_norm(correct(self.b, self.rows), dim=-1)
        exact = ROUNDING * torch.finfo(self.b.dtype).eps * torch.linalg.vector_norm(self.b, dim=-1)
        for _ in range(rounds):
            support = score.topk(self.k, dim=-1, sorted=False).indices
            x = least_squares(self.operator, self.b, support)
            residual = self.b - self.operator.forward(x)
            left = torch.linalg.vector_norm(residual, dim=-1)
            sane = torch.linalg.vector_norm(x, dim=-1) <= longest
            done = (left <= exact) & sane
            better = ((left <= best) & sane) | done
            result[self.rows[better]] = x[better]
            found[self.rows[done]] = True
            best = torch.where(better, left, best)
            running = (~done & sane & (left <= _HOPELESS * last)).nonzero().squeeze(-1)
            if not len(running):
                return
            x, residual, longest = x[running], residual[running], longest[running]
            last, best, exact = left[running], best[running], exact[running]
            self.b, self.rows, self.operator = self.b[running], self.rows[running], self.operator.select(running)
            score = (x + correct(residual, self.rows)).abs()
