"""The native kernel of causal linear attention, loaded by ctypes from the package folder."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..compiled import load

MAPS = {"identity": 0, "elu": 1}
_LEVELS = ("plain C++", "AVX2", "AVX-512")
_Number, _Address = ctypes.c_int64, ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = (("at", _Address), ("batch", _Number), ("head", _Number), ("time", _Number))

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        """Return a (batch, length, heads, size) tensor whose last dimension is contiguous."""
        return cls(x.data_ptr(), x.stride(0), x.stride(2), x.stride(1))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Number) for name in (
            "threads", "batch", "heads", "length", "features", "values", "map", "normalize",
        )),
        ("q", _Rows), ("k", _Rows), ("v", _Rows),
        *((name, _Address) for name in (
            "memory", "keys", "out", "bottom", "last_memory", "last_keys", "scratch",
        )),
        ("grad", _Rows),
        *((name, _Address) for name in (
            "grad_memory", "grad_keys", "dq", "dk", "dv", "dmemory", "dkeys",
        )),
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernel once.

    Returns:
        The library, or None where it was not compiled (said once in the log).
    """
    loaded = load(Path(__file__).parent, "eke_attention", what="Causal linear attention")
    if loaded is not None:
        loaded.eke_attention.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Call))
    return loaded


@functools.cache
def level() -> int:
    """Return the best instruction set of this machine: 2 AVX-512, 1 AVX2, 0 plain C++, -1 without the library."""
    loaded = library()
    return -1 if loaded is None else int(loaded.eke_attention_level())


def available() -> bool:
    """Return whether the compiled kernel can be used."""
    return level() >= 0


def describe() -> str:
    """Return the kernel in use, in words."""
    return _LEVELS[level()] if available() else "none (torch's own operations)"


def _last(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous, the same one where it is already."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(call: _Call, *, backward: bool, instructions: int | None) -> None:
    loaded = library()
    assert loaded is not None  # callers ask available() first
    call.threads = torch.get_num_threads()
    if loaded.eke_attention(level() if instructions is None else instructions, backward, ctypes.byref(call)):
        raise MemoryError("The kernel of linear attention found no memory for its scratch space.")


def _call(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, keys: Tensor, options: tuple[int, bool]) -> _Call:
    batch, length, heads, features = q.shape
    values = v.shape[3]
    shapes = (k.shape == q.shape, v.shape[:3] == q.shape[:3], memory.shape == (batch, heads, features, values))
    tensors = (q, k, v, memory, keys)
    if not all(shapes) or keys.shape != memory.shape[:3] or any(t.dtype != torch.float32 for t in tensors):
        raise ValueError(
            "The kernel takes float32 tensors of one attention, got "
            + ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in tensors)
            + "."
        )
    return _Call(
        batch=batch, heads=heads, length=length, features=features, values=values, map=options[0],
        normalize=options[1], q=_Rows.of(q), k=_Rows.of(k), v=_Rows.of(v), memory=memory.data_ptr(),
        keys=keys.data_ptr(),
    )  # fmt: skip


def forward(
    inputs: tuple[Tensor, Tensor, Tensor],
    state: tuple[Tensor, Tensor],
    *,
    feature_map: int,
    normalize: bool,
    instructions: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend.

    Args:
        inputs: q and k (batch, length, heads, D), v (batch, length, heads, M); float32.
        state: S (batch, heads, D, M) and z (batch, heads, D) before.
        feature_map: One of `MAPS`.
        normalize: Whether to divide.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        Outputs (batch, length, heads, M), denominators (batch, heads, length), S and z after.

    Raises:
        ValueError: if the tensors do not fit: the kernel would read past their ends.
        MemoryError: if there is no memory for scratch space.
    """  # noqa: DOC502
    q, k, v = (_last(x) for x in inputs)
    memory, keys = (x.contiguous() for x in state)
    call = _call(q, k, v, memory, keys, (feature_map, normalize))
    out, bottom = v.new_empty(v.shape), v.new_empty(q.shape[0], q.shape[2], q.shape[1])
    last = torch.empty_like(memory), torch.empty_like(keys)
    call.out, call.bottom = out.data_ptr(), bottom.data_ptr()
    call.last_memory, call.last_keys = (x.data_ptr() for x in last)
    _run(call, backward=False, instructions=instructions)
    return out, bottom, *last


def backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    state: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    feature_map: int,
    normalize: bool,
    instructions: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `forward`.

    Args:
        inputs: As there.
        state: As there.
        results: Outputs and denominators that it returned.
        grads: Derivatives of the outputs, of S and of z after.
        feature_map: As there.
        normalize: As there.
        instructions: As there.

    Returns:
        Derivatives of q, k, v, S and z before.

    Raises:
        ValueError: if the tensors do not fit.
        MemoryError: if there is no memory for scratch space.
    """  # noqa: DOC502
    q, k, v = (_last(x) for x in inputs)
    memory, keys = (x.contiguous() for x in state)
    out, bottom = (x.contiguous() for x in results)
    grad, last = _last(grads[0]), [x.contiguous() for x in grads[1:]]
    call = _call(q, k, v, memory, keys, (feature_map, normalize))
    if grad.shape != v.shape or out.shape != v.shape or bottom.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise ValueError(f"Derivatives need the shapes of the outputs {tuple(v.shape)}, got {tuple(grad.shape)}.")
    found = [x.new_empty(x.shape) for x in (q, k, v, memory, keys)]
    call.out, call.bottom, call.grad = out.data_ptr(), bottom.data_ptr(), _Rows.of(grad)
    call.grad_memory, call.grad_keys = (x.data_ptr() for x in last)
    call.dq, call.dk, call.dv, call.dmemory, call.dkeys = (x.data_ptr() for x in found)
    _run(call, backward=True, instructions=instructions)
    return found[0], found[1], found[2], found[3], found[4]
