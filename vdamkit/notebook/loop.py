"""Reaching the kernel's event loop from worker threads, and keeping Qt alive on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

PUMP = 0.03  # seconds between two looks at Qt's events


class Loop:
    """The event loop of the thread that made it (a notebook kernel's), if there is one.

    Without one (a plain script) calls are carried out at once in the calling thread and timers are dropped.
    """

    def __init__(self) -> None:
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._pump: asyncio.Task | None = None
        self._timers: set[object] = set()  # those that are still to go off
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether there is a loop to come back to."""
        return self._loop is not None

    def call(self, function: Callable[[], Any]) -> None:
        """Run `function` on the loop as soon as it is free; may be called from any thread."""
        if self._closed:
            return
        if self._loop is None:
            function()
            return
        try:
            self._loop.call_soon_threadsafe(self._guarded, function)
        except RuntimeError:  # the kernel is shutting down
            self._closed = True

    def call_later(self, seconds: float, function: Callable[[], Any]) -> Callable[[], None]:
        """Run `function` on the loop after a while; returns what cancels it. Both may be called from any thread.

        JupyterLab has a widget's messages handled in a thread beside the kernel's own, and a loop that sleeps would not notice
        a timer that another thread gave it.
        """
        loop, timer = self._loop, object()
        if loop is None or self._closed:
            return lambda: None

        def run() -> None:
            if timer in self._timers:
                self._timers.discard(timer)
                self._guarded(function)

        self._timers.add(timer)
        self.call(lambda: loop.call_later(seconds, run))
        return lambda: self._timers.discard(timer)

    def _guarded(self, function: Callable[[], Any]) -> None:
        if not self._closed:
            function()

    def pump_qt(self) -> None:
        """Make a Qt application if there is none, and give it a turn every PUMP seconds.

        IPython's own Qt integration hangs on current kernels (`%gui qt`), so the loop that runs anyway carries Qt along.
        """
        from qtpy.QtWidgets import QApplication

        app = QApplication.instance() or QApplication(["vdamkit"])
        if self._loop is None:
            return

        async def pump() -> None:
            while True:
                app.processEvents()
                await asyncio.sleep(PUMP)

        self._pump = self._loop.create_task(pump())

    def close(self) -> None:
        """Cancel the timers and the pump."""
        self._closed = True
        self._timers.clear()
        if self._pump is not None:
            self._pump.cancel()


def when_cell_runs_again(act: Callable[[], Any]) -> Callable[[], None]:
    """Call `act` when the notebook cell that is running now is executed anew. Returns what undoes this.

    Outside a notebook nothing happens.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return lambda: None
    shell = get_ipython()
    if shell is None or not hasattr(shell, "get_parent"):
        return lambda: None
    cell = (shell.get_parent().get("metadata") or {}).get("cellId")
    if cell is None:
        return lambda: None

    def before(info: Any) -> None:
        if getattr(info, "cell_id", None) == cell:
            act()

    shell.events.register("pre_run_cell", before)

    def undo() -> None:
        if before in shell.events.callbacks["pre_run_cell"]:
            shell.events.unregister("pre_run_cell", before)

    return undo
