"""M-step sums: what a mini-batch says about the map, the noise and the priors.

For each class and pseudo-half-set h the residual is scattered back, not the image
(RELION ml_optimiser.cpp:storeWeightedSums, cuda_kernel_backproject3D_SGD):

    data_h   += Σ p(φ, t) · adjoint_φ[ b e^{−2πi k·t/N} − w A_φ ]
    weight_h += Σ p(φ, t) · adjoint_φ[ w ]

Each rotation is scattered once per chunk of particles, not once per particle. Inside, sums over samples are matrix products
of their probabilities with moved images; a few voxels at a time, so that all of it stays in the cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.imaging.projector import Projector
from vdamkit.vdam.posterior import interleaved, rotate_rows, turns_by_direction
from vdamkit.vdam.search import Batch, Block, Posterior, Search

MAX_LANES = 8  # workers that can add up side by side
LANE_BYTES = 2**28  # of all lanes' cubes together
CACHE_BYTES = 2**23  # of one worker's images, references and sums of some voxels


@dataclass(frozen=True)
class Sums:
    """Additive results of some particles."""

    cubes: np.ndarray  # (K, 2, 3, size) real, padded half cubes of the projector's grid: Re data, Im data, weight
    noise: np.ndarray  # (G, n_shells) Σ |b' − w' A|², masked, per optics group
    noise_weight: np.ndarray  # (G, n_shells) Σ w'
    class_weight: np.ndarray  # (K,) Σ p
    offset2: float  # Σ p |offset − prior|², px²

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class RawBatch:
    """What the noise estimate needs beside the scaled arrays of :class:`Batch`."""

    masked: Any  # (p, n) complex b', moved by the last offset, neither divided by the noise nor Friedel-weighted
    weight: Any  # (p, n) real w'
    optics: np.ndarray  # (p,) optics group of each particle


class Lane:
    """Sums of some groups of rotations, formed one after the other by one worker."""

    def __init__(self, projector: Projector):
        self.cubes: dict[tuple[int, int], Any] = defaultdict(  # (class, half) -> (3, size)
            lambda: np.zeros((3, projector.grid.size), projector.dtype)
        )
        self.noise: dict[int, np.ndarray] = {}  # optics group -> (n_shells,)


def accumulate(
    search: Search, batch: Batch, raw: RawBatch, posteriors: list[Posterior], n_optics: int, tick: Callable[[float], None],
) -> Sums:  # fmt: skip
    """All sums of one chunk of particles; deterministic: lanes are made and added up by a fixed plan."""
    level = search.levels[-1]
    projector = search.projector(level.radius)
    classes = len(search.volumes)
    members: dict[tuple[int, int, int], list[tuple[int, Block]]] = {}  # by class, group and pseudo-half
    for i, posterior in enumerate(posteriors):
        half = int(batch.index[i]) % 2  # parity in the file, for good
        for block in posterior.blocks:
            members.setdefault((*block.group, half), []).append((i, block))
    jobs = sorted(members)
    lane_bytes = classes * 6 * projector.grid.size * projector.dtype.itemsize
    n_lanes = int(np.clip(LANE_BYTES // lane_bytes, 2, MAX_LANES))

    def work(number: int) -> Lane:
        lane = Lane(projector)
        for key in jobs[number::n_lanes]:
            _group_sums(search, projector, batch, raw, posteriors, key, members[key], lane)
            tick(1 / len(jobs))
        return lane

    def size(number: int) -> int:
        return sum(len(block.orientations) for key in jobs[number::n_lanes] for _, block in members[key])

    lanes: list[Lane] = search.backend.map(work, range(min(n_lanes, len(jobs))), size=size)
    tick(0.0)  # a pause acts here
    noise, noise_weight = _own_power(search, projector, raw, n_optics)
    for lane in lanes:
        for group, values in lane.noise.items():
            noise[group] += values
    class_weight = _class_weights(search, posteriors)
    return Sums(_total(search, projector, lanes), noise, noise_weight, class_weight, _offset_sum(search, batch, posteriors))


def _total(search: Search, projector: Projector, lanes: list[Lane]) -> np.ndarray:
    """The lanes' cubes added up, `(K, 2, 3, size)` on the host; each piece of the array by one worker."""
    total = np.zeros((len(search.volumes), 2, 3, projector.grid.size), projector.dtype)

    def add(place: tuple[int, int, int]) -> None:
        k, h, row = place
        for lane in lanes:
            if (k, h) in lane.cubes:
                total[place] += lane.cubes[k, h][row]

    search.backend.map(add, list(np.ndindex(total.shape[:3])))
    return total


