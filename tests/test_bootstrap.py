"""The set-up behind ./try and ./check: when it may be skipped, when .venv must be made anew, what a start returns."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The module, looking at an empty checkout."""
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", ROOT / "tools" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    paths = {"ROOT": tmp_path, "VENV": venv, "STAMP": venv / "eke-setup.json", "PYTHON": venv / "bin" / "python"}
    for name, path in {**paths, "REUSED": venv / "eke-reused.txt"}.items():
        monkeypatch.setattr(module, name, path)
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        (tmp_path / name).write_text(name)
    return module


def make_venv(bootstrap):
    bootstrap.PYTHON.parent.mkdir(parents=True)
    bootstrap.PYTHON.symlink_to(sys.executable)
    (bootstrap.VENV / "pyvenv.cfg").write_text("version = 3")


def finish(bootstrap):
    make_venv(bootstrap)
    bootstrap.write_stamp(bootstrap.fingerprint())


def test_finished_set_up_is_not_repeated(bootstrap, monkeypatch):
    finish(bootstrap)
    monkeypatch.setattr(bootstrap, "set_up", lambda: pytest.fail("set up again"))
    bootstrap.set_up_alone()


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "setup.py", ".venv/pyvenv.cfg"])
def test_changed_requirements_ask_for_an_update(bootstrap, name):
    finish(bootstrap)
    (bootstrap.ROOT / name).write_text("changed")
    assert not bootstrap.ready()
    assert not bootstrap.must_be_rebuilt()


def test_interrupted_set_up_is_made_anew(bootstrap):
    make_venv(bootstrap)
    bootstrap.write_stamp(bootstrap.INSTALLING)
    assert not bootstrap.ready()
    assert bootstrap.must_be_rebuilt()


@pytest.mark.parametrize("name", [".venv/bin/python", ".venv/pyvenv.cfg"])
def test_half_deleted_environment_is_made_anew(bootstrap, name):
    finish(bootstrap)
    (bootstrap.ROOT / name).unlink()
    assert not bootstrap.ready()
    assert bootstrap.must_be_rebuilt()


def test_moved_checkout_is_made_anew(bootstrap):
    finish(bootstrap)
    bootstrap.STAMP.write_text(json.dumps({"root": "elsewhere", "state": bootstrap.fingerprint()}))
    assert not bootstrap.ready()
    assert bootstrap.must_be_rebuilt()


def test_unreadable_stamp_is_no_stamp(bootstrap):
    finish(bootstrap)
    bootstrap.STAMP.write_text("{")
    assert not bootstrap.ready()


def test_environment_made_by_hand_is_kept(bootstrap):
    make_venv(bootstrap)
    assert not bootstrap.ready()
    assert not bootstrap.must_be_rebuilt()


@pytest.mark.parametrize(
    ("version", "fitting"),
    [("2.13.0", True), ("2.15.0+cpu", True), ("3.0.0a0", True), ("2.9.1", False), ("1.14", False)],
)
def test_torch_is_reused_from_its_oldest_version_on(bootstrap, version, fitting):
    assert bootstrap.fits({"torch": version}) is fitting


def test_missing_torch_does_not_fit(bootstrap):
    assert bootstrap.fits(None) is False
    assert bootstrap.find_torch(str(bootstrap.ROOT / "no-such-python")) is None


def test_reused_torch_is_not_installed_by_uv(bootstrap, monkeypatch):
    commands = []
    monkeypatch.setattr(bootstrap, "run", lambda command, advice: commands.append(command))
    bootstrap.VENV.mkdir()
    bootstrap.install("uv")
    bootstrap.REUSED.write_text("torch")
    bootstrap.install("uv")
    assert [str(bootstrap.REUSED) in command for command in commands] == [False, True]


@pytest.mark.parametrize(("code", "returned"), [(0, 0), (3, 0), (1, 1), (2, 2)])
def test_verified_demo_is_a_success_even_over_budget(bootstrap, monkeypatch, code, returned):
    seen = []

    def fake(command):
        seen.append(command)
        return code

    monkeypatch.setattr(bootstrap, "wait_for", fake)
    assert bootstrap.demo(["--out", "there", "--seed", "1"]) == returned
    assert bootstrap.demo([]) == returned
    assert seen[0][1:] == ["compress", "--task", "demo", "--out", "there", "--seed", "1"]
    assert seen[1][1:] == ["compress", "--task", "demo", "--out", "eke-demo"]


def test_interrupted_demo_says_how_to_go_on(bootstrap, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "wait_for", lambda command: 130)
    assert bootstrap.demo([]) == 130
    assert capsys.readouterr().out == "Continue with: ./try --resume\n"
    assert bootstrap.demo(["--resume", "--out", "my folder"]) == 130
    assert capsys.readouterr().out == "Continue with: ./try --out 'my folder' --resume\n"


SLOW_TO_STOP = """
import sys, time
try:
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    time.sleep(1)
    print("continue with: this", flush=True)
    sys.exit(130)
"""


def test_interrupted_child_has_the_time_to_say_how_to_go_on():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import bootstrap; "
        f"sys.exit(bootstrap.wait_for([sys.executable, '-c', {SLOW_TO_STOP!r}]))"
    )
    # A background job of a shell script inherits an ignored SIGINT: the child must not.
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == "continue with: this\n"
    assert process.returncode == 130


def test_failed_command_says_what_to_do(bootstrap):
    with pytest.raises(SystemExit, match=r"Set-up stopped: .* failed .*\. Ask somebody\."):
        bootstrap.run([sys.executable, "-c", "raise SystemExit(1)"], advice="Ask somebody.")


def test_start_without_python_says_what_to_install(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "dirname"):
        (folder / name).symlink_to(next(p for p in (Path("/bin") / name, Path("/usr/bin") / name) if p.exists()))
    old = folder / "python3"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.8.1' && exit 0\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run([str(ROOT / "check")], capture_output=True, text=True, env={"PATH": str(folder)})
    assert done.returncode == 1
    assert "eke needs Python 3.11 or newer; python3 here is: Python 3.8.1." in done.stderr


def test_scripts_are_executable():
    names = ["try", "check", ".ci/run", "tools/start", "tools/nightly", "tools/constraints"]
    assert [name for name in names if not os.access(ROOT / name, os.X_OK)] == []


def test_constraints_leave_torch_free():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"numpy", "scipy", "pytest", "torch-pruning"} <= pinned
    assert not any(n in {"torch", "torchvision", "triton"} or n.startswith(("nvidia-", "cuda-")) for n in pinned)
