"""M-step sums on a device; see `vdam.accumulate` for what is summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.imaging.device_projector import DeviceProjector
from vdamkit.imaging.turns import turns_of
from vdamkit.vdam.accumulate import Sums
from vdamkit.vdam.batched.engine import DeviceBatch, Engine
from vdamkit.vdam.batched.entries import Rows
from vdamkit.vdam.batched.posterior import Significant

RUN = 32  # particles whose power one block of threads adds up
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
    power = _own_power(engine, batch, n_optics)
    cubes = xp.zeros((classes, 2, 3, projector.projector.grid.size), np.float64)
    rows = Rows.of(found.entries, level.grid)
    members = Members.of(engine, batch, found, rows)
    # a row takes twelve numbers a voxel (`rows_at_once`), and its planes two a column
    size = 1 + members.planes_of_row * len(projector.disc) / (6 * len(ball))
    for piece in rows.pieces(engine.rows_at_once(len(ball), size.sum()), size):
        k = int(rows.class_index[piece.start])
        turns = turns_of(level.grid, search.perturbation, rows.orientation[piece])
        rotated = projector.rotate(engine.cube(level.radius, k), turns)
        sums = members.sums(piece, rotated, n_optics)
        engine.device.kernels.column_sums(sums.noise, power[0])
        projector.scatter(turns, sums.gradient, sums.total, cubes[k])
        tick((piece.stop - piece.start) / len(rows.orientation))
    noise, noise_weight = projector.shell_sums(power)
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
    """The entries of some particles sorted by row, on the device as the kernels take them."""

    engine: Engine
    batch: DeviceBatch
    projector: DeviceProjector
    first: np.ndarray  # (r + 1,) number of each row's first member, on the host
    first_plane: np.ndarray  # (m + 1,) and of each member's first plane, likewise
    waves: Any  # see twins.wave_planes
    lines: Any
    row_start: Any  # `first` and `first_plane` there
    plane_start: Any
    columns: tuple  # of each: particle, optics group, summed weight
    samples: tuple  # start, count, shifts, weights
    half: Any  # (p,) pseudo-half of each particle

    @classmethod
    def of(cls, engine: Engine, batch: DeviceBatch, found: Significant, rows: Rows) -> Members:
        """Those that the search found significant; `rows`: the rotations among them, of which each entry's row is taken."""
        level = engine.search.levels[-1]
        lines = engine.lines(level.fine_shifts)
        order = np.argsort(rows.of_entry.astype(np.min_scalar_type(len(rows.orientation))), kind="stable")
        particle = found.entries.particle[order]
        first = np.append(0, np.cumsum(np.bincount(rows.of_entry, minlength=len(rows.orientation)))).astype(np.int32)
        first_plane = np.append(0, np.cumsum(found.planes[order])).astype(np.int32)
        row_start, plane_start, place, half, who, optics, mass, start, count = engine.device.put_all(
            first, first_plane, lines.place, (batch.index % 2).astype(np.int32),  # parity in the file, for good
            particle.astype(np.int32), batch.optics[particle].astype(np.int32), found.mass[order].astype(engine.real),
            found.sample_start[order], found.count[order],
        )  # fmt: skip
        return cls(
            engine, batch, engine.projector(level.radius), first, first_plane, engine.waves(level.radius, lines.values), place,
            row_start, plane_start, (who, optics, mass), (start, count, found.sample_shift, found.sample_weight), half,
        )  # fmt: skip

    @property
    def planes_of_row(self) -> np.ndarray:
        """How many planes the members of each row have, `(r,)`."""
        return np.diff(self.first_plane[self.first])

    def sums(self, piece: slice, rotated: Any, n_optics: int) -> RowSums:
        """Sums over the members of a piece's rows, whose rotations are `rotated` `(rows, n)`."""
        kernels, xp, real = self.engine.device.kernels, self.engine.device.xp, self.engine.real
        batch, tables, (n_rows, n) = self.batch, self.projector, rotated.shape
        begin, end = self.first[[piece.start, piece.stop]].tolist()
        planes = xp.empty((int(self.first_plane[end] - self.first_plane[begin]), len(tables.disc)), rotated.dtype)
        plane_z = xp.empty(len(planes), np.int32)
        kernels.wave_planes(
            self.waves, self.lines, tables.disc, *self.samples, self.plane_start, planes, plane_z,
            first=begin, members=end - begin,
        )  # fmt: skip
        rows_at_once = max(ROWS, -(-n_optics // 4))  # of which sums of noise take no more memory than residuals
        out = RowSums(
            xp.empty((2, n_rows, n), rotated.dtype), xp.empty((2, n_rows, n), real),
            xp.zeros((-(-n_rows // rows_at_once), n_optics, n), real),
        )  # fmt: skip
        kernels.row_sums(
            rotated, self.waves, tables.pair, self.row_start[piece.start : piece.stop + 1], *self.columns, self.plane_start,
            planes, plane_z, batch.unmasked, batch.weight, batch.raw, batch.raw_weight, self.half, out.gradient, out.total,
            out.noise, rows_at_once=rows_at_once,
        )  # fmt: skip
        return out


def _own_power(engine: Engine, batch: DeviceBatch, n_optics: int) -> Any:
    """Σ |b'|² and Σ w' over each optics group's particles, `(2, G, n)` float64 on the device."""
    device, n = engine.device, batch.raw.shape[1]
    order = np.argsort(batch.optics, kind="stable")
    groups, first = np.unique(batch.optics[order], return_index=True)
    ends = [*first[1:], len(order)]
    runs = np.concatenate([np.arange(begin, end, RUN) for begin, end in zip(first, ends, strict=True)])
    particle, start = device.put_all(order.astype(np.int32), np.append(runs, len(order)).astype(np.int32))
    parts, sums = device.xp.empty((len(runs), 2, n), engine.real), device.xp.zeros((n_optics, 2, n))
    device.kernels.own_power(batch.raw, batch.raw_weight, particle, start, parts)
    for group, *some in zip(groups.tolist(), np.searchsorted(runs, first), np.searchsorted(runs, ends), strict=True):
        device.kernels.column_sums(parts[slice(*some)], sums[group])
    return sums.swapaxes(0, 1).copy()
