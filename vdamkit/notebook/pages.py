"""The panel's tabs: what each draws from a state, and the few widgets above its picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np

from vdamkit.compare import Match, align, known_map
from vdamkit.errors import VdamkitError
from vdamkit.notebook.figures import compare_figure, convergence_figure, map_figure, png, resolution_figure
from vdamkit.notebook.marks import marks_of
from vdamkit.notebook.orientation_figure import orientation_figure
from vdamkit.notebook.symmetry_figure import symmetry_figure
from vdamkit.state import State
from vdamkit.vdam.schedule import current_radius

WIDTH = "860px"
WHICH_SYMMETRY = (
    "Which symmetry does a map that was made in C1 support? A true group fits as well as the best one; "
    "wrong ones stay in the grey. A map made with a symmetry has it, of course."
)
BLANK = bytes.fromhex(  # a PNG of one transparent pixel, until there is a picture
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000b4944415478da"
    "636000020000050001e9fadcd80000000049454e44ae426082"
)


class Truth:
    """A map to compare with; laid anew onto each state's map, starting from where it lay last."""

    def __init__(self, truth: str | Path | np.ndarray | None, pixel_size: float, box: int):
        self.map = None if truth is None else known_map(truth, pixel_size, box)
        self.pixel_size = pixel_size
        self._match: Match | None = None

    def curve(self, volume: np.ndarray, radius: float, threads: int | None) -> np.ndarray | None:
        """FSC `(N//2 + 1,)` of a map with the truth inside a sphere of `radius` Å; None without a truth."""
        if self.map is None or not np.ptp(volume):
            return None
        fresh, laid = None, partial(align, volume, self.map, self.pixel_size, radius=radius, threads=threads)
        if self._match is not None:
            fresh = laid(start=self._match)
        if fresh is None or fresh.mean_fsc < 0.5:  # lost, or never found: search everywhere
            fresh = max(filter(None, (fresh, laid())), key=lambda m: m.mean_fsc)
        self._match = fresh
        return fresh.fsc


@dataclass
class Page:
    """A tab: its widgets, and how to draw its picture from the session (called when it is looked at)."""

    name: str
    box: Any
    image: Any
    draw: Callable[[], Callable[[], bytes]]  # take what is needed now, on the loop; draw later, in a thread
    hint: Any  # what stands there until the first picture
    shown: Callable[[], None] = lambda: None  # called when a picture has been put there

    def show(self, data: bytes) -> None:
        """Put a picture there."""
        self.hint.layout.display = "none"
        self.image.value = data
        self.shown()


def _page(name: str, controls: list[Any], image: Any, draw: Callable[[], Callable[[], bytes]]) -> Page:
    hint = widgets.HTML("drawing …")
    return Page(name, widgets.VBox([*controls, hint, image]), image, draw, hint)


def all_pages(session: Any, truth: Truth, redraw: Callable[[], None]) -> list[Page]:
    """The tabs with pictures, in their order; `redraw` is called when a person moves one of their sliders."""
    return [
        map_page(session, redraw), resolution_page(session, truth, redraw), orientation_page(session, redraw),
        convergence_page(session), symmetry_page(session, redraw),
    ]  # fmt: skip


def picture(name: str) -> Any:
    """An empty image that grows no wider than the panel."""
    image = widgets.Image(value=BLANK, format="png", layout=widgets.Layout(width="100%", max_width=WIDTH))
    image.add_class(f"vk-picture-{name}")
    return image


def map_page(session: Any, redraw: Callable[[], None]) -> Page:
    """Slices to drag through, projections, contour level."""
    box = session.particles.box
    sliders = [
        widgets.IntSlider(value=box // 2, min=0, max=box - 1, description=axis, continuous_update=True,
                          style={"description_width": "15px"}, layout=widgets.Layout(width="190px"))
        for axis in "xyz"
    ]  # fmt: skip
    level = widgets.FloatSlider(value=3.0, min=0.5, max=8.0, step=0.1, description="level σ", continuous_update=True,
                                style={"description_width": "45px"}, layout=widgets.Layout(width="230px"))  # fmt: skip
    for axis, slider in zip("xyz", sliders, strict=True):
        slider.add_class(f"vk-slice-{axis}")
        slider.tooltip = f"Where the slices cut the {axis} axis, px"
    level.tooltip = "Contour line, standard deviations above the map's mean"
    for control in (*sliders, level):
        control.observe(lambda _: redraw(), "value")
    image = picture("map")

    def draw() -> Callable[[], bytes]:
        state, settings = session.state, session.settings
        at, sigma = tuple(slider.value for slider in reversed(sliders)), level.value
        resolution = box * session.pixel_size / state.resolution_shell
        heading = f"after mini-batch {state.iteration}, {resolution:.1f} Å"
        return lambda: png(
            map_figure(
                state.maps / state.grey_scale, session.pixel_size, at=at, sigma=sigma, heading=heading,
                populations=state.class_probability, mask_radius=settings.mask_diameter / 2,
            )
        )  # fmt: skip

    return _page("Map", [widgets.HBox([*sliders, level], layout=widgets.Layout(flex_flow="row wrap"))], image, draw)


