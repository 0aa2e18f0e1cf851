"""E-step on a device; see `vdam.posterior` for the levels and for the formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.backend.twins import SCORE_COST
from vdamkit.imaging.turns import turns_of
from vdamkit.sampling.orientations import OrientationGrid
from vdamkit.vdam.batched.dense import dense_scorer
from vdamkit.vdam.batched.engine import DeviceBatch, Engine
from vdamkit.vdam.batched.entries import Entries, Rows, most_likely
from vdamkit.vdam.search import Level


@dataclass(frozen=True)
class ShiftsThere:
    """Each particle's shifts, on the device."""

    start: Any  # (p + 1,) int32, first shift of each particle
    number: Any  # (t,) int32, in the level's table
    log_prior: Any  # (t,) see `Search.log_offset`

    @classmethod
    def of(cls, engine: Engine, batch: DeviceBatch, level: Level, entries: Entries, first: int = 0) -> ShiftsThere:
        """Those of some entries, whose first particle is number `first` of the batch."""
        search, mine = engine.search, slice(first, first + entries.n_particles)
        start, number, particle, shifts, away = engine.device.put_all(
            entries.shift_start.astype(np.int32), entries.shift.astype(np.int32), entries.shift_particle.astype(np.int32),
            search.shifts(level.fine_shifts), batch.offsets[mine] - batch.offset_priors[mine],
        )  # fmt: skip
        squares = (away[particle] + shifts[number]) ** 2
        return cls(start, number, (squares.sum(1) * (-0.5 / search.sigma_offset**2)).astype(engine.real))


@dataclass(frozen=True)
class Scored:
    """Weights (relative to the largest) of some particles' entries on a level, on the device."""

    entries: Entries
    particle: Any  # (m,) int32, of each entry
    weights: Any
    base: Any  # (m,) int64, place of each entry's first weight
    stride: int  # from one shift to the next
    start: np.ndarray  # (p + 1,) first weight of each particle
    shifts: ShiftsThere
    peak: np.ndarray  # (p,) largest log-posterior
    total: np.ndarray  # (p,) sum of weights
    best: np.ndarray  # (p,) place of the largest weight


@dataclass(frozen=True)
class Significant:
    """The samples that carry each particle's posterior: entries on the host, samples of each on the device.

    The sums over samples that the host needs are made on the device.
    """

    entries: Entries  # those with a sample, shifts numbered as in the level's table
    count: np.ndarray  # (m,) samples of each entry
    planes: np.ndarray  # (m,) different z of their shifts
    mass: np.ndarray  # (m,) their summed probability
    moment: np.ndarray  # (m,) their summed probability × log prior of the shift
    sample_start: np.ndarray  # (m,) int64
    sample_shift: Any  # numbers in the level's table
    sample_weight: Any  # probabilities
    best: np.ndarray  # (p, 3): class, orientation, shift of the largest
    pmax: np.ndarray  # (p,)
    log_evidence: np.ndarray  # (p,)


def run_search(engine: Engine, batch: DeviceBatch, start: Entries | None, tick: Callable[[float], None]) -> Significant:
    """All levels for some particles; on the first one only the entries of `start`, where that is given."""
    search = engine.search
    share = 1 / len(search.levels)
    last = len(search.levels) - 1
    kept = start
    for number, level in enumerate(search.levels):
        if number > 0:
            assert kept is not None
            kept = kept.children(search.levels[number - 1].grid)
        if kept is None:
            scored = dense_level(engine, batch, level, lambda f: tick(share * f))
        else:
            entries = kept.with_fine_shifts(engine.lines(True).order) if level.fine_shifts else kept
            scored = [ragged_level(engine, batch, level, entries, lambda f: tick(share * f))]
        parts = [_significant(engine, level, item, last=number == last) for item in scored]
        if number == last:
            return parts[0] if len(parts) == 1 else _join(engine, parts)
        kept = _stack([_refine(engine, part) for part in parts])
        tick(0.0)  # between levels a mini-batch can be paused
    raise AssertionError("unreachable")


