"""The language model in the form of transformers: generation with states equals reading everything again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from eke._errors import MissingExtraError
from eke.nn import generation_cache, hugging_face
from eke.nn.hugging_face import load_state, save_state, snapshot

logging.disable_progress_bar()
KINDS = {
    "linear": ["linear_attention"] * 2,
    "softmax": ["full_attention"] * 2,
    "hybrid": ["linear_attention", "sliding_attention", "full_attention"],
    "window first": ["sliding_attention", "linear_attention"],
}


def model(kinds, **options):
    torch.manual_seed(0)
    config = hugging_face.LinearTransformerConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=len(kinds), num_attention_heads=2, intermediate_size=24,
        layer_types=kinds, sliding_window=4, initializer_range=0.4, pad_token_id=0, **options,
    )  # fmt: skip
    return hugging_face.LinearTransformerForCausalLM(config).eval()


def prompt(batch=2, length=6):
    return torch.randint(1, 20, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=KINDS)
def kinds(request):
    return KINDS[request.param]


@pytest.mark.parametrize("positions", [None, 40])
def test_greedy_generation_is_the_best_token_of_the_whole_text(kinds, positions):
    net, text = model(kinds, max_position_embeddings=positions), prompt()
    found = net.generate(text, max_new_tokens=12, do_sample=False)
    assert net._fused is not None  # by the native step
    with torch.no_grad():
        for _ in range(12):
            text = torch.cat([text, net(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text)


@torch.no_grad()
def test_steps_agree_with_the_whole_text(kinds):
    net, text = model(kinds), prompt(3, 15)
    whole = net(text).logits
    cache = net(text[:, :5]).past_key_values
    chunk = net(text[:, 5:8], past_key_values=cache).logits  # several at once, on top of a cache
    steps = [net(text[:, t : t + 1], past_key_values=cache).logits for t in range(8, 15)]
    torch.testing.assert_close(torch.cat([chunk, *steps], 1), whole[:, 5:], rtol=1e-4, atol=1e-4)


def test_beams_give_what_they_give_without_a_cache(kinds):
    net, text = model(kinds), prompt()
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    assert torch.equal(net.generate(text, **options), net.generate(text, use_cache=False, **options))


def test_sampling_draws_the_same_with_and_without_a_cache(kinds):
    net, text, found = model(kinds), prompt(), []
    for cache in (True, False):
        torch.manual_seed(3)
        found.append(net.generate(text, max_new_tokens=10, do_sample=True, top_k=5, use_cache=cache))
    assert torch.equal(*found)


@pytest.mark.parametrize("positions", [None, 40])
def test_padding_on_the_left_changes_nothing(kinds, positions):
    net, text = model(kinds, max_position_embeddings=positions), prompt()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), text], 1)
    padded[1, :3] = 5  # the second sequence is longer
    mask = torch.ones_like(padded)
    mask[0, :3] = mask[1, :1] = 0
    found = net.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, start in ((0, 3), (1, 1)):
        alone = net.generate(padded[row : row + 1, start:], max_new_tokens=10, do_sample=False)
        assert torch.equal(found[row, start:], alone[0])


@torch.no_grad()
def test_padding_in_the_middle_takes_the_long_way(kinds):
    net, text = model(kinds), prompt(1, 8)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    cache = net(text[:, :7], attention_mask=mask[:, :7]).past_key_values
    found = net(text[:, 7:], attention_mask=mask, past_key_values=cache).logits
    whole = net(text, attention_mask=mask).logits[:, -1:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_the_memory_of_linear_layers_is_constant():
    net, text = model(KINDS["linear"]), prompt()
    cache = net(text).past_key_values
    before = [x.data_ptr() for layer in cache.layers for x in layer.state()]
    numbers = sum(x.numel() for layer in cache.layers for x in layer.state())
    net.generate(torch.cat([text, text[:, :1]], 1), past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert cache.get_seq_length() == 7 + 29
    assert [x.data_ptr() for layer in cache.layers for x in layer.state()] == before
    assert numbers == 2 * 2 * (2 * 8 * 8 + 2 * 8)


def test_the_memory_of_windows_is_bounded():
    net = model(["sliding_attention"])
    cache = generation_cache.new_cache(net.config)
    net.generate(prompt(), past_key_values=cache, max_new_tokens=300, do_sample=False)
    assert cache.layers[0].room[0].shape[2] <= 64
    assert cache.layers[0].keys.shape[2] == 3


@torch.no_grad()
def test_a_prefix_is_read_once_and_continued_often(kinds, tmp_path):
    net, text = model(kinds), prompt(1, 9)
    cache = net(text[:, :7]).past_key_values
    right = net.generate(text, max_new_tokens=5, do_sample=False)
    assert torch.equal(net.generate(text, past_key_values=snapshot(cache), max_new_tokens=5, do_sample=False), right)
    many = snapshot(cache, copies=3)
    several = net.generate(text.expand(3, -1), past_key_values=many, max_new_tokens=5, do_sample=False)
    assert torch.equal(several, right.expand(3, -1))
    save_state(cache, tmp_path / "prefix.safetensors")
    loaded = load_state(tmp_path / "prefix.safetensors", net.config)
    assert torch.equal(net.generate(text, past_key_values=loaded, max_new_tokens=5, do_sample=False), right)
    assert cache.get_seq_length() == 7


@torch.no_grad()
def test_caches_are_cut_and_selected_by_batch(kinds):
    net, text = model(kinds), prompt(3, 8)
    cache = net(text[:, :7]).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    found = net(text[[2, 0], 7:], past_key_values=cache).logits
    torch.testing.assert_close(found, net(text[[2, 0]]).logits[:, 7:], rtol=1e-4, atol=1e-4)
    cache.reset()
    again = net(text, past_key_values=cache).logits
    torch.testing.assert_close(again, net(text).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_keys_can_be_cropped_and_windows_cannot():
    net, text = model(["full_attention"]), prompt(1, 8)
    cache = net(text).past_key_values
    cache.crop(-3)
    torch.testing.assert_close(
        net(text[:, 5:], past_key_values=cache).logits, net(text).logits[:, 5:], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="negative, and windows cannot: got 2"):
        cache.crop(2)
    windows = model(["sliding_attention"])(text).past_key_values
    with pytest.raises(ValueError, match="negative, and windows cannot: got -1"):
        windows.crop(-1)


def test_models_are_saved_and_loaded(kinds, tmp_path):
    net, text = model(kinds, decay="scalar"), prompt()
    net.save_pretrained(tmp_path)
    for kind in (hugging_face.LinearTransformerForCausalLM, AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.config.layer_types == kinds
        assert torch.equal(loaded(text).logits, net(text).logits)


def test_tied_embeddings_stay_tied(tmp_path):
    net = model(KINDS["linear"], tie_word_embeddings=True)
    assert net.head.weight is net.embedding.weight
    net.save_pretrained(tmp_path)
    loaded = hugging_face.LinearTransformerForCausalLM.from_pretrained(tmp_path)
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.generate(prompt(), max_new_tokens=5), net.generate(prompt(), max_new_tokens=5))


def test_models_are_copied_and_pickled_after_generating():
    net, text = model(KINDS["hybrid"]), prompt()
    right = net.generate(text, max_new_tokens=5, do_sample=False)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other.generate(text, max_new_tokens=5, do_sample=False), right)
        with torch.no_grad():
            other.head.weight.zero_()
    assert torch.equal(net.generate(text, max_new_tokens=5, do_sample=False), right)


@torch.no_grad()
def test_hooks_see_every_token():
    net, seen = model(KINDS["linear"]), []
    net.generate(prompt(), max_new_tokens=3, do_sample=False)
    net.blocks[0].up.register_forward_hook(lambda *_: seen.append(1))
    net.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert len(seen) == 4


def test_losses_train(kinds):
    net, text = model(kinds).train(), prompt()
    out = net(text, labels=text)
    assert out.past_key_values is None
    logits = out.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, text[:, 1:].flatten()))
    out.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_prompts_read_in_pieces_give_the_same(kinds):
    net, text = model(kinds), prompt(2, 11)
    right = net.generate(text, max_new_tokens=6, do_sample=False)
    assert torch.equal(net.generate(text, max_new_tokens=6, do_sample=False, prefill_chunk_size=4), right)


def test_several_samples_of_one_prompt_differ(kinds):
    torch.manual_seed(0)
    found = model(kinds).generate(prompt(1), max_new_tokens=12, do_sample=True, num_return_sequences=4)
    assert found.shape == (4, 18)
    assert len({tuple(row.tolist()) for row in found}) > 1


@torch.no_grad()
def test_an_empty_cache_of_transformers_is_taken(kinds):
    net, text = model(kinds), prompt()
    for cache in (DynamicCache(), DynamicCache(config=net.config)):
        found = net(text, past_key_values=cache)
        assert found.past_key_values is cache
        assert cache.get_seq_length() == 6
        step = net(text[:, :1], past_key_values=cache).logits
        torch.testing.assert_close(step, net(torch.cat([text, text[:, :1]], 1)).logits[:, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_embedded_inputs_and_the_last_logits_alone(kinds):
    net, text = model(kinds, max_position_embeddings=20), prompt()
    whole = net(text).logits
    torch.testing.assert_close(net(inputs_embeds=net.embedding(text)).logits, whole)
    last = net(text, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:])


@torch.no_grad()
def test_keys_keep_their_place_when_memory_grows():
    net, text = model(["full_attention"]), prompt(1, 150)
    cache, found = generation_cache.new_cache(net.config), []
    for t in range(150):
        found.append(net(text[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), net(text).logits, rtol=1e-3, atol=1e-3)
    assert cache.layers[0].room[0].shape[2] < 2 * 150 + 2


@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other(kinds):
    net, text = model(kinds), prompt(3, 6)
    cache, alone = net(text).past_key_values, net(text[1:2]).past_key_values
    for t in range(4):
        both = net(text[:, t : t + 1], past_key_values=cache).logits
        one = net(text[1:2, t : t + 1], past_key_values=alone).logits
        torch.testing.assert_close(both[1:2], one, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changes_of_weights_between_tokens_count():
    net, text = model(KINDS["hybrid"]), prompt()
    caches = [net(text).past_key_values for _ in range(2)]
    before = net(text[:, :1], past_key_values=caches[0]).logits
    net.blocks[0].down.weight.data.mul_(1.5)
    after = net(text[:, :1], past_key_values=caches[1]).logits
    assert float((before - after).abs().max()) > 1e-3


def test_bfloat16_generates_by_the_long_way():
    net = model(KINDS["hybrid"]).bfloat16()
    assert net.generate(prompt(), max_new_tokens=3, do_sample=False).shape == (2, 9)
    assert net._fused is None


@torch.no_grad()
def test_bad_input_is_refused(tmp_path):
    net, text = model(KINDS["hybrid"], max_position_embeddings=8), prompt()
    cache = net(text).past_key_values
    with pytest.raises(ValueError, match=r"stands for 2 sequences and the input for 1.*batch may not change.*snapshot"):
        net(text[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"\(batch, positions\) = \(2, 7\), got \(2, 1\).*Masks of pairs"):
        net(text[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"got \(2, 1, 6, 6\)"):
        net(text, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match="Position 8 is beyond the 8"):
        net(torch.cat([text, text], 1)[:, :9])
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds, got neither"):
        net()
    with pytest.raises(ValueError, match="got both"):
        net(text, inputs_embeds=net.embedding(text))
    with pytest.raises(ValueError, match=r"has read 6 positions and the input has 6.*one token more"):
        net.generate(text, past_key_values=cache)
    with pytest.raises(ValueError, match="copies is a positive number, got 0"):
        snapshot(cache, copies=0)
    with pytest.raises(NotImplementedError, match="RecurrentLayer keeps a state"):
        cache.update(text, text, 0)
    foreign = DynamicCache()
    foreign.update(torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8), 0)
    with pytest.raises(ValueError, match="cannot go on from DynamicCache with layers"):
        net(text, past_key_values=foreign)
    with pytest.raises(ValueError, match="DynamicCache is empty"):
        save_state(generation_cache.new_cache(net.config), tmp_path / "x")
    save_state(cache, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"state of another model: it holds 0.memory.*2 heads of 8"):
        load_state(tmp_path / "state.safetensors", model(KINDS["linear"]).config)
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no state"):
        load_state(tmp_path / "model.safetensors", net.config)


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match=r"layer_types names one of .* 2 layers, got \['lsh', 'lsh'\]"):
        hugging_face.LinearTransformerConfig(num_hidden_layers=2, layer_types=["lsh"] * 2)
    with pytest.raises(ValueError, match="need a sliding_window"):
        hugging_face.LinearTransformerConfig(num_hidden_layers=1, layer_types=["sliding_attention"])
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        hugging_face.Other  # noqa: B018


def test_an_old_transformers_is_named(monkeypatch):
    from transformers import cache_utils

    generation_cache._library.cache_clear()
    monkeypatch.delattr(cache_utils, "LinearAttentionLayer")
    try:
        with pytest.raises(MissingExtraError, match=r"states for linear attention .*found \d"):
            generation_cache._library()
    finally:
        generation_cache._library.cache_clear()
