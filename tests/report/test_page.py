"""The page in Chromium: no request, no error, usable by keyboard, on a phone, in the dark and on paper."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eke.report import PlanLine, html

from .browser import chromium, executable
from .cases import CASES, good, huge

pytestmark = pytest.mark.skipif(executable() is None, reason="needs chromium, which is not installed here")


@pytest.fixture(scope="module")
def tab():
    with chromium() as page:
        yield page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pages")
    for name, make in CASES.items():
        html.write(make(), place / f"{name}.html")
    return place


@pytest.fixture
def opened(tab, folder):
    tab.resize(1280, 900)
    tab.prefer("light")
    tab.open(folder / "good.html")
    return tab


def troubles(tab):
    wanted = {"Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening", "Runtime.consoleAPICalled"}
    return [e for e in tab.events if e["method"] in wanted]


@pytest.mark.parametrize("name", CASES)
def test_script_runs_without_errors_or_requests(tab, folder, name):
    tab.resize(1280, 900)
    tab.open(folder / f"{name}.html")
    assert tab.ask("document.documentElement.dataset.ready") == "true"
    assert troubles(tab) == []
    requested = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert requested
    assert all(url.startswith(("file:", "data:")) for url in requested)
    assert sum(url.startswith("file:") for url in requested) == 1


def test_no_other_script_can_run(tab, tmp_path):
    path = tmp_path / "injected.html"
    path.write_text(html.render(good()).replace("</body>", "<script>document.title = 'taken'</script></body>"))
    tab.open(path)
    assert tab.ask("document.title") != "taken"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [320, 390, 768])
def test_page_never_scrolls_sideways(tab, folder, name, width):
    tab.resize(width, 800)
    tab.open(folder / f"{name}.html")
    assert tab.ask("document.documentElement.scrollWidth") <= width


def test_words_without_a_break_are_broken(tab, tmp_path):
    long = "w" * 250
    document = replace(
        good(),
        title=long,
        verdict=replace(good().verdict, text=long),
        plan=(PlanLine(long, long),),
        warnings=(long,),
        environment={long: long},
        eke_version=long,
    )
    html.write(document, tmp_path / "long.html")
    tab.resize(320, 800)
    tab.open(tmp_path / "long.html")
    assert tab.ask("document.documentElement.scrollWidth") <= 320


FOCUSED = "document.activeElement"
VISIBLE = f"(s => s.outlineStyle !== 'none' || s.getPropertyValue('--ring') !== '')(getComputedStyle({FOCUSED}))"


def tab_to(page, condition, limit=60):
    for _ in range(limit):
        page.press("Tab")
        if page.ask(f"{FOCUSED}.matches({condition!r})"):
            return
    raise AssertionError(f"Tab never reached {condition}")


def test_first_tab_reaches_the_skip_link(opened):
    opened.press("Tab")
    assert opened.ask(f"{FOCUSED}.className") == "skip"
    assert opened.ask(f"{FOCUSED}.getBoundingClientRect().left") >= 0
    opened.press("Enter")
    assert opened.ask("location.hash") == "#main"


def test_focus_is_visible_everywhere(opened):
    for _ in range(30):
        opened.press("Tab")
        assert opened.ask(VISIBLE), opened.ask(f"{FOCUSED}.outerHTML.slice(0, 200)")


def test_arrow_keys_walk_along_the_chart(opened):
    tab_to(opened, "[role=option]")
    assert opened.ask("document.querySelectorAll('figure:not([hidden])[data-cost] [tabindex=\"0\"]').length") == 1
    seen = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight"):
        opened.press(key)
        seen.append(opened.ask(f"{FOCUSED}.getAttribute('aria-label')"))
        index = opened.ask(f"{FOCUSED}.dataset.p")
        panel = opened.ask("document.getElementById('selected').textContent")
        assert opened.ask(f"document.getElementById('front-{index}').cells[0].textContent") in panel
        assert opened.ask("document.querySelector('#front tr.on').id") == f"front-{index}"
    assert seen[1] == seen[3]
    assert seen[4] == seen[5]
    assert len(set(seen)) == 4
    opened.press("Tab")
    assert not opened.ask(f"{FOCUSED}.matches('[role=option]')")


def test_cost_is_switched_by_a_button(opened):
    tab_to(opened, "[data-axis=bytes]")
    opened.press("Enter")
    shown = "[...document.querySelectorAll('figure[data-cost]')].filter(f => !f.hidden).map(f => f.dataset.cost).join()"
    assert opened.ask(shown) == "bytes"
    assert opened.ask("document.querySelector('[aria-pressed=true]').dataset.axis") == "bytes"


def column(page, table, index):
    return page.ask(f"[...document.querySelectorAll('#{table} tbody tr')].map(r => r.cells[{index}].dataset.v ?? null)")


def test_plan_is_sorted_by_keyboard(opened):
    tab_to(opened, "#plan th:nth-child(4) button")
    for direction, reverse in (("descending", True), ("ascending", False)):
        opened.press("Enter")
        assert opened.ask("document.querySelector('#plan th:nth-child(4)').getAttribute('aria-sort')") == direction
        values = column(opened, "plan", 3)
        known = [float(v) for v in values if v is not None]
        assert known == sorted(known, reverse=reverse)
        assert all(v is None for v in values[len(known) :])


def test_long_tables_are_filtered(tab, folder):
    tab.resize(1280, 900)
    tab.open(folder / "huge.html")
    total = len(column(tab, "plan", 0))
    typed = (
        "(i => { i.value = 'LAYERS.1.'; i.dispatchEvent(new Event('input')); })(document.getElementById('plan-filter'))"
    )
    tab.ask(typed)
    left = tab.ask("[...document.querySelectorAll('#plan tbody tr')].filter(r => !r.hidden).length")
    matching = sum("layers.1." in p.site for p in huge().plan)
    assert 0 < left <= matching < total
    assert tab.ask("document.querySelector('#plan-filter + output').textContent") == f"{left} of {total} rows"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_until_it_is_chosen(tab, folder, scheme):
    background = "getComputedStyle(document.body).backgroundColor"
    tab.prefer(scheme)
    tab.open(folder / "good.html")
    colours = {"light": "rgb(252, 251, 248)", "dark": "rgb(21, 23, 26)"}
    assert tab.ask(background) == colours[scheme]
    tab_to(tab, "#theme")
    tab.press("Enter")
    other = "dark" if scheme == "light" else "light"
    assert tab.ask(background) == colours[other]
    assert tab.ask("document.getElementById('theme').textContent").lower() == f"{scheme} page"


def test_paper_shows_every_chart_and_row(opened):
    opened.send("Emulation.setEmulatedMedia", media="print")
    try:
        hidden = "[...document.querySelectorAll('figure, tr')].filter(e => !e.getClientRects().length).length"
        assert opened.ask(hidden) == 0
        assert opened.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert (
            opened.ask("document.querySelector('.tall').scrollHeight - document.querySelector('.tall').clientHeight")
            <= 1
        )
    finally:
        opened.send("Emulation.setEmulatedMedia", media="")


def test_without_script_everything_is_there(tab, folder):
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(folder / "good.html")
        assert tab.ask("document.documentElement.dataset.ready ?? 'none'") == "none"
        assert tab.ask("[...document.querySelectorAll('figure')].every(f => f.getClientRects().length > 0)")
        assert tab.ask("[...document.querySelectorAll('button')].every(b => !b.getClientRects().length)")
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)


def test_screen_reader_finds_a_name_for_everything_in_the_tab_order(opened):
    nodes = opened.send("Accessibility.getFullAXTree")["nodes"]
    roles = {n["role"]["value"] for n in nodes if not n.get("ignored")}
    assert {"main", "navigation", "banner", "contentinfo", "listbox", "option", "table", "status"} <= roles
    for node in nodes:
        focusable = any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", []))
        if focusable and node["role"]["value"] not in {"RootWebArea", "main"}:
            assert node.get("name", {}).get("value"), node
