"""The artifact rebuilds the compressed model bit for bit, and refuses what is not the artifact."""

from __future__ import annotations

import builtins
import copy
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from eke.compression.artifact import (
    PLAN,
    WEIGHTS,
    Blueprint,
    load,
    read_plan,
    save,
    structure_from_json,
    structure_to_json,
)
from eke.compression.checkpoint import sha256
from eke.compression.deploy import foldable
from eke.cost import read_tensors, write_tensors
from eke.sites import Surgery, channel_groups, find
from eke.structures import NM, Both, LowRank, Rows, UniformGrid, Unstructured

from .nets import Tiny, outputs, same, samples, state


def compressed(model: nn.Module, *, bits: int = 4, memory_format: str = "channels_last") -> tuple[nn.Module, Blueprint]:
    """Cut two groups to a half, fold everything, put all matrices but one on a grid."""
    images = samples(4, seed=0)[0]
    surgery = Surgery.merge(g.cut(range(0, g.size, 2)) for g in channel_groups(model, (images,)))
    pairs = tuple(foldable(model, lambda net: net(images)))
    names = [site.name for site in find(model)][1:]
    blueprint = Blueprint(surgery, pairs, memory_format, {name: UniformGrid(bits) for name in names})
    small = copy.deepcopy(model).eval()
    blueprint.reshape_(small)
    for site in find(small):
        if site.name in blueprint.structures:
            site.write_(small, blueprint.structures[site.name].project(site.read(small)))
    return small, blueprint


@pytest.fixture
def artifact(taught, tmp_path):
    small, blueprint = compressed(taught)
    save(tmp_path / "a", small, blueprint, decisions=[{"site": "conv1", "change": "half"}])
    return tmp_path / "a", small


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_loaded_model_is_the_saved_one_bit_for_bit(taught, tmp_path, bits, memory_format):
    small, blueprint = compressed(taught, bits=bits, memory_format=memory_format)
    assert len(blueprint.folded) == 3
    assert blueprint.surgery.slices
    save(tmp_path / "a", small, blueprint)
    torch.manual_seed(5)
    loaded = load(tmp_path / "a", Tiny())
    assert same(state(loaded), state(small))
    assert torch.equal(outputs(loaded), outputs(small))
    assert loaded.conv2.weight.stride() == small.conv2.weight.stride()
    assert not loaded.training
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [WEIGHTS, PLAN]


def test_loading_leaves_the_given_model_as_it_was(artifact):
    fresh = Tiny().train()
    before = state(fresh)
    load(artifact[0], fresh)
    assert same(before, state(fresh))
    assert fresh.training
    assert isinstance(fresh.bn1, nn.BatchNorm2d)


def test_the_blueprint_survives_json(taught):
    _, blueprint = compressed(taught)
    assert Blueprint.from_json(json.loads(json.dumps(blueprint.to_json()))) == blueprint


EVERY = [
    UniformGrid(4), UniformGrid(3, group=7), Unstructured(0.25), NM(2, 4), Rows(0.5), Both(NM(2, 4), UniformGrid(4)),
    Both(Rows(0.25), UniformGrid(2, group=3)), LowRank(3), LowRank(0.5, UniformGrid(6)),
]  # fmt: skip


@pytest.mark.parametrize("structure", EVERY, ids=repr)
def test_every_structure_survives_json(structure):
    assert structure_from_json(json.loads(json.dumps(structure_to_json(structure)))) == structure


def test_an_unknown_structure_is_refused():
    with pytest.raises(
        ValueError, match=r"The plan names the structure 'Circulant'; this version of eke knows \['Both', "
    ):
        structure_from_json({"kind": "Circulant"})


