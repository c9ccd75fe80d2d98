"""Layers of clustered attention, their place in Hugging Face models, and the choice of clusters by a tolerance."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from eke.nn import (
    ClusteredAttention,
    Clustering,
    ImprovedClusteredAttention,
    choose_clusters,
    register_hf_attention,
)
from eke.nn.cluster_choice import row_errors
from eke.ops.clustered_attention import Asked, Hamming, KMeans, reference
from eke.ops.clustered_attention.break_even import pays

ALWAYS = Clustering(clusters=6, topk=8, exact_below=0)


def inputs(length=40, size=32):
    return torch.randn(2, length, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer(kind=ImprovedClusteredAttention, **options):
    torch.manual_seed(0)
    return kind(32, 4, **{"clustering": ALWAYS, **options}).double()


def exact(made, x, **options):
    made.clustering = Clustering(exact_below=10**9)
    return made(x, **options)


def test_names_say_what_is_improved():
    assert ClusteredAttention(32, 4).clustering == Clustering(clusters=100, topk=0)
    assert ImprovedClusteredAttention(32, 4).clustering == Clustering(clusters=100, topk=32)
    assert "clusters=100, topk=32" in repr(ImprovedClusteredAttention(32, 4))


@pytest.mark.parametrize("causal", [False, True])
def test_all_keys_make_layers_exact(causal):
    made, x = layer(clustering=Clustering(clusters=6, topk=40, exact_below=0), causal=causal), inputs()
    out = made(x)
    torch.testing.assert_close(out, exact(made, x), rtol=0, atol=1e-12)


def test_short_inputs_and_heads_of_zero_clusters_are_exact():
    made, x = layer(clustering=Clustering()), inputs()
    assert not pays((40, 40, 16), clusters=40, topk=32)
    torch.testing.assert_close(made(x), exact(made, x), rtol=0, atol=1e-12)
    q, k, v = (torch.randn(2, 40, 4, 8, dtype=torch.float64) for _ in range(3))
    mixed = Clustering(clusters=(0, 5, 0, 7), topk=(0, 3, 0, 0), exact_below=0)(q, k, v)
    whole = Clustering(exact_below=10**9)(q, k, v)
    shared = Clustering(clusters=(5, 7), topk=(3, 0), exact_below=0)(q[:, :, 1::2], k[:, :, 1::2], v[:, :, 1::2])
    torch.testing.assert_close(mixed[:, :, 0::2], whole[:, :, 0::2], rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed[:, :, 1::2], shared, rtol=0, atol=1e-12)


def test_long_inputs_pay():
    assert pays((8192, 8192, 128), clusters=128, topk=32)
    assert pays((8192, 8192, 128), clusters=64, topk=32, causal=True)
    assert not pays((8192, 8192, 128), clusters=8192, topk=32)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal):
    made, x = layer(causal=causal), inputs()
    if causal:
        made.clustering = Clustering(exact_below=0)  # with a mask causal layers are exact
        expected = exact(made, x)
    else:
        expected = made(x)
    padded = torch.cat([x, torch.randn(2, 7, 32, dtype=torch.float64)], 1)
    mask = torch.arange(47).expand(2, -1) < 40
    torch.testing.assert_close(made(padded, mask=mask)[:, :40], expected, rtol=0, atol=1e-10)


def test_contexts_and_starts():
    made, x = layer(), inputs()
    torch.testing.assert_close(made(x, context=x), made(x), rtol=0, atol=1e-12)
    assert made(x, context=inputs(9)).shape == x.shape
    start = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    assert made(x, start=start).shape == x.shape


def test_layers_train():
    made = layer().train()
    made(inputs()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("setting", [Clustering(), ALWAYS])
def test_fewer_causal_queries_than_keys_are_the_last_positions(setting, masked):
    q, k, v = (torch.randn(2, 40, 4, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(40).expand(2, -1) >= 7 if masked else None
    whole = Clustering(exact_below=10**9)(q, k, v, causal=True, mask=mask)
    for last in (1, 5):
        found = setting(q[:, -last:], k, v, causal=True, mask=mask)
        torch.testing.assert_close(found, whole[:, -last:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ClusteredAttention(30, 4), "embed_dim must be a multiple of num_heads, got 30 and 4"),
        (lambda: layer()(inputs()[0]), "takes (batch, length, 32), got (40, 32)"),
        (lambda: layer(causal=True)(inputs(), context=inputs()), "it takes no context"),
        (
            lambda: ALWAYS(torch.zeros(1, 9, 2, 4), *2 * [torch.zeros(1, 5, 2, 4)], causal=True),
            "at least as many keys as queries, got 5 and 9",
        ),
        (
            lambda: Clustering(clusters=-1),
            "Clustering.clusters is an integer >= 0 or a tuple of them, one a head, got -1",
        ),
        (
            lambda: Clustering(topk=(1, -2)),
            "Clustering.topk is an integer >= 0 or a tuple of them, one a head, got (1, -2)",
        ),
        (lambda: Clustering(exact_below=-1), "Clustering.exact_below is a length >= 0 or None, got -1"),
        (
            lambda: layer(clustering=Clustering(clusters=(3, 3)))(inputs()),
            "has 2 numbers, the attention 4 heads: (3, 3)",
        ),
        (lambda: choose_clusters(*2 * [torch.zeros(1, 9, 2, 4)], tolerance=3.0), "0 to 2, got 3.0"),
        (
            lambda: choose_clusters(*2 * [torch.zeros(1, 9, 2, 4)], tolerance=1, clusters=[50]),
            "1 to the length 9, got [50]",
        ),
    ],
)
def test_wrong_calls_are_refused(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


# The choice by a tolerance


def heads(length=60):
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, length, 3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return q * torch.tensor([0.3, 1.5, 6.0]).view(1, 1, 3, 1), k


def test_errors_of_all_k_at_once_are_those_of_the_rows():
    q, k = (x.transpose(1, 2) for x in heads())
    mask = torch.arange(60).expand(2, -1) < torch.tensor([[60], [45]])
    groups = KMeans()(Asked(q, k, [5] * 3, mask, mask))
    found = row_errors(q, k, groups, clusters=5, mask=mask, scale=0.4)
    centres, whole = reference.means(q, groups, 5), reference.exact(q, k, mask=mask, scale=0.4)
    for topk in (0, 1, 7, 60):
        rows = reference.weights((q, k, centres), groups, topk=[topk] * 3, mask=mask, scale=0.4)
        expected = (rows - whole).abs().sum(-1) * (groups >= 0)
        torch.testing.assert_close(found[..., topk], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tolerance", [0.02, 0.2, 0.5])
def test_chosen_clusters_stay_within_the_tolerance_with_the_least_k(tolerance):
    q, k = heads()
    setting, choices = choose_clusters(q, k, tolerance=tolerance, clusters=[2, 5, 20, 60])
    for head, choice in enumerate(choices):
        assert choice.error <= tolerance
        assert choice.error <= choice.bound + 1e-12
        if choice.clusters:
            part = [x[:, :, head : head + 1].transpose(1, 2) for x in (q, k)]
            groups = KMeans()(Asked(*part, [choice.clusters]))
            centres = reference.means(part[0], groups, choice.clusters)
            whole = reference.exact(*part, mask=None, scale=6**-0.5)
            for topk, value in ((choice.topk, choice.error), (choice.topk - 1, None)):
                if topk < 0:
                    continue
                rows = reference.weights((*part, centres), groups, topk=[topk], mask=None, scale=6**-0.5)
                error = float((rows - whole).abs().sum(-1).mean())
                assert error == pytest.approx(value) if value is not None else error > tolerance
    assert setting.clusters == tuple(c.clusters for c in choices)
    assert setting(q, k, k).shape == k.shape


def test_larger_tolerances_cost_no_more():
    q, k = heads()
    costs = []
    for tolerance in (0.0, 0.02, 0.1, 0.3, 1.0, 2.0):
        _, choices = choose_clusters(q, k, tolerance=tolerance, clusters=[2, 5, 20, 60])
        costs.append([c.clusters * 120 + 60 * c.topk if c.clusters else 3600 for c in choices])
    for less, more in itertools.pairwise(costs):
        assert all(b <= a for a, b in zip(less, more))
    assert costs[-1] == [240] * 3


def test_nothing_cheaper_than_exact_is_exact():
    q, k = heads()
    setting, choices = choose_clusters(q, k, tolerance=0.0)
    assert all(choice.clusters == 0 and choice.error == 0 for choice in choices)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)))
    torch.testing.assert_close(setting(q, k, k), expected.transpose(1, 2), rtol=0, atol=1e-12)


# Hugging Face


def bert(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        attention_probs_dropout_prob=0.0, initializer_range=0.3, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def llama(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, initializer_range=0.3, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = torch.randint(0, 50, (2, 60), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_models_run_on_clusters_and_are_themselves_where_all_keys_are_chosen():
    register_hf_attention("eke_test_whole", Clustering(clusters=5, topk=60, exact_below=0))
    register_hf_attention("eke_test", Clustering(clusters=5, topk=4, exact_below=0))
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, 41:] = 0
    for model in (bert(), llama()):
        for given in (None, mask):
            model.set_attn_implementation("sdpa")
            expected = model(TOKENS, attention_mask=given)[0]
            model.set_attn_implementation("eke_test_whole")
            same = model(TOKENS, attention_mask=given)[0]
            real = slice(None) if given is None else mask.bool()
            torch.testing.assert_close(same[real], expected[real], rtol=1e-5, atol=1e-5)  # values to 10, float32
            model.set_attn_implementation("eke_test")
            found = model(TOKENS, attention_mask=given)[0]
            assert float((found - expected)[real].abs().max()) > 1e-3


@torch.no_grad()
def test_generation_with_a_cache_and_left_padding_is_exact():
    register_hf_attention("eke_test", Clustering(clusters=5, topk=60, exact_below=0))
    model = llama()
    model.set_attn_implementation("sdpa")
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :11] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(TOKENS, **options)
    model.set_attn_implementation("eke_test")
    assert torch.equal(model.generate(TOKENS, **options), expected)


@torch.no_grad()
def test_layers_have_settings_of_their_own():
    model = bert()
    second = model.encoder.layer[1].attention.self
    register_hf_attention("eke_test", Clustering(exact_below=10**9), layers={second: Clustering(3, 0, exact_below=0)})
    model.set_attn_implementation("sdpa")
    first, expected = (model(TOKENS, output_hidden_states=True).hidden_states[i] for i in (1, 2))
    model.set_attn_implementation("eke_test")
    found = model(TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[1], first, rtol=0, atol=1e-5)
    assert float((found[2] - expected).abs().max()) > 1e-4


def test_models_are_fine_tuned_on_clusters():
    register_hf_attention("eke_test", Clustering(clusters=5, topk=4, exact_below=0, clusterer=Hamming()))
    model = bert(hidden_dropout_prob=0.0).train()
    model.set_attn_implementation("eke_test")
    model(TOKENS)[0].square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    model.encoder.layer[0].attention.self.dropout.p = 0.1
    with pytest.raises(ValueError, match=r"has no dropout of weights, got 0\.1"):
        model(TOKENS)


def test_what_transformers_asks_for_is_read_or_refused():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="must not be one of transformers' own attentions, got 'sdpa'"):
        register_hf_attention("sdpa", Clustering())
    register_hf_attention("eke_test", Clustering(exact_below=0))
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=32, sliding_window=8,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    model.set_attn_implementation("eke_test")
    with pytest.raises(ValueError, match="no windows, chunks or packed sequences"):
        model(TOKENS)
    model = bert()
    model.set_attn_implementation("eke_test")
    with pytest.raises(ValueError, match="reads padding, a bool mask"):
        model(TOKENS, attention_mask=torch.zeros(2, 1, 60, 60))
