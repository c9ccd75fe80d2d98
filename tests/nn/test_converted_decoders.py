"""Converted Hugging Face and timm models: found, kept, generating from states as from all keys."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from eke.nn import Clustering, attention_sites, cluster_attention, linearize, recurrent_cache

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")


def gpt2(**settings: object) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=128, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, **settings,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """Rotations, and two heads for each key head."""
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=32,
        vocab_size=64, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=64
    )
    return transformers.BertModel(config)


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=2, num_classes=5
    )


def drawn(make) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def tokens(left: int = 0, right: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[0, :left] = 0
    mask[1, 24 - right :] = 0
    return {"input_ids": torch.randint(1, 64, (3, 24)), "attention_mask": mask}


def output(model: nn.Module, batch: object) -> Tensor:
    with torch.no_grad():
        found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize(
    ("make", "batch", "causal"),
    [
        (gpt2, tokens(), True), (gpt2, tokens(left=5), True), (llama, tokens(), True), (llama, tokens(left=5), True),
        (llama, tokens(right=7), True), (bert, tokens(right=7), False), (vit, torch.randn(2, 3, 32, 32), False),
    ],
    ids=["gpt2", "gpt2 padded", "llama", "llama padded left", "llama padded right", "bert padded", "vit"],
)  # fmt: skip
def test_models_are_found_and_kept_where_the_window_is_wide(make, batch, causal):
    model = drawn(make)
    sites = attention_sites(model, batch)
    assert len(sites) == 2
    assert all(site.reason is None and site.causal is causal for site in sites)
    found = linearize(model, [batch], window=32, steps=0)
    ours, theirs = output(found.model, batch), output(model, batch)
    if isinstance(batch, dict):
        real = batch["attention_mask"].bool()
        ours, theirs = ours[real], theirs[real]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    near = linearize(model, [batch], window=4, steps=3, learning_rate=3e-2)
    assert all(layer.error < layer.error_before for layer in near.layers)


def test_attention_computed_by_hand_is_set_to_the_fused_one():
    model = drawn(lambda: gpt2(attn_implementation="eager"))
    found = linearize(model, [tokens()], window=32, steps=0)
    assert len(found.layers) == 2
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(output(found.model, tokens()), output(model, tokens()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("left", [0, 5])
def test_states_generate_what_keys_generate(make, left):
    batch = tokens(left=left)
    model = linearize(drawn(make), [batch], window=6, steps=2).model
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        given = {**batch, **settings, "max_new_tokens": 12}
        cache = recurrent_cache(model)
        ours = model.generate(**given, past_key_values=cache)
        assert torch.equal(ours, model.generate(**given, use_cache=False))
        assert torch.equal(ours, model.generate(**given))
    state = cache.layers[0].state
    assert state.near_keys.shape[2] == 6
    assert cache.get_seq_length() == 35


def test_some_layers_may_keep_their_keys():
    batch = tokens()
    found = linearize(drawn(llama), [batch], window=6, steps=0, match="layers.1")
    assert [layer.name for layer in found.layers] == ["model.layers.1.self_attn"]
    given = {**batch, "max_new_tokens": 8, "do_sample": False}
    ours = found.model.generate(**given, past_key_values=recurrent_cache(found.model))
    assert torch.equal(ours, found.model.generate(**given, use_cache=False))


def test_a_text_is_read_in_pieces():
    ids = tokens()["input_ids"]
    model = linearize(drawn(llama), [ids], window=6, steps=0).model
    cache = recurrent_cache(model)
    with torch.no_grad():
        pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 10), (10, 17), (17, 24))]
    torch.testing.assert_close(torch.cat(pieces, 1), output(model, {"input_ids": ids}), rtol=1e-3, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].state is None


def test_beams_take_their_states_along():
    ids = tokens()["input_ids"]
    model = linearize(drawn(llama), [ids], window=6, steps=0).model
    cache = recurrent_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    kept = cache.layers[0].state
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[0].state.memory, kept.memory[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].state.real.shape[0] == 6
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(cache.layers[0].state.keys, kept.keys[[2]])
    with pytest.raises(ValueError, match="A recurrent state of 24 positions cannot be cropped"):
        cache.layers[0].crop(-1)


def test_a_cache_needs_a_converted_decoder():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has 0 converted attentions"):
        recurrent_cache(gpt2())
    converted = linearize(drawn(bert), [tokens()], window=4, steps=0).model
    with pytest.raises(ValueError, match="BertModel has 2 converted attentions and none that is causal"):
        recurrent_cache(converted)


def test_a_converted_model_is_copied_and_loaded():
    batch = tokens()
    found = linearize(drawn(llama), [batch], window=4, steps=2)
    torch.testing.assert_close(output(copy.deepcopy(found.model), batch), output(found.model, batch), rtol=0, atol=0)
    again = linearize(drawn(llama), [batch], window=4, steps=0, seed=5).model
    again.load_state_dict(found.model.state_dict())
    assert torch.equal(output(again, batch), output(found.model, batch))


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("left", [0, 5])
@pytest.mark.parametrize("clustering", [Clustering(), Clustering(clusters=5, topk=10**6, exact_below=0)])
def test_clustered_decoders_generate_with_keys_as_without(make, left, clustering):
    batch, model = tokens(left=left), drawn(make)
    found = cluster_attention(model, [batch], clustering=clustering).model
    given = {**batch, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**given)
    assert torch.equal(found.generate(**given), expected)
    assert torch.equal(found.generate(**given, use_cache=False), expected)
    with pytest.raises(ValueError, match="Clustered ones have no state and generate with the usual cache"):
        recurrent_cache(found)
