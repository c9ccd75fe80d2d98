"""The native CPU kernels of Kronecker-sparse products, loaded by ctypes from the package folder.

One call multiplies a batch by one factor or by a chain of them and packs their entries on the way; `kept.py` has them
packed once for many calls. Without the compiled library `available()` is false and the callers take torch's paths.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..compiled import load

LONGEST = 64
"""Factors that one call takes."""
_FIRST, _LAST = 0, 1
_NO_MEMORY = 2
TYPES = {torch.float32: 0, torch.bfloat16: 1}
_LEVELS = ("plain C++", "AVX2", "AVX-512")


_RECORD = struct.Struct("9q")
"""One factor as the library sees it: a, b, c, d, the strides of its entries, their address."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernels once.

    Returns:
        The library, or None where it was not compiled (said once in the log).
    """
    loaded = load(Path(__file__).parent, "eke_ks_keep", what="Kronecker-sparse products")
    if loaded is None:
        return None
    number, address = ctypes.c_int64, ctypes.c_void_p
    loaded.eke_ks_forward.argtypes = (
        ctypes.c_int, number, number, number, number, address, number, address, number, number, address, address,
        number,
    )  # fmt: skip
    loaded.eke_ks_gradient.argtypes = (
        ctypes.c_int, number, number, number, address, number, address, number, address, number, number, number,
        number,
    )  # fmt: skip
    loaded.eke_ks_keep.argtypes = (
        ctypes.c_int, number, number, number, number, address, number, number, address,
    )  # fmt: skip
    loaded.eke_ks_keep.restype = address
    loaded.eke_ks_kept.argtypes = (address, number, address, address, address)
    loaded.eke_ks_drop.argtypes, loaded.eke_ks_drop.restype = (address,), None
    return loaded


def calls(things: tuple[object, ...]) -> Callable[[Tensor, Tensor, bool], Tensor | None] | None:
    """Return `kept.asked` in C++.

    Args:
        things: What it asks, in the order of `given` in cpu_calls.cpp.

    Returns:
        The function, or None where the library was compiled without Python's headers or torch has no table of DLPack.
    """
    loaded, table = library(), getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if loaded is None or table is None or not hasattr(loaded, "eke_ks_calls"):
        return None
    make = ctypes.PyDLL(loaded._name).eke_ks_calls  # with the interpreter's lock
    make.argtypes, make.restype = (ctypes.py_object, ctypes.py_object), ctypes.py_object
    made: Callable[[Tensor, Tensor, bool], Tensor | None] | None = make(table, things)
    return made


@functools.cache
def level() -> int:
    """Return the best instruction set of this machine: 2 AVX-512, 1 AVX2, 0 plain C++, -1 without the library."""
    loaded = library()
    return -1 if loaded is None else int(loaded.eke_ks_level())


def available() -> bool:
    """Return whether the compiled kernels can be used."""
    return level() >= 0


def describe() -> str:
    """Return the kernels in use, in words."""
    return _LEVELS[level()] if available() else "none (torch's own operations)"


def supports(x: Tensor) -> bool:
    """Return whether the kernels take this input (a CPU tensor of float32 or bfloat16)."""
    return x.device.type == "cpu" and x.dtype in TYPES and available()


def _rows(x: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous, the same one where they are already."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def records(factors: Sequence[Tensor]) -> bytes:
    """Return factors as the library reads them."""
    return b"".join([_RECORD.pack(*blocks.shape, *blocks.stride(), blocks.data_ptr()) for blocks in factors])


def forward(
    x: Tensor,
    factors: Sequence[Tensor],
    *,
    batch_last: bool,
    bias: Tensor | None = None,
    relu: bool = False,
    instructions: int | None = None,
) -> Tensor:
    """Multiply a batch by a chain of factors.

    Args:
        x: Inputs, (batch, features) or, batch last, (features, batch); float32 or bfloat16.
        factors: Free entries of each factor, the one applied first at the start; float32.
        batch_last: Whether the batch is the last dimension.
        bias: Added at the end, one value per output feature, float32.
        relu: Whether to clip at zero at the end.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        Outputs of the type of x, (batch, outputs) or (outputs, batch).

    Raises:
        ValueError: if a factor does not fit what it multiplies: the kernel would read past its end.
    """
    loaded = library()
    assert loaded is not None  # callers ask available() first
    x = _rows(x)
    width = x.shape[0 if batch_last else 1]
    for blocks in factors:
        a, b, c, d = blocks.shape
        if width != a * c * d or blocks.dtype != torch.float32 or not blocks.numel():
            raise ValueError(
                f"A factor {tuple(blocks.shape)} of {blocks.dtype} cannot multiply {width} features: it must be "
                f"float32, not empty, and take a*c*d = {a * c * d}."
            )
        width = a * b * d
    if not 1 <= len(factors) <= LONGEST:
        raise ValueError(f"The kernel takes 1 to {LONGEST} factors in one call, got {len(factors)}.")
    batch = x.shape[1 if batch_last else 0]
    y = x.new_empty((width, batch) if batch_last else (batch, width))
    if not y.numel():
        return y
    status = loaded.eke_ks_forward(
        level() if instructions is None else instructions, torch.get_num_threads(), _LAST if batch_last else _FIRST,
        TYPES[x.dtype], batch, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), len(factors), records(factors),
        None if bias is None else bias.data_ptr(), relu,
    )  # fmt: skip
    succeeded(status)
    return y


def succeeded(status: int) -> None:
    """Check what the library returned.

    Args:
        status: 0 for success.

    Raises:
        MemoryError: if scratch memory could not be had.
        RuntimeError: if the library refused the call, which the checks of the callers should prevent.
    """
    if status == _NO_MEMORY:
        raise MemoryError("The Kronecker-sparse kernel found no memory for its scratch space; try a smaller batch.")
    if status:
        raise RuntimeError(f"The Kronecker-sparse kernel refused a call with status {status}; please report it.")


def gradient(
    x: Tensor, grad: Tensor, shape: tuple[int, int, int, int], *, batch_last: bool, instructions: int | None = None
) -> Tensor:
    """Differentiate a product with respect to its free entries.

    Args:
        x: Inputs, (batch, a*c*d) or, batch last, (a*c*d, batch); float32.
        grad: Gradient of the outputs in the same layout; float32.
        shape: (a, b, c, d).
        batch_last: Whether the batch is the last dimension.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        Gradient of the entries, (a, b, c, d).

    Raises:
        ValueError: if x and grad are not those of a product of this shape: the kernel would read past their ends.
    """
    loaded = library()
    assert loaded is not None  # callers ask available() first
    x, grad = _rows(x), _rows(grad)
    batch = x.shape[1 if batch_last else 0]
    a, b, c, d = shape
    inputs, outputs = [(size, batch) if batch_last else (batch, size) for size in (a * c * d, a * b * d)]
    if x.shape != inputs or grad.shape != outputs or x.dtype != torch.float32 or grad.dtype != torch.float32:
        raise ValueError(
            f"The gradient for blocks {shape} needs float32 x {inputs} and grad {outputs}, got {tuple(x.shape)} of "
            f"{x.dtype} and {tuple(grad.shape)} of {grad.dtype}."
        )
    out = x.new_empty(shape)
    if not batch:
        return out.zero_()
    status = loaded.eke_ks_gradient(
        level() if instructions is None else instructions, torch.get_num_threads(),
        _LAST if batch_last else _FIRST, batch, x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0),
        out.data_ptr(), *shape,
    )  # fmt: skip
    succeeded(status)
    return out
