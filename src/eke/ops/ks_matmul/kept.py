"""Factors packed once for many calls: for as long as their tensors live and their entries stay what they are.

Packing costs as much as multiplying some tens of samples. A second call with the same tensors packs their entries for
later calls. Each call sums the bytes of the entries anew (128 bits, 50 to 100 GB/s, 2 to 13 % of a product of 32
samples), so that every change is seen: an optimizer's, one through `.data` or NumPy, which version counters miss, other
memory. Tensors are referred to weakly; the packed copy takes as much memory as the entries and goes with them.
"""

from __future__ import annotations

import functools
import struct
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from . import choose, native

_BATCH = 1024
"""Samples beyond which packing one factor in the call costs too little to keep a copy."""
_CHOICES = 256
_SOURCE = struct.Struct("2q")
_CHANGED = -1
_DLPACK = {torch.float32: (2, 32), torch.bfloat16: (4, 16)}
_RECORD = struct.Struct("15q")
"""What cpu_calls.cpp knows of one factor: addresses, shape, strides, type in DLPack's numbers, features, threads."""


KNOWN: dict[tuple[object, ...], Kept] = {}


def _forget(known: dict[tuple[object, ...], Kept], key: tuple[object, ...], _: object) -> None:
    known.pop(key, None)


class Packed:
    """Entries as the kernel reads them, in memory of the library.

    Args:
        factors: Free entries, float32, the factor applied first at the start.
        sources: The tensors they were made from, whose bytes are watched.
        dtype: Type of inputs and outputs.
        batch_last: Layout.
        relu: Whether the kernel clips at zero at the end.

    Raises:
        MemoryError: if there is no memory for the entries.
    """

    __slots__ = ("__weakref__", "address", "factors", "record", "run", "threads")

    def __init__(
        self, factors: Sequence[Tensor], sources: Sequence[Tensor], *, dtype: torch.dtype, batch_last: bool, relu: bool
    ) -> None:
        loaded = native.library()
        assert loaded is not None  # callers ask native.supports() first
        if product is asked:
            _quicken()
        self.factors = factors  # entries that need no packing are read where they are
        self.threads, self.run = torch.get_num_threads(), loaded.eke_ks_kept
        sums = b"".join([_SOURCE.pack(t.data_ptr(), _span(t) * t.element_size()) for t in sources])
        address = loaded.eke_ks_keep(
            native.level(), self.threads, int(batch_last), native.TYPES[dtype], len(factors),
            native.records(factors), relu, len(sources), sums,
        )  # fmt: skip
        if address is None:
            raise MemoryError(f"There is no memory to pack {sum(f.numel() for f in factors)} entries.")
        self.address = address
        self.record = _record(self, sources[0], dtype) if len(sources) == 1 else b""
        weakref.finalize(self, loaded.eke_ks_drop, address).atexit = False


def _record(packed: Packed, blocks: Tensor, dtype: torch.dtype) -> bytes:
    """Return the record of a product with one factor."""
    a, b, c, d = blocks.shape
    return _RECORD.pack(
        packed.address, blocks.data_ptr(), *blocks.shape, *blocks.stride(), *_DLPACK[dtype], a * c * d, a * b * d,
        packed.threads,
    )  # fmt: skip


