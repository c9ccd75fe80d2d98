"""Sparse products agree with the dense matrix, in every layout, type, size and instruction set."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eke import ops
from eke.ops.sparse_matmul import describe, native, reference

LEVELS = range(native.level() + 1)
SHAPES = [(1, 1), (3, 5), (17, 33), (64, 40), (40, 129), (100, 7)]
needs_kernel = pytest.mark.skipif(not native.available(), reason="the native kernel was not compiled")


def sample(rows, inputs, *, density=0.3, block=1, dtype=torch.float32, seed=0):
    """A matrix with whole groups of rows on the same columns, one group without any, and its packed form."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-rows // block)
    keep = torch.rand(groups, inputs, generator=generator) < density
    if groups > 2:
        keep[1] = False
        keep[2] = True
    whole = torch.randn(groups, block, inputs, generator=generator, dtype=torch.float64).to(dtype) * keep[:, None]
    values = torch.cat([whole[g][:, keep[g]].T for g in range(groups)])
    columns = torch.cat([keep[g].nonzero()[:, 0] for g in range(groups)]).int()
    starts = torch.tensor([0, *keep.sum(1).cumsum(0).tolist()])
    return whole.reshape(groups * block, inputs), values.contiguous(), columns, starts


def noise(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 8])
def test_reference_is_the_dense_matrix(block):
    for rows, inputs in SHAPES:
        whole, values, columns, starts = sample(rows, inputs, block=block, dtype=torch.float64)
        assert torch.equal(reference.dense(values, columns, starts, inputs=inputs), whole)


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("block", native.BLOCKS)
def test_kernel_agrees_with_the_dense_matrix_in_every_size(level, block):
    for (rows, inputs), batch in itertools.product(SHAPES, (1, 2, 7, 16, 33, 150)):
        whole, values, columns, starts = sample(rows, inputs, block=block)
        x, bias = noise(batch, inputs), noise(len(whole), seed=2)
        grad = noise(batch, len(whole), seed=3)
        # Sums of at most `inputs` or `batch` products of normal numbers, rounded once each.
        bound = 40 * torch.finfo(torch.float32).eps * max(inputs, batch, rows) ** 0.5
        for given in (None, bias):
            y = native.forward(x, values, columns, starts, bias=given, instructions=level)
            wanted = x.double() @ whole.double().T + (0 if given is None else given.double())
            torch.testing.assert_close(y.double(), wanted, rtol=0, atol=bound)
        back = native.to_inputs(grad, values, columns, starts, inputs, instructions=level)
        torch.testing.assert_close(back.double(), grad.double() @ whole.double(), rtol=0, atol=bound)
        found = native.to_values(x, grad, columns, starts, block, instructions=level)
        wanted = reference.to_values(x.double(), grad.double(), columns, starts, block)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["ascending", "any"])
def test_panels_of_columns_change_nothing(level, order):
    """Enough inputs and entries for several panels; entries in any order are taken by the last one."""
    whole, values, columns, starts = sample(19, 2100, density=0.5)
    if order == "any":
        for a, b in itertools.pairwise(starts.tolist()):
            turn = a + torch.randperm(b - a, generator=torch.Generator().manual_seed(b))
            values[a:b], columns[a:b] = values[turn], columns[turn]
    x = noise(70, 2100)
    y = native.forward(x, values, columns, starts, instructions=level)
    torch.testing.assert_close(y.double(), x.double() @ whole.double().T, rtol=0, atol=1e-3)


@needs_kernel
def test_threads_share_the_work_and_the_result_stays():
    whole, values, columns, starts = sample(300, 500)
    before = torch.get_num_threads()
    try:
        for batch in (1, 40, 700):
            x, found = noise(batch, 500), []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append((
                    native.forward(x, values, columns, starts),
                    native.to_inputs(x[:, :300].contiguous(), values, columns, starts, 500),
                    native.to_values(x, x[:, :300].contiguous(), columns, starts, 1),
                ))
            assert all(torch.equal(a, b) for a, b in zip(*found))
            torch.testing.assert_close(found[1][0].double(), x.double() @ whole.double().T, rtol=0, atol=1e-3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 3, 4])
