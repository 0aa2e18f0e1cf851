"""Scores of the finer levels: of each particle at rotations and shifts of its own, as matrix products."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from vdamkit.vdam.dense import interleaved, scored_energy

COLUMNS = 128  # moved images that are scored in one product
WASTE = 8  # scores that one product may have for each that is wanted, before particles are scored one by one


def scores(
    rows: Any, at: list[np.ndarray], phases: Any, shifts: list[np.ndarray], images: Any, weight: Any, particles: list[int]
) -> list[Any]:
    """``Re Σ conj(A) b e^{…} − ½ Σ w |A|²`` of some particles, `(rows, shifts)` real each.

    Parameters
    ----------
    rows: rotated references A, `(R, n)` complex. phases: `(S, n)` complex, of all shifts.
    at, shifts: of each particle, which of the rows and which of the shifts, both ascending.
    images, weight: b and w of the whole mini-batch, `(p, ≥ n)`. particles: which rows of these.
    """
    n = rows.shape[1]
    out: list[Any] = [None] * len(particles)
    order = sorted(range(len(particles)), key=lambda m: at[m].mean())  # neighbours have most rows in common
    energy = weight[particles, :n] @ scored_energy(rows).T
    for first, last in _by_columns([len(shifts[m]) for m in order]):
        some = order[first:last]
        mine = images[[particles[m] for m in some], :n]
        found = overlaps(rows, [at[m] for m in some], phases, [shifts[m] for m in some], mine)
        for m, overlap in zip(some, found, strict=True):
            overlap -= 0.5 * energy[m, at[m], None]
            out[m] = overlap
    return out


def _by_columns(widths: list[int]) -> list[tuple[int, int]]:
    """Ranges of consecutive particles of as many shifts, together, as make an efficient matrix product."""
    number = np.append(0, np.cumsum(widths)[:-1]) // COLUMNS
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(widths)]
    return list(pairwise(cuts))


def overlaps(rows: Any, at: list[np.ndarray], phases: Any, shifts: list[np.ndarray], images: Any) -> list[Any]:
    """``Re Σ conj(A) b e^{…}`` of some particles, each at its own rows `at` and shifts (both ascending): `(rows, shifts)`.

    One product for all: every row that any of them wants with every moved image is less work than copies of rows for each,
    unless they have little in common.
    """
    real = images.real.dtype
    ends = np.cumsum([0, *map(len, shifts)])
    wanted = np.unique(np.concatenate(at))
    if len(at) > 1 and len(wanted) * ends[-1] > WASTE * sum(len(a) * len(b) for a, b in zip(at, shifts, strict=True)):
        alone = zip(at, shifts, images, strict=True)
        return [overlaps(rows, [places], phases, [mine], image[None])[0] for places, mine, image in alone]
    if len(at) == 1 and len(wanted) < len(shifts[0]):  # as in local searches: the rows are fewer, so they take the image
        own = rows if len(wanted) == len(rows) else rows[wanted]
        waves = phases if len(shifts[0]) == len(phases) else phases[shifts[0]]
        return [interleaved(own * images[0].conj(), real) @ interleaved(waves, real).T]
    if 2 * len(wanted) >= len(rows):  # to score a few more takes less time than to copy these
        wanted = np.arange(len(rows))
    else:
        rows = rows[wanted]
    moved = np.empty((ends[-1], rows.shape[1]), rows.dtype)
    for image, mine, (first, last) in zip(images, shifts, pairwise(ends), strict=True):
        phases.take(mine, axis=0, out=moved[first:last], mode="clip")  # no check, no copy
        moved[first:last] *= image
    product = interleaved(rows, real) @ interleaved(moved, real).T
    return [product[np.searchsorted(wanted, mine), a:b] for mine, (a, b) in zip(at, pairwise(ends), strict=True)]
