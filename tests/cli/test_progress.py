"""Progress: a line when a stage begins and at each tenth of it; nothing on stdout."""

from __future__ import annotations

import io

import rich.console

from eke.cli import progress


def test_plain_lines_come_at_each_tenth(capsys):
    tell = progress.lines()
    for step in range(101):
        tell("recover", step / 100, f"step {step}")
    tell("verify", 0.0, "score")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [*(f"recover: step {s}" for s in range(0, 101, 10)), "verify: score"]


def test_without_a_terminal_lines_are_shown(capsys):
    with progress.shown() as tell:
        tell("plan", 0.0, "round 1")
    assert capsys.readouterr().err == "plan: round 1\n"


def test_on_a_terminal_a_bar_is_shown(monkeypatch):
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(rich.console, "Console", lambda **_: terminal)
    with progress.shown() as tell:
        tell("plan", 0.5, "round [2]")
    assert "round [2]" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()
