"""M-step sums: what a mini-batch says about the map, the noise and the priors.

For each class and pseudo-half-set h the residual is scattered back, not the image
(RELION ml_optimiser.cpp:storeWeightedSums, cuda_kernel_backproject3D_SGD):

    data_h   += Σ p(φ, t) · adjoint_φ[ b e^{−2πi k·t/N} − w A_φ ]
    weight_h += Σ p(φ, t) · adjoint_φ[ w ]

Each rotation is scattered once per chunk of particles, not once per particle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.imaging.projector import Projector, Tilt
from vdamkit.sampling.orientations import OrientationGrid
from vdamkit.vdam.posterior import rotate_rows
from vdamkit.vdam.search import Batch, Posterior, Search

MAX_LANES = 8  # workers that can add up side by side
LANE_BYTES = 2**28  # of all lanes' cubes together
AT_ONCE = 8  # directions scattered together


@dataclass(frozen=True)
class Sums:
    """Additive results of some particles."""

    cubes: np.ndarray  # (K, 2, 3, size) real, padded half cubes of the projector's grid: Re data, Im data, weight
    noise: np.ndarray  # (G, n_shells) Σ |b' − w' A|², masked, per optics group
    noise_weight: np.ndarray  # (G, n_shells) Σ w'
    class_weight: np.ndarray  # (K,) Σ p
    direction_weight: np.ndarray  # (K, n_directions) Σ p per coarse direction
    offset2: float  # Σ p |offset − prior|², px²
    power: np.ndarray  # (K, n_shells) Σ p Σ_k w |A|²: the information each shell adds

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class RawBatch:
    """What the noise estimate needs beside the scaled arrays of :class:`Batch`."""

    masked: Any  # (p, n) complex b', moved by the last offset, neither divided by the noise nor Friedel-weighted
    weight: Any  # (p, n) real w'
    optics: np.ndarray  # (p,) optics group of each particle


class Lane:
    """Sums of some groups of rotations, formed one after the other by one worker.

    Slabs wait until there are AT_ONCE of a class and half: scattering them together saves passes over the cube.
    """

    def __init__(self, projector: Projector):
        self.projector = projector
        self.cubes: dict[tuple[int, int], Any] = {}  # (class, half) -> (3, size)
        self.noise: dict[int, np.ndarray] = {}  # optics group -> (n_shells,)
        self.power: dict[int, np.ndarray] = {}  # class -> (n_shells,)
        self._waiting: dict[tuple[int, int], list[tuple[Tilt, Any, Any]]] = {}

    def add(self, key: tuple[int, int], tilt: Tilt, slab: Any, weight: Any) -> None:
        """Sums on the cylinder of one direction, for a class and half."""
        waiting = self._waiting.setdefault(key, [])
        waiting.append((tilt, slab, weight))
        if len(waiting) == AT_ONCE:
            self._scatter(key)

    def finish(self) -> Lane:
        for key in self._waiting:
            self._scatter(key)
        return self

    def _scatter(self, key: tuple[int, int]) -> None:
        waiting = self._waiting[key]
        if not waiting:
            return
        cube = self.projector.tilt_adjoint(*(list(column) for column in zip(*waiting, strict=True)))
        if key in self.cubes:
            self.cubes[key] += cube
        else:
            self.cubes[key] = cube
        waiting.clear()


def accumulate(
    search: Search, batch: Batch, raw: RawBatch, posteriors: list[Posterior], n_optics: int,
    coarse: OrientationGrid, tick: Callable[[float], None],
) -> Sums:  # fmt: skip
    """All sums of one chunk of particles; deterministic: lanes are made and added up by a fixed plan."""
    level = search.levels[-1]
    projector = search.projector(level.radius)
    classes, shells = len(search.volumes), projector.ball.n_shells
    members: dict[tuple, list] = {}
    for i, posterior in enumerate(posteriors):
        for block in posterior.blocks:
            members.setdefault(block.group, []).append((i, block))
    jobs = sorted(members)
    lane_bytes = classes * 6 * projector.grid.size * projector.dtype.itemsize
    n_lanes = int(np.clip(LANE_BYTES // lane_bytes, 2, MAX_LANES))

    def work(number: int) -> Lane:
        lane = Lane(projector)
        for key in jobs[number::n_lanes]:
            _group_sums(search, projector, batch, raw, posteriors, key, members[key], lane)
            tick(1 / len(jobs))
        return lane.finish()

    def size(number: int) -> int:
        return sum(len(block.orientations) for key in jobs[number::n_lanes] for _, block in members[key])

    lanes: list[Lane] = search.backend.map(work, range(min(n_lanes, len(jobs))), size=size)
    tick(0.0)  # a pause acts here
    noise, noise_weight = _own_power(search, projector, raw, n_optics)
    power = np.zeros((classes, shells))
    for lane in lanes:
        for group, values in lane.noise.items():
            noise[group] += values
        for k, values in lane.power.items():
            power[k] += values
    class_weight, direction_weight = _class_sums(search, posteriors, coarse)
    return Sums(
        _total(search, projector, lanes), noise, noise_weight, class_weight, direction_weight,
        _offset_sum(search, batch, posteriors), power,
    )  # fmt: skip


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


def _group_sums(
    search: Search, projector: Projector, batch: Batch, raw: RawBatch, posteriors: list, key: tuple, members: list,
    lane: Lane,
) -> None:  # fmt: skip
    """Residuals of one group of rotations, noise terms and information, added to a lane."""
    level = search.levels[-1]
    n = len(projector.ball)
    union = np.unique(np.concatenate([block.orientations for _, block in members]))
    rows, tilts = _rotated(search, projector, key, union)
    energy = rows.real**2 + rows.imag**2
    gradient = np.zeros((2, len(union), n), projector.complex)  # per pseudo-half: index parity in the file, for good
    total = np.zeros((2, len(union), n), projector.dtype)
    touched = np.zeros((2, len(union)), bool)
    information = np.zeros(n, projector.dtype)
    for i, block in members:
        at, h = np.searchsorted(union, block.orientations), int(batch.index[i]) % 2
        touched[h, at] = True
        used = np.flatnonzero(block.scores.any(0))
        p = block.scores[:, used].astype(projector.dtype)
        phases = search.phases(level.radius, level.fine_shifts, posteriors[i].shifts[used])
        wave = (p @ phases.view(projector.dtype)).view(projector.complex)  # Σ_t p e^{-2πi k·t/N}
        mass = p.sum(1)
        overlap = np.zeros(n, projector.complex)
        for j, row in enumerate(at.tolist()):  # row by row: everything stays in the cache
            overlap += rows[row].conj() * wave[j]
            gradient[h, row] += wave[j] * batch.unmasked[i]
            total[h, row] += mass[j] * batch.weight[i]
        model2 = mass @ energy[at]
        w = raw.weight[i]
        values = w * (w * model2 - 2 * (overlap * raw.masked[i]).real)
        sums = projector.ball.shell_sums(values * projector.ball.weight)
        group = int(raw.optics[i])
        lane.noise[group] = lane.noise.get(group, 0) + sums
        information += batch.weight[i] * model2
    for h in (0, 1):
        gradient[h] -= total[h] * rows
    lane.power[key[0]] = lane.power.get(key[0], 0) + projector.ball.shell_sums(information)
    for h in (0, 1):
        _spin_back(projector, level.grid, union, gradient[h], np.maximum(total[h], 0), touched[h], tilts, (key[0], h), lane)


def _rotated(search: Search, projector: Projector, key: tuple, union: np.ndarray) -> tuple[Any, dict[int, Tilt]]:
    """References at orientations `union` of a group: what the E-step kept, or computed again."""
    if key in search.kept:
        orientations, rows, tilts, _ = search.kept[key]
        return rows[np.searchsorted(orientations, union)], tilts
    level, tilts = search.levels[-1], {}
    reference = search.prepared(level.radius)[key[0]]
    return rotate_rows(projector, reference, level.grid, search.perturbation, union, tilts), tilts


def _spin_back(
    projector: Projector, grid: OrientationGrid, union: np.ndarray, gradient: Any, total: Any, touched: np.ndarray,
    tilts: dict[int, Tilt], key: tuple[int, int], lane: Lane,
) -> None:  # fmt: skip
    """Touched rows of one half, summed over psi on the cylinder of their direction, and handed to the lane."""
    rows = np.flatnonzero(touched)
    if not len(rows):
        return
    directions, psis = np.divmod(union[rows], grid.n_psi)
    present, first = np.unique(directions, return_index=True)
    for direction, some in zip(present.tolist(), np.split(np.arange(len(rows)), first[1:]), strict=True):
        slab = weight = 0
        for j in some:
            psi = float(grid.psis[psis[j]])
            slab = slab + projector.spin_adjoint(gradient[rows[j]], psi)
            weight = weight + projector.spread_weight(total[rows[j]], psi)
        lane.add(key, tilts[direction], slab, weight)


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


def _class_sums(search: Search, posteriors: list, coarse: OrientationGrid) -> tuple[np.ndarray, np.ndarray]:
    grid = search.levels[-1].grid
    per_coarse = grid.n_directions // coarse.n_directions
    by_class = np.zeros(len(search.volumes))
    by_direction = np.zeros((len(search.volumes), coarse.n_directions))
    for posterior in posteriors:
        for block in posterior.blocks:
            mass = block.scores.sum(1, dtype=np.float64)
            by_class[block.class_index] += mass.sum()
            np.add.at(by_direction[block.class_index], block.orientations // grid.n_psi // per_coarse, mass)
    return by_class, by_direction


def _offset_sum(search: Search, batch: Batch, posteriors: list) -> float:
    shifts = search.shifts(search.levels[-1].fine_shifts)
    total = 0.0
    for i, posterior in enumerate(posteriors):
        away = batch.offsets[i] + shifts[posterior.shifts] - batch.offset_priors[i]
        mass = sum(block.scores.sum(0, dtype=np.float64) for block in posterior.blocks)
        total += float(mass @ (away**2).sum(1))
    return total
