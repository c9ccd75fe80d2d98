"""Values that the factors of a layer may start with: each is compared with the matrix it promises."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard

from eke import Chain
from eke.linalg import bit_reversal
from eke.nn import KSLinear

RADICES = {"2^5": [2] * 5, "4 x 8": [4, 8], "16": [16]}


def layer(radices, init, dtype=torch.float64):
    chain = Chain.radix(radices, radices)
    size = chain.shape[0]
    return KSLinear(size, size, chain=chain, init=init, dtype=dtype)


def digit_reversal(radices):
    """Positions of inputs whose digits are read from the other end."""
    size = torch.tensor(radices).prod()
    return torch.arange(int(size)).reshape(*reversed(radices)).permute(*reversed(range(len(radices)))).reshape(-1)


@pytest.mark.parametrize("radices", [*RADICES.values(), [3, 5, 2]], ids=str)
def test_fft_is_torchs_after_digit_reversal(radices):
    made = layer(radices, "fft", torch.complex128)
    x = torch.randn(7, made.in_features, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    found = made(x[:, digit_reversal(radices)])
    torch.testing.assert_close(found, torch.fft.fft(x), rtol=0, atol=1e-12)


def test_digits_of_two_are_bits():
    torch.testing.assert_close(digit_reversal([2] * 5), bit_reversal(32))


@pytest.mark.parametrize("radices", RADICES.values(), ids=RADICES)
def test_hadamard_is_scipys_with_orthonormal_rows(radices):
    made = layer(radices, "hadamard")
    size = made.in_features
    torch.testing.assert_close(
        made.to_dense().detach(), torch.from_numpy(hadamard(size)).double() / size**0.5, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("radices", [*RADICES.values(), [3, 5]], ids=str)
def test_identity_is_exact(radices):
    made = layer(radices, "identity")
    assert torch.equal(made.to_dense().detach(), torch.eye(made.in_features, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("chain", [Chain.butterfly(32), Chain.monarch(64, 64, 4), Chain.radix([3, 5], [3, 5])], ids=str)
def test_orthogonal_keeps_lengths(chain, dtype):
    size = chain.shape[0]
    made = KSLinear(size, size, chain=chain, init="orthogonal", dtype=dtype)
    weight = made.to_dense().detach()
    torch.testing.assert_close(weight.mH @ weight, torch.eye(size, dtype=dtype), rtol=0, atol=1e-12)


def test_orthogonal_is_drawn_anew_and_by_the_generator():
    made = layer([4, 8], "orthogonal")
    before = made.to_dense().detach()
    made.reset_parameters(generator=torch.Generator().manual_seed(1))
    once = made.to_dense().detach()
    made.reset_parameters(generator=torch.Generator().manual_seed(1))
    assert torch.equal(once, made.to_dense().detach())
    assert not torch.allclose(before, once)


def test_a_complex_layer_trains():
    made = KSLinear(16, 16, chain="butterfly", init="fft", dtype=torch.complex128)
    x = torch.randn(3, 16, dtype=torch.complex128)
    assert torch.autograd.gradcheck(lambda *factors: torch.func.functional_call(
        made, {f"factors.{i}": f for i, f in enumerate(factors)}, (x,)
    ).abs().square().sum(), tuple(made.factors))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"init": "fourier"}, "init is one of 'normal', 'identity'.*got 'fourier'"),
        ({"init": "fft"}, "'fft' needs a complex layer.*torch.float32"),
        ({"init": "identity", "chain": Chain.low_rank(16, 16, 4)}, r"square factors.*got \(1, 16, 4, 1\)"),
        ({"init": "hadamard", "chain": Chain([(1, 4, 4, 8), (2, 4, 4, 4)])}, r"square factors.*got \("),
        ({"init": "hadamard", "chain": Chain.radix([3, 5], [3, 5])}, "powers of two, got 3"),
    ],
)
def test_what_a_chain_cannot_hold_is_refused(arguments, says):
    chain = arguments.pop("chain", Chain.butterfly(16))
    with pytest.raises(ValueError, match=says):
        KSLinear(chain.shape[1], chain.shape[0], chain=chain, **arguments)


def test_complex_inputs_of_a_real_layer_are_refused():
    with pytest.raises(ValueError, match=r"torch\.complex64, cpu.*torch\.float32"):
        KSLinear(16, 16, chain="butterfly")(torch.randn(2, 16, dtype=torch.complex64))
