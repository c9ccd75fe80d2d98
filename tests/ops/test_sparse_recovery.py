"""Sparse recovery: the kernel against torch on every instruction set, exactness, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eke.ops import sparse_recovery as op
from eke.ops.sparse_recovery import native

LEVELS = list(range(native.level() + 1))
needs_kernel = pytest.mark.skipif(not LEVELS, reason="the kernel was not compiled")


def problem(m, n, density, *, batch=30, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.pinv(a)
    x = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    x *= torch.rand(batch, n, generator=generator) < density
    rank = min(m, n)
    rules = op.Rules(density=min(0.15, 0.5 * m / n))
    return op.Range((inverse @ a).to(dtype), rank, rules), (x @ (inverse @ a).T).to(dtype), x


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(40, 80), (33, 67), (64, 128), (5, 7), (1, 3), (30, 129), (100, 300)])
def test_the_kernel_does_what_the_reference_says(size, dtype, level):
    space, y, _ = problem(*size, 0.08, dtype=dtype)
    x, found, steps = op.reference(space, y, iterations=30)
    ours, proved, taken = op.sparse_recovery(op.Plan(space), y, iterations=30, instructions=level)
    # single precision guides the kernel, so that a decision on the edge may fall otherwise
    same = found == proved
    assert float(same.double().mean()) >= 0.95
    assert int(((steps - taken).abs() <= 1).sum()) >= int(0.9 * len(y))
    both = found & proved
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(ours[both], x[both], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_answers_are_exact_where_nonzeros_are_few(dtype):
    space, y, x = problem(100, 200, 0.1, dtype=dtype, batch=50)
    for ours, proved, _ in (
        op.sparse_recovery(op.Plan(space), y, iterations=40) if LEVELS else op.reference(space, y, iterations=40),
        op.reference(space, y, iterations=40),
    ):
        assert bool(proved.all())
        torch.testing.assert_close(ours.double(), x, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-11)
        assert int((ours != 0).sum()) <= int((x != 0).sum())


@needs_kernel
def test_what_is_not_sparse_is_not_proved():
    space, y, x = problem(40, 80, 1.0)
    ours, proved, steps = op.sparse_recovery(op.Plan(space), y, iterations=25)
    assert not bool(proved.any())
    assert bool(torch.isfinite(ours).all())
    assert bool((steps == 25).all())
    assert float((ours - x).norm()) > 0.1 * float(x.norm())


@needs_kernel
@pytest.mark.parametrize("size", [1e-200, 1e-12, 1e12, 1e200])
def test_the_unit_of_b_does_not_matter(size):
    space, y, _ = problem(40, 80, 0.08)
    plan = op.Plan(space)
    one, sure, steps = op.sparse_recovery(plan, y, iterations=30)
    ours, proved, taken = op.sparse_recovery(plan, y * size, iterations=30)
    assert bool((sure == proved).all())
    assert bool((steps == taken).all())
    torch.testing.assert_close(ours / size, one, rtol=1e-9, atol=1e-9)
    assert bool(proved.double().mean() > 0.9)


@needs_kernel
@pytest.mark.parametrize("size", [0.0, 1e-310, 1e305, float("nan"), float("inf")])
def test_zeros_are_answered_and_what_cannot_be_scaled_is_not(size):
    space, y, _ = problem(40, 80, 0.08, batch=3)
    y[1] = y[1] * size
    ours, proved, steps = op.sparse_recovery(op.Plan(space), y, iterations=30)
    assert proved.tolist() == [True, size == 0, True]
    assert bool((ours[1] == 0).all())
    assert int(steps[1]) == 0


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_samples(threads):
    before = torch.get_num_threads()
    space, y, x = problem(40, 80, 0.08, batch=64)
    try:
        torch.set_num_threads(threads)
        ours, proved, _ = op.sparse_recovery(op.Plan(space), y, iterations=30)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(ours[proved], x[proved], rtol=0, atol=1e-11)
    assert float(proved.double().mean()) > 0.9


def test_columns_that_repeat_are_left_to_others():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(20, 20, generator=generator, dtype=torch.float64).repeat(1, 2)
    inverse = torch.linalg.pinv(a)
    twice = op.Range(inverse @ a, 20)
    x = torch.zeros(4, 40, dtype=torch.float64)
    x[:, 3] = 1
    for ours, proved, _ in [op.reference(twice, x @ twice.projection, iterations=30)] + [
        op.sparse_recovery(op.Plan(twice), x @ twice.projection, iterations=30, instructions=level) for level in LEVELS
    ]:
        assert not bool((proved & ((ours @ twice.projection - x @ twice.projection).norm(dim=1) > 1e-9)).any())
        assert bool(torch.isfinite(ours).all())


def test_full_column_rank_needs_no_search():
    space, y, x = problem(60, 40, 0.2)
    assert float((space.projection - torch.eye(40, dtype=torch.float64)).abs().max()) < 1e-10
    ours, proved, _ = op.reference(space, y, iterations=5)
    assert bool(proved.all())
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)
    for level in LEVELS:
        ours, proved, _ = op.sparse_recovery(op.Plan(space), y, iterations=5, instructions=level)
        assert bool(proved.all())
        torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)


def test_starts_near_the_answer_are_shorter():
    space, y, x = problem(100, 200, 0.1, batch=20)
    cold, warm = op.begin(space, y), op.begin(space, y, x + 1e-3 * torch.randn(x.shape, dtype=x.dtype))
    for _ in range(3):
        cold, warm = op.advance(space, y, cold), op.advance(space, y, warm)
    assert int(warm.found.sum()) > int(cold.found.sum())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y: y[:, :3], r"needs y \(batch, 80\) of torch.float64 on the CPU, got \(30, 3\)"),
        (lambda y: y[0], r"got \(80,\)"),
        (lambda y: y.float(), "torch.float32"),
    ],
)
@needs_kernel
def test_wrong_calls_are_refused(change, says):
    space, y, _ = problem(40, 80, 0.08)
    with pytest.raises(ValueError, match=says):
        op.sparse_recovery(op.Plan(space), change(y), iterations=3)


def test_plans_need_a_real_matrix():
    space, _, _ = problem(40, 80, 0.08)
    for other in (space.projection[:3], space.projection.to(torch.complex128), space.projection[None]):
        with pytest.raises(ValueError, match=r"needs a projection \(n, n\) of float32 or float64 on the CPU, got"):
            op.Plan(replace(space, projection=other))


@needs_kernel
def test_without_the_library_torch_does_it(monkeypatch):
    space, y, _ = problem(40, 80, 0.08, batch=5)
    plan = op.Plan(space)
    monkeypatch.setattr(native, "library", lambda: None)
    assert native.level() == -1
    assert op.describe() == "none (torch's own operations)"
    assert not op.available(y)
    ours, proved, _ = op.sparse_recovery(plan, y, iterations=30)
    x, found, _ = op.reference(space, y, iterations=30)
    torch.testing.assert_close(ours, x)
    assert bool((proved == found).all())


PROGRAM = """
#include <initializer_list>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef int64_t i64;
extern "C" int eke_sparse_recovery_level(void);
extern "C" int eke_sparse_recovery(int, int, const i64*, const double*, const float*, const void*, i64, const void*,
                                   void*, i64*, unsigned char*, int);

