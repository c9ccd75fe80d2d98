"""A tiny net on made-up images in files, as a person would write them, and one finished result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from eke.cli.main import app

MODEL = """
import torch
from torch import nn


def build():
    print("building")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ).eval()


def other():
    return nn.Linear(3, 2)


def number():
    return 3


def raises():
    return nn.Linear(3, "two")


def needs(width):
    return nn.Linear(width, 2)


weights = 3
"""

DATA = """
import eke
import torch

from cli_tiny_model import build


def batches(count, seed):
    images = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return list(zip(images.split(50), build()(images).argmax(1).split(50)))


def splits():
    return {"calibration": batches(100, 1), "selection": batches(100, 2), "report": batches(200, 3)}


def task():
    return eke.Task(**splits())


def negative_loss(model, batches):
    with torch.no_grad():
        return -float(torch.stack([eke.compression.cross_entropy(model, batch) for batch in batches]).mean())


def scored():
    return {**splits(), "score": negative_loss}


def regression():
    def part(count, seed):
        images = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            targets = build()(images) + 0.1 * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed + 9))
        return list(zip(images.split(50), targets.split(50)))

    score, loss = eke.compression.mean_absolute_error, eke.compression.squared_loss
    return eke.Task(part(100, 1), part(40, 2), part(200, 3), score=score, loss=loss)


def misspelt():
    return {**splits(), "sellection": []}


def two():
    return {"calibration": [], "selection": []}


def iterator():
    return {**splits(), "report": iter([])}


def number():
    return 3
"""

SOURCE = ["cli_tiny_model.py:build", "--data", "cli_tiny_data.py:task"]
QUICK = ["--steps", "2", "--seconds", "0.02", "--threads", "1"]
EASY = ["--max-drop", "90%", "--size", "0.9x"]
HARD = ["--max-drop", "2%", "--size", "0.5x"]

Eke = Callable[..., Result]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "cli_tiny_model.py").write_text(MODEL)
    (folder / "cli_tiny_data.py").write_text(DATA)
    return folder


@pytest.fixture
def eke(files, monkeypatch) -> Eke:
    """Run the command in the folder of the files; whatever it raises beside exits is a failure."""
    monkeypatch.chdir(files)

    def run(*words: object, code: int = 0) -> Result:
        done = CliRunner().invoke(app, [str(word) for word in words], prog_name="eke")
        assert done.exit_code == code, f"exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
        return done

    return run


@pytest.fixture(scope="session")
def finished(files) -> Path:
    """A result with everything a run writes; tests copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        words = ["compress", *SOURCE, *EASY, *QUICK, "--out", "finished"]
        done = CliRunner().invoke(app, words, prog_name="eke")
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    (files / "stdout.txt").write_text(done.stdout)
    (files / "stderr.txt").write_text(done.stderr)
    return files / "finished"


@pytest.fixture
def result(finished, tmp_path) -> Path:
    """A copy of the finished result, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "result"))
