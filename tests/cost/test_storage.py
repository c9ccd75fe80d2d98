"""Parameters and bytes, against files that are really written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from eke.cost import model_bytes, parameters, stored_bytes


class Tied(nn.Module):
    """Embedding and head share their matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.embed.weight


def test_parameters_count_tied_ones_once():
    assert parameters(Tied()) == 21 + 7
    assert parameters(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))) == 108 + 4 + 8
    assert parameters(nn.ReLU()) == 0


def test_parameters_that_share_memory_count_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight.data = first.weight.data
    assert first.weight is not second.weight
    assert parameters(nn.Sequential(first, second)) == 9


def test_parameters_of_meta_models_are_told_apart():
    with torch.device("meta"):
        assert parameters(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) == 24


def test_model_bytes_is_the_size_of_the_written_file(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert model_bytes(net) == stored_bytes(tmp_path / "w.safetensors") == (tmp_path / "w.safetensors").stat().st_size


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_model_bytes_counts_floats_as_float32(kind):
    assert model_bytes(nn.Linear(64, 64).to(kind)) == model_bytes(nn.Linear(64, 64))


def test_model_bytes_counts_tied_tensors_once():
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(7, 3))
    saved = model_bytes(untied) - model_bytes(Tied())
    assert saved >= 4 * 21  # the matrix and its entry in the header


def test_model_bytes_takes_transposed_and_overlapping_tensors():
    net = nn.Module()
    whole = torch.zeros(4, 6)
    net.register_buffer("whole", whole)
    net.register_buffer("turned", whole.T)
    net.register_buffer("part", whole[:2])
    assert model_bytes(net) >= 4 * (24 + 24 + 12)


def test_model_bytes_changes_nothing():
    net = nn.Linear(3, 3).half()
    before = net.weight.clone()
    model_bytes(net)
    assert net.weight.dtype is torch.float16
    assert torch.equal(net.weight, before)


def test_model_bytes_needs_data():
    with torch.device("meta"):
        net = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"'weight' is torch\.strided on meta; load or densify"):
        model_bytes(net)
    sparse = nn.Module()
    sparse.register_buffer("w", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"'w' is torch\.sparse_coo on cpu"):
        model_bytes(sparse)


def test_an_artifact_counts_its_weights_file_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "plan.json").write_bytes(b"x" * 50)
    (tmp_path / "old.pt").write_bytes(b"x" * 30)
    assert stored_bytes(tmp_path) == stored_bytes(str(tmp_path)) == 100


def test_other_folders_count_all_their_weights(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "b.onnx").write_bytes(b"x" * 10)
    (tmp_path / "config.json").write_bytes(b"x" * 1000)
    assert stored_bytes(tmp_path) == 110


def test_any_file_counts_as_it_is(tmp_path):
    (tmp_path / "weights").write_bytes(b"x" * 12)
    assert stored_bytes(tmp_path / "weights") == 12


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is nothing at '.*missing'"):
        stored_bytes(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no weights in the folder .* counts model\.safetensors, or else"):
        stored_bytes(tmp_path)
