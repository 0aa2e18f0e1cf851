"""M-step sums on a device; see `vdam.accumulate` for what is summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vdamkit.sampling.orientations import OrientationGrid
from vdamkit.vdam.accumulate import Sums
from vdamkit.vdam.batched.engine import DeviceBatch, Engine
from vdamkit.vdam.batched.entries import Rows, turns_of
from vdamkit.vdam.batched.posterior import Significant


def accumulate(
    engine: Engine,
    batch: DeviceBatch,
    found: Significant,
    n_optics: int,
    coarse: OrientationGrid,
    tick: Callable[[float], None],
) -> Sums:
    """All sums of some particles; the cubes stay on the device.

    No sum is formed in an order that chance decides.
    """
    search, level, xp = engine.search, engine.search.levels[-1], engine.device.xp
    projector = engine.projector(level.radius)
    ball, classes = projector.projector.ball, len(search.volumes)
    cubes = xp.zeros((classes, 2, 3, projector.projector.grid.size), np.float64)
    information, residual = xp.zeros((classes, len(projector.order))), xp.zeros((n_optics, len(projector.order)))
    rows = Rows.of(found.entries, level.grid)
    used, number = found.entries.shifts_in_use()
    phases = engine.phases(level.radius, search.shifts(level.fine_shifts)[used])
    members = Members(engine, batch, found, rows, engine.put(number, np.int32)[found.sample_shift])
    for piece in rows.pieces(engine.rows_at_once(len(ball))):
        k = int(rows.class_index[piece.start])
        turns = turns_of(level.grid, search.perturbation, rows.orientation[piece])
        rotated = projector.rotate(engine.cube(level.radius, k), turns)
        gradient, total = members.residuals(piece, rotated, phases, residual)
        information[k] += ((total[0] + total[1]) * (rotated.real**2 + rotated.imag**2)).sum(0, dtype=np.float64)
        projector.scatter(turns, gradient, xp.maximum(total, 0), cubes[k])
        tick((piece.stop - piece.start) / len(rows.orientation))
    power = projector.shell_sums(information)
    noise, noise_weight = _own_power(engine, batch, n_optics)
    noise = noise + projector.shell_sums(residual * projector.friedel)
    class_weight, direction_weight = _class_sums(engine, found, coarse)
    offset2 = -2 * search.sigma_offset**2 * float(found.moment.sum())
    return Sums(cubes.astype(engine.real), noise, noise_weight, class_weight, direction_weight, offset2, power)


class Members:
    """The entries of a mini-batch by optics group and, within one, by row: as the kernel takes them, once on the device."""

    def __init__(self, engine: Engine, batch: DeviceBatch, found: Significant, rows: Rows, sample_shift: Any):
        self.engine, self.batch, self.found, self.sample_shift = engine, batch, found, sample_shift
        optics = batch.optics[found.entries.particle]
        order = np.lexsort((rows.of_entry, optics))
        self._row, optics = rows.of_entry[order], optics[order]
        self._groups = [(int(g), *np.searchsorted(optics, (g, g + 1)).tolist()) for g in np.unique(optics)]
        columns = (
            (found.entries.particle, np.int32),
            (found.sample_start, np.int64),
            (found.count, np.int32),
            (found.mass, engine.real),
        )
        self._columns = [engine.put(column[order], kind) for column, kind in columns]
        self._half = engine.put(batch.index % 2, np.int32)  # pseudo-half: parity in the file, for good

    def residuals(self, piece: slice, rotated: Any, phases: Any, noise: Any) -> tuple[Any, Any]:
        """Residuals and weights of a piece's rotations, `(2, rows, n)` by half; its part of `noise` `(G, n)` is added there."""
        device, xp, real = self.engine.device, self.engine.device.xp, self.engine.real
        batch, (n_rows, n) = self.batch, rotated.shape
        gradient, total = xp.zeros((2, n_rows, n), rotated.dtype), xp.zeros((2, n_rows, n), real)
        starts = np.stack([np.searchsorted(self._row[a:b], np.arange(piece.start, piece.stop + 1)) for _, a, b in self._groups])
        for (group, a, b), start in zip(self._groups, self.engine.put(starts, np.int32), strict=True):
            residual = xp.zeros((n_rows, n), real)
            device.kernels.row_sums(
                rotated, phases, start, *(column[a:b] for column in self._columns), self.sample_shift,
                self.found.sample_weight, batch.unmasked, batch.weight, batch.raw, batch.raw_weight, self._half,
                gradient, total, residual,
            )  # fmt: skip
            noise[group] += residual.sum(0, dtype=np.float64)
        return gradient, total


def _own_power(engine: Engine, batch: DeviceBatch, n_optics: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ |b'|² and Σ w' per optics group and shell."""
    projector, xp = engine.projector(engine.search.levels[-1].radius), engine.device.xp
    power, weight = xp.zeros((2, n_optics, len(projector.order)))
    for group in np.unique(batch.optics):
        some = engine.put(np.flatnonzero(batch.optics == group), np.int64)
        raw = batch.raw[some]
        power[group] = (raw.real**2 + raw.imag**2).sum(0, dtype=np.float64)
        weight[group] = batch.raw_weight[some].sum(0, dtype=np.float64)
    return projector.shell_sums(power * projector.friedel), projector.shell_sums(weight * projector.friedel)


def _class_sums(engine: Engine, found: Significant, coarse: OrientationGrid) -> tuple[np.ndarray, np.ndarray]:
    grid, classes = engine.search.levels[-1].grid, len(engine.search.volumes)
    direction = found.entries.orientation // grid.n_psi // (grid.n_directions // coarse.n_directions)
    key = found.entries.class_index * coarse.n_directions + direction
    by_direction = np.bincount(key, found.mass, classes * coarse.n_directions).reshape(classes, coarse.n_directions)
    return np.bincount(found.entries.class_index, found.mass, classes), by_direction
