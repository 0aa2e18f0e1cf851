"""E-step: the posterior of every particle over class × rotation × shift.

The likelihood is that of white noise on the half-ball (see `imaging.convert` for b and w):

    log L(φ, t) = Re Σ_k conj(A_φ(k)) b(k) e^{−2πi k·t/N} − ½ Σ_k w(k) |A_φ(k)|² + const

It is evaluated by levels. The first scores every admitted coarse orientation and shift of all particles as one matrix
product per chunk. Each further level scores the eight children of what was significant to each particle; rotations are
shared by all particles, and products by those that have most of them in common. Source of the scheme: RELION
ml_optimiser.cpp:getAllSquaredDifferences, convertAllSquaredDifferencesToWeights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from vdamkit.imaging.turns import turns_of
from vdamkit.sampling.orientations import OrientationGrid
from vdamkit.vdam import finer
from vdamkit.vdam.dense import dense_scorer
from vdamkit.vdam.search import Batch, Block, Candidates, Level, Posterior, Search

CHUNK_BYTES = 24 * 2**20  # of one worker's score chunk
PAIRS = 1  # orientations × shifts that may be refined, as a multiple of `max_significant`
ROWS_PER_GROUP = 768  # rotations that one worker holds at a time


# first level: everything, dense -------------------------------------------------------------------------------------


def first_level(search: Search, batch: Batch, orientations: np.ndarray, tick: Callable[[float], None]) -> list:
    """Score the admitted coarse `orientations` (ascending) of every class; candidates or posterior per particle."""
    level = search.levels[0]
    last = len(search.levels) == 1
    projector = search.projector(level.radius)
    n, real = len(projector.ball), projector.dtype
    shifts = np.arange(len(search.shifts(level.fine_shifts)))
    phases = search.phases(level.radius, level.fine_shifts, shifts)
    rotate = partial(_rotated_references, search, level)
    scorer = dense_scorer(rotate, level.grid, orientations, level.radius, phases)
    classes = len(search.volumes)
    log_prior = search.log_prior(level.grid, orientations) + _admission(search, level.grid, orientations)
    log_rows = (log_prior[:, None] + search.log_class[None, :, None]).reshape(len(log_prior), -1)

    per_chunk = max(1, min(16, CHUNK_BYTES // (scorer.n_rows * len(shifts) * real.itemsize)))
    per_chunk = min(per_chunk, max(1, CHUNK_BYTES // (len(shifts) * n * 2 * real.itemsize)))
    n_chunks = -(-len(batch.index) // per_chunk)
    n_chunks = min(len(batch.index), -(-n_chunks // 4) * 4)  # even pieces, so many that two or four workers end together
    chunks = np.array_split(np.arange(len(batch.index)), n_chunks)

    def score(chunk: np.ndarray) -> list:
        """What is left in play of each of some particles: every row and shift scored, priors added, and concluded."""
        scores = scorer.scores(batch.masked[chunk][:, :n], batch.weight[chunk][:, :n])
        out = []
        for j, i in enumerate(chunk):
            log_shift = search.log_offset(batch, i, level.fine_shifts, shifts)
            total = scores[:, j] + log_rows[batch.centre[i]].astype(real)[:, None] + log_shift.astype(real)
            blocks = [
                Block((k, 0), k, orientations, total[k * len(orientations) : (k + 1) * len(orientations)])
                for k in range(classes)
            ]
            out.append(_conclude(search, level.grid, blocks, shifts, last))
        tick(len(chunk) / len(batch.index))
        return out

    return [item for part in search.backend.map(score, chunks) for item in part]


def _rotated_references(
    search: Search, level: Level, orientations: np.ndarray, parts_of: Callable[[Any], tuple[Any, ...]]
) -> list[Any]:  # fmt: skip
    """Parts of the references of all classes, one after the other, at ascending `orientations`."""
    projector, prepared = search.projector(level.radius), search.prepared(level.radius)
    cuts = np.flatnonzero(np.diff(orientations // level.grid.n_psi)) + 1  # whole directions, a few for each worker
    cuts = np.append(np.append(0, cuts)[::2], len(orientations))
    jobs = [(reference, slice(*ends)) for reference in prepared for ends in pairwise(cuts.tolist())]

    def parts(job: tuple[Any, slice]) -> tuple[Any, ...]:
        return parts_of(projector.rotate_rows(job[0], turns_of(level.grid, search.perturbation, orientations[job[1]])))

    return [np.concatenate(some) for some in zip(*search.backend.map(parts, jobs), strict=True)]


def admitted_orientations(search: Search, grid: OrientationGrid) -> np.ndarray:
    """Coarse orientations that the prior of any particle admits, ascending."""
    return np.flatnonzero(np.isfinite(_admission(search, grid, np.arange(len(grid)))).any(0))


def _admission(search: Search, grid: OrientationGrid, orientations: np.ndarray) -> np.ndarray:
    """0 where a prior centre admits a coarse orientation, else -inf; `(centres, rows)`."""
    if not search.prior.active:
        return np.zeros((len(search.centres), len(orientations)))
    inside = search.prior.within_cut(grid.rotations(0.0, orientations), search.centres, search.symmetry)
    return np.where(inside, 0.0, -np.inf)


# further levels: children of what was significant ------------------------------------------------------------------


def next_level(search: Search, batch: Batch, number: int, candidates: list[Candidates], tick: Callable[[float], None]) -> list:
    """Score each particle's candidate orientations (of this level's grid) × shifts; as :func:`first_level`."""
    level = search.levels[number]
    last = number == len(search.levels) - 1
    members = _by_group(level.grid, candidates)
    shifts = [_level_shifts(candidate.shifts, level.fine_shifts) for candidate in candidates]
    phases = search.phases(level.radius, level.fine_shifts, np.unique(np.concatenate(shifts)))

    def score(key: tuple[int, int]) -> list[tuple[int, Block]]:
        out = _score_group(search, batch, level, key, members[key], phases, shifts)
        tick(1 / len(members))
        return out

    def size(key: tuple[int, int]) -> int:
        return sum(len(mine) * len(shifts[i]) for i, mine in members[key])

    blocks: list[list[Block]] = [[] for _ in candidates]
    for scored in search.backend.map(score, sorted(members), size=size):
        for i, block in scored:
            blocks[i].append(block)
    return search.backend.map(
        lambda i: _conclude(search, level.grid, blocks[i], shifts[i], last), range(len(candidates)), at_once=8
    )


def _by_group(grid: OrientationGrid, candidates: list[Candidates]) -> dict[tuple[int, int], list[tuple[int, np.ndarray]]]:
    """By class and group of directions: the particles that have candidates there, and their orientations, ascending."""
    per_group = directions_per_group(grid) * grid.n_psi
    n_groups = -(-len(grid) // per_group)
    number = np.repeat(np.arange(len(candidates)), [len(candidate.orientations) for candidate in candidates])
    classes, orientations = (
        np.concatenate([getattr(candidate, name) for candidate in candidates]) for name in ("classes", "orientations")
    )
    owner = (classes * n_groups + orientations // per_group) * len(candidates) + number
    order = np.lexsort((orientations, owner))
    owner, orientations = owner[order], orientations[order]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    members: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
    for key, mine in zip(owner[first].tolist(), np.split(orientations, first[1:]), strict=True):
        group, i = divmod(key, len(candidates))
        members.setdefault(divmod(group, n_groups), []).append((i, mine))
    return members


def directions_per_group(grid: OrientationGrid) -> int:
    """How many directions one worker takes at a time: by shape alone, whole families of four."""
    by_rows = max(1, ROWS_PER_GROUP // (4 * grid.n_psi))
    by_share = max(1, grid.n_directions // 4 // 8)
    return 4 * min(by_rows, by_share)


def _level_shifts(coarse: np.ndarray, fine: bool) -> np.ndarray:
    return (8 * coarse[:, None] + np.arange(8)).ravel() if fine else coarse


def _score_group(search: Search, batch: Batch, level: Level, key: tuple, members: list, phases: Any, shifts: list) -> list:
    k = key[0]
    projector = search.projector(level.radius)
    real = projector.dtype
    union = np.unique(np.concatenate([mine for _, mine in members]))
    rows = projector.rotate_rows(search.prepared(level.radius)[k], turns_of(level.grid, search.perturbation, union))
    if level is search.levels[-1]:
        search.keep(key, union, rows)
    log_rows = search.log_prior(level.grid, union) + search.log_class[k]
    at = [np.searchsorted(union, mine) for _, mine in members]
    particles = [i for i, _ in members]
    its = [shifts[i] for i in particles]
    score = finer.scores
    if projector.compiled:
        from vdamkit.vdam.finer_compiled import scores as score
    found = score(rows, at, phases, its, batch.masked, batch.weight, particles)
    for (i, _), places, some, scores in zip(members, at, its, found, strict=True):
        scores += log_rows[batch.centre[i], places].astype(real)[:, None]
        scores += search.log_offset(batch, i, level.fine_shifts, some).astype(real)
    return [(i, Block(key, k, mine, scores)) for (i, mine), scores in zip(members, found, strict=True)]


# weights ------------------------------------------------------------------------------------------------------------


def _conclude(search: Search, grid: OrientationGrid, blocks: list[Block], shifts: np.ndarray, last: bool) -> Any:
    """Normalise one particle's scores: candidates on the grid of the next level, or the posterior on the last."""
    flat = blocks[0].scores.ravel() if len(blocks) == 1 else np.concatenate([block.scores.ravel() for block in blocks])
    peak = float(flat.max())
    flat -= peak
    np.exp(flat, out=flat)
    total = float(flat.sum(dtype=np.float64))
    if not last:
        return children(grid, _candidates(search, blocks, flat, shifts, total))
    top = _top(flat, search.adaptive_fraction * total, len(flat))
    threshold = flat[top[-1]]
    posterior = Posterior([], shifts, peak + np.log(total), n_significant=len(top))
    ends = np.cumsum([0, *(block.scores.size for block in blocks)])
    for number in np.unique(np.searchsorted(ends, np.flatnonzero(flat >= threshold), side="right") - 1):
        block = blocks[number]
        mine = flat[ends[number] : ends[number + 1]].reshape(block.scores.shape)
        weights = np.where(mine >= threshold, mine / total, 0)
        rows = weights.any(1)
        kept = Block(block.group, block.class_index, block.orientations[rows], weights[rows])
        posterior.blocks.append(kept)
        at = np.unravel_index(kept.scores.argmax(), kept.scores.shape)
        if kept.scores[at] > posterior.pmax:
            posterior.pmax = float(kept.scores[at])
            posterior.best = (block.class_index, int(kept.orientations[at[0]]), int(at[1]))
    return posterior


