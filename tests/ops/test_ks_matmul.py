"""Kronecker-sparse products agree with the dense matrix, in every pattern, type, layout and instruction set."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eke import ops
from eke.ops.ks_matmul import choose, native, operators, reference

SMALL = list(itertools.product([1, 2, 3, 5], repeat=4))
LARGE = [
    (1, 48, 48, 16), (2, 17, 9, 24), (3, 7, 5, 48), (1, 33, 65, 1), (2, 40, 20, 2), (1, 20, 70, 4), (2, 9, 9, 8),
    (1, 30, 31, 3), (1, 64, 17, 6), (2, 16, 33, 12), (1, 50, 20, 5), (1, 7, 9, 37), (9, 2, 2, 2), (17, 4, 4, 1),
    (5, 8, 8, 1), (4, 16, 16, 1), (3, 12, 12, 1), (6, 4, 4, 4), (7, 1, 8, 1), (4, 1, 1, 16),
    (2, 4, 4, 32), (3, 2, 4, 16), (3, 3, 1, 48), (1, 16, 16, 64),
]  # fmt: skip
LEVELS = range(native.level() + 1)
needs_kernel = pytest.mark.skipif(not native.available(), reason="the native kernel was not compiled")


def dense(blocks):
    """The definition, entry by entry."""
    a, b, c, d = blocks.shape
    matrix = [[0.0] * (a * c * d) for _ in range(a * b * d)]
    entries = blocks.tolist()
    for i, k, m, j in itertools.product(range(a), range(b), range(c), range(d)):
        matrix[i * b * d + k * d + j][i * c * d + m * d + j] = entries[i][k][m][j]
    return torch.tensor(matrix, dtype=torch.float64)


def sample(pattern, batch, dtype=torch.float32, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, _, c, d = pattern
    x = torch.randn(batch, a * c * d, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(pattern, generator=generator, dtype=torch.float64).to(dtype)


def tolerance(pattern, dtype):
    """Sums of c products of normal numbers, rounded once each."""
    return 12 * torch.finfo(dtype).eps * pattern[2] ** 0.5 * 4


@pytest.mark.parametrize("batch", [0, 1, 7, 33])
def test_reference_is_the_dense_matrix(batch):
    for pattern in SMALL:
        x, blocks = sample(pattern, batch, torch.float64)
        matrix = dense(blocks)
        expected = x @ matrix.T
        torch.testing.assert_close(reference.dense(blocks), matrix, rtol=0, atol=0)
        torch.testing.assert_close(ops.ks_matmul(x, blocks), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            ops.ks_matmul_batch_last(x.T.contiguous(), blocks), expected.T, rtol=1e-12, atol=1e-12
        )


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 7, 33])
def test_kernel_agrees_with_the_reference_in_every_pattern(level, batch):
    for pattern in SMALL + LARGE:
        x, blocks = sample(pattern, batch)
        expected = reference.matmul(x.double(), blocks.double())
        bound = tolerance(pattern, torch.float32)
        y = native.forward(x, [blocks], batch_last=False, instructions=level)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=bound)
        y = native.forward(x.T.contiguous(), [blocks], batch_last=True, instructions=level)
        torch.testing.assert_close(y.T.double(), expected, rtol=0, atol=bound)


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
def test_kernel_gradient_agrees_with_the_reference_in_every_pattern(level):
    for pattern in SMALL + LARGE:
        for batch in (1, 33):
            x, _ = sample(pattern, batch)
            g = torch.randn(batch, pattern[0] * pattern[1] * pattern[3], generator=torch.Generator().manual_seed(1))
            expected = reference.gradient(x.double(), g.double(), pattern)
            out = native.gradient(x, g, pattern, batch_last=False, instructions=level)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-5)
            out = native.gradient(x.T.contiguous(), g.T.contiguous(), pattern, batch_last=True, instructions=level)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-5)


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_gradient_of_batches_that_no_cache_holds(level, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for pattern, batch in [
            ((64, 16, 16, 1), 1030),
            ((3, 12, 17, 3), 5001),
            ((1, 9, 40, 16), 1500),
            ((5, 2, 2, 4), 9),
        ]:
            x, _ = sample(pattern, batch)
            g = torch.randn(batch, pattern[0] * pattern[1] * pattern[3], generator=torch.Generator().manual_seed(1))
            expected = reference.gradient(x.double(), g.double(), pattern)
            for last in (False, True):
                tensors = (x.T.contiguous(), g.T.contiguous()) if last else (x, g)
                out = native.gradient(*tensors, pattern, batch_last=last, instructions=level)
                torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5 * batch**0.5)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
def test_transposed_entries_are_read_where_they_are(level):
    for pattern in LARGE:
        a, b, c, d = pattern
        x, blocks = sample((a, c, b, d), 9)
        x = torch.randn(9, a * c * d, generator=torch.Generator().manual_seed(2))
        turned = blocks.transpose(1, 2)
        expected = reference.matmul(x.double(), turned.double())
        for layout in (False, True):
            y = native.forward(x.T.contiguous() if layout else x, [turned], batch_last=layout, instructions=level)
            torch.testing.assert_close((y.T if layout else y).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("pattern", [(1, 5, 7, 1), (2, 3, 4, 5), (6, 8, 8, 1), (1, 16, 16, 12)], ids=str)
def test_every_type_agrees_with_the_reference(pattern, dtype):
    x, blocks = sample(pattern, 20, dtype)
    expected = reference.matmul(x.double(), blocks.double())
    bound = tolerance(pattern, dtype)
    torch.testing.assert_close(ops.ks_matmul(x, blocks).double(), expected, rtol=bound, atol=bound)
    y = ops.ks_matmul_batch_last(x.T.contiguous(), blocks)
    assert y.dtype == dtype
    torch.testing.assert_close(y.T.double(), expected, rtol=bound, atol=bound)


@needs_kernel
@pytest.mark.parametrize("name", list(choose.ALGORITHMS))
def test_every_algorithm_agrees_with_the_reference(name):
    for pattern in [(1, 9, 7, 1), (3, 8, 4, 5), (2, 6, 6, 16)]:
        x, blocks = sample(pattern, 21)
        expected = reference.matmul(x.double(), blocks.double())
        for layout in (False, True):
            y = choose.ALGORITHMS[name](x.T.contiguous() if layout else x, blocks, layout)
            torch.testing.assert_close((y.T if layout else y).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [512, 4001, pytest.param(25000, marks=pytest.mark.slow)])
def test_large_batches(batch):
    for pattern in [(3, 4, 4, 4), (1, 24, 16, 16), (8, 16, 16, 1)]:
        x, blocks = sample(pattern, batch)
        expected = reference.matmul(x.double(), blocks.double())
        torch.testing.assert_close(ops.ks_matmul(x, blocks).double(), expected, rtol=0, atol=1e-4)
        y = ops.ks_matmul_batch_last(x.T.contiguous(), blocks)
        torch.testing.assert_close(y.T.double(), expected, rtol=0, atol=1e-4)


def test_non_contiguous_inputs():
    pattern = (2, 3, 4, 5)
    x, blocks = sample(pattern, 30)
    expected = reference.matmul(x.double(), blocks.double())
    wide = torch.full((30, 60), float("nan"))
    wide[:, 10:50] = x
    every = torch.full((60, 40), float("nan"))
    every[::2] = x
    strided = torch.full((2, 6, 4, 10), float("nan"))[:, ::2, :, ::2]
    strided.copy_(blocks)
    for given in (wide[:, 10:50], every[::2], x.T.contiguous().T, x.as_strided((30, 40), (40, 1))):
        torch.testing.assert_close(ops.ks_matmul(given, strided).double(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(ops.ks_matmul_batch_last(given.T, strided).double().T, expected, rtol=0, atol=1e-4)


def test_leading_dimensions_and_empty_inputs():
    x, blocks = sample((2, 3, 4, 5), 12)
    y = ops.ks_matmul(x, blocks)
    assert torch.equal(ops.ks_matmul(x.reshape(2, 3, 2, 40), blocks), y.reshape(2, 3, 2, 30))
    torch.testing.assert_close(ops.ks_matmul(x[0], blocks), y[0])
    assert ops.ks_matmul(x[:0], blocks).shape == (0, 30)
    assert ops.ks_matmul(x[:0].reshape(2, 0, 40), blocks).shape == (2, 0, 30)
    assert ops.ks_matmul_batch_last(x[:0].T, blocks).shape == (30, 0)
    empty = x[:0].clone().requires_grad_()
    weights = blocks.clone().requires_grad_()
    ops.ks_matmul(empty, weights).sum().backward()
    assert torch.equal(weights.grad, torch.zeros_like(blocks))


def test_known_patterns():
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ops.ks_matmul(x, weight[None, :, :, None]), torch.nn.functional.linear(x, weight))
    scale = torch.randn(12, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ops.ks_matmul(x, scale), x * scale.flatten())
    ones = torch.ones(1, 5, 3, 4)
    torch.testing.assert_close(ops.ks_matmul(x, ones), x @ torch.kron(torch.ones(5, 3), torch.eye(4)).T)


def hadamard_chain(levels):
    core = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return [core[None, :, :, None].expand(2**s, 2, 2, 2 ** (levels - 1 - s)).contiguous() for s in range(levels)]


@pytest.mark.parametrize("levels", [1, 2, 5, 10])
@pytest.mark.parametrize("batch", [1, 300])
def test_hadamard_values_give_the_hadamard_matrix(levels, batch):
    scipy_linalg = pytest.importorskip("scipy.linalg")
    matrix = torch.from_numpy(scipy_linalg.hadamard(2**levels)).float()
    x = torch.randint(-4, 5, (batch, 2**levels), generator=torch.Generator().manual_seed(0)).float()
    # Small integers: every sum is exact in float32.
    assert torch.equal(ops.ks_chain_matmul(x, hadamard_chain(levels)), x @ matrix.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [0, 3, 700])
def test_chain_is_the_product_of_its_factors(dtype, batch):
    shapes = [(1, 4, 6, 12), (2, 9, 9, 4), (4, 6, 5, 3), (12, 5, 7, 1)]
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(s, generator=generator) / s[2] ** 0.5).to(dtype) for s in shapes]
    x = torch.randn(batch, 84, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    expected = x.double()
    for blocks in reversed(factors):
        expected = reference.matmul(expected, blocks.double())
    bound = 60 * torch.finfo(dtype).eps
    for given, activation in itertools.product((None, bias), (None, torch.relu, torch.tanh)):
        y = ops.ks_chain_matmul(x, factors, bias=given, activation=activation)
        wanted = expected if given is None else expected + given.double()
        wanted = wanted if activation is None else activation(wanted)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), wanted, rtol=bound, atol=bound)


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
def test_chain_batch_last_in_the_kernel(level):
    factors = hadamard_chain(6)
    x = torch.randint(-4, 5, (64, 203), generator=torch.Generator().manual_seed(0)).float()
    y = native.forward(x, factors[::-1], batch_last=True, instructions=level)
    expected = x
    for blocks in reversed(factors):
        expected = reference.matmul_batch_last(expected, blocks)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((1, 2, 2, 4), (2, 2, 2, 2)), ((1, 3, 4, 6), (2, 4, 5, 3)),
        ((2, 2, 6, 4), (6, 4, 3, 2)), ((1, 4, 6, 1), (1, 6, 5, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_merged_neighbours_are_their_product(left, right):
    x, y = torch.randn(left, dtype=torch.float64), torch.randn(right, dtype=torch.float64)
    merged = choose.merge(x, y)
    assert merged is not None
    torch.testing.assert_close(dense(merged), dense(x) @ dense(y), rtol=1e-12, atol=1e-12)


def test_neighbours_that_do_not_chain_are_not_merged():
    assert choose.merge(torch.ones(2, 2, 2, 1), torch.ones(1, 2, 2, 2)) is None


def test_small_factors_are_merged_in_pairs():
    factors = [torch.ones(2**s, 2, 2, 3 * 2 ** (3 - s)) for s in range(4)]
    assert [tuple(f.shape) for f in choose.merge_neighbours(factors, 1000)] == [(1, 4, 4, 12), (4, 4, 4, 3)]
    assert len(choose.merge_neighbours(factors, 8)) == 4


def test_butterflies_are_left_to_the_kernel():
    # It takes several of them in one pass, in half of the operations.
    assert len(choose.merge_neighbours(hadamard_chain(10), 1000)) == 10
    assert len(choose.merge_neighbours(hadamard_chain(3), 1000)) == 2  # eight features are too few for it


@pytest.mark.parametrize("function", [ops.ks_matmul, ops.ks_matmul_batch_last])
def test_first_and_second_derivatives(function):
    x, blocks = sample((2, 3, 2, 3), 4, torch.float64)
    x = x if function is ops.ks_matmul else x.T.contiguous()
    x, blocks = x.requires_grad_(), blocks.requires_grad_()
    assert torch.autograd.gradcheck(function, (x, blocks))
    assert torch.autograd.gradgradcheck(function, (x, blocks))


def test_chain_derivatives():
    shapes = [(1, 2, 3, 4), (2, 6, 2, 1)]
    factors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b, *f: ops.ks_chain_matmul(x, f, bias=b), (x, bias, *factors))


@pytest.mark.parametrize("pattern", [(2, 6, 5, 3), (1, 8, 8, 16), (9, 2, 2, 2), (4, 16, 8, 1)], ids=str)
@pytest.mark.parametrize("layout", [False, True])
def test_float32_gradients_agree_with_float64(pattern, layout):
    x, blocks = sample(pattern, 37)
    grads = []
    for dtype in (torch.float32, torch.float64):
        u, w = x.to(dtype, copy=True), blocks.to(dtype, copy=True)
        u = (u.T.contiguous() if layout else u).requires_grad_()
        w.requires_grad_()
        y = (ops.ks_matmul_batch_last if layout else ops.ks_matmul)(u, w)
        (y * y).sum().backward()
        grads.append((u.grad, w.grad))
    for single, double in zip(*grads):
        scale = double.abs().max()
        torch.testing.assert_close(single.double() / scale, double / scale, rtol=0, atol=3e-6)


def test_changes_of_the_entries_in_place_are_seen():
    x, blocks = sample((2, 8, 8, 2), 64)
    weight = torch.nn.Parameter(blocks.clone())
    with torch.no_grad():
        before = ops.ks_matmul(x, weight)
        weight.mul_(2)
        assert torch.equal(ops.ks_matmul(x, weight), 2 * before)
        weight.data.mul_(2)
        assert torch.equal(ops.ks_matmul(x, weight), 4 * before)


def test_operators_pass_torch_checks():
    x, blocks = sample((2, 3, 4, 5), 6)
    x.requires_grad_()
    blocks.requires_grad_()
    for layout in (False, True):
        given = x.detach().T.contiguous().requires_grad_() if layout else x
        torch.library.opcheck(torch.ops.eke.ks_matmul, (given, blocks, layout))
        grad = torch.randn(30, 6) if layout else torch.randn(6, 30)
        torch.library.opcheck(torch.ops.eke.ks_matmul_gradient, (given.detach(), grad, [2, 3, 4, 5], layout))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.eke.ks_chain_matmul, (x.detach(), [blocks.detach()], None, True))
    with pytest.raises(RuntimeError, match=r"has no derivative .*\(6, 30\).*factor by factor"):
        torch.ops.eke.ks_chain_matmul(x, [blocks], None, False).sum().backward()


def test_compile_and_export_in_one_graph():
    x, blocks = sample((2, 8, 8, 4), 6)
    chain = hadamard_chain(6)

    def function(x, blocks):
        return ops.ks_chain_matmul(torch.relu(ops.ks_matmul(x, blocks)), chain, activation=torch.relu)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, blocks), function(x, blocks))
    weight = blocks.clone().requires_grad_()
    compiled(x, weight).square().sum().backward()
    expected = blocks.clone().requires_grad_()
    function(x, expected).square().sum().backward()
    torch.testing.assert_close(weight.grad, expected.grad)

    class Layer(torch.nn.Module):
        def forward(self, x, blocks):
            return ops.ks_matmul(x, blocks)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Layer(), (x, blocks), dynamic_shapes={"x": {0: batch}, "blocks": None})
    longer, _ = sample((2, 8, 8, 4), 11)
    torch.testing.assert_close(program.module()(longer, blocks), ops.ks_matmul(longer, blocks))


def test_flops_are_counted():
    x, blocks = sample((2, 3, 4, 5), 6)
    with FlopCounterMode(display=False) as counter:
        ops.ks_matmul(x, blocks)
        ops.ks_chain_matmul(x, [blocks])
    assert counter.get_total_flops() == 2 * 2 * 6 * 120
    weight = blocks.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ops.ks_matmul(x.clone().requires_grad_(), weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 120


def test_autocast_casts_both():
    x, blocks = sample((2, 3, 4, 5), 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.ks_matmul(x, blocks).dtype == torch.bfloat16
        assert ops.ks_chain_matmul(x, [blocks], bias=torch.ones(30)).dtype == torch.bfloat16


def test_choice_is_measured_on_demand_and_kept(monkeypatch):
    asked = []

    def measure(*case, **layout):
        asked.append((case, layout))
        return "bmm"

    monkeypatch.setattr(choose, "_MEASURED", {})
    monkeypatch.setattr(choose, "_measure", measure)
    pattern = (2, 4, 4, 3)
    before = ops.choose_algorithm(pattern, 11, torch.float32)
    assert before != "bmm"
    assert ops.choose_algorithm(pattern, 11, torch.float32, measure=True) == "bmm"
    assert asked == [((pattern, 11, torch.float32), {"batch_last": False})]
    assert ops.choose_algorithm(pattern, 11, torch.float32) == "bmm"
    assert len(asked) == 1
    for other in (
        ops.choose_algorithm(pattern, 12, torch.float32),
        ops.choose_algorithm(pattern, 11, torch.float32, batch_last=True),
        ops.choose_algorithm((2, 4, 4, 5), 11, torch.float32),
    ):
        assert other == before


def test_measuring_takes_the_fastest(monkeypatch):
    seconds = iter([4.0, 3.0, 1.0, 2.0] * 3 if native.available() else [4.0, 1.0, 3.0] * 3)
    monkeypatch.setattr(choose, "seconds_of", lambda run, repeats: next(seconds))
    names = list(choose.ALGORITHMS) if native.available() else list(choose.ALGORITHMS)[1:]
    fastest = names[2] if native.available() else names[1]
    assert choose._measure((2, 4, 4, 2), 5, torch.float32, batch_last=False) == fastest


def test_choice_without_the_kernel(monkeypatch):
    monkeypatch.setattr(native, "level", lambda: -1)
    assert ops.choose_algorithm((1, 4, 4, 1), 8, torch.float32) == "dense"
    assert ops.choose_algorithm((2, 4, 4, 3), 8, torch.float32) == "einsum"
    for pattern in [(1, 4, 5, 1), (2, 4, 4, 3)]:
        x, blocks = sample(pattern, 8)
        wanted = x.double() @ dense(blocks).T
        for _ in range(3):  # nothing is kept
            torch.testing.assert_close(ops.ks_matmul(x, blocks).double(), wanted, rtol=0, atol=1e-5)
            y = ops.ks_matmul_batch_last(x.T.contiguous(), blocks)
            torch.testing.assert_close(y.double(), wanted.T, rtol=0, atol=1e-5)
            y = ops.ks_chain_matmul(x, [blocks], activation=torch.relu)
            torch.testing.assert_close(y.double(), wanted.relu(), rtol=0, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", [False, True])
def test_nothing_is_written_outside_the_output(level, layout):
    """Inputs lie between values that are no numbers; the output lies between values that must stay."""
    for pattern in LARGE + SMALL[::7]:
        a, b, _, d = pattern
        for batch in (1, 5, 18):
            x, blocks = sample(pattern, batch)
            rows, width = (a * b * d, batch) if layout else (batch, a * b * d)
            given = x.T if layout else x
            framed = torch.full((given.shape[0] + 2, given.shape[1] + 34), float("nan"))
            framed[1:-1, 17:-17] = given
            entries = torch.full((blocks.numel() + 34,), float("nan"))
            entries[17:-17] = blocks.flatten()
            out = torch.full((rows + 2, width + 34), 7.0)
            inner = entries[17:-17].view(pattern)
            record = native._RECORD.pack(*inner.shape, *inner.stride(), inner.data_ptr())
            view, target = framed[1:-1, 17:-17], out[1:-1, 17:-17]
            status = native.library().eke_ks_forward(
                level, 1, int(layout), 0, batch, view.data_ptr(), view.stride(0), target.data_ptr(), target.stride(0),
                1, record, None, 0,
            )  # fmt: skip
            assert status == 0
            expected = reference.matmul(x.double(), blocks.double())
            torch.testing.assert_close((target.T if layout else target).double(), expected, rtol=0, atol=2e-4)
            target.fill_(7.0)
            assert bool((out == 7.0).all())


@needs_kernel
@pytest.mark.parametrize("layout", [False, True])
def test_threads_change_nothing(layout):
    threads = torch.get_num_threads()
    try:
        for pattern in [(1, 64, 64, 16), (5, 40, 24, 3), (64, 4, 4, 4), (2, 4, 4, 64), (1, 40, 30, 1), (7, 9, 11, 1)]:
            batch = 4_000_000 // math.prod(pattern) + 100
            assert batch * math.prod(pattern) > 2_000_000  # from there on the library uses threads
            x, blocks = sample(pattern, batch)
            a, b, _, d = pattern
            g = torch.randn(batch, a * b * d, generator=torch.Generator().manual_seed(3))
            x, g = (x.T.contiguous(), g.T.contiguous()) if layout else (x, g)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                y = native.forward(x, [blocks], batch_last=layout)
                results.append((y, native.gradient(x, g, pattern, batch_last=layout)))
            for y, gradient in results[1:]:
                torch.testing.assert_close(y, results[0][0], rtol=1e-5, atol=1e-4)
                # Sums of so many products of normal numbers.
                torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-5 * batch**0.5)
    finally:
        torch.set_num_threads(threads)


def test_errors_say_what_was_given():
    x, blocks = sample((2, 3, 4, 5), 6)
    with pytest.raises(ValueError, match=r"needs x of shape \(\.\.\., a\*c\*d\) with a\*c\*d = 40.*got \(6, 39\)"):
        ops.ks_matmul(x[:, :-1], blocks)
    with pytest.raises(ValueError, match=r"needs x of shape \(a\*c\*d, batch\).*got \(6, 40\)"):
        ops.ks_matmul_batch_last(x, blocks)
    with pytest.raises(ValueError, match=r"needs blocks of shape \(a, b, c, d\).*got \(3, 4, 5\)"):
        ops.ks_matmul(x, blocks[0])
    with pytest.raises(ValueError, match=r"positive entries, got \(0, 3, 4, 5\)"):
        ops.ks_matmul(x, blocks[:0])
    with pytest.raises(ValueError, match=r"one floating-point type.*torch.float32 and torch.float64"):
        ops.ks_matmul(x, blocks.double())
    with pytest.raises(ValueError, match=r"one floating-point type.*torch.int64"):
        ops.ks_matmul(x.long(), blocks.long())
    with pytest.raises(ValueError, match=r"on one device, got cpu and meta"):
        ops.ks_matmul(x, blocks.to("meta"))


def test_chain_errors_name_the_factors():
    x, blocks = sample((2, 3, 4, 5), 6)
    with pytest.raises(ValueError, match="at least one factor, got an empty list"):
        ops.ks_chain_matmul(x, [])
    with pytest.raises(ValueError, match=r"Factor 0 takes 40 features, factor 1 gives 30: \(2, 3, 4, 5\) and"):
        ops.ks_chain_matmul(x, [blocks, blocks])
    with pytest.raises(ValueError, match=r"got \(3, 4, 5\), torch.float32 and cpu at factor 0"):
        ops.ks_chain_matmul(x, [blocks[0]])
    with pytest.raises(ValueError, match=r"bias of shape \(30,\) on cpu, got \(31,\) on cpu"):
        ops.ks_chain_matmul(x, [blocks], bias=torch.ones(31))


def test_watched_calls_take_the_operator():
    x, blocks = sample((2, 3, 4, 5), 6)
    assert operators._direct(x, blocks)
    assert not operators._direct(x, blocks.requires_grad_())
    with torch.no_grad():
        assert operators._direct(x, blocks)
    with FlopCounterMode(display=False):
        assert not operators._direct(x, x)