@pytest.mark.parametrize("structure", EVERY[:-2], ids=repr)
def test_every_structure_is_stored_in_the_bytes_that_it_says_and_loaded_bit_for_bit(taught, tmp_path, structure):
    small = copy.deepcopy(taught)
    for site in find(small):
        if site.name in ("conv2", "classifier"):
            site.write_(small, structure.project(site.read(small)))
    blueprint = Blueprint(Surgery(), (), "contiguous", dict.fromkeys(("conv2", "classifier"), structure))
    save(tmp_path, small, blueprint)
    tensors, _ = read_tensors(tmp_path / WEIGHTS)
    for site in find(small):
        if site.name in blueprint.structures:
            parts = [t for key, t in tensors.items() if key.startswith(f"{site.parameter_name}:")]
            assert 8 * sum(t.numel() * t.element_size() for t in parts) == structure.bits(site.shape)
    loaded = load(tmp_path, Tiny())
    assert same(state(loaded), state(small))
    assert torch.equal(outputs(loaded), outputs(small))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (UniformGrid(3), r"\d+ codes of 3 bits take \d+ bytes, got \d+"),
        (UniformGrid(8), r"\d+ codes of 8 bits take \d+ bytes, got \d+"),
        (UniformGrid(4, group=5), r"decode of a matrix \(.*\) needs scales \(.*\), got \(.*\)"),
        (
            Unstructured(0.5),
            r"stores \['codes', 'scales'\] of 'conv2', which Unstructured\(density=0\.5\) does not decode without "
            r"'values': restore the plan or compress again",
        ),
        (
            Both(NM(2, 4), UniformGrid(4)),
            r"stores \['codes', 'scales'\] of 'conv2', .* does not decode without 'support'",
        ),
    ],
    ids=repr,
)
def test_a_plan_that_names_another_structure_than_was_stored_is_refused(artifact, other, message):
    folder, _ = artifact
    plan = json.loads((folder / PLAN).read_text())
    plan["structures"]["conv2"] = structure_to_json(other)
    (folder / PLAN).write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=message):
        load(folder, Tiny())


