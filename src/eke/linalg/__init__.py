"""Linear algebra that several rooms share: metrics, and matrices as products of Kronecker-sparse factors."""

from __future__ import annotations

from .bounds import interface_errors, spectrum
from .choice import ChainChoice, best_chain
from .factorization import Factorization
from .hierarchical import Order, factorize
from .interchange import from_faust, from_lazylinop, to_faust, to_lazylinop
from .metric import MANY, WIDE, Metric, cholesky, damped, damped_cholesky, finite
from .permutations import Permuted, best_level_permutation, bit_reversal, find_permutations, level_permutations
from .transforms import cosine, fourier, fourier_blocks, hadamard, hadamard_blocks

__all__ = [
    "MANY",
    "WIDE",
    "ChainChoice",
    "Factorization",
    "Metric",
    "Order",
    "Permuted",
    "best_chain",
    "best_level_permutation",
    "bit_reversal",
    "cholesky",
    "cosine",
    "damped",
    "damped_cholesky",
    "factorize",
    "find_permutations",
    "finite",
    "fourier",
    "fourier_blocks",
    "from_faust",
    "from_lazylinop",
    "hadamard",
    "hadamard_blocks",
    "interface_errors",
    "level_permutations",
    "spectrum",
    "to_faust",
    "to_lazylinop",
]
