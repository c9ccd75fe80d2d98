"""The page as text: small, closed to the network, escaped, and built so that everyone can read it."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise

import pytest

from eke.report import FrontPoint, PlanLine, html

from .cases import CASES, HOSTILE, good, huge, inspect, tiny, unmet

VOID = {"meta", "link", "input", "br", "wbr"}
PAGES = {name: html.render(make()) for name, make in CASES.items()}


class Tree(HTMLParser):
    """Tags in order with their attributes, their text and their ancestors; refuses what is not properly nested."""

    def __init__(self, page):
        super().__init__()
        self.open, self.nodes = [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"{tag} has an attribute twice"
        node = {"tag": tag, "at": dict(attributes), "text": "", "in": list(self.open)}
        self.nodes.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for node in self.open:
            node["text"] += data

    def all(self, *tags):
        return [n for n in self.nodes if n["tag"] in tags]


@pytest.fixture(params=CASES)
def page(request):
    return PAGES[request.param]


@pytest.fixture
def tree(page):
    return Tree(page)


def test_page_is_small(page):
    assert len(page.encode()) < 400_000


def test_page_needs_no_network(tree, page):
    for node in tree.nodes:
        for name in ("src", "srcset", "poster", "data", "action", "xlink:href"):
            assert name not in node["at"]
        if "href" in node["at"]:
            assert node["at"]["href"].startswith(("#", "data:,"))
    style = tree.all("style")[0]["text"]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(n["at"]["content"] for n in tree.all("meta") if "http-equiv" in n["at"])
    assert policy.startswith("default-src 'none'")
    digest = base64.b64encode(hashlib.sha256(tree.all("script")[0]["text"].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_nothing_given_becomes_markup(tree):
    assert len(tree.all("script")) == len(tree.all("style")) == 1
    assert len(tree.all("title")) >= 1
    assert not any(key.startswith("on") for n in tree.nodes for key in n["at"])


def test_hostile_names_are_shown_as_they_are():
    readable = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    tree = Tree(PAGES["hostile"])
    assert tree.all("h1")[0]["text"] == readable
    assert sum(n["text"] == readable for n in tree.all("th")) >= 4
    assert HOSTILE[:8] not in re.sub(r"<script>\n?//.*?</script>", "", PAGES["hostile"], flags=re.DOTALL)


def test_ids_are_unique_and_references_exist(tree):
    ids = [n["at"]["id"] for n in tree.nodes if "id" in n["at"]]
    assert len(set(ids)) == len(ids)
    for node in tree.nodes:
        for name in ("aria-labelledby", "for", "aria-describedby"):
            for wanted in node["at"].get(name, "").split():
                assert wanted in ids
        if node["at"].get("href", "").startswith("#"):
            assert node["at"]["href"][1:] in ids


def test_landmarks_headings_and_skip_link(tree):
    for tag in ("header", "nav", "main", "footer", "h1"):
        assert len(tree.all(tag)) == 1, tag
    levels = [int(n["tag"][1]) for n in tree.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert tree.all("a")[0]["at"]["href"] == "#main"
    assert tree.all("html")[0]["at"]["lang"] == "en"


def test_controls_have_names(tree):
    labelled = {n["at"]["for"] for n in tree.all("label")}
    for node in tree.all("button"):
        assert node["text"].strip()
        assert node["at"]["type"] == "button"
    for node in tree.all("input"):
        assert node["at"]["id"] in labelled
    for node in tree.nodes:
        if node["at"].get("role") in {"region", "group", "listbox", "option", "img"} or "tabindex" in node["at"]:
            assert {"aria-label", "aria-labelledby"} & set(node["at"]) or node["tag"] == "main", node


def test_tables_have_captions_and_scopes(tree):
    for node in tree.all("th"):
        assert node["at"]["scope"] in {"row", "col"}
    captions = [n for n in tree.all("caption") if n["text"].strip()]
    assert len(captions) == len(tree.all("table"))


def test_missing_parts_leave_no_empty_section(tree):
    for node in tree.all("section"):
        inside = [n for n in tree.nodes if node in n["in"] and n["at"].get("class") == "content"]
        assert inside[0]["text"].strip()
    assert [n["at"]["id"] for n in Tree(PAGES["tiny"]).all("section")] == ["words"]
    assert len(tree.all("section")) == len([a for a in tree.all("a") if a["in"][-1]["tag"] == "li"])


def test_headline_says_what_was_asked_and_got():
    text = " ".join(Tree(PAGES["good"]).all("header")[0]["text"].split())
    for part in (
        "Certificate of compression",
        "3.39× faster, 12.8× smaller and 0.62 points below",
        "Budget met",
        "verified",
    ):
        assert part in text
    assert "estimated" not in text


def test_only_a_verified_result_that_missed_nothing_is_certified():
    assert "Certificate" not in PAGES["unmet"]
    assert "Budget not met" in PAGES["unmet"]
    unverified = replace(good(), verdict=replace(good().verdict, verified=False))
    assert "Certificate" not in html.render(unverified)


def text_of(page):
    return " ".join(Tree(page).all("body")[0]["text"].replace("\u00a0", " ").replace("\u202f", " ").split())


def test_numbers_stand_with_their_intervals():
    text = text_of(PAGES["good"])
    for part in (
        "4 584/5 000, 90.88 % to 92.41 % (Wilson, 95 %)",
        "3.31× to 3.47× (99 %), 2 threads, batch 64, against the original",
        "Drop: 0.62 points, 0.28 to 0.96 (paired bootstrap, 95 %)",
        "12.8× smaller",
        "3.57× fewer",
    ):
        assert part in text


def test_a_metric_of_which_less_is_better_says_so():
    text = text_of(PAGES["perplexity"])
    for part in (
        "Perplexity, lower is better",
        "22.60 to 24.23 (jackknife over 800 samples, 95 %)",
        "Drop: 0.87 % relative, 0.31 to 1.44 % (jackknife over 800 samples, paired, 95 %)",
        "within the limit of 1.00 % relative, but not the whole interval",
        "1%0.87 %",
    ):
        assert part in text


def test_a_speed_that_is_not_claimed_is_not_called_faster():
    text = text_of(PAGES["unmet"])
    assert "2.42× measured, but no speed-up is claimed" in text
    assert "2.42× faster" not in text


@pytest.mark.parametrize(
    ("proved", "points", "limit", "said"),
    [
        (True, 0.6, 1.0, "The whole interval lies within the limit of 1.00 points"),
        (False, 0.6, 1.0, "but not the whole interval: with 95 % confidence a larger drop is not ruled out"),
        (False, 1.6, 1.0, "drop is beyond the limit of 1.00 points"),
        (False, 1.6, None, "no limit was asked"),
    ],
)
def test_the_drop_is_called_what_it_is(proved, points, limit, said):
    drop = replace(good().drop, proved=proved, points=points, limit=limit, interval=(points - 0.3, points + 0.3))
    assert said in text_of(html.render(replace(good(), drop=drop)))


def test_predicted_numbers_are_marked_as_estimated():
    tree = Tree(PAGES["good"])
    plan = next(n for n in tree.all("table") if n["at"]["id"] == "plan")
    heads = [n["text"] for n in tree.all("th") if plan in n["in"] and n["at"]["scope"] == "col"]
    assert heads[2:4] == ["Loss addedestimated", "Loss addedmeasured"]
    predicted = [n for n in tree.all("td") if plan in n["in"] and "p" in n["at"].get("class", "").split()]
    assert len(predicted) == len(good().plan)


def test_a_plan_of_400_sites_is_shown_whole():
    plain = replace(huge(), sites=(), front=good().front, calibration=good().calibration)
    page = html.render(plain)
    assert len(page.encode()) < 400_000
    assert len(re.findall(r'id="plan-\d+"', page)) == 400


def test_what_does_not_fit_is_said():
    page = html.render(huge())
    shown = len(re.findall(r'id="plan-\d+"', page))
    assert shown < 400
    assert f"The {shown} that matter most of 400; all are in report.json." in page
    kinds = re.findall(r'class="(\w+) measured"', page)
    assert {"chosen", "original", "control"} <= set(kinds)


def test_a_page_that_cannot_fit_is_refused():
    lines = tuple(PlanLine("s", "c") for _ in range(10))
    long = replace(tiny(), plan=lines, notes=("&" * 2000,) * 40, warnings=("&" * 2000,) * 40, recipe="&" * 40_000)
    with pytest.raises(RuntimeError, match=r"report of 'net' needs \d+ bytes with 25 rows a table, more than 400000"):
        html.render(long)


def test_scores_that_are_no_shares_are_not_percent():
    points = tuple(FrontPoint(f"p{i}", "candidate", -2.0 - i, None, 10 + i) for i in range(3))
    page = html.render(replace(tiny(), front=points))
    assert "\u22122.000" in page
    assert "\u2212200" not in page


@pytest.mark.parametrize(
    ("created", "shown"),
    [
        ("2026-11-21T21:40:00+00:00", "21 November 2026, 21:40 UTC"),
        ("2026-11-21", "21 November 2026"),
        ("later", "later"),
    ],
)
def test_date_is_readable(created, shown):
    assert f">{shown}</time>" in html.render(replace(tiny(), created=created))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(a, b):
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(theme):
    style = resources.files("eke.report").joinpath("page.css").read_text()
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)
    colours = {name: pair[theme] for name, *pair in found}
    for text in ("ink", "soft", "accent"):
        for ground in ("paper", "tint"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["axis"], colours["paper"]) >= 3


def test_write_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    html.write(inspect(), path)
    assert path.read_text(encoding="utf-8") == PAGES["inspect"]

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        html.write(unmet(), path)
    assert path.read_text(encoding="utf-8") == PAGES["inspect"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
