"""Mean gradient and diagonal of the Gauss-Newton matrix of a loss, entry by entry of each site's matrix.

With output z_n of example n, its loss l_n and J_n = d z_n / d W, the Gauss-Newton matrix is E_n[J_n^T H_n J_n],
H_n = d^2 l_n / d z_n^2 (diag(p) - p p^T for a softmax). With H_n = sum_c v_c v_c^T its diagonal is the mean of
sum_c (J_n^T v_c)^2: one backward pass a column. "mc" takes one column with random signs, sum_c e_c v_c, instead, which
is right on average; "empirical" squares the gradients of the loss itself.

Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002; Laurent et al.,
"Revisiting loss modelling for unstructured pruning", 2020. Cost: K + 1 backward passes for K outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .._types import Batch, Loss
from ..sites import Site
from .examples import rows_of
from .recorder import Call, Recorder, private_copy
from .totals import weight_gradient

Fisher = Literal["empirical", "mc", "exact"]
"""Whose gradients make second moments: of the labels, drawn, or of all columns of a root of the loss's Hessian."""
_MOST = 4096
"""Outputs of a sample up to which second derivatives of the loss are taken."""


@dataclass(frozen=True)
class Diagonal:
    """Derivatives of the mean loss at each entry of a site's matrix.

    Args:
        gradient: (m, n).
        curvature: (m, n), not below 0; None where it was not asked for.
    """

    gradient: Tensor
    curvature: Tensor | None


def gauss_newton_diagonal(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    *,
    fisher: Fisher | None = "exact",
    generator: torch.Generator | None = None,
) -> dict[str, Diagonal]:
    """Measure first and second derivatives on a private copy of the model in eval mode; the model is not touched.

    Args:
        model: The model.
        loss: `loss(model, batch)`: mean over the samples of a batch; each sample's loss depends on its own output.
        batches: Data, read once.
        sites: Matrix sites, all `visible`.
        fisher: See above; None for the gradient alone.
        generator: Of the signs of "mc"; None for torch's own.

    Returns:
        Derivatives by site name; means over all samples, however they are batched.

    Raises:
        ValueError: if there are no batches, a site is not visible, or data or loss are not finite.
    """
    hidden = [site.name for site in sites if not site.visible]
    if hidden:
        raise ValueError(f"Derivatives need sites whose inputs and outputs can be seen (`visible`), got {hidden}.")
    private = private_copy(model, sites)
    sums = {site.name: torch.zeros(site.shape, dtype=torch.float64) for site in sites}
    squares = {site.name: torch.zeros(site.shape, dtype=torch.float64) for site in sites}
    seen = 0

    def add(calls: dict[str, list[Call]], *, mean: bool, samples: int) -> None:
        for site in sites:
            here = [((0, 0), call.x, call.gradient) for call in calls.get(site.boundary, [])]
            if here:
                rows = rows_of(site, here, bias=False, sharing="sum", mean=mean, loss_scale=1.0, weights=None)
                # Calls of tokens that come flattened are examples of their own.
                scale = rows.examples if not mean else samples**2 / rows.examples
                squares[site.name] += (rows.squares() * scale).reshape(site.shape).double().cpu()

    with Recorder(private, [site.boundary for site in sites]) as recorder, torch.enable_grad():
        for index, batch in enumerate(batches):
            calls, samples = recorder.run(loss, batch, index)
            for site in sites:
                for call in calls.get(site.boundary, []):
                    sums[site.name] += weight_gradient(site, private, call).double().cpu() * samples
            if fisher == "empirical":
                add(calls, mean=True, samples=samples)
            elif fisher is not None:
                roots = _Roots(samples, one=fisher == "mc", generator=generator)
                for pulled in recorder.run_columns(loss, batch, index, roots):
                    add(pulled, mean=False, samples=samples)
            seen += samples
    if not seen:
        raise ValueError("There are 0 batches; an iterator that was read before is empty: pass a list or a loader.")
    return {
        site.name: Diagonal(sums[site.name] / seen, None if fisher is None else squares[site.name] / seen)
        for site in sites
    }


@dataclass(frozen=True)
class _Roots:
    """Columns v_c of roots of the samples' Hessians at the output, or one random sum of them."""

    samples: int
    one: bool
    generator: torch.Generator | None

    def __call__(self, value: Tensor, answer: Tensor) -> Iterator[Tensor]:
        """Yield gradients at the output, in its shape; an output of another form raises ValueError."""  # noqa: DOC501
        count = answer.shape[0]
        width = answer.numel() // max(1, count)
        if count != self.samples or width > _MOST:
            raise ValueError(
                f"Second derivatives of the loss need outputs (samples, at most {_MOST} numbers), got "
                f'{tuple(answer.shape)} for {self.samples} samples; use fisher="empirical".'
            )
        (slope,) = torch.autograd.grad(value, answer, create_graph=True)
        lines = []
        for k in range(width):
            (line,) = torch.autograd.grad(slope.reshape(count, width)[:, k].sum(), answer, retain_graph=True)
            lines.append(line.reshape(count, width))
        hessian = torch.stack(lines, 1).double() * count
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        columns = (values.clamp_min(0).sqrt()[:, None] * vectors).to(answer.dtype)  # (samples, outputs, columns)
        if self.one:
            signs = torch.randint(2, (count, 1, width), generator=self.generator).to(columns) * 2 - 1
            yield (columns * signs).sum(2).reshape(answer.shape)
            return
        for c in range(width):
            if bool((values[:, c] > 1e-14 * values[:, -1]).any()):
                yield columns[:, :, c].reshape(answer.shape)
