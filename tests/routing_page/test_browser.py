"""The routing page in a real browser: Chromium without a window, by Selenium.

Skipped where `chromium` or `chromedriver` is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from moxe_plugin.routing_page.html import render_page
from moxe_plugin.routing_page.view import RoutingView
from tests.browser import NEEDS_CHROMIUM, requested_urls, watch_pages
from tests.routing_page.conftest import HOSTILE_TEXT, Read

pytestmark = NEEDS_CHROMIUM

Open = Callable[..., None]


@pytest.fixture
def show(browser: webdriver.Chrome, tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens the page; complain of what the page did wrong."""
    file = tmp_path / "routing.html"

    def show(view: RoutingView, **kwargs: Any) -> None:
        file.write_text(render_page(view, **kwargs), encoding="utf-8")
        browser.get(file.as_uri())

    with watch_pages(browser, file):
        yield show


def _tokens(browser: webdriver.Chrome) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, "#text .t")


def _marks(browser: webdriver.Chrome) -> list[str | None]:
    return [token.get_attribute("data-mark") for token in _tokens(browser)]


def _text_of(browser: webdriver.Chrome, selector: str) -> list[str]:
    return [e.text for e in browser.find_elements(By.CSS_SELECTOR, selector)]


def _hover(browser: webdriver.Chrome, idx: int) -> None:
    ActionChains(browser).move_to_element(_tokens(browser)[idx]).perform()
    _wait_until_shown(browser, idx)


def _wait_until_shown(browser: webdriver.Chrome, idx: int) -> None:
    # Chromium hands pointer events to the page with its next frame.
    selector = f"#text .shown[data-i='{idx}']"
    WebDriverWait(browser, 20).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, selector)
    )


def _assert_describes(
    browser: webdriver.Chrome, view: RoutingView, layer_idx: int, idx: int
) -> None:
    layer = view.trace.layers[layer_idx]
    chosen = layer.expert_indices[idx].tolist()
    weights = {
        expert: f"{weight:.4f}"
        for expert, weight in zip(chosen, layer.expert_weights[idx], strict=True)
    }

    assert _text_of(browser, "#loss") == [f"{view.trace.nll_nats[idx]:.4f} nats"]
    assert _text_of(browser, "#experts .prob") == [
        f"{p:.4f}" for p in layer.router_probs[idx]
    ]
    assert _text_of(browser, "#experts .weight") == [
        weights.get(expert, "") for expert in range(view.num_experts)
    ]
    assert _text_of(browser, "#experts .chosen .name") == [
        f"▸ {view.expert_name(expert)}" for expert in sorted(chosen)
    ]

    if layer.difficulty is not None:
        assert _text_of(browser, "#difficulty") == [f"{layer.difficulty[idx]:.4f}"]


def test_html_in_the_text_is_shown_and_never_executed(
    browser: webdriver.Chrome, show: Open, read: Read
) -> None:
    view = read(HOSTILE_TEXT)
    show(view)

    shown = HOSTILE_TEXT
    for char in "\u2028\x00\r\u202e":
        shown = shown.replace(char, f"U+{ord(char):04X}")

    script = "return document.getElementById('text').textContent"
    assert browser.execute_script(script) == shown

    # Every token, the panel that names it included.
    for token in range(0, len(view.pieces), 7):
        _hover(browser, token)
        _assert_describes(browser, view, 0, token)

    script = "return [typeof window.hacked, document.images.length]"
    assert browser.execute_script(script) == ["undefined", 0]


def test_the_policy_stops_a_script_that_is_not_ours(
    browser: webdriver.Chrome, tmp_path: Path, read: Read
) -> None:
    html = render_page(read("a")).replace("</main>", "</main><script>hacked=1</script>")
    file = tmp_path / "changed.html"
    file.write_text(html, encoding="utf-8")
    browser.get(file.as_uri())

    script = "return typeof window.hacked"
    assert browser.execute_script(script) == "undefined"

    (entry,) = browser.get_log("browser")  # type: ignore[no-untyped-call]
    assert "Content Security Policy" in entry["message"]
    requested_urls(browser)


