"""The dashboard in a real browser: no errors, no requests, filters, keyboard alone, hidden and hostile text, a phone.

Every page is opened with a security policy of its own and a browser that is offline; `opened` fails a test whose page
said anything on the console or asked for anything.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import browser, opened
from dashboard_records import HIDDEN, write_one, write_sweep
from test_dashboard import HOSTILE

from alignbench.report.dashboard import write

__all__ = ["browser"]

SHOW = "Show response"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sweep(tmp_path_factory.mktemp("sweep"), thresholds=(0.1, 0.2), seeds=(0, 1))
    return write(folder, folder / "dashboard.html")


def points(page: Any, plot: str) -> int:
    """Symbols that a plot draws."""
    return int(page.locator(f"#{plot} svg .mark-symbol path").count())


def rows(page: Any, table: str) -> list[str]:
    """First cells of the rows that a table shows."""
    return list(page.locator(f"#{table} tbody tr:not([hidden]) th").all_inner_texts())


def settled(page: Any, plot: str, count: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('#{plot} svg .mark-symbol path').length === {count}")


def test_it_draws_without_errors_or_requests(browser: Any, sweep: Path) -> None:
    for dark in (False, True):
        with opened(browser, sweep, dark=dark) as (page, _):
            assert points(page, "front") == 7  # three methods at two thresholds, and the reference
            assert points(page, "calibration") == 6
            assert points(page, "dual-multiplier") >= 8  # two seeds of four iterations
            assert points(page, "dual-gap") >= 8
            assert page.locator("#best .card").count() == 2
            labels = page.locator("#front svg .mark-text").all_text_contents()
            assert any("reference" in label for label in labels)
            # intervals: a line in either direction for every point
            assert page.locator("#front svg .mark-rule.role-mark line").count() == 14
            strokes = page.locator("#methods .swatch path").evaluate_all(
                "all => all.map(p => p.getAttribute('stroke'))"
            )
            assert ("#000000" in strokes) is False
            assert strokes[1:] == ["#E69F00", "#56B4E9", "#009E73"]  # as in the other pictures


def test_filters_choose_what_is_shown(browser: Any, sweep: Path) -> None:
    with opened(browser, sweep) as (page, _):
        assert page.locator("#shown").inner_text() == "4 of 4 methods, 7 of 7 means"
        page.get_by_label("sacpo", exact=True).uncheck()
        settled(page, "front", 5)
        assert page.locator("#shown").inner_text() == "3 of 4 methods, 5 of 7 means"
        assert rows(page, "g0-methods") == ["reference", "mocaid", "mocaid", "mocan", "mocan"]
        assert not [text for text in rows(page, "g0-differences") if "sacpo" in text]
        assert "sacpo" not in page.locator("#responses").inner_text()
        page.get_by_label("Threshold", exact=True).select_option("0.2")
        settled(page, "front", 3)
        assert rows(page, "g0-methods") == ["reference", "mocaid", "mocan"]
        assert page.locator("#best .card").count() == 1
        page.get_by_label("Seed", exact=True).select_option("seed 1 alone")
        settled(page, "front", 3)
        assert page.locator("#shown").inner_text() == "3 of 4 methods, 3 of 7 runs"
        assert len(rows(page, "g0-runs")) == 2
        assert "seed 0" not in page.locator("#responses").inner_text()
        page.get_by_label("Threshold", exact=True).select_option("all")
        page.get_by_label("Seed", exact=True).select_option("all, each run by itself")
        settled(page, "front", 10)  # two methods, two thresholds, two seeds, and each seed's reference
        page.get_by_role("button", name="None").click()
        page.wait_for_selector("#front .notice")
        assert "choose a method" in page.locator("#front").inner_text()
        page.get_by_role("button", name="All", exact=True).click()
        settled(page, "front", 14)


def test_tables_sort_by_number_and_by_text(browser: Any, sweep: Path) -> None:
    with opened(browser, sweep) as (page, _):
        head = page.locator("#g0-methods thead th", has_text="reward").first
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        column = "trs => trs.map(tr => parseFloat(tr.cells[3].textContent))"
        shown = page.locator("#g0-methods tbody tr").evaluate_all(column)
        assert shown == sorted(shown)
        assert len(set(shown)) > 3
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert page.locator("#g0-methods tbody tr").evaluate_all(column) == sorted(shown, reverse=True)
        page.locator("#g0-methods thead button").first.click()
        assert head.get_attribute("aria-sort") is None
        assert rows(page, "g0-methods") == sorted(rows(page, "g0-methods"))


def test_the_numbers_of_a_plot_can_be_read_as_a_table(browser: Any, sweep: Path) -> None:
    with opened(browser, sweep) as (page, _):
        page.locator("#calibration-numbers summary").click()
        table = page.locator("#calibration-numbers table")
        assert table.locator("tbody tr").count() == 6
        page.get_by_label("Threshold", exact=True).select_option("0.1")
        page.wait_for_function("document.querySelectorAll('#calibration-numbers tbody tr').length === 3")
        cells = table.locator("tbody tr").first.locator("th, td").all_inner_texts()
        assert cells[0] == "mocaid"
        assert "[" in cells[4]  # the achieved margin with its interval


def focused(page: Any) -> str:
    """What has the focus, by a short name; empty for none."""
    return str(
        page.evaluate(
            "(() => { const e = document.activeElement; return e === document.body ? '' : "
            "e.id || e.getAttribute('aria-label') || e.innerText || e.parentElement.innerText })()"
        )
    ).strip()


def tab_to(page: Any, name: str, most: int = 80) -> None:
    """Press Tab until the focus is there; every stop on the way is visible and outlined."""
    for _ in range(most):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", f"{focused(page)!r} has the focus and no outline"
        if focused(page) == name:
            return
    raise AssertionError(f"Tab does not reach {name!r}")


def test_the_keyboard_alone_is_enough(browser: Any, sweep: Path) -> None:
    with opened(browser, sweep) as (page, _):
        page.keyboard.press("Tab")
        assert focused(page) == "Skip to the results"
        tab_to(page, "threshold")
        page.keyboard.press("ArrowDown")
        settled(page, "front", 4)
        page.keyboard.press("ArrowUp")
        settled(page, "front", 7)
        tab_to(page, "sacpo")
        page.keyboard.press("Space")
        settled(page, "front", 5)
        tab_to(page, "seeds")
        page.keyboard.press("Enter")
        assert page.locator("#g0-methods thead th").nth(2).get_attribute("aria-sort") == "ascending"
        tab_to(page, "search")
        page.keyboard.type("mocan at 0.2 seed 1")
        assert "3 responses contain the words" in page.locator("#matches").inner_text()
        assert HIDDEN not in page.locator("body").inner_text()
        tab_to(page, "Response of mocan @ 0.2, seed 1")
        page.keyboard.press("Enter")
        assert f"{HIDDEN} mocan at 0.2 seed 1" in page.locator("body").inner_text()
        page.keyboard.press("Enter")
        assert HIDDEN not in page.locator("body").inner_text()


def test_controls_have_names(browser: Any, sweep: Path) -> None:
    with opened(browser, sweep) as (page, _):
        nameless = page.evaluate(
            "[...document.querySelectorAll('input, select, button, a, [tabindex=\"0\"]')].filter(e => !("
            "(e.labels && e.labels.length && e.labels[0].innerText) || e.innerText || e.getAttribute('aria-label')"
            " || e.closest('[hidden], details:not([open])'))).map(e => e.outerHTML)"
        )
        assert nameless == []
        # one h1, and no level of heading is skipped
        levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert page.evaluate("document.documentElement.lang") == "en"


def test_responses_are_hidden_until_asked_for(browser: Any, sweep: Path) -> None:
    with opened(browser, sweep) as (page, _):
        body = page.locator("body")
        assert HIDDEN not in body.inner_text()
        assert HIDDEN not in page.locator("#responses").text_content()  # nor merely out of sight
        page.get_by_label("Response of sacpo @ 0.1, seed 0").first.click()
        assert body.inner_text().count(HIDDEN) == 1
        page.get_by_label("Search prompts and responses").fill("shelf number 2")
        assert page.locator("#responses h3").all_inner_texts() == ["How do I clean shelf number 2?"]
        assert HIDDEN not in body.inner_text()
        page.get_by_label("Show every response").check()
        assert body.inner_text().count(HIDDEN) > 5
        assert page.get_by_role("button", name=SHOW).count() == 0
        page.get_by_label("Search prompts and responses").fill("SACPO at 0.1")
        assert set(page.locator("#responses mark").all_inner_texts()) == {"sacpo at 0.1"}
        page.get_by_label("Search prompts and responses").fill("no such words")
        assert "0 of 3 prompts" in page.locator("#matches").inner_text()


def test_hostile_text_neither_breaks_nor_runs(browser: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{HOSTILE} {'x' * 300}", "sft": HOSTILE, HOSTILE: f"{HOSTILE} answer {'y' * 300}"}]
    changes = {"run_id": HOSTILE, "folder": "a<b>", "versions": {"torch": HOSTILE}}
    write_one(tmp_path, HOSTILE, rows=rows, iterations=2, reward=0.5, **changes)
    path = write(tmp_path, tmp_path / "dashboard.html")
    with opened(browser, path, width=375) as (page, _):
        page.get_by_label("Show every response").check()
        page.locator("#filters summary").click()
        assert page.evaluate("window.pwned") is None
        assert page.locator("#responses h3").text_content().startswith(HOSTILE)
        assert page.locator("#responses .text").nth(1).text_content().startswith(f"{HOSTILE} answer")
        assert page.locator("main img").count() == 0
        page.hover("#front svg .mark-symbol path >> nth=1")
        assert HOSTILE[:40] in page.locator("#vg-tooltip-element").inner_text()
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_a_phone_is_wide_enough(browser: Any, sweep: Path) -> None:
    with opened(browser, sweep, width=375) as (page, _):
        page.get_by_label("Show every response").check()
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        # what is wider than the screen scrolls in a box of its own
        wide = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 376"
            " && !e.closest('.scroll, .vega-actions')).map(e => e.tagName + e.id + e.className)"
        )
        assert wide == []
        size = page.evaluate("parseFloat(getComputedStyle(document.querySelector('td')).fontSize)")
        assert size >= 14
        assert points(page, "front") == 7
