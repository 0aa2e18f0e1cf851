"""Finding out whether there is a screen, without risking the process."""

import os
import shutil
import subprocess
import sys

import pytest

from vdamkit.notebook import display
from vdamkit.notebook.display import Display, find_display

needs_xvfb = pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed")
needs_napari = pytest.mark.skipif(not display.installed("napari", "qtpy"), reason="napari and a Qt are not installed")


@pytest.fixture
def bare(monkeypatch):
    """No screen, no Xvfb; napari and k3d as they are."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(display.shutil, "which", lambda name: None)
    monkeypatch.setattr(display, "installed", lambda *names: True)


def test_without_a_screen_the_inline_view_takes_over(bare):
    found = find_display()
    assert found.kind == "k3d" and "no screen and no Xvfb" in found.reason


def test_without_napari_it_says_how_to_get_it(bare, monkeypatch):
    monkeypatch.setattr(display, "installed", lambda *names: "napari" not in names)
    found = find_display()
    assert found.kind == "k3d" and "vdamkit[viewer]" in found.reason


def test_without_anything_pictures_are_left(bare, monkeypatch):
    monkeypatch.setattr(display, "installed", lambda *names: False)
    assert find_display().kind == "pictures"
    assert "vdamkit[notebook]" in find_display("k3d").reason
    assert find_display("pictures") == Display("pictures", "")


def test_a_screen_that_does_not_answer_is_not_used(bare, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":987")
    found = find_display()
    assert found.kind == "k3d" and "cannot draw" in found.reason


@pytest.mark.parametrize(
    ("renderer", "software"), [("llvmpipe (LLVM 15.0.6, 256 bits)", True), ("NVIDIA RTX A2000/PCIe/SSE2", False), ("", False)]
)
def test_it_is_known_whether_a_gpu_draws(bare, monkeypatch, renderer, software):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(display, "qt_renderer", lambda: renderer)
    assert find_display() == Display("napari", "", software)


def test_another_word_is_refused(bare):
    with pytest.raises(ValueError, match="one of napari, k3d, pictures"):
        find_display("chimerax")


def test_the_offscreen_platform_is_no_screen(bare, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    assert not display.has_screen()


@needs_xvfb
@needs_napari
def test_a_virtual_screen_is_started_and_goes_with_the_process():
    code = (
        "import os; from vdamkit.notebook.display import find_display; d = find_display();"
        "print(d.kind, os.environ['DISPLAY'][1:])"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    kind, number = done.stdout.split()
    assert kind == "napari"
    assert not os.path.exists(f"/tmp/.X11-unix/X{number}"), "the server is stopped with its process"


def test_a_view_in_a_script_follows_every_mini_batch(job, monkeypatch):
    """Without an event loop nothing would come back to a drawing that was put off."""
    from vdamkit.notebook import viewer

    drawn, draw = [], viewer.PictureScene.draw
    monkeypatch.setattr(viewer.PictureScene, "draw", lambda self, layers: (drawn.append(job.iteration), draw(self, layers)))
    with job.show("map", where="pictures"):
        job.run(3)
    assert drawn == [0, 1, 2, 3]
