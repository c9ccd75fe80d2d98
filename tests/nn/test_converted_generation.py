"""Converted models generate by the native step: equal to reading everything again, whatever happens to their states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

from eke.nn import (
    T2R,
    HybridState,
    TransformerBlock,
    fuse,
    fused_step,
    hf_decoder,
    hugging_face,
    linearize,
    recurrent_cache,
)
from eke.nn.hugging_face import converted, load_state, save_state, snapshot
from eke.ops.decode import native

needs_kernel = pytest.mark.skipif(not native.available(), reason="needs the compiled kernel")
MAPS = {
    "elu": "elu", "relu": "relu", "t2r": "t2r", "hedgehog": "hedgehog", "narrow": lambda heads, dim: T2R(heads, dim, 5),
}  # fmt: skip


def drawn(net: nn.Module) -> nn.Module:
    """A converted model whose maps and balances are not those it begins with."""
    torch.manual_seed(5)
    for name, parameter in net.named_parameters():
        if ".linear." in name:
            parameter.data.add_(torch.randn_like(parameter) / 5)
    return net


def text(batch=2, length=6, seed=1):
    return torch.randint(1, 20, (batch, length), generator=torch.Generator().manual_seed(seed))


def own(kinds, window=4, feature_map="hedgehog", **options):
    """A converted model of eke."""
    torch.manual_seed(0)
    config = hugging_face.LinearTransformerConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=len(kinds), num_attention_heads=2, intermediate_size=24,
        layer_types=kinds, sliding_window=4, initializer_range=0.4, pad_token_id=0, **options,
    )  # fmt: skip
    net = hugging_face.LinearTransformerForCausalLM(config).eval()
    return drawn(linearize(net, [text(3, 12)], window=window, steps=0, feature_map=feature_map).model)


def llama(window=4, feature_map="hedgehog", **options):
    """A converted Llama."""
    torch.manual_seed(0)
    settings = {"num_key_value_heads": 2, "hidden_act": "silu", **options}
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=24, vocab_size=20,
        bos_token_id=0, eos_token_id=None, pad_token_id=0, initializer_range=0.3, **settings,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).eval()
    return drawn(linearize(net, [text(3, 12)], window=window, steps=0, feature_map=feature_map).model)


@pytest.fixture
def steps(monkeypatch):
    """How many tokens the native step took."""
    found = []
    call = native.Native.__call__

    def counted(self, *args, **kwargs):
        found.append(1)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(native.Native, "__call__", counted)
    return found


KINDS = {
    "all": ["full_attention"] * 2,
    "some": ["linear_attention", "full_attention", "sliding_attention", "full_attention"],
}


@needs_kernel
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("feature_map", MAPS.values(), ids=MAPS)
def test_the_blocks_of_a_converted_model_are_one_step(kinds, window, feature_map):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(TransformerBlock(24, 2, inner=32, kind=kind, window=3) for kind in kinds)

        def forward(self, x):
            for block in self.blocks:
                x, _ = block(x)
            return x

    net = drawn(linearize(Net(), [torch.randn(2, 9, 24)], window=window, steps=0, feature_map=feature_map).model)
    step = fuse(net.blocks)
    assert step.decoder.fused()
    x = torch.randn(2, 3 * window + 5, 24)
    states = step.decoder.states(2, capacity=x.shape[1])
    found = torch.stack([step.decoder(x[:, t], states) for t in range(x.shape[1])], 1)
    with torch.no_grad():
        torch.testing.assert_close(found, net(x), rtol=2e-4, atol=2e-4)


@needs_kernel
@pytest.mark.parametrize("make", [*(lambda k=k, **given: own(k, **given) for k in KINDS.values()), llama],
                         ids=[*KINDS, "llama"])  # fmt: skip
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("feature_map", ["t2r", "hedgehog"])
@torch.no_grad()
def test_steps_agree_with_the_whole_text(make, window, feature_map, steps):
    net, ids = make(window=window, feature_map=feature_map), text(3, 21)
    whole = net(ids, use_cache=False).logits
    cache = recurrent_cache(net) if make is llama else None
    cache = net(ids[:, :5], past_key_values=cache).past_key_values
    chunk = net(ids[:, 5:8], past_key_values=cache).logits  # several at once, on top of states
    single = [net(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 14)]
    more = net(ids[:, 14:16], past_key_values=cache).logits  # and behind the native step
    last = [net(ids[:, t : t + 1], past_key_values=cache).logits for t in range(16, 21)]
    torch.testing.assert_close(torch.cat([chunk, *single, more, *last], 1), whole[:, 5:], rtol=1e-3, atol=1e-3)
    assert len(steps) == 11
    assert cache.get_seq_length() == 21


@needs_kernel
@pytest.mark.parametrize("make", [lambda: own(KINDS["some"]), llama], ids=["own", "llama"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("left", [0, 3])
def test_generation_is_that_without_a_cache(make, options, left, steps):
    net, ids = make(), text(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    given = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, **options}
    right = net.generate(ids, use_cache=False, **given)
    assert not steps
    cache = {} if hasattr(net, "blocks") else {"past_key_values": recurrent_cache(net)}
    assert torch.equal(net.generate(ids, **given, **cache), right)
    assert len(steps) == 9


@needs_kernel
@pytest.mark.parametrize("make", [lambda: own(KINDS["some"]), llama], ids=["own", "llama"])
@torch.no_grad()
def test_a_prefix_is_read_once_and_continued_often(make, steps, tmp_path):
    net, ids = make(), text(1, 9)
    cache = net(ids[:, :4], past_key_values=recurrent_cache(net) if make is llama else None).past_key_values
    for t in range(4, 7):
        net(ids[:, t : t + 1], past_key_values=cache)
    taken = len(steps)
    assert taken == 3
    rest = [net(ids, use_cache=False).logits[:, t] for t in (7, 8)]

    def continued(state, copies):
        return [net(ids[:, t : t + 1].expand(copies, 1), past_key_values=state).logits[:, 0] for t in (7, 8)]

    first, many = snapshot(cache), snapshot(cache, copies=3)
    for state, copies in ((first, 1), (many, 3), (snapshot(cache), 1)):
        for found, right in zip(continued(state, copies), rest):
            torch.testing.assert_close(found, right.expand(copies, -1), rtol=1e-3, atol=1e-3)
    assert len(steps) == taken + 6
    assert cache.get_seq_length() == 7
    many.reorder_cache(torch.tensor([2, 0]))
    many.batch_select_indices(torch.tensor([1]))
    assert net(ids[:, :1], past_key_values=many).logits.shape[0] == 1
    if make is not llama:
        save_state(cache, tmp_path / "prefix")
        loaded = load_state(tmp_path / "prefix", net.config, converted(net))
        for found, right in zip(continued(loaded, 1), rest):
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
        with pytest.raises(ValueError, match=r"state of another model.*converted \[\]"):
            load_state(tmp_path / "prefix", net.config)
        other = own(KINDS["some"], window=2)
        with pytest.raises(ValueError, match=r"state of another model.*converted \[1, 3\]"):
            load_state(tmp_path / "prefix", other.config, converted(other))


@needs_kernel
@torch.no_grad()
def test_the_state_is_the_modules_own(steps):
    """What the native step leaves is what the substitute's step leaves."""
    net, ids = llama(window=3), text(2, 14)
    plain = copy.deepcopy(net)
    plain.model.register_forward_hook(lambda *_: None)
    plain.model.norm.register_forward_hook(lambda *_: None)  # somebody wants to see a call
    caches = [recurrent_cache(net), recurrent_cache(plain)]
    for a, b in [(0, 3), *((t, t + 1) for t in range(3, 14))]:
        for model, cache in zip((net, plain), caches):
            model(ids[:, a:b], past_key_values=cache)
        for one, other in zip(*(cache.layers for cache in caches)):
            for name, found, right in zip(HybridState._fields, one.state, other.state):
                torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert len(steps) == 11


