"""Plain napari opens what a job has written, through its plugin manager."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import vdamkit as vk

OPEN = """
import json, sys
from vdamkit.notebook.display import find_display
assert find_display().kind == "napari", find_display()
import napari
viewer = napari.Viewer(show=True)
for path in sys.argv[1:]:
    viewer.open(path, plugin=None)  # as the command line does: the manifest decides
print(json.dumps([[layer.name, type(layer).__name__, list(map(float, layer.extent.world.mean(0)))] for layer in viewer.layers]))
viewer.close()
"""


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed")
@pytest.mark.skipif(find_spec("napari") is None or find_spec("qtpy") is None, reason="napari and a Qt are not installed")
def test_napari_opens_particles_and_map(tmp_path):
    import json

    from vdamkit.simulate import simulate

    simulate(tmp_path, particles=16, volumes=0, tomograms=1, box=20, pixel_size=16.0, tilts=9, seed=5)
    job = vk.Session(
        tmp_path / "stacks2d" / "optimisation_set.star", vk.Settings(mini_batches=2, symmetry="C6", mask_diameter=230.0)
    )
    job.run()
    job.save(tmp_path / "job")
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")}
    files = [str(tmp_path / "job" / name) for name in ("run_it002_data.star", "initial_model.mrc")]
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *files], env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout.splitlines()[-1])
    kinds = [kind for _, kind, _ in layers]
    assert kinds.count("Points") == 1 and kinds.count("Vectors") >= 1 and kinds.count("Image") == 1, layers
    points = next(middle for _, kind, middle in layers if kind == "Points")
    seen = job.particles.coordinates[:, ::-1]
    np.testing.assert_allclose(points, (seen.min(0) + seen.max(0)) / 2, atol=60.0)  # Å, zyx; offsets move them a little