class Kept:
    """What is known of the entries of one product or chain after its first call.

    Args:
        tensors: Entries, leftmost factor first.
        key: Under which this is found; it is forgotten when one of the tensors dies.
    """

    __slots__ = (
        "address", "choices", "dtype", "inputs", "matrix", "measurements", "others", "outputs", "packed", "references",
        "shape", "strides",
    )  # fmt: skip

    def __init__(self, tensors: Sequence[Tensor], key: tuple[object, ...]) -> None:
        first, last = tensors[0], tensors[-1]
        self.inputs = last.shape[0] * last.shape[2] * last.shape[3]
        self.outputs = first.shape[0] * first.shape[1] * first.shape[3]
        self.dtype = first.dtype
        self.address, self.shape, self.strides = first.data_ptr(), first.shape, first.stride()
        self.others = [(t.data_ptr(), t.shape, t.stride()) for t in tensors[1:]]
        self.references = [weakref.ref(t, functools.partial(_forget, KNOWN, key)) for t in tensors]
        single = len(tensors) == 1 and self.shape[0] * self.shape[3] == 1
        self.matrix = first.detach()[0, :, :, 0] if single else None
        self.packed: Packed | None = None
        self.choices: dict[int, choose.Algorithm] = {}  # by batch, as long as nothing is measured
        self.measurements = choose.measurements

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the tensors lie where they lay, in the same shape."""
        first = tensors[0]
        if first.data_ptr() != self.address or first.shape != self.shape or first.stride() != self.strides:
            return False
        return not self.others or [(t.data_ptr(), t.shape, t.stride()) for t in tensors[1:]] == self.others


def _span(entries: Tensor) -> int:
    """Return how many numbers lie between the first and the last entry."""
    return 1 + sum((size - 1) * stride for size, stride in zip(entries.shape, entries.stride()))


def asked(x: Tensor, blocks: Tensor, batch_last: bool) -> Tensor | None:
    """Multiply by kept entries where nobody watches the call; one function, because calls cost more than questions.

    Args:
        x: Inputs.
        blocks: Free entries.
        batch_last: Layout.

    Returns:
        Outputs, or None where the long way must be taken: entries not kept or changed, gradients, a mode, other
        inputs.
    """
    known = KNOWN.get((id(blocks), batch_last))
    if known is None or known.packed is None or watched() or type(x) is not Tensor or not x.is_cpu or x.is_neg():
        return None
    if torch.is_grad_enabled() and (x.requires_grad or blocks.requires_grad):
        return None
    if blocks.data_ptr() != known.address or blocks.shape != known.shape or blocks.stride() != known.strides:
        return None
    shape = x.shape
    # Other types may lie in the same memory: a view, or what was put where the old entries were.
    if len(shape) != 2 or x.dtype is not known.dtype or blocks.dtype is not known.dtype:
        return None
    if not x.is_contiguous() or blocks.is_neg():
        return None
    inputs, batch = shape if batch_last else (shape[1], shape[0])
    name = known.choices.get(batch) if known.measurements == choose.measurements else None
    if name is None:
        name = _choose(known, batch, batch_last)
    if inputs != known.inputs or not batch:
        return None
    if name == "native":
        return _run(known, x, (known.outputs, batch) if batch_last else (batch, known.outputs), batch, None)
    # One group is a dense matrix: the same memory, so there is nothing to watch.
    if known.matrix is None or name != "dense":
        return None
    return known.matrix @ x if batch_last else torch.nn.functional.linear(x, known.matrix)


product: Callable[[Tensor, Tensor, bool], Tensor | None] = asked
"""`asked`, or the same questions in C++ once something is packed, where the library was compiled beside Python.h."""


def _quicken() -> None:
    """Ask in C++ from now on, where that is possible."""
    global product
    found = native.calls((
        asked, Tensor, KNOWN, choose, forward_ad, _C._is_any_autocast_enabled, _C._len_torch_dispatch_stack,
        _C._functorch.peek_interpreter_stack, _C._get_tracing_state, torch.is_grad_enabled, torch.get_num_threads,
        torch.nn.functional.linear,
    ))  # fmt: skip
    product = asked if found is None else found


def watched() -> bool:
    """Return whether a mode is on that changes what calls mean or wants to see them."""
    return (
        _C._is_any_autocast_enabled()
        or _C._len_torch_dispatch_stack() > 0
        or _C._functorch.peek_interpreter_stack() is not None
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _choose(known: Kept, batch: int, batch_last: bool) -> choose.Algorithm:
    if len(known.choices) >= _CHOICES or known.measurements != choose.measurements:
        known.choices.clear()
    known.measurements = choose.measurements
    a, b, c, d = known.shape
    name = choose.choose_algorithm((a, b, c, d), batch, known.dtype, batch_last=batch_last)
    known.choices[batch] = name
    return name


def _run(known: Kept, x: Tensor, shape: tuple[int, int], batch: int, bias: Tensor | None) -> Tensor | None:
    packed = known.packed  # held here: another thread may replace it
    if packed is None or packed.threads != torch.get_num_threads():
        known.packed = None
        return None
    y = x.new_empty(*shape)  # one argument for each size: parsing a tuple takes half a microsecond more
    status = packed.run(packed.address, batch, x.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr())
    if status == _CHANGED:
        known.packed = None
        return None
    if status:
        native.succeeded(status)
    return y


def chain(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, relu: bool) -> Tensor | None:
    """Multiply by the kept entries of a chain; the caller has made sure that nobody watches the call.

    Args:
        x: Inputs, (batch, features).
        tensors: Entries, leftmost factor first.
        bias: Added at the end.
        relu: Whether to clip at zero at the end.

    Returns:
        Outputs, or None where the entries are not kept or have changed.
    """
    batch = x.shape[0]
    known = KNOWN.get(chain_key(tensors, batch, relu))
    if known is None or known.packed is None or x.dtype is not known.dtype or not x.is_contiguous() or not batch:
        return None
    if not known.fits(tensors):
        return None
    bias = None if bias is None else bias.float().contiguous()
    return _run(known, x, (batch, known.outputs), batch, bias)


def chain_key(tensors: Sequence[Tensor], batch: int, relu: bool) -> tuple[object, ...]:
    """Return the key of a chain: neighbours are merged for large batches alone."""
    return ("chain", relu, choose.merges(batch), *map(id, tensors))


def meet(
    key: tuple[object, ...],
    tensors: Sequence[Tensor],
    x: Tensor,
    *,
    batch: int,
    batch_last: bool = False,
    relu: bool = False,
) -> None:
    """Remember the entries of a call that packs them itself, and pack those met before for the calls to come.

    Args:
        key: (id, layout) of one factor or `chain_key`.
        tensors: Entries, leftmost factor first.
        x: Inputs of the call.
        batch: Samples of the call.
        batch_last: Layout.
        relu: Whether the kernel clips at zero at the end of a chain.
    """
    if (batch > _BATCH and len(tensors) == 1) or not native.supports(x) or len(tensors) > native.LONGEST:
        return
    known = KNOWN.get(key)
    if known is None or not known.fits(tensors):
        # Views that leave out most of what lies between their entries are not watched.
        if all(_span(t) <= 2 * t.numel() for t in tensors):
            KNOWN[key] = Kept(tensors, key)
    elif known.packed is None:
        factors = _factors(tensors, batch)
        packed = Packed(factors, tensors, dtype=x.dtype, batch_last=batch_last, relu=relu)
        # What was copied before the sums may be older than they are, if another thread changed the entries meanwhile.
        again = _factors(tensors, batch)
        if all(torch.equal(f.view(torch.int32), g.view(torch.int32)) for f, g in zip(factors, again)):
            known.packed = packed


def _factors(tensors: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Return what the kernel packs, the factor applied first at the start: aliases where nothing has to be computed."""
    # Detached: the tensors themselves must be free to go.
    return choose.merge_neighbours([t.detach().float() for t in tensors], batch)[::-1]
