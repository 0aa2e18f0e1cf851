"""Pictures on paper: slices and projections of maps, FSC curves, and the course of a run. Needs no display."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vdamkit.errors import OutputError

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"  # Okabe and Ito, safe for colour blindness
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
}
_DRAWING = threading.RLock()  # matplotlib's settings are the whole process's: who draws takes turns
AXES = (("xy", "x", "y"), ("xz", "x", "z"), ("yz", "y", "z"))  # seen along z, y, x


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house style, whatever the user's matplotlib is set to; also as a decorator.

    One thread at a time. What the user sets meanwhile in another thread stays, where `rc_context` would take it back.
    """
    import matplotlib

    params = matplotlib.rcParams
    with _DRAWING:
        ours = {**matplotlib.rcParamsDefault, **STYLE}
        theirs = {key: params[key] for key in ours if key != "backend" and params[key] != ours[key]}
        params.update({key: ours[key] for key in theirs})
        ours = {key: params[key] for key in theirs}  # as matplotlib writes them
        try:
            yield
        finally:
            params.update({key: value for key, value in theirs.items() if params[key] == ours[key]})


def contact_sheet(
    path: str | Path,
    maps: Sequence[np.ndarray],
    pixel_size: float,
    *,
    titles: Sequence[str] | None = None,
    fsc_curves: Mapping[str, np.ndarray] | None = None,
    reports: Sequence | None = None,
    heading: str | None = None,
    radius: float | None = None,
    dpi: int = 140,
) -> Path:
    """One page: for each map three central slices and three projections; below, the FSC and the course of the run.

    Parameters
    ----------
    path: PNG (or PDF, SVG) to write. maps: `(N, N, N)` zyx each; density is shown dark on white.
    pixel_size: Å. titles: a line per map. fsc_curves: by legend text `(N//2 + 1,)`, shells of the maps' box.
    reports: :class:`vdamkit.state.StepReport` of each mini-batch. heading: a line on top.
    radius: Å, of a dashed circle on the slices (the sphere in which maps were compared).

    Returns
    -------
    The path. Raises OutputError where it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = titles or [f"map {i + 1}" for i in range(len(maps))]
    curves = bool(fsc_curves) + bool(reports)
    with house_style():
        width, row = 9.6, 1.95
        height = row * len(maps) + (2.75 if curves else 0) + (0.3 if heading else 0)
        figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        if heading:
            figure.suptitle(heading, fontsize=11, fontweight="bold")
        parts = figure.subfigures(len(maps) + bool(curves), 1, height_ratios=[row] * len(maps) + [2.75] * bool(curves))
        parts = np.atleast_1d(parts)
        for part, volume, title in zip(parts, maps, titles, strict=False):
            _map_row(part, np.asarray(volume, np.float64), pixel_size, title, radius)
        if curves:
            columns = parts[-1].subplots(1, curves, squeeze=False)[0]
            if fsc_curves:
                draw_fsc(columns[0], fsc_curves, maps[0].shape[0], pixel_size)
            if reports:
                draw_course(columns[-1], reports)
        return _save(figure, Path(path))


def _save(figure: Any, path: Path) -> Path:
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, metadata={"Software": "vdamkit"} if path.suffix == ".png" else None)
        temporary.replace(path)
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written ({problem.strerror or problem}); choose another place") from None
    return path


def sections(volume: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Central slices and projections of a map `(N, N, N)` zyx along z, y and x; rows of each are the second axis."""
    middle = volume.shape[0] // 2
    slices = [volume[middle], volume[:, middle], volume[:, :, middle]]
    return slices, [volume.sum(axis) for axis in range(3)]


