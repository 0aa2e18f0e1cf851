"""The projector's inner loops compiled by Numba (the extra `[fast]`): the same numbers as SciPy's, in a third of the time.

Each is compiled when it is first called, half a second to two, and kept beside this file, or in the user's cache where nothing
can be written there. None needs the interpreter, and one call does many rotations, so that worker threads do not wait for each
other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from vdamkit.backend.kept import SCRATCH
from vdamkit.imaging.projector import PAD, TAPS, Projector, mean_absolute_sum
from vdamkit.imaging.simd import BYTES, fused, load, scaled, store
from vdamkit.imaging.turns import Turns

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
def tilt_adjoint(slab, weight, turn, half_width, points, places, weight_places, cube):
    """Adjoint of :func:`tilt`, added to `cube` `(3, size)`; its third row takes the weights, which have no phase."""
    real, imaginary, weights = cube[0], cube[1], cube[2]
    one, row, plane = _steps(half_width)
    for i in range(points.shape[1]):
        at, x, y, z, sign = _cell(turn, half_width, points[0, i], points[1, i], points[2, i])
        re, im, w = slab[2 * places[i]], sign * slab[2 * places[i] + 1], weight[weight_places[i]]
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
def _line(slab, at, weights):
    """Sum over the taps along x."""
    total = scaled(load(slab, at), weights[0])
    for x in range(1, TAPS):
        total = fused(load(slab, at + x * slab.shape[1]), weights[x], total)
    return total


@compiled
def spin(slab, width, first, taps, depths, planes):
    """A cylinder turned in the plane: of each column of `planes`, the taps along x and y of those from ``first`` on."""
    depth = slab.shape[1]
    for i in range(len(depths)):
        for z in range(0, 2 * depths[i], BYTES // slab.itemsize):
            at = depth * first[i] + z
            total = scaled(_line(slab, at, taps[i, 0]), taps[i, 1, 0])
            for y in range(1, TAPS):
                total = fused(_line(slab, at + y * depth * width, taps[i, 0]), taps[i, 1, y], total)
            store(planes, i * depth + z, total)


@compiled
def rotate(cube, turns, half_width, points, places, width, spins, first, taps, depths, at, slab, planes, whole, out):
    """All spins, one direction after the other: its cylinder stays in the cache. `whole`: `planes` as complex numbers, which
    the row of each quarter turn reads `at` other places."""
    for s in range(len(spins)):
        direction, base = spins[s, 0], spins[s, 1]
        if s == 0 or direction != spins[s - 1, 0]:
            tilt(cube, turns[direction], half_width, points, places, slab.reshape(-1))
        spin(slab, width, first[base], taps[base], depths, planes)
        for quarter in range(4):
            if spins[s, 2 + quarter] >= 0:
                row, places_of = out[spins[s, 2 + quarter]], at[quarter]
                for j in range(len(row)):
                    row[j] = whole[places_of[j]]


@compiled
def spin_adjoint(planes, weight_planes, starts, sources, weights, depths, scale, slab, weight):
    """Adjoint of :func:`spin`, added to `slab`; to `weight` with absolute weights, times `scale`."""
    lanes, depth, weight_depth = BYTES // slab.itemsize, slab.shape[1], weight.shape[1]
    for column in range(len(depths)):
        begin, end = starts[column], starts[column + 1]
        for z in range(0, 2 * depths[column], lanes):
            total = load(slab, column * depth + z)
            for e in range(begin, end):
                total = fused(load(planes, sources[e] * depth + z), weights[e], total)
            store(slab, column * depth + z, total)
        for z in range(0, depths[column], lanes):
            total = load(weight, column * weight_depth + z)
            for e in range(begin, end):
                total = fused(load(weight_planes, sources[e] * weight_depth + z), scale * abs(weights[e]), total)
            store(weight, column * weight_depth + z, total)


@compiled
def scatter(
    cube, turns, half_width, points, places, weight_places, spins, starts, sources, weights, depths, scale, at, weight_at,
    slab, weight, planes, whole, weight_planes, data, total,
):  # fmt: skip
    """Adjoint of :func:`rotate`: the spins of a direction are summed on its cylinder, and that is scattered once."""
    for s in range(len(spins)):
        direction, base = spins[s, 0], spins[s, 1]
        if s == 0 or direction != spins[s - 1, 0]:
            slab[:], weight[:] = 0, 0
        planes[:], weight_planes[:] = 0, 0
        for quarter in range(4):
            row = spins[s, 2 + quarter]
            if row >= 0:
                for j in range(data.shape[1]):
                    whole[at[quarter, j]] += data[row, j]
                    weight_planes[weight_at[quarter, j]] += total[row, j]
        spin_adjoint(
            planes, weight_planes, starts[base], sources, weights, depths[base], scale, slab, weight,
        )  # fmt: skip
        if s + 1 == len(spins) or direction != spins[s + 1, 0]:
            tilt_adjoint(
                slab.reshape(-1), weight.reshape(-1), turns[direction], half_width, points, places, weight_places, cube
            )  # fmt: skip


class CompiledProjector(Projector):
    """A :class:`Projector` whose work is done by the functions above.

    Columns of its cylinders and planes, and of those of weights, are filled up to whole vectors.
    """

    compiled = True
    directions_at_once = 1  # nothing is gained by more

    def __init__(self, box: int, radius: int, dtype=np.float32):
        super().__init__(box, radius, dtype)
        lanes = BYTES // self.dtype.itemsize
        self._depth, self._weight_depth = (-(-n // lanes) * lanes for n in (2 * radius, radius))  # of a column, numbers
        column, z = np.divmod(self.source_at, radius)
        self._places = (column * (self._depth // 2) + z).astype(np.int32)
        self._weight_places = (column * self._weight_depth + z).astype(np.int32)
        disc, kz = np.divmod(self.ball_at, radius)
        self._at = (disc * (self._depth // 2) + kz).astype(np.uint32)
        self._weight_at = (disc * self._weight_depth + kz).astype(np.uint32)
        self._depths = np.bincount(disc[0], minlength=len(self.disc))
        self._forward: dict[bytes, tuple] = {}
        self._backward: dict[bytes, tuple] = {}

    def _matrices(self, directions: np.ndarray) -> np.ndarray:
        turns = np.ascontiguousarray(PAD * directions.transpose(0, 2, 1), self.dtype)
        if not (np.square(turns).sum(2) < PAD**2 * 1.001).all():  # nothing else stops a read beyond the cube
            raise ValueError(f"not rotations: rows of lengths {np.linalg.norm(directions, axis=1).max()}")
        return turns

    def tilt(self, reference: Any, directions: np.ndarray) -> Any:
        """As :meth:`Projector.tilt`; ValueError where `directions` are not rotations."""
        slabs = np.zeros((len(directions), self.width**2, 2 * self.radius), self.dtype)
        places = self.source_at.astype(np.int32)  # columns are not filled up here
        for turn, slab in zip(self._matrices(directions), slabs, strict=True):
            tilt(reference, turn, self.grid.half_width, self.source, places, slab.reshape(-1))
        return slabs

    def rotate_rows(self, reference: Any, turns: Turns) -> Any:
        """As :meth:`Projector.rotate_rows`; ValueError where the tilts are not rotations."""
        out = np.empty((len(turns.direction), len(self.ball)), self.complex)
        planes = SCRATCH.empty("planes", (len(self.disc), self._depth), self.dtype)
        slab = SCRATCH.empty("slab", (self.width**2, self._depth), self.dtype)
        slab[:] = 0  # and stays so where no column reaches
        rotate(
            reference, self._matrices(turns.tilts), self.grid.half_width, self.source, self._places, self.width, turns.spins,
            *self._taps(turns.psis), self._depths, self._at, slab, planes, planes.reshape(-1).view(self.complex), out,
        )  # fmt: skip
        return out

    def scatter_rows(self, cube: Any, turns: Turns, data: Any, total: Any) -> None:
        """As :meth:`Projector.scatter_rows`; ValueError where the tilts are not rotations."""
        columns, discs = self.width**2, len(self.disc)
        slab = SCRATCH.empty("slab", (columns, self._depth), self.dtype)
        weight = SCRATCH.empty("slab weight", (columns, self._weight_depth), self.dtype)
        planes = SCRATCH.empty("planes", (discs, self._depth), self.dtype)
        weight_planes = SCRATCH.empty("weight planes", (discs * self._weight_depth,), self.dtype)
        scale = self.dtype.type(1 / mean_absolute_sum())
        scatter(
            cube, self._matrices(turns.tilts), self.grid.half_width, self.source, self._places, self._weight_places,
            turns.spins, *self._sources(turns.psis), scale, self._at, self._weight_at, slab, weight, planes,
            planes.reshape(-1).view(self.complex), weight_planes, data, total,
        )  # fmt: skip

    def _taps(self, psis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each angle and column of the half-ball: the cylinder's column where its taps begin, and their weights along x and
        y, `(angles, discs, 2, TAPS)`."""
        made = _kept(self._forward, psis)
        if made is None:
            first, wx, wy = self.spin_taps(psis)
            made = self._forward[psis.tobytes()] = (first, np.stack([wx, wy], 2).astype(self.dtype))
        return made

    def _sources(self, psis: np.ndarray) -> tuple[np.ndarray, ...]:
        """The other way round: where each cylinder column's entries begin `(angles, columns + 1)`; their columns of the
        half-ball and their weights; and how deep the deepest of them is `(angles, columns)`."""
        made = _kept(self._backward, psis)
        if made is None:
            backs = [self.spin_matrices(float(psi))[1].tocsr() for psi in psis]
            before = np.cumsum([0, *(back.nnz for back in backs)])[:-1]
            starts = np.stack([back.indptr + n for back, n in zip(backs, before, strict=True)]).astype(np.int64)
            sources = np.concatenate([back.indices for back in backs])
            deepest = [
                np.maximum.reduceat(np.append(self._depths[back.indices], 0), back.indptr[:-1]) * (np.diff(back.indptr) > 0)
                for back in backs
            ]
            made = starts, sources.astype(np.int64), np.concatenate([back.data for back in backs]), np.stack(deepest)
            self._backward[psis.tobytes()] = made
        return made


def _kept(tables: dict[bytes, tuple], psis: np.ndarray) -> tuple | None:
    """The tables of some angles; room is made for new ones."""
    made = tables.get(psis.tobytes())
    if made is None and len(tables) >= 64:
        tables.clear()
    return made
