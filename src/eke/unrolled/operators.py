"""What A is: one matrix, one matrix a sample, two functions, or a convolutional dictionary.

Every solver sees `b (batch, m)` and returns `x (batch, n)`, flat and batch first, and asks its operator for

    forward(x) = A x  (batch, n) -> (batch, m),      adjoint(r) = A^H r  (batch, m) -> (batch, n),

`shape`, `dtype`, `device`, `norm_squared()` (the largest eigenvalue of A^H A, one entry a matrix), `select(rows)` (the
operator of the samples still running) and, where a closed form or a factorization needs it, `dense()`.
Users give a tensor or an operator; `as_operator(A)` is the only door, and checks what comes through it.
Operators of tensors keep them as they are: put them on a device or in a dtype first.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST = 2**27
"""Entries up to which an operator that has no matrix writes one for those who need it."""


class Operator(abc.ABC):
    """A linear map from (batch, n) to (batch, m); subclasses say how.

    Args:
        shape: (m, n).
        dtype: Of inputs and outputs: float32, float64, complex64 or complex128.
        device: Of inputs and outputs.
        batch: Number of samples if each has an A of its own, None if all share one.
    """

    def __init__(
        self, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device, batch: int | None = None
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.batch = batch
        self._norm_squared: Tensor | None = None

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return A x, (batch, m), for x (batch, n)."""

    @abc.abstractmethod
    def adjoint(self, r: Tensor) -> Tensor:
        """Return A^H r, (batch, n), for r (batch, m)."""

    def select(self, rows: Tensor) -> Operator:
        """Return the operator of some samples of the batch, itself where all share one A."""
        del rows
        return self

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Operator:
        """Return the operator with its tensors changed, such as moved to a device; itself if it holds none."""
        del change
        return self

    def dense(self) -> Tensor:
        """Return A as a tensor, (m, n) or (batch, m, n).

        Raises:
            ValueError: if A would have more entries than fit in memory with comfort.
        """
        m, n = self.shape
        if m * n > _LARGEST:
            raise ValueError(
                f"A of shape {self.shape} would be written out as a matrix of {m * n} entries, more than {_LARGEST}. "
                "Use a solver that needs forward and adjoint alone: ista, fista or htp."
            )
        return self.forward(torch.eye(n, dtype=self.dtype, device=self.device)).transpose(-1, -2)

    def norm_squared(self) -> Tensor:
        """Return the largest eigenvalue of A^H A, (1,) or (batch,), computed once."""
        if self._norm_squared is None:
            with torch.no_grad():
                self._norm_squared = self._largest_eigenvalue()
        return self._norm_squared

    def _largest_eigenvalue(self) -> Tensor:
        """Return a bound from above that is tight to 1e-3, by power iteration from fixed numbers."""
        start = torch.Generator().manual_seed(0)
        v = torch.randn(1, self.shape[1], generator=start, dtype=torch.float64).to(self.device, self.dtype)
        value = torch.ones(1, device=self.device)
        for _ in range(1000):
            v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(torch.finfo(self.dtype).tiny)
            v = self.adjoint(self.forward(v))
            last, value = value, torch.linalg.vector_norm(v, dim=-1)
            if bool(((value - last).abs() <= 1e-6 * value).all()):
                break
        return value * 1.001

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, batch={self.batch})"


