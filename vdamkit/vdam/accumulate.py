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

from vdamkit.imaging.projector import Projector
from vdamkit.sampling.orientations import OrientationGrid
from vdamkit.vdam.posterior import rotate_rows
from vdamkit.vdam.search import Batch, Posterior, Search


@dataclass(frozen=True)
class Sums:
    """Additive results of some particles. Cubes are padded half cubes of the projector's grid, complex `(size,)`."""

    data: np.ndarray  # (K, 2, size) complex
    weight: np.ndarray  # (K, 2, size) real
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


def accumulate(
    search: Search, batch: Batch, raw: RawBatch, posteriors: list[Posterior], n_optics: int,
    coarse: OrientationGrid, tick: Callable[[float], None],
) -> Sums:  # fmt: skip
    """All sums of one chunk of particles; deterministic: workers' results are added in a fixed order."""
    level = search.levels[-1]
    projector = search.projector(level.radius)
    classes, shells = len(search.volumes), projector.ball.n_shells
    members: dict[tuple, list] = {}
    for i, posterior in enumerate(posteriors):
        for block in posterior.blocks:
            members.setdefault(block.group, []).append((i, block))
    jobs = sorted(members)

    def work(key: tuple) -> tuple:
        result = _group_sums(search, projector, batch, raw, posteriors, key, members[key])
        tick(1 / len(jobs))
        return result

    data = np.zeros((classes, 2, projector.grid.size), projector.complex)
    weight = np.zeros(data.shape, projector.dtype)
    cross = np.zeros((n_optics, shells))
    power = np.zeros((classes, shells))
    # a wave of workers at a time, so that no more than a few cubes are alive
    wave = max(4, 2 * search.backend.threads)
    for first in range(0, len(jobs), wave):
        keys = jobs[first : first + wave]
        for (k, _), (cubes, residual_power, information) in zip(keys, search.backend.map(work, keys), strict=True):
            for h, cube in cubes.items():
                data[k, h] += split_cube(cube, projector.complex)
                weight[k, h] += cube[:, 2]
            power[k] += information
            for group, values in residual_power.items():
                cross[group] += values
    noise, noise_weight = _own_power(search, projector, raw, n_optics)
    class_weight, direction_weight = _class_sums(search, posteriors, coarse)
    return Sums(
        data, weight, noise + cross, noise_weight, class_weight, direction_weight,
        _offset_sum(search, batch, posteriors), power,
    )  # fmt: skip


def _group_sums(
    search: Search, projector: Projector, batch: Batch, raw: RawBatch, posteriors: list, key: tuple, members: list
) -> tuple:
    """Residuals of one group of rotations: scattered cube `(size, 3)` per half, noise terms, information."""
    level, xp = search.levels[-1], search.backend.xp
    n = len(projector.ball)
    union = np.unique(np.concatenate([block.orientations for _, block in members]))
    rows, operators = _rotated(search, projector, key, union)
    energy = rows.real**2 + rows.imag**2
    gradient = xp.zeros((2, len(union), n), projector.complex)  # per pseudo-half: index parity in the file, for good
    total = xp.zeros((2, len(union), n), projector.dtype)
    touched = np.zeros((2, len(union)), bool)
    noise: dict[int, np.ndarray] = {}
    information = xp.zeros(n, projector.dtype)
    for i, block in members:
        at, h = np.searchsorted(union, block.orientations), int(batch.index[i]) % 2
        touched[h, at] = True
        used = np.flatnonzero(block.scores.any(0))
        p = xp.asarray(block.scores[:, used].astype(projector.dtype))
        phases = search.phases(level.radius, level.fine_shifts, posteriors[i].shifts[used])
        wave = (p @ phases.view(projector.dtype)).view(projector.complex)  # Σ_t p e^{-2πi k·t/N}
        mass = p.sum(1)
        overlap = xp.zeros(n, projector.complex)
        for j, row in enumerate(at.tolist()):  # row by row: everything stays in the cache
            overlap += rows[row].conj() * wave[j]
            gradient[h, row] += wave[j] * batch.unmasked[i]
            total[h, row] += mass[j] * batch.weight[i]
        model2 = mass @ energy[at]
        w = raw.weight[i]
        values = w * (w * model2 - 2 * (overlap * raw.masked[i]).real)
        sums = projector.ball.shell_sums(search.backend.asnumpy(values) * projector.ball.weight)
        group = int(raw.optics[i])
        noise[group] = noise.get(group, 0) + sums
        information += batch.weight[i] * model2
    for h in (0, 1):
        gradient[h] -= total[h] * rows
    cubes = _scatter(projector, level.grid, search.perturbation, union, gradient, total, touched, operators)
    cubes = {h: search.backend.asnumpy(cube) for h, cube in cubes.items()}
    return cubes, noise, projector.ball.shell_sums(search.backend.asnumpy(information))


def _rotated(search: Search, projector: Projector, key: tuple, union: np.ndarray) -> tuple[Any, dict]:
    """References at orientations `union` of a group: what the E-step kept, or computed again."""
    if key in search.kept:
        orientations, rows, operators, _ = search.kept[key]
        return rows[np.searchsorted(orientations, union)], operators
    level, operators = search.levels[-1], {}
    reference = search.prepared(level.radius)[key[0]]
    return rotate_rows(projector, reference, level.grid, search.perturbation, union, operators), operators


def _scatter(
    projector: Projector, grid: OrientationGrid, perturbation: float, union: np.ndarray, gradient: Any, total: Any,
    touched: np.ndarray, operators: dict,
) -> dict[int, Any]:  # fmt: skip
    """Rows of both halves back into the padded half cube, `(size, 3)` for each half that has any."""
    xp = projector.backend.xp
    cubes = {h: xp.zeros((projector.grid.size, 3), projector.dtype) for h in (0, 1) if touched[h].any()}
    directions, psis = np.divmod(union, grid.n_psi)
    present, first = np.unique(directions, return_index=True)
    tilts = grid.tilts(perturbation, present)
    ends = np.append(first[1:], len(union))
    for direction, tilt, start, end in zip(present.tolist(), tilts, first, ends, strict=True):
        matrix = operators.get(direction) or projector.tilt_matrix(tilt)
        for h, cube in cubes.items():
            rows = np.flatnonzero(touched[h, start:end]) + start
            slab = weight = 0
            for row in rows:
                psi = float(grid.psis[psis[row]])
                slab = slab + projector.spin_adjoint(gradient[h, row], psi)
                weight = weight + projector.spread_weight(xp.maximum(total[h, row], 0), psi)
            if len(rows):
                cube += projector.tilt_adjoint(slab, matrix, weight)
    return cubes


def split_cube(cube: np.ndarray, kind: type) -> np.ndarray:
    """First two columns of a scattered cube `(size, 3)` as complex numbers `(size,)`."""
    return np.ascontiguousarray(cube[:, :2]).view(kind).reshape(-1)


def _own_power(search: Search, projector: Projector, raw: RawBatch, n_optics: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ |b'|² and Σ w' per optics group and shell."""
    ball = projector.ball
    power = np.zeros((n_optics, ball.n_shells))
    weight = np.zeros((n_optics, ball.n_shells))
    for i, group in enumerate(raw.optics):
        b, w = search.backend.asnumpy(raw.masked[i]), search.backend.asnumpy(raw.weight[i])
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