# first level: everything, dense ------------------------------------------------------------------------------------------


def dense_level(engine: Engine, batch: DeviceBatch, level: Level, tick: Callable[[float], None]) -> Any:
    """Every admitted orientation and shift of all particles, one matrix product for as many particles as fit at a time."""
    search, xp = engine.search, engine.device.xp
    orientations, prior = _dense_prior(engine, level)
    classes, order = len(search.volumes), engine.lines(level.fine_shifts).order
    n_shifts = len(order)
    phases = engine.phases(level.radius, search.shifts(level.fine_shifts)[order])
    scorer = dense_scorer(engine, level, orientations, phases)
    masked, weight = engine.scored(batch, level.radius)
    centre = engine.put(batch.centre, np.int64)
    width = classes * len(orientations)
    at_once = engine.dense_at_once(phases.shape[1], width, n_shifts)
    for first in range(0, len(batch), at_once):
        some = slice(first, min(first + at_once, len(batch)))
        count = some.stop - some.start
        entries = Entries.everything(count, classes, orientations, order)
        scores = scorer.overlaps(masked[some]).reshape(count, n_shifts, width)
        scores += (prior[centre[some]] - scorer.energies(weight[some]))[:, None]
        shifts = ShiftsThere.of(engine, batch, level, entries, first)
        scores += shifts.log_prior.reshape(count, n_shifts)[:, :, None]
        base = (n_shifts * width * xp.arange(count, dtype=np.int64)[:, None] + xp.arange(width)).ravel()
        particle = xp.repeat(xp.arange(count, dtype=np.int32), width)
        start = n_shifts * width * np.arange(count + 1)
        yield _normalised(engine, entries, particle, scores.reshape(-1), base, width, start, shifts)
        tick(count / len(batch))


# further levels: children of what was significant ------------------------------------------------------------------------


def ragged_level(engine: Engine, batch: DeviceBatch, level: Level, entries: Entries, tick: Callable[[float], None]) -> Scored:
    """Each particle's own entries × shifts."""
    search, device, xp = engine.search, engine.device, engine.device.xp
    projector = engine.projector(level.radius)
    n = len(projector.projector.ball)
    rows = Rows.of(entries, level.grid)
    used, number = entries.shifts_in_use()
    phases = engine.phases(level.radius, search.shifts(level.fine_shifts)[used])
    prior = _entry_prior(engine, level.grid, entries, batch.centre, rows)
    shifts = ShiftsThere.of(engine, batch, level, entries)
    among = engine.put(number, np.int32)[shifts.number]  # of the phases
    masked, weight = engine.scored(batch, level.radius)
    scores = xp.empty(int(entries.out[-1]), engine.real)
    tiles = best_tile(np.diff(entries.start), entries.width, n)  # whatever the pieces: the same sums from run to run
    for piece in rows.pieces(engine.rows_at_once(n, len(rows.orientation))):
        mine = np.flatnonzero((rows.of_entry >= piece.start) & (rows.of_entry < piece.stop))
        cube = engine.cube(level.radius, int(rows.class_index[piece.start]))
        rotated = projector.rotate(cube, turns_of(level.grid, search.perturbation, rows.orientation[piece]))
        rotated[:, int(projector.place[0])] = 0  # k = 0, as above
        start = np.searchsorted(entries.particle[mine], np.arange(len(batch) + 1))
        there, *columns = device.put_all(
            mine, start.astype(np.int32), (rows.of_entry[mine] - piece.start).astype(np.int32), entries.out[:-1][mine]
        )
        for tile in np.unique(tiles).tolist():
            who = np.flatnonzero(tiles == tile)
            blocks = device.put(score_blocks(who, np.diff(start)[who], entries.width[who], tile))
            device.kernels.score(
                rotated, masked, weight, phases, blocks, *columns, prior[there], shifts.start, among, shifts.log_prior, scores,
                tile=tile,
            )  # fmt: skip
        tick((piece.stop - piece.start) / len(rows.orientation))
    start = entries.out[entries.start]
    particle, base = engine.put(entries.particle, np.int32), engine.put(entries.out[:-1], np.int64)
    return _normalised(engine, entries, particle, scores, base, 1, start, shifts)


