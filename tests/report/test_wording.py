"""Numbers as words: the digits that matter, the right prefix, a real minus sign."""

from __future__ import annotations

import pytest

from eke.report import Drop, Score, Speedup, wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1.00"),
        (12.345, "12.3"),
        (123.4, "123"),
        (0.00123456, "0.00123"),
        (-0.5, "\u22120.500"),
        (1234567.0, "1234567"),
        (1e9, "1.00e9"),
        (1.5e-7, "1.50e\u22127"),
        (-2.5e-9, "\u22122.50e\u22129"),
    ],
)
def test_number_keeps_three_digits(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (wording.size, 0, "0 B"),
        (wording.size, 999, "999 B"),
        (wording.size, 999.7, "1.00 kB"),
        (wording.size, 96_800, "96.8 kB"),
        (wording.size, 999_700, "1.00 MB"),
        (wording.size, 3.2e9, "3.20 GB"),
        (wording.duration, 6.31, "6.31 ms"),
        (wording.duration, 0.0021, "2.10 µs"),
        (wording.duration, 2500, "2.50 s"),
        (wording.count, 12, "12"),
        (wording.count, 79e6, "79.0 M"),
        (wording.count, 3.5e12, "3.50 T"),
        (wording.percent, 0.91684, "91.68 %"),
        (wording.points, -0.1, "\u22120.10"),
        (wording.ratio, 3.388, "3.39×"),
        (wording.ratio, 12.81, "12.8×"),
        (wording.ratio, 0.98, "0.98×"),
        (wording.level, 0.95, "95 %"),
        (wording.level, 0.999, "99.9 %"),
        (wording.whole, 45_000, "45\u202f000"),
    ],
)
def test_units(write, value, text):
    assert write(value).replace(wording.NBSP, " ") == text


@pytest.mark.parametrize(
    ("text", "brief"),
    [("1.00 ms", "1 ms"), ("2.50", "2.5"), ("100", "100"), ("10.0 %", "10 %"), ("1.00e9", "1e9"), ("0.0100", "0.01")],
)
def test_ticks_lose_zeros_that_say_nothing(text, brief):
    assert wording.brief(1.0, lambda _: text) == brief


def test_quantity_knows_units():
    assert wording.quantity(1500, "bytes") == "1.50\u00a0kB"
    assert wording.quantity(0.62, "points") == "0.62\u00a0points"
    assert wording.quantity(3.0, "J") == "3.00\u00a0J"
    assert wording.quantity(3.0, "") == "3.00"


def test_score_shows_counts_and_interval():
    counted = Score(0.9, 90, 100, (0.8256, 0.9448), 0.95, "Wilson")
    assert wording.score(counted) == "90.00\u00a0%"
    assert wording.score_detail(counted) == "90/100, 82.56\u00a0% to 94.48\u00a0% (Wilson, 95\u00a0%)"
    plain = Score(-3.21456, interval=(-3.5, -3.0), name="log likelihood")
    assert wording.score(plain) == "\u22123.215"
    assert wording.score_detail(plain) == "\u22123.500 to \u22123.000 (95\u00a0%)"
    assert wording.score_detail(Score(0.5)) == ""


def test_details_say_when_there_is_no_interval():
    assert wording.drop_detail(Drop(0.5)) == "no interval"
    assert wording.speed_detail(Speedup(2.0, threads=4, batch=8)) == "no interval, 4 threads, batch 8"


def test_a_score_says_its_direction():
    assert wording.score_name(Score(0.9)) == "accuracy"
    assert wording.score_name(Score(23.1, name="perplexity", lower_is_better=True)) == "perplexity, lower is better"


def test_a_metric_is_a_share_if_it_says_so():
    assert wording.score(Score(0.5, name="mean IoU", percent=True)) == "50.00\u00a0%"
    assert wording.score(Score(0.5, name="mean reciprocal rank")) == "0.5000"
    assert wording.score(Score(23.14, name="perplexity", lower_is_better=True)) == "23.14"


@pytest.mark.parametrize(
    ("unit", "told", "detail", "quantity"),
    [
        ("points", "0.87 points", "0.31 to 1.44 (95 %)", "0.87 points"),
        ("%", "0.87 % relative", "0.31 to 1.44 % (95 %)", "0.87 %"),
        ("", "0.87", "0.310 to 1.44 (95 %)", "0.870"),
    ],
)
def test_a_drop_is_told_in_its_unit(unit, told, detail, quantity):
    shown = (
        wording.difference(0.87, unit),
        wording.drop_detail(Drop(0.87, (0.31, 1.44), unit=unit)),
        wording.quantity(0.87, unit),
    )
    assert [text.replace(wording.NBSP, " ") for text in shown] == [told, detail, quantity]


def test_glossary_has_the_four_words():
    assert [name for name, _ in wording.GLOSSARY] == ["measured", "statistical", "proved", "estimated"]
