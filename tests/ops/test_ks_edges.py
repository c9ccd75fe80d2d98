"""What reaches native code is checked first, and whatever torch can switch on finds its way around the kernel."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from eke import ops
from eke.cli.doctor import examined
from eke.ops.ks_matmul import choose, native, operators, reference

needs_kernel = pytest.mark.skipif(not native.available(), reason="the native kernel was not compiled")
LAYOUTS = pytest.mark.parametrize("last", [False, True])


def sample(pattern=(2, 3, 4, 5), batch=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    a, _, c, d = pattern
    x = torch.randn(batch, a * c * d, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(pattern, generator=generator, dtype=torch.float64).to(dtype)


def product(x, blocks, last):
    return (ops.ks_matmul_batch_last if last else ops.ks_matmul)(x, blocks)


def right(x, blocks, last):
    return (reference.matmul_batch_last if last else reference.matmul)(x.double(), blocks.double())


def test_a_factor_of_size_zero_inside_a_chain_is_refused():
    x, blocks = sample()
    for shape in [(0, 3, 4, 5), (1, 40, 0, 40), (1, 0, 40, 1)]:
        with pytest.raises(ValueError, match=r"positive entries.*got \(.*0.*at factor 1"):
            ops.ks_chain_matmul(x, [blocks, torch.ones(shape)])


@needs_kernel
def test_native_code_sees_only_what_fits():
    x, blocks = sample()
    with pytest.raises(ValueError, match=r"cannot multiply 40 features: it must be float32, not empty"):
        native.forward(x, [torch.ones(40, 1, 0, 1)], batch_last=False)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\) of torch.float64 cannot multiply 40 features"):
        native.forward(x, [blocks.double()], batch_last=False)
    with pytest.raises(ValueError, match="takes 1 to 64 factors in one call, got 0"):
        native.forward(x, [], batch_last=False)
    with pytest.raises(ValueError, match="takes 1 to 64 factors in one call, got 65"):
        native.forward(x, [torch.ones(40, 1, 1, 1)] * 65, batch_last=False)


@needs_kernel
@LAYOUTS
def test_operators_refuse_other_widths(last):
    x, blocks = sample()
    x, grad = (x.T.contiguous(), torch.ones(30, 6)) if last else (x, torch.ones(6, 30))
    wide = torch.ones((41, 6) if last else (6, 41))
    with pytest.raises(ValueError, match="cannot multiply 41 features"):
        torch.ops.eke.ks_matmul(wide, blocks, last)
    with pytest.raises(ValueError, match=r"gradient for blocks \(2, 3, 4, 5\) needs float32 x .* got"):
        torch.ops.eke.ks_matmul_gradient(wide, grad, [2, 3, 4, 5], last)
    with pytest.raises(ValueError, match=r"gradient for blocks \(2, 3, 4, 5\) needs float32 x"):
        torch.ops.eke.ks_matmul_gradient(x, grad[:-1], [2, 3, 4, 5], last)
    if not last:
        with pytest.raises(ValueError, match="cannot multiply 41 features"):
            torch.ops.eke.ks_chain_matmul(wide, [blocks], None, False)


def test_defaults_of_the_process_do_not_reach_the_measurement():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        choose.rates.cache_clear()
        assert choose.rates(torch.float32, torch.get_num_threads())[0] > 0
        choose.rates.cache_clear()
        with torch.device("meta"):
            assert all(
                rate > 0 for rate in choose.rates(torch.float32, torch.get_num_threads())[: 1 + native.available()]
            )
            # A type of its own, so that nothing is remembered.
            assert ops.choose_algorithm((1, 4, 4, 2), 7, torch.float64, measure=True) != "native"
        choose.rates.cache_clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert choose.rates(torch.float32, torch.get_num_threads())[0] > 0
    finally:
        torch.set_default_dtype(before)
        choose.rates.cache_clear()


@LAYOUTS
def test_forward_derivatives(last):
    x, blocks = sample(dtype=torch.float64)
    x = x.T.contiguous() if last else x
    dx, dw = torch.randn_like(x), torch.randn_like(blocks)
    wanted = right(dx, blocks, last) + right(x, dw, last)
    y, tangent = torch.func.jvp(lambda x, w: product(x, w, last), (x, blocks), (dx, dw))
    torch.testing.assert_close(y, right(x, blocks, last))
    torch.testing.assert_close(tangent, wanted)
    with forward_ad.dual_level():
        dual = product(forward_ad.make_dual(x, dx), forward_ad.make_dual(blocks, dw), last)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, wanted)
        if not last:
            dual = ops.ks_chain_matmul(forward_ad.make_dual(x, dx), [forward_ad.make_dual(blocks, dw)])
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:Converting a tensor to a Python boolean")
@LAYOUTS
def test_a_trace_computes_and_does_not_remember_one_answer(last):
    x, blocks = sample()
    x = x.T.contiguous() if last else x
    with torch.no_grad():
        traced = torch.jit.trace(lambda x, w: product(x, w, last), (x, blocks))
        torch.testing.assert_close(traced(2 * x, 3 * blocks), 6 * product(x, blocks, last))
        if not last:
            traced = torch.jit.trace(lambda x, w: ops.ks_chain_matmul(x, [w]), (x, blocks))
            torch.testing.assert_close(traced(2 * x, 3 * blocks), 6 * product(x, blocks, last))


@LAYOUTS
def test_views_of_the_other_sign(last):
    x, blocks = sample()
    x = x.T.contiguous() if last else x
    y = product(x, blocks, last)
    torch.testing.assert_close(product(torch._neg_view(x), blocks, last), -y)
    torch.testing.assert_close(product(x, torch._neg_view(blocks), last), -y)
    turned = torch.complex(torch.zeros_like(x), x).conj().imag
    assert turned.is_neg()
    torch.testing.assert_close(product(turned, blocks, last), -y)
    if not last:
        torch.testing.assert_close(ops.ks_chain_matmul(turned, [torch._neg_view(blocks)]), y)
        torch.testing.assert_close(
            ops.ks_chain_matmul(x, [blocks], bias=torch._neg_view(torch.ones(30))), product(x, blocks, False) - 1
        )


@LAYOUTS
def test_meta_tensors_have_shapes(last):
    x, blocks = (value.to("meta") for value in sample())
    x = x.T if last else x
    assert product(x, blocks, last).shape == ((30, 6) if last else (6, 30))
    assert product(x, blocks, last).device.type == "meta"
    if not last:
        assert ops.ks_chain_matmul(x, [blocks], bias=torch.ones(30, device="meta")).shape == (6, 30)
        with pytest.raises(ValueError, match=r"bias of shape \(30,\) on meta, got \(30,\) on cpu"):
            ops.ks_chain_matmul(x, [blocks], bias=torch.ones(30))


def test_autocast_does_not_make_numbers_of_integers():
    x, blocks = sample()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=r"one floating-point type.*torch.int64"):
            ops.ks_matmul(x.long(), blocks)
        with pytest.raises(ValueError, match=r"x's type and device \(torch.int64"):
            ops.ks_chain_matmul(x.long(), [blocks])


def test_chains_longer_than_one_call_of_the_kernel():
    x = torch.arange(8.0).reshape(2, 4)
    factors = [torch.ones(4, 1, 1, 1) for _ in range(65)]
    factors[0] *= 2
    factors[64] *= torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    for _ in range(4):
        y = ops.ks_chain_matmul(x, factors, bias=torch.ones(4), activation=torch.relu)
        assert torch.equal(y, 2 * x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 1)


def check(y, fake):
    assert (y.shape, y.dtype, y.is_contiguous()) == (fake.shape, fake.dtype, fake.is_contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@LAYOUTS
def test_outputs_lie_in_memory_as_the_fakes_say(last, dtype):
    patterns = [(1, 8, 6, 1), (2, 3, 4, 5), (1, 4, 4, 8), (6, 5, 3, 1), (1, 1, 1, 2), (2, 1, 1, 3)]
    for pattern, turned in itertools.product(patterns, (False, True)):
        x, blocks = sample(pattern, dtype=dtype)
        x = x.T.contiguous() if last else x
        x = x.T.contiguous().T if turned else x
        for name in choose.ALGORITHMS:
            if name == "native" and not native.supports(x):
                continue
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(choose, "choose_algorithm", lambda *_, name=name, **__: name)
                y = operators._matmul(x, blocks, last)
            check(y, operators._fake_matmul(x.to("meta"), blocks.to("meta"), last))
        gradient = operators._gradient(x, y, list(pattern), last)
        check(gradient, operators._fake_gradient(x.to("meta"), y.to("meta"), list(pattern), last))


@pytest.mark.filterwarnings("error:There is a performance drop")
@LAYOUTS
def test_a_gradient_for_each_sample(last):
    x, blocks = sample(dtype=torch.float64)
    many = x[:, :, None] if last else x[:, None]

    def loss(blocks, x):
        return product(x, blocks, last).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(blocks, many)
    for one, sample_x in zip(found, many):
        weights = blocks.clone().requires_grad_()
        loss(weights, sample_x).backward()
        torch.testing.assert_close(one, weights.grad)


def test_doctor_names_the_kernel():
    assert examined()["native kernels"] == {"Kronecker-sparse products": native.describe()}
    assert native.describe() in {"plain C++", "AVX2", "AVX-512", "none (torch's own operations)"}
