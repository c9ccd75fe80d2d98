"""Linear attention against code of others, where it is installed, and steps in half precision against float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from eke.ops import linear_attention
from eke.ops.decode import Block, Decoder, Feed, Linear, Norm, Projection


def inputs(length=80, heads=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, length, heads, size, generator=generator) for _ in range(3))


def gates(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def close(found, right, tolerance=1e-5):
    assert float((found - right).abs().max()) <= tolerance * float(right.abs().max())


@pytest.mark.slow  # importing the model takes longer than the test
@pytest.mark.parametrize("rule", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_the_gated_delta_rule_is_that_of_transformers(rule, form):
    oracle = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    if not hasattr(oracle, rule):
        pytest.skip(f"this version of transformers has no {rule}")
    q, k, v = inputs()
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    log_decay, beta = -gates(2, 80, 3), gates(2, 80, 3)
    right, last = getattr(oracle, rule)(q, k, v, log_decay, beta, initial_state=None, output_final_state=True)
    found, state = linear_attention(q, k, v, causal=True, feature_map=None, decay=log_decay.exp(), beta=beta, form=form)
    close(found / q.shape[-1] ** 0.5, right)  # theirs divides queries
    close(state.memory, last)


def naive(name):
    """Return a file of flash-linear-attention without its package, whose import needs a GPU's compiler."""
    spec = importlib.util.find_spec("fla")
    places = (
        [] if spec is None else [Path(p) / "ops" / name / "naive.py" for p in spec.submodule_search_locations or []]
    )
    path = next((p for p in places if p.exists()), None)
    if path is None:
        pytest.skip("flash-linear-attention is not installed")
    made = importlib.util.spec_from_file_location(f"naive_{name}", path)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def test_plain_attention_is_that_of_flash_linear_attention():
    q, k, v = inputs(128)
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    found, _ = linear_attention(q, k, v, causal=True, feature_map=None, normalize=True)
    module = naive("linear_attn")
    close(found, module.naive_recurrent_linear_attn(q, k, v, scale=1.0, normalize=True)[0])
    close(found, module.naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=True))


def test_gates_are_those_of_flash_linear_attention():
    q, k, v = inputs()
    vector, scalar = -gates(2, 80, 3, 8), -gates(2, 80, 3)
    found, _ = linear_attention(q, k, v, causal=True, feature_map=None, decay=vector.exp())
    close(found * 8**-0.5, naive("gla").naive_recurrent_gla(q, k, v, vector)[0])
    found, _ = linear_attention(q, k, v, causal=True, feature_map=None, decay=scalar.exp())
    close(found * 8**-0.5, naive("simple_gla").naive_recurrent_simple_gla(q, k, v, scalar)[0])


def test_the_gated_delta_rule_is_that_of_flash_linear_attention():
    q, k, v = inputs()
    k, scalar, beta = functional.normalize(k, dim=-1), -gates(2, 80, 3), gates(2, 80, 3)
    found, _ = linear_attention(q, k, v, causal=True, feature_map=None, decay=scalar.exp(), beta=beta)
    close(found * 8**-0.5, naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, k, v, beta, scalar)[0])


def test_steps_of_a_bfloat16_network_stay_near_float64():
    torch.manual_seed(0)
    width, heads = 32, 2

    def part(rows, columns):
        return Projection(torch.randn(rows, columns, dtype=torch.float64) / columns**0.5)

    def cast(block, dtype):
        feed = Feed(
            Norm("layer"), Projection(block.feed.up.weight.to(dtype)), Projection(block.feed.down.weight.to(dtype))
        )
        return Block(
            Norm("layer"),
            Projection(block.projections.weight.to(dtype)),
            Linear(),
            Projection(block.out.weight.to(dtype)),
            feed,
        )

    block = Block(
        Norm("layer"),
        part(3 * width, width),
        Linear(),
        part(width, width),
        Feed(Norm("layer"), part(64, width), part(width, 64)),
    )
    half = cast(block, torch.bfloat16)
    low, high = Decoder([half], heads=heads), Decoder([cast(half, torch.float64)], heads=heads)
    states, exact = low.states(3), high.states(3)
    assert states[0].memory.dtype == torch.float32
    errors = []
    for _ in range(200):
        x = torch.randn(3, width).bfloat16()
        errors.append((low(x, states).double() - high(x.double(), exact)).abs().max())
    torch.testing.assert_close(
        states[0].memory.double(), exact[0].memory, rtol=0, atol=0.02 * float(exact[0].memory.abs().max())
    )
    assert float(torch.stack(errors).max()) < 0.1  # a few roundings of numbers up to 4
