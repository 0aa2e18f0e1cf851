"""The notebooks: what is committed, and a fresh run from top to bottom in which their own assertions hold.

The first one is run in a browser by tests/ui where there is one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the [test] extra's notebook runner")
nbclient = pytest.importorskip("nbclient", reason="needs the [test] extra's notebook runner")

sys.path.insert(0, str(Path(__file__).parent / "ui"))
from browser import why_no_browser

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
CLICKED_THROUGH = "01_first_model"
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def cells_with_pictures(notebook):
    """Which cells left a picture."""
    return [
        number
        for number, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]


@each
def test_a_notebook_says_what_it_is_for_and_was_run(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "**You will learn**" in notebook.cells[0].source and "**It takes**" in notebook.cells[0].source
    assert "## Exercises" in text
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from top to bottom"
    assert sum(cell.source.count("assert ") for cell in code) >= 3, "its science is checked"
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    said = "".join(output.text for output in outputs(notebook) if output.output_type == "stream")
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", said), "a path of somebody's machine"
    assert cells_with_pictures(notebook)
    assert "widgets" not in notebook.metadata, "the state of its widgets, megabytes that a fresh kernel makes anew"


@each
def test_a_notebook_runs(path, monkeypatch):
    if path.stem == CLICKED_THROUGH and not why_no_browser():
        pytest.skip("run and clicked through in a browser by tests/ui/test_click_through.py")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own choice, whatever this process was given
    notebook = nbformat.read(path, as_version=4)
    expected = cells_with_pictures(notebook)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert cells_with_pictures(notebook) == expected
