"""Memory that is used again: a thread's own for small work, and large arrays lent from mini-batch to mini-batch.

Fresh memory comes from the system page by page, cleared; in a virtual machine that took longer than the sums written to it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

LINE = 64  # bytes of a line of the cache


class Scratch(threading.local):
    """Arrays that each thread uses again and again. What is in one lasts until the thread asks for its name again."""

    def __init__(self) -> None:
        self._arrays: dict[tuple, np.ndarray] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """As `numpy.empty`, from the memory that is kept by this name."""
        size, key = math.prod(shape), (name, dtype)
        kept = self._arrays.get(key)
        if kept is None or len(kept) < size:
            kept = self._arrays[key] = _in_line(size, dtype)
        return kept[:size].reshape(shape)


def _in_line(size: int, dtype: Any) -> np.ndarray:
    """An empty array that begins with a line of the cache, so that short vectors do not lie across two."""
    raw = np.empty(size * np.dtype(dtype).itemsize + LINE, np.uint8)
    begin = -raw.ctypes.data % LINE
    return raw[begin : len(raw) - LINE + begin].view(dtype)


SCRATCH = Scratch()  # for all who use an operator at once and then make the next


class Kept:
    """One piece of memory by name, lent to one at a time; whoever comes meanwhile gets fresh memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: dict[str, np.ndarray] = {}

    @contextmanager
    def empty(self, name: str, shape: tuple[int, ...], dtype: Any) -> Iterator[np.ndarray]:
        """As `numpy.empty`, to be used within the context only.

        After an error the memory is not lent again: a worker that does not know of the error yet may still write to it.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            buffer = self._buffers.pop(name, None)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        yield buffer[:size].view(dtype).reshape(shape)
        with self._lock:
            self._buffers[name] = buffer

    def clear(self) -> None:
        """Give the memory back to the system."""
        with self._lock:
            self._buffers.clear()


KEPT = Kept()
