"""Markup: what is not markup is escaped, in text and in attributes, whatever it is."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eke.report.markup import Cell, Column, Markup, escape, h, join, listing, table


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.values = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [value for _, value in attributes]

    def handle_data(self, data):
        self.texts.append(data)


@given(st.text(max_size=200))
def test_any_text_stays_text(text):
    page = h("p", {"title": text}, text, [text, None])
    page.encode()
    reader = Reader(page)
    assert reader.tags == ["p"]
    assert "".join(reader.texts) == reader.values[0] * 2


def test_readable_text_survives():
    reader = Reader(h("p", {}, "a < b & \"c\" — 'd' 中文"))
    assert reader.texts == ["a < b & \"c\" — 'd' 中文"]


@pytest.mark.parametrize("hostile", ["\x00", "\x1b", "\u202e", "\u2066", "\ud800", "\uffff"])
def test_characters_no_font_shows_are_replaced(hostile):
    assert escape(f"a{hostile}b") == "a\ufffdb"


def test_long_text_loses_its_middle():
    assert escape("a" * 50 + "b" * 50, 20) == "a" * 10 + " … " + "b" * 10


def test_attributes_of_none_and_false_are_left_out():
    assert h("a", {"x": None, "y": False, "z": True, "n": 0}) == '<a z="" n="0"></a>'
    assert h("br") == "<br>"
    assert join(["<", Markup("<b>"), None, ["&"]]) == "&lt;<b>&amp;"


def test_table_heads_rows_and_columns():
    made = table("About <x>", [Column("A"), Column("B", True, "measured")], [["r", Cell("1 kB", 1000)]], "t")
    assert '<th scope="row">r</th><td class="n" data-v="1000">1 kB</td>' in made
    assert made.count('scope="col"') == 2
    assert "About &lt;x&gt;" in made
    assert "data-filter" not in made


def test_long_tables_can_be_filtered():
    made = table("c", [Column("A")], [["r"]] * 25, "t")
    assert '<label for="t-filter">' in made
    assert 'id="t-filter" data-filter="t"' in made


def test_listing_says_what_did_not_fit():
    assert listing("ul", "c", []) == ""
    made = listing("ul", "c", [f"item {i}" for i in range(5)], most=2)
    assert "item 1" in made
    assert "item 2" not in made
    assert "3 more are in report.json" in made