def best_tile(entries: np.ndarray, shifts: np.ndarray, n_voxels: int) -> np.ndarray:
    """For particles with so many entries and shifts `(p,)`: the size of tiles in which they are scored soonest."""
    tiles = np.array(list(SCORE_COST))[:, None]
    each, ends = np.array(list(SCORE_COST.values())).T[:, :, None]
    cost = each * tiles**2 * (n_voxels + ends) * -(-entries // tiles) * -(-shifts // tiles)
    return tiles[cost.argmin(0), 0]


def score_blocks(particles: np.ndarray, entries: np.ndarray, shifts: np.ndarray, tile: int) -> np.ndarray:
    """The tiles of some particles with so many entries and shifts each, see `twins.score`."""
    across = -(-shifts // tile)
    count = -(-entries // tile) * across
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    entry, shift = np.divmod(number, np.repeat(across, count))
    return np.stack([np.repeat(particles, count), tile * entry, tile * shift, 0 * number], 1).astype(np.int32)


def _dense_prior(engine: Engine, level: Level) -> tuple[np.ndarray, Any]:
    """Orientations that any prior centre admits, ascending; and the log prior `(centres, classes × orientations)` on the
    device: of the class, and of the orientation after the perturbation; -inf where a centre does not admit it."""
    search, device, xp = engine.search, engine.device, engine.device.xp
    orientations, log = np.arange(len(level.grid)), xp.zeros((len(search.centres), len(level.grid)))
    if search.prior.active:
        inside = search.prior.within_cut(level.grid.rotations(0.0), search.centres, search.symmetry, device)
        orientations = np.flatnonzero(device.get(inside.any(0)))
        moved = level.grid.rotations(search.perturbation, orientations)
        distance = search.prior.distance(moved, search.centres, search.symmetry, device)
        log = xp.where(inside[:, device.put(orientations)], -0.5 * distance, -np.inf)
    of_class = engine.put(np.repeat(search.log_class, len(orientations)), np.float64)
    return orientations, (of_class + xp.tile(log, (1, len(search.volumes)))).astype(engine.real)


def _entry_prior(engine: Engine, grid: OrientationGrid, entries: Entries, centre: np.ndarray, rows: Rows) -> Any:
    """Log prior of each entry: of its class, and of its orientation after the perturbation; on the device."""
    search, device = engine.search, engine.device
    out = engine.put(search.log_class[entries.class_index], np.float64)
    if search.prior.active:
        pairs = device.put_all(rows.of_entry.astype(np.int32), centre[entries.particle].astype(np.int32))
        rotations = grid.rotations(search.perturbation, rows.orientation)
        out -= 0.5 * search.prior.pair_distance(rotations, search.centres, pairs, search.symmetry, device)
    return out.astype(engine.real)


# weights -----------------------------------------------------------------------------------------------------------------


def _normalised(
    engine: Engine, entries: Entries, particle: Any, scores: Any, base: Any, stride: int, start: np.ndarray, shifts: ShiftsThere
) -> Scored:
    device, xp, p = engine.device, engine.device.xp, entries.n_particles
    peak, total, best = xp.empty(p, np.float64), xp.empty(p, np.float64), xp.empty(p, np.int64)
    device.kernels.normalise(scores, engine.put(start, np.int64), peak, total, best)
    found = (device.get(array) for array in (peak, total, best))
    return Scored(entries, particle, scores, base, stride, start, shifts, *found)


def _significant(engine: Engine, level: Level, scored: Scored, *, last: bool) -> Significant:
    """The samples that together hold `adaptive_fraction` of the posterior; before the last level also at most so many."""
    search, device, xp = engine.search, engine.device, engine.device.xp
    entries, m = scored.entries, len(scored.particle)
    cap = 2**31 - 1 if last else search.max_significant * len(search.volumes)
    limit = xp.empty(entries.n_particles, engine.real)
    target = engine.put(search.adaptive_fraction * scored.total, np.float64)
    device.kernels.threshold(scored.weights, engine.put(scored.start, np.int64), target, cap, limit)
    shifts = scored.shifts
    z = device.put(engine.lines(level.fine_shifts).place[:, 2])[shifts.number]
    where = (scored.base, scored.stride, scored.particle, shifts.start)
    total = engine.put(scored.total, np.float64)
    (count, planes), (mass, moment) = xp.empty((2, m), np.int32), xp.empty((2, m), np.float64)
    device.kernels.entry_sums(scored.weights, *where, z, shifts.log_prior, limit, total, count, planes, mass, moment)
    end = xp.cumsum(count, dtype=np.int64)
    n, start = int(end[-1]), end - count
    sample_shift, weight = xp.empty(n, np.int32), xp.empty(n, engine.real)
    device.kernels.samples(scored.weights, *where, shifts.number, limit, total, start, sample_shift, weight)
    kept = xp.flatnonzero(count)  # few of many: only these leave the device
    parts = (device.get(array[kept]) for array in (count, planes, mass, moment, start))
    return Significant(
        entries.some(device.get(kept)), *parts, sample_shift, weight, _best(scored), 1 / scored.total,
        scored.peak + np.log(scored.total),
    )  # fmt: skip


def _best(scored: Scored) -> np.ndarray:
    """Class, orientation and shift of each particle's largest weight, `(p, 3)`."""
    entries, away = scored.entries, scored.best - scored.start[:-1]
    if scored.stride == 1:
        entry, shift = np.divmod(away, entries.width)
    else:
        shift, entry = np.divmod(away, scored.stride)
    entry = entry + entries.start[:-1]
    shift = entries.shift[entries.shift_start[:-1] + shift]
    return np.stack([entries.class_index[entry], entries.orientation[entry], shift], 1)


def _refine(engine: Engine, found: Significant) -> Entries:
    entry = np.repeat(np.arange(len(found.count)), found.count)
    shift, weight = engine.device.get(found.sample_shift), engine.device.get(found.sample_weight)
    search = engine.search
    return most_likely(found.entries, (entry, shift, weight), search.max_significant, len(search.volumes))


def _stack(parts: list[Entries]) -> Entries:
    """Entries of consecutive particles as one."""
    if len(parts) == 1:
        return parts[0]
    before = np.append(0, np.cumsum([part.n_particles for part in parts]))
    shifts = np.append(0, np.cumsum([len(part.shift) for part in parts]))
    starts = [part.shift_start[:-1] + first for part, first in zip(parts, shifts[:-1], strict=True)]
    return Entries(
        np.concatenate([part.particle + first for part, first in zip(parts, before[:-1], strict=True)]),
        np.concatenate([part.class_index for part in parts]), np.concatenate([part.orientation for part in parts]),
        np.append(np.concatenate(starts), shifts[-1]),
        np.concatenate([part.shift for part in parts]),
    )  # fmt: skip


def _join(engine: Engine, parts: list[Significant]) -> Significant:
    """Samples of consecutive particles as one."""
    xp = engine.device.xp
    before = np.append(0, np.cumsum([len(part.sample_shift) for part in parts]))
    host = {name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("count", "planes", "mass", "moment", "best", "pmax", "log_evidence")}  # fmt: skip
    return Significant(
        entries=_stack([part.entries for part in parts]),
        sample_start=np.concatenate([part.sample_start + first for part, first in zip(parts, before[:-1], strict=True)]),
        sample_shift=xp.concatenate([part.sample_shift for part in parts]),
        sample_weight=xp.concatenate([part.sample_weight for part in parts]), **host,
    )  # fmt: skip
