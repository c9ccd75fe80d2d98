"""Torch's ways of multiplying by a Kronecker-sparse factor, each with its entries prepared beforehand.

A rival is made once for its entries: whatever permuting, copying or compressing they need is not timed. Where a way can
be written with several orders of dimensions, the fastest one of each case, found by timing, stands for it.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from eke.ops.ks_matmul import reference

Way = tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]
"""Entries as a way wants them, and the product of inputs with them."""
_DENSE_WORK = 4e9
"""Operations of a dense product, a*d times those of the factor, up to which it is timed: beyond, it is hopeless."""
_SPARSE_WORK = 1e7
"""Entries times batch up to which CSR and BSR are timed: they are 10 to 100 times slower than the rest."""
IN_PLACE = "in place"
"""Marks ways that write into a view of the outputs: they have no derivatives."""


def _dense(blocks: Tensor, last: bool) -> dict[str, Way]:
    matrix = reference.dense(blocks)
    turned = matrix.T.contiguous()
    if last:
        return {"dense": (matrix, lambda x, w: w @ x), "dense, turned": (turned, lambda x, w: w.T @ x)}
    return {"dense": (matrix, torch.nn.functional.linear), "dense, turned": (turned, lambda x, w: x @ w)}


def _bmm_first(blocks: Tensor) -> dict[str, Way]:
    a, b, c, d = blocks.shape
    tall = blocks.permute(0, 3, 2, 1).reshape(a * d, c, b).contiguous()
    wide = blocks.permute(0, 3, 1, 2).reshape(a * d, b, c).contiguous()

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(-1, a, c, d).permute(1, 3, 0, 2).reshape(a * d, -1, c)

    def rows(product: Tensor) -> Tensor:
        return product.reshape(a, d, -1, b).permute(2, 0, 3, 1).reshape(-1, a * b * d)

    def columns(product: Tensor) -> Tensor:
        return product.reshape(a, d, b, -1).permute(3, 0, 2, 1).reshape(-1, a * b * d)

    found: dict[str, Way] = {
        "rows": (tall, lambda x, w: rows(torch.bmm(grouped(x), w))),
        "rows, turned": (wide, lambda x, w: rows(torch.bmm(grouped(x), w.mT))),
        "columns of rows": (wide, lambda x, w: columns(torch.bmm(w, grouped(x).mT))),
        "columns": (
            wide,
            lambda x, w: columns(torch.bmm(w, x.reshape(-1, a, c, d).permute(1, 3, 2, 0).reshape(a * d, c, -1))),
        ),
    }
    if d == 1:

        def in_place(x: Tensor, w: Tensor) -> Tensor:
            y = x.new_empty(x.shape[0], a, b)
            torch.bmm(x.view(-1, a, c).transpose(0, 1), w, out=y.transpose(0, 1))
            return y.view(-1, a * b)

        found[IN_PLACE] = (tall, in_place)
    return {f"bmm, {name}": way for name, way in found.items()}


def _bmm_last(blocks: Tensor) -> dict[str, Way]:
    a, b, c, d = blocks.shape
    tall = blocks.permute(0, 3, 2, 1).reshape(a * d, c, b).contiguous()
    wide = blocks.permute(0, 3, 1, 2).reshape(a * d, b, c).contiguous()

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(a, c, d, -1).transpose(1, 2).reshape(a * d, c, -1)

    def whole(product: Tensor) -> Tensor:
        return product.reshape(a, d, b, -1).transpose(1, 2).reshape(a * b * d, -1)

    found: dict[str, Way] = {
        "columns": (wide, lambda x, w: whole(torch.bmm(w, grouped(x)))),
        "columns, turned": (tall, lambda x, w: whole(torch.bmm(w.mT, grouped(x)))),
    }
    if a == 1 or d == 1:

        def in_place(x: Tensor, w: Tensor) -> Tensor:
            y = x.new_empty(a * b * d, x.shape[1])
            groups = x.view(c, d, -1).transpose(0, 1) if a == 1 else x.view(a, c, -1)
            torch.bmm(w, groups, out=y.view(b, d, -1).transpose(0, 1) if a == 1 else y.view(a, b, -1))
            return y

        found[IN_PLACE] = (wide, in_place)
    return {f"bmm, {name}": way for name, way in found.items()}


def _einsum(blocks: Tensor, last: bool) -> dict[str, Way]:
    a, b, c, d = blocks.shape
    found: dict[str, Way] = {}
    for order in ("abcd", "adcb", "adbc"):
        entries = blocks.permute(["abcd".index(letter) for letter in order]).contiguous()
        if last:
            found[f"einsum, {order}"] = (
                entries,
                lambda x, w, order=order: torch.einsum(
                    f"acdn,{order}->abdn", x.reshape(a, c, d, -1), w
                ).reshape(a * b * d, -1),
            )  # fmt: skip
        else:
            found[f"einsum, {order}"] = (
                entries,
                lambda x, w, order=order: torch.einsum(
                    f"nacd,{order}->nabd", x.reshape(-1, a, c, d), w
                ).reshape(-1, a * b * d),
            )  # fmt: skip
    return found


def _sparse(blocks: Tensor, last: bool) -> dict[str, Way]:
    a, b, c, d = blocks.shape
    side = max(k for k in range(1, min(b, c) + 1) if b % k == 0 and c % k == 0)

    def bsr(x: Tensor, w: Tensor) -> Tensor:
        if last:
            groups = x.reshape(a, c, d, -1).transpose(1, 2).reshape(a * c * d, -1)
            return (w @ groups).reshape(a, d, b, -1).transpose(1, 2).reshape(a * b * d, -1)
        groups = x.reshape(-1, a, c, d).transpose(2, 3).reshape(-1, a * c * d)
        return (w @ groups.T).T.reshape(-1, a, d, b).transpose(2, 3).reshape(-1, a * b * d)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse formats a beta
        csr = reference.dense(blocks).to_sparse_csr()
        apart = reference.dense(blocks.permute(0, 3, 1, 2).reshape(a * d, b, c, 1)).to_sparse_bsr((side, side))
    return {"csr": (csr, lambda x, w: w @ x if last else (w @ x.T).T), "bsr": (apart, bsr)}


def ways(blocks: Tensor, *, last: bool, batch: int, sparse: bool = True) -> dict[str, Way]:
    """Return every way of torch to multiply by these entries, all variants.

    Args:
        blocks: Free entries, (a, b, c, d).
        last: Layout.
        batch: Samples to come: hopeless ways are left out by it.
        sparse: Whether to have CSR and BSR.
    """
    a, _, _, d = blocks.shape
    found = (_bmm_last if last else _bmm_first)(blocks) | _einsum(blocks, last)
    if 2 * (a * d) * blocks.numel() * batch <= _DENSE_WORK:
        found |= _dense(blocks, last)
    if sparse and blocks.numel() * batch < _SPARSE_WORK:
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
