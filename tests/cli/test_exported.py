"""Programs of torch.export: read with names and counts, never where reading them would run code."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from torch import nn

from eke.cli.exported import is_program, load_exported
from eke.cli.session import UsageError

QUICK = ["--threads", 1, "--seconds", 0.05]


class Net(nn.Module):
    """A convolution, an embedding, and a matrix that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.words = nn.Embedding(7, 4)
        self.own = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, image, word):
        return self.head((self.features(image).mean((2, 3)) + self.words(word)) @ self.own)


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(1, 1, 6, 6), torch.tensor([3])


@pytest.fixture(scope="module")
def program(tmp_path_factory, inputs):
    torch.manual_seed(0)
    model = Net().eval()
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    torch.export.save(torch.export.export(model, inputs), path)
    return model, path


def test_a_program_computes_what_it_was_exported_from(program, inputs):
    model, path = program
    loaded, given = load_exported(path)
    assert is_program(loaded)
    assert not is_program(model)
    assert [tuple(value.shape) for value in given] == [(1, 1, 6, 6), (1,)]
    torch.testing.assert_close(loaded(*inputs), model(*inputs))


def test_inspect_lists_its_matrices(eke, program):
    found = json.loads(eke("inspect", program[1], *QUICK, "--json").stdout)
    lines = {site["name"]: (site["kind"], site["shape"], site["flops"]) for site in found["sites"]}
    assert lines == {
        "own": ("linear", [4, 4], 2 * 36 * 36 + 2 * 16 + 2 * 8),
        "features.0": ("conv", [4, 9], 2 * 36 * 36),
        "words": ("embedding", [7, 4], 0),
        "head": ("linear", [2, 4], 16),
    }
    assert found["before"]["parameters"] == sum(parameter.numel() for parameter in program[0].parameters())
    assert found["notes"][0] == "called with 1 x 1 x 6 x 6 float32, 1 int64"


def test_compress_says_why_not(eke, program):
    told = eke("compress", program[1], "--data", "cli_tiny_data.py:task", "--size", "0.5x", code=2).stderr
    assert "is an exported program: its operations are fixed, sizes included" in told


def test_named_inputs_are_kept(tmp_path, program, inputs):
    image, word = inputs
    path = tmp_path / "named.pt2"
    torch.export.save(torch.export.export(program[0], (), {"image": image, "word": word}), path)
    assert set(load_exported(path)[1]) == {"image", "word"}
    torch.export.save(torch.export.export(program[0], (image,), {"word": word}), path)
    with pytest.raises(UsageError, match=r"exported with positional and named inputs \(word\): export it with one"):
        load_exported(path)


class Bad:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("what", ["weights", "inputs", "object", "twice"])
def test_a_file_that_would_run_code_is_refused(tmp_path, program, what, capsys):
    path = tmp_path / "bad.pt2"
    with zipfile.ZipFile(program[1]) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if what == "weights" and name.endswith("weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if what == "inputs" and name.endswith(".pt"):
                torch.save(Bad(), tmp_path / "bad.pt")
                content = (tmp_path / "bad.pt").read_bytes()
            new.writestr(name, content)
        if what == "object":
            new.writestr("net/data/constants/custom_obj_0", b"")
        if what == "twice":
            new.writestr("NET/DATA/weights/weight_0", b"")
            new.writestr("net/DATA/weights/weight_0", b"")
    with pytest.raises(UsageError, match=r"bad\.pt2 holds objects that run code when they are read \(.*give FILE"):
        load_exported(path)
    assert "ran" not in capsys.readouterr().out


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(UsageError, match=r"text\.pt2 is not a file of torch\.export\.save: File is not a zip file"):
        load_exported(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "empty.pt2", "w") as archive:
        archive.writestr("empty/nothing", b"")
    with pytest.raises(UsageError, match=r"torch\.export\.load of torch .* cannot read .*empty\.pt2"):
        load_exported(tmp_path / "empty.pt2")
