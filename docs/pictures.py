"""Makes docs/panel.png and docs/napari.png anew: the panel in a real JupyterLab, and napari on a virtual screen.

    python docs/pictures.py

Needs the [test] extra, Chromium and Xvfb.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests" / "ui"))

import nbformat
from browser import CHROMIUM, FLAGS, Lab, Notebook
from playwright.sync_api import sync_playwright

JOB = """
import vdamkit as vk
data = vk.tutorial_data()
job = vk.Session(data / "stacks2d" / "optimisation_set.star",
                 vk.Settings(mini_batches=24, symmetry="C6", tilt_prior_width=10, mask_diameter=230))
"""
PANEL = JOB + "panel = job.panel(truth=data / 'true_map.mrc')\npanel"
NAPARI = (
    "from vdamkit.notebook.display import find_display\nfind_display()\n"
    + JOB
    + """
job.run()
view = job.show("tomogram", paste=60, live=False)
from matplotlib.image import imsave
imsave({out!r}, view.scene.viewer.screenshot(canvas_only=False, flash=False))
view.close()
"""
)


def panel(out: Path) -> None:
    """The panel after 24 mini-batches, with a knob moved."""
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab, sync_playwright() as playwright:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PANEL)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, Path(folder) / "panel.ipynb")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1400, "height": 1300})
        opened = Notebook(page, lab, "panel.ipynb")
        opened.run_all(timeout=60)
        page.locator(".vk-widget").wait_for()
        opened.wait_text(".vk-status", "idle")
        field = page.locator(".vk-to-go input")
        field.fill("18")
        field.press("Enter")
        page.click(".vk-run")
        opened.wait_text(".vk-status", "mini-batch 18 of 24", timeout=120)
        opened.wait_text(".vk-status", "idle")
        page.locator(".vk-T .widget-readout").fill("2")
        page.locator(".vk-T .widget-readout").press("Enter")
        opened.wait_text(".vk-knob-T", "next: final T 2")
        page.wait_for_timeout(3000)  # the last picture
        page.locator(".vk-widget").screenshot(path=str(out))
        browser.close()


def napari(out: Path) -> None:
    """The particles of a tomogram with the map pasted back, in a napari window."""
    subprocess.run([sys.executable, "-c", NAPARI.format(out=str(out))], check=True)


if __name__ == "__main__":
    panel(DOCS / "panel.png")
    napari(DOCS / "napari.png")
