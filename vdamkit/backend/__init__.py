"""Who computes: worker threads of this machine, and the devices that take over the E- and M-step."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import threadpoolctl
from threadpoolctl import ThreadpoolController

from vdamkit.backend.device import HOST, Device
from vdamkit.backend.kept import KEPT
from vdamkit.errors import SettingsError


@dataclass(frozen=True)
class Backend:
    """Worker threads and devices of one session; without a device the threads do everything.

    ``map`` keeps the order of its items, so sums formed from its result do not depend on the threads.
    """

    threads: int = 1
    devices: tuple[Device, ...] = ()

    @property
    def on_device(self) -> bool:
        """Whether the E- and M-step are a device's."""
        return bool(self.devices)

    @property
    def device(self) -> Device:
        """The first device, or the machine's own memory."""
        return self.devices[0] if self.devices else HOST

    def map(self, function: Callable, items: Iterable, *, at_once: int = 1, size: Callable | None = None) -> list:
        """``[function(item) for item in items]``, on the worker threads where there are several.

        `at_once`: items that one worker takes at a time; more where an item is a matter of microseconds.
        `size`: how much work an item is; the largest go first, so that no worker is left with a long last one.
        """
        items = list(items)
        if size is not None:
            order = sorted(range(len(items)), key=lambda i: -size(items[i]))
            done = self.map(function, [items[i] for i in order], at_once=at_once)
            return [result for _, result in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]
        if self.threads == 1 or len(items) <= at_once:
            return [function(item) for item in items]
        parts = [items[first : first + at_once] for first in range(0, len(items), at_once)]
        done = _pool(self.threads).map(lambda part: [function(item) for item in part], parts)
        return [result for part in done for result in part]

    def begin(self, function: Callable, items: Iterable) -> list[Future]:
        """Begin with ``function(item)`` for all items, on the worker threads, in their order."""
        return [_pool(self.threads).submit(function, item) for item in items]

    def release(self) -> None:
        """Give back the memory of the devices, and what is kept between mini-batches."""
        KEPT.clear()
        for device in self.devices:
            device.release()

    @contextmanager
    def limits(self) -> Iterator[None]:
        """BLAS held to one thread, and quick hand-over of the interpreter, while our own threads work.

        Multi-threaded OpenBLAS slows down 20-30 times as soon as another process wants the cores, and a notebook always
        shares them (browser, viewer, other kernels). Workers leave the interpreter for a fraction of a millisecond at a
        time; with Python's usual 5 ms between hand-overs two of them are hardly faster than one. With a device one thread
        launches thousands of kernels, and leaves the interpreter for a moment at each, while others read particles.

        Several sessions may compute side by side: the limit goes when the last of them leaves, as BLAS on more threads rounds
        differently and results must not depend on who else computes.
        """
        _QUIET.enter(hand_over=2e-5 if self.on_device else 2e-4 if self.threads > 1 else None)
        try:
            yield
        finally:
            _QUIET.leave()


class _Quiet:
    """The process-wide settings that :meth:`Backend.limits` makes, held while anyone needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._blas: Any = None  # the limit that is in force
        self._libraries: tuple[int, ThreadpoolController] | None = None  # found when so many modules were loaded
        self._interval: float | None = None  # of hand-over, to be put back

    def enter(self, *, hand_over: float | None) -> None:
        """Begin; `hand_over`: seconds after which a waiting thread gets the interpreter."""
        with self._lock:
            if self._inside == 0:
                _take_control()
                self._blas = self._controller().limit(limits=1, user_api="blas")
            self._inside += 1
            if hand_over is not None and (self._interval is None or hand_over < sys.getswitchinterval()):
                self._interval = sys.getswitchinterval() if self._interval is None else self._interval
                sys.setswitchinterval(hand_over)

    def _controller(self) -> ThreadpoolController:
        """Of all libraries loaded by now. To look for them takes milliseconds, and only an import brings new ones."""
        if self._libraries is None or self._libraries[0] != len(sys.modules):
            self._libraries = len(sys.modules), ThreadpoolController()
        return self._libraries[1]

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            assert self._blas is not None
            _take_control()
            self._blas.restore_original_limits()
            _take_control()
            if self._interval is not None:
                sys.setswitchinterval(self._interval)
                self._interval = None


_QUIET = _Quiet()


def _take_control() -> None:
    """Let any thread set OpenBLAS's number of threads.

    Since version 3.8 threadpoolctl silently ignores all threads but the first that did so, until that one has finished. A
    session is run by a panel's thread, a cell's or the main one, and who ends last need not be who began.
    """
    clear = getattr(getattr(threadpoolctl, "OpenBLASController", None), "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="vdamkit")


if hasattr(os, "register_at_fork"):  # threads do not come along into a forked child, which would wait for them for ever
    os.register_at_fork(after_in_child=_pool.cache_clear)


def available_cores() -> int:
    """Cores this process may use (its affinity mask, where the system has one)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_backend(device: str = "cpu", threads: int | None = None, device_memory: float | None = None) -> Backend:
    """The back-end for ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or several such, ``"cuda:0,cuda:1"``.

    device_memory: GiB that a session may take on each device; None: what is free.

    Raises
    ------
    SettingsError
        for another word, or where CuPy or the device does not answer.
    """
    numbers = device_numbers(device)
    threads = threads or available_cores()
    if not numbers:
        return Backend(threads)
    from vdamkit.backend.cuda import CudaDevice

    memory = None if device_memory is None else int(device_memory * 2**30)
    backend = Backend(threads, tuple(CudaDevice(number, memory) for number in numbers))
    for device in backend.devices:  # whose tables know it again: without this their memory waits for the garbage collector
        weakref.finalize(backend, device.tables.clear).atexit = False
    return backend


def device_numbers(device: str) -> tuple[int, ...]:
    """Numbers of the GPUs that a name means; none for ``"cpu"``.

    Raises SettingsError for another word, or a device that is named twice.
    """
    if device == "cpu":
        return ()
    numbers = []
    for name in device.split(","):
        kind, _, number = name.strip().partition(":")
        if kind != "cuda" or (number and not number.isdigit()):
            raise SettingsError(
                f"device is {device!r}; allowed are 'cpu', 'cuda', 'cuda:0', 'cuda:1', ..., or several: 'cuda:0,cuda:1'"
            )
        numbers.append(int(number or 0))
    if len(set(numbers)) < len(numbers):
        raise SettingsError(f"device is {device!r}; it names the same GPU twice")
    return tuple(numbers)
