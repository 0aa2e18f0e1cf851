"""The right hand in napari and in the inline view, by what their pictures show."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import Notebook
from hand import centres_of_colours, check_hand
from matplotlib.image import imread

HERE = Path(__file__).resolve().parents[1] / "notebook"

NAPARI = """
import sys
sys.path.insert(0, {here!r})
from hand import hand_layers
from vdamkit.notebook.display import find_display
from vdamkit.notebook.layers import as_surfaces
from vdamkit.notebook.viewer import NapariScene
display = find_display()
assert display.kind == "napari" and display.software, display
scene, layers = NapariScene("hand"), hand_layers()
if {surfaces}:
    layers = as_surfaces(layers)
else:
    scene.viewer.window.resize(620, 320)  # without a GPU each pixel of a volume costs
for _ in range(2):  # the second time data take the place of others
    scene.draw(layers)
assert {{type(layer).__name__ for layer in scene.viewer.layers}} == {{"Surface" if {surfaces} else "Image"}}
scene.camera.angles = (0.0, 0.0, 0.0)
open({out!r}, "wb").write(scene.picture())
scene.close()
"""

K3D = """
import sys
sys.path.insert(0, {here!r})
from hand import hand_layers
from vdamkit.notebook.viewer import K3dScene
scene = K3dScene("hand")
scene.draw(hand_layers())
scene.plot
"""


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed")
@pytest.mark.skipif(find_spec("napari") is None or find_spec("qtpy") is None, reason="napari and a Qt are not installed")
@pytest.mark.parametrize("surfaces", [False, True], ids=["volumes", "surfaces"])
def test_napari_shows_the_right_hand(tmp_path, surfaces):
    out = tmp_path / "hand.png"
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")}
    code = NAPARI.format(here=str(HERE), out=str(out), surfaces=surfaces)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    check_hand(imread(out))


def write_notebook(path, code):
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code, id="only")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.write_text(json.dumps(notebook))


@pytest.mark.skipif(find_spec("k3d") is None, reason="k3d is not installed")
def test_the_inline_view_shows_the_right_hand(lab, page):
    write_notebook(lab.folder / "hand.ipynb", K3D.format(here=str(HERE)))
    Notebook(page, lab, "hand.ipynb").run_all(timeout=120)
    canvas = page.locator(".jp-OutputArea-output canvas").first
    canvas.wait_for(timeout=60_000)
    end = time.monotonic() + 60
    while True:  # WebGL draws when it is ready
        picture = imread(io.BytesIO(canvas.screenshot()))
        if {"x", "y", "z"} <= set(centres_of_colours(picture)) or time.monotonic() > end:
            break
        time.sleep(0.5)
    check_hand(picture)
