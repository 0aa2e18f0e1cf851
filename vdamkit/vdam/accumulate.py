"""M-step sums: what a mini-batch says about the map, the noise and the priors.

For each class and pseudo-half-set h the residual is scattered back, not the image
(RELION ml_optimiser.cpp:storeWeightedSums, cuda_kernel_backproject3D_SGD):

    data_h   += Σ p(φ, t) · adjoint_φ[ b e^{−2πi k·t/N} − w A_φ ]
    weight_h += Σ p(φ, t) · adjoint_φ[ w ]

Each rotation is scattered once per chunk of particles, not once per particle. Inside, sums over samples are matrix products
of their probabilities with moved images; a few voxels at a time, so that all of it stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.backend.kept import KEPT
from vdamkit.imaging.projector import Projector
from vdamkit.imaging.turns import turns_of
from vdamkit.vdam.dense import interleaved
from vdamkit.vdam.search import Batch, Block, Posterior, Search

MAX_LANES = 8  # workers that can add up side by side
LANE_BYTES = 2**28  # of all lanes' cubes together
NARROW = 0.5  # part of rotations × shifts that is not zero, below which samples are summed one by one where that is compiled
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
    cube_bytes = 6 * classes * projector.grid.size * projector.dtype.itemsize
    n_lanes = int(np.clip(LANE_BYTES // cube_bytes, 2, MAX_LANES))
    lanes = [jobs[number::n_lanes] for number in range(max(1, min(n_lanes, len(jobs))))]
    shape = (len(lanes), classes, 2, 3, projector.grid.size)
    noise = np.zeros((len(lanes), n_optics, projector.ball.n_shells))
    phases = search.phases(level.radius, level.fine_shifts, np.unique(np.concatenate([p.shifts for p in posteriors])))
    with KEPT.empty("cubes", shape, projector.dtype) as cubes:

        def work(number: int) -> None:
            for place in _written(lanes[number]):
                cubes[number][place] = 0
            for key in lanes[number]:
                cube = cubes[number, key[0], key[2]]
                _group_sums(search, projector, batch, raw, posteriors, phases, key[:2], members[key], cube, noise[number])
                tick(1 / len(jobs))

        def size(number: int) -> int:
            return sum(len(block.orientations) for key in lanes[number] for _, block in members[key])

        search.backend.map(work, range(len(lanes)), size=size)
        tick(0.0)  # a pause acts here
        total = _total(search, cubes, lanes)
    power, noise_weight = _own_power(search, projector, raw, n_optics)
    return Sums(
        total, power + noise.sum(0), noise_weight, _class_weights(search, posteriors), _offset_sum(search, batch, posteriors)
    )  # fmt: skip


def _written(lane: list[tuple[int, int, int]]) -> set[tuple[int, int]]:
    """Class and half of the cubes that a lane's jobs add to."""
    return {(k, half) for k, _, half in lane}


def _total(search: Search, cubes: np.ndarray, lanes: list[list[tuple[int, int, int]]]) -> np.ndarray:
    """The lanes' cubes added up, `(K, 2, 3, size)`; each piece of the array by one worker."""
    total = np.empty(cubes.shape[1:], cubes.dtype)
    written = [_written(lane) for lane in lanes]

    def add(place: tuple[int, int, int]) -> None:
        mine = [cube[place] for cube, places in zip(cubes, written, strict=True) if place[:2] in places]
        total[place] = mine[0] if mine else 0
        for cube in mine[1:]:
            total[place] += cube

    search.backend.map(add, list(np.ndindex(total.shape[:3])))
    return total


