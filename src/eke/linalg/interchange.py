"""Factors to and from lazylinop and FAuST (pyfaust), which bring fast operators of their own.

lazylinop keeps entries as eke does, (a, b, c, d) with the leftmost factor first; FAuST keeps sparse matrices. Neither
is needed for anything else: they are imported when asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import MissingExtraError
from ..patterns import Chain, from_dense, to_dense


def to_lazylinop(blocks: list[Tensor]) -> Any:
    """Return the product of factors (a, b, c, d) as a `LazyLinOp` of lazylinop.butterfly.ksm."""
    butterfly: Any = _imported("lazylinop.butterfly", "lazylinop[full]", "A LazyLinOp of Kronecker-sparse factors")
    return butterfly.ksm([block.detach() for block in blocks])


def from_lazylinop(operator: Any) -> tuple[Chain, list[Tensor]]:
    """Return the chain and the factors of what lazylinop's ksm or ksd returned.

    Args:
        operator: With `ks_values`, one array (a, b, c, d) or a list of them, leftmost first.

    Returns:
        The chain and the factors as tensors.

    Raises:
        TypeError: if it has no such entries.
    """
    values = getattr(operator, "ks_values", None)
    if values is None:
        raise TypeError(f"from_lazylinop needs an operator with ks_values, as ksm and ksd return, got {operator!r}.")
    arrays = values if isinstance(values, (list, tuple)) else [values]
    blocks = [value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value) for value in arrays]
    return Chain([(int(b.shape[0]), int(b.shape[1]), int(b.shape[2]), int(b.shape[3])) for b in blocks]), blocks


def to_faust(blocks: list[Tensor]) -> Any:
    """Return the product of factors (a, b, c, d) as a `Faust` of pyfaust, of sparse matrices in double precision."""
    from scipy import sparse

    pyfaust: Any = _imported("pyfaust", "pyfaust", "A Faust of Kronecker-sparse factors")
    wide = (block.detach().cpu().to(torch.promote_types(block.dtype, torch.float64)) for block in blocks)
    return pyfaust.Faust([sparse.csr_matrix(to_dense(block).numpy()) for block in wide])


def from_faust(faust: Any, chain: Chain) -> list[Tensor]:
    """Return the factors of a `Faust` whose supports are those of a chain.

    Args:
        faust: As many factors as the chain has, of the same shapes.
        chain: Their patterns, leftmost first.

    Returns:
        Tensors (a, b, c, d), float64 or complex128.

    Raises:
        ValueError: if the number of factors differs, or one has entries outside its pattern.
    """
    if faust.numfactors() != len(chain):
        raise ValueError(
            f"The Faust has {faust.numfactors()} factors, the chain {chain} has {len(chain)}; give the chain it is of."
        )
    blocks = []
    for i, pattern in enumerate(chain):
        factor = faust.factors(i)
        dense = torch.tensor(factor.toarray() if hasattr(factor, "toarray") else factor)
        block = from_dense(dense, pattern).clone()
        if int((dense != 0).sum()) != int((block != 0).sum()):
            extra = int((dense != 0).sum()) - int((block != 0).sum())
            raise ValueError(f"Factor {i + 1} of the Faust has {extra} entries outside the support of {pattern}.")
        blocks.append(block)
    return blocks


def _imported(module: str, package: str, purpose: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {module!r}, which cannot be imported ({error}). Install it: pip install '{package}'. "
            "Everything else works without it."
        ) from error