static unsigned seed = 1;
static double draw(void) { seed = seed * 1664525u + 1013904223u; return (seed >> 8) / 16777216.0 - 0.5; }

// P = U U^T with orthonormal U (n, rank), in buffers of exactly the size needed.
template <typename T> int check(int level, i64 n, i64 rank, i64 batch, int nonzeros) {
  const i64 stride = (n + 15) / 16 * 16;
  double* u = (double*)malloc(sizeof(double) * n * rank);
  for (i64 k = 0; k < rank; k++) {
    for (i64 i = 0; i < n; i++) u[k * n + i] = draw();
    for (int twice = 0; twice < 2; twice++)
      for (i64 q = 0; q < k; q++) {
        double f = 0;
        for (i64 i = 0; i < n; i++) f += u[k * n + i] * u[q * n + i];
        for (i64 i = 0; i < n; i++) u[k * n + i] -= f * u[q * n + i];
      }
    double size = 0;
    for (i64 i = 0; i < n; i++) size += u[k * n + i] * u[k * n + i];
    for (i64 i = 0; i < n; i++) u[k * n + i] /= sqrt(size);
  }
  float* guiding = (float*)calloc(n * stride, sizeof(float));
  T *exact = (T*)calloc(n * stride, sizeof(T)), *y = (T*)calloc(batch * n, sizeof(T));
  T *x = (T*)malloc(sizeof(T) * batch * n), *truth = (T*)calloc(batch * n, sizeof(T));
  for (i64 i = 0; i < n; i++) for (i64 j = 0; j < n; j++) {
    double p = 0;
    for (i64 k = 0; k < rank; k++) p += u[k * n + i] * u[k * n + j];
    exact[i * stride + j] = (T)p;
    guiding[i * stride + j] = (float)p;
  }
  for (i64 s = 0; s < batch; s++) for (int k = 0; k < nonzeros; k++) {
    i64 j = (i64)((draw() + 0.5) * n);
    double value = draw() + 1;
    truth[s * n + j] += (T)value;
    for (i64 i = 0; i < n; i++) y[s * n + i] += (T)value * exact[j * stride + i];
  }
  i64 most = 3 * rank / 4 ? 3 * rank / 4 : 1, sizes[5] = {n, stride, rank, 30, most < n ? most : n};
  double numbers[6] = {0.1, 1, 1, 200 * (sizeof(T) == 4 ? 1.2e-7 : 2.2e-16), 1e-4, 10};
  i64* steps = (i64*)malloc(sizeof(i64) * batch);
  unsigned char* found = (unsigned char*)malloc(batch);
  const int wide = sizeof(T) == 8;
  if (eke_sparse_recovery(level, wide, sizes, numbers, guiding, exact, batch, y, x, steps, found, 2)) return -1;
  int right = 0;
  for (i64 s = 0; s < batch; s++) {
    double off = 0;
    for (i64 i = 0; i < n; i++) off += fabs((double)x[s * n + i] - truth[s * n + i]);
    right += found[s] && off < 1e-2;
  }
  free(u); free(guiding); free(exact); free(y); free(x); free(truth); free(steps); free(found);
  return right;
}

int main() {
  int cases = 0, right = 0, of = 0;
  for (int level = 0; level <= eke_sparse_recovery_level(); level++)
    for (i64 n : {1, 2, 5, 16, 17, 40, 63, 129}) for (i64 rank : {1, 2, 8, 20}) for (int nonzeros : {0, 1, 2, 9}) {
      if (rank > n) continue;
      int a = check<float>(level, n, rank, 5, nonzeros), b = check<double>(level, n, rank, 5, nonzeros);
      if (a < 0 || b < 0) return 1;
      if (rank == 20 && nonzeros < 3) right += a + b, of += 10;
      cases += 2;
    }
  if (right < 0.95 * of) return 2;
  printf("%d cases\\n", cases);
  return 0;
}
"""


@pytest.mark.slow
def test_no_access_outside_of_a_buffer(sanitized):
    assert sanitized(PROGRAM, Path(native.__file__).parent, "-fopenmp", units=3) >= 192
