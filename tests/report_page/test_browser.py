"""The report in a real browser; skipped where Chromium is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from moxe_plugin.report.content import Report
from moxe_plugin.report_page.page import render_page
from tests.browser import NEEDS_CHROMIUM, watch_pages
from tests.report_page.conftest import HOSTILE

pytestmark = NEEDS_CHROMIUM

_MAIN: Final = "#c1-main"
_PAIRS: Final = "#c1-pairs"


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render_page(report)


@pytest.fixture
def page(browser: Chrome, tmp_path: Path, html: str) -> Iterator[Chrome]:
    """Open the report; complain of what it did wrong."""
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")

    with watch_pages(browser, file):
        browser.get(file.as_uri())
        yield browser


def _column(page: Chrome, table: str, idx: int) -> list[str]:
    script = """
      const rows = [...document.querySelector(arguments[0]).tBodies[0].rows];
      return rows.filter((r) => !r.hidden)
        .map((r) => r.cells[arguments[1]].firstChild.textContent.trim());
    """
    return list(page.execute_script(script, table, idx))


def _heads(page: Chrome, table: str) -> dict[str, WebElement]:
    heads = page.find_elements(By.CSS_SELECTOR, f"{table} .heads th")

    return {str(head.get_property("textContent")): head for head in heads}


def _orders(page: Chrome, table: str) -> dict[str, str]:
    return {
        name: order
        for name, head in _heads(page, table).items()
        if (order := head.get_attribute("aria-sort"))
    }


def test_a_click_sorts_numbers_as_numbers(page: Chrome) -> None:
    heads = _heads(page, _MAIN)
    idx = list(heads).index("tokens/s ↑")
    button = heads["tokens/s ↑"].find_element(By.TAG_NAME, "button")

    # The best first, the guess that has none last.
    button.click()
    assert _column(page, _MAIN, idx) == ["1,234", "987", "98", "10", "—"]
    assert _orders(page, _MAIN) == {"tokens/s ↑": "descending"}

    button.click()
    assert _column(page, _MAIN, idx) == ["10", "98", "987", "1,234", "—"]
    assert _column(page, _MAIN, 0)[0] == "Xlstm"
    assert _orders(page, _MAIN) == {"tokens/s ↑": "ascending"}


def test_the_keyboard_sorts_too(page: Chrome) -> None:
    button = _heads(page, _MAIN)["system"].find_element(By.TAG_NAME, "button")

    button.send_keys(Keys.ENTER)
    names = _column(page, _MAIN, 0)
    assert names == sorted(names, key=str.lower)

    button.send_keys(Keys.SPACE)
    assert _column(page, _MAIN, 0) == names[::-1]

    script = "return document.getElementById('announce').textContent"
    assert page.execute_script(script) == "Sorted by system, descending"


def test_pairs_are_filtered_by_metric_and_system(page: Chrome) -> None:
    form = page.find_element(By.CSS_SELECTOR, "#c1 form:has(.pick-metric)")
    metric, system = (
        Select(form.find_element(By.CLASS_NAME, f"pick-{name}"))
        for name in ("metric", "system")
    )

    # One metric at first: 4 systems make 6 pairs, and 4 with the guess.
    assert set(_column(page, _PAIRS, 0)) == {"valid loss, nats"}
    assert len(_column(page, _PAIRS, 0)) == 10

    metric.select_by_visible_text("LAMBADA accuracy")
    assert set(_column(page, _PAIRS, 0)) == {"LAMBADA accuracy"}

    system.select_by_visible_text("Gemma2")
    # With three systems and the guess.
    pairs = list(zip(_column(page, _PAIRS, 1), _column(page, _PAIRS, 2), strict=True))
    assert len(pairs) == 4
    assert all("Gemma2" in pair for pair in pairs)

    metric.select_by_visible_text("all")
    num_shown = len(_column(page, _PAIRS, 0))
    assert num_shown > 4
    assert form.text.endswith(f"{num_shown} of {_count_rows(page)} pairs")


def _count_rows(page: Chrome) -> int:
    return len(page.find_elements(By.CSS_SELECTOR, f"{_PAIRS} tbody tr"))


def test_columns_can_be_shown_by_group(page: Chrome) -> None:
    def shown() -> list[str]:
        return [name for name, h in _heads(page, _MAIN).items() if h.is_displayed()]

    every = shown()
    select = Select(page.find_element(By.CSS_SELECTOR, "#c1 .pick-group"))

    select.select_by_value("Cost")
    assert shown() == [
        "system",
        "seeds",
        "tokens/s ↑",
        "peak memory, GiB ↓",
        "wall time, s ↓",
    ]

    select.select_by_value("")
    assert shown() == every


def test_html_in_a_label_is_shown_and_never_executed(page: Chrome) -> None:
    assert HOSTILE in _column(page, "#c2-main", 0)
    assert page.execute_script("return typeof window.hacked") == "undefined"


def test_figures_are_drawn(page: Chrome) -> None:
    script = "return [...document.images].map((i) => [i.complete, i.naturalWidth])"
    images = page.execute_script(script)

    assert images
    assert all(complete and width > 100 for complete, width in images)


def test_a_narrow_screen_scrolls_tables_only(page: Chrome) -> None:
    metrics = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    try:
        script = "return document.documentElement.scrollWidth"
        assert page.execute_script(script) <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
