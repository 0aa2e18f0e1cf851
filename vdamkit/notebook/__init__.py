"""What a person sees and touches: the control panel, pictures, napari and the inline 3D view."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vdamkit.errors import OutputError, SettingsError

PICTURES = ("map", "resolution", "orientations", "convergence", "symmetry")


@dataclass(frozen=True)
class Picture:
    """A picture as PNG; a notebook shows it, :meth:`save` writes it."""

    data: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.data

    def save(self, path: str | Path) -> Path:
        """Write it to a .png file. Raises OutputError where that cannot be done."""
        try:
            Path(path).write_bytes(self.data)
        except OSError as problem:
            raise OutputError(f"{path}: cannot be written ({problem.strerror or problem}); choose another place") from None
        return Path(path)


def picture_of(session: Any, what: str = "map", *, k: int = 0, truth: Any = None, **options: Any) -> Picture:
    """A picture of a session's current state.

    Parameters
    ----------
    what: "map" (slices and projections of all classes), "resolution" (spectra of class `k`, with the FSC to a `truth`, the
        path of a map or an array `(N, N, N)`, laid onto the map), "orientations", "convergence", or "symmetry" (scores of
        all point groups, or given `scores`; takes some five seconds).
    options: of the figure, such as `at` and `sigma` of the map; see :mod:`vdamkit.notebook.figures`.
    """
    from vdamkit.compare import align, known_map
    from vdamkit.notebook import figures
    from vdamkit.notebook.marks import marks_of
    from vdamkit.notebook.orientation_figure import orientation_figure
    from vdamkit.vdam.schedule import current_radius

    state, settings, px = session.state, session.settings, session.pixel_size
    if what == "map":
        figure = figures.map_figure(
            session.maps, px, populations=state.class_probability, mask_radius=settings.mask_diameter / 2,
            **{"heading": f"after mini-batch {state.iteration}"} | options,
        )  # fmt: skip
    elif what == "resolution":
        radius = current_radius(state.resolution_shell, settings, session.particles.box)
        curves = {}
        if truth is not None:
            there = known_map(truth, px, session.particles.box)
            curves["with the truth"] = align(
                session.maps[k], there, px, radius=settings.mask_diameter / 2, threads=settings.threads
            ).fsc  # fmt: skip
        figure = figures.resolution_figure(state, px, radius=radius, k=k, curves=curves, **options)
    elif what == "orientations":
        widths = (settings.rot_prior_width, settings.tilt_prior_width, settings.psi_prior_width)
        priors = session.particles.angle_priors
        figure = orientation_figure(state.poses.angles, state.poses.class_number, priors, widths, **options)
    elif what == "convergence":
        marks = marks_of(session._history.line())
        figure = figures.convergence_figure(session.reports(), marks, final_T=settings.T, **options)
    elif what == "symmetry":
        from vdamkit.notebook.symmetry_figure import symmetry_figure

        scores = options.pop("scores", None) or session.symmetry_scores(k + 1 if k else None)
        figure = symmetry_figure(scores, **{"heading": f"after mini-batch {state.iteration}"} | options)
    else:
        raise SettingsError(f"there is no picture {what!r}; there are {', '.join(PICTURES)}")
    return Picture(figures.png(figure))


def compare(a: Any, b: Any, names: tuple[str, str] = ("first", "second")) -> Picture:
    """The maps of two sessions side by side, their difference on the same grey scale, and their FSC."""
    from vdamkit.notebook import figures

    mask_radius = a.settings.mask_diameter / 2
    maps = (a.map.astype(np.float64), b.map.astype(np.float64))
    return Picture(figures.png(figures.compare_figure(*maps, a.pixel_size, names, mask_radius=mask_radius)))


def gallery(maps: dict[str, np.ndarray], pixel_size: float, **options: Any) -> Picture:
    """Several maps in a row, with FSC `curves` below; see :func:`vdamkit.notebook.figures.gallery_figure`."""
    from vdamkit.notebook import figures

    return Picture(figures.png(figures.gallery_figure(maps, pixel_size, **options)))


def open_panel(session: Any, truth: Any) -> Any:
    """The panel of a session; see :meth:`vdamkit.Session.panel`."""
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        raise SettingsError("the panel needs ipywidgets; pip install 'vdamkit[notebook]'") from None
    from vdamkit.notebook.panel import Panel

    if session._panel is not None:
        session._panel.close()
    session._panel = Panel(session, truth=truth)
    return session._panel


def open_view(session: Any, view: str, options: dict[str, Any]) -> Any:
    """A 3D view of a session; see :meth:`vdamkit.Session.show`."""
    from vdamkit.notebook.viewer import View

    try:
        return View(session, view=view, **options)
    except (TypeError, ValueError) as mistake:
        raise SettingsError(f"show: {mistake}") from None
