"""The projector on a device: the same two steps as :class:`Projector`, for all rotations of a mini-batch in one launch each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.backend.device import Device
from vdamkit.imaging.projector import PAD, Projector, mean_absolute_sum


@dataclass(frozen=True)
class Turns:
    """Rotations as the projector takes them: sorted by direction, which a cylinder serves, then in-plane angle."""

    tilts: np.ndarray  # (d, 3, 3): the part of each direction that does not depend on psi
    direction: np.ndarray  # (rows,) number of each row's direction, ascending
    psi: np.ndarray  # (rows,) number of each row's angle in `psis`
    psis: np.ndarray  # (angles,) degrees

    @property
    def row_start(self) -> np.ndarray:
        """First row of each direction, and the number of rows."""
        return np.searchsorted(self.direction, np.arange(len(self.tilts) + 1)).astype(np.int32)

    def pieces(self, directions: int) -> list[tuple[slice, Turns]]:
        """The same in pieces of so many directions, with the rows of each."""
        out, start = [], self.row_start
        for first in range(0, len(self.tilts), directions):
            last = min(first + directions, len(self.tilts))
            rows = slice(int(start[first]), int(start[last]))
            out.append((rows, Turns(self.tilts[first:last], self.direction[rows] - first, self.psi[rows], self.psis)))
        return out


class DeviceProjector:
    """Tables of one :class:`Projector` on a device, and its work there."""

    def __init__(self, projector: Projector, device: Device):
        self.projector, self.device = projector, device
        place = np.full(len(projector.disc) * projector.radius, -1, np.int32)
        place[projector.ball_at] = np.arange(len(projector.ball_at), dtype=np.int32)
        self.place = device.put(place)
        self.k = device.put(projector.ball.k.astype(np.int32))
        self._source = device.put(projector.source)
        self._source_at = device.put(projector.source_at.astype(np.int32))
        self._forward: dict[tuple, tuple] = {}
        self._backward: dict[tuple, tuple] = {}

    @property
    def slab_size(self) -> int:
        """Voxels of one direction's cylinder."""
        return self.projector.width**2 * self.projector.radius

    def _directions_at_once(self) -> int:
        """Cylinders that a twentieth of the room holds, two halves of data and weight each."""
        each = 6 * self.projector.dtype.itemsize * self.slab_size
        return int(np.clip(self.device.room // 20 // each, 1, 4096))

    def _taps(self, psis: np.ndarray) -> tuple:
        key = tuple(psis.tolist())
        if key not in self._forward:
            first, wx, wy = (np.stack(part) for part in zip(*map(self.projector.spin_taps, key), strict=True))
            taps = np.stack([wx, wy], 2).astype(self.projector.dtype)
            self._forward[key] = (self.device.put(first.astype(np.int32)), self.device.put(taps))
        return self._forward[key]

    def _columns(self, psis: np.ndarray) -> tuple:
        """For every angle and column of the cylinder, the disc points whose taps it is, and their weights."""
        key = tuple(psis.tolist())
        if key not in self._backward:
            matrices = [self.projector.spin_matrix(psi)[0].tocsc() for psi in key]
            before = np.append(0, np.cumsum([m.nnz for m in matrices]))[:-1]
            start = np.stack([m.indptr + first for m, first in zip(matrices, before, strict=True)])
            disc, weight = (np.concatenate([getattr(m, name) for m in matrices]) for name in ("indices", "data"))
            put = self.device.put
            self._backward[key] = (put(start.astype(np.int32)), put(disc.astype(np.int32)), put(weight))
        return self._backward[key]

    def prepare(self, volume: np.ndarray) -> Any:
        """Padded transform of a map, `(2, size)`; see :meth:`Projector.prepare`."""
        return self.device.put(self.projector.prepare(volume))

    def rotate(self, cube: Any, turns: Turns) -> Any:
        """The prepared map at some rotations, `(rows, n)` complex."""
        p, device, xp = self.projector, self.device, self.device.xp
        rows = xp.empty((len(turns.direction), len(p.ball)), p.complex)
        first, taps = self._taps(turns.psis)
        for some, piece in turns.pieces(self._directions_at_once()):
            slabs = xp.zeros((len(piece.tilts), self.slab_size), p.complex)
            device.kernels.tilt(cube, self._turned(piece), self._source, self._source_at, p.grid.half_width, slabs)
            direction, psi = (device.put(a.astype(np.int32)) for a in (piece.direction, piece.psi))
            device.kernels.spin(slabs, direction, psi, first, taps, self.place, p.radius, p.width, rows[some])
        return rows

    def _turned(self, turns: Turns) -> Any:
        return self.device.put((PAD * turns.tilts).astype(self.projector.dtype))

    def scatter(self, turns: Turns, values: Any, weights: Any) -> np.ndarray:
        """Adjoint of :meth:`rotate`: values `(2, rows, n)` of two halves, and weights, to sums `(2, 3, size)` on the host.

        float64; real and imaginary part of the data, and the weights spread as :meth:`Projector.spread_weight` does.
        """
        p, device, xp = self.projector, self.device, self.device.xp
        out = np.zeros((2, 3, p.grid.size))
        for some, piece in turns.pieces(self._directions_at_once()):
            n = len(piece.tilts)
            slabs, heavy = xp.empty((2, n, self.slab_size), p.complex), xp.empty((2, n, self.slab_size), p.dtype)
            start, psi = device.put(piece.row_start), device.put(piece.psi.astype(np.int32))
            mine = (xp.ascontiguousarray(array[:, some]) for array in (values, weights))
            device.kernels.spin_adjoint(
                *mine, start, psi, *self._columns(turns.psis), mean_absolute_sum(), self.place, p.radius, slabs, heavy
            )
            scales = tuple(_whole_number_scale(float(abs(a).max()), 8 * n * len(p.source_at)) for a in (slabs, heavy))
            sums = xp.zeros((2, 3, p.grid.size), np.int64)
            device.kernels.tilt_adjoint(
                slabs, heavy, self._turned(piece), self._source, self._source_at, p.grid.half_width, scales, sums
            )
            out += device.get(sums) / np.array([scales[0], scales[0], scales[1]])[:, None]
        return out


def _whole_number_scale(largest: float, terms: int) -> float:
    """The largest power of two by which values up to `largest` can be multiplied so that `terms` of them fit 62 bits."""
    if largest == 0:
        return 1.0
    return float(2.0 ** np.floor(62 - np.log2(terms) - np.log2(largest)))
