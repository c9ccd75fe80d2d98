"""The zoo: a few models in tests, all of them in the committed result; and how a row is made when things go wrong."""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "zoo_inspect.json"
MEMORY = 8 * 2**30


@pytest.fixture(scope="module", autouse=True)
def path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def zoo(path):
    return importlib.import_module("zoo")


@pytest.fixture(scope="module")
def models(path):
    return importlib.import_module("zoo_models")


def check_inspect(zoo, name):
    pytest.importorskip(name.partition(":")[0])
    row = zoo.isolated(zoo.inspect_row, name, seconds=500, memory=MEMORY)
    assert row["ok"], row["where"]
    counters = row["counters"]
    assert row["sites"] > 5
    assert row["groups"] > 0
    assert row["flops"] == counters["eke"] > 0
    for rival, causes in counters["causes"].items():
        assert counters["eke"] - sum(causes.values()) == counters[rival], rival
        assert not [cause for cause in causes if cause.startswith("unexplained")]


@pytest.mark.parametrize("number", range(4))
def test_inspect_runs_and_explains_every_other_count(zoo, models, number):
    check_inspect(zoo, models.SMOKE[number])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4, 12))
def test_inspect_runs_on_a_dozen_families(zoo, models, number):
    check_inspect(zoo, models.NIGHTLY[number])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net:gru", "net:rnet", "net:quantized"])
def test_compress_ends_in_a_proof_or_a_reason(zoo, path, name):
    compress = importlib.import_module("zoo_compress")
    row = zoo.isolated(compress.row, name, seconds=500, memory=MEMORY)
    assert row["ok"], row["where"]
    assert compress.good(row), row
    assert row["answer"] == ("refused" if name == "net:quantized" else "verified")


@pytest.mark.parametrize("name", ["unet", "gated", "tied", "shared", "rnet", "dictionaries"])
def test_cuts_of_real_weights_equal_their_masks(path, name):
    compress, nets = importlib.import_module("zoo_compress"), importlib.import_module("zoo_nets")
    net = nets.NETS[name]
    torch.manual_seed(0)
    found = compress.groups_row(net.build().eval(), net.inputs(4, torch.Generator().manual_seed(0)))
    assert found["wrong"] == []
    assert found["worst"] <= compress.TOLERANCE


def test_a_row_is_good_if_it_is_proved_or_refused_with_a_name(path):
    compress = importlib.import_module("zoo_compress")
    row = {"ok": True, "answer": "verified", "wrong": []}
    assert compress.good(row)
    assert compress.good({**row, "answer": "refused", "names": "layer1"})
    for change in (
        {"answer": "refused", "names": ""},
        {"answer": "not what it claims"},
        {"wrong": ["a"]},
        {"ok": False},
    ):
        assert not compress.good({**row, **change})


