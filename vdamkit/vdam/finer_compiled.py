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

# Loops that add up do so in a variable of their own: of one that writes to memory LLVM makes two, for arrays that may overlap
# and for others, which round differently; addresses then decide about last bits (`test_finer.py`).

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
        2 * rows.shape[1], rows.view(real).reshape(-1), phases.view(real).reshape(-1), images, weight, np.array(particles),
        row_starts, np.concatenate(at), shift_starts, np.concatenate(shifts), starts, out,
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
def _places(mine, r, n, first, places):
    """Where four of a particle's rows go on, its last one instead of any beyond."""
    for j in range(TILE):
        places[j] = mine[min(r + j, len(mine) - 1)] * n + first


@compiled
def _tile(rows, places, moved, count, sums):
    """Products of four rows, at `places`, with four moved images, over `count` numbers: sixteen sums in registers."""
    lanes = BYTES // rows.itemsize
    i, j, k, m = places[0], places[1], places[2], places[3]
    zero = zeros(rows)
    a = b = c = d = (zero, zero, zero, zero)
    whole = count // lanes * lanes
    for v in range(0, whole, lanes):
        images = load(moved, v), load(moved, NUMBERS + v), load(moved, 2 * NUMBERS + v), load(moved, 3 * NUMBERS + v)
        a, b = _against(load(rows, i + v), images, a), _against(load(rows, j + v), images, b)
        c, d = _against(load(rows, k + v), images, c), _against(load(rows, m + v), images, d)
    sums[0], sums[1], sums[2], sums[3] = summed(a[0]), summed(a[1]), summed(a[2]), summed(a[3])
    sums[4], sums[5], sums[6], sums[7] = summed(b[0]), summed(b[1]), summed(b[2]), summed(b[3])
    sums[8], sums[9], sums[10], sums[11] = summed(c[0]), summed(c[1]), summed(c[2]), summed(c[3])
    sums[12], sums[13], sums[14], sums[15] = summed(d[0]), summed(d[1]), summed(d[2]), summed(d[3])
    for pair in range(TILE * TILE):
        row, column, rest = places[pair // TILE], NUMBERS * (pair % TILE), sums[pair]
        for v in range(whole, count):
            rest += rows[row + v] * moved[column + v]
        sums[pair] = rest


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
    sums[0], sums[1], sums[2], sums[3] = summed(a), summed(b), summed(c), summed(d)
    for row in range(TILE):
        rest = sums[row]
        for v in range(whole, count):
            rest += rows[places[row] + v] * rows[places[row] + v] * weight[v]
        sums[row] = rest


@compiled
def _move(phases, at, real, imaginary, count, moved, to):
    """A product of complex numbers, to place `to` of `moved`: phases from place `at` on, with an image whose real parts stand
    twice in `real`, its imaginary parts in `imaginary`, first with a minus."""
    lanes = BYTES // phases.itemsize
    whole = count // lanes * lanes
    for v in range(0, whole, lanes):
        wave = load(phases, at + v)
        store(moved, to + v, fused(swapped(wave), load(imaginary, v), scaled(wave, load(real, v))))
    for v in range(whole, count):
        moved[to + v] = phases[at + v] * real[v] + phases[at + v + 1 - 2 * (v % 2)] * imaginary[v]


@compiled
def _prepare(image, weight, first, count, real, imaginary, factor):
    """Some voxels of an image for :func:`_move`, and of its weights for :func:`_energies`."""
    for v in range(count):
        value, half = image[first + v], weight[first + v] / 2
        real[2 * v], real[2 * v + 1] = value.real, value.real
        imaginary[2 * v], imaginary[2 * v + 1] = -value.imag, value.imag
        factor[2 * v], factor[2 * v + 1] = -half, -half
    if first == 0:
        factor[0], factor[1] = 0, 0  # see `dense.scored_energy`


@compiled
def _add(n, rows, phases, images, weight, particles, row_starts, at, shift_starts, shifts, starts, out):
    """Particle m, ``particles[m]`` of `images` and `weight`, at its rows, those from ``row_starts[m]`` on in `at`, and its
    shifts; its scores are those from ``starts[m]`` on. `rows` and `phases` are flat, `n` numbers each, real and imaginary parts
    one after the other."""
    kind = rows.dtype
    moved, sums, places = np.zeros(TILE * NUMBERS, kind), np.empty(TILE * TILE, kind), np.empty(TILE, np.int64)
    real, imaginary, factor = np.empty(NUMBERS, kind), np.empty(NUMBERS, kind), np.empty(NUMBERS, kind)
    for first in range(0, n, NUMBERS):
        count = min(NUMBERS, n - first)
        for m in range(len(particles)):
            mine, its = at[row_starts[m] : row_starts[m + 1]], shifts[shift_starts[m] : shift_starts[m + 1]]
            _prepare(images[particles[m]], weight[particles[m]], first // 2, count // 2, real, imaginary, factor)
            for r in range(0, len(mine), TILE):
                _places(mine, r, n, first, places)
                _energies(rows, places, factor, count, sums)
                for pair in range(min(TILE, len(mine) - r) * len(its)):
                    out[starts[m] + r * len(its) + pair] += sums[pair // len(its)]
            for s in range(0, len(its), TILE):
                used = min(TILE, len(its) - s)  # what else is in `moved` is summed up to no end
                for column in range(used):
                    _move(phases, its[s + column] * n + first, real, imaginary, count, moved, column * NUMBERS)
                for r in range(0, len(mine), TILE):
                    _places(mine, r, n, first, places)
                    _tile(rows, places, moved, count, sums)
                    for j in range(min(TILE, len(mine) - r)):
                        for column in range(used):
                            out[starts[m] + (r + j) * len(its) + s + column] += sums[TILE * j + column]
