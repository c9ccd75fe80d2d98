"""Problems to test sparse solvers on, and the decibels in which their errors are told.

    b = A x + e,   columns of A of length one,   x_i = 0 with probability 1 - density, normal otherwise

A is normal; with `condition`, its singular values are replaced by a geometric sequence before columns are normalized.
Noise is normal with std(A x of the sample) 10^(-snr_db / 20). `NMSE = 10 log10(sum |x - x*|^2 / sum |x*|^2)`, sums over
the whole batch: a ratio of sums and no mean of ratios.
Source: Chen, Liu, Wang and Yin, "Hyperparameter tuning is all you need for LISTA", 2021, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A batch of sparse problems with a known answer.

    Args:
        A: (m, n).
        x: What is to be found, (batch, n).
        b: What is seen, (batch, m).
        noise_std: Standard deviation of the noise of each sample, (batch,); zeros without noise.
    """

    A: Tensor
    x: Tensor
    b: Tensor
    noise_std: Tensor

    def nmse_db(self, x: Tensor) -> float:
        """Return the error of an answer (batch, n) in decibels."""
        return nmse_db(x, self.x)


def gaussian(
    m: int,
    n: int,
    density: float,
    *,
    batch: int = 1000,
    snr_db: float | None = None,
    condition: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Problem:
    """Return random problems with a normal dictionary.

    Args:
        m: Equations.
        n: Unknowns.
        density: Probability of an entry of x to be nonzero.
        batch: Problems.
        snr_db: Signal to noise, in decibels; None for no noise.
        condition: Of A before its columns are normalized again; None for the one of a normal matrix.
        dtype: Complex ones give complex normal A, x and noise.
        device: Of the result; numbers are drawn on the generator's device (the CPU without one).
        generator: Of the numbers; None for torch's own.

    Returns:
        The problems.

    Raises:
        ValueError: if a size is not positive, density is outside (0, 1], or the condition below 1.
    """
    if m < 1 or n < 1 or batch < 1:
        raise ValueError(f"gaussian needs positive sizes, got m={m}, n={n}, batch={batch}.")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}.")
    if condition is not None and not condition >= 1:
        raise ValueError(f"condition is the largest singular value over the least, 1 or more, got {condition!r}.")
    source = generator.device if generator is not None else torch.device("cpu")
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide, device=source)

    a = normal(m, n)
    if condition is not None:
        a = conditioned(a, condition)
    a = a / torch.linalg.vector_norm(a, dim=0)
    support = torch.rand(batch, n, generator=generator, dtype=torch.float64, device=source) < density
    x = normal(batch, n) * support
    clean = x @ a.T
    std = torch.zeros(batch, dtype=torch.float64, device=source)
    b = clean
    if snr_db is not None:
        std = clean.std(1) * 10 ** (-snr_db / 20)
        b = clean + normal(batch, m) * std[:, None]
    real = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    return Problem(a.to(device, dtype), x.to(device, dtype), b.to(device, dtype), std.to(device, real))


def conditioned(a: Tensor, condition: float) -> Tensor:
    """Return a matrix with the singular vectors of `a` and a geometric sequence of singular values.

    Args:
        a: (m, n).
        condition: Largest over least singular value; the largest is 1.

    Returns:
        (m, n).
    """
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    exponent = torch.linspace(0, 1, len(s), dtype=s.dtype, device=s.device)
    result: Tensor = u @ ((condition**-exponent).to(a.dtype).unsqueeze(-1) * vh)
    return result


def nmse_db(x: Tensor, truth: Tensor) -> float:
    """Return 10 log10(sum |x - truth|^2 / sum |truth|^2), in float64; -inf for equal ones.

    Args:
        x: (batch, n).
        truth: (batch, n).

    Returns:
        Decibels.

    Raises:
        ValueError: if shapes differ or the truth is all zeros.
    """
    if x.shape != truth.shape:
        raise ValueError(f"nmse_db compares batches of one shape, got {tuple(x.shape)} and {tuple(truth.shape)}.")
    wide = torch.complex128 if truth.is_complex() or x.is_complex() else torch.float64
    x, truth = x.detach().to(wide), truth.detach().to(wide)
    energy = float(truth.abs().square().sum())
    if energy == 0:
        raise ValueError(f"nmse_db needs a truth that is not zero everywhere, got {tuple(truth.shape)} zeros.")
    ratio = (x - truth).abs().square().sum() / energy
    return float(10 * torch.log10(ratio))
