"""What the panel is made of: widgets and where they stand. What they do is in :mod:`vdamkit.notebook.panel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets

from vdamkit.notebook.knobs import STYLE, Knob
from vdamkit.notebook.pages import Page, picture

GHOST_WIDTH = 10.0  # degrees, of the psi prior that is offered against an upside-down ghost

BUTTONS = {
    "step": ("Step", "step-forward", "Run one mini-batch", "primary"),
    "run": ("Run", "play", "Run the mini-batches to go", "primary"),
    "pause": ("Pause", "pause", "Wait after the running chunk of particles; what it has computed is kept", ""),
    "stop": ("Stop", "stop", "Discard the running mini-batch; the state before it stays", ""),
    "undo": ("Undo", "undo", "Back by one mini-batch, with the options of then", ""),
    "redo": ("Redo", "repeat", "Take an undo back", ""),
    "branch": ("Branch", "code-fork", "A second panel that goes on from here and leaves this one as it is", ""),
    "save": ("Save", "save", "Write RELION's files and a checkpoint to the folder below", ""),
    "seed": ("Another seed", "random", "A second panel that begins anew with another seed", ""),
    "ghost": (f"Use a psi prior of {GHOST_WIDTH:g}°", "", "It keeps the sign of the picked normal", "warning"),
    "split": ("Split", "code-fork", "Let this class go on as two, which differ as its pseudo-halves do", ""),
    "drop": ("Drop", "trash", "Take this class away; its particles count as never visited", ""),
    "compare": ("Compare", "columns", "Both maps, their difference and their FSC", ""),
}
"""Text, icon, tooltip and style by name; the name is also what :class:`Face` calls when it is pressed."""


class Face:
    """The panel's widgets.

    Parameters
    ----------
    press: called with a button's name. looked_at: called when a tab is chosen.
    knobs, pages: made elsewhere. folder: what Save first offers. title: above the panel, or empty.
    """

    def __init__(
        self, press: Callable[[str], None], looked_at: Callable[[], None], knobs: Sequence[Knob], pages: Sequence[Page], *,
        folder: str, title: str,
    ):  # fmt: skip
        self.buttons = {name: self._button(name, press) for name in BUTTONS}
        self.to_go = widgets.BoundedIntText(value=1, min=1, max=10**6, layout=widgets.Layout(width="80px"))
        self.to_go.tooltip = "Mini-batches that Run goes on for; T and step size follow their own schedule (RELION --iter)"
        self.folder = widgets.Text(value=folder, layout=widgets.Layout(width="230px"))
        self.folder.tooltip = "Folder that Save writes to"
        self.status, self.message, self.verdict, self.log = (widgets.HTML() for _ in range(4))
        bar = {"min": 0.0, "max": 1.0, "layout": widgets.Layout(width="120px", min_width="120px", height="16px")}
        self.inside, self.whole = widgets.FloatProgress(**bar), widgets.FloatProgress(**bar, bar_style="success")
        self.inside_text, self.whole_text, self.ghost_text = (widgets.HTML() for _ in range(3))
        self.ghost = widgets.VBox([self.ghost_text, self.buttons["ghost"]], layout=widgets.Layout(display="none"))
        self.which = widgets.Dropdown(options=[("class 1", 1)], value=1, layout=widgets.Layout(width="87px"))
        self.which.tooltip = "session.merge_classes(k, into) merges two (RELION keeps the number of classes, --K)"
        self._history_tab()
        self.tabs = widgets.Tab([*(page.box for page in pages), self.history, self.log])
        self.tabs.titles = (*(page.name for page in pages), "History", "Log")
        self.tabs.observe(lambda _: looked_at(), "selected_index")
        right = widgets.VBox([self.tabs], layout=widgets.Layout(flex="1 1 500px", min_width="0"))
        self.branches = widgets.VBox([])
        heading = [widgets.HTML(f"<b>{escape(title)}</b>")] if title else []
        both = widgets.HBox([self._left(knobs), right], layout=widgets.Layout(flex_flow="row wrap"))  # where there is no room
        self.widget = widgets.VBox([*heading, both, self.branches])
        named = "to_go folder which status message verdict log inside whole ghost tabs widget"
        for name in named.split():
            getattr(self, name).add_class(f"vk-{name.replace('_', '-')}")
        for line in (self.status, self.inside_text, self.whole_text):
            line.add_class("vk-line")

    def _button(self, name: str, press: Callable[[str], None]) -> Any:
        text, icon, hint, style = BUTTONS[name]
        width = {"seed": "125px", "compare": "100px", "ghost": "180px"}.get(name, "80px")
        made = widgets.Button(description=text, icon=icon, tooltip=hint, button_style=style, layout=widgets.Layout(width=width))
        made.add_class(f"vk-{name}")
        made.on_click(lambda _: press(name))
        return made

    def _left(self, knobs: Sequence[Knob]) -> Any:
        b, label = self.buttons, {"layout": widgets.Layout(width="75px", min_width="75px")}
        line = {"layout": widgets.Layout(align_items="center")}
        return widgets.VBox(
            [
                widgets.HTML(STYLE), self.status,
                widgets.HBox([widgets.HTML("mini-batch", **label), self.inside, self.inside_text], **line),
                widgets.HBox([widgets.HTML("run", **label), self.whole, self.whole_text], **line),
                widgets.HBox([b["step"], b["run"], b["pause"], b["stop"]]),
                widgets.HBox([b["undo"], b["redo"], b["branch"], b["save"]]),
                widgets.HBox([widgets.HTML("to go", **label), self.to_go, b["seed"]]),
                widgets.HBox([widgets.HTML("folder", **label), self.folder]),
                widgets.HBox([widgets.HTML("classes", **label), self.which, b["split"], b["drop"]]),
                self.message, *(knob.box for knob in knobs), self.ghost, self.verdict,
            ],
            layout=widgets.Layout(width="350px", min_width="350px", padding="0 8px 0 0"),
        )  # fmt: skip

    def _history_tab(self) -> None:
        self.tree = widgets.VBox([])
        self.first, self.second = (widgets.Dropdown(layout=widgets.Layout(width="270px")) for _ in range(2))
        self._chosen = False  # whether a person chose what to compare
        self._offering = False
        for widget in (self.first, self.second):
            widget.observe(lambda _: setattr(self, "_chosen", self._chosen or not self._offering), "value")
        self.first.add_class("vk-compare-first")
        self.second.add_class("vk-compare-second")
        self.comparison = picture("comparison")
        self.comparison.layout.display = "none"
        hint = widgets.HTML('<div class="vk-note">Click a mini-batch to go back to it; • marks a change of options.</div>')
        choice = widgets.HBox([self.first, self.second, self.buttons["compare"]])
        self.history = widgets.VBox([hint, self.tree, choice, self.comparison])
        self.history.add_class("vk-history")

    def classes(self, count: int) -> None:
        """Offer as many classes as there are."""
        if len(self.which.options) != count:
            kept = min(self.which.value, count)
            self.which.options = [(f"class {k}", k) for k in range(1, count + 1)]
            self.which.value = kept
        self.buttons["drop"].disabled = count == 1

    def offer(self, names: list[str], first: str, second: str) -> None:
        """States that can be compared, and two to begin with; what a person chose stays chosen."""
        self._offering = True
        for widget, default in ((self.first, first), (self.second, second)):
            kept = widget.value
            widget.options = names
            widget.value = kept if self._chosen and kept in names else default
        self._offering = False
