"""The first notebook in a real JupyterLab and browser: run it all, then use every control of its panel."""

import statistics
import subprocess
import sys
import time

import pytest
from browser import Notebook

SOON = 0.5  # s; a person notices a longer wait


@pytest.fixture
def opened(lab, page):
    """Notebook 1 as `vdamkit tutorial` lays it out, all its cells run; with a client of its kernel."""
    command = "from vdamkit.cli import main; main()"
    subprocess.run([sys.executable, "-c", command, "tutorial", str(lab.folder), "--copy-only"], check=True, capture_output=True)
    notebook = Notebook(page, lab, "01_first_model.ipynb")
    notebook.run_all(timeout=500)
    kernel = lab.kernel()
    yield notebook, kernel
    kernel.close()


def idle(notebook, nth=0):
    notebook.wait_text(".vk-status", "idle", nth=nth)


def where(iteration):
    """What the panel says of a mini-batch of this schedule of 100."""
    return f"mini-batch {iteration} " + ("of 100" if iteration <= 100 else f"({iteration - 100} beyond the schedule)")


def set_number(notebook, selector, value, nth=0):
    field = notebook.page.locator(f"{selector} input").nth(nth)
    field.fill(str(value))
    field.press("Enter")


def step_and_run(notebook, kernel):
    page, before = notebook.page, kernel.ask("job.iteration")
    picture = page.locator(".vk-tabs img").first
    old = picture.get_attribute("src")
    page.click(".vk-step")
    notebook.wait_text(".vk-status", where(before + 1))
    idle(notebook)
    assert kernel.ask("job.iteration") == before + 1
    end = time.monotonic() + 20
    while picture.get_attribute("src") == old:
        assert time.monotonic() < end, "the map in the page did not change"
        time.sleep(0.1)
    set_number(notebook, ".vk-to-go", 2)
    page.click(".vk-run")
    notebook.wait_text(".vk-status", where(before + 3))
    idle(notebook)
    assert kernel.ask("job.iteration") == before + 3


def change_while_running(notebook, kernel):
    """T, symmetry and prior: first as what comes next, then in force; a wrong group turns red and changes nothing."""
    page = notebook.page
    readout = page.locator(".vk-T .widget-readout").first
    readout.fill("2")
    readout.press("Enter")
    notebook.wait_text(".vk-knob-T", "final T 2")
    page.locator(".vk-symmetry input").first.fill("C3")
    notebook.wait_text(".vk-knob-symmetry", "in force: C3")
    page.locator(".vk-symmetry input").first.fill("C60x")
    notebook.wait_text(".vk-knob-symmetry", "C60x")
    assert page.locator(".vk-symmetry.vk-bad").count() == 1
    assert kernel.ask("job.settings.symmetry") == "C3"
    page.locator(".vk-symmetry input").first.fill("C6")
    notebook.wait_text(".vk-knob-symmetry", "in force: C6")
    assert page.locator(".vk-symmetry.vk-bad").count() == 0
    page.locator(".vk-tilt-use input").first.uncheck()
    notebook.wait_text(".vk-knob-tilt_prior_width", "in force: none")
    assert kernel.ask("(job.settings.T, job.settings.symmetry, job.settings.tilt_prior_width)") == (2.0, "C6", None)
    assert "running" in notebook.text(".vk-status")
    notes = kernel.ask("[note for note in job.history['note'] if note]")
    assert any("T 4.0 → 2.0" in note for note in notes) and any("C6 → C3" in note for note in notes), notes


def pause_and_stop(notebook, kernel):
    page, waits = notebook.page, []
    for _ in range(3):
        page.click(".vk-pause")
        waits.append(notebook.wait_text(".vk-status", "paus"))
        notebook.wait_text(".vk-status", "paused", timeout=10)
        at = kernel.ask("(job.iteration, panel.controller.inside)")
        time.sleep(0.5)
        assert kernel.ask("(job.iteration, panel.controller.inside)") == at, "it went on in a pause"
        page.click(".vk-pause")
        notebook.wait_text(".vk-status", "running")
        time.sleep(0.3)
    assert statistics.median(waits) <= SOON, waits
    page.click(".vk-stop")
    idle(notebook)