def _top(weights: np.ndarray, target: float, cap: int) -> np.ndarray:
    """Indices of the largest weights (the peak is 1) that together reach `target`, largest first; at most `cap`."""
    for floor in (1e-3, 1e-6, -1.0):
        some = np.flatnonzero(weights > floor)
        top = some[np.argsort(-weights[some], kind="stable")] if len(some) <= 4 * cap or floor < 0 else some
        if len(top) > cap:
            best = some[np.argpartition(-weights[some], cap - 1)[:cap]]
            top = best[np.argsort(-weights[best], kind="stable")]
        cumulative = np.cumsum(weights[top], dtype=np.float64)
        if cumulative[-1] >= target or len(top) == cap or floor < 0:
            return top[: min(int(np.searchsorted(cumulative, target)) + 1, len(top))]
    raise AssertionError("unreachable")


def _candidates(search: Search, blocks: list[Block], flat: np.ndarray, shifts: np.ndarray, total: float) -> Candidates:
    """Orientations × shifts worth refining: those of the best samples, taken in order of their weight in `flat`, all blocks'.

    It stops at `adaptive_fraction` of the posterior or `max_significant` samples per class (RELION's two rules), and, as the
    children of all pairs are scored, also before orientations × shifts exceeds PAIRS times that number.
    """
    cap = min(search.max_significant * len(search.volumes), len(flat))
    top = _top(flat, search.adaptive_fraction * total, cap)
    count = len(top)
    row, shift = np.divmod(top, len(shifts))
    new_row, new_shift = np.zeros(count, int), np.zeros(count, int)
    new_row[np.unique(row, return_index=True)[1]] = 1
    new_shift[np.unique(shift, return_index=True)[1]] = 1
    fits = np.cumsum(new_row) * np.cumsum(new_shift) <= PAIRS * search.max_significant * len(search.volumes)
    used = max(1, int(fits.sum()))
    rows = np.unique(row[:used])
    classes = np.repeat([block.class_index for block in blocks], [len(block.orientations) for block in blocks])
    orientations = np.concatenate([block.orientations for block in blocks])
    return Candidates(classes[rows], orientations[rows], shifts[np.unique(shift[:used])])


def children(grid: OrientationGrid, candidates: Candidates) -> Candidates:
    """The same candidates, eight children each, on the grid of the next order."""
    kids = grid.children_of(candidates.orientations)
    return Candidates(np.repeat(candidates.classes, 8), kids.ravel(), candidates.shifts)


def run_search(search: Search, batch: Batch, start: list[Candidates] | None, tick: Callable[[float], None]) -> list:
    """All levels for a batch of particles; a :class:`Posterior` each.

    `start`: per-particle candidates on the first level's grid (a local search), or None for everything admitted.
    """
    share = 1 / len(search.levels)
    search.backend.map(search.prepared, {level.radius for level in search.levels})
    if start is None:
        grid = search.levels[0].grid
        found = first_level(search, batch, admitted_orientations(search, grid), lambda f: tick(f * share))
    else:
        found = next_level(search, batch, 0, start, lambda f: tick(f * share))
    tick(0.0)  # between levels a mini-batch can be paused
    for number in range(1, len(search.levels)):
        found = next_level(search, batch, number, found, lambda f: tick(f * share))
        tick(0.0)
    return found
