"""Fixtures for tests in a real browser and with real kernels."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "notebook")]

from browser import CHROMIUM, FLAGS, Lab, why_no_browser


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium with WebGL in software.

    For one module, not for all: while it is open its event loop counts as this thread's running one, though it only turns
    inside the browser's own calls, and what another test hands to "the kernel's loop" would wait there for ever.
    """
    if why_no_browser():
        pytest.skip(why_no_browser())
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """An empty page; an uncaught JavaScript error fails the test."""
    page = chromium.new_page(viewport={"width": 1500, "height": 1400})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert not problems, problems


@pytest.fixture
def lab(tmp_path):
    """JupyterLab in an empty folder."""
    if why_no_browser():
        pytest.skip(why_no_browser())
    folder = tmp_path / "lab"
    folder.mkdir()
    with Lab(folder) as lab:
        yield lab
