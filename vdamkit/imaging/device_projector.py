"""The projector on a device: the same two steps as :class:`Projector`, for all rotations of a mini-batch in one launch each.

On a device the voxels of a half-ball are listed column by column: all kz of one point of the plane kz = 0, then the next. A
turn in the plane moves whole columns, so that neighbouring threads read neighbouring numbers, two at a time. (The half-ball's
own order, by |k|, would scatter every read.) Columns of an odd length are filled up with a voxel that has no weight.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from vdamkit.backend.device import Device
from vdamkit.backend.twins import KZ, KZ_BITS, TILE
from vdamkit.imaging.halfball import half_turn_pairs
from vdamkit.imaging.projector import PAD, TAPS, Projector, mean_absolute_sum, points_within
from vdamkit.imaging.turns import Turns


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
        self._start, self._count = start.astype(np.int32), count.astype(np.int32)
        self._longest_first = np.argsort(-count, kind="stable")
        pairs = np.repeat(np.arange(len(count)), count // 2)
        kz = 2 * np.arange(len(pairs)) - start[pairs]
        self.pair = device.put((pairs << KZ_BITS | kz).astype(np.uint32))
        plane = projector.ball_at[:, projector.ball.k[:, 2] == 0] // projector.radius  # the columns, by quarter turn
        self._column_of = np.empty_like(plane)  # (4, discs) the column of a row to which one of the spun planes goes
        for of_row, here in zip(self._column_of, plane, strict=True):
            of_row[here] = plane[0]
        self._turned = device.put(((start[self._column_of[:, pairs]] + kz) // 2).astype(np.int32))
        self.disc = device.put(projector.disc.astype(np.int32))
        self.k = device.put(self.in_order(projector.ball.k.T).T.astype(np.int32))
        self.friedel = device.put(self.in_order(projector.ball.weight))
        shell = projector.ball.shell
        self.shell = device.put(self.in_order(shell))
        self._by_shell = device.put(self.place[np.argsort(shell, kind="stable")].astype(np.int32))
        self._shell_start = device.put(np.append(0, np.cumsum(np.bincount(shell))).astype(np.int32))
        self.depth = projector.radius + projector.radius % 2  # of a cylinder
        column, kz = np.divmod(projector.source_at, projector.radius)
        at = column * self.depth + kz
        self._source = device.put(projector.source)
        self._source_at = device.put(at.astype(np.int32))
        needed = np.zeros(self.slab_size, np.uint8)
        needed[at] = 1
        self._needed = device.put(needed)
        self._points = device.put(reached_points(projector))
        self._forward: dict[tuple, tuple] = {}
        self._backward: dict[tuple, tuple] = {}

    @property
    def slab_size(self) -> int:
        """Voxels of one direction's cylinder."""
        return self.projector.width**2 * self.depth

    @property
    def patches(self) -> int:
        """Along one side: pairs of neighbouring columns of the cylinder that one thread sums up, 2 × 2 of them; whole tiles."""
        return TILE * -(-self.projector.width // (2 * TILE))

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """Values of voxels `(..., n)` in the half-ball's order, in the device's; what fills up is 0."""
        return np.where(self.order < 0, values.dtype.type(0), values[..., self.order])

    def shell_sums(self, values: Any) -> np.ndarray:
        """Sums over shells, with Friedel weights, of float64 values `(…, n)` on the device; `(…, n_shells)` on the host."""
        sums = self.device.xp.empty((values.size // values.shape[-1], len(self._shell_start) - 1))
        rows = values.reshape(len(sums), -1)
        self.device.kernels.shell_sums(rows, self.friedel, self._by_shell, self._shell_start, sums)
        return self.device.get(sums).reshape(*values.shape[:-1], -1)

    def columns_of(self, values: Any, rows: np.ndarray, order: np.ndarray | None = None) -> Any:
        """Rows of `values` `(m, ≥ n)`, which are in the half-ball's order, in the device's: `(rows, n)`.

        Or the voxels at `order`, as many as these are, where -1 stands for 0.
        """
        order, put = self.order if order is None else order, self.device.put
        out = self.device.xp.empty((len(rows), len(order)), values.dtype)
        self.device.kernels.collect(values, put(rows.astype(np.int32)), put(order.astype(np.int32)), out)
        return out

    @cached_property
    def pairs(self) -> np.ndarray:
        """Places `(2, m)` of voxels that a half turn about z exchanges, or of one on the axis twice; m even, -1 fills up."""
        at = self.place[half_turn_pairs(self.projector.radius)[0]]
        return np.pad(at[:, at[0].argsort()], ((0, 0), (0, at.shape[1] % 2)), constant_values=-1)

    def _directions_at_once(self, turns: Turns, numbers: int) -> int:
        """Cylinders of so many numbers a voxel: what a twentieth of the room holds."""
        each = numbers * self.projector.dtype.itemsize * self.slab_size
        return min(4096, self.device.fitting(len(turns.tilts), each, 0.05))

    def _taps(self, psis: np.ndarray) -> tuple:
        """For every angle and disc point: the cylinder's column where its taps begin, and their weights along x, along y."""
        key = tuple(psis.tolist())
        if key not in self._forward:
            first, wx, wy = self.projector.spin_taps(psis)
            taps = np.stack([wx, wy], 2).astype(self.projector.dtype)
            self._forward[key] = (self.device.put(first.astype(np.int32)), self.device.put(taps))
        return self._forward[key]

    def _sources(self, psis: np.ndarray) -> tuple:
        """What bears on the patches of 2 × 2 columns of the cylinder, for every angle; see `twins.spin_adjoint`.

        For each tile of patches, ranges `(angles, layers, tiles, 2)` of a list of columns of the half-ball: the first voxel in
        a row of each quarter turn, how many voxels. For each patch, ranges `(angles, layers, patches², 2)` of a list of
        entries: number among the tile's columns, weights for each of the four. The longest columns come first: those that do
        not reach a layer are left out there.
        """
        key = tuple(psis.tolist())
        if key not in self._backward:
            xp, put, p = self.device.xp, self.device.put, self.projector
            first, taps = self._taps(psis)
            n_disc, patches, tiles = len(p.disc), self.patches**2, self.patches**2 // TILE**2
            y, x = first // p.width, first % p.width
            y = y[:, :, None, None] + put(np.arange(TAPS))[:, None]
            x = x[:, :, None, None] + put(np.arange(TAPS))
            weight = taps[:, :, 1, :, None] * taps[:, :, 0, None, :]
            patch = put(np.arange(len(key)))[:, None, None, None] * patches + self._patch(y // 2, x // 2)
            pair = patch * n_disc + put(np.argsort(self._longest_first))[None, :, None, None]
            some, number = xp.unique(pair.ravel(), return_inverse=True)
            weights = xp.zeros((len(some), 4), p.dtype)
            weights[number.ravel(), (y % 2 * 2 + x % 2).ravel()] = weight.ravel()
            in_tile = some // n_disc // TILE**2 * n_disc + some % n_disc
            listed, place = xp.unique(in_tile, return_inverse=True)

            layers = np.arange(0, self.depth, KZ[p.dtype.itemsize])
            reach = (self._count > layers[:, None]).sum(1)  # how many columns reach each layer

            def ranges(values: Any, each: int) -> Any:
                """Where in sorted `values` those of each number begin, and end in each layer: `(angles, layers, each, 2)`."""
                begin = n_disc * np.arange(len(key) * each).reshape(len(key), 1, each)
                ends = put(np.stack(np.broadcast_arrays(begin, begin + reach[:, None]), -1))
                return xp.searchsorted(values, ends.ravel()).reshape(ends.shape).astype(np.int32)

            tile_range = ranges(listed, tiles)
            entry = place.ravel() - tile_range[:, 0, :, 0].ravel()[in_tile // n_disc]
            column = put(self._longest_first)[listed % n_disc]
            starts, counts = put(np.ascontiguousarray(self._start[self._column_of].T)), put(self._count)
            self._backward[key] = (
                tile_range, starts[column], counts[column], ranges(some, patches), entry.astype(np.int32), weights,
            )  # fmt: skip
        return self._backward[key]

    def _patch(self, y: Any, x: Any) -> Any:
        """Number of a patch: tiles of TILE × TILE one after the other, so that threads of a block have neighbours on all
        sides."""
        return ((y // TILE * (self.patches // TILE) + x // TILE) * TILE + y % TILE) * TILE + x % TILE

    def prepare(self, volume: np.ndarray) -> Any:
        """Padded transform of a map, `(size,)` complex; see :meth:`PaddedGrid.from_map`."""
        return self.projector.grid.from_map(volume, self.device)

    def rotate(self, cube: Any, turns: Turns) -> Any:
        """The prepared map at some rotations, `(rows, n)` complex, voxels in the device's order."""
        p, device, xp = self.projector, self.device, self.device.xp
        rows = xp.empty((len(turns.direction), len(self.order)), p.complex)
        first, taps = self._taps(turns.psis)
        for tilts, spins in turns.pieces(self._directions_at_once(turns, 2)):
            slabs = xp.zeros((len(tilts), self.slab_size), p.complex)
            matrices, spins = device.put_all(self._matrices(tilts), spins)
            device.kernels.tilt(cube, matrices, self._source, self._source_at, p.grid.half_width, slabs)
            device.kernels.spin(slabs, spins, first, taps, self.pair, self._turned, self.depth, p.width, rows)
        return rows

    def _matrices(self, tilts: np.ndarray) -> np.ndarray:
        return (PAD * tilts).astype(self.projector.dtype)

    def scatter(self, turns: Turns, values: Any, weights: Any, out: Any) -> None:
        """Adjoint of :meth:`rotate`: values `(2, rows, n)` of two halves, and weights, are added to `out` `(2, 3, size)`.

        Real and imaginary part of the data, and the weights spread as :meth:`Projector.spread_weight` does; float64.
        """
        p, device, xp = self.projector, self.device, self.device.xp
        for tilts, spins in turns.pieces(self._directions_at_once(turns, 8)):
            slabs = xp.empty((len(tilts), self.slab_size, 2, 4), p.dtype)
            start = np.searchsorted(spins[:, 0], np.arange(len(tilts) + 1)).astype(np.int32)
            matrices, start, spins = device.put_all(self._matrices(tilts), start, spins)
            device.kernels.spin_adjoint(
                values, weights, start, spins, *self._sources(turns.psis), self._needed, mean_absolute_sum(), self.depth,
                p.width, slabs,
            )  # fmt: skip
            device.kernels.tilt_back(slabs, matrices, self._points, p.grid.half_width, self.depth, p.width, out)


def reached_points(projector: Projector) -> np.ndarray:
    """Points `(3, m)` int32 xyz of the padded half cube to which cylinders scatter.

    Blocks of 8 × 8 × 4 points one after the other, so that the threads of a block read cylinders at neighbouring places.
    """
    half = projector.grid.half_width
    reach = np.sqrt((projector.source**2).sum(0).max()) + np.sqrt(3) / PAD
    k, _ = points_within(half, reach)
    x, y, z = k + np.array([[0], [half], [half]])
    place = (z // 4, y // 8, x // 8, z % 4, y % 8, x % 8)
    key = np.ravel_multi_index(place, (*3 * [half + 1], 4, 8, 8))  # one number: much faster to sort by than six
    return k[:, np.argsort(key)].astype(np.int32)


def device_projector(projector: Projector, device: Device) -> DeviceProjector:
    """The tables of a projector on a device, which stay there until the device is released."""
    key = ("projector", projector.box, projector.radius, projector.dtype)
    found = device.tables.get(key)  # looked up once: another thread may release the device meanwhile
    if found is None:
        found = device.tables[key] = DeviceProjector(projector, device)
    return found


def whole_number_scale(largest: float, terms: int) -> float:
    """The largest power of two by which values up to `largest` can be multiplied so that `terms` of them fit 62 bits."""
    if largest == 0:
        return 1.0
    return float(2.0 ** np.floor(62 - np.log2(terms) - np.log2(largest)))