def undo_and_redo(notebook, kernel):
    page, before = notebook.page, kernel.ask("job.iteration")
    page.click(".vk-undo")
    notebook.wait_text(".vk-status", where(before - 1))
    assert kernel.ask("job.iteration") == before - 1
    page.click(".vk-redo")
    notebook.wait_text(".vk-status", where(before))
    assert kernel.ask("job.iteration") == before


def branch_and_compare(notebook, kernel):
    page, before = notebook.page, kernel.ask("job.iteration")
    page.locator(".vk-branch").first.click()
    page.locator(".vk-widget").nth(1).wait_for()
    assert kernel.ask("len(panel.branches)") == 1
    page.locator(".vk-step").nth(1).click()
    notebook.wait_text(".vk-status", where(before + 1), nth=1)
    idle(notebook, nth=1)
    assert kernel.ask("(job.iteration, panel.branches[0].session.iteration)") == (before, before + 1)
    page.locator(".vk-tabs .lm-TabBar-tabLabel:text-is('History')").first.click()
    page.locator(".vk-compare").first.click()
    picture = page.locator(".vk-history").first.locator("img:visible")
    picture.wait_for(timeout=30_000)
    assert picture.bounding_box()["height"] > 150
    # a click into the tree goes back
    page.locator(".vk-history").first.locator(".vk-node-0").click()
    notebook.wait_text(".vk-status", "mini-batch 0 of 100")
    assert kernel.ask("job.iteration") == 0
    assert kernel.ask("panel.branches[0].session.iteration") == before + 1


def save(notebook, kernel, folder):
    page = notebook.page
    branch = page.locator(".vk-widget").nth(1)
    branch.locator(".vk-folder input").fill(str(folder))
    branch.locator(".vk-folder input").press("Enter")
    branch.locator(".vk-save").click()
    notebook.wait_text(".vk-message", "files of mini-batch", nth=1)
    written = {path.name for path in folder.iterdir()}
    iteration = kernel.ask("panel.branches[0].session.iteration")
    assert {"initial_model.mrc", "run_optimisation_set.star", f"run_it{iteration:03d}_data.star"} <= written, written


def close_while_running(notebook, kernel):
    """Nothing of the panel or its branch stays behind."""
    ours = "[t.name for t in __import__('threading').enumerate() if t.name in ('vdamkit session', 'vdamkit painter')]"
    set_number(notebook, ".vk-to-go", 1000, nth=1)
    notebook.page.locator(".vk-run").nth(1).click()
    notebook.wait_text(".vk-status", "running", nth=1)
    assert kernel.ask(ours)
    kernel.ask("panel.close()")
    end = time.monotonic() + 20
    while kernel.ask(ours):
        assert time.monotonic() < end, f"still there: {kernel.ask(ours)}"
        time.sleep(0.2)
    assert kernel.ask("job.followers") == []
    notebook.page.locator(".vk-widget").first.wait_for(state="detached")


def test_the_first_notebook_clicked_through(opened, tmp_path):
    notebook, kernel = opened
    assert kernel.ask("verdict.good and bool(match.mean_fsc > 0.85) and job.iteration == 100")
    assert notebook.page.locator(".jp-OutputArea-output img").count() >= 6
    step_and_run(notebook, kernel)
    set_number(notebook, ".vk-to-go", 1000)
    notebook.page.click(".vk-run")
    notebook.wait_text(".vk-status", "running")
    assert kernel.ask("panel.controller.left") > 900, "the number typed did not count"
    assert statistics.median(kernel.seconds() for _ in range(9)) <= SOON
    change_while_running(notebook, kernel)
    pause_and_stop(notebook, kernel)
    undo_and_redo(notebook, kernel)
    branch_and_compare(notebook, kernel)
    save(notebook, kernel, tmp_path / "job011")
    close_while_running(notebook, kernel)
