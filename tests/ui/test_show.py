"""`session.show()` in a real kernel: with a virtual screen, without one, and without Qt. The kernel lives on in all cases."""

import base64
import io
import os
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.image import imread

jupyter_client = pytest.importorskip("jupyter_client", reason="no Jupyter kernel is installed")

CLASSES = ("#0072B2", "#D55E00")  # colours of the first two

HAS_NAPARI = find_spec("napari") is not None and find_spec("qtpy") is not None
needs_napari = pytest.mark.skipif(not HAS_NAPARI, reason="napari and a Qt are not installed")
needs_xvfb = pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed")

JOB = """
import vdamkit as vk
settings = vk.Settings(symmetry="C6", tilt_prior_width=10.0, classes=2, mini_batches=4, mask_diameter=230.0, threads=2)
job = vk.Session({star!r}, settings)
job.run(2)
"""
NO_QT = "import sys; sys.modules.update(napari=None, qtpy=None, PySide6=None)\n"


class Cells:
    """A kernel of its own, without a screen; runs cells and keeps what they leave."""

    def __init__(self, folder, **changes):
        env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM", "MPLBACKEND")}
        env |= {"JUPYTER_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder)} | changes
        self.manager, self.client = jupyter_client.manager.start_new_kernel(
            kernel_name="python3", env=env, startup_timeout=60, cwd=str(folder)
        )

    def run(self, code):
        """What was printed, the mime bundles that were shown, and the error's name or None."""
        printed, shown = [], []

        def keep(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])
            elif message["msg_type"] in ("display_data", "update_display_data", "execute_result"):
                shown.append(content["data"])

        reply = self.client.execute_interactive(code, output_hook=keep, timeout=180)
        content = reply["content"]
        return "".join(printed), shown, None if content["status"] == "ok" else f"{content['ename']}: {content['evalue']}"

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def cells(tmp_path):
    """Start kernels that end with the test."""
    started = []

    def start(**changes):
        started.append(Cells(tmp_path, **changes))
        return started[-1]

    yield start
    for kernel in started:
        kernel.close()


@pytest.fixture(scope="session")
def star(tmp_path_factory):
    from vdamkit.simulate import simulate

    folder = tmp_path_factory.mktemp("show")
    simulate(folder, particles=24, volumes=0, box=20, pixel_size=16.0, tilts=9, variance_ratio=1.0, seed=5)
    return str(folder / "stacks2d" / "optimisation_set.star")


@pytest.fixture
def empty_path(tmp_path):
    """A PATH on which no Xvfb is found."""
    (tmp_path / "bin").mkdir()
    return str(tmp_path / "bin")


def pictures(shown):
    return [imread(io.BytesIO(base64.b64decode(data["image/png"])))[..., :3] for data in shown if "image/png" in data]


def share(picture):
    """Share of a picture that has the hue of the first or second class, whatever the light."""
    hsv = rgb_to_hsv(picture)
    away = np.min([np.abs(hsv[..., 0] - rgb_to_hsv(to_rgb(colour))[0]) for colour in CLASSES], axis=0)
    return float(np.mean((away < 0.04) & (hsv[..., 1] > 0.35) & (hsv[..., 2] > 0.15)))


def lives_on(kernel):
    printed, _, error = kernel.run("job.step(); view.close(); print('alive', job.iteration, job.followers)")
    assert error is None and "alive 3 []" in printed, (printed, error)


@needs_napari
@needs_xvfb
def test_napari_on_a_virtual_screen(cells, star):
    kernel = cells()
    assert kernel.run(JOB.format(star=star))[2] is None
    printed, shown, error = kernel.run("view = job.show('map')\nview")
    assert error is None
    assert "virtual" in printed and kernel.run("print(view.display.kind)")[0] == "napari\n"
    (picture,) = pictures(shown)
    assert 0.02 < share(picture) < 0.8
    assert kernel.run("print({layer._type_string for layer in view.scene.viewer.layers})")[0] == "{'surface'}\n"
    # it follows the run: another picture takes the place of the first
    _, again, _ = kernel.run("import asyncio\njob.change(T=1)\njob.run(1)\nawait asyncio.sleep(2)")
    later = pictures(again)
    assert later, "no second picture"
    height, width = np.minimum(later[-1].shape, picture.shape)[:2]  # the window may still find its size
    assert np.abs(later[-1][:height, :width] - picture[:height, :width]).max() > 0.05
    _, shown, error = kernel.run("tomogram = job.show('tomogram', paste=8)\ntomogram")
    assert error is None and pictures(shown)[0].std() > 0.02
    printed, _, error = kernel.run("view.close(); tomogram.close(); print('alive', job.followers)")
    assert error is None and "alive []" in printed


@pytest.mark.skipif(find_spec("k3d") is None, reason="k3d is not installed")
def test_without_a_screen_the_view_is_inline(cells, star, empty_path):
    kernel = cells(PATH=empty_path)
    assert kernel.run(JOB.format(star=star))[2] is None
    printed, shown, error = kernel.run("view = job.show('map')\nview")
    assert error is None
    assert "an inline 3D view instead of napari" in printed or "napari is not installed" in printed
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown), "k3d's widget"
    (picture,) = pictures(shown)
    assert share(picture) > 0.02
    lives_on(kernel)


def test_without_qt_there_is_a_hint(cells, star):
    kernel = cells()
    assert kernel.run(NO_QT + JOB.format(star=star))[2] is None
    printed, shown, error = kernel.run("view = job.show('map')\nview")
    assert error is None
    assert "pip install 'vdamkit[viewer]'" in printed
    assert pictures(shown)
    lives_on(kernel)


def test_qt_that_cannot_draw_does_not_take_the_kernel_along(cells, star):
    """A display that is not there makes Qt abort the process; only the probe may die of it."""
    kernel = cells(DISPLAY=":987")
    assert kernel.run(JOB.format(star=star))[2] is None
    printed, shown, error = kernel.run("view = job.show('map')\nview")
    assert error is None and "instead" in printed and pictures(shown)
    lives_on(kernel)
