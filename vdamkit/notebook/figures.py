"""Pictures of a session for the panel and the notebooks: one look, axes with units, no display needed.

Every function takes plain data and returns a matplotlib figure that belongs to no window; :func:`png` turns it into bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np

from vdamkit.imaging.fsc import crossing, fsc
from vdamkit.imaging.halfball import fourier_grid, map_to_fourier
from vdamkit.picture import AXES, BLUE, GREEN, GREY, ORANGE, circle, house_style, resolution_axis, scale_bar, window
from vdamkit.state import State, StepReport
from vdamkit.verdict import half_agreement

SKY, YELLOW, PINK = "#56B4E9", "#E69F00", "#CC79A7"
CLASS_COLOURS = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY)  # Okabe and Ito
DPI = 110
SHOWN = 272  # pixels across of a slice or projection
NOTES, NOTE_WIDTH = 8, 125  # lines of what was changed, below the course of a run, and characters of each


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """An empty figure of `width` × `height` inches with a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file; drawn once, where savefig would draw it a second time for its layout."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).save(buffer, "png", compress_level=3, dpi=(figure.dpi, figure.dpi))
    return buffer.getvalue()


def class_colour(k: int) -> str:
    """Colour of class `k` (from 0), the same in every picture."""
    return CLASS_COLOURS[k % len(CLASS_COLOURS)]


# maps ---------------------------------------------------------------------------------------------------------------


