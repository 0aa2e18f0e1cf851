"""Coarse scores on a device, as `vdam.dense` makes them, of many particles at once; ordered by particle, shift and rotation."""

from __future__ import annotations

from typing import Any

import numpy as np

from vdamkit.imaging.turns import turns_of
from vdamkit.vdam.batched.engine import Engine
from vdamkit.vdam.dense import before_half_turns, interleaved
from vdamkit.vdam.search import Level


class RowByRow:
    """Every rotated reference with every moved image.

    rows: A `(R, n)` complex, 0 at k = 0, in the device's order. phases: of the shifts, `(S, n)` complex.
    """

    def __init__(self, engine: Engine, rows: Any, phases: Any):
        self._engine, self._rows, self._phases = engine, rows, phases
        self._energy = 0.5 * (rows.real**2 + rows.imag**2)

    def overlaps(self, images: Any) -> Any:
        """``Re Σ conj(A) b e^{…}`` of images b `(p, n)` complex: `(p S, R)` real."""
        moved = (images[:, None] * self._phases).reshape(-1, images.shape[1])
        return product(self._engine, moved, self._rows)

    def energies(self, weight: Any) -> Any:
        """``½ Σ w |A|²`` of weights w `(p, n)` real: `(p, R)`."""
        return self._engine.device.matmul(weight, self._energy)


class ByHalfTurns:
    """The same in half the operations: see `vdam.dense.ByHalfTurns`.

    rows: A at the first half of the angles psi of all directions. n_angles: of these in a direction. Otherwise as above.
    """

    def __init__(self, engine: Engine, radius: int, rows: Any, n_angles: int, phases: Any):
        self._engine, self._n_angles, self._phases = engine, n_angles, phases
        self._projector = engine.projector(radius)
        pairs = self._projector.pairs
        self._once = np.stack([pairs[0], np.where(pairs[1] == pairs[0], -1, pairs[1])])  # a voxel on the axis counts once
        self._pairs = engine.put(self._once, np.int32)
        parts = self._of_pairs(rows, pairs)
        self._rows = [0.5 * part for part in sum_and_difference(parts)]
        self._energy = [0.25 * part for part in sum_and_difference(parts.real**2 + parts.imag**2)]

    def overlaps(self, images: Any) -> Any:
        """As :meth:`RowByRow.overlaps`."""
        device = self._engine.device
        shape = (len(images) * len(self._phases), self._pairs.shape[1])
        even, odd = device.xp.empty(shape, images.dtype), device.xp.empty(shape, images.dtype)
        device.kernels.moved_pairs(images, self._phases, self._pairs, even, odd)
        return self._both(*(product(self._engine, moved, rows) for moved, rows in zip((even, odd), self._rows, strict=True)))

    def energies(self, weight: Any) -> Any:
        """As :meth:`RowByRow.energies`."""
        parts = sum_and_difference(self._of_pairs(weight, self._once))
        return self._both(*(self._engine.device.matmul(w, energy) for w, energy in zip(parts, self._energy, strict=True)))

    def _of_pairs(self, values: Any, pairs: np.ndarray) -> Any:
        """Values `(m, n)` of voxels by pairs, `(m, 2, pairs)`."""
        return self._projector.columns_of(values, np.arange(len(values)), pairs.ravel()).reshape(len(values), *pairs.shape)

    def _both(self, even: Any, odd: Any) -> Any:
        """Scores before and after the half turn, from their common parts `(m, R/2)`: `(m, R)`."""
        even, odd = (part.reshape(len(part), -1, self._n_angles) for part in (even, odd))
        xp, (m, directions, angles) = self._engine.device.xp, even.shape
        out = xp.empty((m, directions, 2, angles), even.dtype)
        xp.add(even, odd, out=out[:, :, 0])
        xp.subtract(even, odd, out=out[:, :, 1])
        return out.reshape(m, -1)


def sum_and_difference(parts: Any) -> tuple[Any, Any]:
    """Of the two voxels of pairs `(m, 2, pairs)`."""
    return parts[:, 0] + parts[:, 1], parts[:, 0] - parts[:, 1]


def product(engine: Engine, moved: Any, rows: Any) -> Any:
    """``Re Σ b conj(A)`` of all pairs of moved images `(m, n)` and references `(R, n)`: `(m, R)` real."""
    return engine.device.matmul(interleaved(moved, engine.real), interleaved(rows, engine.real), tf32=engine.tf32)


def dense_scorer(engine: Engine, level: Level, orientations: np.ndarray, phases: Any) -> RowByRow | ByHalfTurns:
    """What scores the ascending `orientations` of a level's grid, all of one class after all of another."""
    search, projector = engine.search, engine.projector(level.radius)
    first_half = before_half_turns(level.grid, orientations)
    turns = turns_of(level.grid, search.perturbation, orientations if first_half is None else first_half)
    cubes = [engine.cube(level.radius, k) for k in range(len(search.volumes))]
    rows = engine.device.xp.concatenate([projector.rotate(cube, turns) for cube in cubes])
    rows[:, int(projector.place[0])] = 0  # k = 0, as in `vdam.dense.scored_energy`
    if first_half is None:
        return RowByRow(engine, rows, phases)
    return ByHalfTurns(engine, level.radius, rows, level.grid.n_psi // 2, phases)
