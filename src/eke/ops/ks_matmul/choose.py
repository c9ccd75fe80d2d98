"""Which algorithm multiplies by a Kronecker-sparse factor: the native kernel or one of torch's paths.

Cost model: seconds = operations / rate + bytes moved / bandwidth + a fixed cost a call. The rates of torch's dense
product and of the native kernel are measured once per type, on first need, in a few milliseconds; `measure=True` times
the algorithms themselves on the given case and remembers the answer for this process.
The dense path does a*d times the operations, so it can win only where a*d is below the ratio of the two rates; batched
products move every input and output three times (permute, multiply, permute).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from . import native, reference

Algorithm = Literal["native", "dense", "bmm", "einsum"]
_BYTES_PER_SECOND = 2e10
_EQUAL = 0.95
"""Rates this near each other are equal within what a short measurement can tell."""
_NEAR = 65_536
"""Entries from which one sample is bound by reading them, which torch does once and kept entries twice."""
_SMALL = 16
"""Blocks of merged neighbours stay this small: larger ones are better left to the tiles."""
_MERGE_BATCH = 256
"""Rows from which multiplying neighbours into one costs less than it saves."""
measurements = 0
"""How often a choice was measured: answers remembered elsewhere are out of date after another one."""
_MEASURED: dict[tuple[tuple[int, int, int, int], int, torch.dtype, bool, int], Algorithm] = {}


def _native(x: Tensor, blocks: Tensor, batch_last: bool) -> Tensor:
    return native.forward(x, (blocks.float(),), batch_last=batch_last)


def _dense(x: Tensor, blocks: Tensor, batch_last: bool) -> Tensor:
    matrix = blocks[0, :, :, 0] if blocks.shape[0] * blocks.shape[3] == 1 else reference.dense(blocks)
    return matrix @ x if batch_last else torch.nn.functional.linear(x, matrix)


def _bmm(x: Tensor, blocks: Tensor, batch_last: bool) -> Tensor:
    a, b, c, d = blocks.shape
    weights = blocks.permute(0, 3, 1, 2).reshape(a * d, b, c)
    if batch_last:
        groups = x.reshape(a, c, d, -1).transpose(1, 2).reshape(a * d, c, -1)
        return torch.bmm(weights, groups).reshape(a, d, b, -1).transpose(1, 2).reshape(a * b * d, -1)
    n = x.shape[0]
    groups = x.reshape(n, a, c, d).permute(1, 3, 0, 2).reshape(a * d, n, c)
    product = torch.bmm(groups, weights.transpose(1, 2))
    return product.reshape(a, d, n, b).permute(2, 0, 3, 1).reshape(n, a * b * d)


def _einsum(x: Tensor, blocks: Tensor, batch_last: bool) -> Tensor:
    return (reference.matmul_batch_last if batch_last else reference.matmul)(x, blocks)


ALGORITHMS: dict[Algorithm, Callable[[Tensor, Tensor, bool], Tensor]] = {
    "native": _native,
    "dense": _dense,
    "bmm": _bmm,
    "einsum": _einsum,
}


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Return the lower quartile of the seconds of this thread, after two runs of warming up.

    Args:
        run: What to time.
        repeats: How often.
    """
    run(), run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 4]


def _ones(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="cpu")


