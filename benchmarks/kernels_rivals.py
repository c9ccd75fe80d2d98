"""Torch's ways of multiplying by a Kronecker-sparse factor, each with its entries prepared beforehand.

A rival is made once for its entries: whatever permuting, copying or compressing they need is not timed. Where a way can
be written with several orders of dimensions, the fastest one of each case, found by timing, stands for it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from eke.ops.ks_matmul import reference

Product = Callable[[Tensor], Tensor]
_DENSE_GROUPS = 64
"""The dense matrix does a*d times the work: beyond this many groups it is not timed."""
_SPARSE_WORK = 1e7
"""Entries times batch up to which CSR and BSR are timed: they are 10 to 100 times slower than the rest."""


def _dense(blocks: Tensor, last: bool) -> dict[str, Product]:
    matrix = reference.dense(blocks)
    turned = matrix.T.contiguous()
    if last:
        return {"dense": lambda x: matrix @ x, "dense, turned": lambda x: turned.T @ x}
    return {"dense": lambda x: torch.nn.functional.linear(x, matrix), "dense, turned": lambda x: x @ turned}


def _bmm_first(blocks: Tensor) -> dict[str, Product]:
    a, b, c, d = blocks.shape
    tall = blocks.permute(0, 3, 2, 1).reshape(a * d, c, b).contiguous()
    wide = blocks.permute(0, 3, 1, 2).reshape(a * d, b, c).contiguous()

    def rows(x: Tensor) -> Tensor:
        groups = x.reshape(-1, a, c, d).permute(1, 3, 0, 2).reshape(a * d, -1, c)
        return torch.bmm(groups, tall).reshape(a, d, -1, b).permute(2, 0, 3, 1).reshape(-1, a * b * d)

    def rows_turned(x: Tensor) -> Tensor:
        groups = x.reshape(-1, a, c, d).permute(1, 3, 0, 2).reshape(a * d, -1, c)
        return torch.bmm(groups, wide.mT).reshape(a, d, -1, b).permute(2, 0, 3, 1).reshape(-1, a * b * d)

    def columns(x: Tensor) -> Tensor:
        groups = x.reshape(-1, a, c, d).permute(1, 3, 2, 0).reshape(a * d, c, -1)
        return torch.bmm(wide, groups).reshape(a, d, b, -1).permute(3, 0, 2, 1).reshape(-1, a * b * d)

    def columns_of_rows(x: Tensor) -> Tensor:
        groups = x.reshape(-1, a, c, d).permute(1, 3, 0, 2).reshape(a * d, -1, c)
        return torch.bmm(wide, groups.mT).reshape(a, d, b, -1).permute(3, 0, 2, 1).reshape(-1, a * b * d)

    found = {"rows": rows, "rows, turned": rows_turned, "columns": columns, "columns of rows": columns_of_rows}
    if d == 1:

        def in_place(x: Tensor) -> Tensor:
            y = x.new_empty(x.shape[0], a, b)
            torch.bmm(x.view(-1, a, c).transpose(0, 1), tall, out=y.transpose(0, 1))
            return y.view(-1, a * b)

        found["in place"] = in_place
    return {f"bmm, {name}": run for name, run in found.items()}


def _bmm_last(blocks: Tensor) -> dict[str, Product]:
    a, b, c, d = blocks.shape
    tall = blocks.permute(0, 3, 2, 1).reshape(a * d, c, b).contiguous()
    wide = blocks.permute(0, 3, 1, 2).reshape(a * d, b, c).contiguous()

    def columns(x: Tensor) -> Tensor:
        groups = x.reshape(a, c, d, -1).transpose(1, 2).reshape(a * d, c, -1)
        return torch.bmm(wide, groups).reshape(a, d, b, -1).transpose(1, 2).reshape(a * b * d, -1)

    def columns_turned(x: Tensor) -> Tensor:
        groups = x.reshape(a, c, d, -1).transpose(1, 2).reshape(a * d, c, -1)
        return torch.bmm(tall.mT, groups).reshape(a, d, b, -1).transpose(1, 2).reshape(a * b * d, -1)

    found = {"bmm, columns": columns, "bmm, columns, turned": columns_turned}
    if a == 1 or d == 1:

        def in_place(x: Tensor) -> Tensor:
            y = x.new_empty(a * b * d, x.shape[1])
            groups = x.view(c, d, -1).transpose(0, 1) if a == 1 else x.view(a, c, -1)
            torch.bmm(wide, groups, out=y.view(b, d, -1).transpose(0, 1) if a == 1 else y.view(a, b, -1))
            return y

        found["bmm, in place"] = in_place
    return found


def _einsum(blocks: Tensor, last: bool) -> dict[str, Product]:
    a, b, c, d = blocks.shape
    found: dict[str, Product] = {}
    for order in ("abcd", "adcb", "adbc"):
        entries = blocks.permute(["abcd".index(letter) for letter in order]).contiguous()
        if last:
            found[f"einsum, {order}"] = lambda x, entries=entries, order=order: torch.einsum(
                f"acdn,{order}->abdn", x.reshape(a, c, d, -1), entries
            ).reshape(a * b * d, -1)
        else:
            found[f"einsum, {order}"] = lambda x, entries=entries, order=order: torch.einsum(
                f"nacd,{order}->nabd", x.reshape(-1, a, c, d), entries
            ).reshape(-1, a * b * d)
    return found


def _sparse(blocks: Tensor, last: bool) -> dict[str, Product]:
    a, b, c, d = blocks.shape
    csr = reference.dense(blocks).to_sparse_csr()
    side = max(k for k in range(1, min(b, c) + 1) if b % k == 0 and c % k == 0)
    apart = reference.dense(blocks.permute(0, 3, 1, 2).reshape(a * d, b, c, 1)).to_sparse_bsr((side, side))

    def bsr(x: Tensor) -> Tensor:
        if last:
            groups = x.reshape(a, c, d, -1).transpose(1, 2).reshape(a * c * d, -1)
            return (apart @ groups).reshape(a, d, b, -1).transpose(1, 2).reshape(a * b * d, -1)
        groups = x.reshape(-1, a, c, d).transpose(2, 3).reshape(-1, a * c * d)
        return (apart @ groups.T).T.reshape(-1, a, d, b).transpose(2, 3).reshape(-1, a * b * d)

    return {"csr": lambda x: csr @ x if last else (csr @ x.T).T, "bsr": bsr}


def products(blocks: Tensor, *, last: bool, batch: int) -> dict[str, Product]:
    """Return every way of torch to multiply by these entries, all variants.

    Args:
        blocks: Free entries, (a, b, c, d).
        last: Layout.
        batch: Samples to come: hopeless ways are left out by it.
    """
    a, _, _, d = blocks.shape
    found = (_bmm_last if last else _bmm_first)(blocks) | _einsum(blocks, last)
    if a * d <= _DENSE_GROUPS:
        found |= _dense(blocks, last)
    if blocks.numel() * batch < _SPARSE_WORK:
        found |= _sparse(blocks, last)
    return found


def lower_quartile(values: list[float]) -> float:
    """Return the value below which a quarter of them lie."""
    return sorted(values)[len(values) // 4]


def interleaved(
    rivals: Mapping[str, Callable[[], object]], seconds: float, *, clock: Callable[[], float] = time.thread_time
) -> dict[str, float]:
    """Time rivals in turns; each run is preceded by one that is not timed, so none pays for another's caches.

    Args:
        rivals: What to run.
        seconds: How long, for all together; at least five rounds.
        clock: Time of this thread, or of the wall.

    Returns:
        Lower quartile of each one's seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()
    end = time.perf_counter() + seconds
    for count in itertools.count():
        if count >= 5 and time.perf_counter() > end:
            return {name: lower_quartile(values) for name, values in samples.items()}
        for name, run in rivals.items():
            run()
            start = clock()
            run()
            samples[name].append(clock() - start)
    raise AssertionError("unreachable")


def fastest(runs: Mapping[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, str]:
    """Return for each way (the word before the comma) its fastest variant, by a short timing.

    Args:
        runs: Variants by name.
        clock: See `interleaved`.
    """
    seconds = interleaved(runs, 0.0, clock=clock)
    best: dict[str, str] = {}
    for name in sorted(seconds, key=lambda name: seconds[name]):
        best.setdefault(name.partition(",")[0], name)
    return best
