"""Particles that stay on a device from mini-batch to mini-batch, and the thread that fetches those of the next one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from vdamkit.backend.device import Device
from vdamkit.imaging.device_projector import DeviceProjector
from vdamkit.imaging.halfball import half_ball
from vdamkit.vdam.start import Particles

SHARE = 0.5  # of a device's room that particles may keep
MARGIN = 4  # shells beyond the radius in use that are kept where the whole particles of a set have no room
AT_ONCE = 256  # particles that travel together


class Store:
    """Half-balls of particles on a device: least recently used first out. Several sessions may share one.

    Parameters
    ----------
    radius: half-balls that are kept, px. capacity: how many particles.
    """

    def __init__(self, device: Device, radius: int, real: np.dtype, capacity: int):
        kind, n = np.result_type(real, np.complex64), len(half_ball(radius))
        self.device, self.radius, self.capacity = device, radius, capacity
        self.masked, self.unmasked = (device.xp.empty((capacity, n), kind) for _ in range(2))
        self.weight = device.xp.empty((capacity, n), real)
        self._slots: OrderedDict[int, int] = OrderedDict()  # particle -> row, least recently used first
        self._free = list(range(capacity))
        self._lock = threading.RLock()  # of whoever brings particles or takes them
        self._ahead: Future | None = None

    @staticmethod
    def bytes_per_particle(radius: int, real: np.dtype) -> int:
        """Two complex arrays and a real one."""
        return 5 * real.itemsize * len(half_ball(radius))

    def gather(
        self, particles: Particles, index: np.ndarray, projector: DeviceProjector
    ) -> tuple[tuple, np.ndarray, dict[int, str]]:  # fmt: skip
        """Half-balls of `index` for a projector, voxels in its order: (masked, unmasked, weight), `(p, n)` each.

        Also the positions in `index` of those that can be used, and a sentence about each of the others.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()  # wait; what it could not fetch is tried again here
        with self._lock:
            complaints = self.load(particles, index, ())
            at = np.array([j for j, i in enumerate(index.tolist()) if i not in complaints], int)
            rows = np.array([self._slots[i] for i in index[at].tolist()], int)
            arrays = tuple(projector.columns_of(array, rows) for array in (self.masked, self.unmasked, self.weight))
            self.device.synchronize()  # before the rows may be given to others
        return arrays, at, complaints

    def load(self, particles: Particles, index: np.ndarray, others: Sequence[int]) -> dict[int, str]:
        """Bring particles to the device that are not there; `others` keep their place. Sentences about unreadable ones."""
        with self._lock:
            missing = np.array([i for i in index.tolist() if i not in self._slots], int)
            for i in index.tolist():
                if i in self._slots:
                    self._slots.move_to_end(i)
            complaints: dict[int, str] = {}
            for first in range(0, len(missing), AT_ONCE):
                some = missing[first : first + AT_ONCE]
                arrays, at, sentences = particles.fetch_on(self.device, some, self.radius)
                complaints |= dict(zip(np.delete(some, at).tolist(), sentences, strict=True))
                if len(at):
                    self._keep(some[at].tolist(), arrays, {*index.tolist(), *others})
        return complaints

    def _keep(self, particles: list[int], arrays: tuple, stay: set[int]) -> None:
        """Write half-balls into rows of which those of `stay` are not given away; only what is written counts as there."""
        while len(self._free) < len(particles):
            self._free.append(self._slots.pop(next(j for j in self._slots if j not in stay)))
        rows = self._free[: len(particles)]
        at = self.device.put(np.array(rows, np.int64))
        for kept, array in zip((self.masked, self.unmasked, self.weight), arrays, strict=True):
            kept[at] = array
        self.device.synchronize()
        del self._free[: len(particles)]
        self._slots.update(zip(particles, rows, strict=True))

    def fetch_ahead(self, particles: Particles, index: np.ndarray, current: np.ndarray) -> None:
        """Bring the next mini-batch's particles here in the background, on a stream of its own, while `current` computes."""
        if len(index) + len(current) > self.capacity:
            return

        def fetch() -> None:
            with suppress(Exception), self.device.uploading():  # an error is met again where it counts
                self.load(particles, index, current.tolist())

        self._ahead = _reader().submit(fetch)


@lru_cache(maxsize=1)
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="vdamkit-ahead")


def store_for(device: Device, particles: Particles, radius: int, real: np.dtype, at_least: int) -> Store | None:
    """The device's store for these particles on at least `radius`; None where `at_least` of them do not fit."""
    key = ("particles", real.name)
    kept: tuple[Any, Store] | None = device.tables.get(key)
    if kept is not None and kept[0] == particles.identity and kept[1].radius >= radius and kept[1].capacity >= at_least:
        return kept[1]
    device.tables.pop(key, None)
    del kept
    device.kept = 0
    room, full = int(SHARE * device.room), particles.box // 2
    wide = full if len(particles) * Store.bytes_per_particle(full, real) <= room else min(full, radius + MARGIN)
    capacity = min(len(particles), room // Store.bytes_per_particle(wide, real))
    if capacity < at_least:
        return None
    store = Store(device, wide, real, capacity)
    device.tables[key] = (particles.identity, store)
    device.kept = capacity * Store.bytes_per_particle(wide, real)
    return store
