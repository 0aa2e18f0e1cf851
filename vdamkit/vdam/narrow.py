"""The M-step's sums where posteriors are narrow: sample by sample, in one pass over the voxels, compiled by Numba.

Matrix products are quicker for each sample, but take all rotations × all shifts of the particles, and make operands first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from vdamkit.imaging.compiled import compiled
from vdamkit.vdam.search import Batch, Block, Posterior

if TYPE_CHECKING:
    from vdamkit.vdam.accumulate import RawBatch

VOXELS = 512  # at a time: a row of them, of every array, stays in the nearest cache


def sums(
    batch: Batch, raw: RawBatch, members: list[tuple[int, Block]], posteriors: list[Posterior], union: np.ndarray, model: Any,
    phases: Any, optics: list[int],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """As :func:`vdamkit.vdam.accumulate._matrix_sums`."""
    real = model.real.dtype
    data, total = np.zeros(model.shape, model.dtype), np.zeros(model.shape, real)
    noise = np.zeros((len(optics), model.shape[1]), real)
    part = {group: j for j, group in enumerate(optics)}
    parts = np.array([part[int(raw.optics[i])] for i, _ in members])
    entries = _entries(members, posteriors, union, real)
    images = phases, batch.unmasked, batch.weight, raw.masked, raw.weight
    _add(*entries, parts, *images, model, data, total, noise)
    return data, total, noise


def _entries(members: list[tuple[int, Block]], posteriors: list[Posterior], union: np.ndarray, real: np.dtype) -> tuple:
    """All that the posteriors hold, by particle, then shift, then rotation: see :func:`_add`."""
    shifts, counts, rows, weights, all_rows, masses = [], [], [], [], [], []
    for i, block in members:
        by_shift, at = block.scores.T, np.searchsorted(union, block.orientations)
        shift, row = np.nonzero(by_shift)
        used, count = np.unique(shift, return_counts=True)
        shifts.append(posteriors[i].shifts[used])
        counts.append(count)
        rows.append(at[row])
        weights.append(by_shift[shift, row])
        all_rows.append(at)
        masses.append(block.scores.sum(1))
    return (
        np.array([i for i, _ in members]), _starts(map(len, shifts)), np.concatenate(shifts), _starts(np.concatenate(counts)),
        np.concatenate(rows), np.concatenate(weights).astype(real), _starts(map(len, masses)), np.concatenate(all_rows),
        np.concatenate(masses).astype(real),
    )  # fmt: skip


def _starts(counts: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *counts])


@compiled
def _add(
    particles, samples, shifts, starts, rows, weights, mass_starts, mass_rows, masses,
    parts, phases, unmasked, weight, masked, raw_weight, model, data, total, noise,
):  # fmt: skip
    """Sums over the samples of some particles.

    Particle m is ``particles[m]`` and adds to the noise term ``parts[m]``; its samples are those from ``samples[m]`` up to
    ``samples[m + 1]``. Sample s is the shift ``shifts[s]``, with ``weights[e]`` at the rotation ``rows[e]`` for e from
    ``starts[s]`` up to ``starts[s + 1]``. `mass_starts`, `mass_rows` and `masses` are a particle's weights summed over shifts.
    """
    n = model.shape[1]
    moved, expected = np.empty(VOXELS, model.dtype), np.empty(VOXELS, model.dtype)
    for first in range(0, n, VOXELS):
        size = min(VOXELS, n - first)
        for m in range(len(particles)):
            i, residual = particles[m], noise[parts[m], first : first + size]
            b, w = unmasked[i, first : first + size], weight[i, first : first + size]
            raw, raw_w = masked[i, first : first + size], raw_weight[i, first : first + size]
            for s in range(samples[m], samples[m + 1]):
                wave = phases[shifts[s], first : first + size]
                for v in range(size):
                    moved[v] = wave[v] * b[v]
                    expected[v] = 0
                for e in range(starts[s], starts[s + 1]):
                    p, a, d = weights[e], model[rows[e], first : first + size], data[rows[e], first : first + size]
                    for v in range(size):
                        d[v] += p * moved[v]
                        expected[v] += p * a[v]
                for v in range(size):
                    seen = wave[v] * raw[v]
                    residual[v] -= 2 * raw_w[v] * (expected[v].real * seen.real + expected[v].imag * seen.imag)
            for f in range(mass_starts[m], mass_starts[m + 1]):
                p, a, t = masses[f], model[mass_rows[f], first : first + size], total[mass_rows[f], first : first + size]
                for v in range(size):
                    t[v] += p * w[v]
                    residual[v] += p * raw_w[v] * raw_w[v] * (a[v].real * a[v].real + a[v].imag * a[v].imag)
        for r in range(len(model)):
            a, d, t = model[r, first : first + size], data[r, first : first + size], total[r, first : first + size]
            for v in range(size):
                d[v] -= t[v] * a[v]
