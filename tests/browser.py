"""Chromium without a window, by Selenium, for the tests of HTML pages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from selenium import webdriver

_CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
_DRIVER: Final = shutil.which("chromedriver")

NEEDS_CHROMIUM: Final = pytest.mark.skipif(
    _CHROMIUM is None or _DRIVER is None,
    reason="`chromium` or `chromedriver` is not installed",
)

_OPTIONS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)


@contextmanager
def start_browser(profile_dir: Path) -> Iterator[webdriver.Chrome]:
    """Start Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for option in (*_OPTIONS, f"--user-data-dir={profile_dir}"):
        options.add_argument(option)
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )

    browser = webdriver.Chrome(options, webdriver.ChromeService(str(_DRIVER)))

    try:
        yield browser
    finally:
        browser.quit()


@contextmanager
def watch_pages(browser: webdriver.Chrome, file: Path) -> Iterator[None]:
    """Complain of all that pages do wrong, or request besides themselves."""
    # What was open before does not count.
    requested_urls(browser)

    yield

    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
    assert requested_urls(browser) == {file.as_uri()}


def requested_urls(browser: webdriver.Chrome) -> set[str]:
    """List what files requested since the last call; `data:` is in the file itself."""
    entries = browser.get_log("performance")  # type: ignore[no-untyped-call]
    messages = [json.loads(entry["message"])["message"] for entry in entries]

    # Chromium's own pages load their parts at any time: only those of a file count.
    urls = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
        and message["params"]["documentURL"].startswith("file:")
    }

    return {url for url in urls if not url.startswith("data:")}