def test_the_slider_changes_layer_marks_and_colours(
    browser: webdriver.Chrome, show: Open, read: Read
) -> None:
    view = read("Some text to read, in two layers.")
    show(view)

    def steps() -> list[str | None]:
        return [token.get_attribute("data-step") for token in _tokens(browser)]

    first, second = (view.marks(layer) for layer in view.trace.layers)
    assert first != second

    assert _marks(browser) == first
    steps_before = steps()

    browser.find_element(By.ID, "layer").send_keys(Keys.ARROW_RIGHT)

    assert _text_of(browser, "#layer-name") == ["1"]
    assert _marks(browser) == second
    assert steps() != steps_before
    assert _text_of(browser, "#summary tr[aria-current] th") == ["1"]

    _hover(browser, 3)
    _assert_describes(browser, view, 1, 3)

    # The row of a layer in the table leads back.
    browser.find_element(By.CSS_SELECTOR, "#summary tr[data-layer='0'] button").click()
    assert _marks(browser) == first


def test_marks_differ_in_shape(
    browser: webdriver.Chrome, show: Open, read: Read
) -> None:
    view = read("Some text to read, in two layers.")
    show(view)

    images = {}
    for token, mark in zip(_tokens(browser), _marks(browser), strict=True):
        images[mark] = token.value_of_css_property("background-size")

    # The lengths of the solid and of the dotted line.
    assert images["m"].startswith("100% 4px, 0% 4px")
    assert images["s"].startswith("0% 4px, 100% 4px")


def test_the_keyboard_is_enough(
    browser: webdriver.Chrome, show: Open, read: Read
) -> None:
    view = read("Some text")
    show(view)

    text = browser.find_element(By.ID, "text")
    text.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    _assert_describes(browser, view, 0, 2)

    text.send_keys(Keys.ARROW_UP)
    _assert_describes(browser, view, 1, 2)

    text.send_keys(Keys.END)
    _assert_describes(browser, view, 1, 8)

    text.send_keys(Keys.HOME, Keys.ARROW_LEFT)
    _assert_describes(browser, view, 1, 0)

    text.send_keys(Keys.ESCAPE)
    assert _text_of(browser, "#experts") == []


def test_a_click_keeps_a_token(
    browser: webdriver.Chrome, show: Open, read: Read
) -> None:
    view = read("Some text")
    show(view)

    _tokens(browser)[2].click()
    _hover(browser, 6)
    _assert_describes(browser, view, 0, 6)

    ActionChains(browser).move_to_element(
        browser.find_element(By.TAG_NAME, "h1")
    ).perform()
    _wait_until_shown(browser, 2)
    _assert_describes(browser, view, 0, 2)


def test_colours_follow_the_chosen_quantity_and_scale(
    browser: webdriver.Chrome, show: Open, read: Read
) -> None:
    view = read("0123456789" * 3)
    show(view)

    def ends() -> list[str]:
        return _text_of(browser, "#low, #high")

    for colouring in view.colourings():
        Select(browser.find_element(By.ID, "colour")).select_by_value(colouring.key)
        assert ends() == [f"≤ {colouring.low:.2f}", f"≥ {colouring.high:.2f}"]

        # The extremes get the ends of the scale.
        values = colouring.values[0]
        for idx, step in ((int(values.argmin()), "0"), (int(values.argmax()), "9")):
            if colouring.key == "loss":
                assert _tokens(browser)[idx].get_attribute("data-step") == step

    Select(browser.find_element(By.ID, "colour")).select_by_value("difficulty")
    browser.find_element(By.ID, "own-scale").click()

    values = view.colourings()[0].values[0].sort().values
    # 30 values: 0.05 * 29 and 0.95 * 29, rounded.
    assert ends() == [f"≤ {values[1]:.2f}", f"≥ {values[28]:.2f}"]


def test_parts_of_a_character_say_so(
    browser: webdriver.Chrome, show: Open, read: Read
) -> None:
    view = read("a日")
    show(view)

    _hover(browser, 2)  # a, then the three bytes of the other
    assert _text_of(browser, "#details h2") == ["日"]
    assert _text_of(browser, "#details .parts") == [
        "Part 2 of the 3 tokens that hold these characters."
    ]
    _assert_describes(browser, view, 0, 2)


@pytest.mark.parametrize("arch", ["tiny_standard", "tiny_ffn"])
def test_models_without_difficulty_or_groups_have_a_page(
    browser: webdriver.Chrome, show: Open, read: Read, arch: str
) -> None:
    view = read("Some text", arch)
    show(view, layer_idx=1)

    assert _text_of(browser, "#layer-name") == ["1"]
    _hover(browser, 4)
    _assert_describes(browser, view, 1, 4)
    assert _text_of(browser, "#difficulty") == []