@dataclass(frozen=True)
class Samples:
    """What the posteriors of an optics group's particles hold of one group of rotations, as matrices."""

    optics: int
    particles: list[int]
    shifts: list[np.ndarray]  # of each particle, in the level's table
    probability: np.ndarray  # (rows, samples): the shifts of one particle after those of another
    mass: np.ndarray  # (rows, particles) the same summed over shifts

    @classmethod
    def of(cls, optics: int, members: list[tuple[int, Block]], posteriors: list, union: np.ndarray, real: np.dtype) -> Samples:
        used = [np.flatnonzero(block.scores.any(0)) for _, block in members]
        ends = np.cumsum([0, *map(len, used)])
        probability, mass = np.zeros((len(union), ends[-1]), real), np.zeros((len(union), len(members)), real)
        for j, (_, block) in enumerate(members):
            at = np.searchsorted(union, block.orientations)
            probability[at, ends[j] : ends[j + 1]] = block.scores[:, used[j]]
            mass[at, j] = block.scores.sum(1)
        shifts = [posteriors[i].shifts[mine] for (i, _), mine in zip(members, used, strict=True)]
        return cls(optics, [i for i, _ in members], shifts, probability, mass)

    def sums(self, batch: Batch, raw: RawBatch, phases: Any, voxels: slice) -> tuple[Any, Any]:
        """Over all samples, at some voxels: Σ p b e^… and Σ p w' b' e^… `(rows, 2, v)`; Σ p w and Σ p w'² `(rows, 2, v)`."""
        n, real = voxels.stop - voxels.start, self.mass.dtype
        moved = np.empty((self.probability.shape[1], 2, n), phases.dtype)
        spread = np.empty((len(self.particles), 2, n), real)
        end = 0
        for j, (i, shifts) in enumerate(zip(self.particles, self.shifts, strict=True)):
            w, begin, end = raw.weight[i, voxels], end, end + len(shifts)
            waves = phases[shifts, voxels]
            np.multiply(waves, batch.unmasked[i, voxels], out=moved[begin:end, 0])
            np.multiply(waves, w * raw.masked[i, voxels], out=moved[begin:end, 1])
            spread[j, 0] = batch.weight[i, voxels]
            np.multiply(w, w, out=spread[j, 1])
        images = (self.probability @ interleaved(moved, real)).view(phases.dtype)
        return images.reshape(-1, 2, n), (self.mass @ spread.reshape(len(spread), -1)).reshape(-1, 2, n)


def _group_sums(
    search: Search, projector: Projector, batch: Batch, raw: RawBatch, posteriors: list, key: tuple[int, int, int],
    members: list[tuple[int, Block]], lane: Lane,
) -> None:  # fmt: skip
    """Residuals of one group of rotations and one pseudo-half, and noise terms, added to a lane."""
    level, ball, real = search.levels[-1], projector.ball, projector.dtype
    union = np.unique(np.concatenate([block.orientations for _, block in members]))
    rows = _rotated(search, projector, key[:2], union)
    by_optics: dict[int, list] = {}
    for i, block in members:
        by_optics.setdefault(int(raw.optics[i]), []).append((i, block))
    parts = [Samples.of(optics, some, posteriors, union, real) for optics, some in by_optics.items()]
    used = np.unique(np.concatenate([shifts for part in parts for shifts in part.shifts]))
    phases = search.phases(level.radius, level.fine_shifts, used)
    data, total = np.zeros(rows.shape, projector.complex), np.zeros(rows.shape, real)
    noise = np.empty((len(parts), len(ball)), real)
    columns = max(part.probability.shape[1] for part in parts)
    at_once = max(64, CACHE_BYTES // (2 * phases.itemsize * (columns + 2 * len(union))))
    for first in range(0, len(ball), at_once):
        v = slice(first, min(first + at_once, len(ball)))
        model = np.ascontiguousarray(rows[:, v])
        energy = model.real**2 + model.imag**2
        for part, residual in zip(parts, noise, strict=True):
            images, weights = part.sums(batch, raw, phases, v)
            data[:, v] += images[:, 0]
            total[:, v] += weights[:, 0]
            overlap = (model.real * images[:, 1].real + model.imag * images[:, 1].imag).sum(0)
            residual[v] = (weights[:, 1] * energy).sum(0) - 2 * overlap
        data[:, v] -= total[:, v] * model
    for part, residual in zip(parts, noise, strict=True):
        lane.noise[part.optics] = lane.noise.get(part.optics, 0) + ball.shell_sums(residual * ball.weight)
    _spin_back(search, projector, union, data, np.maximum(total, 0), (key[0], key[2]), lane)


def _rotated(search: Search, projector: Projector, key: tuple, union: np.ndarray) -> Any:
    """References at orientations `union` of a group: what the E-step kept, or computed again."""
    if key in search.kept:
        orientations, rows = search.kept[key]
        return rows if len(rows) == len(union) else rows[np.searchsorted(orientations, union)]
    level = search.levels[-1]
    return rotate_rows(projector, search.prepared(level.radius)[key[0]], level.grid, search.perturbation, union)


def _spin_back(
    search: Search, projector: Projector, union: np.ndarray, data: Any, total: Any, key: tuple[int, int], lane: Lane
) -> None:  # fmt: skip
    """Rows scattered back into the lane's cube of their class and half."""
    grid = search.levels[-1].grid
    present, turns = turns_by_direction(grid, union)
    projector.scatter_rows(lane.cubes[key], grid.tilts(search.perturbation, present), turns, data, total)


def _own_power(search: Search, projector: Projector, raw: RawBatch, n_optics: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ |b'|² and Σ w' per optics group and shell."""
    ball = projector.ball
    power = np.zeros((n_optics, ball.n_shells))
    weight = np.zeros((n_optics, ball.n_shells))
    for i, group in enumerate(raw.optics):
        b, w = raw.masked[i], raw.weight[i]
        power[group] += ball.shell_sums((b.real**2 + b.imag**2) * ball.weight)
        weight[group] += ball.shell_sums(w * ball.weight)
    return power, weight


def _class_weights(search: Search, posteriors: list) -> np.ndarray:
    out = np.zeros(len(search.volumes))
    for posterior in posteriors:
        for block in posterior.blocks:
            out[block.class_index] += block.scores.sum(dtype=np.float64)
    return out


def _offset_sum(search: Search, batch: Batch, posteriors: list) -> float:
    shifts = search.shifts(search.levels[-1].fine_shifts)
    total = 0.0
    for i, posterior in enumerate(posteriors):
        away = batch.offsets[i] + shifts[posterior.shifts] - batch.offset_priors[i]
        mass = sum(block.scores.sum(0, dtype=np.float64) for block in posterior.blocks)
        total += float(mass @ (away**2).sum(1))
    return total