@contextmanager
def _alone() -> Iterator[None]:
    """Measure what is measured, whatever the caller has switched on: answers are kept for the whole process."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


@functools.cache
def rates(dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """Measure operations per second of torch's dense product and of the native kernel.

    Args:
        dtype: Type of the inputs.
        threads: Number of threads in use, part of the key.

    Returns:
        Rate of the dense product, rate of the native kernel (0 where it cannot run).
    """
    # As many samples as make the cost of a call small beside the work.
    n = 512
    x, matrix, blocks = _ones((n, 256), dtype), _ones((256, 256), dtype), _ones((4, 64, 64, 1), torch.float32)
    with _alone():
        dense = 2 * n * 256 * 256 / seconds_of(lambda: torch.nn.functional.linear(x, matrix), 5)
        if not native.supports(x):
            return dense, 0.0
        return dense, 2 * n * 4 * 64 * 64 / seconds_of(lambda: native.forward(x, [blocks], batch_last=False), 8)


@functools.lru_cache(maxsize=4096)
def _predict(pattern: tuple[int, int, int, int], batch: int, dtype: torch.dtype, threads: int) -> Algorithm:
    a, b, c, d = pattern
    if dtype == torch.float32 and a * d == 1:
        # The same product. Where both are about as fast, the kernel's call is a little shorter for entries it has kept.
        rate, own = rates(dtype, threads)
        return "native" if own > _EQUAL * rate and (batch > 1 or b * c < _NEAR) else "dense"
    dense_rate, native_rate = rates(dtype, threads)
    work, size = 2 * a * b * c * d * batch, torch.finfo(dtype).bits // 8
    moved = (a * (b + c) * d * batch + a * b * c * d) * size / _BYTES_PER_SECOND
    costs: dict[Algorithm, float] = {"dense": work * a * d / dense_rate + moved}
    if a * d > 1:
        costs["dense"] += a * d * a * b * c * d * size / _BYTES_PER_SECOND
        # Narrow products reach a small part of the rate of a large one.
        narrow = min(1.0, b * c / (b + c) / 32)
        costs["bmm"] = work / (dense_rate * narrow) + (3 if d > 1 else 2) * moved
    if native_rate:
        costs["native"] = work / native_rate + moved
    return min(costs, key=lambda name: costs[name])


def _measure(pattern: tuple[int, int, int, int], batch: int, dtype: torch.dtype, *, batch_last: bool) -> Algorithm:
    blocks = _ones(pattern, dtype)
    width = pattern[0] * pattern[2] * pattern[3]
    x = _ones((width, batch) if batch_last else (batch, width), dtype)
    names: list[Algorithm] = [name for name in ALGORITHMS if name != "native" or native.supports(x)]
    if pattern[0] * pattern[3] > 16:
        names.remove("dense")
    best = {name: float("inf") for name in names}
    for _ in range(3):  # interleaved, so that a burst of other work hits all of them
        for name in names:
            seconds = seconds_of(lambda name=name: ALGORITHMS[name](x, blocks, batch_last), 4)  # type: ignore[misc]
            best[name] = min(best[name], seconds)
    return min(names, key=lambda name: best[name])


def choose_algorithm(
    pattern: tuple[int, int, int, int],
    batch: int,
    dtype: torch.dtype,
    *,
    batch_last: bool = False,
    measure: bool = False,
) -> Algorithm:
    """Choose how to multiply on the CPU.

    Args:
        pattern: (a, b, c, d).
        batch: Number of samples.
        dtype: Type of inputs and entries.
        batch_last: Layout.
        measure: Whether to time every algorithm on this case (milliseconds) and remember the winner; later calls of
            `ks_matmul` with the same case follow it.

    Returns:
        "native", "dense", "bmm" or "einsum". Where it hangs on measured rates (bfloat16, at most three groups), two
        processes may choose differently; results then differ by rounding.
    """
    key = (pattern, batch, dtype, batch_last, torch.get_num_threads()) if measure or _MEASURED else None
    if key is not None and measure:
        global measurements
        measurements += 1
        with _alone():
            _MEASURED[key] = _measure(pattern, batch, dtype, batch_last=batch_last)
    known = _MEASURED.get(key) if key is not None else None
    if known is not None:
        return known
    groups = pattern[0] * pattern[3]
    single = dtype == torch.float32
    if not (single or dtype == torch.bfloat16) or not native.available():
        return "dense" if groups == 1 else "einsum"
    # Where the kernel does the same work with fewer moves there is nothing to weigh.
    if single and groups > 3:
        return "native"
    return _predict(pattern, batch, dtype, torch.get_num_threads())


def merge(left: Tensor, right: Tensor) -> Tensor | None:
    """Multiply two neighbours into one factor where their product has such a support.

    Args:
        left: Entries (a, b, c, d) of the factor applied second.
        right: Entries (p, q, r, s) of the factor applied first, with a | p and s | d.

    Returns:
        Entries (a, b*d/s, p*r/a, s) of the product, or None where the supports do not chain.
    """
    (a, b, c, d), (p, q, r, s) = left.shape, right.shape
    if p % a or d % s or c % (p // a) or q % (d // s) or a * c * d != p * q * s:
        return None
    across, along = p // a, d // s
    inner = c // across
    if inner != q // along:
        return None
    product = torch.einsum(
        "ijtrsl,itrskl->ijstkl",
        left.reshape(a, b, across, inner, along, s),
        right.reshape(a, across, inner, along, r, s),
    )
    return product.reshape(a, b * along, across * r, s)


def merges(batch: int) -> bool:
    """Return whether there are enough samples for `merge_neighbours` to pay."""
    return batch >= _MERGE_BATCH


def merge_neighbours(factors: list[Tensor], batch: int) -> list[Tensor]:
    """Merge small neighbours where one factor costs no more operations than two.

    Args:
        factors: Entries, leftmost first.
        batch: Rows that will be multiplied.

    Returns:
        As many or fewer factors with the same product.
    """
    if not merges(batch) or len(factors) < 2:
        return factors
    merged: list[Tensor] = []
    for blocks in factors:
        if merged and _pays(merged[-1].shape, blocks.shape):
            product = merge(merged[-1], blocks)
            if product is not None:
                merged[-1] = product
                continue
        merged.append(blocks)
    return merged


def _butterfly(shape: torch.Size) -> bool:
    """Return whether the kernel takes several such factors in one pass, in half of the operations."""
    a, b, c, d = shape
    return b == c == 2 and not d & (d - 1) and not 2 * a * d % 16


def _pays(left: torch.Size, right: torch.Size) -> bool:
    if _butterfly(left) and _butterfly(right):
        return False
    (a, b, c, d), (p, q, r, s) = left, right
    height, width = b * d // s, p * r // a
    return max(height, width) <= _SMALL and a * height * width * s <= a * b * c * d + p * q * r * s
