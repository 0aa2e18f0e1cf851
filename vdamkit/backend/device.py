"""A device that computes the batched engine: what the engine may ask of one, and the one that every machine has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from vdamkit.errors import VdamkitError

T = TypeVar("T")
UNASKED = 2**28  # bytes taken without a look at the free memory, which takes longer than some work; fewer once it ran out
SHARE_OF_FREE = 0.85  # of a device's free memory that a mini-batch may take


class OutOfDeviceMemory(VdamkitError):
    """The device has no memory left for what was asked; smaller pieces may fit."""


class DeviceLost(VdamkitError):
    """The device does not answer any more; nothing on it can be read back."""


class Device:
    """Arrays (`xp`, a NumPy-like module), kernels (the functions of `twins`) and memory of one device.

    This base class is the machine's own memory with NumPy: for tests, and as the definition of what the others do.

    Parameters
    ----------
    memory: bytes that a session may take; None: what is free.
    """

    name = "host"

    def __init__(self, memory: int | None = None):
        self.xp: Any = np
        self.memory = memory
        self.tables: dict = {}  # what stays on the device from mini-batch to mini-batch, by whoever made it
        self.halvings = 0
        self.kept = 0
        self._idle: list[Executor] = []  # threads that nobody uses now

    @cached_property
    def kernels(self) -> Any:
        """The functions of `twins`, as the device computes them."""
        from vdamkit.backend import twins

        return twins

    @property
    def description(self) -> str:
        """What it is, for a person."""
        return "this machine's memory, with NumPy"

    @property
    def ndimage(self) -> Any:
        """`scipy.ndimage`, or what stands for it on the device."""
        from scipy import ndimage

        return ndimage

    def put(self, array: np.ndarray) -> Any:
        """A copy on the device."""
        return np.array(array)

    def put_all(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        """Copies of some small arrays on the device; sooner there than one by one."""
        return tuple(self.put(array) for array in arrays)

    def upload(self, array: np.ndarray) -> Any:
        """A copy of a large array on the device, by the fastest way there."""
        return self.put(array)

    def get(self, array: Any) -> np.ndarray:
        """A copy on the host."""
        return np.array(array)

    def matmul(self, a: Any, b: Any, *, tf32: bool = False) -> Any:
        """``a @ b.T`` of real row-major matrices; with `tf32`, factors rounded to 10 bits of mantissa, as tensor cores do."""
        return round_to_tf32(a) @ round_to_tf32(b).T if tf32 else a @ b.T

    def free_bytes(self) -> int:
        """Memory that could be taken now."""
        return 8 * 2**30

    @property
    def room(self) -> int:
        """Bytes for which a mini-batch plans: what is free, or what the set limit leaves beside the particles that stay here;
        halved each time it proved too much."""
        free = int(SHARE_OF_FREE * self.free_bytes())
        allowed = free if self.memory is None else self.memory - self.kept
        return max(1, min(free, allowed) >> self.halvings)

    def fitting(self, wanted: float, each: int, share: float) -> int:
        """How many of `wanted` things of `each` bytes a share of the room holds; all, where they need next to nothing."""
        unasked = UNASKED if self.memory is None else min(UNASKED, int(share * self.memory))
        if wanted * each <= unasked >> self.halvings:
            return max(1, math.ceil(wanted))
        return max(1, int(share * self.room / each))

    def halve(self) -> None:
        """Plan for half as much from now on, and give back what is pooled."""
        self.halvings += 1
        self.release()

    @contextmanager
    def active(self) -> Iterator[None]:
        """The device for this thread; its errors come out as :class:`OutOfDeviceMemory` and :class:`DeviceLost`."""
        yield

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """As :meth:`active`, for a thread that brings data while others compute."""
        with self.active():
            yield

    @contextmanager
    def thread(self) -> Iterator[Executor]:
        """A thread for work on this device, time and again the same: libraries keep handles and plans for each thread.

        Whoever comes while it is in use gets another, as a mini-batch that is paused keeps its own.
        """
        try:
            mine = self._idle.pop()
        except IndexError:
            mine = ThreadPoolExecutor(1, thread_name_prefix=f"vdamkit-{self.name}")
        try:
            yield mine
        finally:
            self._idle.append(mine)

    def synchronize(self) -> None:
        """Wait for what this thread asked for."""

    def release(self) -> None:
        """Give back all memory that is not in use; tables are made again when needed."""
        self.tables.clear()
        self.kept = 0


HOST = Device()


def or_on_host(device: Device, work: Callable[[Device], T]) -> T:
    """``work(device)``, or ``work(HOST)`` where the device has no memory for it."""
    try:
        with device.active():
            return work(device)
    except OutOfDeviceMemory:
        device.release()
        return work(HOST)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to TF32's 10 explicit bits of mantissa (to nearest), as the inputs of a tensor core's product are."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