@torch.no_grad()
def test_states_move_in_place_and_stay_as_large():
    net, ids = llama(), text(2, 7)
    cache = recurrent_cache(net)
    net(ids, past_key_values=cache)
    held = cache.layers[0].state
    before = held.memory.clone()
    net(ids[:, :1], past_key_values=cache)
    assert torch.equal(held.memory, before)  # what somebody took is not changed
    where = [layer.ring().memory.data_ptr() for layer in cache.layers]
    for _ in range(9):
        net(ids[:, :1], past_key_values=cache)
    assert [layer.ring().memory.data_ptr() for layer in cache.layers] == where


@needs_kernel
@pytest.mark.parametrize("options", [
    {"hidden_act": "gelu"}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4},
    {"num_key_value_heads": 1}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
], ids=str)  # fmt: skip
@torch.no_grad()
def test_llamas_of_every_kind(options, steps):
    net, ids = llama(**options), text(2, 12)
    cache = recurrent_cache(net)
    net(ids[:, :6], past_key_values=cache)
    found = torch.cat([net(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 12)], 1)
    torch.testing.assert_close(found, net(ids, use_cache=False).logits[:, 6:], rtol=1e-3, atol=1e-3)
    assert len(steps) == 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(feature_map="favor"), lambda: llama(head_dim=16), lambda: llama().double(),
        lambda: own(KINDS["all"], feature_map="favor"), lambda: own(KINDS["all"]).double(),
    ],
    ids=["favor", "other heads", "float64", "own, favor", "own, float64"],
)  # fmt: skip
@torch.no_grad()
def test_what_the_step_does_not_know_takes_the_long_way(make, steps):
    net, ids = make(), text(2, 10)
    cache = None if hasattr(net, "blocks") else recurrent_cache(net)
    cache = net(ids[:, :6], past_key_values=cache).past_key_values
    found = torch.cat([net(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 10)], 1)
    torch.testing.assert_close(found, net(ids, use_cache=False).logits[:, 6:], rtol=1e-3, atol=1e-3)
    assert not steps


