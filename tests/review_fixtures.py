# SPDX-License-Identifier: Apache-2.0
"""A browser for all tests of pages."""

from pathlib import Path

import pytest
from browser import chromium
from review_pool import make_review, open_page

from anomalib_musc.output.review import Review


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the browser puts what it downloads."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory, downloads: Path):
    """A headless Chromium; its tests are skipped where there is none."""
    with chromium(tmp_path_factory.mktemp("profile"), downloads) as browser:
        yield browser


@pytest.fixture
def review(tmp_path: Path) -> Review:
    """A pool of thirty images."""
    return make_review(tmp_path / "images")


@pytest.fixture
def page(browser, tmp_path: Path, review: Review):
    """Their page, opened; nothing may go wrong on it."""
    browser.get_log("browser")
    yield open_page(browser, tmp_path, review)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
