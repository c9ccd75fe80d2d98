"""Drawings: well-formed, true to the numbers, named for screen readers, never by colour alone."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from eke.report import Calibrated, Drop, FrontPoint, Speedup, html, wording
from eke.report.charts import COSTS, SHAPES, calibration_chart, front_chart, known_costs
from eke.report.strips import Strip, drop_plot, gauge, seal

from .cases import CASES, calibration, front, good


def elements(markup, tag, **wanted):
    found = ET.fromstring(markup).iter(tag)
    return [e for e in found if all(e.get(k.replace("_", "-")) == v for k, v in wanted.items())]


@pytest.mark.parametrize("name", CASES)
def test_every_drawing_on_the_page_is_well_formed_and_named(name):
    drawings = re.findall(r"<svg.*?</svg>", html.render(CASES[name]()), flags=re.DOTALL)
    assert drawings
    for drawing in drawings:
        root = ET.fromstring(drawing)
        named = [e for e in root.iter() if e.get("role") in ("img", "listbox")]
        assert root.get("aria-hidden") == "true" or named
        for element in named:
            assert element.get("aria-label") or element.get("aria-labelledby")


def test_points_are_options_in_order_of_cost():
    points = front()
    made = front_chart(points, "bytes", as_percent=True)
    options = elements(made, "g", role="option")
    assert len(options) == len(points)
    costs = [points[int(o.get("data-p"))].bytes for o in options]
    assert costs == sorted(costs)
    assert [o.get("tabindex") for o in options] == ["0"] + ["-1"] * (len(options) - 1)
    assert "plan of round 2, chosen, measured: 91.68\u00a0%, 96.8\u00a0kB" in {o.get("aria-label") for o in options}


def test_better_points_are_higher_and_costlier_ones_further_right():
    points = (
        FrontPoint("a", "original", 0.9, None, 100, None, None),
        FrontPoint("b", "chosen", 0.8, None, 50, None, None),
    )
    made = front_chart(points, "bytes", as_percent=True)
    a, b = (
        [*map(float, re.findall(r"[\d.]+", o.get("transform")))] for o in reversed(elements(made, "g", role="option"))
    )
    assert a[0] > b[0]
    assert a[1] < b[1]


def test_the_lowest_is_the_highest_where_less_is_better():
    points = (
        FrontPoint("a", "original", 23.1, (22.0, 24.5), 100, None, None),
        FrontPoint("b", "chosen", 31.0, None, 50, None, None),
    )
    made = front_chart(points, "bytes", as_percent=False, lower_is_better=True)
    b, a = ([*map(float, re.findall(r"[\d.]+", o.get("transform")))] for o in elements(made, "g", role="option"))
    assert a[1] < b[1]
    told = {o.get("aria-label") for o in elements(made, "g", role="option")}
    assert "a, original, measured: 23.10, 100\u00a0B" in told
    ticks = [t.text for t in ET.fromstring(made).iter("text") if t.get("text-anchor") == "end" and t.get("x") == "82"]
    assert len(ticks) > 2
    assert not any("\u2212" in text for text in ticks)
    whisker = elements(made, "line", **{"class": "whisker"})[0]
    assert float(whisker.get("y1")) > a[1] > float(whisker.get("y2"))


@pytest.mark.parametrize(
    ("unit", "axis", "limit"),
    [
        ("points", "points lost", "limit 1.00"),
        ("%", "per cent worse than before", "limit 1.00 %"),
        ("", "lost, in the unit of the score", "limit 1"),
    ],
)
def test_the_drop_plot_names_its_unit(unit, axis, limit):
    made = drop_plot(Drop(0.5, (0.2, 0.8), limit=1.0, unit=unit)).replace("\u00a0", " ")
    assert axis in made
    assert f">{limit}</text>" in made


def test_points_without_score_or_cost_are_left_out():
    points = (*front(), FrontPoint("x", "candidate", None, None, 5), FrontPoint("y", "candidate", 0.5, None, None, 1.0))
    assert len(elements(front_chart(points, "bytes", as_percent=True), "g", role="option")) == len(front())


def test_only_costs_that_two_points_know_can_be_chosen():
    assert [c[1] for c in COSTS] == [key for _, key in known_costs(front())]
    lonely = [replace(p, milliseconds=None) for p in front()]
    assert [key for _, key in known_costs([*lonely, front()[0]])] == ["bytes", "flops"]


def test_kinds_differ_by_shape():
    assert len(set(SHAPES.values())) == len(SHAPES)


def test_names_never_cover_each_other():
    points = [FrontPoint(f"control number {i}", "control", 0.9 + i * 1e-4, None, 1000 + i) for i in range(6)]
    points.append(FrontPoint("far", "original", 0.5, None, 9000))
    texts = [
        t
        for t in ET.fromstring(front_chart(points, "bytes", as_percent=True)).iter("text")
        if "name" in t.get("class", "")
    ]
    assert texts
    boxes = []
    for t in texts:
        wide, x = 7.0 * len(t.text), float(t.get("x"))
        left = {"start": x, "end": x - wide, "middle": x - wide / 2}[t.get("text-anchor")]
        boxes.append((left, left + wide, float(t.get("y"))))
    for i, a in enumerate(boxes):
        assert all(a[1] <= b[0] or b[1] <= a[0] or abs(a[2] - b[2]) >= 15 for b in boxes[:i])


def test_calibration_marks_every_positive_pair():
    pairs = (*calibration(), Calibrated("none", "grid", 0.0, 0.1), Calibrated("gain", "grid", 0.1, -0.1))
    assert len(elements(calibration_chart(pairs), "path")) == len(calibration())
    assert calibration_chart(pairs[-2:]) is None


def test_a_right_prediction_lies_on_the_diagonal():
    pairs = (Calibrated("a", "k", 0.01, 0.01), Calibrated("b", "k", 1.0, 1.0), Calibrated("c", "k", 0.1, 0.1))
    made = ET.fromstring(calibration_chart(pairs))
    diagonal = next(e for e in made.iter("line") if e.get("class") == "axis" and e.get("y1") != e.get("y2"))
    x1, y1, x2, y2 = (float(diagonal.get(k)) for k in ("x1", "y1", "x2", "y2"))
    for path in made.iter("path"):
        x, y = map(float, re.findall(r"[\d.]+", path.get("transform")))
        assert y == pytest.approx(y1 + (x - x1) * (y2 - y1) / (x2 - x1), abs=0.3)


@pytest.mark.parametrize(
    "drop",
    [
        good().drop,
        Drop(-0.1, (-0.4, 0.2), 0.95, "paired", True, 0.5),
        Drop(0.3),
        Drop(0.0),
        Drop(2.0, (1.0, 3.0), limit=0.0),
    ],
)
def test_drop_plot_says_what_it_shows(drop):
    made = drop_plot(drop)
    described = ET.fromstring(made).find("desc").text
    assert described.startswith(wording.points(drop.points))
    assert ("limit is" in described) == (drop.limit is not None)
    assert ("hatch" in made) == (drop.limit is not None)
    assert len(elements(made, "line", **{"class": "cap"})) == (2 if drop.interval else 0)


def test_drop_beyond_the_limit_is_drawn_beyond_it():
    for points, beyond in ((0.9, False), (1.1, True)):
        made = drop_plot(Drop(points, (points - 0.2, points + 0.2), limit=1.0))
        dot = float(elements(made, "circle", **{"class": "dot"})[0].get("cx"))
        limit = float(elements(made, "line", **{"class": "limit"})[0].get("x1"))
        assert (dot > limit) is beyond


def test_gauge_fills_in_proportion():
    made = gauge(50, 100, True)
    limit = float(elements(made, "line", **{"class": "limit"})[0].get("x1")) - 1
    assert float(elements(made, "rect")[0].get("width")) == pytest.approx(limit / 2, abs=0.1)
    assert "50.00\u00a0% of the limit, within it" in made
    assert "beyond it" in gauge(150, 100, False)
    assert elements(gauge(-0.1, 0.5, True), "rect")[0].get("width") == "0.5"
    assert gauge(1.0, 0.0, False) is None


def test_strip_rows_share_one_scale():
    strip = Strip.over([(2.0, (1.9, 2.1)), (1.0, None)], 1.0, wording.ratio)
    at = [float(elements(strip.row(v, i, "x"), "circle")[0].get("cx")) for v, i in ((2.0, (1.9, 2.1)), (1.0, None))]
    zero = float(elements(strip.row(1.0, None, "x"), "line")[0].get("x1"))
    assert at[1] == zero
    assert at[0] > zero


@pytest.mark.parametrize("mark", ["check", "cross", "dash"])
def test_seal_is_read_aloud(mark):
    root = ET.fromstring(seal(mark, "BUDGET MET · ", "Seal: budget met"))
    assert root.get("role") == "img"
    assert root.get("aria-label") == "Seal: budget met"


def test_identical_speeds_do_not_break_the_scale():
    one = Speedup(1.0, (1.0, 1.0))
    assert "<svg" in html.render(replace(good(), speedups=(one, one)))
