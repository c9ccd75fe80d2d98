"""The document: what is written is what is read, and nothing else is accepted."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from eke.report import SCHEMA, BudgetLine, Document, Measured, Score, Speedup, Verdict

from .cases import CASES, good, tiny


@pytest.mark.parametrize("name", CASES)
def test_json_round_trip_is_identity(name):
    document = CASES[name]()
    text = document.to_json()
    assert Document.from_json(text) == document
    assert Document.from_json(text.encode()) == document
    assert Document.from_json(json.loads(text)) == document


def test_json_is_strict_and_ascii():
    def refuse(constant):
        raise AssertionError(constant)

    text = CASES["hostile"]().to_json()
    json.loads(text, parse_constant=refuse)
    assert text.isascii()


def test_document_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        good().title = "another"


def change(path: str, value: object) -> dict:
    """The good document's JSON with one value replaced; `None` as the last key's value removes the key."""
    data = json.loads(good().to_json())
    *way, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    place = data
    for step in way:
        place = place[step]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("extra", 1, r"Document \(schema 2\) has an unknown key 'extra'; allowed: kind, title"),
        ("title", KeyError, r"Document \(schema 2\) lacks the key 'title'"),
        ("schema", 7, r"reads reports of schema 2, got 7"),
        ("schema", KeyError, r"reads reports of schema 2, got no key 'schema'"),
        ("plan.3.colour", "red", r"plan\[3\] has an unknown key 'colour'"),
        ("plan.3.maturity", KeyError, r"plan\[3\] lacks the key 'maturity'"),
        ("plan.3.bytes_before", "12", r"plan\[3\]\.bytes_before must be an int, got str '12'"),
        ("plan.3", 5, r"plan\[3\] must be an object with the keys site, .*, got int 5"),
        ("plan", {}, r"plan must be a tuple, got dict"),
        ("kind", "press", r"kind must be one of 'compress', 'gate', 'inspect', 'search', got str 'press'"),
        ("verdict.met", "yes", r"verdict\.met must be a bool, got str 'yes'"),
        ("verdict", None, r"verdict must be an object"),
        ("drop.points", True, r"drop\.points must be a finite float .*, got bool True"),
        ("after.bytes", 1.5, r"after\.bytes must be an int, got float 1\.5"),
        ("drop.interval", [0.9, 0.1], r"drop\.interval must be \(lower, upper\) with lower <= upper"),
        ("drop.interval", [0.1, 0.2, 0.3], r"drop\.interval must be a tuple, got list"),
        ("environment", {"cores": 2}, r"environment must be a dict of strings"),
        ("notes", [1], r"notes\[0\] must be a str, got int 1"),
    ],
)
def test_misfits_are_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message):
        Document.from_json(change(path, value))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "must be JSON text"), ("[1]", "must be a JSON object, got list"), ("3", "got int 3")]
)
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Document.from_json(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_when_built(value):
    with pytest.raises(ValueError, match=r"speedups\[0\]\.ratio must be a finite float"):
        replace(tiny(), speedups=(Speedup(value),))


def test_wrong_parts_are_refused_when_built():
    with pytest.raises(ValueError, match=r"budget must be a tuple, got list"):
        replace(tiny(), budget=[BudgetLine("drop", "1%", 1.0, 0.5, "points", True)])
    with pytest.raises(ValueError, match=r"verdict must be Verdict, got str"):
        replace(tiny(), verdict="fine")
    with pytest.raises(ValueError, match=r"score\.interval must be a tuple of 2"):
        replace(tiny(), after=Measured("net", Score(0.5, interval=(0.1, 0.2, 0.3))))
    with pytest.raises(ValueError, match=rf"schema must be {SCHEMA}, .* got 1"):
        replace(tiny(), schema=1)


def test_defaults_leave_everything_unmeasured():
    document = Document("gate", "net", "0", "2026-01-01", Verdict(None, False, "Nothing."))
    assert document.schema == SCHEMA
    assert (document.before, document.after, document.drop, document.recipe) == (None, None, None, None)
    assert document.plan == document.front == document.speedups == ()