class Dense(Operator):
    """A given as a tensor: (m, n) for all samples, or (batch, m, n), one for each.

    Args:
        matrix: The tensor, kept as it is (not copied).
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(
            (matrix.shape[-2], matrix.shape[-1]),
            dtype=matrix.dtype,
            device=matrix.device,
            batch=len(matrix) if matrix.ndim == 3 else None,
        )
        self.matrix = matrix
        self._gram: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return A x, (batch, m), for x (batch, n)."""
        if self.batch is None:
            return x @ self.matrix.T
        return torch.bmm(self.matrix, x.unsqueeze(-1)).squeeze(-1)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return A^H r, (batch, n), for r (batch, m)."""
        if self.batch is None:
            return r @ self.matrix.conj()
        return torch.bmm(self.matrix.mH, r.unsqueeze(-1)).squeeze(-1)

    def select(self, rows: Tensor) -> Operator:
        """Return the operator of some samples of the batch, itself where all share one A."""
        return self if self.batch is None else Dense(self.matrix[rows])

    def gram(self) -> Tensor:
        """Return A^H A, (n, n) or (batch, n, n); computed once where A needs no gradient."""
        if self._gram is not None:
            return self._gram
        gram = self.matrix.mH @ self.matrix
        if not gram.requires_grad:
            self._gram = gram
        return gram

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Operator:
        """Return the operator of the changed matrix."""
        return Dense(change(self.matrix))

    def dense(self) -> Tensor:
        """Return A itself, (m, n) or (batch, m, n)."""
        return self.matrix

    def _largest_eigenvalue(self) -> Tensor:
        wide = self.shape[0] <= self.shape[1]
        gram = self.matrix @ self.matrix.mH if wide else self.matrix.mH @ self.matrix
        values: Tensor = torch.linalg.eigvalsh(gram)
        return values[..., -1].reshape(-1)


class Functions(Operator):
    """A given by two functions, for transforms and products that nobody writes out as a matrix.

    Args:
        forward: A x: (batch, n) -> (batch, m).
        adjoint: A^H r: (batch, m) -> (batch, n).
        shape: (m, n).
        dtype: Of inputs and outputs.
        device: Of inputs and outputs.

    Raises:
        ValueError: if the functions are no adjoints of one another, or return other shapes.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        *,
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shape, dtype=dtype, device=torch.device(device))
        self._forward, self._adjoint = forward, adjoint
        self._check_adjoint()

    def forward(self, x: Tensor) -> Tensor:
        """Return A x, (batch, m), for x (batch, n)."""
        return self._forward(x)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return A^H r, (batch, n), for r (batch, m)."""
        return self._adjoint(r)

    def _check_adjoint(self) -> None:
        m, n = self.shape
        random = torch.Generator().manual_seed(1)
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        x = torch.randn(2, n, generator=random, dtype=wide).to(self.device, self.dtype)
        r = torch.randn(2, m, generator=random, dtype=wide).to(self.device, self.dtype)
        ax, ahr = self.forward(x), self.adjoint(r)
        if ax.shape != r.shape or ahr.shape != x.shape:
            raise ValueError(
                f"forward must map (batch, {n}) to (batch, {m}) and adjoint back, got {tuple(ax.shape)} and "
                f"{tuple(ahr.shape)} for a batch of 2."
            )
        left, right = (ax * r.conj()).sum(-1), (x * ahr.conj()).sum(-1)
        scale = torch.linalg.vector_norm(ax, dim=-1) * torch.linalg.vector_norm(r, dim=-1)
        if not bool(((left - right).abs() <= 1e-3 * scale + torch.finfo(self.dtype).tiny).all()):
            raise ValueError(
                f"adjoint is not the adjoint of forward: <A x, r> = {left[0].item():.6g}, <x, A^H r> = "
                f"{right[0].item():.6g} for random x and r. For complex A it conjugates."
            )


class Convolutional(Operator):
    """A sum of convolutions, b = sum_k d_k * x_k, of maps x_k with small filters d_k (a convolutional dictionary).

    Maps are (filters, height + h - 1, width + w - 1) and images (channels, height, width), so that every pixel is
    covered by whole filters ("valid" convolution); with `circular=True` both are (height, width), edges wrap round, and
    products take Fourier transforms.

    Args:
        filters: D (filters, channels, h, w).
        size: (height, width) of images.
        circular: Whether edges wrap round.

    Raises:
        ValueError: if filters are no such tensor, or larger than the image.
    """

    def __init__(self, filters: Tensor, size: tuple[int, int], *, circular: bool = False) -> None:
        if filters.ndim != 4 or 0 in filters.shape:
            raise ValueError(f"filters must be (filters, channels, h, w), got {tuple(filters.shape)}.")
        count, channels, h, w = filters.shape
        height, width = size
        if h > height or w > width:
            raise ValueError(f"Filters of {h} x {w} need images at least as large, got size={size}.")
        self.filters = filters
        self.circular = circular
        self._kept: Tensor | None = None
        self.image_shape = (channels, height, width)
        grown = (height, width) if circular else (height + h - 1, width + w - 1)
        self.maps_shape = (count, *grown)
        m, n = channels * height * width, count * grown[0] * grown[1]
        super().__init__((m, n), dtype=filters.dtype, device=filters.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the images, flat (batch, channels * height * width), of flat maps."""
        maps = x.reshape(-1, *self.maps_shape)
        if self.circular:
            spread = torch.einsum("nkhw,kchw->nchw", self._transformed(maps), self._spectrum())
            return self._restored(spread).flatten(1)
        # conv2d correlates; a convolution turns the filters round
        return F.conv2d(maps, self.filters.flip(2, 3).transpose(0, 1)).flatten(1)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return the flat maps (batch, n) of flat images: each correlated with each conjugated filter."""
        images = r.reshape(-1, *self.image_shape)
        if self.circular:
            spread = torch.einsum("nchw,kchw->nkhw", self._transformed(images), self._spectrum().conj())
            return self._restored(spread).flatten(1)
        h, w = self.filters.shape[2:]
        images = F.pad(images, (w - 1, w - 1, h - 1, h - 1))
        return F.conv2d(images, self.filters.conj().resolve_conj()).flatten(1)

    def _transformed(self, whole: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the Fourier transform of the last two dimensions, half of it for real ones."""
        transform = torch.fft.fft2 if whole.is_complex() else torch.fft.rfft2
        result: Tensor = transform(whole, s=size)
        return result

    def _restored(self, spread: Tensor) -> Tensor:
        """Return what has a Fourier transform, in the filters' dtype."""
        if self.filters.is_complex():
            restored: Tensor = torch.fft.ifft2(spread)
        else:
            restored = torch.fft.irfft2(spread, s=self.image_shape[1:])
        return restored

    def _spectrum(self) -> Tensor:
        """Return the Fourier transforms of all filters, computed once where they need no gradient."""
        if self._kept is not None:
            return self._kept
        spectrum = self._transformed(self.filters, self.image_shape[1:])
        if not self.filters.requires_grad:
            self._kept = spectrum
        return spectrum

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Operator:
        """Return the operator of the changed filters."""
        return Convolutional(change(self.filters), self.image_shape[1:], circular=self.circular)

    def maps(self, x: Tensor) -> Tensor:
        """Return flat x (batch, n) as maps (batch, filters, height, width)."""
        return x.reshape(-1, *self.maps_shape)

    def images(self, b: Tensor) -> Tensor:
        """Return flat b (batch, m) as images (batch, channels, height, width)."""
        return b.reshape(-1, *self.image_shape)


