"""Files are whole or absent; a run continues what it started and nothing else."""

from __future__ import annotations

import errno
import os
import pathlib

import pytest
import torch

from eke.compression.checkpoint import (
    Run,
    read_json,
    sha256,
    together,
    write_json,
)
from eke.cost import read_tensors, write_bytes, write_tensors

RECIPE = {"seed": 0, "budget": {"size": "0.5x"}}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {
    "bytes": lambda path: write_bytes(path, b"new content"),
    "json": lambda path: write_json(path, {"new": True}),
    "tensors": lambda path: write_tensors(path, {"w": torch.ones(3)}, {}),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("moment", ["open", "fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"old content"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, writer, moment, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(pathlib.Path, moment, full)
    with pytest.raises(
        OSError,
        match=r"file could not be written \(No space left on device\); what was there before stays\. Free space",
    ) as caught:
        WRITERS[writer](path)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if old is not None else [])
    assert old is None or path.read_bytes() == old


def test_an_interrupt_while_writing_leaves_no_partial_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_tensors_come_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 3, 2, 2)
    tensors = {
        "strided": base.to(memory_format=torch.channels_last),
        "view": base[1:, ::2],
        "half": base.half(),
        "count": torch.tensor(7),
        "same storage": base,
        "codes": torch.arange(5, dtype=torch.uint8),
    }
    write_tensors(tmp_path / "t", tensors, {"step": "3"})
    found, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"step": "3"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_a_truncated_file_of_tensors_is_refused(tmp_path):
    write_tensors(tmp_path / "t", {"w": torch.ones(30)}, {})
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"t is not a whole safetensors file \(.*\); restore it or start again"):
        read_tensors(tmp_path / "t")


def test_numbers_that_are_not_finite_are_no_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "j", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_broken_json_is_refused(tmp_path):
    (tmp_path / "j").write_text("{")
    with pytest.raises(ValueError, match=r"j is not valid JSON \(.*\); restore it or start again in a new folder"):
        read_json(tmp_path / "j")


def test_a_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_run_keeps_its_finished_stages(tmp_path):
    run = Run(tmp_path / "run", RECIPE, resume=False)
    assert run.get("costs") is None
    assert run.put("costs", {"pair": (1, 2), "x": 0.1}) == {"pair": [1, 2], "x": 0.1}
    again = Run(tmp_path / "run", RECIPE, resume=True)
    assert again.get("costs") == {"pair": [1, 2], "x": 0.1}
    assert again.path("a.bin") == tmp_path / "run" / "a.bin"


def test_a_run_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(None, RECIPE, resume=False)
    assert run.put("costs", (1, 2)) == [1, 2]
    assert run.get("costs") is None
    assert run.path("x") is None
    run.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_forgets_the_old_one(tmp_path):
    Run(tmp_path / "run", RECIPE, resume=False).put("costs", 1)
    assert Run(tmp_path / "run", {**RECIPE, "seed": 1}, resume=False).get("costs") is None


def test_resuming_where_nothing_is_begins(tmp_path):
    assert Run(tmp_path / "deep" / "run", RECIPE, resume=True).get("costs") is None
    assert read_json(tmp_path / "deep" / "run" / "recipe.json") == RECIPE


def test_a_run_that_was_killed_before_its_recipe_begins_anew(tmp_path):
    Run(tmp_path / "run", RECIPE, resume=False).put("costs", 1)
    (tmp_path / "run" / "recipe.json").unlink()
    (tmp_path / "run" / ".recipe.json.part").write_text("{")
    run = Run(tmp_path / "run", RECIPE, resume=True)
    assert run.get("costs") is None
    assert not (tmp_path / "run" / ".recipe.json.part").exists()


def test_a_finished_run_is_gone(tmp_path):
    run = Run(tmp_path / "run", RECIPE, resume=False)
    run.put("costs", 1)
    (tmp_path / "run" / ".plan.json.part").write_text("half")
    run.finish()
    assert list(tmp_path.iterdir()) == []
    run.finish()


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({**RECIPE, "seed": 1}, r"seed was 0 and is now 1"),
        ({"seed": 0}, r"budget was \{'size': '0\.5x'\} and is now None"),
        ({**RECIPE, "skip": ["a"]}, r"skip was None and is now \['a'\]"),
    ],
)
def test_another_recipe_is_refused_and_nothing_is_lost(tmp_path, recipe, named):
    Run(tmp_path / "run", RECIPE, resume=False).put("costs", 1)
    with pytest.raises(
        ValueError, match=rf"started with another recipe; {named}\. Resume with the same, or start again"
    ):
        Run(tmp_path / "run", recipe, resume=True)
    assert Run(tmp_path / "run", RECIPE, resume=True).get("costs") == 1


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_other_files_is_never_cleared(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"holds files that are not of a run \(thesis\.tex, \.\.\.\): give a new or empty"
    ):
        Run(tmp_path, RECIPE, resume=resume)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_files_written_together_appear_at_the_end(tmp_path):
    (tmp_path / "plan.json").write_text("old")
    with together(tmp_path) as staged:
        (staged / "a").write_text("new a")
        (staged / "plan.json").write_text("new")
        assert not (tmp_path / "a").exists()
        assert (tmp_path / "plan.json").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new a", "plan.json": "new"}


def test_what_fails_half_way_leaves_what_was_there(tmp_path):
    (tmp_path / "plan.json").write_text("old")

    def half() -> None:
        with together(tmp_path) as staged:
            (staged / "plan.json").write_text("new")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        half()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"plan.json": "old"}


def test_openings_are_counted_and_survive_a_kill(tmp_path):
    run = Run(tmp_path / "run", {"a": 1}, resume=False)
    run.opening("report")
    run.opening("selection")
    again = Run(tmp_path / "run", {"a": 1}, resume=True)
    again.opening("report")
    assert again.openings() == {"report": 2, "selection": 1}
    in_memory = Run(None, {}, resume=False)
    in_memory.opening("report")
    assert in_memory.openings() == {"report": 1}
