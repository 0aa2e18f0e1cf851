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

    What scatters adds whole numbers, so that chance has no part in the result.
    """
    search, level, xp = engine.search, engine.search.levels[-1], engine.device.xp
    projector = engine.projector(level.radius)
    ball, classes = projector.projector.ball, len(search.volumes)
    cubes = xp.zeros((classes, 2, 3, projector.projector.grid.size), np.float64)
    noise, noise_weight = _own_power(engine, batch, n_optics)
    power = np.zeros((classes, ball.n_shells))
    rows = Rows.of(found.entries, level.grid)
    used, number = found.entries.shifts_in_use()
    phases = engine.phases(level.radius, search.shifts(level.fine_shifts)[used])
    sample_shift = engine.put(number, np.int32)[found.sample_shift]
    for piece in rows.pieces(engine.rows_at_once(len(ball))):
        k = int(rows.class_index[piece.start])
        turns = turns_of(level.grid, search.perturbation, rows.orientation[piece])
        rotated = projector.rotate(engine.cube(level.radius, k), turns)
        gradient, total = _residuals(engine, batch, found, rows, piece, rotated, phases, sample_shift, noise)
        information = ((total[0] + total[1]) * (rotated.real**2 + rotated.imag**2)).sum(0, dtype=np.float64)
        power[k] += projector.shell_sums(information)
        projector.scatter(turns, gradient, xp.maximum(total, 0), cubes[k])
        tick((piece.stop - piece.start) / len(rows.orientation))
    class_weight, direction_weight = _class_sums(engine, found, coarse)
    offset2 = -2 * search.sigma_offset**2 * float(found.moment.sum())
    return Sums(cubes.astype(engine.real), noise, noise_weight, class_weight, direction_weight, offset2, power)


def _residuals(
    engine: Engine, batch: DeviceBatch, found: Significant, rows: Rows, piece: slice, rotated: Any, phases: Any,
    sample_shift: Any, noise: np.ndarray,
) -> tuple[Any, Any]:  # fmt: skip
    """Residuals and weights of a piece's rotations, `(2, rows, n)` by half; its part of `noise` is added there."""
    device, xp, real = engine.device, engine.device.xp, engine.real
    n_rows, n = rotated.shape
    gradient, total = xp.zeros((2, n_rows, n), rotated.dtype), xp.zeros((2, n_rows, n), real)
    mine = np.flatnonzero((rows.of_entry >= piece.start) & (rows.of_entry < piece.stop))
    mine = mine[np.argsort(rows.of_entry[mine], kind="stable")]
    optics = batch.optics[found.entries.particle[mine]]
    half = engine.put(batch.index % 2, np.int32)  # pseudo-half: parity in the file, for good
    projector = engine.projector(engine.search.levels[-1].radius)
    for group in np.unique(optics):
        some = mine[optics == group]
        start = np.searchsorted(rows.of_entry[some] - piece.start, np.arange(n_rows + 1))
        residual = xp.zeros((n_rows, n), real)
        device.kernels.row_sums(
            rotated, phases, engine.put(start, np.int32), engine.put(found.entries.particle[some], np.int32),
            engine.put(found.sample_start[some], np.int64), engine.put(found.count[some], np.int32),
            engine.put(found.mass[some], real), sample_shift, found.sample_weight, batch.unmasked, batch.weight, batch.raw,
            batch.raw_weight, half, gradient, total, residual,
        )  # fmt: skip
        noise[group] += projector.shell_sums(residual.sum(0, dtype=np.float64) * projector.friedel)
    return gradient, total


def _own_power(engine: Engine, batch: DeviceBatch, n_optics: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ |b'|² and Σ w' per optics group and shell."""
    projector = engine.projector(engine.search.levels[-1].radius)
    power, weight = np.zeros((2, n_optics, projector.projector.ball.n_shells))
    for group in np.unique(batch.optics):
        some = engine.put(np.flatnonzero(batch.optics == group), np.int64)
        raw = batch.raw[some]
        own = (raw.real**2 + raw.imag**2).sum(0, dtype=np.float64)
        power[group] = projector.shell_sums(own * projector.friedel)
        weight[group] = projector.shell_sums(batch.raw_weight[some].sum(0, dtype=np.float64) * projector.friedel)
    return power, weight


def _class_sums(engine: Engine, found: Significant, coarse: OrientationGrid) -> tuple[np.ndarray, np.ndarray]:
    grid, classes = engine.search.levels[-1].grid, len(engine.search.volumes)
    direction = found.entries.orientation // grid.n_psi // (grid.n_directions // coarse.n_directions)
    key = found.entries.class_index * coarse.n_directions + direction
    by_direction = np.bincount(key, found.mass, classes * coarse.n_directions).reshape(classes, coarse.n_directions)
    return np.bincount(found.entries.class_index, found.mass, classes), by_direction
