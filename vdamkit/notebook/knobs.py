"""The panel's controls: each shows the value in force and the one to come, checks what is typed, and explains itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from html import escape
from threading import get_ident
from typing import Any

import ipywidgets as widgets

from vdamkit.errors import SettingsError
from vdamkit.settings import Settings

METADATA = {option.name: option.metadata for option in fields(Settings)}
COMMON_GROUPS = [
    "C1",
    "C2",
    "C3",
    "C4",
    "C5",
    "C6",
    "C7",
    "C8",
    "D2",
    "D3",
    "D4",
    "D5",
    "D6",
    "D7",
    "T",
    "O",
    "I1",
    "I2",
    "I3",
    "I4",
]
RECOMMENDED_T = (2.0, 4.0)  # RELION's help text of the job: values around 2-4 have been observed to be useful
T_RANGE = (-1.0, 2.0)  # powers of ten of the slider
WAIT = 0.5  # seconds after the last key until what was typed counts

STYLE = """<style>
.vk-bad input {border: 2px solid #c62828 !important; background: #ffebee !important; color: black !important;}
.vk-note {font-size: 11px; line-height: 1.35; color: var(--jp-ui-font-color2, #555);}
.vk-next {color: var(--jp-brand-color1, #0072B2); font-weight: 600;}
.vk-error {color: var(--jp-error-color1, #c62828); font-weight: 600;}
.vk-usual {color: var(--jp-success-color1, #00694d); font-size: 9px;}
.vk-line .widget-html-content {white-space: nowrap; overflow: hidden; text-overflow: ellipsis;}
.vk-status .widget-html-content {height: 40px; line-height: 20px;}
.vk-message {min-height: 32px;}
.vk-title {font-weight: 600; font-size: 12px; margin-top: 2px;}
</style>"""


def tooltip(*names: str) -> str:
    """What options do and what RELION calls them."""
    return "\n".join(f"{METADATA[name]['doc']} RELION: {METADATA[name]['flag']}" for name in names)


class Knob:
    """One or two widgets for some options.

    Parameters
    ----------
    title: a word or two. names: options of :class:`vdamkit.Settings`. parts: the widgets, in a row.
    read: the widgets' content as options. write: settings into the widgets. show: settings as a short text.
    typed: whether a person types into it; then changes count when the keys have rested.
    """

    def __init__(
        self, title: str, names: tuple[str, ...], parts: list[Any], *, read: Callable[[], dict[str, Any]],
        write: Callable[[Settings], None], show: Callable[[Settings], str], typed: bool = False, below: Any = None,
    ):  # fmt: skip
        self.names, self.parts, self.read, self.write, self.show, self.typed = names, parts, read, write, show, typed
        self.title, self.error = title, ""
        hint = tooltip(*names)
        for part in parts:
            part.tooltip = hint
        heading = widgets.HTML(f'<span class="vk-title" title="{escape(hint)}">{escape(title)}</span>')
        self.note = widgets.HTML()
        row = widgets.HBox(parts, layout=widgets.Layout(align_items="center", overflow="hidden"))
        self.box = widgets.VBox([heading, row, *([below] if below is not None else []), self.note])
        self.box.add_class(f"vk-knob-{names[0]}")
        self._writer = 0  # the thread that puts a value there which is no person's doing

    def connect(self, changed: Callable[[Knob], None]) -> None:
        """Call `changed` when a person moves it."""
        for part in self.parts:
            part.observe(lambda _: None if self._writer == get_ident() else changed(self), "value")

    def set(self, settings: Settings) -> None:
        """Put a value into the widgets without that counting as a person's doing."""
        self._writer = get_ident()
        try:
            self.write(settings)
        finally:
            self._writer = 0

    def complain(self, text: str) -> None:
        """Turn red and say why; an empty text turns it back."""
        for name in self.names:
            text = text.replace(name, self.title, 1)
        self.error = text
        for part in self.parts:
            (part.add_class if text else part.remove_class)("vk-bad")

    def refresh(self, in_force: Settings | None, pending: Settings, extra: str = "") -> None:
        """The line below: what is in force, what comes next if that differs, or what is wrong."""
        if self.error:
            self.note.value = f'<div class="vk-note vk-error">{escape(self.error)}</div>'
            return
        now = self.show(in_force) if in_force is not None else ""
        coming = self.show(pending)
        text = f"in force: {escape(now)}{extra}" if now else f"from the first mini-batch: {escape(coming)}"
        if now and coming != now:
            text += f' <span class="vk-next">→ next: {escape(coming)}</span>'
        self.note.value = f'<div class="vk-note">{text}</div>'


def problem_with(settings: Settings, changes: dict[str, Any], check: Callable[[Settings], None]) -> str:
    """What is wrong with some changes, in the session's own words; empty if nothing is."""
    try:
        check(settings.replace(**changes))
    except SettingsError as error:
        return str(error)
    return ""


# the knobs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What the data allow."""

    extent: float  # Å, side of the box
    particles: int


def all_knobs(limits: Limits) -> list[Knob]:
    """The panel's knobs from top to bottom."""
    return [
        _regularisation(), _symmetry(), _prior("tilt_prior_width", "Tilt prior"), _prior("psi_prior_width", "Psi prior"),
        _mask(limits), _batch(limits),
    ]  # fmt: skip


def _regularisation() -> Knob:
    slider = widgets.FloatLogSlider(
        value=4.0, base=10, min=T_RANGE[0], max=T_RANGE[1], step=0.02, readout_format=".2f", continuous_update=False,
        layout=widgets.Layout(width="205px"),
    )  # fmt: skip
    slider.add_class("vk-T")
    hold = widgets.Checkbox(value=False, description="hold", indent=False, layout=widgets.Layout(width="70px"))
    hold.add_class("vk-hold-T")
    import math

    span = T_RANGE[1] - T_RANGE[0]
    left, right = ((math.log10(t) - T_RANGE[0]) / span for t in RECOMMENDED_T)
    # the strip lies under the slider's track: 6 px in, and as long as the track without the readout
    strip = widgets.HTML(
        f'<div title="RELION recommends {RECOMMENDED_T[0]:g} to {RECOMMENDED_T[1]:g}" style="position:relative;width:117px;'
        f'height:18px;margin-left:6px" class="vk-usual"><div style="position:absolute;left:{100 * left:.0f}%;'
        f'width:{100 * (right - left):.0f}%;height:4px;background:#009E73"></div><span style="position:absolute;top:2px;'
        f'left:{100 * left:.0f}%">{RECOMMENDED_T[0]:g}–{RECOMMENDED_T[1]:g} usual</span></div>'
    )

    def read() -> dict[str, Any]:
        return {"T": float(f"{slider.value:.4g}"), "T_scheme": "constant" if hold.value else "sigmoid"}

    def write(settings: Settings) -> None:
        slider.value, hold.value = settings.T, settings.T_scheme == "constant"

    def show(settings: Settings) -> str:
        return f"final T {settings.T:.3g}" + (", held" if settings.T_scheme == "constant" else ", annealed from 1")

    return Knob("Regularisation T", ("T", "T_scheme"), [slider, hold], read=read, write=write, show=show, below=strip)


def _symmetry() -> Knob:
    box = widgets.Combobox(options=COMMON_GROUPS, ensure_option=False, continuous_update=True,
                           layout=widgets.Layout(width="120px"))  # fmt: skip
    box.add_class("vk-symmetry")

    def write(settings: Settings) -> None:
        box.value = settings.symmetry

    return Knob("Symmetry", ("symmetry",), [box], read=lambda: {"symmetry": box.value}, write=write,
                show=lambda s: s.symmetry + (" (later)" if s.run_in_c1 else ""), typed=True)  # fmt: skip


def _prior(name: str, title: str) -> Knob:
    short = name.split("_")[0]
    use = widgets.Checkbox(value=False, description="use", indent=False, layout=widgets.Layout(width="60px"))
    width = widgets.FloatText(value=10.0, step=1.0, layout=widgets.Layout(width="80px"))
    unit = widgets.HTML("° wide (1 σ)")
    use.add_class(f"vk-{short}-use")
    width.add_class(f"vk-{short}-width")

    def read() -> dict[str, Any]:
        return {name: float(width.value) if use.value else None}

    def write(settings: Settings) -> None:
        value = getattr(settings, name)
        use.value = value is not None
        if value is not None:
            width.value = value

    def show(settings: Settings) -> str:
        value = getattr(settings, name)
        return "none" if value is None else f"{value:g}°"

    knob = Knob(title, (name,), [use, width], read=read, write=write, show=show, typed=True)
    row = knob.box.children[1]
    row.children = (*row.children, unit)
    return knob


def _mask(limits: Limits) -> Knob:
    field = widgets.FloatText(step=10.0, layout=widgets.Layout(width="90px"))
    field.add_class("vk-mask")
    unit = widgets.HTML(f"Å of {limits.extent:.0f}")

    def write(settings: Settings) -> None:
        field.value = settings.mask_diameter

    knob = Knob("Mask diameter", ("mask_diameter",), [field], read=lambda: {"mask_diameter": float(field.value)}, write=write,
                show=lambda s: f"{s.mask_diameter:g} Å", typed=True)  # fmt: skip
    knob.box.children[1].children = (field, unit)
    return knob


def _batch(limits: Limits) -> Knob:
    field = widgets.IntText(step=10, layout=widgets.Layout(width="90px"))
    field.add_class("vk-batch")
    unit = widgets.HTML(f"of {limits.particles}; 0: automatic")

    def read() -> dict[str, Any]:
        size = None if field.value == 0 else field.value
        return {"batch_initial": size, "batch_final": size}

    def write(settings: Settings) -> None:
        field.value = settings.batch_final or 0

    def show(settings: Settings) -> str:
        size = settings.batch_final
        return "automatic" if size is None else f"all {limits.particles}" if size >= limits.particles else f"{size} particles"

    knob = Knob("Particles per mini-batch", ("batch_initial", "batch_final"), [field], read=read, write=write, show=show,
                typed=True)  # fmt: skip
    knob.box.children[1].children = (field, unit)
    return knob
