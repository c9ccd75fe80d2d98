"""Example inputs: what a model of a known library is made for, so that it runs on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eke.cli.examples import described, example_inputs
from eke.cli.sources import build

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "num_layers": 1, "n_layer": 1, "n_embd": 16, "n_head": 2, "d_ff": 32,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 60, "max_position_embeddings": 40,
}  # fmt: skip

SHAPES = {
    "bert": {"input_ids": (1, 20)},
    "gpt2": {"input_ids": (1, 20)},
    "llama": {"input_ids": (1, 20)},
    "t5": {"input_ids": (1, 128), "decoder_input_ids": (1, 128)},
    "bart": {"input_ids": (1, 20), "decoder_input_ids": (1, 20)},
    "vit": {"pixel_values": (1, 3, 224, 224)},
    "whisper": {"input_features": (1, 80, 3000), "decoder_input_ids": (1, 128)},
    "audio-spectrogram-transformer": {"input_values": (1, 1024, 128)},
    "wav2vec2": {"input_values": (1, 16000)},
    "videomae": {"pixel_values": (1, 16, 3, 224, 224)},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_transformers_models_run_on_their_examples(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[kind]()
    taken = {name: value for name, value in SMALL.items() if hasattr(config, name)}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = transformers.CONFIG_MAPPING[kind](**taken, **special)
    model = transformers.AutoModel.from_config(config).eval()
    found = example_inputs(model)
    assert {name: tuple(value.shape) for name, value in found.items()} == SHAPES[kind]
    if kind != "videomae":  # 1568 tokens: seconds
        with torch.no_grad():
            model(**found)
    again = example_inputs(model)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_model_of_text_and_images_gets_both():
    transformers = pytest.importorskip("transformers")
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": 60, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**part, "image_size": 32, "patch_size": 8},
    )
    model = transformers.CLIPModel(config).eval()
    found = example_inputs(model)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "input_ids": (1, 38), "pixel_values": (1, 3, 32, 32),
    }  # fmt: skip
    with torch.no_grad():
        model(**found)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("timm:test_vit:none", (1, 3, 160, 160)),
        ("timm:resnet10t:none", (1, 3, 176, 176)),
        ("torchvision:squeezenet1_1:none", (1, 3, 224, 224)),
    ],
)
def test_image_models_get_one_image_of_their_size(spec, shape):
    pytest.importorskip(spec.partition(":")[0])
    model = build(spec)
    (image,) = example_inputs(model)
    assert tuple(image.shape) == shape
    with torch.no_grad():
        model(image)


@pytest.mark.parametrize(
    ("module", "name", "shapes"),
    [
        ("torchvision.models.inception", "Inception3", "1 x 3 x 299 x 299 float32"),
        ("torchvision.models.video.resnet", "VideoResNet", "1 x 3 x 16 x 224 x 224 float32"),
        ("torchvision.models.detection.ssd", "SSD", "3 x 320 x 320 float32"),
        ("torchvision.models.optical_flow.raft", "RAFT", "1 x 3 x 128 x 128 float32, 1 x 3 x 128 x 128 float32"),
    ],
)
def test_kinds_of_torchvision_models_are_told_apart_by_their_module(module, name, shapes):
    kind = type(name, (nn.Module,), {"__module__": module})
    assert described(example_inputs(kind())) == shapes


def test_a_model_of_no_library_tells_nothing():
    assert example_inputs(nn.Linear(2, 2)) is None


def test_inputs_are_described():
    assert described({"a": torch.zeros(2, 3, dtype=torch.int64), "n": 4}) == "a 2 x 3 int64, n 4"
