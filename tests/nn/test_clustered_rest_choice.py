"""Settings and layers whose unchosen keys are one key, and the choice of clusters by a tolerance for that rule."""

from __future__ import annotations

import re

import pytest
import torch

from eke.nn import Clustering, ImprovedClusteredAttention, choose_clusters, register_hf_attention
from eke.ops import clustered_attention
from eke.ops.clustered_attention import Asked, KMeans, reference

HEADS, DIM = 3, 8


def heads(length=60):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, HEADS, DIM, generator=generator, dtype=torch.float64) for _ in range(3))
    return q * torch.tensor([0.1, 1.0, 3.0]).view(1, 1, HEADS, 1), k, v


def distance(q, k, choice, head, mask=None):
    """Mean L1 distance of the rows of a head from the exact ones, computed anew."""
    q, k = (x[:, :, head : head + 1].transpose(1, 2) for x in (q, k))
    groups = KMeans()(Asked(q, k, [choice.clusters], mask, mask))
    centres = reference.means(q, groups, choice.clusters)
    found = reference.weights((q, k, centres), groups, topk=[choice.topk], mask=mask, scale=DIM**-0.5, key=True)
    exact = reference.exact(q, k, mask=mask, scale=DIM**-0.5)
    errors = (found - exact).abs().sum(-1)[groups >= 0]
    return float(errors.mean())


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_the_error_of_a_choice_is_that_of_the_rule_in_use_and_within_the_tolerance(tolerance, padding):
    q, k, _ = heads()
    mask = None
    if padding:
        mask = torch.ones(2, 60, dtype=torch.bool)
        mask[0, -padding:] = False
    setting, choices = choose_clusters(q, k, tolerance=tolerance, clusters=[2, 5, 20], rest="key", mask=mask)
    assert setting.rest == "key"
    for head, choice in enumerate(choices):
        assert choice.error <= tolerance
        assert (setting.clusters[head], setting.topk[head]) == (choice.clusters, choice.topk)
        if choice.clusters:
            assert choice.error == pytest.approx(distance(q, k, choice, head, mask), abs=1e-12)
    assert any(choice.clusters for choice in choices)


def test_no_smaller_power_of_two_was_within_the_tolerance():
    q, k, _ = heads()
    for tolerance in (0.05, 0.3):
        _, choices = choose_clusters(q, k, tolerance=tolerance, clusters=[5], rest="key")
        for head, choice in enumerate(choices):
            for topk in (n for n in (0, 1, 2, 4, 8, 16, 32) if choice.clusters and n < choice.topk):
                less = type(choice)(choice.clusters, topk, 0.0, 0.0)
                assert distance(q, k, less, head) > tolerance


def test_the_rule_is_the_published_one_unless_another_is_asked_for():
    q, k, _ = heads()
    assert Clustering().rest == "shared"
    assert choose_clusters(q, k, tolerance=0.3, clusters=[5])[0].rest == "shared"


def test_settings_and_layers_use_their_rule():
    q, k, v = heads()
    for rest in ("shared", "key"):
        found = Clustering(clusters=5, topk=4, exact_below=0, rest=rest)(q, k, v)
        expected = clustered_attention(q, k, v, clusters=5, topk=4, rest=rest)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    layer, outputs = ImprovedClusteredAttention(32, 4), {}
    for rest in ("shared", "key"):
        layer.clustering = Clustering(clusters=5, topk=4, exact_below=0, rest=rest)
        outputs[rest] = layer(x)
    assert not torch.allclose(outputs["shared"], outputs["key"], rtol=0, atol=1e-6)
    layer.clustering = Clustering(clusters=5, topk=40, exact_below=0, rest="key")
    whole = layer(x)
    layer.clustering = Clustering(exact_below=10**9)
    torch.testing.assert_close(whole, layer(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_hugging_face_models_run_with_it():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(0, 50, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, 41:] = 0
    model.set_attn_implementation("sdpa")
    expected = model(tokens, attention_mask=mask)[0][mask.bool()]
    for topk, near in ((60, True), (4, False)):
        register_hf_attention("eke_test_rest", Clustering(clusters=5, topk=topk, exact_below=0, rest="key"))
        model.set_attn_implementation("eke_test_rest")
        found = model(tokens, attention_mask=mask)[0][mask.bool()]
        assert (float((found - expected).abs().max()) < 1e-4) is near


@pytest.mark.parametrize(
    "call",
    [
        lambda: Clustering(rest="mean"),
        lambda: choose_clusters(*heads()[:2], tolerance=0.1, rest="mean"),
    ],
)
def test_unknown_rules_are_refused(call):
    with pytest.raises(ValueError, match=re.escape("rest is 'shared' or 'key', got 'mean'")):
        call()
