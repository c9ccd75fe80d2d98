"""Models by name: built in evaluation mode, the same in every process, and refused with what to do."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from eke._errors import MissingExtraError
from eke.cli import sources
from eke.cli.load import load_model
from eke.cli.recipe import Recipe
from eke.cli.session import UsageError

TINY = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip


@pytest.fixture
def tiny_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))
    model.save_pretrained(tmp_path / "tiny")
    return model, tmp_path / "tiny"


def unreachable(*_, **__):
    raise OSError("Name or service not known. Try later.")


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1:none", "timm:test_vit:none"])
def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone(spec):
    pytest.importorskip(spec.partition(":")[0])
    before = torch.get_rng_state()
    one, other = sources.build(spec), sources.build(spec)
    assert torch.equal(torch.get_rng_state(), before)
    assert not one.training
    for (name, weight), same in zip(one.state_dict().items(), other.state_dict().values()):
        assert torch.equal(weight, same), name


def test_a_folder_gives_its_own_class_and_weights_in_float32(tiny_bert):
    model, folder = tiny_bert
    loaded = load_model(Recipe(model=f"hf:{folder}"))
    assert type(loaded) is type(model)
    assert loaded.classifier.weight.dtype is torch.float32
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert loaded.config.use_cache is False
    other = load_model(Recipe(model=f"hf:{folder}:none"))
    assert type(other) is type(model)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)


def test_a_configuration_without_class_gives_the_bare_model(tiny_bert):
    _, folder = tiny_bert
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert type(sources.build(f"hf:{folder}:none")).__name__ == "BertModel"
    assert type(sources.build(f"hf:{folder}")).__name__ == "BertModel"


def test_a_kind_of_model_is_built_from_its_defaults(monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setitem(
        transformers.CONFIG_MAPPING._extra_content, "tiny-bert", lambda: transformers.BertConfig(**TINY)
    )
    assert type(sources.build("hf:tiny-bert:none")).__name__ == "BertModel"


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UsageError, match=r"brings code of its own, which eke does not run: build the model in a file"):
        sources.build(f"hf:{tmp_path}")


def test_what_cannot_be_fetched_is_told_with_what_works_instead(monkeypatch, tiny_bert):
    timm, transformers, vision = (pytest.importorskip(name) for name in ("timm", "transformers", "torchvision"))
    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setattr(vision.models, "get_model", unreachable)
    with pytest.raises(OSError, match=r"timm:resnet18 could not be fetched \(Name or service not known\)\. .*:none"):
        sources.build("timm:resnet18")
    with pytest.raises(OSError, match=r"torchvision:resnet18 could not be fetched .*torchvision:resnet18:none takes"):
        sources.build("torchvision:resnet18")
    monkeypatch.setattr(transformers.BertForSequenceClassification, "from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"could not be fetched .*hf:FOLDER reads a folder, hf:.*:none takes random"):
        sources.build(f"hf:{tiny_bert[1]}")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"hf:own/net could not be fetched .*hf:KIND:none \(bert, vit\) builds a kind"):
        sources.build("hf:own/net")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet81", r"torchvision has no model 'resnet81'\. Did you mean 'resnet18'\?"),
        ("torchvision:resnet18:IMAGENET", "resnet18 has no weights 'IMAGENET'"),
        ("timm:resnet81:none", r"timm has no model 'resnet81'\. Did you mean 'resnet18'\?"),
        ("hf:", r"Write hf:NAME or hf:FOLDER, such as hf:google-bert/bert-base-uncased, got 'hf:'"),
    ],
)
def test_names_that_are_not_known(spec, message):
    pytest.importorskip(spec.partition(":")[0].replace("hf", "transformers"))
    with pytest.raises(UsageError, match=message):
        sources.build(spec)


def test_a_timm_model_that_was_never_trained_says_so():
    timm = pytest.importorskip("timm")
    name = next(name for name in timm.list_models() if not timm.list_models(f"{name}*", pretrained=True))
    with pytest.raises(UsageError, match=rf"timm has no trained weights for '{name}': timm:{name}:none takes random"):
        sources.build(f"timm:{name}")


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ("torchvision:resnet18", "torchvision.models", "vision"),
        ("timm:resnet18", "timm", "vision"),
        ("hf:bert:none", "transformers", "hf"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, spec, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs the package '{package}'.*pip install 'eke\[{extra}\]'"):
        sources.build(spec)


def test_only_known_prefixes_are_names():
    assert sources.is_named("timm:resnet18")
    assert not sources.is_named("my_model.py:build")
    assert not sources.is_named("timm")
    assert isinstance(sources.build("torchvision:squeezenet1_1:none"), nn.Module)
