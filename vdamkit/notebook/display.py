"""Is there a screen for a Qt window? Found out in a child process, because Qt aborts the process where there is none."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

PROBE = """
import sys
from qtpy.QtWidgets import QApplication
from qtpy.QtGui import QOffscreenSurface, QOpenGLContext
app = QApplication(sys.argv[:1])
context, surface = QOpenGLContext(), QOffscreenSurface()
surface.create()
if not (context.create() and context.makeCurrent(surface)):
    sys.exit(3)
if hasattr(context, "functions"):  # PySide has them, PyQt has not
    print(context.functions().glGetString(0x1F01))  # GL_RENDERER
"""
SOFTWARE = ("llvmpipe", "softpipe", "swrast", "swiftshader")  # what OpenGL without a GPU calls itself
SCREEN = "1400x900x24"


@dataclass(frozen=True)
class Display:
    """Where 3D pictures can be shown: "napari", "k3d" or "pictures", and a line that says why."""

    kind: str
    reason: str
    software: bool = False  # whether napari draws there without a GPU


def installed(*modules: str) -> bool:
    """Whether modules can be imported, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in modules)


def qt_renderer(timeout: float = 40.0) -> str | None:
    """What draws in a Qt application with OpenGL that has this process's environment, "" where Qt does not say; None where
    there can be none."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def has_screen() -> bool:
    """Whether windows have somewhere to go: always on Windows and macOS, elsewhere a display server's address."""
    if sys.platform in ("win32", "darwin"):
        return True
    if os.environ.get("QT_QPA_PLATFORM") in ("offscreen", "minimal"):
        return False  # napari cannot draw there: Qt's offscreen platform has no OpenGL widget
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def start_virtual_screen() -> bool:
    """Start Xvfb for the rest of this process and point DISPLAY at it; False where it is not installed or fails."""
    program = shutil.which("Xvfb")
    if program is None:
        return False
    read, write = os.pipe()
    try:
        server = subprocess.Popen(
            [program, "-displayfd", str(write), "-screen", "0", SCREEN, "+extension", "GLX", "-nolisten", "tcp"],
            pass_fds=(write,), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        os.close(read)
        os.close(write)
        return False
    os.close(write)
    number = _read_line(read, timeout=10.0)
    os.close(read)
    if not number:
        server.kill()
        return False
    atexit.register(_stop, server)
    os.environ["DISPLAY"] = f":{number}"
    os.environ.pop("QT_QPA_PLATFORM", None)
    return True


def _read_line(descriptor: int, timeout: float) -> str:
    import select

    text, end = b"", time.monotonic() + timeout
    while not text.endswith(b"\n") and time.monotonic() < end:
        ready, _, _ = select.select([descriptor], [], [], 0.1)
        if ready:
            part = os.read(descriptor, 64)
            if not part:
                break
            text += part
    return text.decode().strip()


def _stop(server: subprocess.Popen) -> None:
    server.terminate()
    try:
        server.wait(3)
    except subprocess.TimeoutExpired:
        server.kill()


def find_display(wanted: str | None = None) -> Display:
    """The best way to show 3D here; `wanted` ("napari", "k3d", "pictures") is honoured where it can be.

    Raises
    ------
    ValueError
        for another word.
    """
    kinds = ("napari", "k3d", "pictures")
    if wanted is not None and wanted not in kinds:
        raise ValueError(f"a 3D view is one of {', '.join(kinds)}, not {wanted!r}")
    inline = "k3d" if installed("k3d", "ipywidgets") else "pictures"
    if wanted in ("k3d", "pictures"):
        kind = inline if wanted == "k3d" else "pictures"
        return Display(kind, "" if kind == wanted else "k3d is not installed (pip install 'vdamkit[notebook]'): pictures.")
    instead = "an inline 3D view" if inline == "k3d" else "pictures"
    if not installed("napari", "qtpy"):
        return Display(inline, f"napari is not installed (pip install 'vdamkit[viewer]'): {instead} instead.")
    if has_screen():
        renderer = qt_renderer()
        if renderer is not None:
            return Display("napari", "", software=any(name in renderer.lower() for name in SOFTWARE))
        return Display(inline, f"the screen here cannot draw a Qt window with OpenGL: {instead} instead of napari.")
    if start_virtual_screen():
        if qt_renderer() is not None:
            reason = "no screen here: napari draws on a virtual one (Xvfb) and leaves pictures."
            return Display("napari", reason, software=True)
        return Display(inline, f"no screen here, and Qt does not work on a virtual one: {instead} instead of napari.")
    return Display(inline, f"no screen and no Xvfb here: {instead} instead of napari.")
