"""A step of hybrid attention: kernel = torch = `HybridAttention`'s own steps; rotations, shared keys, gates."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from eke.nn import HybridAttention
from eke.nn.feature_maps import T2R
from eke.ops.decode import (
    Block,
    Decoder,
    Feed,
    Hybrid,
    KeyValues,
    Linear,
    Map,
    Norm,
    Projection,
    Ring,
    Separate,
    Softmax,
    native,
    reference,
)

needs_kernel = pytest.mark.skipif(not native.available(), reason="needs the compiled kernel")
MAPS = ["elu", "relu", "t2r", "hedgehog", "narrow t2r"]
WINDOWS = [0, 1, 2, 5, 21]
SIZES = {"whole vectors": (64, 4, 128), "odd": (36, 3, 50), "prime": (17, 1, 33), "wide heads": (160, 2, 100)}


def described(module):
    """A feature map of `eke.nn` as a step takes it."""
    names = {"_Elu": "elu", "ReLU": "relu", "T2R": "t2r", "Hedgehog": "hedgehog"}
    return Map(names[type(module).__name__], getattr(module, "weight", None), getattr(module, "bias", None))


def attention(heads, size, window, name):
    """`HybridAttention` whose parameters are not those it begins with."""
    rule = (lambda h, d: T2R(h, d, 7)) if name == "narrow t2r" else name
    layer = HybridAttention(heads, size, window=window, feature_map=rule)
    for parameter in layer.parameters():
        parameter.data.add_(torch.randn_like(parameter) / 5)
    return layer


def kind(layer):
    return Hybrid(described(layer.query_map), described(layer.key_map), layer.window, layer.balance)


def projection(rows, columns, dtype=torch.float32):
    return Projection(torch.randn(rows, columns, dtype=dtype) / columns**0.5, torch.randn(rows, dtype=dtype) / 10)


def block(width, inner, hybrid, projections=None, gate=False, dtype=torch.float32):
    norm = Norm("rms", 1 + torch.randn(width, dtype=dtype) / 10)
    feed = Feed(
        norm, projection(inner, width, dtype), projection(width, inner, dtype),
        projection(inner, width, dtype) if gate else None,
    )  # fmt: skip
    return Block(
        norm, projections or projection(3 * width, width, dtype), hybrid, projection(width, width, dtype), feed
    )


def separate(width, shared_by, dtype=torch.float32):
    """Projections to queries, keys and values, whose heads are shared."""
    return Separate(*(projection(rows, width, dtype) for rows in (width, width // shared_by, width // shared_by)))


def ways(d, level):
    """The step by the kernel at a level of instructions, or by torch."""
    if level < 0:
        return lambda x, states, **given: reference.step(
            x, d.blocks, states, heads=d.heads, activation=d.activation, last=d.last, head=d.head, **given
        )
    run = native.Native(d.blocks, heads=d.heads, activation=d.activation, last=d.last, head=d.head)
    return lambda x, states, **given: run(x, states, instructions=level, **given)


def same_state(ring, state):
    """A ring, put in order, is the state of the module."""
    keys, values, real = ring.ordered()
    for found, right in zip((ring.memory, ring.sums, keys, values), state[:4]):
        torch.testing.assert_close(found, right, rtol=2e-4, atol=2e-5)
    assert torch.equal(real, state.real)


@torch.no_grad()
@pytest.mark.parametrize("level", range(-1, max(native.level(), -1) + 1))
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", MAPS)
def test_steps_are_those_of_the_module(level, window, name):
    torch.manual_seed(0)
    for (width, heads, inner), batch in zip(SIZES.values(), (1, 3, 9, 2)):
        layer = attention(heads, width // heads, window, name)
        d = Decoder([block(width, inner, kind(layer))], heads=heads, activation="silu")
        step, states, state = ways(d, level), d.states(batch), None
        only = d.blocks[0]
        for _ in range(3 * window + 4):
            x = torch.randn(batch, width)
            q, k, v = functional.linear(reference.normed(only.norm, x), *only.projections).reshape(
                batch, 3, heads, 1, -1
            ).unbind(1)  # fmt: skip
            found, state = layer(q, k, v, causal=True, state=state)
            y = x + functional.linear(found.flatten(1), *only.out)
            inside = functional.silu(functional.linear(reference.normed(only.feed.norm, y), *only.feed.up))
            right = y + functional.linear(inside, *only.feed.down)
            torch.testing.assert_close(step(x, states), right, rtol=1e-4, atol=2e-5)
            same_state(states[0], state)


@torch.no_grad()
@pytest.mark.parametrize("level", range(-1, max(native.level(), -1) + 1))
@pytest.mark.parametrize("window", [0, 1, 4])
def test_a_step_goes_on_from_what_the_module_has_read(level, window):
    torch.manual_seed(0)
    heads, size, batch, read = 2, 12, 3, 9
    layer = attention(heads, size, window, "hedgehog")
    eye = torch.eye(heads * size)
    nothing = Feed(None, Projection(torch.zeros(2, heads * size)), Projection(torch.zeros(heads * size, 2)))
    d = Decoder([Block(None, Projection(torch.cat([eye] * 3)), kind(layer), Projection(eye), nothing)], heads=heads)
    x = torch.randn(batch, heads, read + 7, size)
    real = torch.ones(batch, read + 7, dtype=torch.bool)
    real[0, :8] = real[1, :3] = False  # padding on the left, some of it still in the window
    whole, _ = layer(x, x, x, causal=True, real=real)
    _, state = layer(*[x[:, :, :read]] * 3, causal=True, real=real[:, :read])
    step, ring = ways(d, level), Ring(*(part.clone(memory_format=torch.contiguous_format) for part in state))
    for t in range(read, read + 7):
        row = x[:, :, t].flatten(1)
        torch.testing.assert_close((step(row, [ring]) - row).unflatten(1, (heads, size)), whole[:, :, t],
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("level", range(max(native.level(), 0) + 1))
@pytest.mark.parametrize("size", [(64, 4, 128), (36, 6, 50), (24, 2, 17)], ids=str)
def test_the_kernel_gives_what_the_specification_gives(level, size):
    """All kinds of layers in one step, with gates, rotations and heads that share keys; in float64 for comparison."""
    width, heads, inner = size

    def drawn(dtype):
        torch.manual_seed(0)
        layers = [attention(heads, width // heads, *kind) for kind in ((3, "hedgehog"), (0, "t2r"), (2, "elu"))]
        kinds = [kind(layer.to(dtype)) for layer in layers]
        shared = [separate(width, 2, torch.float32), separate(width, heads), separate(width, 1), None, None]
        return [
            block(width, inner, hybrid, projections, gate=number % 2 == 0)
            for number, (hybrid, projections) in enumerate(zip([*kinds, Softmax(3), Linear()], shared))
        ]

    def up(x):
        if isinstance(x, torch.Tensor):
            return x.double() if x.is_floating_point() else x.clone()
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*map(up, x))
        if isinstance(x, (Linear, Softmax, Hybrid, Block, KeyValues, Ring)):
            return type(x)(**{name: up(getattr(x, name)) for name in x.__slots__})
        return x

    for batch, turns in ((1, 1), (3, 1), (3, 3), (9, 9)):
        blocks = drawn(torch.float32)
        d = Decoder(blocks, heads=heads, activation="silu")
        large = Decoder(list(map(up, blocks)), heads=heads, activation="silu")
        states = d.states(batch, capacity=8)
        wanted, run = list(map(up, states)), ways(d, level)
        with torch.no_grad():
            for _ in range(8):
                x, angles = torch.randn(batch, width), torch.randn(turns, width // heads)
                rotation = angles.cos(), angles.sin()
                found = run(x, states, rotation=rotation)
                right = ways(large, -1)(x.double(), wanted, rotation=tuple(map(up, rotation)))
                assert (found - right).abs().max() < 2e-4 * right.abs().max()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 16])
def test_two_threads_give_what_one_gives(batch):
    torch.manual_seed(0)
    layers = [attention(8, 32, window, "hedgehog") for window in (3, 0)]
    d = Decoder(
        [block(256, 512, kind(layer), separate(256, shared), gate=True) for layer, shared in zip(layers, (4, 1))],
        heads=8,
    )
    x, before, results = torch.randn(batch, 256), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            states = d.states(batch)
            results.append(torch.stack([d(x * t, states) for t in range(1, 8)]))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rotations_and_gates_are_those_of_the_papers():
    """Scores of turned queries and keys depend on the distance alone, and a gate of ones leaves the other factor."""
    torch.manual_seed(0)
    eye = torch.eye(8)
    nothing = Feed(None, Projection(torch.zeros(2, 8)), Projection(torch.zeros(8, 2)))
    d = Decoder([Block(None, Projection(torch.cat([eye] * 3)), Softmax(), Projection(eye), nothing)], heads=1)
    x, rates = torch.randn(5, 2, 8), torch.tensor([1.0, 0.3, 0.1, 0.02]).repeat(2)
    found = []
    for start in (0, 1000):
        states = d.states(2, capacity=5)
        turned = [torch.tensor(float(start + t)) * rates[None] for t in range(5)]
        found.append(torch.stack([d(row, states, rotation=(a.cos(), a.sin())) for row, a in zip(x, turned)]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    feed = Feed(None, Projection(torch.randn(3, 8)), Projection(torch.randn(8, 3)))
    gate = Projection(torch.zeros(3, 8), torch.ones(3))
    outs = []
    for activation, given in (("relu", feed._replace(gate=gate)), ("silu", feed._replace(gate=gate))):
        gated = Decoder([Block(None, projection(24, 8), Linear(), Projection(0 * eye), given)], heads=1,
                        activation=activation)  # fmt: skip
        outs.append(gated(x[0], gated.states(2)) - x[0])
    plain = functional.linear(functional.linear(x[0], feed.up.weight), feed.down.weight)
    torch.testing.assert_close(outs[0], plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outs[1], plain * float(functional.silu(torch.tensor(1.0))), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_window_of_all_positions_is_softmax_attention():
    torch.manual_seed(0)
    layer, parts = attention(3, 12, 9, "hedgehog"), projection(108, 36)
    one = block(36, 20, kind(layer), parts)
    other = Block(one.norm, one.projections, Softmax(), one.out, one.feed)
    decoders = [Decoder([part], heads=3) for part in (one, other)]
    states = [d.states(2, capacity=9) for d in decoders]
    for _ in range(9):
        x = torch.randn(2, 36)
        found = [d(x, s) for d, s in zip(decoders, states)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_states_are_a_ring_of_constant_size_that_moves_in_place():
    d = Decoder([block(36, 20, kind(attention(3, 12, 4, "t2r")))], heads=3)
    (ring,) = d.states(2)
    addresses = [x.data_ptr() for x in (ring.memory, ring.sums, ring.keys, ring.values, ring.real)]
    slots = []
    for _ in range(6):
        d(torch.randn(2, 36), [ring])
        slots.append(ring.slot)
    assert slots == [1, 2, 3, 0, 1, 2]
    assert [x.data_ptr() for x in (ring.memory, ring.sums, ring.keys, ring.values, ring.real)] == addresses


@torch.no_grad()
def test_large_scores_and_nan():
    d = Decoder([block(36, 20, kind(attention(3, 12, 4, "hedgehog")))], heads=3)
    states = d.states(2)
    for sign in (1, -1, 1, -1, 1, -1):
        assert d(sign * torch.full((2, 36), 1e4), states).isfinite().all()
    x = torch.randn(2, 36)
    x[0, 3] = float("nan")
    out = d(x, d.states(2))
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


@torch.no_grad()
def test_changes_of_maps_and_balances_count_at_once():
    torch.manual_seed(0)
    layer = attention(3, 12, 2, "hedgehog")
    d = Decoder([block(36, 20, kind(layer))], heads=3)
    x = torch.randn(6, 2, 36)

    def outputs():
        states = d.states(2)
        return [d(row, states) for row in x][-1]

    first = outputs()
    for parameter in (layer.balance, layer.key_map.weight, layer.query_map.weight):
        parameter.data.add_(1 + torch.rand_like(parameter))
        changed = outputs()
        assert (changed - first).abs().max() > 1e-5
        first = changed
    layer.balance.data = layer.balance.data.double().float()  # other memory
    torch.testing.assert_close(outputs(), first)


def test_other_types_take_the_long_way():
    torch.manual_seed(0)
    layer = attention(3, 12, 2, "t2r").to(torch.bfloat16)
    d = Decoder([block(36, 20, kind(layer), dtype=torch.bfloat16)], heads=3)
    assert not d.fused()
    states = d.states(2)
    assert states[0].memory.dtype == torch.float32
    assert d(torch.randn(2, 36, dtype=torch.bfloat16), states).dtype == torch.bfloat16
    layer = attention(3, 12, 2, "hedgehog")
    d = Decoder([block(36, 20, kind(layer))], heads=3)
    large = Ring(*(getattr(d.states(2)[0], name) for name in ("memory", "sums", "keys", "values", "real")))
    large.keys = large.keys.transpose(2, 3).contiguous().transpose(2, 3)  # the kernel cannot read it where it lies
    with torch.no_grad():
        x = torch.randn(2, 36)
        torch.testing.assert_close(d(x, [large]), d(x, d.states(2)), rtol=1e-5, atol=1e-5)


def test_parameters_that_do_not_fit_are_refused():
    layer = attention(3, 12, 2, "t2r")
    good = kind(layer)

    def made(hybrid=good, **parts):
        whole = block(36, 20, hybrid)
        fields = {name: parts.get(name, getattr(whole, name)) for name in whole.__slots__}
        return Decoder([Block(**fields)], heads=3)

    with pytest.raises(ValueError, match=r"window is a number of positions.*got -1"):
        made(Hybrid(good.query_map, good.key_map, -1))
    with pytest.raises(ValueError, match=r"a window of 2 needs balance \(3,\), got None"):
        made(Hybrid(good.query_map, good.key_map, 2))
    with pytest.raises(ValueError, match=r"needs balance \(3,\), got \(2,\)"):
        made(Hybrid(good.query_map, good.key_map, 2, torch.zeros(2)))
    with pytest.raises(ValueError, match=r"key_map is one of 'elu'.*got 'favor'"):
        made(Hybrid(good.query_map, Map("favor")))
    with pytest.raises(ValueError, match=r"query_map: 'hedgehog' has weight \(3, 12, 12\) and bias None, got None"):
        made(Hybrid(Map("hedgehog"), good.key_map))
    with pytest.raises(ValueError, match=r"'elu' has weight None and bias None, got \(3, 12, 12\)"):
        made(Hybrid(Map("elu", good.key_map.weight), Map("elu")))
    with pytest.raises(ValueError, match=r"'t2r' of 12 and 'elu' of 12 features"):
        made(Hybrid(good.query_map, Map("elu")))
    with pytest.raises(ValueError, match=r"'t2r' of 12 and 't2r' of 5 features"):
        made(Hybrid(good.query_map, Map("t2r", torch.zeros(3, 12, 5))))
    with pytest.raises(ValueError, match=r"share keys of as many heads or of a divisor, got keys \(24, 36\)"):
        made(projections=Separate(*(projection(rows, 36) for rows in (36, 24, 24))))
    with pytest.raises(ValueError, match=r"Layer 0: values needs weight \(12, 36\)"):
        made(projections=Separate(*(projection(rows, 36) for rows in (36, 12, 36))))
    with pytest.raises(ValueError, match=r"share keys with Hybrid alone, got Softmax and 1 heads of keys for 3"):
        made(Softmax(), projections=separate(36, 3))
    with pytest.raises(ValueError, match=r"gate of the feed-forward part needs weight \(20, 36\)"):
        made(feed=block(36, 20, good).feed._replace(gate=projection(19, 36)))


def test_states_and_rotations_that_do_not_fit_are_refused():
    d = Decoder([block(36, 20, kind(attention(3, 12, 2, "hedgehog")))], heads=3)
    x, (ring,) = torch.randn(2, 36), d.states(2)
    turn = torch.zeros(1, 12)
    with pytest.raises(ValueError, match=r"Layer 0 is hybrid: its state is a Ring, got KeyValues"):
        d(x, [KeyValues(ring.keys, ring.values)])
    with pytest.raises(ValueError, match=r"\(2, 2\)\), got .*\(2, 3\).*neither batch nor window"):
        d(x, [Ring(ring.memory, ring.sums, ring.keys, ring.values, torch.zeros(2, 3, dtype=torch.bool))])
    with pytest.raises(ValueError, match=r"got .*torch.float32: neither batch nor window"):
        d(x, [Ring(ring.memory, ring.sums, ring.keys, ring.values, torch.zeros(2, 2))])
    with pytest.raises(ValueError, match=r"Layer 0 has 2 slots, from 0 on, got slot=2"):
        d(x, [Ring(ring.memory, ring.sums, ring.keys, ring.values, ring.real, 2)])
    with pytest.raises(ValueError, match=r"A rotation's sines are torch.float32 of .*got torch.float64"):
        d(x, [ring], rotation=(turn, turn.double()))
    with pytest.raises(ValueError, match=r"cosines are .*\(2 or 1, 12\).*got torch.float32 of \(3, 12\)"):
        d(x, [ring], rotation=(torch.zeros(3, 12), torch.zeros(3, 12)))
    odd = Decoder([block(9, 5, kind(attention(3, 3, 2, "hedgehog")))], heads=3)
    with pytest.raises(ValueError, match="need an even size, got 3"):
        odd(torch.randn(1, 9), odd.states(1), rotation=(torch.zeros(1, 3), torch.zeros(1, 3)))
