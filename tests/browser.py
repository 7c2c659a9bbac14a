# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven by Selenium; tests skip where there is none."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = """
--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking
--disable-component-update --disable-sync --no-first-run
"""
BINARIES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium(profile: Path, downloads: Path, window: tuple[int, int] = (1280, 900)) -> Iterator:
    """Open a browser with a profile of its own; files that a page offers go to ``downloads``."""
    pytest.importorskip("selenium", reason="Selenium is not installed; it comes with the extra 'test'")
    binary = next((found for name in BINARIES if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("there is no Chromium with its driver, as Debian's packages chromium and chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = binary
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}", "--window-size={},{}".format(*window)]:
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def select(page, css: str) -> list:
    return page.find_elements("css selector", css)


def one(page, css: str):
    (found,) = select(page, css)
    return found


def settle(page) -> None:
    """Wait until the page has drawn what was last done."""
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def press(page, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(page).send_keys(key).perform()
    settle(page)


def choose(page, menu: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(one(page, menu)).select_by_value(value)
    settle(page)


def click(page, css: str) -> None:
    """Click the one such element, wherever it is."""
    page.execute_script("arguments[0].click()", one(page, css))
    settle(page)


def download(page, downloads: Path, button: str) -> bytes:
    """Press a button and return the file that it offers."""
    before = set(downloads.iterdir())
    one(page, button).click()  # a person's: a browser lets no script offer a second file
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        new = [path for path in set(downloads.iterdir()) - before if path.suffix == ".csv" and path.stat().st_size]
        if new:
            return new[0].read_bytes()
        time.sleep(0.05)
    msg = f"{button} offered no file"
    raise AssertionError(msg)
