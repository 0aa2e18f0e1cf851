"""A progress bar for a session: mini-batches, what they found, and how far the running one is."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import IO

from vdamkit.state import StepReport

EVERY, PATIENCE = 10, 30.0  # mini-batches, and seconds, per line where the output is not a terminal
LAPS = 5  # mini-batches from which the time left is reckoned


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class watch:
    """Watch the next `n` mini-batches of a session: ``with watch(session, n) as bar: bar.landed(session.step())``.

    On a terminal a bar that also moves within a mini-batch; elsewhere a line after ten mini-batches or half a minute. Notes
    are told at once.

    Parameters
    ----------
    session: whatever has `listeners` and `iteration`. n: mini-batches to come.
    file: where to write, default stderr. live: force a bar (True) or lines (False); None looks at `file`.
    """

    def __init__(self, session, n: int, *, file: IO[str] | None = None, live: bool | None = None):
        self.session, self.n = session, n
        self.file = file or sys.stderr
        self.live = self.file.isatty() if live is None else live
        self._lock = threading.Lock()  # ticks come from worker threads
        self._done, self._inside = 0, 0.0
        self._laps: list[float] = []
        self._text = "start"
        self._bar = None

    def __enter__(self) -> watch:
        self._began = self._lap = self._said = time.perf_counter()
        if self.live:
            from tqdm import tqdm

            self._bar = tqdm(
                total=float(self.n), file=self.file, leave=True, mininterval=0.1,
                ncols=min(110, shutil.get_terminal_size((100, 24)).columns) - 1,
                bar_format="{desc} |{bar}| start", desc="mini-batch 0",
            )  # fmt: skip
            self._draw()
        self.session.listeners.append(self._tick)
        return self

    def __exit__(self, *problem: object) -> None:
        self.session.listeners.remove(self._tick)
        if self._bar is not None:
            self._bar.close()

    def landed(self, report: StepReport) -> None:
        """A mini-batch is done: show what it found."""
        now = time.perf_counter()
        with self._lock:
            self._done, self._inside = self._done + 1, 0.0
            self._laps = [*self._laps, now - self._lap][-LAPS:]
            self._lap = now
            self._text = f"{report.resolution:.1f} Å, Pmax {report.pmax:.2f}, T {report.T:.1f}"
            for note in report.notes if self._bar is not None else ():
                self._bar.write(f"note: mini-batch {report.iteration}: {note}", file=self.file)
            self._draw()
        wanted = self._done % EVERY == 0 or self._done == self.n or report.notes or now - self._said > PATIENCE
        if not self.live and wanted:
            self._said = now
            left = f", {clock(self.time_left())} left" if self._done < self.n else ""
            print(f"{report}; {clock(now - self._began)} gone{left}", file=self.file, flush=True)

    def time_left(self) -> float:
        """Seconds to go, from the latest mini-batches; nan before the first has landed."""
        if not self._laps:
            return float("nan")
        lap = sum(self._laps) / len(self._laps)
        return max(0.0, (self.n - self._done) * lap - (time.perf_counter() - self._lap))

    def _tick(self, stage: str, fraction: float) -> None:
        """A listener of the session: `fraction` of the running mini-batch is done."""
        with self._lock:
            self._inside = min(max(self._inside, fraction), 1.0) if fraction < 1 else self._inside
            if self._bar is not None and time.perf_counter() - self._bar.last_print_t > 0.1:
                self._draw()

    def _draw(self) -> None:
        if self._bar is None:
            return
        last = self.session.iteration if self._done else 0
        total = last + self.n - self._done if self._done else self.n
        self._bar.n = min(self.n, self._done + self._inside)
        self._bar.set_description_str(f"mini-batch {last}/{total}", refresh=False)
        left = f", {clock(self.time_left())} left" if self._laps else ""
        self._bar.bar_format = f"{{desc}} |{{bar}}| {self._text}{left}"
        self._bar.refresh()
