"""Drawing in the background: the newest wish of each picture only, and no more than a small share of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vdamkit.notebook.loop import Loop

SHARE = 0.07  # of the time that redrawing may take while a run goes on
LONGEST = 15.0  # seconds without a new picture, at most


class Painter:
    """Draws pictures one after the other in a thread that exists only while there is something to draw.

    A wish for a picture that still waits replaces the older one, so nothing ever queues up. Which picture failed, and how, is
    told to `complain` on the event loop.
    """

    def __init__(self, loop: Loop, complain: Callable[[str], None] = lambda text: None):
        self._loop, self._complain = loop, complain
        self._wishes: dict[str, tuple[Callable[[], bytes], Callable[[bytes], None], bool]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._rest_until = 0.0
        self._wake = threading.Event()
        self._closed = False
        self.errors: list[str] = []

    def ask(self, key: str, draw: Callable[[], bytes], deliver: Callable[[bytes], None], *, at_once: bool = False) -> None:
        """Have a picture drawn and handed to `deliver` on the event loop.

        at_once: a person waits for it; else it may wait until drawing has had no more than its share of the time.
        """
        with self._lock:
            if self._closed:
                return
            waits = self._wishes.pop(key, None)
            self._wishes[key] = (draw, deliver, at_once or (waits is not None and waits[2]))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="vdamkit painter", daemon=True)
                self._thread.start()
            elif at_once:
                self._wake.set()

    def _next(self) -> tuple[str, Callable, Callable, bool] | None:
        """The next wish, once it may be carried out; None where there is none any more: the thread then ends.

        Looking and taking are one turn of the lock, as `close` may empty the wishes at any other moment.
        """
        while True:
            with self._lock:
                if self._closed or not self._wishes:
                    self._thread = None
                    return None
                urgent = [key for key, wish in self._wishes.items() if wish[2]]
                rest = self._rest_until - time.monotonic()
                if urgent or rest <= 0:
                    key = (urgent or list(self._wishes))[0]
                    return (key, *self._wishes.pop(key))
            self._wake.wait(max(0.01, rest))
            self._wake.clear()

    def _work(self) -> None:
        while (wish := self._next()) is not None:
            key, draw, deliver, urgent = wish
            began = time.monotonic()
            try:
                picture = draw()
            except Exception as problem:  # a picture that fails must not take the others along
                self.errors.append(f"{key}: {type(problem).__name__}: {problem}")
                self._loop.call(lambda text=self.errors[-1]: self._complain(text))
                continue
            finally:
                if not urgent:  # what a person asked for does not count
                    rest = (time.monotonic() - began) * (1 / SHARE - 1)
                    self._rest_until = time.monotonic() + min(rest, LONGEST)
            self._loop.call(lambda deliver=deliver, picture=picture: deliver(picture))

    @property
    def busy(self) -> bool:
        """Whether something is being drawn or waits to be."""
        return self._thread is not None

    def wait(self, seconds: float = 20.0) -> bool:
        """Until nothing is being drawn any more; for tests and scripts."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._lock:
                if self._thread is None:
                    return True
            self._rest_until = 0.0
            self._wake.set()
            time.sleep(0.01)
        return False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._wishes.clear()
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)
