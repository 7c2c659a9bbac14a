# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven by Selenium; tests skip where there is none."""

import shutil
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
