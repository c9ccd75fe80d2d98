"""Trained models on clusters: torch's, timm's and Hugging Face's attention found and replaced, nothing trained."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from eke.nn import Clustering, cluster_attention

EVERY = Clustering(clusters=5, topk=10**6, exact_below=0)
SOME = Clustering(clusters=5, topk=3, exact_below=0)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5).eval()


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


GENERATOR = torch.Generator().manual_seed(0)
CASES = {
    "torch": (encoder, torch.randn(3, 40, 32, generator=GENERATOR)),
    "timm": (vit, torch.randn(3, 3, 64, 64, generator=GENERATOR)),
    "transformers": (bert, {"input_ids": torch.randint(0, 50, (3, 40), generator=GENERATOR)}),
}


def run(model, batch):
    out = model(**batch)[0] if isinstance(batch, dict) else model(batch)
    return out.detach()


@pytest.mark.parametrize("case", CASES)
def test_models_run_on_clusters_and_are_themselves_where_all_keys_are_chosen(case):
    make, batch = CASES[case]
    model = make()
    expected = run(model, batch)
    same = cluster_attention(model, [batch], clustering=EVERY)
    assert len(same.layers) == 2
    assert same.left == ()
    torch.testing.assert_close(run(same.model, batch), expected, rtol=1e-4, atol=1e-4)
    found = cluster_attention(model, [batch], clustering=SOME)
    assert float((run(found.model, batch) - expected).abs().max()) > 1e-6
    assert set(found.model.state_dict()) == set(model.state_dict())
    assert torch.equal(run(model, batch), expected)  # the given model stays


@pytest.mark.parametrize("case", CASES)
def test_a_tolerance_chooses_for_each_head(case):
    make, batch = CASES[case]
    model = make()
    expected = run(model, batch)
    exact = cluster_attention(model, [batch], tolerance=0.0)
    torch.testing.assert_close(run(exact.model, batch), expected, rtol=1e-4, atol=1e-4)
    found = cluster_attention(model, [batch], tolerance=0.4)
    for layer in found.layers:
        assert len(layer.heads) == len(layer.clustering.clusters)
        assert all(choice.error <= 0.4 for choice in layer.heads)
    assert any(choice.clusters for layer in found.layers for choice in layer.heads)
    assert bool(run(found.model, batch).isfinite().all())


def test_padding_is_read():
    model, x = encoder(), CASES["torch"][1]
    hidden = torch.zeros(3, 40, dtype=torch.bool)
    hidden[0, 30:] = True
    expected = model(x, src_key_padding_mask=hidden).detach()
    found = cluster_attention(model, [x], clustering=EVERY).model(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(found[~hidden], expected[~hidden], rtol=1e-4, atol=1e-4)
    chosen = cluster_attention(
        model, [x], tolerance=0.3, forward=lambda model, batch: model(batch, src_key_padding_mask=hidden)
    )
    assert bool(chosen.model(x, src_key_padding_mask=hidden)[~hidden].isfinite().all())


def test_padding_of_another_sequence_hides_no_queries():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    x, memory, hidden = torch.randn(2, 20, 32), torch.randn(2, 20, 32), torch.zeros(2, 20, dtype=torch.bool)
    hidden[0, 12:] = True

    def call(net, batch):
        return net(batch, memory, memory_key_padding_mask=hidden)

    found = cluster_attention(model, [x], clustering=EVERY, forward=call)
    assert len(found.layers) == 2
    torch.testing.assert_close(call(found.model, x), call(model, x), rtol=1e-4, atol=1e-5)


def test_converted_models_train_and_are_copied():
    import copy

    model, x = encoder(), CASES["torch"][1]
    found = copy.deepcopy(cluster_attention(model, [x], clustering=SOME).model).train()
    found(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in found.parameters())
    assert "clusters=5, topk=3" in repr(found)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clustering": SOME, "tolerance": 0.1}, "Give a clustering or a tolerance, not both"),
        ({"tolerance": 3.0}, "0 to 2, got 3.0"),
        ({"match": "nothing"}, "match='nothing'"),
        ({"skip": ["layer.7"]}, "'layer.7'"),
    ],
)
def test_wrong_calls_are_refused(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        cluster_attention(encoder(), [CASES["torch"][1]], **options)


def test_empty_batches_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        cluster_attention(encoder(), iter(()))