class Fails(nn.Module):
    """A net that fails two modules down."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))

    def forward(self, x):
        return self.outer(x)


def fails(name, stages, model_of):
    stages.begin("forward")
    model_of["model"] = Fails()
    model_of["model"](torch.zeros(1, 4))


def hangs(name, stages, model_of):
    time.sleep(600)


def spins(name, stages, model_of):
    while True:
        pass


def grows(name, stages, model_of):
    return {"number": bytearray(2**33)[0]}


def dies(name, stages, model_of):
    os._exit(3)


def works(name, stages, model_of):
    return {"number": len(name)}


def test_an_error_names_the_stage_and_the_module(zoo):
    row = zoo.isolated(fails, "x", seconds=60, memory=MEMORY)
    assert (row["ok"], row["stage"], row["module"]) == (False, "forward", "outer.1")
    assert "mat1 and mat2 shapes cannot be multiplied" in row["error"]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (hangs, "stopped after 10 s"),
        (spins, "stopped after 1 s of the processor"),
        (grows, "MemoryError"),
        (dies, r"the process died \(exit code 3\)"),
    ],
)
def test_a_model_that_takes_too_much_is_a_row(zoo, job, message):
    row = zoo.isolated(job, "x", seconds={hangs: 0.5, spins: 1}.get(job, 60), memory=2**32)
    assert not row["ok"]
    assert re.search(message, row["error"])


def test_a_run_goes_on_where_it_stopped(zoo, tmp_path, capsys):
    work = tmp_path / "deep" / "rows.jsonl"
    limits = {"seconds": 60, "memory": MEMORY}
    zoo.run(fails, ["a"], work, again=False, **limits)
    rows = zoo.run(works, ["a", "bb"], work, again=False, **limits)
    assert [row["ok"] for row in rows] == [False, True]
    rows = zoo.run(works, ["a", "bb"], work, again=True, **limits)
    assert [row["number"] for row in rows] == [1, 2]
    assert len(work.read_text().splitlines()) == 3
    assert "1/2 a:" in capsys.readouterr().out


def test_reasons_are_counted_without_names(zoo):
    row = {
        "name": "net:m", "ok": True, "where": "x", "skipped": {"a.b": "kept", "a.c": "kept"},
        "whole": [["l", "a.b.c: LayerNorm averages the channels"], ["m", "a.d: LayerNorm averages the channels"]],
    }  # fmt: skip
    assert zoo.compact(row) == {
        "name": "net:m", "family": "net", "ok": True, "skipped": {"kept": 2},
        "whole": {"LayerNorm averages the channels": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "plain"),
    [
        ("stages.0.norm: LayerNorm2d averages over the channels", "LayerNorm2d averages over the channels"),
        ("norm: LayerNorm averages over the channels", "LayerNorm averages over the channels"),
        (
            "heads: the cut model does not run (RuntimeError: shape '[2, 3]' is bad)",
            "heads: the cut model does not run (RuntimeError: shape ...)",
        ),
        ("the cut model does not run (TypeError: -1)", "the cut model does not run (TypeError: ...)"),
        ("the cut model differs from the masked one by 1.3e-02 relative", "the cut model differs from the masked one"),
    ],
)
def test_reasons_of_one_kind_read_alike(zoo, reason, plain):
    assert zoo.plain_reason(reason) == plain


def test_the_page_says_what_the_rows_say(path):
    page = importlib.import_module("zoo_page")
    good = {
        "name": "timm:a", "family": "timm: a", "ok": True, "input": [1, 3, 8, 8], "parameters": 1500, "flops": 100,
        "sites": 4, "groups": 2, "whole": {"tied": 3}, "seconds": {"inspect": 1.6},
        "counters": {"torch": 100, "fvcore": 60, "causes": {"torch": {}, "fvcore": {"norms | pooling": 40}}},
    }  # fmt: skip
    bad = {"name": "timm:b", "family": "timm: a", "ok": False, "module": "x.y", "error": "ValueError: 5 | 6"}
    cut = {"name": "net:c", "ok": True, "answer": "verified", "share": 0.9, "bytes": [2000, 900], "groups": 1}
    no = {"name": "net:d", "ok": True, "answer": "refused", "said": "because", "groups": 0, "worst": 0.0, "wrong": []}
    shown = page.page(
        {"rows": [good, bad], "environment": {"cpu": "a chip"}},
        {"rows": [cut | {"worst": 2e-16, "wrong": []}, no, {"name": "net:e", "ok": False, "error": "slow"}]},
    )
    for line in (
        "**`eke inspect` ran on 1 of 2 (50.0%)**",
        r"| timm:b | x.y | ValueError: 5 \| 6 |",
        "| timm: a | 1 of 2 | 4 | 2 | 3 | tied |",
        "| fvcore | 1 of 1 | 2 | 0 | 1.200 / 1.200 / 1.200 |",
        r"| fvcore | norms \| pooling | 1 | +40.00% / +40.00% / +40.00% |",
        "| net:c | verified at 0.9x | 2 kB → 900B | 1 | 2.0e-16 | 0 |",
        "| net:d | refused: because |",
        "| net:e | slow |",
        "| timm:a | 1x3x8x8 | 1.5 k | 100 | 4 | 2 | 3 | 2 |",
    ):
        assert line in shown


@pytest.mark.skipif(not RESULT.exists(), reason="the whole zoo was not run yet")
def test_the_page_is_written_from_the_committed_results(path):
    page = importlib.import_module("zoo_page")
    assert page.PAGE.read_text(encoding="utf-8") == page.read()


@pytest.mark.skipif(not RESULT.exists(), reason="the zoo was not run yet")
def test_the_committed_result_names_every_model_or_says_that_it_is_not_whole(models):
    document = json.loads(RESULT.read_text())
    names = {row["name"] for row in document["rows"]}
    wanted = {f"timm:{name}" for name in models.TIMM.split()}
    torchvision = sum(name.startswith("torchvision:") for name in names)
    assert document["whole"] == (names >= wanted and torchvision >= 80)


@pytest.mark.skipif(not RESULT.exists(), reason="the zoo was not run yet")
def test_the_committed_result_holds_what_is_claimed():
    rows = json.loads(RESULT.read_text())["rows"]
    assert sum(row["ok"] for row in rows) >= 0.99 * len(rows)
    for row in rows:
        if row["ok"]:
            for rival, causes in row["counters"]["causes"].items():
                assert row["flops"] - sum(causes.values()) == row["counters"][rival], (row["name"], rival)
                assert not [cause for cause in causes if cause.startswith("unexplained")], row["name"]