@house_style()
def map_figure(
    maps: np.ndarray, pixel_size: float, *, at: tuple[int, int, int] | None = None, sigma: float = 3.0,
    populations: Sequence[float] | None = None, mask_radius: float | None = None, heading: str | None = None,
) -> Any:  # fmt: skip
    """Slices and projections of all classes.

    Parameters
    ----------
    maps: `(K, N, N, N)` zyx. pixel_size: Å. at: px, zyx, where the slices cut; default the centre.
    sigma: contour level in standard deviations above the mean, drawn on the slices.
    populations: `(K,)` share of each class. mask_radius: Å, of a dashed circle.
    """
    k, n = len(maps), maps.shape[-1]
    at = (n // 2,) * 3 if at is None else at
    if k == 1:
        figure = new_figure(8.4, 5.9, None)  # known beforehand: this picture is drawn again and again beside a run
        axes = figure.subplots(2, 3).reshape(1, 6)
        figure.subplots_adjust(left=0.035, right=0.99, bottom=0.035, top=0.91 if heading else 0.96, wspace=0.11, hspace=0.13)
    else:
        figure = new_figure(8.4, 1.75 * k + 0.35)
        axes = figure.subplots(k, 6)
    if heading:
        figure.suptitle(heading, fontsize=10)
    for row, volume in enumerate(maps):
        _slices(axes[row, :3], volume, at, sigma, mask_radius / pixel_size if mask_radius else None, pixel_size)
        _projections(axes[row, 3:], volume)
        if k > 1:
            share = "" if populations is None else f"\n{100 * populations[row]:.0f} %"
            colour = class_colour(row)
            axes[row, 0].annotate(
                f"class {row + 1}{share}", (-0.2, 0.5), xycoords="axes fraction", color=colour, fontsize=9, fontweight="bold",
                rotation=90, ha="right", va="center", multialignment="center",
            )  # fmt: skip
    return figure


def _show(axis: Any, image: np.ndarray, low: float, high: float) -> None:
    """An image of the map's pixels in grey, interpolated here: matplotlib takes several times as long, at each drawing."""
    from PIL import Image

    height, width = image.shape
    fine = Image.fromarray(np.asarray(image, np.float32)).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
    axis.imshow(np.asarray(fine), cmap="gray_r", vmin=low, vmax=high, origin="lower", interpolation="nearest",
                extent=(-0.5, width - 0.5, -0.5, height - 0.5))  # fmt: skip


def _slices(axes: Any, volume: np.ndarray, at: tuple, sigma: float, radius: float | None, pixel_size: float) -> None:
    z, y, x = at
    images = [volume[z], volume[:, y], volume[:, :, x]]
    low, high = window([volume])
    level = volume.mean() + sigma * volume.std()
    lines = ((x, y), (x, z), (y, z))
    for axis, image, (plane, right, up), (across, along) in zip(axes, images, AXES, lines, strict=True):
        _show(axis, image, low, high)
        if image.min() < level < image.max():
            axis.contour(image, levels=[level], colors=[ORANGE], linewidths=0.9)
        axis.axvline(across, color=SKY, linewidth=0.5)
        axis.axhline(along, color=SKY, linewidth=0.5)
        _frame(axis, f"slice {plane}", right, up)
        if radius:
            circle(axis, len(image) // 2, radius)
    scale_bar(axes[0], volume.shape[0], pixel_size)


def _projections(axes: Any, volume: np.ndarray) -> None:
    for axis, image, (plane, right, up) in zip(axes, [volume.sum(i) for i in range(3)], AXES, strict=True):
        _show(axis, image, *window([image]))
        _frame(axis, f"projection {plane}", right, up)


def _frame(axis: Any, title: str, right: str, up: str) -> None:
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, color=GREY, linewidth=0.6)
    axis.set_title(title, pad=3, fontsize=8, color=GREY)
    axis.set_xlabel(f"{right} →", fontsize=7.5, color=GREY, labelpad=1.5)
    axis.set_ylabel(f"{up} →", fontsize=7.5, color=GREY, labelpad=1.0)


@house_style()
def compare_figure(
    a: np.ndarray, b: np.ndarray, pixel_size: float, names: tuple[str, str], *, mask_radius: float | None = None
) -> Any:
    """Two maps `(N, N, N)` side by side, their difference on the same grey scale, and their FSC."""
    figure = new_figure(8.4, 7.2)
    grid = figure.add_gridspec(3, 4, width_ratios=[1, 1, 1, 0.04], height_ratios=[1, 1, 0.8])
    b = b * _match(a, b)
    low, high = window([a, b])
    limit = max(abs(low), abs(high))
    middle = a.shape[0] // 2
    styles = ({"cmap": "gray_r", "vmin": low, "vmax": high}, {"cmap": "PuOr", "vmin": -limit, "vmax": limit})
    for row, (plane, right, up) in enumerate(AXES[:2]):
        for column, (name, volume) in enumerate(((names[0], a), (names[1], b), ("first − second", a - b))):
            axis = figure.add_subplot(grid[row, column])
            image = volume[middle] if row == 0 else volume[:, middle]
            shown = axis.imshow(image, origin="lower", interpolation="bicubic", **styles[column == 2])
            _frame(axis, f"slice {plane}", right, up)
            if row == 0:
                axis.set_title(name, fontsize=9)
            if mask_radius and column < 2:
                circle(axis, middle, mask_radius / pixel_size)
            if row == column == 0:
                scale_bar(axis, len(image), pixel_size)
        figure.colorbar(shown, cax=figure.add_subplot(grid[row, 3]), label="density, first − second")
    axis = figure.add_subplot(grid[2, :])
    _fsc_axes(axis, {"of the two": fsc(a, b)}, a.shape[0], pixel_size)
    resolution_axis(axis, pixel_size)
    return figure


@house_style()
def gallery_figure(
    maps: Mapping[str, np.ndarray],
    pixel_size: float,
    *,
    curves: Mapping[str, np.ndarray] | None = None,
    radius: float | None = None,
) -> Any:
    """Several maps `(N, N, N)` by name: a column each with the xy and xz slices; below, FSC curves by name if given.

    Every map has its own grey scale. radius: Å, of a dashed circle.
    """
    n = len(maps)
    figure = new_figure(max(8.4, 1.9 * n), 4.2 + (2.6 if curves else 0))
    parts = np.atleast_1d(figure.subfigures(2 if curves else 1, 1, height_ratios=[4.2, 2.6] if curves else [1]))
    axes = parts[0].subplots(2, n, squeeze=False)
    for column, (name, volume) in enumerate(maps.items()):
        low, high = window([volume])
        middle = len(volume) // 2
        for row, (image, (plane, right, up)) in enumerate(zip((volume[middle], volume[:, middle]), AXES[:2], strict=True)):
            axis = axes[row, column]
            axis.imshow(image, cmap="gray_r", vmin=low, vmax=high, origin="lower", interpolation="bicubic")
            _frame(axis, name if row == 0 else f"slice {plane}", right, up)
            if row == 0:
                axis.title.set(fontsize=9, color="black")
            if radius:
                circle(axis, middle, radius / pixel_size)
        if column == 0:
            scale_bar(axes[0, 0], len(volume), pixel_size)
    if curves:
        axis = parts[1].subplots()
        _fsc_axes(axis, curves, len(next(iter(maps.values()))), pixel_size)
        resolution_axis(axis, pixel_size)
    return figure


def _match(a: np.ndarray, b: np.ndarray) -> float:
    """Factor that brings the grey values of b nearest to those of a."""
    power = float((b * b).sum())
    return float((a * b).sum()) / power if power > 0 else 1.0


# resolution ---------------------------------------------------------------------------------------------------------


@house_style()
def resolution_figure(
    state: State, pixel_size: float, *, radius: int, k: int = 0, curves: Mapping[str, np.ndarray] | None = None
) -> Any:
    """Signal-to-noise, Wiener factor and FSC, and the spectra of both moments, of class `k` by shell.

    radius: px, of the half-ball in use (the current size is twice that). curves: more FSCs by name, such as the truth's.
    """
    box = state.maps.shape[-1]
    extent = box * pixel_size
    shells = np.arange(1, box // 2 + 1)
    figure = new_figure(8.4, 5.6)
    top, bottom = figure.subplots(2, 2)
    ssnr = state.data_vs_prior[k][shells]
    if (ssnr > 0).any():
        top[0].semilogy(shells / extent, np.where(ssnr > 0, ssnr, np.nan), color=BLUE, marker="o", markersize=3)
    else:
        top[0].set_yscale("log")
        top[0].set_ylim(0.1, 10)
    top[0].axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    top[0].set_ylabel("signal-to-noise ratio\n(data vs prior)")
    half = {"of the pseudo-halves' targets": half_agreement(state, k, radius)} | dict(curves or {})
    _fsc_axes(top[1], half, box, pixel_size, more={"Wiener factor": state.wiener[k]})
    for name, curve, colour in moment_spectra(state, k):
        bottom[0].semilogy(shells / extent, np.where(curve[shells] > 0, curve[shells], np.nan), color=colour, label=name)
    bottom[0].set_ylabel("mean amplitude of a shell")
    bottom[0].legend(frameon=False, fontsize=7.5)
    grid = fourier_grid(box)
    v = grid.shell_means(state.moment2[k], box)
    bottom[1].plot(shells / extent, v[shells], color=ORANGE, marker="o", markersize=3)
    bottom[1].set_ylim(0)
    bottom[1].set_ylabel("second moment v\n(noise over signal)")
    for axis in (*top, *bottom):
        axis.set_xlim(0, (box // 2 + 0.5) / extent)
        axis.axvline(state.resolution_shell / extent, color=GREEN, linewidth=1, linestyle=":")
        axis.axvspan(radius / extent, axis.get_xlim()[1], color="0.93", zorder=0)
        axis.set_xlabel("spatial frequency (1/Å)")
    resolution_axis(top[0], pixel_size)
    resolution_axis(top[1], pixel_size)
    figure.suptitle(
        f"resolution {extent / state.resolution_shell:.1f} Å (dotted); current size {2 * radius} px, {extent / radius:.1f} Å "
        "(grey: not used yet)", fontsize=9,
    )  # fmt: skip
    return figure


def moment_spectra(state: State, k: int) -> list[tuple[str, np.ndarray, str]]:
    """Names, mean amplitudes by shell `(N//2 + 1,)` and colours of the map, its gradient and the noise of class `k`.

    These are what the Wiener factor is made of: ``snr = 2 T ⟨|P|⟩ / ⟨|m0 − m1|⟩``.
    """
    grid = fourier_grid(state.maps.shape[-1])
    reach = state.maps.shape[-1]
    m0, m1 = state.moment1[k].astype(np.complex128)
    P = map_to_fourier(state.maps[k].astype(np.float64))
    return [
        ("map ⟨|P|⟩", grid.shell_means(np.abs(P), reach), BLUE),
        ("gradient ⟨|m₀ + m₁|⟩ / 2", grid.shell_means(np.abs(m0 + m1) / 2, reach), GREEN),
        ("noise ⟨|m₀ − m₁|⟩", grid.shell_means(np.abs(m0 - m1), reach), ORANGE),
    ]


def _fsc_axes(
    axis: Any, curves: Mapping[str, np.ndarray], box: int, pixel_size: float, *, more: Mapping[str, np.ndarray] | None = None
) -> None:
    """FSC curves; `more` are drawn dashed, without a resolution."""
    extent = box * pixel_size
    shells = np.arange(1, box // 2 + 1)
    for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, PINK, SKY) * 3, strict=False):
        label = f"FSC {name}: 0.5 at {crossing(curve, 0.5, box, pixel_size)}"
        axis.plot(shells / extent, np.asarray(curve)[shells], color=colour, marker="o", markersize=3, label=label)
    for name, curve in (more or {}).items():
        axis.plot(shells / extent, np.asarray(curve)[shells], color=GREY, linestyle="--", label=name)
    axis.axhline(0.5, color=GREY, linewidth=0.6, linestyle="--")
    axis.axhline(0, color=GREY, linewidth=0.6)
    axis.set_xlim(0, (box // 2 + 0.5) / extent)
    axis.set_ylim(min(-0.1, axis.get_ylim()[0]), 1.05)
    axis.set_xlabel("spatial frequency (1/Å)")
    axis.set_ylabel("correlation, factor" if more else "Fourier shell correlation")
    above = 1.17 if more else 1.01  # of the scale in Å
    axis.legend(fontsize=7.5, loc="lower left", bbox_to_anchor=(-0.02, above), frameon=False, borderpad=0)


# convergence --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """Where a person changed something: before this mini-batch, what."""

    iteration: int
    text: str


@house_style()
def convergence_figure(reports: Sequence[StepReport], marks: Sequence[Mark] = (), *, final_T: float | None = None) -> Any:
    """The course of a run by mini-batch, with numbered marks where options were changed."""
    told = (f"{i}: before mini-batch {mark.iteration}: {mark.text}" for i, mark in enumerate(marks, 1))
    lines = [line for text in told for line in wrap(text, NOTE_WIDTH, subsequent_indent="    ")]
    figure = new_figure(8.4, 5.6 + 0.17 * min(len(lines), NOTES))
    axes = figure.subplots(2, 3)
    if not reports:
        for axis in axes.ravel():
            axis.set_axis_off()
        figure.text(0.5, 0.5, "No mini-batch has run yet.", ha="center", color=GREY, fontsize=11)
        return figure
    number = np.array([report.iteration for report in reports])
    dots = {"marker": "o", "markersize": 3} if len(number) < 60 else {}

    def draw(axis: Any, values: Sequence[float], colour: str, label: str | None = None, **options: Any) -> None:
        axis.plot(number, values, color=colour, label=label, **dots, **options)

    draw(axes[0, 0], [r.resolution for r in reports], BLUE)
    axes[0, 0].set_ylabel("resolution (Å)")
    axes[0, 0].set_ylim(0)
    draw(axes[0, 1], [r.pmax for r in reports], ORANGE)
    axes[0, 1].set(ylabel="mean Pmax", ylim=(0, 1.03))
    draw(axes[0, 2], [r.angle_change for r in reports], BLUE, "angle (°, median)")
    draw(axes[0, 2], [r.offset_change for r in reports], ORANGE, "offset (Å, rms)")
    axes[0, 2].set_ylabel("change since the last visit")
    classes = max(len(r.class_populations) for r in reports)  # some may have been split or dropped on the way
    for k in range(classes):
        shares = [r.class_populations[k] if k < len(r.class_populations) else np.nan for r in reports]
        draw(axes[1, 0], shares, class_colour(k), f"class {k + 1}")
    axes[1, 0].set(ylabel="class population", ylim=(0, 1.03))
    draw(axes[1, 1], [r.step_size for r in reports], GREEN)
    axes[1, 1].set(ylabel="step size η", ylim=(0, 1.03))
    draw(axes[1, 2], [r.T for r in reports], PINK, "T in force")
    if final_T is not None:
        axes[1, 2].axhline(final_T, color=GREY, linestyle="--", linewidth=1, label=f"final T {final_T:g}")
    axes[1, 2].set_ylabel("T")
    axes[1, 2].set_ylim(0)
    for axis in axes.ravel():
        axis.set_xlabel("mini-batch")
        axis.set_xlim(0.5, max(number.max(), 5) + 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for i, mark in enumerate(marks, 1):
            axis.axvline(mark.iteration - 0.5, color=GREY, linewidth=0.8, linestyle=":")
            axis.annotate(str(i), (mark.iteration - 0.5, 1.0), xycoords=("data", "axes fraction"), fontsize=7, color=GREY,
                          ha="center", va="bottom")  # fmt: skip
    for axis in (axes[0, 2], axes[1, 2], *([axes[1, 0]] if classes > 1 else [])):
        axis.legend(frameon=False, fontsize=7.5, loc="lower left", bbox_to_anchor=(-0.02, 1.02), ncols=2, borderpad=0,
                    handlelength=1.2, columnspacing=0.8)  # fmt: skip
    if marks:
        figure.supxlabel("\n".join(lines[-NOTES:]), fontsize=7.5, color=GREY, x=0.02, ha="left")
    return figure
