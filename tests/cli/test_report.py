"""`eke report`: the same report again, as page, lines or JSON."""

from __future__ import annotations

import dataclasses
import json
import webbrowser

from eke.report import Document

from .conftest import EASY, QUICK, SOURCE


def test_terminal_json_and_page(eke, result, tmp_path):
    assert eke("report", result).stdout.splitlines()[-1].startswith("Budget met, verified.")
    document = json.loads(eke("report", result, "--json").stdout)
    assert Document.from_json(document) == Document.from_json((result / "report.json").read_text())
    assert eke("report", result / "report.json", "--out", tmp_path / "page.html").stdout.strip().endswith("page.html")
    assert (tmp_path / "page.html").read_text() == (result / "report.html").read_text()


def test_open_writes_the_page_and_opens_it(eke, result, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    (result / "report.html").unlink()
    eke("report", result, "--open")
    assert opened == [(result / "report.html").as_uri()]
    assert (result / "report.html").exists()


def test_no_report_is_an_error(eke, tmp_path):
    assert "There is no report at" in eke("report", tmp_path, code=2).stderr
    (tmp_path / "report.json").write_text("{}")
    assert "This eke reads reports of schema" in eke("report", tmp_path, code=1).stderr


def test_notes_are_lines_before_the_verdict(eke, result):
    document = Document.from_json((result / "report.json").read_text())
    noted = dataclasses.replace(document, notes=("The model was wrapped in DDP.",))
    (result / "report.json").write_text(noted.to_json())
    lines = eke("report", result).stdout.splitlines()
    assert lines[0] == "note: The model was wrapped in DDP."
    assert lines[-1].startswith("Budget met, verified.")
    again = eke("compress", *SOURCE, *EASY, *QUICK, "--out", result, "--resume").stdout.splitlines()
    assert again[0] == lines[0]


def test_only_a_full_disk_asks_for_space(eke, result, tmp_path):
    told = eke("report", result, "--out", tmp_path / "missing" / "page.html", code=1).stderr
    assert "page.html could not be written (No such file or directory); what was there before stays" in told
    assert "Free space" not in told