def test_packed_weights_are_smaller_by_their_bits(artifact, taught):
    folder, small = artifact
    write_tensors(folder / "plain", small.state_dict(), {})
    tensors, _ = read_tensors(folder / WEIGHTS)
    assert tensors["conv2.weight:codes"].numel() == -(-small.conv2.weight.numel() * 4 // 8)
    assert (folder / WEIGHTS).stat().st_size < 0.4 * (folder / "plain").stat().st_size


def test_saving_twice_writes_the_same_bytes(taught, tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, *compressed(taught))
    for name in (WEIGHTS, PLAN):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class Tied(nn.Module):
    """A decoder that is the embedding's own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.decode = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, ids):
        return self.decode(torch.tanh(self.hidden(self.embed(ids))))


@pytest.mark.parametrize("packed", [(), ("embed",), ("embed", "hidden")])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path, packed):
    torch.manual_seed(0)
    model = Tied().eval()
    blueprint = Blueprint(Surgery(), (), "contiguous", {name: UniformGrid(4) for name in packed})
    for site in find(model):
        if site.name in packed:
            site.write_(model, UniformGrid(4).project(site.read(model)))
    save(tmp_path, model, blueprint)
    tensors, _ = read_tensors(tmp_path / WEIGHTS)
    assert not [name for name in tensors if name.startswith("decode")]
    loaded = load(tmp_path, Tied())
    assert loaded.decode.weight is loaded.embed.weight
    assert same(state(loaded), state(model))


def test_nothing_is_pickled(taught, tmp_path, monkeypatch):
    small, blueprint = compressed(taught)

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    save(tmp_path, small, blueprint)
    monkeypatch.setattr(builtins, "eval", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)
    assert same(state(load(tmp_path, Tiny())), state(small))
    for path in tmp_path.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_a_fresh_process_gets_the_same_bits(artifact):
    folder, small = artifact
    script = """
        import sys, torch
        from compression.nets import Tiny, outputs
        from eke import load
        from eke.compression.artifact import state_digest
        torch.set_num_threads(1)
        torch.manual_seed(77)
        model = load(sys.argv[1], Tiny())
        print(state_digest(model), outputs(model).double().sum().item().hex())
    """
    from eke.compression.artifact import state_digest

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.split() == [state_digest(small), outputs(small).double().sum().item().hex()]


def test_a_digest_sees_every_change(taught):
    from eke.compression.artifact import state_digest

    first = state_digest(taught)
    assert first == state_digest(copy.deepcopy(taught))
    changed = copy.deepcopy(taught)
    with torch.no_grad():
        changed.classifier.bias[0] = torch.nextafter(changed.classifier.bias[0], torch.tensor(9.0))
    assert state_digest(changed) != first
    assert state_digest(copy.deepcopy(taught).double()) != first


def test_changed_weights_are_refused(artifact):
    folder, _ = artifact
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"model\.safetensors was changed: its SHA-256 is \w{12}\.\.\., the plan names"
    ):
        load(folder, Tiny())


def test_truncated_weights_are_refused_even_with_their_digest(artifact):
    folder, _ = artifact
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    plan = json.loads((folder / PLAN).read_text())
    plan["sha256"][WEIGHTS] = sha256(folder / WEIGHTS)
    (folder / PLAN).write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file \(.*\); restore it"):
        load(folder, Tiny())


@pytest.mark.parametrize("name", [WEIGHTS, PLAN])
def test_a_missing_file_is_named(artifact, name):
    folder, _ = artifact
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"a is not an eke artifact: it has no {name}\.$"):
        load(folder, Tiny())
    (folder / ".run").mkdir()
    with pytest.raises(FileNotFoundError, match=r"A run that was interrupted there continues with --resume\."):
        load(folder, Tiny())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: [], r"plan\.json must have the format 'eke artifact 2', got 'list'"),
        (lambda p: {**p, "format": "other 9"}, r"must have the format 'eke artifact 2', got 'other 9'"),
        (lambda p: {**p, "sha256": {}}, r"model\.safetensors was changed: .* the plan names none"),
        (
            lambda p: {k: v for k, v in p.items() if k != "structures"},
            r"The plan lacks \['structures'\]: it is not a plan of this",
        ),
        (lambda p: {**p, "memory_format": "nhwc"}, r"memory format must be one of .*, got 'nhwc'"),
        (
            lambda p: {**p, "structures": {"absent": {"kind": "UniformGrid", "bits": 4, "group": None}}},
            r"The artifact packs \['absent'\], which this",
        ),
        (
            lambda p: {**p, "structures": {}},
            r"differ in the tensors \['classifier\.weight', 'classifier\.weight:codes'",
        ),
        (lambda p: {**p, "surgery": {}}, r"This is not a surgery"),
        (
            lambda p: {**p, "removed": {"absent": "zero"}},
            r"Cannot leave out 'absent' as 'zero': build the architecture",
        ),
        (lambda p: {**p, "removed": {"conv1": "half"}}, r"Cannot leave out 'conv1' as 'half': build the architecture"),
        (
            lambda p: {**p, "factored": {"absent": 2}},
            r"The plan factors \['absent'\], which this model lacks: build the",
        ),
        (
            lambda p: {**p, "structures": {"conv2": {"kind": "outside", "text": "Mine()"}}},
            r"The plan uses the structure 'Mine\(\)', which is not eke's own: pass it",
        ),
    ],
)
def test_a_changed_plan_is_refused(artifact, change, message):
    folder, _ = artifact
    (folder / PLAN).write_text(json.dumps(change(json.loads((folder / PLAN).read_text()))))
    with pytest.raises(ValueError, match=message):
        load(folder, Tiny())


def test_a_plan_that_is_no_json_is_refused(artifact):
    (artifact[0] / PLAN).write_text('{"format": ')
    with pytest.raises(ValueError, match=r"plan\.json is not valid JSON \(.*\); restore it or start again"):
        read_plan(artifact[0])


class Wider(Tiny):
    """The same names with one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tiny(width=8), r"made for a model whose '.*' has shape \(.*\), this model has \(.*\)"),
        (lambda: nn.Linear(3, 3), r"made for a model with a parameter or buffer '.*', this model has none"),
        (Wider, r"differ in the tensors \['extra\.bias', 'extra\.weight'\]: build the architecture"),
        (lambda: Tiny(classes=5), r"whose 'classifier\.weight' has shape \(4, 16\), this model has \(5, 16\)"),
        (
            lambda: Tiny().double(),
            r"'.*' is torch\.float64 \(.*\) in the model and torch\.float32 \(.*\) in the artifact",
        ),
    ],
)
def test_another_architecture_is_refused(artifact, make, message):
    with pytest.raises(ValueError, match=message):
        load(artifact[0], make())


def test_another_architecture_is_refused_where_nothing_was_cut(taught, tmp_path):
    pairs = (("conv1", "bn1"),)
    small = copy.deepcopy(taught)
    blueprint = Blueprint(Surgery(), pairs, "contiguous", {})
    blueprint.reshape_(small)
    save(tmp_path, small, blueprint)
    with pytest.raises(ValueError, match=r"Cannot fold 'bn1' \(NoneType\) into 'conv1' \(NoneType\)"):
        load(tmp_path, nn.Linear(3, 3))
