"""Stopping and holding a computation from another thread, between its chunks; and one at a time of those that need it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vdamkit.errors import SettingsError
from vdamkit.vdam.visit import Cancelled


def alone(method: Callable) -> Callable:
    """Decorator of what makes a session's next state or moves in its history: refused while another thread does so.

    A panel computes in a thread of its own, and what a cell does meanwhile must not slip in between a state and its successor.
    """

    @wraps(method)
    def guarded(session: Any, *args: Any, **options: Any) -> Any:
        with session._control.alone():
            return method(session, *args, **options)

    return guarded


class Control:
    """The brake of one session. The thread that computes calls :meth:`check`; any other may pause or cancel it."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()
        self._cancelled = False
        self._thread: int | None = None
        self.waiting = False
        self._depth = 0  # of calls, one inside the other, of who is at work
        self._at_work = threading.RLock()  # again and again by one thread: followers may move on when a mini-batch has landed

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around what only one thread may do at a time. Raises SettingsError where another is at it."""
        if not self._at_work.acquire(blocking=False):
            raise SettingsError(
                "this session is at work in another thread (a mini-batch, or another change of its state); wait for it, or "
                "cancel() the mini-batch"
            )
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._cancelled = False
            self._at_work.release()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a mini-batch, within :meth:`alone`; forgets a pause when it ends."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
            self._go.set()

    def pause(self) -> None:
        if self._thread is not None and not self._cancelled:
            self._go.clear()

    def unpause(self) -> None:
        self._go.set()

    def cancel(self) -> None:
        """Stop who is at work, also before its first mini-batch or between two; without one nothing happens."""
        self._cancelled = self._depth > 0
        self._go.set()

    def check(self, on_wait: Callable[[], None]) -> None:
        """Raise :class:`Cancelled` if asked to; wait if asked to, but only in the thread that runs the mini-batch.

        `on_wait` is called when it begins to wait. Worker threads are shared by all sessions, so one that waited would hold
        up the others.
        """
        if threading.get_ident() == self._thread and not self._go.is_set():
            self.waiting = True
            try:
                on_wait()
                self._go.wait()
            finally:
                self.waiting = False
        if self._cancelled:
            raise Cancelled("the mini-batch was stopped; the state before it is kept")
