"""Where the particles point: directions on the sphere with the prior, and histograms of the three angles."""

from __future__ import annotations

from typing import Any

import numpy as np

from vdamkit.notebook.figures import class_colour, new_figure
from vdamkit.picture import GREY, house_style
from vdamkit.sampling.priors import CUT, wrap

BINS = {"tilt": np.arange(0, 181, 5.0), "psi": np.arange(-180, 181, 10.0), "rot": np.arange(-180, 181, 10.0)}


@house_style()
def orientation_figure(
    angles: np.ndarray, classes: np.ndarray, priors: np.ndarray, widths: tuple[float | None, float | None, float | None], *,
    subset: np.ndarray | None = None, heading: str | None = None,
) -> Any:  # fmt: skip
    """Orientations of the particles that were visited.

    Parameters
    ----------
    angles: `(n, 3)` degrees rot, tilt, psi. classes: `(n,)` from 1; 0: never visited, left out.
    priors: `(n, 3)` degrees, nan where the file has none. widths: of the priors on rot, tilt, psi in degrees, or None.
    subset: bool `(n,)`, particles to show.

    The sphere shows the particle's z axis in the frame of its subtomogram: psi runs along the equator, tilt from pole to
    pole. A prior on tilt alone is a band there; with a prior on psi it becomes a spot.
    """
    shown = classes > 0 if subset is None else (classes > 0) & subset
    figure = new_figure(8.4, 5.6)
    grid = figure.add_gridspec(3, 2, width_ratios=[1.7, 1])
    sphere = figure.add_subplot(grid[:, 0], projection="mollweide")
    centre = _common_prior(priors)
    _draw_prior(sphere, centre, widths)
    _sphere_axes(sphere, centre[2])
    if not shown.any():
        figure.text(0.33, 0.5, "No particle has been visited yet.", ha="center", color=GREY, fontsize=10)
    for k in np.unique(classes[shown]):
        some = shown & (classes == k)
        x = np.radians(wrap(angles[some, 2] - centre[2]))
        size = float(np.clip(4000 / max(1, shown.sum()), 2, 22))
        sphere.scatter(x, np.radians(90 - angles[some, 1]), s=size, color=class_colour(k - 1), alpha=0.75, linewidths=0,
                       label=f"class {k}")  # fmt: skip
    if len(np.unique(classes[shown])) > 1:
        sphere.legend(frameon=False, loc="upper right", fontsize=7.5)
    names = (("tilt", 1, "tilt (°)"), ("psi", 2, "psi (°)"), ("rot", 0, "rot (°)"))
    for row, (name, axis_number, label) in enumerate(names):
        axis = figure.add_subplot(grid[row, 1])
        _histogram(axis, angles[:, axis_number], classes, shown, centre[axis_number], widths[axis_number], name)
        axis.set_xlabel(label, labelpad=1)
    figure.suptitle(heading or f"{int(shown.sum())} particles visited", fontsize=9)
    return figure


def _common_prior(priors: np.ndarray) -> np.ndarray:
    """Prior centre `(3,)` that all particles share; 0 for rot and psi and 90 for tilt where there is none or many."""
    out = np.array([0.0, 90.0, 0.0])
    for axis in range(3):
        known = priors[~np.isnan(priors[:, axis]), axis]
        if len(known) and np.ptp(known) < 1:
            out[axis] = known[0]
    return out


def _sphere_axes(axis: Any, psi: float) -> None:
    degrees = np.arange(-120, 121, 60)
    axis.set_xticks(np.radians(degrees), [f"{wrap(np.array(d + psi)):.0f}°" for d in degrees], fontsize=7.5, color=GREY)
    tilts = np.array([30, 60, 90, 120, 150])
    axis.set_yticks(np.radians(90 - tilts), [f"tilt {t}°" for t in tilts], fontsize=7.5, color=GREY)
    axis.grid(color="0.85", linewidth=0.6)
    axis.set_title("z axis of each particle in its subtomogram's frame", fontsize=8.5, pad=8)
    axis.set_xlabel("psi", fontsize=8, color=GREY)


def _draw_prior(axis: Any, centre: np.ndarray, widths: tuple) -> None:
    """The region the prior admits (CUT widths) and its core (one width), as shades."""
    _, tilt, psi = widths
    if tilt is None and psi is None:
        return
    for factor, shade in ((CUT, "#DCEBF5"), (1.0, "#B5D5EA")):
        half_tilt = 90.0 if tilt is None else min(factor * tilt, 90)
        half_psi = 180.0 if psi is None else min(factor * psi, 180)
        low, high = max(centre[1] - half_tilt, 0), min(centre[1] + half_tilt, 180)
        x = np.radians(np.linspace(-half_psi, half_psi, 181))
        axis.fill_between(x, np.radians(90 - high), np.radians(90 - low), color=shade, linewidth=0, zorder=0)
    what = "band" if psi is None else "spot"
    axis.text(0, -0.13, f"prior: {what} of one (dark) and {CUT:g} widths (light)", transform=axis.transAxes, fontsize=7.5,
              color=GREY)  # fmt: skip


def _histogram(
    axis: Any, values: np.ndarray, classes: np.ndarray, shown: np.ndarray, centre: float, width: float | None, name: str
) -> None:
    bins = BINS[name]
    kinds = np.unique(classes[shown])
    data = [values[shown & (classes == k)] for k in kinds]
    if name != "tilt":
        data = [wrap(part) for part in data]
    if data:
        axis.hist(data, bins=bins, stacked=True, color=[class_colour(k - 1) for k in kinds])
    if width is not None:
        x = np.linspace(bins[0], bins[-1], 400)
        away = (x - centre) if name == "tilt" else wrap(x - centre)
        curve = np.exp(-0.5 * (away / width) ** 2)
        total = max(int(shown.sum()), 1) * (bins[1] - bins[0]) / (curve.mean() * (bins[-1] - bins[0]))
        axis.plot(x, curve * total, color="black", linewidth=1.2, label="prior")
        axis.legend(frameon=False, fontsize=7.5, loc="upper right")
    axis.set_xlim(bins[0], bins[-1])
    axis.set_xticks(np.arange(bins[0], bins[-1] + 1, 60 if name != "tilt" else 30))
    axis.set_ylabel("particles")
    axis.yaxis.get_major_locator().set_params(integer=True)
