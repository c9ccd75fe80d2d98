"""The embedded task: what is packaged is what was recorded."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch

from eke.compression import accuracy
from eke.demo import build, crepe, g2p, images, task
from eke.demo import task as demo_task

SIZES = {"calibration": 5000, "selection": 2000, "report": 5000}
DATA = files("eke.demo") / "data"


def arrays(split: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO((DATA / f"{split}.npz").read_bytes())) as stored:
        return dict(stored)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("split", SIZES)
def test_a_split_holds_normalised_images_of_ten_classes(split):
    pixels, classes = images(split)
    assert pixels.shape == (SIZES[split], 1, 28, 28)
    assert pixels.dtype == torch.float32
    assert classes.shape == (SIZES[split],)
    assert classes.dtype == torch.int64
    assert set(classes.tolist()) == set(range(10))
    stored = arrays(split)["images"]
    torch.testing.assert_close(pixels[:, 0] * 0.3530 + 0.2860, torch.from_numpy(stored) / 255, rtol=0, atol=1e-6)
    # Normalised by the training set's mean and deviation, a split is near 0 and 1.
    assert abs(float(pixels.mean())) < 0.05
    assert abs(float(pixels.std()) - 1) < 0.05


def test_no_image_is_in_two_splits():
    indices = {split: set(arrays(split)["indices"].tolist()) for split in SIZES}
    assert all(len(indices[split]) == size for split, size in SIZES.items())
    # Calibration is part of what the network was trained on, selection is not; report numbers the test set.
    assert max(indices["calibration"]) < 55_000 <= min(indices["selection"])
    assert max(indices["selection"]) < 60_000
    assert max(indices["report"]) < 10_000
    contents = [{image.tobytes() for image in arrays(split)["images"]} for split in SIZES]
    assert not contents[0] & contents[1]
    assert not contents[2] & (contents[0] | contents[1])


def test_the_digests_are_those_of_the_files():
    manifest = json.loads((DATA / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {"weights.safetensors", *(f"{split}.npz" for split in SIZES)}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest
    assert "MIT" in manifest["source"]


@pytest.mark.parametrize("name", ["weights.safetensors", "selection.npz"])
def test_a_changed_file_is_refused(tmp_path, monkeypatch, name):
    for entry in DATA.iterdir():
        content = bytearray(entry.read_bytes())
        if entry.name == name:
            content[-1] ^= 1
        (tmp_path / entry.name).write_bytes(content)
    monkeypatch.setattr(sys.modules[demo_task.__module__], "_DATA", tmp_path)
    with pytest.raises(
        ValueError, match=rf"The demo's {name} was changed: SHA-256 \w{{12}}\.\.\., expected \w{{12}}\.\.\.; reinstall"
    ):
        build() if name.endswith("safetensors") else images("selection")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"splits 'calibration', 'selection' and 'report', got 'test'"):
        images("test")


def test_the_network_is_the_one_that_is_described():
    network = build()
    assert not network.training
    parameters = sum(p.numel() for p in network.parameters())
    assert 300_000 < parameters < 320_000
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_calibration_brings_mirror_images():
    calibration = list(task().calibration)
    pixels, classes = (torch.cat(parts) for parts in zip(*calibration))
    assert len(pixels) == 10_000
    assert torch.equal(pixels[5000:], pixels[:5000].flip(-1))
    assert torch.equal(classes[5000:], classes[:5000])
    assert {len(labels) for _, labels in calibration} == {64, 10_000 % 64}


@pytest.mark.slow
@pytest.mark.parametrize(("split", "correct"), [("selection", 1849), ("report", 4624)])
def test_the_network_is_as_good_as_recorded(split, correct):
    counts = accuracy(build(), getattr(task(), split))
    assert counts.total == SIZES[split]
    # Another processor may round the logits of a borderline image otherwise.
    assert abs(counts.correct - correct) <= 2


def test_the_network_is_about_as_good_on_a_few_images():
    pixels, classes = images("report")
    with torch.no_grad():
        right = int((build()(pixels[:500]).argmax(1) == classes[:500]).sum())
    # 92.5 % of 500 with four standard errors.
    assert right > 500 * (0.925 - 4 * 0.012)


@pytest.mark.parametrize("match", [g2p.token_divergence, crepe.bin_cross_entropy])
def test_what_a_witness_recovers_by_is_least_where_the_answers_agree(match):
    shape = (3, 4, 5) if match is g2p.token_divergence else (3, 5)
    teacher = torch.randn(shape, dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    least = match(student, teacher)
    (gradient,) = torch.autograd.grad(least, student)
    torch.testing.assert_close(gradient, torch.zeros(shape, dtype=torch.float64), rtol=0, atol=1e-12)
    assert all(match(teacher + 0.1 * torch.randn(shape), teacher) > least.detach() for _ in range(5))
