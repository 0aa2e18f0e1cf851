"""``session.show()``: the layers of :mod:`vdamkit.notebook.layers` in napari, in an inline 3D view, or as pictures.

A thin file: which layers there are is decided elsewhere and tested without a screen.
"""

from __future__ import annotations

import os
import time
from typing import Any

from vdamkit.notebook.display import find_display
from vdamkit.notebook.figures import png
from vdamkit.notebook.layers import LayerData, as_surfaces, layers_for
from vdamkit.notebook.loop import Loop
from vdamkit.notebook.static_view import static_figure

VIEWS = ("map", "tomogram")
SHARE = 0.1  # of the time that redrawing may take
SIZE = (1150, 700)  # px, of the window; about two thirds of it are the canvas, whose picture is left in the cell
CLOSER = 1.25  # than napari places its camera on a map: a particle does not fill its box


class NapariScene:
    """A napari window and the picture of it."""

    interactive = True

    def __init__(self, title: str):
        import napari

        self.viewer = napari.Viewer(title=title, ndisplay=3, show=True)
        self.viewer.theme = "light"
        # x to the right, y up, z towards the viewer: a right hand (napari's own default is a left one for xyz)
        self.camera.orientation = ("towards", "up", "right")
        self.viewer.window.resize(*SIZE)
        self._framed = False

    def draw(self, layers: list[LayerData]) -> None:
        """Bring the window up to date: data are replaced in place, the camera stays."""
        names = {options["name"] for _, options, _ in layers}
        for layer in [layer for layer in self.viewer.layers if layer.name not in names]:
            self.viewer.layers.remove(layer)
        for data, options, kind in layers:
            if options["name"] not in self.viewer.layers:
                getattr(self.viewer, f"add_{kind}")(data, **options)
                continue
            layer = self.viewer.layers[options["name"]]
            if kind == "image":
                layer.data = data
                layer.contrast_limits = options["contrast_limits"]
                layer.iso_threshold = options["iso_threshold"]
            else:
                shown = layer.visible
                self.viewer.layers.remove(layer)
                getattr(self.viewer, f"add_{kind}")(data, **options | {"visible": shown})
        if not self._framed:
            self.viewer.reset_view()
            self.camera.angles = (15.0, -20.0, 0.0)
            self.camera.zoom *= CLOSER if all(kind == "image" for _, _, kind in layers) else 1.0
            self._framed = True

    @property
    def camera(self) -> Any:
        """napari's camera, which moved to the viewer's scene in 0.9."""
        return getattr(self.viewer, "scene", self.viewer).camera

    def picture(self) -> bytes:
        """What the canvas shows, as PNG."""
        import io

        from matplotlib.image import imsave

        buffer = io.BytesIO()
        imsave(buffer, self.viewer.screenshot(canvas_only=True, flash=False), format="png")
        return buffer.getvalue()

    @property
    def open(self) -> bool:
        """Whether the window still exists."""
        try:
            return bool(self.viewer.window._qt_window.isVisible())
        except (AttributeError, RuntimeError):
            return False

    def close(self) -> None:
        try:
            self.viewer.close()
        except RuntimeError:  # the person closed the window
            pass


class K3dScene:
    """An inline WebGL view, and a picture for where notebooks are only read."""

    interactive = True
    open = True

    def __init__(self, title: str):
        import k3d

        self._k3d = k3d
        self.plot = k3d.plot(height=460, grid_visible=False, camera_auto_fit=False, colorbar_object_id=0, name=title)
        self._objects: list[Any] = []
        self._layers: list[LayerData] = []

    def draw(self, layers: list[LayerData]) -> None:
        from vdamkit.notebook.inline import first_camera, k3d_objects

        fresh = k3d_objects(self._k3d, layers)
        if not self._objects:
            self.plot.camera = first_camera(layers)
        for item in fresh:
            self.plot += item
        for item in self._objects:
            self.plot -= item
        self._objects, self._layers = fresh, layers

    def picture(self) -> bytes:
        return png(static_figure(self._layers))

    def close(self) -> None:
        self.plot.close()


class PictureScene:
    """Pictures only."""

    interactive = False
    open = True

    def __init__(self, title: str):
        self._layers: list[LayerData] = []

    def draw(self, layers: list[LayerData]) -> None:
        self._layers = layers

    def picture(self) -> bytes:
        return png(static_figure(self._layers))

    def close(self) -> None:
        pass


SCENES = {"napari": NapariScene, "k3d": K3dScene, "pictures": PictureScene}


class View:
    """A 3D view of a session that follows it until closed; see :meth:`vdamkit.Session.show`."""

    def __init__(
        self, session: Any, *, view: str = "map", tomogram: str | None = None, colour: str = "class", sigma: float = 3.0,
        paste: int = 60, where: str | None = None, live: bool = True,
    ):  # fmt: skip
        if view not in VIEWS:
            raise ValueError(f"view is one of {', '.join(VIEWS)}, not {view!r}")
        self.session, self.view = session, view
        self._options = {"tomogram": tomogram, "colour": colour, "sigma": sigma, "paste": paste if view == "tomogram" else 0}
        self.display = find_display(where)
        self._loop = Loop()
        if self.display.kind == "napari":
            os.environ.setdefault("NAPARI_APPLICATION_IPY_INTERACTIVE", "0")
            self._loop.pump_qt()
        self.scene = SCENES[self.display.kind](f"vdamkit: {view}")
        self._handle: Any = None
        self._due, self._waiting, self._closed = 0.0, False, False
        self.update()
        if live:
            session.followers.append(self._changed)

    def update(self) -> None:
        """Draw the current state now."""
        session = self.session
        line = session._history.line()
        previous = line[-2].state if len(line) > 1 and self._options["colour"] == "change" else None
        layers = layers_for(session.state, session.particles, session.settings, previous=previous, **self._options)[self.view]
        self.scene.draw(as_surfaces(layers) if self.display.software else layers)
        if self._handle is not None:
            self._handle.update(_image(self.scene.picture()))

    def _changed(self) -> None:
        """The session moved on (in any thread): draw soon, never more than one drawing at a time."""
        if not self._closed and not self._waiting:
            self._waiting = True
            self._loop.call(self._refresh)

    def _refresh(self) -> None:
        if self._closed or not self.scene.open:
            return self.close()
        now = time.monotonic()
        if now < self._due and self._loop.running:  # a script has nothing that would come back
            self._loop.call_later(self._due - now, self._refresh)
            return None
        self._waiting = False
        self.update()
        self._due = time.monotonic() + (time.monotonic() - now) * (1 / SHARE - 1)
        return None

    def close(self) -> None:
        """Take the view away: no window, callback or timer stays behind."""
        if self._closed:
            return
        self._closed = True
        if self._changed in self.session.followers:
            self.session.followers.remove(self._changed)
        self.scene.close()
        self._loop.close()

    def __enter__(self) -> View:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if self.display.reason:
            print(f"vdamkit: {self.display.reason}")
        if isinstance(self.scene, K3dScene):
            display(self.scene.plot)
        self._handle = display(_image(self.scene.picture()), display_id=True)


def _image(data: bytes) -> Any:
    from IPython.display import Image

    return Image(data=data, format="png")
