"""The table of scores: seeds, intervals, any model, nothing touched."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from scipy import stats
from torch import nn

from eke import search
from eke.search.spaces import NB201

SMALL = dataclasses.replace(NB201, resolution=8, channels=4, cells=1)
LABELS = torch.arange(4) % 3


def images(size=8, channels=3):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(4, channels, size, size, generator=g), LABELS) for _ in range(2)]


def test_mean_deviation_and_interval_over_initialisations():
    table = search.score(lambda: SMALL.decode("dcbdec"), images(), proxies=("zico", "params"), seeds=4)
    row = table["zico"]
    assert len(set(row.values)) == 4
    low, high = stats.t.interval(0.95, 3, sum(row.values) / 4, stats.sem(row.values))
    assert row.interval == pytest.approx((low, high))
    assert row.mean == pytest.approx(sum(row.values) / 4)
    assert table["params"].deviation == 0.0
    assert table.means == {"zico": row.mean, "params": SMALL.parameters("dcbdec")}
    one = search.score(lambda: SMALL.decode("dcbdec"), images(), proxies=("zico",), seeds=1)
    assert one["zico"].values == row.values[:1]
    assert math.isnan(one["zico"].deviation)
    assert "zico" in str(table)
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["scores"]["zico"]["deviation"] is None


def test_scores_repeat_and_leave_everything_as_it_was():
    model = SMALL.decode("dcbdec").eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = search.score(model, images(), proxies=tuple(search.PROXIES)).means
    assert search.score(model, images(), proxies=tuple(search.PROXIES)).means == first
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_shared_passes_give_the_scores_of_single_ones():
    model = SMALL.decode("dcbdec")
    together = search.score(model, images(), proxies=tuple(search.PROXIES)).means
    assert together["zico"] == search.zico(model, images())
    assert together["log_numel"] == pytest.approx(SMALL.log_numel("dcbdec", 10))
    assert together["flops"] == SMALL.flops("dcbdec")
    for name in ("snip", "naswot", "synflow"):
        assert search.score(model, images(), proxies=(name,)).means[name] == pytest.approx(together[name])


def test_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    proxies = [name for name in search.PROXIES if name != "flops"]

    def vit():
        return timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
        )

    table = search.score(vit, images(16), proxies=proxies).means
    assert all(math.isfinite(value) for value in table.values())
    numels = [math.log(m.weight.numel()) for m in vit().modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert table["log_numel"] == pytest.approx(sum(numels))


def test_branches_that_are_dropped_at_random_count():
    timm = pytest.importorskip("timm")

    def vit(rate):
        return timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=3, drop_path_rate=rate
        )

    proxies = ("log_numel", "synflow")
    plain, dropping = (
        search.score(lambda rate=rate: vit(rate), images(16), proxies=proxies).means for rate in (0, 0.9)
    )
    assert dropping == plain


def test_layers_behind_a_constant_do_not_count():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(self.first(0 * x))

    assert search.log_numel(Cut(), torch.randn(1, 4)) == 0.0
    assert search.log_numel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(1, 4)) == pytest.approx(
        math.log(16) + math.log(12)
    )


def test_resnet_of_timm():
    timm = pytest.importorskip("timm")
    proxies = [name for name in search.PROXIES if name != "flops"]
    block = timm.models.resnet.BasicBlock

    def resnet():
        return timm.models.ResNet(block, (1, 1, 1, 1), channels=(4, 4, 8, 8), stem_width=4, num_classes=3)

    table = search.score(resnet, images(64), proxies=proxies).means
    assert all(math.isfinite(value) for value in table.values())
    assert table["log_numel"] > 0


def test_transformers_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": tokens, "labels": LABELS}, {"input_ids": tokens.flip(0), "labels": LABELS}]
    settings = {"vocab_size": 20, "num_labels": 3}
    bert = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **settings
    )
    gpt = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, pad_token_id=0, **settings)
    made = [transformers.BertForSequenceClassification(bert), transformers.GPT2ForSequenceClassification(gpt)]
    for model, layers in zip(made, (8, 5)):
        assert len(search.zico_layers(model, data)) == layers
        table = search.score(model, data, proxies=("zico", "snip", "grasp", "fisher", "log_numel", "params"))
        assert all(math.isfinite(value) for value in table.means.values())


def test_joint_projections_of_attention_count():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    names = [layer.name for layer in search.zico_layers(model, images_of_tokens(), loss=summed)]
    assert names == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]


def images_of_tokens():
    return [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def summed(model, batch):
    return model(batch).square().mean()


def test_own_proxies_stand_beside_the_named_ones():
    def depth(subject):
        return sum(isinstance(module, nn.Conv2d) for module in subject.model.modules())

    def two(subject):
        return {"a": 1.0, "b": 2.0}

    table = search.score(SMALL.decode("dcbdec"), images(), proxies=(depth, two, "params"))
    assert table["depth"].mean == 1 + 3 * 4 + 2 * 3
    assert table["two.b"].mean == 2.0


def test_one_score_of_several_can_be_asked_for():
    whole = search.score(SMALL.decode("dcbdec"), images(), proxies=("az_nas", "params")).means
    some = search.score(SMALL.decode("dcbdec"), images(), proxies=("az_nas.trainability", "az_nas.expressivity")).means
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SMALL.decode("dcbdec")
    again = search.score(model, images(), proxies=("az_nas.trainability", "az_nas")).means
    assert search.score(model, images(), proxies=("az_nas", "az_nas.trainability")).means == again
    assert list(some) == ["az_nas.trainability", "az_nas.expressivity"]
    assert (
        list(whole)[:3]
        == list(again)
        == [f"az_nas.{part}" for part in ("expressivity", "progressivity", "trainability")]
    )
    with pytest.raises(ValueError, match=r"no proxy 'az_nas.train'\. Did you mean 'az_nas.trainability'"):
        search.score(model, images(), proxies=("az_nas.train",))
    assert set(search.FUSION) <= {*search.PROXIES, *whole}


def test_wrong_requests_are_named():
    model = SMALL.decode("dcbdec")
    with pytest.raises(ValueError, match=r"no proxy 'zicco'\. Did you mean 'zico'"):
        search.score(model, images(), proxies=("zicco",))
    with pytest.raises(ValueError, match=r"seeds=3 draws weights anew, and CellNetwork.*pass a function"):
        search.score(model, images(), seeds=3)
    with pytest.raises(ValueError, match=r"at least one proxy, seeds >= 1.*seeds=0"):
        search.score(model, images(), seeds=0)
    with pytest.raises(ValueError, match="at least one batch, got an empty list"):
        search.score(model, [])
    with pytest.raises(TypeError, match="a function that returns one, got int"):
        search.score(lambda: 3, images())
    with pytest.raises(KeyError, match="There is no score 'zen'"):
        _ = search.score(model, proxies=("params",))["zen"]