@dataclass(frozen=True)
class Samples:
    """What the posteriors of an optics group's particles hold of one group of rotations, as matrices."""

    particles: list[int]
    shifts: list[np.ndarray]  # of each particle, in the level's table
    probability: np.ndarray  # (rows, samples): the shifts of one particle after those of another
    mass: np.ndarray  # (rows, particles) the same summed over shifts

    @classmethod
    def of(cls, members: list[tuple[int, Block]], posteriors: list, union: np.ndarray, real: np.dtype) -> Samples:
        used = [np.flatnonzero(block.scores.any(0)) for _, block in members]
        ends = np.cumsum([0, *map(len, used)])
        probability, mass = np.zeros((len(union), ends[-1]), real), np.zeros((len(union), len(members)), real)
        for j, (_, block) in enumerate(members):
            at = np.searchsorted(union, block.orientations)
            probability[at, ends[j] : ends[j + 1]] = block.scores[:, used[j]]
            mass[at, j] = block.scores.sum(1)
        shifts = [posteriors[i].shifts[mine] for (i, _), mine in zip(members, used, strict=True)]
        return cls([i for i, _ in members], shifts, probability, mass)

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
    search: Search, projector: Projector, batch: Batch, raw: RawBatch, posteriors: list, phases: Any, key: tuple[int, int],
    members: list[tuple[int, Block]], cube: Any, noise: np.ndarray,
) -> None:  # fmt: skip
    """Residuals of one group of rotations and one pseudo-half, added to `cube` `(3, size)`, and noise terms to `noise`."""
    level = search.levels[-1]
    union = np.unique(np.concatenate([block.orientations for _, block in members]))
    model = _rotated(search, projector, key, union)
    optics = sorted({int(raw.optics[i]) for i, _ in members})
    sums = _matrix_sums
    if projector.compiled and _filled([block.scores for _, block in members], len(union)) < NARROW:
        from vdamkit.vdam.narrow import sums
    data, total, terms = sums(batch, raw, members, posteriors, union, model, phases, optics)
    noise[optics] += projector.ball.shell_sums(terms * projector.ball.weight)
    projector.scatter_rows(cube, turns_of(level.grid, search.perturbation, union), data, np.maximum(total, 0))


def _filled(weights: list[np.ndarray], rows: int) -> float:
    """Part of the matrix of all samples, one shift of one particle a column, that is not zero."""
    return sum(np.count_nonzero(mine) for mine in weights) / (rows * sum(np.count_nonzero(mine.any(0)) for mine in weights))


def _matrix_sums(
    batch: Batch, raw: RawBatch, members: list[tuple[int, Block]], posteriors: list[Posterior], union: np.ndarray, model: Any,
    phases: Any, optics: list[int],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Residual data `(rows, n)` complex and weights `(rows, n)` real of the rotations `union`, and the noise term
    ``Σ p w'² |A|² − 2 Re conj(A) w' b'`` of each optics group `(groups, n)`.

    model: references A at the rotations, `(rows, n)`. phases: the level's table of shifts. optics: groups of the members.
    """
    real = model.real.dtype
    parts = [
        Samples.of([(i, block) for i, block in members if raw.optics[i] == group], posteriors, union, real) for group in optics
    ]
    data, total = np.zeros(model.shape, model.dtype), np.zeros(model.shape, real)
    noise = np.empty((len(parts), model.shape[1]), real)
    columns = max(part.probability.shape[1] for part in parts)
    at_once = max(64, CACHE_BYTES // (2 * phases.itemsize * (columns + 2 * len(union))))
    for first in range(0, model.shape[1], at_once):
        v = slice(first, min(first + at_once, model.shape[1]))
        some = np.ascontiguousarray(model[:, v])
        energy = some.real**2 + some.imag**2
        for part, residual in zip(parts, noise, strict=True):
            images, weights = part.sums(batch, raw, phases, v)
            data[:, v] += images[:, 0]
            total[:, v] += weights[:, 0]
            overlap = (some.real * images[:, 1].real + some.imag * images[:, 1].imag).sum(0)
            residual[v] = (weights[:, 1] * energy).sum(0) - 2 * overlap
        data[:, v] -= total[:, v] * some
    return data, total, noise


def _rotated(search: Search, projector: Projector, key: tuple, union: np.ndarray) -> Any:
    """References at orientations `union` of a group: what the E-step kept, or computed again."""
    if key in search.kept:
        orientations, rows = search.kept[key]
        return rows if len(rows) == len(union) else rows[np.searchsorted(orientations, union)]
    level = search.levels[-1]
    return projector.rotate_rows(search.prepared(level.radius)[key[0]], turns_of(level.grid, search.perturbation, union))


def _own_power(search: Search, projector: Projector, raw: RawBatch, n_optics: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ |b'|² and Σ w' per optics group and shell."""
    ball = projector.ball

    def own(i: int) -> np.ndarray:
        b, w = raw.masked[i], raw.weight[i]
        return np.stack([ball.shell_sums((b.real**2 + b.imag**2) * ball.weight), ball.shell_sums(w * ball.weight)])

    out = np.zeros((n_optics, 2, ball.n_shells))
    for group, sums in zip(raw.optics, search.backend.map(own, range(len(raw.optics)), at_once=8), strict=True):
        out[group] += sums
    return out[:, 0], out[:, 1]


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
