"""Scores of the finer levels, of each particle at its own rotations and shifts alone, compiled by Numba.

A matrix product for several particles takes all their rotations with all their shifts, five times as many pairs as any of them
asks for in a late mini-batch, and makes its operands first.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from vdamkit.imaging.compiled import compiled
from vdamkit.imaging.simd import BYTES, fused, load, scaled, store, summed, swapped, zeros

NUMBERS = 1024  # real and imaginary, at a time: four moved images and four rows of so many stay in the nearest cache
TILE = 4  # rows, and moved images, whose products are summed up at a time


def scores(
    rows: Any, at: list[np.ndarray], phases: Any, shifts: list[np.ndarray], images: Any, weight: Any, particles: list[int]
) -> list[Any]:
    """As :func:`vdamkit.vdam.finer.scores`."""
    real = rows.real.dtype
    row_starts, shift_starts = (np.cumsum([0, *map(len, some)]) for some in (at, shifts))
    starts = np.cumsum([0, *(len(a) * len(b) for a, b in zip(at, shifts, strict=True))])
    out = np.zeros(starts[-1], real)
    _add(
        rows.view(real), phases.view(real), images, weight, np.array(particles), row_starts, np.concatenate(at), shift_starts,
        np.concatenate(shifts), starts, out,
    )  # fmt: skip
    return [out[a:b].reshape(-1, len(mine)) for (a, b), mine in zip(pairwise(starts.tolist()), shifts, strict=True)]


@compiled
def _against(row, images, sums):
    """What a vector of a row adds to its products with four images."""
    return (
        fused(row, images[0], sums[0]), fused(row, images[1], sums[1]), fused(row, images[2], sums[2]),
        fused(row, images[3], sums[3]),
    )  # fmt: skip


@compiled
def _tile(rows, places, moved, count, sums):
    """Products of four rows, at `places`, with four moved images, over `count` numbers: sixteen sums in registers."""
    lanes, width = BYTES // rows.itemsize, moved.shape[1]
    i, j, k, m = places[0], places[1], places[2], places[3]
    zero = zeros(rows)
    a = b = c = d = (zero, zero, zero, zero)
    whole = count // lanes * lanes
    for v in range(0, whole, lanes):
        images = load(moved, v), load(moved, width + v), load(moved, 2 * width + v), load(moved, 3 * width + v)
        a, b = _against(load(rows, i + v), images, a), _against(load(rows, j + v), images, b)
        c, d = _against(load(rows, k + v), images, c), _against(load(rows, m + v), images, d)
    for column in range(TILE):
        sums[0, column], sums[1, column] = summed(a[column]), summed(b[column])
        sums[2, column], sums[3, column] = summed(c[column]), summed(d[column])
    flat = rows.reshape(-1)
    for v in range(whole, count):
        for row in range(TILE):
            for column in range(TILE):
                sums[row, column] += flat[places[row] + v] * moved[column, v]


@compiled
def _energies(rows, places, weight, count, sums):
    """Weighted sums of squares of four rows."""
    lanes = BYTES // rows.itemsize
    i, j, k, m = places[0], places[1], places[2], places[3]
    a = b = c = d = zeros(rows)
    whole = count // lanes * lanes
    for v in range(0, whole, lanes):
        w = load(weight, v)
        x, y, z, u = load(rows, i + v), load(rows, j + v), load(rows, k + v), load(rows, m + v)
        a, b, c, d = fused(scaled(x, x), w, a), fused(scaled(y, y), w, b), fused(scaled(z, z), w, c), fused(scaled(u, u), w, d)
    sums[0, 0], sums[1, 0], sums[2, 0], sums[3, 0] = summed(a), summed(b), summed(c), summed(d)
    flat = rows.reshape(-1)
    for v in range(whole, count):
        for row in range(TILE):
            sums[row, 0] += flat[places[row] + v] * flat[places[row] + v] * weight[v]


@compiled
def _move(phases, at, real, imaginary, count, moved, to):
    """A product of complex numbers, to place `to` of `moved`: phases from place `at` on, with an image whose real parts stand
    twice in `real`, its imaginary parts in `imaginary`, first with a minus."""
    lanes = BYTES // phases.itemsize
    whole = count // lanes * lanes
    for v in range(0, whole, lanes):
        wave = load(phases, at + v)
        store(moved, to + v, fused(swapped(wave), load(imaginary, v), scaled(wave, load(real, v))))
    waves, out = phases.reshape(-1), moved.reshape(-1)
    for v in range(whole, count):
        out[to + v] = waves[at + v] * real[v] + waves[at + v + 1 - 2 * (v % 2)] * imaginary[v]


@compiled
def _prepare(image, weight, real, imaginary, factor):
    """Some voxels of an image for :func:`_move`, and of its weights for :func:`_energies`."""
    for v in range(len(image)):
        real[2 * v] = real[2 * v + 1] = image[v].real
        imaginary[2 * v], imaginary[2 * v + 1] = -image[v].imag, image[v].imag
        factor[2 * v] = factor[2 * v + 1] = -weight[v] / 2


@compiled
def _add(rows, phases, images, weight, particles, row_starts, at, shift_starts, shifts, starts, out):
    """Particle m, ``particles[m]`` of `images` and `weight`, at its rows, those from ``row_starts[m]`` on in `at`, and its
    shifts; its scores are those from ``starts[m]`` on. `rows` and `phases` have real and imaginary parts as neighbours."""
    n, n_phases, kind = rows.shape[1], phases.shape[1], rows.dtype
    moved, sums, places = np.zeros((TILE, NUMBERS), kind), np.empty((TILE, TILE), kind), np.empty(TILE, np.int64)
    real, imaginary, factor = np.empty(NUMBERS, kind), np.empty(NUMBERS, kind), np.empty(NUMBERS, kind)
    for first in range(0, n, NUMBERS):
        count = min(NUMBERS, n - first)
        voxels = slice(first // 2, (first + count) // 2)
        for m in range(len(particles)):
            mine, its = at[row_starts[m] : row_starts[m + 1]], shifts[shift_starts[m] : shift_starts[m + 1]]
            scores = out[starts[m] : starts[m + 1]].reshape(len(mine), len(its))
            _prepare(images[particles[m], voxels], weight[particles[m], voxels], real, imaginary, factor)
            if first == 0:
                factor[0] = factor[1] = 0  # see `dense.scored_energy`
            for r in range(0, len(mine), TILE):
                for j in range(TILE):
                    places[j] = mine[min(r + j, len(mine) - 1)] * n + first
                _energies(rows, places, factor, count, sums)
                for j in range(min(TILE, len(mine) - r)):
                    scores[r + j] += sums[j, 0]
            for s in range(0, len(its), TILE):
                used = min(TILE, len(its) - s)  # what else is in `moved` is summed up to no end
                for column in range(used):
                    _move(phases, its[s + column] * n_phases + first, real, imaginary, count, moved, column * NUMBERS)
                for r in range(0, len(mine), TILE):
                    for j in range(TILE):
                        places[j] = mine[min(r + j, len(mine) - 1)] * n + first
                    _tile(rows, places, moved, count, sums)
                    for j in range(min(TILE, len(mine) - r)):
                        for column in range(used):
                            scores[r + j, s + column] += sums[j, column]