@needs_kernel
def test_what_is_asked_besides_takes_the_long_way(steps):
    net, ids = llama(), text(2, 7)

    def read():
        cache = recurrent_cache(net)
        with torch.no_grad():
            net(ids[:, :6], past_key_values=cache)
        return cache

    token = ids[:, 6:]
    assert net(token, past_key_values=read()).logits.requires_grad
    with torch.no_grad():
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # the newest one is padding
        net(token, past_key_values=read(), attention_mask=mask)
        assert not steps
        mask[0, -1] = 1
        embedded = net(inputs_embeds=net.get_input_embeddings()(token), past_key_values=read()).logits
        torch.testing.assert_close(embedded, net(token, past_key_values=read(), attention_mask=mask).logits)
        assert len(steps) == 2
        assert isinstance(net(token, past_key_values=read(), return_dict=False), tuple)
        assert len(steps) == 3
        # From here on transformers watches the layers.
        assert len(net(token, past_key_values=read(), output_hidden_states=True).hidden_states) == 3
        assert len(steps) == 3
        other, cache = copy.deepcopy(net), read()
        assert not hf_decoder._own(other.model, cache, 2)  # the states of another model's attentions


@needs_kernel
@torch.no_grad()
def test_a_step_notices_what_happens_to_the_model():
    net = llama()
    step = hf_decoder.fuse_decoder(net.model)
    assert isinstance(step, fused_step.FusedStep)
    assert step.current()
    part = net.model.layers[0].self_attn.linear
    part.lesson = lambda *_: None
    assert not step.current()
    assert hf_decoder.fuse_decoder(net.model) is None
    part.lesson = None
    part.widen_(9)
    assert not step.current()
    part.widen_(4)
    assert step.current()
    net.model.layers[1].mlp.forward = net.model.layers[1].mlp.forward
    assert not step.current()
    del net.model.layers[1].mlp.forward
    part.balance = nn.Parameter(part.balance + 1)
    assert not step.current()
    assert hf_decoder.fuse_decoder(nn.Linear(2, 2)) is None


def test_the_decoder_keeps_its_name_and_its_files(tmp_path):
    net = llama()
    assert type(net.model).__name__ == "LlamaModel"
    assert isinstance(net.model, transformers.LlamaModel)
    net.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    net, other, ids = own(KINDS["all"]), own(KINDS["all"]), text(2, 6)
    cache = net(ids).past_key_values
    with pytest.raises(ValueError, match="cannot go on from DynamicCache with layers"):
        other(ids, past_key_values=cache)
    cache.reset()
    other(ids, past_key_values=cache)
    assert cache.layers[0].substitute is other.blocks[0].attention.linear
