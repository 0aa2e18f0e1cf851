"""The projector on a device: the same two steps as :class:`Projector`, for all rotations of a mini-batch in one launch each.

On a device the voxels of a half-ball are listed column by column: all kz of one point of the plane kz = 0, then the next. A
turn in the plane moves whole columns, so that neighbouring threads read neighbouring numbers, two at a time. (The half-ball's
own order, by |k|, would scatter every read.) Columns of an odd length are filled up with a voxel that has no weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.backend.device import Device
from vdamkit.backend.twins import KZ_BITS
from vdamkit.imaging.projector import PAD, TAPS, Projector, mean_absolute_sum


@dataclass(frozen=True)
class Turns:
    """Rotations as the projector takes them: sorted by direction, which a cylinder serves, then in-plane angle."""

    tilts: np.ndarray  # (d, 3, 3): the part of each direction that does not depend on psi
    direction: np.ndarray  # (rows,) number of each row's direction, ascending
    psi: np.ndarray  # (rows,) number of each row's angle in `psis`
    psis: np.ndarray  # (angles,) degrees

    @classmethod
    def single(cls, rotations: np.ndarray) -> Turns:
        """Rotations `(n, 3, 3)` that share no direction: all of each is its tilt."""
        n = len(rotations)
        return cls(rotations, np.arange(n), np.zeros(n, int), np.zeros(1))

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
        disc, kz = np.divmod(projector.ball_at[0], projector.radius)
        count = np.bincount(disc, minlength=len(projector.disc))
        count += count % 2
        start = np.cumsum(count) - count
        self.place = start[disc] + kz  # of each voxel of the half-ball, in the device's order
        self.order = np.full(count.sum(), -1)  # and the other way round; -1 fills up
        self.order[self.place] = np.arange(len(disc))
        self._column = np.stack([start, count], -1).astype(np.int32)
        pairs = np.repeat(np.arange(len(count)), count // 2)
        self.pair = device.put((pairs << KZ_BITS | 2 * np.arange(len(pairs)) - start[pairs]).astype(np.uint32))
        self.k = device.put(self.in_order(projector.ball.k.T).T.astype(np.int32))
        self.friedel = device.put(self.in_order(projector.ball.weight))
        self.depth = projector.radius + projector.radius % 2  # of a cylinder
        column, kz = np.divmod(projector.source_at, projector.radius)
        self._source = device.put(projector.source)
        self._source_at = device.put((column * self.depth + kz).astype(np.int32))
        self._forward: dict[tuple, tuple] = {}
        self._backward: dict[tuple, tuple] = {}

    @property
    def slab_size(self) -> int:
        """Voxels of one direction's cylinder."""
        return self.projector.width**2 * self.depth

    @property
    def patches(self) -> int:
        """Along one side: pairs of neighbouring columns of the cylinder that one thread sums up, 2 × 2 of them."""
        return -(-self.projector.width // 2)

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """Values of voxels `(..., n)` in the half-ball's order, in the device's; what fills up is 0."""
        return np.where(self.order < 0, values.dtype.type(0), values[..., self.order])

    def shell_sums(self, values: Any) -> np.ndarray:
        """Sums over shells of values `(..., n)` on the device; float64 `(..., n_shells)` on the host, no Friedel weights."""
        return self.projector.ball.shell_sums(self.device.get(values)[..., self.place])

    def columns_of(self, values: Any, rows: np.ndarray, order: np.ndarray | None = None) -> Any:
        """Rows of `values` `(m, ≥ n)`, which are in the half-ball's order (or lie at `order`), in the device's: `(rows, n)`."""
        xp, put = self.device.xp, self.device.put
        out = xp.empty((len(rows), len(self.order)), values.dtype)
        at = put((self.order if order is None else order).astype(np.int32))
        self.device.kernels.collect(values, put(rows.astype(np.int32)), at, out)
        return out

    def _directions_at_once(self) -> int:
        """Cylinders that a twentieth of the room holds, two halves of data and weight each."""
        each = 6 * self.projector.dtype.itemsize * self.slab_size
        return int(np.clip(self.device.room // 20 // each, 1, 4096))

    def _taps(self, psis: np.ndarray) -> tuple:
        """For every angle and disc point: the cylinder's column where its taps begin, and their weights along x, along y."""
        key = tuple(psis.tolist())
        if key not in self._forward:
            first, wx, wy = self.projector.spin_taps(psis)
            taps = np.stack([wx, wy], 2).astype(self.projector.dtype)
            self._forward[key] = (self.device.put(first.astype(np.int32)), self.device.put(taps))
        return self._forward[key]

    def _sources(self, psis: np.ndarray) -> tuple:
        """For every angle and patch of 2 × 2 columns of the cylinder, what bears on it: ranges `(angles, patches² + 1)` of a
        list of columns of the half-ball (first voxel, how many), and of their weights for each of the four."""
        key = tuple(psis.tolist())
        if key not in self._backward:
            xp, put, p = self.device.xp, self.device.put, self.projector
            first, taps = self._taps(psis)
            n_disc, patches = len(p.disc), self.patches**2
            y, x = first // p.width, first % p.width
            y = y[:, :, None, None] + put(np.arange(TAPS))[:, None]
            x = x[:, :, None, None] + put(np.arange(TAPS))
            weight = taps[:, :, 1, :, None] * taps[:, :, 0, None, :]
            patch = put(np.arange(len(key)))[:, None, None, None] * patches + y // 2 * self.patches + x // 2
            pair = patch * n_disc + put(np.arange(n_disc))[None, :, None, None]
            some, number = xp.unique(pair.ravel(), return_inverse=True)
            weights = xp.zeros((len(some), 4), p.dtype)
            weights[number.ravel(), (y % 2 * 2 + x % 2).ravel()] = weight.ravel()
            ends = put(np.arange(len(key))[:, None] * patches + np.arange(patches + 1))
            start = xp.searchsorted(some, ends.ravel() * n_disc).reshape(ends.shape)
            self._backward[key] = (start.astype(np.int32), put(self._column)[some % n_disc], weights)
        return self._backward[key]

    def prepare(self, volume: np.ndarray) -> Any:
        """Padded transform of a map, `(2, size)`; see :meth:`Projector.prepare`."""
        return self.projector.grid.from_map(volume, self.device)

    def rotate(self, cube: Any, turns: Turns) -> Any:
        """The prepared map at some rotations, `(rows, n)` complex, voxels in the device's order."""
        p, device, xp = self.projector, self.device, self.device.xp
        rows = xp.empty((len(turns.direction), len(self.order)), p.complex)
        first, taps = self._taps(turns.psis)
        for some, piece in turns.pieces(self._directions_at_once()):
            slabs = xp.zeros((len(piece.tilts), self.slab_size), p.complex)
            device.kernels.tilt(cube, self._turned(piece), self._source, self._source_at, p.grid.half_width, slabs)
            direction, psi = device.put(np.stack([piece.direction, piece.psi]).astype(np.int32))
            device.kernels.spin(slabs, direction, psi, first, taps, self.pair, self.depth, p.width, rows[some])
        return rows

    def _turned(self, turns: Turns) -> Any:
        return self.device.put((PAD * turns.tilts).astype(self.projector.dtype))

    def scatter(self, turns: Turns, values: Any, weights: Any, out: Any) -> None:
        """Adjoint of :meth:`rotate`: values `(2, rows, n)` of two halves, and weights, are added to `out` `(2, 3, size)`.

        Real and imaginary part of the data, and the weights spread as :meth:`Projector.spread_weight` does; float64.
        """
        p, device, xp = self.projector, self.device, self.device.xp
        for some, piece in turns.pieces(self._directions_at_once()):
            n = len(piece.tilts)
            slabs, heavy = xp.empty((2, n, self.slab_size), p.complex), xp.empty((2, n, self.slab_size), p.dtype)
            start, psi = device.put(piece.row_start), device.put(piece.psi.astype(np.int32))
            mine = (xp.ascontiguousarray(array[:, some]) for array in (values, weights))
            device.kernels.spin_adjoint(
                *mine, start, psi, *self._sources(turns.psis), mean_absolute_sum(), self.depth, p.width, slabs, heavy
            )
            scales = tuple(whole_number_scale(float(abs(a).max()), 8 * n * len(p.source_at)) for a in (slabs, heavy))
            sums = xp.zeros((1, 2, 3, p.grid.size), np.int64)
            owner = xp.zeros(n, np.int32)
            device.kernels.tilt_adjoint(
                slabs, heavy, self._turned(piece), owner, self._source, self._source_at, p.grid.half_width, scales, sums
            )
            for row, scale in enumerate((scales[0], scales[0], scales[1])):
                out[:, row] += sums[0, :, row] / scale


def device_projector(projector: Projector, device: Device) -> DeviceProjector:
    """The tables of a projector on a device, which stay there until the device is released."""
    key = ("projector", projector.box, projector.radius, projector.dtype)
    if key not in device.tables:
        device.tables[key] = DeviceProjector(projector, device)
    return device.tables[key]


def whole_number_scale(largest: float, terms: int) -> float:
    """The largest power of two by which values up to `largest` can be multiplied so that `terms` of them fit 62 bits."""
    if largest == 0:
        return 1.0
    return float(2.0 ** np.floor(62 - np.log2(terms) - np.log2(largest)))
