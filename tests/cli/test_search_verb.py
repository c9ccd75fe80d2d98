"""`eke search`: winners within limits, with recipe and report; goes on; says what cannot be meant."""

from __future__ import annotations

import json

import pytest
import yaml

from eke import search
from eke.report import Document

FILE = """
import torch
from torch import nn
from eke.search.spaces import Choices


def build(width, depth):
    layers = [nn.Conv2d(1, width, 3), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def space():
    return Choices({"width": (2, 4, 6), "depth": (1, 2, 3)}, build, torch.zeros(1, 1, 6, 6), name="mine")


def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 1, 6, 6, generator=g), torch.arange(4) % 3) for _ in range(2)]


def three():
    return 3
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_winner_of_a_named_space_keeps_the_limit_and_loads(eke, tmp_path):
    words = ("search", "--space", "nb201", "--resolution", "8", "--macs", "3MMAC", "--threads", "1")
    said = eke(*words, "--proxies", "log_numel,params", "--evaluations", "30", "--out", tmp_path / "found", "--json")
    answer = json.loads(said.stdout)
    assert answer["scored"] == 30 <= answer["proposed"]
    assert answer["costs"]["flops"] <= 6e6
    model = search.load(tmp_path / "found")
    assert sum(p.numel() for p in model.parameters()) == answer["costs"]["parameters"]
    document = Document.from_json((tmp_path / "found" / "report.json").read_text())
    assert document.kind == "search"
    assert document.budget[0].asked == "3MMAC"
    assert document.budget[0].met
    page = (tmp_path / "found" / "report.html").read_text()
    assert "Report on a search" in page
    assert answer["description"] in page
    assert "30 of 30 scored" in said.stderr


def test_recipe_repeats_the_search_and_a_longer_one_goes_on(eke, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    words = ("search", "--space", "nb201", "--resolution", "8", "--proxies", "params", "--macs", "4MMAC", "--seed", "4")
    eke(*words, "--evaluations", "10", "--method", "random", "--out", first)
    eke("search", "--recipe", first / "recipe.yaml", "--out", again)
    assert (first / "trials.jsonl").read_text().count("\n") == 10
    architectures = [
        [json.loads(line)["architecture"] for line in (folder / "trials.jsonl").read_text().splitlines()]
        for folder in (first, again)
    ]
    assert architectures[0] == architectures[1]
    eke("search", "--recipe", first / "recipe.yaml", "--evaluations", "14", "--out", first)
    longer = [json.loads(line)["architecture"] for line in (first / "trials.jsonl").read_text().splitlines()]
    assert longer[:10] == architectures[0]
    assert len(longer) == 14
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    assert recipe["search"]["macs"] == "4MMAC"
    assert recipe["training"]["optimizer"].startswith("SGD")


def test_folder_of_other_proxies_is_not_gone_on_with(eke, tmp_path):
    words = ("search", "--space", "nb201", "--resolution", "8", "--evaluations", "2", "--out", tmp_path)
    eke(*words, "--proxies", "params")
    said = eke(*words, "--proxies", "log_numel", code=1)
    assert "is the log of another search" in said.stderr
    assert "Give another file" in said.stderr


def test_own_space_and_data_with_measured_limits(eke, mine, tmp_path):
    said = eke(
        "search", "--space", f"{mine}:space", "--data", f"{mine}:batches", "--proxies", "zico,az_nas.trainability",
        "--latency", "30s", "--peak-memory", "50MB", "--evaluations", "4", "--method", "regularized",
        "--out", tmp_path / "found",
        code=1,
    )  # fmt: skip
    assert "az_nas looks at blocks" in said.stderr
    said = eke(
        "search", "--space", f"{mine}:space", "--data", f"{mine}:batches", "--proxies", "zico,naswot",
        "--latency", "30s", "--peak-memory", "50MB", "--evaluations", "4", "--out", tmp_path / "other",
    )  # fmt: skip
    assert "is the best of 4 networks that were scored without training" in said.stdout
    assert "latency_seconds" in said.stdout
    assert "memory_bytes" in said.stdout


def test_shared_search_gives_a_front(eke, tmp_path):
    pytest.importorskip("optuna")
    url = f"journal:{tmp_path / 'log'}"
    for evaluations in (3, 5):
        eke(
            "search", "--space", "nb201", "--resolution", "8", "--proxies", "log_numel", "--storage", url,
            "--evaluations", evaluations, "--out", tmp_path / "found",
        )  # fmt: skip
    assert (tmp_path / "found" / "trials.jsonl").read_text().count("\n") == 5


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "Where to search"),
        (("--space", "nb20"), 2, "no space 'nb20'. Did you mean 'nb201'"),
        (("--space", "nb201", "--proxies", "zicco"), 2, "no proxy 'zicco'. Did you mean 'zico'"),
        (("--space", "nb201", "--macs", "0.5x"), 2, "no original to compare with: --macs 0.5x"),
        (("--space", "nb201", "--macs", "1kMAC"), 1, "No architecture of 'nb201' has at most 2000 FLOPs: the smallest"),
        (("--space", "nb201", "--storage", "journal:/nowhere/x", "--proxies", "params"), 1, "cannot be reached"),
        (("--space", "nb201", "--storage", "journal:x", "--method", "random"), 2, "--storage is for --method nsga2"),
        (("--space", "{mine}:three"), 1, "must return an eke.search.spaces.Space, got int"),
        (("--space", "{mine}:space", "--classes", "3"), 2, "says itself what the networks are; leave out classes"),
        (("--space", "nb201", "--data", "{mine}:three"), 1, "must return batches, got int"),
        (("--space", "nb201", "--proxies", "zico"), 1, "a batch has no labels: got Tensor"),
        (("--recipe", "{mine}"), 2, "mine.py is no YAML|has no section 'search'"),
    ],
)
def test_what_cannot_be_meant_is_said(eke, mine, tmp_path, words, code, message):
    import re

    given = [word.replace("{mine}", str(mine)) for word in words]
    said = eke("search", *given, "--evaluations", "2", "--out", tmp_path / "out", code=code)
    assert any(re.search(part if "|" in message else re.escape(part), said.stderr) for part in message.split("|"))


def test_file_in_the_way_is_named(eke, mine):
    said = eke("search", "--space", "nb201", "--out", mine, code=2)
    assert "is a file: give a folder" in said.stderr
