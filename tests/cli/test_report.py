"""`eke report`: the same report again, as page, lines or JSON."""

from __future__ import annotations

import json
import webbrowser

from eke.report import Document


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
