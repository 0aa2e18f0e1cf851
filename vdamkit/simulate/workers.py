"""Threads beside a device: they prepare what it needs next, and write what it has made, while it goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from vdamkit.backend import Backend


class Workers:
    """The threads of a back-end with a device. Without a device nothing is put off: who asks for something does it then.

    As a context: when it ends, all is written; when it ends with an error, what has not been begun is given up.
    """

    def __init__(self, backend: Backend):
        self._pool = ThreadPoolExecutor(backend.threads) if backend.on_device else None
        self._at_most = 2 * backend.threads  # tasks that wait or run, so that what they hold in memory is bounded
        self._unfinished: deque[Future] = deque()

    def prepare(self, function: Callable, *arguments: Any) -> Callable[[], Any]:
        """Begin with ``function(*arguments)``; what is returned gives its result when called."""
        return partial(function, *arguments) if self._pool is None else self._pool.submit(function, *arguments).result

    def do(self, function: Callable, *arguments: Any) -> None:
        """Have ``function(*arguments)`` done by the end; an error may be raised by a later call."""
        if self._pool is None:
            function(*arguments)
            return
        self._unfinished.append(self._pool.submit(function, *arguments))
        while len(self._unfinished) > self._at_most:
            self._unfinished.popleft().result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, *problem: Any) -> None:
        try:
            while self._unfinished and kind is None:
                self._unfinished.popleft().result()
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
