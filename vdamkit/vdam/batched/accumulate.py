"""M-step sums on a device; see `vdam.accumulate` for what is summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.vdam.accumulate import Sums
from vdamkit.vdam.batched.engine import DeviceBatch, Engine
from vdamkit.vdam.batched.entries import Rows, turns_of
from vdamkit.vdam.batched.posterior import Significant

ROWS = 2  # that one block of threads takes one after the other: few, so that what blocks share stays in the cache


def accumulate(
    engine: Engine, batch: DeviceBatch, found: Significant, n_optics: int, tick: Callable[[float], None]
) -> Sums:  # fmt: skip
    """All sums of some particles; the cubes stay on the device.

    No sum is formed in an order that chance decides.
    """
    search, level, xp = engine.search, engine.search.levels[-1], engine.device.xp
    projector = engine.projector(level.radius)
    ball, classes = projector.projector.ball, len(search.volumes)
    cubes = xp.zeros((classes, 2, 3, projector.projector.grid.size), np.float64)
    residual = xp.zeros((n_optics, len(projector.order)))
    rows = Rows.of(found.entries, level.grid)
    members = Members.of(engine, batch, found, rows)
    for piece in rows.pieces(engine.rows_at_once(len(ball))):
        k = int(rows.class_index[piece.start])
        turns = turns_of(level.grid, search.perturbation, rows.orientation[piece])
        rotated = projector.rotate(engine.cube(level.radius, k), turns)
        sums = members.sums(piece, rotated, n_optics)
        residual += sums.noise.sum(0, dtype=np.float64)
        projector.scatter(turns, sums.gradient, sums.total, cubes[k])
        tick((piece.stop - piece.start) / len(rows.orientation))
    own, weight = _own_power(engine, batch, n_optics)
    noise, noise_weight = np.split(projector.shell_sums(xp.concatenate([own + residual, weight]) * projector.friedel), 2)
    class_weight = np.bincount(found.entries.class_index, found.mass, classes)
    offset2 = -2 * search.sigma_offset**2 * float(found.moment.sum())
    return Sums(cubes.astype(engine.real), noise, noise_weight, class_weight, offset2)


@dataclass(frozen=True)
class RowSums:
    """What :func:`vdamkit.backend.twins.row_sums` makes of some rows."""

    gradient: Any  # (2, rows, n) complex residuals, by half
    total: Any  # (2, rows, n) weights
    noise: Any  # (blocks, G, n), to be added up over blocks of rows


@dataclass(frozen=True)
class Members:
    """The entries of some particles sorted by row, as the kernel takes them."""

    engine: Engine
    batch: DeviceBatch
    row: np.ndarray  # (m,) ascending
    columns: tuple  # on the device, of each: particle, optics group, range of samples (start, count), summed weight
    samples: tuple  # shift (number in `phases`) and weight of each sample
    phases: Any  # (shifts, n)
    half: Any  # (p,) pseudo-half of each particle

    @classmethod
    def of(cls, engine: Engine, batch: DeviceBatch, found: Significant, rows: Rows) -> Members:
        """Those that the search found significant; `rows`: the rotations among them, of which each entry's row is taken."""
        search, put = engine.search, engine.put
        order = np.argsort(rows.of_entry, kind="stable")
        particle = found.entries.particle[order]
        columns = (
            put(particle, np.int32), put(batch.optics[particle], np.int32), put(found.sample_start[order], np.int64),
            put(found.count[order], np.int32), put(found.mass[order], engine.real),
        )  # fmt: skip
        level = search.levels[-1]
        used, number = found.entries.shifts_in_use()
        phases = engine.phases(level.radius, search.shifts(level.fine_shifts)[used])
        samples = (put(number, np.int32)[found.sample_shift], found.sample_weight)
        half = put(batch.index % 2, np.int32)  # parity in the file, for good
        return cls(engine, batch, rows.of_entry[order], columns, samples, phases, half)

    def sums(self, piece: slice, rotated: Any, n_optics: int) -> RowSums:
        """Sums over the members of a piece's rows, whose rotations are `rotated` `(rows, n)`."""
        device, real, batch = self.engine.device, self.engine.real, self.batch
        xp, (n_rows, n) = device.xp, rotated.shape
        rows_at_once = max(ROWS, -(-n_optics // 4))  # of which sums of noise take no more memory than residuals
        blocks = -(-n_rows // rows_at_once)
        out = RowSums(
            xp.empty((2, n_rows, n), rotated.dtype), xp.empty((2, n_rows, n), real), xp.zeros((blocks, n_optics, n), real)
        )  # fmt: skip
        start = self.engine.put(np.searchsorted(self.row, np.arange(piece.start, piece.stop + 1)), np.int32)
        device.kernels.row_sums(
            rotated, self.phases, start, *self.columns, *self.samples, batch.unmasked, batch.weight, batch.raw,
            batch.raw_weight, self.half, out.gradient, out.total, out.noise, rows_at_once=rows_at_once,
        )  # fmt: skip
        return out


def _own_power(engine: Engine, batch: DeviceBatch, n_optics: int) -> tuple[Any, Any]:
    """Σ |b'|² and Σ w' over each optics group's particles, `(G, n)` float64 on the device."""
    power, weight = (engine.device.xp.zeros((n_optics, batch.raw.shape[1])) for _ in range(2))
    own = batch.raw.real**2 + batch.raw.imag**2
    for group in np.unique(batch.optics).tolist():
        mine = engine.put(np.flatnonzero(batch.optics == group), np.int64)
        power[group] = own[mine].sum(0, dtype=np.float64)
        weight[group] = batch.raw_weight[mine].sum(0, dtype=np.float64)
    return power, weight
