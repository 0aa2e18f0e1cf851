"""The projector's inner loops compiled by Numba (the extra `[fast]`): the same numbers as SciPy's, in a third of the time.

Each is compiled when it is first called, half a second to one and a half, and kept beside this file, or in the user's cache
where nothing can be written there. None needs the interpreter, so that worker threads do not wait for each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from vdamkit.backend.kept import SCRATCH
from vdamkit.imaging.projector import PAD, TAPS, Projector, Turns, mean_absolute_sum

# sums may be taken in any order and nothing is ever infinite: what vector instructions ask for
compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp", "nnan", "ninf"})


@compiled
def _cell(turn, half_width, a, b, c):
    """Where a point of a cylinder lies in the padded half cube: place of its cell's first corner, how far beyond it along x,
    y and z, and the Friedel sign. Unsigned places spare the loops a test for negative ones."""
    x = turn[0, 0] * a + turn[0, 1] * b + turn[0, 2] * c
    y = turn[1, 0] * a + turn[1, 1] * b + turn[1, 2] * c
    z = turn[2, 0] * a + turn[2, 1] * b + turn[2, 2] * c
    sign = np.float32(-1) if x < 0 else np.float32(1)
    x, y, z = x * sign, y * sign, z * sign
    above = np.float32(half_width)  # that makes them positive, as rounding towards zero is quick
    i, j, k = np.int32(x), np.int32(y + above), np.int32(z + above)
    place = np.uint64(i + (half_width + 2) * (j + (2 * half_width + 1) * k))
    zero = np.float32(0)  # a sum that was rounded up to the next whole number leaves a fraction of -1e-7
    y, z = max(y - np.float32(j - half_width), zero), max(z - np.float32(k - half_width), zero)
    return place, x - np.float32(i), y, z, sign


@compiled
def _steps(half_width):
    row = half_width + 2
    return np.uint64(1), np.uint64(row), np.uint64(row * (2 * half_width + 1))


@compiled
def tilt(cube, turn, half_width, points, places, slab):
    """Trilinear interpolation of `cube` `(2, size)` at ``turn @ points``, into `slab`, real and imaginary parts interleaved."""
    real, imaginary = cube[0], cube[1]
    one, row, plane = _steps(half_width)
    for i in range(points.shape[1]):
        at, x, y, z, sign = _cell(turn, half_width, points[0, i], points[1, i], points[2, i])
        ny, nz = np.float32(1) - y, np.float32(1) - z
        w00, w01, w10, w11 = nz * ny, nz * y, z * ny, z * y
        b, c, d = at + row, at + plane, at + plane + row
        near = w00 * real[at] + w01 * real[b] + w10 * real[c] + w11 * real[d]
        far = w00 * real[at + one] + w01 * real[b + one] + w10 * real[c + one] + w11 * real[d + one]
        slab[2 * places[i]] = near + x * (far - near)
        near = w00 * imaginary[at] + w01 * imaginary[b] + w10 * imaginary[c] + w11 * imaginary[d]
        far = w00 * imaginary[at + one] + w01 * imaginary[b + one] + w10 * imaginary[c + one] + w11 * imaginary[d + one]
        slab[2 * places[i] + 1] = sign * (near + x * (far - near))


@compiled
def tilt_adjoint(slab, weight, turn, half_width, points, places, cube):
    """Adjoint of :func:`tilt`, added to `cube` `(3, size)`; its third row takes the weights, which have no phase."""
    real, imaginary, weights = cube[0], cube[1], cube[2]
    one, row, plane = _steps(half_width)
    for i in range(points.shape[1]):
        at, x, y, z, sign = _cell(turn, half_width, points[0, i], points[1, i], points[2, i])
        re, im, w = slab[2 * places[i]], sign * slab[2 * places[i] + 1], weight[places[i]]
        ny, nz = np.float32(1) - y, np.float32(1) - z
        for corner in range(4):
            share = (z if corner >= 2 else nz) * (y if corner % 2 else ny)
            a = at + (plane if corner >= 2 else np.uint64(0)) + (row if corner % 2 else np.uint64(0))
            near, far = share * (np.float32(1) - x), share * x
            real[a] += near * re
            real[a + one] += far * re
            imaginary[a] += near * im
            imaginary[a + one] += far * im
            weights[a] += near * w
            weights[a + one] += far * w


@compiled
def spin(slab, columns, weights, depths, slots, quarters, rows, out):
    """A cylinder turned in the plane; member m of the turn is row ``rows[m]`` of `out`, after ``quarters[m]`` quarter turns."""
    values = np.empty(slab.shape[1], slab.dtype)
    for i in range(len(depths)):
        values[:] = 0
        for tap in range(0, TAPS * TAPS, TAPS):
            a = np.uint64(columns[i, tap])  # the taps along x are neighbours
            w0, w1, w2, w3 = weights[i, tap], weights[i, tap + 1], weights[i, tap + 2], weights[i, tap + 3]
            for z in range(2 * depths[i]):
                values[z] += w0 * slab[a, z] + w1 * slab[a + 1, z] + w2 * slab[a + 2, z] + w3 * slab[a + 3, z]
        for m in range(len(rows)):
            for z in range(depths[i]):
                out[rows[m], slots[quarters[m], i, z]] = complex(values[2 * z], values[2 * z + 1])


@compiled
def collect(data, total, depths, slots, quarters, rows, planes, weight_planes):
    """Sums of the rows of a turn, `data` complex and `total` real, on the planes of the half-ball."""
    for i in range(len(depths)):
        planes[i] = 0
        weight_planes[i] = 0
        for m in range(len(rows)):
            for z in range(depths[i]):
                at = slots[quarters[m], i, z]
                planes[i, 2 * z] += data[rows[m], at].real
                planes[i, 2 * z + 1] += data[rows[m], at].imag
                weight_planes[i, z] += total[rows[m], at]


@compiled
def spin_adjoint(planes, weight_planes, starts, sources, weights, depths, scale, slab, weight):
    """Adjoint of the turn in the plane, added to `slab`; to `weight` with absolute weights, times `scale`."""
    for column in range(len(depths)):
        n, e, last = depths[column], starts[column], starts[column + 1]
        while e + 4 <= last:  # four sources at a time: fewer passes over the column that is written
            a, b, c, d = sources[e], sources[e + 1], sources[e + 2], sources[e + 3]
            w0, w1, w2, w3 = weights[e], weights[e + 1], weights[e + 2], weights[e + 3]
            for z in range(2 * n):
                slab[column, z] += w0 * planes[a, z] + w1 * planes[b, z] + w2 * planes[c, z] + w3 * planes[d, z]
            w0, w1, w2, w3 = scale * abs(w0), scale * abs(w1), scale * abs(w2), scale * abs(w3)
            for z in range(n):
                weight[column, z] += (
                    w0 * weight_planes[a, z] + w1 * weight_planes[b, z] + w2 * weight_planes[c, z] + w3 * weight_planes[d, z]
                )
            e += 4
        while e < last:
            a, w0 = sources[e], weights[e]
            for z in range(2 * n):
                slab[column, z] += w0 * planes[a, z]
            for z in range(n):
                weight[column, z] += scale * abs(w0) * weight_planes[a, z]
            e += 1


class CompiledProjector(Projector):
    """A :class:`Projector` whose work is done by the functions above."""

    compiled = True
    directions_at_once = 1  # nothing is gained by more

    def __init__(self, box: int, radius: int, dtype=np.float32):
        super().__init__(box, radius, dtype)
        self._places = self.source_at.astype(np.int32)
        disc, kz = np.divmod(self.ball_at, radius)
        self._slots = np.zeros((4, len(self.disc), radius), np.int32)  # place in the ball of every voxel of the planes
        for slots, d, z in zip(self._slots, disc, kz, strict=True):
            slots[d, z] = np.arange(len(self.ball))
        self._depths = np.bincount(disc[0], minlength=len(self.disc)).astype(np.int32)
        self._tables: dict[float, tuple] = {}

    def _turning(self, directions: np.ndarray) -> np.ndarray:
        turns = np.ascontiguousarray(PAD * directions.transpose(0, 2, 1), self.dtype)
        if not (np.square(turns).sum(2) < PAD**2 * 1.001).all():  # nothing else stops a read beyond the cube
            raise ValueError(f"not rotations: rows of lengths {np.linalg.norm(directions, axis=1).max()}")
        return turns

    def tilt(self, reference: Any, directions: np.ndarray) -> Any:
        """As :meth:`Projector.tilt`; ValueError where `directions` are not rotations."""
        slabs = np.zeros((len(directions), self.width**2, 2 * self.radius), self.dtype)
        for turn, slab in zip(self._turning(directions), slabs, strict=True):
            self._tilt(reference, turn, slab)
        return slabs

    def _tilt(self, reference: Any, turn: np.ndarray, slab: Any) -> None:
        tilt(reference, turn, self.grid.half_width, self.source, self._places, slab.reshape(-1))

    def add_tilt_adjoint(self, cube: Any, directions: np.ndarray, slabs: list[Any], weights: list[Any]) -> None:
        """As :meth:`Projector.add_tilt_adjoint`; ValueError where `directions` are not rotations."""
        for turn, slab, weight in zip(self._turning(directions), slabs, weights, strict=True):
            self._add_tilt_adjoint(cube, turn, slab, weight)

    def _add_tilt_adjoint(self, cube: Any, turn: np.ndarray, slab: Any, weight: Any) -> None:
        tilt_adjoint(slab.reshape(-1), weight.reshape(-1), turn, self.grid.half_width, self.source, self._places, cube)

    def rotate_rows(self, reference: Any, directions: np.ndarray, turns: list[Turns], out: Any) -> None:
        """As :meth:`Projector.rotate_rows`, one direction after the other on a cylinder that stays in the cache."""
        slab = SCRATCH.empty("slab", (self.width**2, 2 * self.radius), self.dtype)
        slab[:] = 0
        for turn, spins in zip(self._turning(directions), turns, strict=True):
            self._tilt(reference, turn, slab)
            for psi, members in spins.items():
                quarters, rows = np.array(members).T
                spin(slab, *self._table(psi)[0], self._depths, self._slots, quarters, rows, out)

    def scatter_rows(self, cube: Any, directions: np.ndarray, turns: list[Turns], data: Any, total: Any) -> None:
        """As :meth:`Projector.scatter_rows`: the turns of a direction are summed on its cylinder, and that is scattered once.

        data `(rows, n)` complex and total `(rows, n)` real are read, `cube` `(3, grid.size)` is added to.
        """
        columns, discs, depth = self.width**2, len(self.disc), self.radius
        slab = SCRATCH.empty("slab", (columns, 2 * depth), self.dtype)
        weight = SCRATCH.empty("slab weight", (columns, depth), self.dtype)
        planes = SCRATCH.empty("planes", (discs, 2 * depth), self.dtype)
        weight_planes = SCRATCH.empty("weight planes", (discs, depth), self.dtype)
        scale = self.dtype.type(1 / mean_absolute_sum())
        for turn, spins in zip(self._turning(directions), turns, strict=True):
            slab[:], weight[:] = 0, 0
            for psi, members in spins.items():
                quarters, rows = np.array(members).T
                collect(data, total, self._depths, self._slots, quarters, rows, planes, weight_planes)
                spin_adjoint(planes, weight_planes, *self._table(psi)[1], scale, slab, weight)
            self._add_tilt_adjoint(cube, turn, slab, weight)

    def _table(self, psi: float) -> tuple[tuple, tuple]:
        """What a turn reads, and what its adjoint does."""
        made = self._tables.get(psi)
        if made is None:
            if len(self._tables) > 1024:
                self._tables.clear()
            turn, back, _ = self.spin_matrices(psi)
            back = back.tocsr()
            source_depths = np.append(self._depths[back.indices], 0)
            depths = np.maximum.reduceat(source_depths, back.indptr[:-1]) * (np.diff(back.indptr) > 0)
            shape = (len(self.disc), TAPS * TAPS)
            made = self._tables[psi] = (
                (turn.indices.reshape(shape), turn.data.reshape(shape)),
                (back.indptr, back.indices, back.data, depths.astype(np.int32)),
            )
        return made