def test_every_type_and_block(dtype, block):
    whole, values, columns, starts = sample(24, 30, block=block, dtype=dtype)
    x = noise(5, 30, dtype=dtype)
    y = ops.sparse_matmul(x, values, columns, starts)
    assert y.dtype == dtype
    wanted = x.double() @ whole.double().T
    bound = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=bound, atol=bound * float(wanted.abs().max()))


def test_constant_fan_in_needs_no_starts():
    generator = torch.Generator().manual_seed(0)
    columns = torch.stack([torch.randperm(50, generator=generator)[:6] for _ in range(20)]).int()
    values = noise(20, 6)
    whole = torch.zeros(20, 50).scatter_(1, columns.long(), values)
    x = noise(9, 50, seed=4)
    torch.testing.assert_close(ops.sparse_matmul(x, values, columns), x @ whole.T, rtol=0, atol=1e-5)
    assert torch.equal(ops.sparse_matmul(x, values[:, :0], columns[:, :0]), torch.zeros(9, 20))


def test_columns_named_twice_are_added():
    values, columns = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, 0]).int()
    y = ops.sparse_matmul(torch.tensor([[10.0, 1.0]]), values, columns, torch.tensor([0, 2, 3]))
    assert y.tolist() == [[3.0, 40.0]]


def test_non_contiguous_and_empty_inputs():
    whole, values, columns, starts = sample(17, 33)
    x, bias = noise(30, 33), noise(17, seed=5)
    wanted = x @ whole.T + bias
    wide = torch.full((30, 60), float("nan"))
    wide[:, 10:43] = x
    every = torch.full((60, 33), float("nan"))
    every[::2] = x
    strided = torch.stack([values, values], 1)[:, 0]
    for given in (wide[:, 10:43], every[::2], x.T.contiguous().T):
        found = ops.sparse_matmul(given, strided.squeeze(1), columns, starts, bias=bias)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    row = x[:1].expand(4, 33)
    torch.testing.assert_close(ops.sparse_matmul(row, values, columns, starts), (row @ whole.T), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        ops.sparse_matmul(x.reshape(2, 3, 5, 33), values, columns, starts, bias=bias).reshape(30, 17), wanted,
        rtol=0, atol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(ops.sparse_matmul(x[0], values, columns, starts, bias=bias), wanted[0])
    assert ops.sparse_matmul(x[:0], values, columns, starts).shape == (0, 17)
    assert ops.sparse_matmul(x[:0].reshape(2, 0, 33), values, columns, starts).shape == (2, 0, 17)
    assert ops.sparse_matmul(x, values[:0], columns[:0], starts[:1]).shape == (30, 0)
    nothing = ops.sparse_matmul(x, values[:0], columns[:0], torch.zeros(18, dtype=torch.int64), bias=bias)
    assert torch.equal(nothing, bias.expand(30, 17))
    kept = values.clone().requires_grad_()
    ops.sparse_matmul(x[:0], kept, columns, starts).sum().backward()
    assert torch.equal(kept.grad, torch.zeros_like(values))


@pytest.mark.parametrize("block", [1, 2])
def test_first_and_second_derivatives(block):
    _, values, columns, starts = sample(6, 5, block=block, dtype=torch.float64)
    x, bias = noise(3, 5, dtype=torch.float64).requires_grad_(), noise(6, dtype=torch.float64).requires_grad_()
    values.requires_grad_()

    def product(x, values, bias):
        return ops.sparse_matmul(x, values, columns, starts, bias=bias)

    assert torch.autograd.gradcheck(product, (x, values, bias))
    assert torch.autograd.gradgradcheck(product, (x, values, bias))


@pytest.mark.parametrize("block", native.BLOCKS)
def test_float32_gradients_agree_with_float64(block):
    _, values, columns, starts = sample(40, 60, block=block)
    found = []
    for dtype in (torch.float32, torch.float64):
        x, v = (t.to(dtype, copy=True).requires_grad_() for t in (noise(37, 60), values))
        ops.sparse_matmul(x, v, columns, starts).square().sum().backward()
        found.append((x.grad, v.grad))
    for single, double in zip(*found):
        scale = double.abs().max()
        torch.testing.assert_close(single.double() / scale, double / scale, rtol=0, atol=3e-6)


def test_functions_of_torch_func_and_forward_derivatives():
    whole, values, columns, starts = sample(9, 7, dtype=torch.float64)
    x = noise(4, 7, dtype=torch.float64)

    def energy(values):
        return ops.sparse_matmul(x, values, columns, starts).square().sum()

    (wanted,) = torch.autograd.grad(energy(values.requires_grad_()), values)
    torch.testing.assert_close(torch.func.grad(energy)(values.detach()), wanted)
    _, along = torch.func.jvp(lambda x: ops.sparse_matmul(x, values.detach(), columns, starts), (x,), (x,))
    torch.testing.assert_close(along, x @ whole.T)


def test_operators_pass_torch_checks():
    _, values, columns, starts = sample(12, 10, block=2)
    x, bias, grad = noise(6, 10).requires_grad_(), noise(12).requires_grad_(), noise(6, 12).requires_grad_()
    values.requires_grad_()
    torch.library.opcheck(torch.ops.eke.sparse_matmul, (x, values, columns, starts, bias))
    torch.library.opcheck(torch.ops.eke.sparse_matmul_inputs, (grad, values, columns, starts, 10))
    torch.library.opcheck(torch.ops.eke.sparse_matmul_values, (x, grad, columns, starts, 2))


def test_compile_and_export_in_one_graph():
    _, values, columns, starts = sample(12, 10)

    def function(x, values):
        return torch.relu(ops.sparse_matmul(x, values, columns, starts))

    x = noise(6, 10)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, values), function(x, values))
    here, there = values.clone().requires_grad_(), values.clone().requires_grad_()
    compiled(x, here).square().sum().backward()
    function(x, there).square().sum().backward()
    torch.testing.assert_close(here.grad, there.grad)

    class Layer(torch.nn.Module):
        def forward(self, x, values):
            return ops.sparse_matmul(x, values, columns, starts)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Layer(), (x, values), dynamic_shapes={"x": {0: batch}, "values": None})
    longer = noise(11, 10)
    torch.testing.assert_close(program.module()(longer, values), ops.sparse_matmul(longer, values, columns, starts))