def _map_row(part: Any, volume: np.ndarray, pixel_size: float, title: str, radius: float | None) -> None:
    part.suptitle(title, fontsize=9.5, x=0.01, ha="left")
    columns = part.subplots(1, 6, gridspec_kw={"wspace": 0.04})
    slices, projections = sections(volume)
    for kind, images, axes in (("slice", slices, columns[:3]), ("projection", projections, columns[3:])):
        together = window(images)  # slices share their grey scale; projections of a flat object could not
        for axis, image, (plane, right, up) in zip(axes, images, AXES, strict=True):
            low, high = together if kind == "slice" else window([image])
            axis.imshow(image, cmap="gray_r", vmin=low, vmax=high, origin="lower", interpolation="bicubic")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(visible=True, color=GREY, linewidth=0.6)
            axis.set_title(f"{kind} {plane}", pad=3, fontsize=8, color=GREY)
            axis.set_xlabel(f"{right} →", fontsize=7, color=GREY, labelpad=1.5)
            axis.set_ylabel(f"{up} →", fontsize=7, color=GREY, labelpad=1.0)
    scale_bar(columns[0], volume.shape[0], pixel_size)
    for axis in columns[:3] if radius else []:
        circle(axis, volume.shape[0] // 2, radius / pixel_size)


def window(images: Sequence[np.ndarray]) -> tuple[float, float]:
    """Grey values from white to black: outliers are cut, and the level around the object is nearly white."""
    values = np.concatenate([image.ravel() for image in images])
    low, high = np.percentile(values, [0.5, 99.7])
    return float(low), float(high if high > low else low + 1)


def circle(axis: Any, centre: float, radius: float) -> None:
    """A dashed circle, in px."""
    from matplotlib.patches import Circle

    axis.add_patch(Circle((centre, centre), radius, fill=False, color=BLUE, linewidth=0.8, linestyle=(0, (4, 3))))


def scale_bar(axis: Any, box: int, pixel_size: float) -> None:
    """A bar of a round length near a third of the picture."""
    wanted = box * pixel_size / 3
    power = 10 ** np.floor(np.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    start, level, width = 0.06 * box, 0.07 * box, length / pixel_size
    axis.plot([start, start + width], [level] * 2, color="white", linewidth=5, solid_capstyle="butt")
    axis.plot([start, start + width], [level] * 2, color="black", linewidth=2.5, solid_capstyle="butt")
    box_style = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    axis.text(start + width / 2, level + 0.045 * box, f"{length:g} Å", ha="center", va="bottom", fontsize=7.5, bbox=box_style)


def draw_fsc(axis: Any, curves: Mapping[str, np.ndarray], box: int, pixel_size: float) -> None:
    """FSC against spatial frequency, labelled in 1/Å below and Å above, into matplotlib axes."""
    from vdamkit.imaging.fsc import crossing

    extent = box * pixel_size
    for (text, curve), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, GREY) * len(curves), strict=False):
        shells = np.arange(1, min(len(curve), box // 2 + 1))
        label = f"{text}: {crossing(curve, 0.5, box, pixel_size)}"
        axis.plot(shells / extent, curve[shells], color=colour, marker="o", markersize=3, label=label)
    axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set(xlim=(0, (box // 2 + 0.3) / extent), ylim=(min(-0.1, axis.get_ylim()[0]), 1.04))
    axis.set_ylabel("Fourier shell correlation")
    axis.set_xlabel("spatial frequency (1/Å)")
    axis.legend(frameon=False, loc=(0.03, 0.16), title="FSC 0.5 at", title_fontsize=8, alignment="left")
    resolution_axis(axis, pixel_size)


def resolution_axis(axis: Any, pixel_size: float) -> None:
    """A second scale in Å above a plot against spatial frequency in 1/Å."""
    top = axis.secondary_xaxis("top")
    ticks = [r for r in (200, 100, 60, 40, 30, 25, 20, 15, 12, 10, 8, 6, 5, 4) if 0.08 <= 2 * pixel_size / r <= 1.0]
    top.set_xticks([1 / r for r in ticks], [f"{r:g}" for r in ticks])
    top.set_xlabel("resolution (Å)")


def draw_course(axis: Any, reports: Sequence) -> None:
    """Resolution, Pmax and T in force by mini-batch, into matplotlib axes."""
    number = [report.iteration for report in reports]
    resolution = [report.resolution for report in reports]
    axis.step(number, resolution, where="mid", color=BLUE)
    axis.set_xlabel("mini-batch")
    axis.set_ylabel("resolution (Å)", color=BLUE)
    axis.tick_params(axis="y", colors=BLUE)
    axis.set_ylim(0, 1.08 * max(resolution))
    axis.set_xlim(min(number) - 0.5, max(number) + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    right = axis.twinx()
    right.spines["right"].set_visible(True)
    right.plot(number, [report.pmax for report in reports], color=ORANGE, linestyle="-", marker="o", markersize=3)
    largest = max(report.T for report in reports)
    right.plot(number, [report.T / largest for report in reports], color=GREEN, linestyle="--")
    right.set_ylim(0, 1.08)
    right.set_ylabel(f"Pmax, T / {largest:g}")
    lines = [*axis.lines, *right.lines]
    texts = ["resolution (left)", "Pmax (right)", f"T / {largest:g} (right)"]
    axis.legend(lines, texts, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, columnspacing=1.0,
                handlelength=1.6)  # fmt: skip
