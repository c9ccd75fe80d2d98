"""Running totals of a site's second moments over batches: float32 products, float64 sums (float32 for wide sites)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..linalg import MANY, WIDE
from ..sites import Geometry, Site
from .basis import Basis, gathered
from .factors import Factors
from .leading import Leading, Sketch
from .recorder import Call
from .rows import input_columns, lattice

_CHUNK = 1 << 24
"""Entries of patches held at once: 64 MB in float32."""
_BLOCK = 512
"""Rows of a second moment that are computed together, with the columns up to the diagonal."""


@dataclass
class SiteTotals:
    """Sums behind the factors of one site.

    Args:
        site: The site.
        max_locations: Locations of a convolution used for A a sample; None for all.
    """

    site: Site
    max_locations: int | None

    def __post_init__(self) -> None:
        groups, (rows, n) = self.site.groups, self.site.shape
        self._aa = _nothing(groups, n)
        self._gg = _nothing(groups, rows // groups)
        self._a = torch.zeros(groups, n, dtype=torch.float64)
        self._samples = 0
        self._rows = 0
        self._active = 0.0
        self._used = 0.0  # rows that entered A: fewer than the active ones where a lattice chose
        self._dtype = torch.float32
        self._gradient: Tensor | None = None

    def add_gradient(self, gradient: Tensor, samples: int) -> None:
        """Add the gradient (m, n) of a batch's mean loss."""
        if self._gradient is None:
            dtype = torch.float64 if gradient.numel() <= MANY else torch.promote_types(gradient.dtype, torch.float32)
            self._gradient = torch.zeros_like(gradient, dtype=dtype)
        self._gradient.add_(gradient, alpha=samples)

    def add(self, calls: list[Call], samples: int, batch: int) -> None:
        """Add the calls of one batch of so many samples; data that are not finite, or too large to be squared, raise
        ValueError.
        """  # noqa: D205
        self._samples += samples
        for call in calls:
            x, gradient = _computable(call.x), _computable(call.gradient)
            self._dtype = x.dtype
            self._to(x.device)
            gradients = self.site.output_to_rows(gradient) * samples  # (samples, locations, m)
            active = (gradients != 0).any(-1)
            _finite(self.site.name, "output gradients", gradients, batch)
            split = (*gradients.shape[:2], self.site.groups, -1)
            columns = gradients.reshape(split).permute(2, 3, 0, 1).flatten(2)
            _add_product(self._gg, columns, 1.0)
            self._rows += active.numel()
            self._active += float(active.sum())
            squares = _diagonal(self._gg) / max(1.0, self._active)
            _bounded(self.site.name, "output gradients", gradients, batch, squares=squares)
            self._add_inputs(x, active, call.gradient, batch)
            _bounded(self.site.name, "inputs", x, batch, squares=_diagonal(self._aa) / self._samples)

    def _add_inputs(self, x: Tensor, active: Tensor, gradient: Tensor, batch: int) -> None:
        _finite(self.site.name, "inputs", x, batch)
        chosen, kept = None, active
        geometry = self.site.geometry
        if geometry is not None and not geometry.transposed:
            chosen = lattice(tuple(gradient.shape[-len(geometry.kernel) :]), self.max_locations, batch)
            x = x if x.dim() == len(geometry.kernel) + 2 else x[None]
            kept = chosen.of(active)
        used = float(kept.sum())
        if not used:
            return
        self._used += used
        scale = float(active.sum()) / used
        samples = active.shape[0]
        step = max(1, _CHUNK // max(1, kept.shape[1] * self.site.groups * self.site.shape[1]))
        for start in range(0, samples, step) if chosen is not None else (0,):
            part = slice(start, start + step) if chosen is not None else slice(None)
            columns = input_columns(self.site, x[part], chosen)
            weight = kept[part].reshape(-1)
            if not bool(weight.all()):
                columns = columns * weight
            _add_product(self._aa, columns, scale)
            self._a.add_(columns.sum(-1, dtype=torch.float64), alpha=scale)

    def factors(self) -> Factors | None:
        """Return the factors, or None if the site was never used by the loss."""
        if not self._active:
            return None
        locations = self._active / self._samples
        n = self.site.shape[1]
        if self._used < n:
            advice = f"{math.ceil(n * self._samples / self._used)} samples" if self._used else "a batch more"
            thinned = f", or raise max_locations={self.max_locations}" if self._used < self._active else ""
            warnings.warn(
                f"Site {self.site.name!r} has {n} inputs but only {self._used:.0f} rows were seen; its curvature is "
                f"rank-deficient: use at least {advice} (2 to 4 times that is better){thinned}.",
                stacklevel=3,
            )
        geometry = self.site.geometry
        return Factors(
            a=_symmetric(self._aa / self._samples).to(self._dtype),
            g=_symmetric(self._gg / self._active).to(self._dtype),
            mean=(self._a / self._active).to(self._dtype),
            samples=self._samples,
            locations=locations,
            active=self._active / self._rows,
            channel_dim=-1 if geometry is None else -1 - len(geometry.kernel),
            gradient=None if self._gradient is None else (self._gradient / self._samples).to(self._dtype),
        )

    def _to(self, device: torch.device) -> None:
        if self._aa.device != device:
            self._aa, self._gg, self._a = self._aa.to(device), self._gg.to(device), self._a.to(device)


class MomentTotals:
    """Second moments of whole per-sample gradients in the eigenbases of a site's factors.

    The level comes from all samples and the pattern from the ones seen here: moments are multiplied by the ratio of the
    two traces of A x G, which takes out what a small subset says about the size of inputs and gradients.

    A gradient sum_l g_l a_l^T is formed and rotated, or its rotation is formed from rotated rows, whichever is less
    work; the latter always where a basis is only a part, whose rest follows from the rows' inner products.

    Args:
        site: The site.
        factors: Its uncorrected factors.
        leading: Directions of largest curvature that are kept whole, see `leading`.
    """

    def __init__(self, site: Site, factors: Factors, leading: int = 0) -> None:
        self.site, self.factors = site, factors
        self._sketch = Sketch(leading)
        basis = factors.eigenbasis()
        self._sum = torch.zeros_like(basis.moments)
        self._basis = replace(basis, moments=self._sum)
        self._aa = self._gg = 0.0
        self._samples = 0
        self._active = 0.0
        self._usable = True

    def add(self, calls: list[Call], samples: int, batch: int) -> None:
        """Add the calls of one batch; a site whose rows do not divide among the samples is left uncorrected. Gradients
        too large to be squared raise ValueError.
        """  # noqa: D205
        self._samples += samples
        prepared = []
        for call in calls:
            gradients = self.site.output_to_rows(_computable(call.gradient)) * samples
            rows = gradients.shape[0] * gradients.shape[1]
            if rows % samples or (gradients.shape[0] != samples and self.site.geometry is not None):
                self._usable = False
                return
            x = _computable(call.x).reshape(samples, -1, call.x.shape[-1]) if self.site.geometry is None else call.x
            prepared.append((x, gradients.reshape(samples, -1, gradients.shape[-1])))
        if not prepared:
            return
        locations, width = max(g.shape[1] for _, g in prepared), self.site.groups * self.site.shape[1]
        from_rows = self._from_rows(sum(g.shape[1] for _, g in prepared))
        held = max(locations * width, self._sum.numel(), locations**2 * self.site.groups if from_rows else 0)
        step = max(1, _CHUNK // max(1, held))
        for start in range(0, samples, step):
            parts = [self._rows(x[start : start + step], g[start : start + step]) for x, g in prepared]
            if from_rows:
                # Calls add up before squaring, as more locations do.
                g, x = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
                self._sum += _rotated_squares(g, x, self._basis)
                several = max(1, _CHUNK // (self.site.shape[0] * self.site.shape[1]))
                for one, other in zip(torch.split(g, several), torch.split(x, several)) if self._sketch.most else ():
                    self._sketch.add(one.mT @ other)
            else:
                gradients = torch.stack([g.mT @ x for g, x in parts]).sum(0)
                self._sum += self._basis.rotate(gradients).square_().sum(0)
                self._sketch.add(gradients)
            squares = self._sum / self._samples
            _bounded(self.site.name, "weight gradients", prepared[0][1], batch, squares=squares)

    def _from_rows(self, locations: int) -> bool:
        """Return whether rows are rotated, not gradients."""
        if any(self._basis.rest):
            return True
        (m, n), groups = self.site.shape, self.site.groups
        m //= groups
        return groups * m * n > MANY and locations * (m * m + n * n) < m * n * (m + n)

    def _rows(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return output gradients (samples, groups, locations, m / groups) and inputs (..., n) of one call."""
        rows = self.site.inputs_to_rows(_computable(x))  # (samples, locations, groups, n)
        active = (g != 0).any(-1)
        self._active += float(active.sum())
        self._aa += float((rows.square().sum((2, 3), dtype=torch.float64) * active).sum())
        self._gg += float(g.square().sum(dtype=torch.float64))
        split = g.reshape(*g.shape[:2], self.site.groups, -1)
        return split.transpose(1, 2), rows.transpose(1, 2)

    def corrected(self) -> Factors:
        """Return the factors with corrected eigenvalues and G scaled to the corrected trace."""
        factors = self.factors
        if not self._usable or not self._active or not float(self._sum.sum()):
            return factors
        a_trace, g_trace = (_diagonal(moment).double().sum(1) for moment in (factors.a, factors.g))
        everywhere = float(a_trace.sum() * g_trace.sum())
        here = self._aa / self._samples * self._gg / self._active
        scale = everywhere / here / self._samples
        moments = self._sum * scale
        coherence = float(moments.sum() / (a_trace * g_trace).sum())
        basis = replace(self._basis, moments=moments / self._basis.sizes)
        rows = self._sketch.rows(scale)
        leading = None if rows is None else Leading.beside(rows, basis)
        return replace(factors, g=factors.g * coherence, coherence=coherence, basis=basis, leading=leading)


def _rotated_squares(g: Tensor, x: Tensor, basis: Basis) -> Tensor:
    """Return the squares of samples' gradients along all pairs of directions, summed over samples, as float64.

    Args:
        g: Output gradients (samples, groups, locations, m / groups).
        x: Inputs (samples, groups, locations, n).
        basis: The directions.
    """
    turned_g, turned_x = g @ basis.g_vectors.to(g.dtype), x @ basis.a_vectors.to(x.dtype)
    inside = (turned_g.mT @ turned_x).square_()
    rows, columns, total = inside.sum(-1), inside.sum(-2), inside.sum((-1, -2))
    if any(basis.rest):
        # |sum_l u_l a_l|^2 = sum_kl u_k u_l <a_k, a_l>, for any numbers u_l.
        among_x, among_g = x @ x.mT, g @ g.mT
        rows = (turned_g * (among_x @ turned_g)).sum(-2)
        columns = (turned_x * (among_g @ turned_x)).sum(-2)
        total = (among_x * among_g).sum((-1, -2))
    sums = [part.sum(0, dtype=torch.float64) for part in (inside, rows, columns, total)]
    return gathered(sums[0], sums[1], sums[2], sums[3], basis.rest)


@dataclass
class BoundaryTotals:
    """Sum of g g^T at the output of a named module.

    Args:
        name: Name of the module.
        channel_dim: Dimension of its channels.
    """

    name: str
    channel_dim: int

    def __post_init__(self) -> None:
        self._gg: Tensor | None = None
        self._rows = 0

    def add(self, calls: list[Call], samples: int, batch: int) -> None:
        """Add the calls of one batch of so many samples; gradients that are not finite, or too large to be squared,
        raise ValueError.
        """  # noqa: D205
        for call in calls:
            gradient = _computable(call.gradient).movedim(self.channel_dim, -1) * samples
            _finite(self.name, "output gradients", gradient, batch)
            rows = gradient.reshape(-1, gradient.shape[-1])
            moment = (rows.mT @ rows).double()
            _bounded(self.name, "output gradients", rows, batch, squares=_diagonal(moment))
            self._gg = moment if self._gg is None else self._gg + moment
            self._rows += rows.shape[0]

    def moment(self) -> Tensor | None:
        """Return the mean of g g^T over samples and locations, None if the module never ran."""
        return None if self._gg is None else _symmetric(self._gg / self._rows)


def weight_gradient(site: Site, model: nn.Module, call: Call) -> Tensor:
    """Return the gradient (m, n) of the mean loss that one call contributes.

    Args:
        site: The site.
        model: Private copy of the model; its parameter takes part in differentiation only inside this function.
        call: Input and output gradient.

    Returns:
        The gradient of the site's matrix.
    """
    if site.geometry is None:
        x, g = site.inputs_to_rows(call.x).flatten(0, 2), site.output_to_rows(call.gradient).flatten(0, 1)
        return g.mT @ x
    module = model.get_submodule(site.boundary)
    parameter = site.tensor(model) if site.hookable else module.get_parameter("weight")
    gradient = _kernel_gradient(site.geometry, parameter, call)
    if gradient is None:
        parameter.requires_grad_(True)
        try:
            # Not module(x): hooks recorded this call already.
            (gradient,) = torch.autograd.grad(module.forward(call.x), parameter, call.gradient)
        finally:
            parameter.requires_grad_(False)
    if site.kind == "conv_transpose":
        gradient = gradient.reshape(site.groups, -1, *gradient.shape[1:]).transpose(1, 2)
    return gradient.reshape(site.shape)


def _kernel_gradient(geometry: Geometry, kernel: Tensor, call: Call) -> Tensor | None:
    """Return the gradient of an ordinary convolution's kernel without running it again, None for another one."""
    x, g = call.x, call.gradient
    plain = geometry.padding_mode == "zeros" and all(before == after for before, after in geometry.padding)
    if geometry.transposed or not plain or x.dim() != len(geometry.kernel) + 2:
        return None
    padding = [before for before, _ in geometry.padding]
    found: Tensor = torch.ops.aten.convolution_backward(
        g, x, kernel, None, list(geometry.stride), padding, list(geometry.dilation), False, [0] * len(padding),
        geometry.groups, [False, True, False],
    )[1]  # fmt: skip
    return found


def _nothing(groups: int, size: int) -> Tensor:
    """Return zeros (groups, size, size): float64, or float32 where that would take too much memory."""
    return torch.zeros(groups, size, size, dtype=torch.float32 if size > WIDE else torch.float64)


def _add_product(sums: Tensor, columns: Tensor, scale: float) -> None:
    """Add scale * columns columns^T (groups, n, n) in place; nothing that counts above the diagonal."""
    for start in range(0, columns.shape[1], _BLOCK):
        end = start + _BLOCK
        here, rows, others = sums[:, start:end, :end], columns[:, start:end], columns[:, :end].mT
        if sums.dtype == columns.dtype:
            here.baddbmm_(rows, others, alpha=scale)
        else:
            here.add_(rows @ others, alpha=scale)


def _computable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix of a lower triangle."""
    return matrix.tril() + matrix.tril(-1).mT


def _finite(name: str, what: str, tensor: Tensor, batch: int) -> None:
    # The sum of a finite tensor may overflow, so it only decides whether to count.
    if not math.isfinite(float(tensor.sum())):
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            raise ValueError(
                f"{what.capitalize()} of {name!r} hold {count} of {tensor.numel()} values that are not finite, first "
                f"in batch {batch}; check that batch, or leave the site out with skip=."
            )


def _diagonal(moment: Tensor) -> Tensor:
    """Return the diagonal, which bounds all other entries of a second moment (Cauchy-Schwarz)."""
    return moment.diagonal(dim1=-2, dim2=-1)


def _bounded(name: str, what: str, data: Tensor, batch: int, *, squares: Tensor) -> None:
    limit = torch.finfo(data.dtype).max
    if not float(squares.amax()) <= limit:
        raise ValueError(
            f"{what.capitalize()} of {name!r} reach {float(data.abs().max()):.3g}, and their squares exceed "
            f"{data.dtype}, first in batch {batch}; check that batch, scale data or loss down, or leave the site out "
            "with skip=."
        )