def as_operator(A: Tensor | Operator) -> Operator:
    """Return the operator of what a user gave as A.

    Args:
        A: (m, n), (batch, m, n), or an operator.

    Returns:
        The operator; the same object where one was given.

    Raises:
        TypeError: if A is neither a tensor of a floating or complex dtype nor an operator.
        ValueError: if a tensor has another shape, is empty, has entries that are not finite, or a column of zeros.
    """
    if isinstance(A, Operator):
        return A
    if not isinstance(A, Tensor):
        raise TypeError(f"A must be a tensor or an Operator, got {type(A).__name__}. Use torch.as_tensor(A).")
    check_dtype(A, "A")
    if A.ndim not in (2, 3) or 0 in A.shape:
        raise ValueError(f"A must be (m, n) or (batch, m, n) with at least one entry, got {tuple(A.shape)}.")
    if not torch.compiler.is_compiling():
        check_finite(A, "A")
        zero = (A == 0).all(-2)
        if bool(zero.any()):
            first = zero.nonzero()[0].tolist()
            raise ValueError(
                f"A has {int(zero.sum())} columns of zeros, the first at index {first[-1] if A.ndim == 2 else first}: "
                "nothing can be said about their entries of x. Leave them out."
            )
    return Dense(A)


def check_dtype(tensor: Tensor, name: str) -> None:
    """Check that a tensor has a dtype that solvers compute in.

    Args:
        tensor: To look at.
        name: What it is called.

    Raises:
        TypeError: unless it is float32, float64, complex64 or complex128.
    """
    allowed = (torch.float32, torch.float64, torch.complex64, torch.complex128)
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{name} must be float32, float64, complex64 or complex128, got {tensor.dtype}. Convert it with .to()."
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Check that all entries of a tensor are finite.

    Args:
        tensor: To look at.
        name: What it is called.

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} has {bad} entries that are NaN or infinite, of {tensor.numel()}.")


def check_vector(operator: Operator, v: Tensor, name: str) -> None:
    """Check a batch of right-hand sides ("b") or of solutions ("x", "x0") against an operator.

    Args:
        operator: What it is for.
        v: (batch, m) for b, (batch, n) otherwise.
        name: "b", "x" or "x0".

    Raises:
        TypeError: if it is no tensor, or its dtype is not the operator's.
        ValueError: if its shape or device does not fit, or an entry is not finite.
    """
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(v).__name__}. Use torch.as_tensor({name}).")
    check_dtype(v, name)
    size, letter = (operator.shape[0], "m") if name == "b" else (operator.shape[1], "n")
    if v.ndim != 2 or v.shape[1] != size or not len(v):
        hint = f" One vector is {name}[None]." if v.ndim == 1 else ""
        raise ValueError(
            f"{name} must be (batch, {letter}) = (batch, {size}) for A of shape {operator.shape}, got "
            f"{tuple(v.shape)}.{hint}"
        )
    if operator.batch is not None and len(v) != operator.batch:
        raise ValueError(f"A has one matrix for each of {operator.batch} samples, {name} has {len(v)} samples.")
    if v.device != operator.device:
        raise ValueError(f"{name} is on {v.device} and A on {operator.device}: move one with .to().")
    if v.dtype != operator.dtype:
        raise TypeError(f"{name} is {v.dtype} and A {operator.dtype}: convert one with .to().")
    if not torch.compiler.is_compiling():
        check_finite(v, name)