def test_flops_are_those_of_the_kept_entries():
    _, values, columns, starts = sample(12, 10, block=2)
    with FlopCounterMode(display=False) as counter:
        ops.sparse_matmul(noise(6, 10), values, columns, starts)
    assert counter.get_total_flops() == 2 * 6 * values.numel()
    with FlopCounterMode(display=False) as counter:
        x = noise(6, 10).requires_grad_()
        ops.sparse_matmul(x, values.clone().requires_grad_(), columns, starts).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * values.numel()


def test_without_the_kernel_torch_does_the_work(monkeypatch):
    whole, values, columns, starts = sample(12, 10)
    monkeypatch.setattr(native, "level", lambda: -1)
    x = noise(6, 10)
    torch.testing.assert_close(ops.sparse_matmul(x, values, columns, starts), x @ whole.T, rtol=0, atol=1e-5)
    assert describe() == "none (torch's own operations)"


def test_what_does_not_fit_is_refused():
    _, values, columns, starts = sample(12, 10)
    x = noise(6, 10)
    with pytest.raises(ValueError, match=r"without starts needs values and columns of one shape .*\(\d+, 1\)"):
        ops.sparse_matmul(x, values, columns)
    with pytest.raises(ValueError, match=r"values \(entries,\) or \(entries, r\) and columns \(entries,\), got"):
        ops.sparse_matmul(x, values[1:], columns, starts)
    with pytest.raises(ValueError, match=r"columns of int32, got \(13,\) of torch\.int64 and torch\.int64"):
        ops.sparse_matmul(x, values, columns.long(), starts)
    with pytest.raises(ValueError, match=r"one floating-point type .*torch\.float32, torch\.float64"):
        ops.sparse_matmul(x.double(), values, columns, starts)
    with pytest.raises(ValueError, match=r"bias of shape \(12,\), got \(11,\)"):
        ops.sparse_matmul(x, values, columns, starts, bias=torch.ones(11))
    with pytest.raises(ValueError, match=r"x of shape \(\.\.\., inputs\), got \(\)"):
        ops.sparse_matmul(x[0, 0], values, columns, starts)
    with pytest.raises(ValueError, match="all tensors on one device, got cpu, meta"):
        ops.sparse_matmul(x.to("meta"), values, columns, starts)
    for dtype in (torch.float32, torch.float64):
        given, kept = x.to(dtype), values.to(dtype)
        for bad in (-1, 10, 2**31 - 1):
            wrong = columns.clone()
            wrong[4] = bad
            with pytest.raises(ValueError, match=f"columns must be from 0 to 9 for x of 10 features, got.*{bad}"):
                ops.sparse_matmul(given, kept, wrong, starts)
        falling = starts.clone()
        falling[3] = 0
        with pytest.raises(ValueError, match="falling in between"):
            ops.sparse_matmul(given, kept, columns, falling)
        with pytest.raises(ValueError, match=r"starts must rise from 0 or more to at most \d+ entries, got 1 to"):
            ops.sparse_matmul(given, kept, columns, starts + 1)


