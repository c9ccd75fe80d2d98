"""One step of decoding: kernel = torch = whole sequences; parameters are followed, bad input is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from eke.ops import linear_attention
from eke.ops.decode import Block, Decoder, Feed, KeyValues, Linear, Norm, Projection, Softmax, native, reference
from eke.ops.linear_attention import LinearAttentionState

SIZES = {"whole vectors": (64, 4, 128), "odd": (36, 3, 50), "prime": (17, 1, 33), "one wide head": (192, 2, 100)}
needs_kernel = pytest.mark.skipif(not native.available(), reason="needs the compiled kernel")


def projection(rows, columns, dtype):
    return Projection(torch.randn(rows, columns, dtype=dtype) / columns**0.5, torch.randn(rows, dtype=dtype) / 10)


def norm(size, dtype, kind="layer"):
    return Norm(
        kind, 1 + torch.randn(size, dtype=dtype) / 10, torch.randn(size, dtype=dtype) / 10 if kind == "layer" else None
    )


def attentions(width, heads, dtype):
    rms = norm(width // heads, dtype, "rms")
    return {
        "elu": Linear(),
        "relu": Linear("relu"),
        "retention": Linear("identity", False, retention=1 - torch.rand(heads, dtype=dtype) / 8, norm=rms),
        "scalar": Linear("identity", False, gate=projection(heads, width, dtype), norm=rms),
        "vector and delta": Linear(
            "identity", False, gate=projection(width, width, dtype), rate=projection(heads, width, dtype), norm=rms
        ),
        "delta": Linear("identity", False, rate=projection(heads, width, dtype), norm=rms),
        "softmax": Softmax(),
        "window": Softmax(3),
    }


def decoder(kinds, size, dtype=torch.float32, activation="gelu", head=True):
    width, heads, inner = size
    known = attentions(width, heads, dtype)
    blocks = [
        Block(
            norm(width, dtype), projection(3 * width, width, dtype), known[kind], projection(width, width, dtype),
            Feed(norm(width, dtype), projection(inner, width, dtype), projection(width, inner, dtype)),
        )
        for kind in kinds
    ]  # fmt: skip
    return Decoder(
        blocks,
        heads=heads,
        activation=activation,
        last=norm(width, dtype),
        head=projection(11, width, dtype) if head else None,
    )


ALL = ["elu", "relu", "retention", "scalar", "vector and delta", "delta", "softmax", "window"]


def specified(d, x, states):
    return reference.step(x, d.blocks, states, heads=d.heads, activation=d.activation, last=d.last, head=d.head)


def exact(d, like):
    """The same decoder and states in float64."""

    def up(x):
        if isinstance(x, torch.Tensor):
            return x.double() if x.is_floating_point() else x
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*map(up, x))
        if isinstance(x, (Linear, Softmax, Block, KeyValues)):
            return type(x)(**{name: up(getattr(x, name)) for name in x.__slots__})
        return x

    return Decoder(list(map(up, d.blocks)), heads=d.heads, activation=d.activation, last=up(d.last), head=up(d.head)), [
        up(x) for x in like
    ]


@needs_kernel
@pytest.mark.parametrize("level", range(max(native.level(), 0) + 1))
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_kernel_gives_what_the_specification_gives(level, size):
    torch.manual_seed(0)
    for batch in (1, 3, 9):
        d = decoder(ALL, size)
        states = d.states(batch, capacity=8)
        for state in states:
            if isinstance(state, KeyValues):
                state.starts = torch.arange(batch) % 2
        large, wanted = exact(d, states)
        run = native.Native(d.blocks, heads=d.heads, activation=d.activation, last=d.last, head=d.head)
        for t in range(7):
            x = torch.randn(batch, d.width)
            if t == 0:  # samples that start at 1 have read nothing yet
                for state in (*states, *wanted):
                    if isinstance(state, KeyValues):
                        state.filled = 1
            found = run(x, states, instructions=level)
            right = specified(large, x.double(), wanted)
            assert (found - right).abs().max() < 2e-4 * right.abs().max()
        for state, other in zip(states, wanted):
            if isinstance(state, LinearAttentionState):
                torch.testing.assert_close(state.memory.double(), other.memory, rtol=1e-3, atol=1e-3)
            else:
                assert state.filled == other.filled == 8


@needs_kernel
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation(activation):
    torch.manual_seed(0)
    d = decoder(["elu"], SIZES["odd"], activation=activation, head=False)
    states = d.states(2)
    large, wanted = exact(d, states)
    x = 5 * torch.randn(2, d.width)
    torch.testing.assert_close(d(x, states).double(), specified(large, x.double(), wanted), rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("batch", [2, 16])
def test_two_threads_give_what_one_gives(batch):
    torch.manual_seed(0)
    d = decoder(["elu", "softmax", "vector and delta"], (256, 8, 512))
    x, before = torch.randn(batch, 256), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            states = d.states(batch, capacity=3)
            results.append(torch.stack([d(x * t, states) for t in (1, 2, 3)]))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["elu", "relu", "retention", "softmax", "window"])
def test_steps_give_what_the_whole_sequence_gives(kind):
    torch.manual_seed(0)
    d = decoder([kind], SIZES["odd"], torch.float64, head=False)
    block, states = d.blocks[0], d.states(2, capacity=9)
    x = torch.randn(2, 9, d.width, dtype=torch.float64)
    steps = torch.stack([d(x[:, t], states) for t in range(9)], 1)
    y = reference.normed(block.norm, x)
    q, k, v = (p.unflatten(-1, (d.heads, -1)) for p in functional.linear(y, *block.projections).chunk(3, -1))
    if isinstance(block.attention, Linear):
        a = block.attention
        found, _ = linear_attention(
            q, k, v, causal=True, feature_map=a.feature_map, decay=a.retention, normalize=a.normalize
        )
        found = reference.normed(a.norm, found)
    else:
        seen = torch.ones(9, 9, dtype=torch.bool).tril()
        if block.attention.window:
            seen = seen.triu(1 - block.attention.window)
        found = functional.scaled_dot_product_attention(
            *(p.transpose(1, 2) for p in (q, k, v)), attn_mask=seen
        ).transpose(1, 2)
    x = x + functional.linear(found.flatten(2), *block.out)
    inner = functional.gelu(functional.linear(reference.normed(block.feed.norm, x), *block.feed.up))
    whole = reference.normed(d.last, x + functional.linear(inner, *block.feed.down))
    torch.testing.assert_close(steps, whole, rtol=1e-11, atol=1e-11)


def test_positions_before_the_start_are_not_seen():
    torch.manual_seed(0)
    d = decoder(["softmax"], SIZES["odd"])
    x = torch.randn(6, 2, d.width)
    states, alone = d.states(2, capacity=6), d.states(1, capacity=6)
    states[0].starts = torch.tensor([2, 0])
    both = [d(row, states) for row in x]
    one = [d(row[:1], alone) for row in x[2:]]
    torch.testing.assert_close(torch.stack(both)[2:, :1], torch.stack(one), rtol=1e-5, atol=1e-5)


def test_states_of_linear_layers_do_not_grow_and_move_in_place():
    d = decoder(["elu"], SIZES["odd"])
    states = d.states(2)
    before = [x.data_ptr() for x in states[0]]
    for _ in range(3):
        d(torch.randn(2, d.width), states)
    assert [x.data_ptr() for x in states[0]] == before
    assert states[0].keys.abs().min() > 0


def plain(attention, size=4, dtype=torch.float32):
    """One layer whose attention alone shows: queries, keys and values are x itself, the other part gives zero."""
    eye = torch.eye(size, dtype=dtype)
    nothing = Feed(None, Projection(torch.zeros(2, size, dtype=dtype)), Projection(torch.zeros(size, 2, dtype=dtype)))
    block = Block(None, Projection(torch.cat([eye, eye, eye])), attention, Projection(eye), nothing)
    return Decoder([block], heads=1)


def test_one_position_attends_to_itself():
    x = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    for attention in (Linear(), Softmax(), Softmax(1)):
        d = plain(attention)
        torch.testing.assert_close(d(x, d.states(1, capacity=1)) - x, x, rtol=1e-5, atol=1e-5)


def test_equal_keys_give_running_means():
    # With a map that is zero nowhere and keys that are all the same, outputs are means of what was read.
    d = plain(Linear("relu"), size=2)
    states, seen = d.states(1), []
    for value in (1.0, 2.0, 3.0):
        x = torch.tensor([[1.0, value]])
        states[0].keys[:, :, 1] = states[0].memory[:, :, 1] = 0  # the second feature is forgotten
        out = d(x, states) - x
        seen.append(value)
        right = (sum(seen) + value**3) / (len(seen) + value**2)
        torch.testing.assert_close(float(out[0, 1]), right, rtol=1e-5, atol=1e-5)


def test_a_window_of_one_sees_itself_and_a_wide_one_sees_all():
    torch.manual_seed(0)
    full, wide, own = plain(Softmax()), plain(Softmax(50)), plain(Softmax(1))
    states = [d.states(2, capacity=6) for d in (full, wide, own)]
    for _ in range(6):
        x = torch.randn(2, 4)
        found = [d(x, s) for d, s in zip((full, wide, own), states)]
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[2], 2 * x, rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow():
    d = plain(Softmax())
    states = d.states(1, capacity=2)
    d(torch.full((1, 4), -300.0), states)
    x = torch.full((1, 4), 300.0)
    torch.testing.assert_close(d(x, states), 2 * x)


def test_no_samples_give_no_outputs():
    d = decoder(["elu", "softmax"], SIZES["odd"])
    assert d(torch.zeros(0, d.width), d.states(0, capacity=1)).shape == (0, 11)


def test_changes_of_parameters_count_at_once():
    torch.manual_seed(0)
    d = decoder(["elu"], SIZES["odd"])
    x = torch.randn(2, d.width)

    def outputs():
        return d(x, d.states(2))

    first = outputs()
    weight = d.blocks[0].projections.weight
    weight.data.mul_(2)  # version counters miss this
    second = outputs()
    weight.data = weight.data / 2  # other memory
    third = outputs()
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(first, third)
    d.head.weight.data = d.head.weight.data.t().contiguous().t()  # the kernel cannot read it where it lies
    assert not d.fused()
    torch.testing.assert_close(outputs(), first, rtol=1e-5, atol=1e-5)


def test_other_types_take_the_long_way():
    torch.manual_seed(0)
    d = decoder(["elu", "softmax"], SIZES["odd"], torch.bfloat16)
    assert not d.fused()
    assert d(torch.randn(2, d.width, dtype=torch.bfloat16), d.states(2, capacity=1)).dtype == torch.bfloat16


def test_nan_is_not_hidden():
    d = decoder(["elu", "softmax"], SIZES["odd"])
    x = torch.randn(2, d.width)
    x[0, 3] = float("nan")
    out = d(x, d.states(2, capacity=2))
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_what_does_not_fit_is_refused():
    d = decoder(["elu", "softmax"], SIZES["odd"])
    width, states = d.width, d.states(2, capacity=1)
    x = torch.randn(2, width)
    with pytest.raises(ValueError, match=r"\(batch, width\) = \(batch, 36\), got \(2, 35\)"):
        d(x[:, 1:], states)
    with pytest.raises(ValueError, match="each of 2 layers, got 1"):
        d(x, states[:1])
    with pytest.raises(ValueError, match=r"got \(2, 3, 12, 12\).*batch may not change"):
        d(x[:1], states)
    with pytest.raises(ValueError, match=r"Layer 0 is linear.*got KeyValues"):
        d(x, states[::-1])
    with pytest.raises(ValueError, match=r"Layer 1 is softmax.*got LinearAttentionState"):
        d(x, [states[0], states[0]])
    with pytest.raises(ValueError, match=r"keys and values.*got \(1, 3, 1, 12\)"):
        d(x, [states[0], KeyValues(states[1].keys[:1], states[1].values)])
    with pytest.raises(ValueError, match="starts must be int64"):
        d(x, [states[0], KeyValues(states[1].keys, states[1].values, starts=torch.zeros(2))])
    d(x, states)
    with pytest.raises(ValueError, match="room for 1 positions and 1 are filled"):
        d(x, states)


def test_parameters_that_do_not_fit_are_refused():
    d = decoder(["scalar"], SIZES["odd"])
    block = d.blocks[0]

    def changed(**parts):
        return Block(**{name: parts.get(name, getattr(block, name)) for name in block.__slots__})

    with pytest.raises(ValueError, match="at least one block, got 0"):
        Decoder([], heads=3)
    with pytest.raises(ValueError, match=r"activation is one of 'gelu'.*'tanh'"):
        Decoder([block], heads=3, activation="tanh")
    with pytest.raises(ValueError, match="multiple of heads, got 36 and 5"):
        Decoder([block], heads=5)
    with pytest.raises(ValueError, match=r"Layer 1: out needs weight \(36, 36\).*got \(108, 36\)"):
        Decoder([block, changed(out=block.projections)], heads=3)
    with pytest.raises(ValueError, match=r"Layer 0: norm needs weight and bias of shape \(36,\)"):
        Decoder([changed(norm=norm(35, torch.float32))], heads=3)
    with pytest.raises(ValueError, match=r"retention must be \(3,\), got \(2,\)"):
        Decoder([changed(attention=Linear(retention=torch.ones(2)))], heads=3)
    with pytest.raises(ValueError, match=r"The head needs weight \(11, 36\)"):
        Decoder([block], heads=3, head=Projection(torch.randn(11, 35)))
