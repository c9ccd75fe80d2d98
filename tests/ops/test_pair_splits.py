"""Row pairs of rank one: the kernel against its specification and against singular value decompositions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from eke.cli.doctor import examined
from eke.ops import compiled, pair_splits
from eke.ops.pair_splits import native, reference

SOURCES = Path(pair_splits.__file__).parent
CASES = [
    ((1, 2, 1), [1]), ((1, 8, 8), [2, 2, 2]), ((3, 16, 30), [1, 5, 3]), ((2, 64, 64), [2] * 6), ((1, 24, 14), [7, 1]),
    ((1, 512, 640), [5, 2, 2, 1, 4, 2, 2]), ((2, 64, 5000), [2, 5, 2]), ((5, 6, 3), [1]), ((2, 4, 6), []),
]  # fmt: skip
every_case = pytest.mark.parametrize(("shape", "pieces"), CASES, ids=str)
needs_kernel = pytest.mark.skipif(native.library() is None, reason="no compiled kernel")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_one_level_is_the_best_rank_one_of_each_pair(dtype):
    values = noise(3, 8, 10, dtype=dtype)
    (u,), right = reference(values, [2])
    for a in range(3):
        for t in range(2):
            for k in range(4):
                block = values[a, [k, k + 4], 5 * t : 5 * t + 5]
                _, sigma, _ = torch.linalg.svd(block)
                left = u[a, :, t, k]
                assert float(left.abs().square().sum()) == pytest.approx(1, abs=1e-14)
                dropped = block - left[:, None] * right[2 * a + t, k]
                assert float(dropped.norm()) == pytest.approx(float(sigma[1]), rel=1e-12)


@needs_kernel
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("instructions", range(native.level() + 1))
def test_the_kernel_agrees_with_the_reference(shape, pieces, dtype, instructions):
    """Rows scaled apart, so that no two singular values are close and the vectors are sure."""
    values = noise(*shape, seed=1, dtype=dtype) * torch.logspace(0, -3, shape[1], dtype=torch.float64)[:, None]
    values[:, : shape[1] // 2] *= 30
    vectors, right = native.pair_splits(values, pieces, instructions=instructions)
    wanted, rest = reference(values, pieces)
    assert [tuple(u.shape) for u in vectors] == [tuple(u.shape) for u in wanted]
    for found, expected in zip([*vectors, right], [*wanted, rest]):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_the_work_and_the_result_stays(threads):
    values = noise(2, 256, 512, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        vectors, right = native.pair_splits(values, [2] * 6)
    finally:
        torch.set_num_threads(before)
    energy = float(right.square().sum())
    wanted, rest = reference(values, [2] * 6)
    assert energy == pytest.approx(float(rest.square().sum()), rel=1e-6)
    assert all(u.shape == w.shape for u, w in zip(vectors, wanted))
    torch.testing.assert_close(vectors[0], wanted[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_zeros_and_ties_have_unit_vectors(dtype):
    for values in (
        torch.zeros(1, 4, 4, dtype=dtype),
        torch.eye(4, dtype=dtype)[None],
        torch.ones(1, 4, 4, dtype=dtype),
    ):
        for split in (reference, native.pair_splits) if native.library() else (reference,):
            vectors, right = split(values, [2, 2])
            for u in vectors:
                norms = u.abs().square().sum(1)
                torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-14)
            assert bool(torch.isfinite(torch.view_as_real(right) if right.is_complex() else right).all())


@needs_kernel
def test_what_the_kernel_cannot_read_is_refused():
    for values, pieces in (
        (torch.zeros(1, 6, 4), [2]),
        (torch.zeros(1, 6, 4, dtype=torch.float64), [2, 2]),
        (torch.zeros(1, 4, 6, dtype=torch.float64), [4]),
        (torch.zeros(1, 4, 4, dtype=torch.float64).mT[:, ::2], [2]),
        (torch.zeros(1, 4, 4, dtype=torch.complex128).conj(), [2]),
    ):
        message = rf"m divisible by 2\^{len(pieces)} and c by {math.prod(pieces)}, got \(1, .*{values.dtype}"
        with pytest.raises(ValueError, match=message):
            native.pair_splits(values, pieces)


def test_a_missing_kernel_is_said_and_described(monkeypatch, caplog):
    assert examined()["factorization kernel"] == native.describe()
    monkeypatch.setattr(compiled.machinery, "EXTENSION_SUFFIXES", [".nowhere"])
    native.library.cache_clear()
    try:
        assert not native.available(torch.zeros(1, dtype=torch.float64))
        assert native.describe() == "none (torch's own operations)"
        assert "no compiled kernel was found" in caplog.text
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


PROGRAM = """
#define INSTRUCTIONS here
#include "splits.h"
#include <stdio.h>
#include <initializer_list>

extern "C" int eke_pair_splits_level(void);
extern "C" int eke_pair_splits(int, const double*, int, i64, i64, i64, i64, const i64*, double* const*, double*, int);

// Buffers of exactly the size needed, so that one number too far is caught.
static double* filled(i64 n) {
  double* p = (double*)malloc(n * sizeof(double));
  for (i64 e = 0; e < n; e++) p[e] = (double)((e * 7919 + 13) % 101) - 50;
  return p;
}

int main() {
  i64 cases = 0;
  for (int level = 0; level <= eke_pair_splits_level(); level++)
    for (int complex = 0; complex < 2; complex++)
      for (i64 many : {1, 3}) for (i64 levels : {1, 2, 5}) for (i64 left : {1, 3}) for (i64 t : {1, 2, 3})
        for (i64 wide : {1, 2, 7, 150}) {
          i64 rows = left << levels, all = 1, pieces[5], n = 1 + complex, a = many, m = rows;
          for (i64 l = 0; l < levels; l++) all *= pieces[l] = t;
          i64 cols = all * wide;
          double *values = filled(many * rows * cols * n), *right = filled(many * all * left * wide * n), *u[5];
          for (i64 l = 0; l < levels; l++) u[l] = filled(a * 2 * t * (m /= 2) * n), a *= t;
          if (eke_pair_splits(level, values, complex, many, rows, cols, levels, pieces, u, right, 2)) return 1;
          double kept = 0, whole = 0;
          for (i64 e = 0; e < many * all * left * wide * n; e++) kept += right[e] * right[e];
          for (i64 e = 0; e < many * rows * cols * n; e++) whole += values[e] * values[e];
          // Each level keeps at least half of the energy.
          if (!(kept <= whole * 1.0001 && kept * (1 << levels) >= whole * 0.9999)) return 2;
          for (i64 l = 0; l < levels; l++) free(u[l]);
          free(values);
          free(right);
          cases++;
        }
  printf("%lld cases\\n", (long long)cases);
  return 0;
}
"""


@pytest.mark.slow
def test_no_access_outside_of_a_buffer(sanitized):
    assert sanitized(PROGRAM, SOURCES, "-fopenmp", units=2) >= 288
