"""Every state a session has been in: a tree whose older states wait on disc, so that nothing computed is lost."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vdamkit.errors import InputError, OutputError, SettingsError
from vdamkit.io.checkpoint import load_checkpoint, save_checkpoint
from vdamkit.settings import Settings
from vdamkit.state import State, StepReport

KEPT_STATES = 20  # states of a session that stay in memory; older ones go to a temporary folder


class Shelf:
    """A temporary folder for old states, made at first use; it goes with the last history that refers to it."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._count = 0
        self._lock = threading.Lock()  # a session and its branches share the shelf, and may compute side by side

    def put(self, state: State, settings: Settings) -> Path | None:
        """Write a state; None where there is no room for it."""
        try:
            with self._lock:
                if self._folder is None:
                    self._folder = Path(tempfile.mkdtemp(prefix="vdamkit_history_"))
                    weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
                self._count += 1
                path = self._folder / f"{self._count}.npz"
            save_checkpoint(path, state, settings, [], {}, durable=False)
        except (OutputError, OSError):
            return None
        return path


@dataclass(frozen=True)
class Node:
    """One point of the history: a state, the settings there, which the next mini-batch will use, and how it came about."""

    number: int
    parent: int | None
    iteration: int
    settings: Settings
    report: StepReport | None
    note: str = ""
    when: str = ""
    held: State | None = field(default=None, repr=False)  # None where the state waits on disc
    path: Path | None = None
    has: Settings | None = None  # where the state is not of these settings: those that it was made with

    @property
    def in_force(self) -> Settings:
        """The settings that the state was made with; what differs from them is still to be taken up."""
        return self.has or self.settings

    @property
    def state(self) -> State:
        """The state, read back from disc where it was put away. Raises InputError where it is not there any more."""
        if self.held is None and self.path is None:
            raise InputError(f"mini-batch {self.iteration} was not kept")
        return self.held if self.held is not None else load_checkpoint(self.path)[0]

    def row(self) -> dict[str, Any]:
        """The node as a line of the history table."""
        out: dict[str, Any] = {"node": self.number, "parent": self.parent, "note": self.note, "when": self.when}
        if self.report is not None:
            skip = {"timings", "bad", "class_populations"}
            out |= {k: v for k, v in vars(self.report).items() if k not in skip}
        return out


class History:
    """A tree of nodes and the place in it; a session owns one, a branch gets a copy that shares the past."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.current = -1
        self._undone: list[int] = []
        self._shelf: Shelf | None = Shelf()
        self._lock = threading.RLock()  # a panel makes remarks while a thread appends

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def node(self) -> Node:
        """Where we are."""
        return self.nodes[self.current]

    def copy(self) -> History:
        """The same past; what either adds or undoes from now on is its own."""
        other = object.__new__(History)
        with self._lock:
            other.__dict__ |= self.__dict__ | {"nodes": list(self.nodes), "_undone": [], "_lock": threading.RLock()}
        return other

    def append(
        self, state: State, settings: Settings, report: StepReport | None, note: str = "", *, has: Settings | None = None
    ) -> None:  # fmt: skip
        """A child of the current node, which becomes the current one; `has`: see :class:`Node`."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            parent = self.current if self.nodes else None
            self.nodes.append(Node(len(self.nodes), parent, state.iteration, settings, report, note, when, held=state, has=has))
            self.current = len(self.nodes) - 1
            self._undone.clear()
            self._put_away()

    def remark(self, text: str) -> None:
        """Add to the note of the current node."""
        with self._lock:
            self.nodes[self.current] = replace(self.node, note=f"{self.node.note}; {text}".strip("; "))

    def undo(self, n: int = 1) -> bool:
        """Step to the parent, `n` times or to the start. Whether that is elsewhere."""
        way = self.line()[::-1][: n + 1]
        moved = self._move(way[-1].number)
        self._undone += [node.number for node in way[:-1]]
        return moved

    def redo(self, n: int = 1) -> bool:
        """Take back `n` undos, or all that there were. Whether that leads elsewhere."""
        back = self._undone[::-1][:n]
        moved = self._move(back[-1] if back else self.current)
        del self._undone[len(self._undone) - len(back) :]
        return moved

    def go_to(self, number: int) -> bool:
        """Make any node the current one; its number may be a float of the history table. Whether it is another.

        Raises
        ------
        SettingsError
            where there is no such node.
        """
        if number not in range(len(self.nodes)):
            raise SettingsError(f"there is no node {number}; the history has 0 to {len(self.nodes) - 1}")
        moved = self._move(int(number))
        self._undone.clear()
        return moved

    def _move(self, number: int) -> bool:
        """Make a node the current one, its state in memory: whoever looks at it reads it many times.

        Raises InputError, and stays, where the state was put away and its file is gone.
        """
        if number == self.current:
            return False
        node = self.nodes[number]
        try:
            state = node.state
        except InputError as problem:
            raise InputError(
                f"mini-batch {node.iteration} was put away to disc and cannot be read back ({problem}); the current state stays"
            ) from None
        with self._lock:
            self.current = number
            self.nodes[number] = replace(self.nodes[number], held=state)
            self._put_away()
        return True

    @property
    def can_redo(self) -> bool:
        return bool(self._undone)

    def line(self, number: int | None = None) -> list[Node]:
        """Nodes from the start to node `number`, by default the current one."""
        out: list[Node] = []
        at = self.current if number is None else number
        while at is not None and at >= 0:
            out.append(self.nodes[at])
            at = self.nodes[at].parent
        return out[::-1]

    def forget_old_states(self) -> None:
        """From now on let the oldest states go, where there are too many: nobody goes back in a command's run."""
        self._shelf = None

    def _put_away(self) -> None:
        """Move the oldest held state to disc where there are too many; where disc has no room it stays."""
        held = [node for node in self.nodes if node.held is not None and node.number != self.current]
        for node in held[: max(0, len(held) + 1 - KEPT_STATES)]:
            path = node.path
            if path is None and self._shelf is not None:
                path = self._shelf.put(node.held, node.settings)
                if path is None:
                    continue
            self.nodes[node.number] = replace(node, held=None, path=path)
