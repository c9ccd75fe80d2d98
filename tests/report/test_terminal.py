"""The terminal: the same words as the page, plain when nobody looks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from eke.report import terminal, wording

from .cases import CASES, good, inspect


def shown(document, **settings):
    out = io.StringIO()
    terminal.render(document, Console(file=out, width=100, **settings))
    return out.getvalue().replace(wording.NBSP, " ").replace(wording.THIN, " ")


@pytest.mark.parametrize("name", CASES)
def test_a_pipe_gets_plain_text(name):
    text = shown(CASES[name]())
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_terminal_gets_colour():
    assert "\x1b[" in shown(good(), force_terminal=True, color_system="standard")


def test_summary_and_verdict_are_there():
    text = shown(good())
    for part in (
        "92.30 %",
        "91.68 %",
        "4 584/5 000",
        "96.8 kB",
        "6.31 ms",
        "drop 0.62 points: 0.28 to 0.96",
        "3.39× faster",
    ):
        assert part in text
    assert "Budget met, verified. At most 1 point" in text


def test_a_metric_of_which_less_is_better_says_so():
    text = shown(CASES["perplexity"]())
    for part in ("perplexity, lower is better", "23.10", "drop 0.87 % relative: 0.31 to 1.44 %", "0.87 %"):
        assert part in text


def test_unmet_budget_and_unclaimed_speed_are_said():
    text = shown(CASES["unmet"]())
    assert "Budget not met, verified." in text
    assert "2.42× (no speed-up claimed)" in text
    assert "warning: 400 report samples" in text


def test_brackets_are_not_taken_for_markup():
    text = shown(CASES["hostile"]())
    assert "<script>" in text


def test_inspection_shows_the_sites_that_take_most_time():
    text = shown(inspect(34))
    assert "the 30 that take most time of 34" in text
    assert text.count("layer") == 30
    slowest = max(inspect(34).sites, key=lambda s: s.share_of_time)
    assert text.index(slowest.name) == text.index("layer")
