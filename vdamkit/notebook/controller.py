"""Who runs the session: one thread while there is something to do, asked by a panel and never waited for.

No widget is known here. The panel sends intentions (step, run, pause, change, undo, …) and is told on the kernel's event loop
when something happened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdamkit.errors import VdamkitError
from vdamkit.notebook.loop import Loop
from vdamkit.session import Session
from vdamkit.vdam.visit import Cancelled

LAPS = 5  # mini-batches from which the time left is reckoned
TICK = 0.15  # seconds between two reports of progress


class Controller:
    """Runs a session in the background.

    Parameters
    ----------
    session: owned by the thread while it runs. loop: where `notify` is called.
    notify: called with "status" (idle, running, pausing, paused), "progress", "step", "options" or "error".
    """

    def __init__(self, session: Session, loop: Loop, notify: Callable[[str], None]):
        self.session, self._loop, self._notify = session, loop, notify
        self.error = ""  # the last error's text; empty when all is well
        self.left = 0  # mini-batches to go
        self.done = 0  # of this run
        self.inside = 0.0  # part of the running mini-batch that is done
        self.stage = ""
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # whether the thread goes on, and how long it has to
        self._stop = False
        self._pausing = False
        self._lap = 0.0
        self._laps: list[float] = []
        self._told = 0.0
        self._go = threading.Event()  # between two mini-batches; within one the session itself waits
        self._held = False
        session.listeners.append(self._tick)

    # state ------------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """ "idle", "running", "pausing" or "paused"."""
        if self._thread is None:
            return "idle"
        if self.session.paused or self._held:
            return "paused"
        return "pausing" if self._pausing else "running"

    def time_left(self) -> tuple[float, float]:
        """Seconds left of the running mini-batch and of the run; nan while unknown."""
        if not self._laps:
            return float("nan"), float("nan")
        lap = sum(self._laps) / len(self._laps)
        inside = max(0.0, lap * (1 - self.inside))
        return inside, inside + lap * max(0, self.left - 1)

    # intentions ---------------------------------------------------------------------------------------------------------

    def run(self, n: int) -> None:
        """Run `n` mini-batches; while paused or running, go on with that many to go."""
        if n < 1:
            return
        self.error = ""
        with self._lock:
            self.left = n
            goes_on = self._thread is not None
        if goes_on:
            self.unpause()
        else:
            self._begin()

    def _begin(self) -> None:
        self.done, self._stop, self._pausing, self._laps, self.stage = 0, False, False, [], "start"
        self._go.set()
        self._thread = threading.Thread(target=self._work, name="vdamkit session", daemon=True)
        self._tell("status")
        self._thread.start()

    def prepare(self) -> None:
        """Compute the start (reading particles takes seconds) if there is none yet."""
        if not self.session._history and self._thread is None:
            self._begin()

    def step(self) -> None:
        """One mini-batch; when paused, what is left of the running one."""
        self.run(1)

    def pause(self) -> None:
        """Wait after the running chunk of particles; what it has computed is kept."""
        if self._thread is not None:
            self._pausing = True
            self._go.clear()
            self.session.pause()
            self._tell("status")

    def unpause(self) -> None:
        self._pausing = False
        self._go.set()
        self.session.unpause()
        self._tell("status")

    def stop(self, wait: float = 20.0) -> None:
        """Discard the running mini-batch and end the run; the state before it stays."""
        thread = self._thread
        if thread is None:
            return
        self._stop = True
        self._go.set()
        self.session.cancel()
        if thread is not threading.current_thread():
            thread.join(wait)
        self._tell("status")

    def change(self, **options: Any) -> None:
        """Use other options from the next mini-batch on.

        Raises
        ------
        SettingsError
            where one is wrong; then nothing changes.
        """
        self.session.change(**options)
        self._tell("options")

    def undo(self) -> None:
        self._move(self.session.undo)

    def redo(self) -> None:
        self._move(self.session.redo)

    def go_to(self, node: int) -> None:
        self._move(lambda: self.session.go_to(node))

    def edit(self, act: Callable[[], Any]) -> None:
        """Change the state in another way than by a mini-batch, such as to split a class."""
        self._move(act)

    def _move(self, move: Callable[[], Any]) -> None:
        """Go elsewhere in the history; a running mini-batch is discarded first."""
        self.stop()
        self.error = ""
        move()
        self._tell("options")

    def save(self, folder: str | Path) -> list[Path]:
        """Write RELION's files of the current state; a running mini-batch does not disturb it."""
        return self.session.save(folder)

    def close(self) -> None:
        """Stop, and let go of the session."""
        self.stop()
        if self._tick in self.session.listeners:
            self.session.listeners.remove(self._tick)

    # the thread ---------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            if not self.session._history:
                self.session.state  # noqa: B018 - computes the start
                self._tell("options")
            while self._more():
                self._lap, self.inside = time.monotonic(), 0.0
                self.session.step()
                self._laps = [*self._laps, time.monotonic() - self._lap][-LAPS:]
                self.left -= 1
                self.done += 1
                self._tell("step")
                if self.left > 0 and not self._go.is_set():
                    self._held = True
                    self._tell("status")
                    self._go.wait()
                    self._held = False
        except Cancelled:
            pass
        except VdamkitError as problem:
            self.error = str(problem)
        except MemoryError:
            self.error = "Out of memory; the last state is kept. A smaller chunk_particles, memory_budget or box needs less."
        except Exception as problem:  # a bug of ours must not die in a thread unseen
            self.error = f"{type(problem).__name__}: {problem} (the last state is kept)"
        finally:
            with self._lock:
                if self._thread is threading.current_thread():
                    self._end()
            self._tell("error" if self.error else "status")

    def _more(self) -> bool:
        """Whether this thread goes on; if not, the next :meth:`run` begins another, however soon it comes."""
        with self._lock:
            more = self.left > 0 and not self._stop
            if not more:
                self._end()
            return more

    def _end(self) -> None:
        self.left, self.inside, self._pausing, self._thread = 0, 0.0, False, None

    def _tick(self, stage: str, fraction: float) -> None:
        if stage == "paused":
            self._tell("status")
            return
        self.stage = stage
        self.inside = max(self.inside, fraction) if fraction < 1 else 0.0
        now = time.monotonic()
        if now - self._told > TICK:
            self._told = now
            self._tell("progress")

    def _tell(self, what: str) -> None:
        self._loop.call(lambda: self._notify(what))
