"""The control panel: knobs and buttons on the left, pictures that follow the run on the right.

Callbacks never compute: the :class:`Controller`'s thread runs the session, the :class:`Painter`'s draws, and what they have
to say comes back through the kernel's event loop. So other cells stay usable while a mini-batch computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np

from vdamkit.errors import VdamkitError
from vdamkit.history import History
from vdamkit.notebook.controller import Controller
from vdamkit.notebook.history_tree import close_widget, tree_cells, tree_widget
from vdamkit.notebook.knobs import WAIT, Knob, Limits, all_knobs, problem_with
from vdamkit.notebook.loop import Loop, when_cell_runs_again
from vdamkit.notebook.marks import marks_of
from vdamkit.notebook.pages import Page, Truth, all_pages, compare_picture
from vdamkit.notebook.painter import Painter
from vdamkit.notebook.panel_layout import GHOST_WIDTH, Face
from vdamkit.progress import clock
from vdamkit.session import Session
from vdamkit.settings import check_mask
from vdamkit.storage import free_folder
from vdamkit.verdict import GHOST, upside_down_share

SURE = 0.3  # mean Pmax below which poses are too vague to say so
LOG_LINES = 200
FOLDER = "InitialModel/vdamkit"  # what Save first offers
WARN = "var(--jp-warn-color0, #a65f00)"
COLOURS = {
    "idle": "var(--jp-ui-font-color1, #333)", "running": "var(--jp-success-color1, #00694d)", "pausing": WARN, "paused": WARN,
}  # fmt: skip
GHOSTS = 3  # mini-batches in a row that show signs of an upside-down ghost, before it is spoken of in mid-run


class Panel:
    """The control panel of a session; see :meth:`vdamkit.Session.panel`.

    Attributes: `face` (the widgets), `controller`, `branches` (panels of sessions that were branched off here).
    """

    def __init__(self, session: Session, *, truth: Any = None, name: str = "this run", parent: Panel | None = None):
        self.session, self.name, self._given_truth = session, name, truth
        self.branches: list[Panel] = []
        self._loop = Loop()
        self.painter = Painter(self._loop, lambda text: self.say(f"This picture failed: {text}", bad=True))
        self.controller = Controller(session, self._loop, self._happened)
        self.knobs = all_knobs(Limits(session.particles.box * session.pixel_size, len(session.particles)))
        truth_map = Truth(truth, session.pixel_size, session.particles.box)
        self.pages = all_pages(session, truth_map, lambda: self._paint(at_once=True))
        self._late: dict[Knob, Callable[[], None]] = {}  # what was typed and does not count yet, and what cancels its timer
        self._typing = threading.RLock()  # of it and the knobs: a person's doings may come in a thread of their own
        self._ghosts = (0, 0)  # mini-batch that was looked at last, and how many in a row by then showed signs of a ghost
        self._offered = 0  # mini-batches to go, as last put into the field
        self._closed = False
        wanted = f"{parent.face.folder.value}_{name.replace(' ', '_')}" if parent else FOLDER
        self.face = Face(
            self.press, self._looked_at, self.knobs, self.pages,
            folder=str(session.output or free_folder(session, wanted)), title=name if parent else "",
        )  # fmt: skip
        for knob in self.knobs:
            knob.set(session.settings)
            knob.connect(self._knob_moved)
        session.followers.append(self._moved)
        self._unhook = when_cell_runs_again(self.close) if parent is None else lambda: None
        self._refresh_all()
        self.controller.prepare()

    # a person does something ------------------------------------------------------------------------------------------

    def press(self, name: str) -> None:
        """Carry out what a button stands for; an error becomes the panel's message."""
        c = self.controller
        act = {
            "step": c.step, "run": lambda: c.run(self.face.to_go.value), "pause": self._pause_or_go_on, "stop": c.stop,
            "undo": c.undo, "redo": c.redo, "branch": self.branch, "save": self.save, "seed": self.another_seed,
            "split": lambda: self._edit(lambda: self.session.split_class(self.face.which.value)),
            "drop": lambda: self._edit(lambda: self.session.drop_class(self.face.which.value)),
            "ghost": lambda: self._change(psi_prior_width=GHOST_WIDTH), "compare": self.compare,
        }[name]  # fmt: skip
        self.say("")
        with self._typing:
            for knob in list(self._late):
                self._commit(knob)
        self._guarded(act)
        self._refresh_status()

    def _guarded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except VdamkitError as error:
            self.say(str(error), bad=True)

    def _knob_moved(self, knob: Knob) -> None:
        """Check what is there now; hand it on at once, or when the keys have rested where it is typed."""
        with self._typing:
            self._late.pop(knob, lambda: None)()
            wrong = problem_with(self.session.settings, knob.read(), lambda s: check_mask(s, self.session.particles))
            knob.complain(wrong)
            self._refresh_knobs()
            if wrong:
                return
            if knob.typed and self._loop.running:
                self._late[knob] = self._loop.call_later(WAIT, lambda: self._commit(knob))
            else:
                self._commit(knob)

    def _commit(self, knob: Knob) -> None:
        with self._typing:
            self._late.pop(knob, lambda: None)()
            if not self._closed and not knob.error:
                self._change(**knob.read())

    def _change(self, **options: Any) -> None:
        before = self.session.settings
        changes = {name: value for name, value in options.items() if getattr(before, name) != value}
        if changes:
            self._guarded(lambda: self.controller.change(**changes))

    def _edit(self, act: Callable[[], Any]) -> None:
        self.controller.edit(act)
        self.say(self.session._history.node.note)

    def _pause_or_go_on(self) -> None:
        c = self.controller
        (c.unpause if c.status in ("paused", "pausing") else c.pause)()

    def save(self) -> None:
        """Write the current state to the folder named in the panel."""
        written = self.controller.save(self.face.folder.value)
        self.say(f"{len(written)} files of mini-batch {self.session.iteration} written to {self.face.folder.value}")

    def branch(self) -> Panel:
        """A panel on an independent session that goes on from here, below this one."""
        number = len(self.branches) + 1
        return self._open(self.session.branch(f"{number}"), f"branch {number}")

    def another_seed(self) -> Panel:
        """A panel on a session that begins anew with the next seed, below this one."""
        seed = self.session.settings.seed + 1 + len(self.branches)
        return self._open(self.session.restart(seed=seed), f"seed {seed}")

    def _open(self, session: Session, name: str) -> Panel:
        panel = Panel(session, truth=self._given_truth, name=name, parent=self)
        self.branches.append(panel)
        self.face.branches.children = (*self.face.branches.children, panel.face.widget)
        self._refresh_history()
        self.say(f"{name} has a panel of its own now, below this one")
        return panel

    def compare(self) -> None:
        """Draw the two chosen states side by side."""
        names = (self.face.first.value, self.face.second.value)
        chosen = [self._places()[name] for name in names]
        px, mask = self.session.pixel_size, self.session.settings.mask_diameter

        def draw() -> bytes:
            return compare_picture(*(history.nodes[number].state for history, number in chosen), px, names, mask)

        def deliver(data: bytes) -> None:
            self.face.comparison.layout.display = None
            self.face.comparison.value = data

        self.painter.ask("comparison", draw, deliver, at_once=True)

    def _places(self) -> dict[str, tuple[History, int]]:
        """Names of all states that can be compared, of this session and its branches."""
        out = {}
        for panel in (self, *self.branches):
            history = panel.session._history
            for cell in tree_cells(history.nodes, history.current):
                aside = "" if cell.on_line else f" (node {cell.node})"
                out[f"{panel.name}: mini-batch {history.nodes[cell.node].iteration}{aside}"] = (history, cell.node)
        return out

    # something happened -----------------------------------------------------------------------------------------------

    def _moved(self) -> None:
        """The session moved on (in any thread), by this panel's doing or by a cell's."""
        self._loop.call(self._refresh_all)

    def _happened(self, what: str) -> None:
        """Called by the controller, on the event loop."""
        if self._closed:
            return
        if what == "error":
            self.say(self.controller.error, bad=True)
        if what == "options":
            self._refresh_all()
        if what == "step":
            for mark in marks_of(self.session._history.line()[-2:-1]):  # such as of another symmetry taken up
                self.say(f"mini-batch {mark.iteration}: {mark.text}")
        if what in ("status", "error"):
            self._refresh_verdict()
            if self.controller.status != "running":
                self._looked_at()  # now there is time for what was put off
        self._refresh_status()

    def say(self, text: str, *, bad: bool = False) -> None:
        """Put a line above the knobs, in place of the last."""
        self.face.message.value = f'<div class="vk-note {"vk-error" if bad else ""}">{escape(text)}</div>'

    def _refresh_all(self) -> None:
        if self._closed:
            return
        with self._typing:
            for knob in self.knobs:
                if not knob.error and knob not in self._late:
                    knob.set(self.session.settings)
        self.face.classes(self.session.settings.classes)
        self._refresh_knobs()
        self._refresh_status()
        self._refresh_history()
        self._refresh_log()
        self._refresh_ghost()
        self._refresh_verdict()
        self._paint(at_once=self.controller.status == "idle")

    def _refresh_knobs(self) -> None:
        session = self.session
        in_force = session._history.node.in_force if session.report else None
        for knob in self.knobs:
            extra = f", now {session.report.T:.2f}" if knob.names[0] == "T" and session.report else ""
            knob.refresh(in_force, session.settings, extra)

    def _refresh_status(self) -> None:
        c, session, face = self.controller, self.session, self.face
        status, report = c.status, session.report
        left = max(1, session.settings.mini_batches - session.iteration)
        if status == "idle" and left != self._offered:  # a number that somebody has typed stays until another is due
            self._offered = face.to_go.value = left
        found = "" if report is None else f"{report.resolution:.1f} Å · Pmax {report.pmax:.2f} · {report.n_particles} particles"
        total, beyond = session.settings.mini_batches, session.iteration - session.settings.mini_batches
        scheduled = f"of {total}" if beyond <= 0 else f"({beyond} beyond the schedule)"
        face.status.value = (
            f'<b style="color:{COLOURS[status]}">{status}</b> · mini-batch <b>{session.iteration}</b> {scheduled}<br>{found}'
        )
        busy, total = status != "idle", c.done + c.left
        inside, whole = c.time_left()
        known = busy and not np.isnan(whole)
        face.inside.value = c.inside if busy else 0.0
        face.whole.value = (c.done + c.inside) / total if busy and total else 0.0
        face.inside_text.value = f"{c.stage}, {clock(inside)} left" if known else c.stage if busy else ""
        face.whole_text.value = f"{c.done} of {total}, {clock(whole)} left" if known else f"0 of {total}" if c.left else ""
        b = face.buttons
        b["step"].disabled = b["run"].disabled = status in ("running", "pausing") and c.left > 0
        b["pause"].disabled = b["stop"].disabled = not busy
        b["pause"].description, b["pause"].icon = ("Pause", "pause") if status in ("idle", "running") else ("Go on", "play")
        b["undo"].disabled = status == "running" or session.iteration == 0
        b["redo"].disabled = status == "running" or not session._history.can_redo

    def _looked_at(self) -> None:
        """A tab was chosen, or there is time to look at it."""
        self._refresh_history()
        self._refresh_log()
        self._paint(at_once=True)

    def _seen(self, tab: str) -> bool:
        """Whether a tab is worth making anew: in mid-run only the one that is looked at."""
        index = self.face.tabs.selected_index
        return self.controller.status != "running" or (index is not None and self.face.tabs.titles[index] == tab)

    def _refresh_history(self) -> None:
        history, face = self.session._history, self.face
        if not self._seen("History"):
            return
        old = face.tree.children
        face.tree.children = (tree_widget(tree_cells(history.nodes, history.current), self._node_clicked),)
        for tree in old:
            for widget in (*tree.children, tree):
                close_widget(widget)
        if history.nodes:
            self._offer_comparison()

    def _offer_comparison(self) -> None:
        """By default this state with the latest branch's, or with the one before it."""
        places = self._places()
        name_of = {(id(history), number): name for name, (history, number) in places.items()}
        mine = self.session._history
        other = self.branches[-1].session._history if self.branches else mine
        there = mine.node.parent if other is mine else other.current
        first = name_of[id(mine), mine.current]
        self.face.offer(list(places), name_of.get((id(other), there), first), first)

    def _node_clicked(self, number: int) -> None:
        self._guarded(lambda: self.controller.go_to(number))

    def _refresh_log(self) -> None:
        if not self._seen("Log"):
            return
        lines: list[str] = []
        for node in self.session._history.line():
            if node.report:
                lines += [*(f"  {text}" for text in node.report.bad), str(node.report)]
            lines += [f"  {node.note}"] if node.note else []
        text = escape("\n".join(lines[: -LOG_LINES - 1 : -1]))
        self.face.log.value = f'<pre style="font-size:11px;line-height:1.4;white-space:pre-wrap">{text}</pre>'

    def _refresh_ghost(self) -> None:
        share, iteration = self._ghost_share(), self.session.iteration
        if self._ghosts[0] != iteration:
            self._ghosts = iteration, self._ghosts[1] + 1 if share > GHOST else 0
        seen = share > GHOST and (self._ghosts[1] >= GHOSTS or self.controller.status == "idle")
        self.face.ghost.layout.display = None if seen else "none"
        if seen:
            self.face.ghost_text.value = (
                f'<div class="vk-note vk-error">{100 * share:.0f} % of the particles point against the others: with a tilt '
                "prior alone the sign of the normal is open, and an upside-down ghost may be in the map.</div>"
            )

    def _ghost_share(self) -> float:
        """Share of particles that point against the rest, where a tilt prior is used without a psi prior; else 0."""
        settings, particles = self.session.settings, self.session.particles
        report = self.session.report
        if settings.tilt_prior_width is None or settings.psi_prior_width is not None or report is None or report.pmax < SURE:
            return 0.0
        poses = self.session.state.poses
        seen = poses.class_number > 0
        if not seen.any() or np.isnan(particles.angle_priors[seen, 2]).all():
            return 0.0
        return upside_down_share(poses.angles[seen], particles.angle_priors[seen])

    def _refresh_verdict(self) -> None:
        session, text = self.session, ""
        if self.controller.status == "idle" and session.report and session.iteration >= session.settings.mini_batches:
            words = escape(str(session.verdict())).replace("\n", "<br>")
            text = f'<div class="vk-note" style="border-top:1px solid #bbb;padding-top:4px">{words}</div>'
        self.face.verdict.value = text

    # pictures -----------------------------------------------------------------------------------------------------------

    def _paint(self, *, at_once: bool = False) -> None:
        """Have the picture drawn that is looked at; the others are drawn when they are."""
        index = self.face.tabs.selected_index
        if self._closed or index is None or index >= len(self.pages) or not self.session._history:
            return
        page = self.pages[index]

        def deliver(data: bytes, page: Page = page) -> None:
            if not self._closed:
                page.show(data)

        self.painter.ask(page.name, page.draw(), deliver, at_once=at_once)

    async def run(self, n: int | None = None) -> None:
        """Run `n` mini-batches (by default to the end of the schedule) and wait for them, while panel and kernel stay alive.

        ``await panel.run(20)`` in a cell. Ends early where a person stops the run. An error stays in the panel.
        """
        left = max(0, self.session.settings.mini_batches - self.session.iteration)
        await self._until_idle()
        self.controller.run(left if n is None else n)
        await self._until_idle()

    async def _until_idle(self) -> None:
        import asyncio

        while self.controller.status != "idle":
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Stop what runs and take everything away: threads, callbacks, timers, widgets."""
        if self._closed:
            return
        for panel in self.branches:
            panel.close()
        self._closed = True
        self._unhook()
        self.controller.close()
        if self._moved in self.session.followers:
            self.session.followers.remove(self._moved)
        self.painter.close()
        self._loop.close()
        self.face.widget.close()
        if self.session._panel is self:
            self.session._panel = None

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.face.widget)