def resolution_page(session: Any, truth: Truth, redraw: Callable[[], None]) -> Page:
    """Signal-to-noise, Wiener factor, moments and FSC by shell, of a chosen class; with the truth's FSC where it is known."""
    choice = _class_choice(session, redraw)
    image = picture("resolution")

    def draw() -> Callable[[], bytes]:
        state, settings, k = session.state, session.settings, _chosen_class(choice, session)
        radius = current_radius(state.resolution_shell, settings, session.particles.box)

        def make() -> bytes:
            curve = truth.curve(state.maps[k], settings.mask_diameter / 2, settings.threads)
            curves = {} if curve is None else {"with the truth": curve}
            return png(resolution_figure(state, session.pixel_size, radius=radius, k=k, curves=curves))

        return make

    return _page("Resolution", [choice], image, draw)


def _class_choice(session: Any, redraw: Callable[[], None]) -> Any:
    choice = widgets.Dropdown(options=[("class 1", 0)], value=0, description="")
    choice.layout.width = "110px"
    _chosen_class(choice, session)
    choice.observe(lambda _: redraw(), "value")
    return choice


def _chosen_class(choice: Any, session: Any) -> int:
    """The class chosen, from 0; the choice follows classes that are split, merged or dropped."""
    count = session.settings.classes
    if len(choice.options) != count:
        kept = min(choice.value, count - 1)
        choice.options = [(f"class {k + 1}", k) for k in range(count)]
        choice.value = kept
    choice.layout.display = None if count > 1 else "none"
    return choice.value


def orientation_page(session: Any, redraw: Callable[[], None]) -> Page:
    """Directions on the sphere and histograms of the angles with their priors, of all particles or a chosen tomogram's."""
    names = sorted(set(session.particles.tomogram_names.astype(str)))
    choice = widgets.Dropdown(options=[("all tomograms", ""), *((n, n) for n in names)], value="")
    choice.layout.width = "220px"
    choice.observe(lambda _: redraw(), "value")
    image = picture("orientations")
    particles = session.particles

    def draw() -> Callable[[], bytes]:
        poses, settings = session.state.poses, session.settings
        subset = None if not choice.value else particles.tomogram_names == choice.value
        widths = (settings.rot_prior_width, settings.tilt_prior_width, settings.psi_prior_width)
        return lambda: png(orientation_figure(poses.angles, poses.class_number, particles.angle_priors, widths, subset=subset))

    return _page("Orientations", [choice], image, draw)


def convergence_page(session: Any) -> Page:
    """The course of the run by mini-batch, with a mark where a person changed something."""
    image = picture("convergence")

    def draw() -> Callable[[], bytes]:
        reports, T = session.reports(), session.settings.T
        marks = marks_of(session._history.line())
        return lambda: png(convergence_figure(reports, marks, final_T=T))

    return _page("Convergence", [], image, draw)


def symmetry_page(session: Any, redraw: Callable[[], None]) -> Page:
    """Which point groups the map of a chosen class supports; scored when a person asks for it, as it takes some seconds."""
    choice = _class_choice(session, redraw)
    button = widgets.Button(description="Score the map", icon="search", layout=widgets.Layout(width="160px"))
    button.tooltip = "Compare the current map with its copies turned by every group C2 to C14, D2 to D12, T, O, I"
    button.add_class("vk-score-symmetry")
    said = widgets.HTML(f'<div class="vk-note">{WHICH_SYMMETRY}</div>')
    said.add_class("vk-symmetry-says")
    image = picture("symmetry")
    kept: dict[str, Any] = {"wanted": False, "picture": BLANK, "said": WHICH_SYMMETRY}

    def press(_: Any) -> None:
        kept["wanted"] = True
        said.value = '<div class="vk-note">scoring all groups, some five seconds …</div>'
        redraw()

    def draw() -> Callable[[], bytes]:
        """The last picture again, or a new one where a person asked for it."""
        state, k = session.state, _chosen_class(choice, session)

        def make() -> bytes:
            wanted, kept["wanted"] = kept["wanted"], False  # not sooner, as another wish may take the place of this one
            if wanted:
                try:
                    scores = session.symmetry_scores(k + 1, state)
                except VdamkitError as problem:
                    kept["said"] = escape(str(problem))
                    return kept["picture"]
                heading = f"after mini-batch {state.iteration}" + (f", class {k + 1}" if len(state.maps) > 1 else "")
                kept["picture"] = png(symmetry_figure(scores, heading=heading))
                kept["said"] = escape(scores.warning(session.settings.symmetry)) or WHICH_SYMMETRY
            return kept["picture"]

        return make

    def shown() -> None:
        image.layout.display = None if kept["picture"] is not BLANK else "none"
        if not kept["wanted"]:
            said.value = f'<div class="vk-note">{kept["said"]}</div>'

    button.on_click(press)
    page = _page("Symmetry", [widgets.HBox([button, choice]), said], image, draw)
    page.shown = shown
    return page


def compare_picture(a: State, b: State, pixel_size: float, names: tuple[str, str], mask_diameter: float) -> bytes:
    """The fullest classes of two states, their difference and their FSC."""
    maps = [(s.maps[int(np.argmax(s.class_probability))] / s.grey_scale).astype(np.float64) for s in (a, b)]
    return png(compare_figure(*maps, pixel_size, names, mask_radius=mask_diameter / 2))
