"""Linear attention: every form against the recurrence, the recurrence against sums over all pairs."""

from __future__ import annotations

import itertools
import math
import re
import warnings

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from eke.ops import linear_attention
from eke.ops.linear_attention import LinearAttentionState, features, native

B, L, H, D, M = 2, 37, 3, 5, 4
FAMILIES = ["plain", "per head", "scalar", "vector", "delta", "gated delta", "vector delta"]
FORMS = [("parallel", None), ("chunk", 1), ("chunk", 16), ("chunk", 64), ("auto", None)]


def sample(family="plain", *, length=L, dtype=torch.float64, seed=0):
    """Inputs and options of one member of the family."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, uniform=False):
        make = torch.rand if uniform else torch.randn
        return make(B, length, H, *shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = draw(D), draw(D), draw(M)
    options = {}
    if family == "per head":
        options["decay"] = (1 - 2.0 ** -(2 + torch.arange(H))).to(dtype)
    elif "vector" in family:
        options["decay"] = 0.2 + 0.8 * draw(D, uniform=True)
    elif family in {"scalar", "gated delta"}:
        options["decay"] = 0.2 + 0.8 * draw(uniform=True)
    if "delta" in family:
        options["beta"] = draw(uniform=True)
        k = normalize(k, dim=-1)
    if family != "plain":
        options["feature_map"] = None
    return (q, k, v), options


def pairs(q, k, v, f):
    """Plain causal attention from all pairs of positions."""
    weights = torch.einsum("bihd,bjhd->bhij", f(q), f(k)).tril()
    return torch.einsum("bhij,bjhm->bihm", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)


@pytest.mark.parametrize("name", ["elu", "relu"])
def test_the_recurrence_is_the_sum_over_pairs(name):
    inputs, _ = sample()
    inputs = (inputs[0].abs() + 0.1, inputs[1].abs() + 0.1, inputs[2])
    out, _ = linear_attention(*inputs, causal=True, feature_map=name, form="recurrent")
    torch.testing.assert_close(out, pairs(*inputs, features.NAMED[name]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("form", "chunk"), FORMS, ids=str)
def test_all_forms_agree(family, form, chunk):
    inputs, options = sample(family)
    expected, last = linear_attention(*inputs, causal=True, form="recurrent", **options)
    out, state = linear_attention(*inputs, causal=True, form=form, chunk=chunk, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(last), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_keeps_five_digits(family):
    exact, options = sample(family, length=300)
    expected, _ = linear_attention(*exact, causal=True, form="recurrent", **options)
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out, state = linear_attention(*(x.float() for x in exact), causal=True, **single)
    assert out.dtype == state.memory.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [9, 1100])
def test_derivatives_of_chunks_are_those_of_the_recurrence(family, length):
    inputs, options = sample(family, length=length)
    tensors = [x.requires_grad_() for x in (*inputs, *(o for o in options.values() if isinstance(o, torch.Tensor)))]
    found = []
    for form in ("recurrent", "chunk"):
        out, state = linear_attention(*inputs, causal=True, form=form, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        loss = (out * weights).sum() + state.memory.square().sum() / 100 + state.keys.sum()
        found.append(torch.autograd.grad(loss, tensors))
    for ours, theirs in zip(found[1], found[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck(family):
    inputs, options = sample(family, length=5)
    constants = {k: v for k, v in options.items() if k == "feature_map"}
    names = [k for k in options if k not in constants]
    tensors = [x.requires_grad_() for x in (*inputs, *(options[n] for n in names))]

    def run(q, k, v, *rest):
        more = dict(zip(names, rest))
        return linear_attention(q, k, v, causal=True, chunk=2, **constants, **more)[0]

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_goes_on_where_it_ended(family):
    inputs, options = sample(family)
    expected, last = linear_attention(*inputs, causal=True, **options)
    cut, state, parts = 15, None, []
    for part in (slice(0, cut), slice(cut, cut + 1), slice(cut + 1, L)):
        some = {k: v[:, part] if isinstance(v, torch.Tensor) and v.ndim > 1 else v for k, v in options.items()}
        out, state = linear_attention(*(x[:, part] for x in inputs), causal=True, initial_state=state, **some)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(last), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_past_does_not_know_the_future(family):
    inputs, options = sample(family)
    before, _ = linear_attention(*inputs, causal=True, **options)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, 20] += 1
    after, _ = linear_attention(*changed, causal=True, **options)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_sequences_by_themselves(family):
    (q, k, v), options = sample(family, length=40)
    borders = [0, 1, 1, 18, 33, 40]
    one = {n: o[:1] if isinstance(o, torch.Tensor) and o.ndim > 1 else o for n, o in options.items()}
    start = LinearAttentionState(torch.randn(5, H, D, M, dtype=q.dtype), torch.rand(5, H, D, dtype=q.dtype))
    out, state = linear_attention(
        q[:1], k[:1], v[:1], causal=True, cu_seqlens=torch.tensor(borders), initial_state=start, **one
    )
    for i, (a, b) in enumerate(itertools.pairwise(borders)):
        mine = {n: o[:, a:b] if isinstance(o, torch.Tensor) and o.ndim > 1 else o for n, o in one.items()}
        given = LinearAttentionState(start.memory[i : i + 1], start.keys[i : i + 1])
        alone, last = linear_attention(
            q[:1, a:b], k[:1, a:b], v[:1, a:b], causal=True, initial_state=given, form="recurrent", **mine
        )
        torch.testing.assert_close(out[:, a:b], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.memory[i], last.memory[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_keys_are_as_if_removed(family):
    inputs, options = sample(family)
    mask = torch.rand(B, L, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, :3] = False  # left padding
    out, state = linear_attention(*inputs, causal=True, mask=mask, **options)
    for i in range(B):
        kept = mask[i]
        one = {n: o[i : i + 1, kept] if isinstance(o, torch.Tensor) and o.ndim > 1 else o for n, o in options.items()}
        alone, last = linear_attention(*(x[i : i + 1, kept] for x in inputs), causal=True, **one)
        torch.testing.assert_close(out[i : i + 1, kept], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.memory[i], last.memory[0], rtol=0, atol=1e-12)


def test_all_keys_masked_gives_zeros():
    inputs, _ = sample()
    for causal in (False, True):
        out, _ = linear_attention(*inputs, causal=causal, mask=torch.zeros(B, L, dtype=torch.bool))
        assert bool((out == 0).all())


def test_without_causality_all_pairs_count():
    (q, k, v), _ = sample()
    q = q[:, :11]
    f = features.elu
    weights = torch.einsum("bihd,bjhd->bhij", f(q), f(k))
    expected = torch.einsum("bhij,bjhm->bihm", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    out, state = linear_attention(q, k, v, causal=False)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    order = torch.randperm(L, generator=torch.Generator().manual_seed(2))
    again, _ = linear_attention(q, k[:, order], v[:, order], causal=False)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-12)
    causal, last = linear_attention(k, k, v, causal=True)
    torch.testing.assert_close(state.memory, last.memory, rtol=0, atol=1e-12)
    torch.testing.assert_close(causal[:, -1:], linear_attention(k[:, -1:], k, v, causal=False)[0], rtol=0, atol=1e-12)


def test_known_numbers():
    one = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    out, _ = linear_attention(one, one, v, causal=True)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64), rtol=0, atol=2e-6)
    torch.testing.assert_close(features.elu(torch.tensor([0.0, -1.0])), torch.tensor([1.0, math.exp(-1)]))
    (q, k, v), _ = sample(length=1)
    weight = (features.elu(q) * features.elu(k)).sum(-1, keepdim=True)
    out, _ = linear_attention(q, k, v, causal=True)
    torch.testing.assert_close(out, v * weight / (weight + 1e-6), rtol=0, atol=1e-14)


def test_equal_keys_give_running_means():
    (q, k, v), _ = sample()
    out, _ = linear_attention(q, k[:, :1].expand_as(k), v, causal=True)
    means = v.cumsum(1) / torch.arange(1, L + 1, dtype=v.dtype)[:, None, None]
    torch.testing.assert_close(out, means, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_single(dtype):
    (q, k, v), _ = sample(length=2000)
    exact, _ = linear_attention(q, k, v, causal=True)
    out, state = linear_attention(q.to(dtype), k.to(dtype), v.to(dtype), causal=True)
    assert (out.dtype, state.memory.dtype) == (dtype, torch.float32)
    assert float((out.double() - exact).abs().max()) < 2e-2


def test_float16_stays_finite_over_long_sequences():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 65536, 1, 16, generator=generator).half() for _ in range(3))
    out, state = linear_attention(q, k, v.abs() + 10, causal=True)
    assert bool(out.isfinite().all())
    assert float(state.keys.max()) > torch.finfo(torch.float16).max


def test_memory_of_derivatives_is_linear_in_the_length():
    """What autograd keeps, in numbers a position, does not grow, and is far below one state a position."""
    kept = []
    for length in (2048, 8192):
        q, k, v = (torch.randn(1, length, 2, 32, requires_grad=True) for _ in range(3))
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.data_ptr()] = x.untyped_storage().nbytes() // 4
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            linear_attention(q, k, v, causal=True)
        kept.append(sum(sizes.values()) / (2 * length))
    assert kept[1] < 1.1 * kept[0] < 32 * 32 / 2


LEVELS = range(native.level() + 1)
SIZES = [
    (2, 130, 3, 5, 7),
    (1, 64, 1, 16, 16),
    (2, 200, 2, 64, 64),
    (1, 33, 2, 20, 48),
    (1, 1, 2, 8, 8),
    (2, 3, 2, 20, 7),
]


def reach(tensors, name, normalized):
    """Outputs, state and derivatives in float64 by the recurrence."""
    tensors = [t.double().requires_grad_() for t in tensors]
    out, state = linear_attention(
        *tensors[:3], causal=True, feature_map=name, normalize=normalized, initial_state=tensors[3:], form="recurrent"
    )
    return tensors, out, state


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", ["elu", "identity"])
def test_the_kernel_agrees_with_the_recurrence(name, normalized, level):
    for batch, length, heads, d, m in SIZES:
        g = torch.Generator().manual_seed(length)
        q, k = (torch.randn(batch, length, heads, d, generator=g) for _ in range(2))
        q, k = (q, k) if name == "elu" else (q.abs(), k.abs())
        v = torch.randn(batch, length, heads, m, generator=g)
        memory, keys = torch.randn(batch, heads, d, m, generator=g), 3 * torch.rand(batch, heads, d, generator=g)
        exact, expected, last = reach((q, k, v, memory, keys), name, normalized)
        options = {"feature_map": native.MAPS[name], "normalize": normalized, "instructions": level}
        # As a transposed tensor, so that strides count.
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        out, bottom, *state = native.forward((q, k, v), (memory, keys), **options)
        grads = [torch.randn(t.shape, generator=g) for t in (out, *state)]
        derived = torch.autograd.grad((expected, *last), exact, [x.double() for x in grads])
        found = native.backward((q, k, v), (memory, keys), (out, bottom), grads, **options)
        for ours, theirs in zip((out, *state, *found), (expected, *last, *derived)):
            assert float((ours - theirs).detach().abs().max()) < 3e-6 * float(theirs.detach().abs().max())


def test_derivatives_of_the_operator_are_those_of_chunks():
    inputs, _ = sample(dtype=torch.float32)
    tensors = [x.requires_grad_() for x in inputs]
    found = []
    for chunk in (None, 16):
        out, state = linear_attention(*tensors, causal=True, chunk=chunk)
        found.append(torch.autograd.grad(out.square().sum() + state.memory.sum() + state.keys.sum(), tensors))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_the_operator_is_well_formed():
    inputs, _ = sample(dtype=torch.float32, length=9)
    state = (torch.rand(B, H, D, M), torch.rand(B, H, D))
    tensors = [x.requires_grad_() for x in (*inputs, *state)]
    torch.library.opcheck(torch.ops.eke.linear_attention.default, (*tensors, "elu", True))


def test_transforms_of_torch_func_pass():
    (q, k, v), _ = sample(dtype=torch.float32)

    def loss(v):
        return linear_attention(q, k, v, causal=True)[0].square().sum()

    value = v.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(v), torch.autograd.grad(loss(value), value)[0])


def test_operations_are_counted():
    inputs, _ = sample(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear_attention(*inputs, causal=True)
    assert counter.get_total_flops() == 2 * B * L * H * (2 * D * M + 32 * (D + M))


def test_the_kernel_refuses_what_it_would_misread():
    (q, k, v), _ = sample(dtype=torch.float32)
    state = (torch.zeros(B, H, D, M), torch.zeros(B, H, D))
    for wrong in ((q, k[:, 1:], v), (q.double(), k, v), (q, k, v[:1])):
        with pytest.raises(ValueError, match="takes float32 tensors of one attention"):
            native.forward(wrong, state, feature_map=0, normalize=True)
    with pytest.raises(ValueError, match="takes float32 tensors of one attention"):
        native.forward((q, k, v), (state[0][..., 1:], state[1]), feature_map=0, normalize=True)


def test_compile_and_export_give_the_same():
    inputs, _ = sample(dtype=torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v, causal=True)[0]

    expected = Layer()(*inputs)
    torch.testing.assert_close(torch.compile(Layer(), fullgraph=True, backend="eager")(*inputs), expected)
    torch.testing.assert_close(torch.export.export(Layer(), inputs).module()(*inputs), expected)


def test_empty_sequences():
    inputs, options = sample("gated delta", length=0)
    out, state = linear_attention(*inputs, causal=True, **options)
    assert out.shape == (B, 0, H, M)
    assert bool((state.memory == 0).all())


def test_a_map_with_negative_values_is_warned_of():
    inputs, _ = sample()
    with pytest.warns(UserWarning, match="negative values"):
        linear_attention(*inputs, causal=True, feature_map="identity", normalize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_attention(*inputs, causal=True, feature_map="identity", normalize=False)


def test_not_a_number_stays_where_it_is():
    inputs, _ = sample()
    inputs[2][0, 10] = torch.nan
    out, _ = linear_attention(*inputs, causal=True, form="recurrent")
    assert bool(out[0, :10].isfinite().all())
    assert bool(out[0, 10:].isnan().any())


STATE = (torch.zeros(B, H, D, M, dtype=torch.float64), torch.zeros(B, H, D, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(B, L, H)}, "needs q, k, v of shape (batch, length, heads, dim), got q (2, 37, 3)"),
        ({"v": torch.zeros(B, L, H + 1, M)}, "got q (2, 37, 3, 5), k (2, 37, 3, 5), v (2, 37, 4, 4)"),
        ({"q": torch.zeros(B, L, H, D + 1)}, "the same heads and dim"),
        ({"q": torch.zeros(B, L - 1, H, D, dtype=torch.float64)}, "as many keys as queries"),
        ({"v": torch.zeros(B, L, H, M)}, "one floating-point type, got torch.float64, torch.float64 and torch.float32"),
        ({"decay": torch.ones(H + 1)}, "decay must be (heads,), (batch, length, heads)"),
        ({"decay": torch.full((H,), 1.5)}, "decay must lie in (0, 1], got values from 1.5 to 1.5"),
        ({"decay": torch.zeros(H)}, "decay must lie in (0, 1], got values from 0.0"),
        ({"beta": torch.ones(B, L)}, "beta must be (batch, length, heads) = (2, 37, 3), got (2, 37)"),
        ({"beta": torch.ones(B, L, H), "normalize": True}, "The delta rule has no denominator"),
        ({"decay": torch.ones(H), "causal": False}, "use causal=True"),
        ({"mask": torch.ones(B, L, L, dtype=torch.bool)}, "Other masks (pairs of positions) do not exist"),
        ({"mask": torch.ones(B, L)}, "bool of shape (batch, keys) = (2, 37), got torch.float32"),
        ({"feature_map": "exp"}, "one of 'elu', 'relu', 'identity', got 'exp'"),
        ({"form": "fast"}, "form is 'auto', 'parallel', 'chunk' or 'recurrent', got 'fast'"),
        ({"chunk": 0}, "chunk is a positive number of positions, got 0"),
        ({"initial_state": (STATE[0][:1], STATE[1][:1])}, "the batch may not change"),
        ({"initial_state": (STATE[0].half(), STATE[1].half())}, "must be torch.float64, got torch.float16"),
        ({"cu_seqlens": torch.tensor([0, L])}, "the batch must be 1, got 2"),
        ({"cu_seqlens": torch.tensor([0.0, L])}, "at least two integers"),
    ],
)
def test_wrong_calls_are_refused(change, says):
    (q, k, v), _ = sample()
    arguments = {"q": q, "k": k, "v": v, "causal": True, **change}
    with pytest.raises(ValueError, match=re.escape(says)):
        linear_attention(**arguments)


def test_borders_must_cover_the_row():
    (q, k, v), _ = sample()
    for borders in ([0, 5], [1, L], [0, 9, 4, L]):
        with pytest.raises(ValueError, match=f"rise from 0 to the length {L}"):
            linear_attention(q[:1], k[:1], v[:1], causal=True, cu_seqlens=torch.tensor(borders))
    with pytest.raises(ValueError, match="are for causal=True"):
        linear_attention(q[:1], k[:1], v[:1], causal=False, cu_seqlens=torch.tensor([0, L]))
