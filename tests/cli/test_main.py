"""The command itself: help, version, mistyped verbs and flags."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eke import __version__

VERBS = ("compress", "inspect", "why", "verify", "gate", "report", "factorize", "solve", "search", "doctor")


def test_help_names_every_verb_with_a_whole_sentence(eke):
    shown = eke("--help").stdout
    lines = [line.split(maxsplit=1) for line in shown.partition("Commands:")[2].splitlines() if line.strip()]
    assert {words[0]: words[1][-1] for words in lines[: len(VERBS)]} == dict.fromkeys(VERBS, ".")
    assert "..." not in shown.partition("Commands:")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_debug(eke, verb):
    shown = eke(verb, "-h").stdout
    assert "--json" in shown
    assert "--debug" in shown


def test_no_arguments_show_the_help(eke):
    assert "Commands:" in eke(code=2).output


def test_unknown_verb_suggests_the_nearest(eke):
    assert "No such command 'compres'. Did you mean 'compress'?" in eke("compres", code=2).stderr


def test_unknown_flag_suggests_the_nearest(eke):
    told = eke("compress", "--latancy", "1", code=2).stderr
    assert "No such option: --latancy" in told
    assert "--latency" in told


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "eke", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"eke {__version__}\n"