PROGRAM = """
#include "call.h"
#include <initializer_list>
#include <stdio.h>
#include <stdlib.h>

extern "C" int eke_sparse_level(void);
extern "C" int eke_sparse_forward(int, int, i64, i64, i64, i64, i64, const float*, i64, const float*, const int32_t*,
                                  const i64*, const float*, float*, i64);
extern "C" int eke_sparse_backward(int, int, i64, i64, i64, i64, i64, const float*, i64, const float*, const int32_t*,
                                   const i64*, float*, i64);
extern "C" int eke_sparse_gradient(int, int, i64, i64, i64, i64, i64, const float*, i64, const float*, i64,
                                   const int32_t*, const i64*, float*);

// Buffers of exactly the size needed, so that one float too far is caught.
static float* filled(i64 n, unsigned seed) {
  float* p = (float*)malloc(n * sizeof(float));
  for (i64 e = 0; e < n; e++) { seed = seed * 1664525u + 1013904223u; p[e] = (float)(seed >> 16) / 65536.0f - 0.5f; }
  return p;
}

int main() {
  i64 cases = 0;
  for (int level = 0; level <= eke_sparse_level(); level++)
    for (i64 block : {1, 2, 4}) for (i64 groups : {1, 3, 17, 33}) for (i64 in : {1, 7, 16, 37, 700})
      for (i64 n : {1, 2, 15, 16, 31, 64, 67}) for (int density : {0, 2, 7}) {
        i64 rows = groups * block, entries = 0;
        int32_t* all = (int32_t*)malloc(groups * in * sizeof(int32_t));
        i64* starts = (i64*)malloc((groups + 1) * sizeof(i64));
        for (i64 g = 0; g < groups; g++) {
          starts[g] = entries;
          for (i64 j = 0; j < in; j++) if ((g * 31 + j * 17) % 10 < density) all[entries++] = (int32_t)j;
        }
        starts[groups] = entries;
        int32_t* columns = (int32_t*)malloc(entries * sizeof(int32_t));
        for (i64 e = 0; e < entries; e++) columns[e] = all[e];
        free(all);
        float *x = filled(n * in, 1), *w = filled(entries * block, 2), *y = filled(n * rows, 3);
        float *gx = filled(n * in, 4), *gv = (float*)calloc(entries * block, sizeof(float));
        if (eke_sparse_forward(level, 1, n, in, groups, block, entries, x, in, w, columns, starts, nullptr, y, rows))
          return 1;
        if (eke_sparse_backward(level, 1, n, in, groups, block, entries, y, rows, w, columns, starts, gx, in)) return 1;
        if (eke_sparse_gradient(level, 1, n, in, groups, block, entries, x, in, y, rows, columns, starts, gv)) return 1;
        // <Wx, Wx> = <W^T W x, x> = <w, gradient>.
        double a = 0, b = 0, c = 0;
        for (i64 e = 0; e < n * rows; e++) a += (double)y[e] * y[e];
        for (i64 e = 0; e < n * in; e++) b += (double)x[e] * gx[e];
        for (i64 e = 0; e < entries * block; e++) c += (double)w[e] * gv[e];
        for (double other : {b, c}) if (!(a - other < 1e-3 * (1 + a) && other - a < 1e-3 * (1 + a))) return 2;
        free(columns); free(starts); free(x); free(w); free(y); free(gx); free(gv);
        cases++;
      }
  printf("%lld cases\\n", (long long)cases);
  return 0;
}
"""


@pytest.mark.slow
def test_no_access_outside_of_a_buffer(sanitized):
    assert sanitized(PROGRAM, Path(native.__file__).parent, units=3) == 1260 * len(LEVELS)
