"""What a device holds for one mini-batch: particles, references, phase tables; and how much it takes at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.backend.device import Device
from vdamkit.imaging.device_projector import DeviceProjector, device_projector
from vdamkit.imaging.halfball import half_ball
from vdamkit.vdam.search import Search


@dataclass(frozen=True)
class DeviceBatch:
    """Particles on a device, as `vdam.search.Batch` and `vdam.accumulate.RawBatch` describe them.

    On the last level's half-ball, voxels in the device's order (`imaging.device_projector`).
    """

    index: np.ndarray  # (p,) particle numbers
    masked: Any  # (p, n) complex, b / sigma², Friedel weights applied, k = 0 left out
    unmasked: Any  # (p, n) complex
    weight: Any  # (p, n) real
    raw: Any  # (p, n) complex, masked b, moved but not divided by the noise
    raw_weight: Any  # (p, n) real
    offsets: np.ndarray  # (p, 3) px, last offset
    offset_priors: np.ndarray  # (p, 3) px
    centre: np.ndarray  # (p,) row of each particle among the prior centres
    optics: np.ndarray  # (p,) optics group

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class ShiftLines:
    """Shifts on the lines of a grid."""

    values: np.ndarray  # (m,) different coordinates along any axis, px, ascending
    place: np.ndarray  # (shifts, 4) int32, which of them each shift has in x, y and z, and nothing
    order: np.ndarray  # (shifts,) the shifts sorted by z, y and x

    @classmethod
    def of(cls, shifts: np.ndarray) -> ShiftLines:
        """Of shifts `(n, 3)`, px."""
        values, place = np.unique(shifts, return_inverse=True)
        place = np.pad(place.reshape(shifts.shape).astype(np.int32), ((0, 0), (0, 1)))
        return cls(values, place, np.lexsort(place.T[:3]))


class Engine:
    """One mini-batch's search on one device.

    tf32: let tensor cores round the factors of the coarse scores (never sums, never anything but that product).
    """

    def __init__(self, search: Search, device: Device, *, tf32: bool = False):
        self.search, self.device, self.tf32 = search, device, tf32
        self.real = np.dtype(search.dtype)
        self._cubes: dict[int, list] = {}
        self._lines: dict[bool, ShiftLines] = {}

    def drop(self) -> None:
        """Let go of what it holds on the device."""
        self._cubes.clear()

    def projector(self, radius: int) -> DeviceProjector:
        """The projector's tables, which stay on the device from mini-batch to mini-batch."""
        return device_projector(self.search.projector(radius), self.device)

    def cube(self, radius: int, class_index: int) -> Any:
        """A class's reference, prepared for a half-ball of `radius`."""
        if radius not in self._cubes:
            self._cubes[radius] = [self.projector(radius).prepare(volume) for volume in self.search.volumes]
        return self._cubes[radius][class_index]

    def scored(self, batch: DeviceBatch, radius: int) -> tuple[Any, Any]:
        """What a level scores: `masked` and `weight` of a batch on its own half-ball."""
        last = self.search.levels[-1].radius
        if radius == last:
            return batch.masked, batch.weight
        here = self.projector(radius)
        order = np.where(here.order < 0, -1, self.projector(last).place[here.order])
        masked, weight = (here.columns_of(array, np.arange(len(batch)), order) for array in (batch.masked, batch.weight))
        return masked, weight

    def phases(self, radius: int, shifts: np.ndarray) -> Any:
        """Phase factors of shifts `(m, 3)` in px: `(m, n)` complex."""
        projector = self.projector(radius)
        out = self.device.xp.empty((len(shifts), len(projector.order)), projector.projector.complex)
        self.device.kernels.phases(self.device.put(shifts / self.search.box), projector.k, out)
        return out

    def lines(self, fine: bool) -> ShiftLines:
        """How a level's shifts lie."""
        if fine not in self._lines:
            self._lines[fine] = ShiftLines.of(self.search.shifts(fine))
        return self._lines[fine]

    def waves(self, radius: int, values: np.ndarray) -> Any:
        """Phase factors of coordinates `(m,)`, px, along an axis: `(m, width)`, see `twins.wave_planes`."""
        half = radius + radius % 2
        turns, k = np.zeros((len(values), 3)), np.zeros((2 * half + 2, 3), np.int32)
        turns[:, 0], k[:, 0] = values / self.search.box, np.arange(-half, half + 2)
        out = self.device.xp.empty((len(turns), len(k)), np.result_type(self.real, np.complex64))
        self.device.kernels.phases(*self.device.put_all(turns, k), out)
        return out

    def put(self, array: np.ndarray, kind: Any) -> Any:
        """An index or a prior on the device, as `kind`."""
        return self.device.put(np.ascontiguousarray(array, kind))

    # pieces: what follows from the device's memory -----------------------------------------------------------------------

    def particles_at_once(self) -> int:
        """Particles of a chunk: what two fifths of the room holds."""
        n = len(half_ball(self.search.levels[-1].radius))
        samples = 64 * self.search.max_significant * len(self.search.volumes)
        return max(1, int(0.4 * self.device.room / (self.real.itemsize * (9 * n + 4 * samples))))

    def rows_at_once(self, n_voxels: int, wanted: float) -> int:
        """Rotated references of a piece, with residuals and weights of two halves: what a fifth of the room holds."""
        return self.device.fitting(wanted, self.real.itemsize * 12 * n_voxels, 0.2)

    def dense_at_once(self, n_voxels: int, n_rows: int, n_shifts: int) -> int:
        """Particles whose every rotation × shift is scored in one product: what a fifth of the room holds."""
        each = n_shifts * (2 * n_voxels + 3 * n_rows) * self.real.itemsize
        return max(1, int(0.2 * self.device.room / each))
