"""What each kernel of the .cu files computes, in NumPy: their definition, and what they are tested against.

All write into their last arguments. "Ragged" arrays hold one run per particle, run i from ``start[i]`` to ``start[i + 1]``.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.sparse import csr_matrix

from vdamkit.imaging.trilinear import corners

KZ_BITS = 10  # of a voxel's cell: its kz; the rest is the number of its column's point in the disc
# by the rotations, and shifts, that a block of `score` takes: time per pair of them and voxel, and how many voxels its
# beginning and end are worth; those of 8 are counted (instructions over threads at once), not measured
SCORE_COST = {8: (2.0, 1000), 32: (1.6, 100), 64: (1.0, 100)}
TILE = 8  # patches along a side that are summed up together, see spin_adjoint
KZ = {4: 8, 8: 4}  # and voxels along kz, a layer, by the bytes of a number


def tilt(cube, turns, source, source_at, half_width: int, slabs) -> None:
    """Sample a padded half cube on the cylinders of some directions by trilinear interpolation.

    cube `(size,)` complex; turns `(d, 3, 3)`: PAD × the part D of a rotation ``Rz(psi) @ D``;
    source `(3, m)` the needed points of a cylinder; source_at `(m,)` their places in a slab; slabs `(d, slab size)` complex.
    """
    for turn, slab in zip(turns, slabs, strict=True):
        indices, weights, sign = corners(turn.T @ source, half_width)
        values = (cube[indices] * weights).sum(1)
        slab[source_at] = values.real + 1j * values.imag * sign


def tilt_adjoint(slabs, slab_weights, turns, owner, source, source_at, half_width: int, scales, sums) -> None:
    """Adjoint of :func:`tilt`, for two halves, into whole numbers: slabs `(2, d, slab size)` complex and weights, real.

    sums `(owners, 2, 3, size)` int64, real and imaginary part and weight, where direction d goes to number ``owner[d]``: what
    is added is multiplied by `scales` (data, weight) and rounded. Whole numbers add up to the same in any order.
    """
    for h in range(2):
        for turn, mine, slab, weight in zip(turns, owner, slabs[h], slab_weights[h], strict=True):
            indices, weights, sign = corners(turn.T @ source, half_width)
            values = (slab[source_at].real, slab[source_at].imag * sign, weight[source_at])
            for row, value, scale in zip(sums[mine, h], values, (scales[0], scales[0], scales[1]), strict=True):
                np.add.at(row, indices, np.rint(scale * weights * value[:, None].astype(np.float64)).astype(np.int64))


def tilt_back(slabs, turns, points, half_width: int, depth: int, width: int, sums) -> None:
    """Adjoint of :func:`tilt` for two halves and their weights, added to `sums` `(2, 3, size)` float64: real and imaginary
    part, weight.

    slabs `(d, width² depth, 2, 4)`: of each half real and imaginary part, weight, and nothing; 0 where a cylinder is not
    needed. turns as there. points `(3, m)` int32: x, y, z of all points of the cube that a cylinder can reach.
    """
    y, x, z = (a.ravel() - b for a, b in zip(np.indices((width, width, depth)), (width // 2, width // 2, 0), strict=True))
    for turn, slab in zip(turns, slabs, strict=True):
        used = np.flatnonzero(slab.any((1, 2)))
        indices, weights, sign = corners(turn.T @ np.stack([x, y, z])[:, used].astype(turn.dtype), half_width)
        for h in range(2):
            for row, value in zip(sums[h], (slab[used, h, 0], slab[used, h, 1] * sign, slab[used, h, 2]), strict=True):
                np.add.at(row, indices, weights * value[:, None].astype(np.float64))


def spin(slabs, spins, first, taps, pair, turned, depth: int, width: int, rows) -> None:
    """Turn cylinders in the plane, onto the half-ball.

    slabs `(d, width², depth)` complex, depth even. spins `(s, 6)` int32: number of the slab, of the angle, and for each of four
    quarter turns the row that it gives, or -1. first `(angles, discs)`: corner of the 4 × 4 taps of each disc point; taps
    `(angles, discs, 2, 4)`: their weights along x, along y. pair `(n/2,)` uint32: of each pair of voxels the disc point and,
    in KZ_BITS, the first's kz; turned `(4, n/2)` int32: the pair of a row where it goes after each quarter turn. rows
    `(rows, n)`.
    """
    disc, kz = pair >> KZ_BITS, pair & ((1 << KZ_BITS) - 1)
    disc, kz = np.repeat(disc, 2), np.stack([kz, kz + 1], 1).ravel()
    step = (np.arange(4)[:, None] * width + np.arange(4)).ravel()
    slabs = slabs.reshape(len(slabs), -1, depth)
    for d, angle, *members in spins:
        weights = (taps[angle, :, 1, :, None] * taps[angle, :, 0, None, :]).reshape(-1, 16)
        pairs = np.einsum("dt,dtz->dz", weights, slabs[d][first[angle][:, None] + step])[disc, kz].reshape(-1, 2)
        for row, to in zip(members, turned, strict=True):
            if row >= 0:
                rows[row].reshape(-1, 2)[to] = pairs


def spin_adjoint(
    values, weights, spin_start, spins, tile_range, source, source_count, patch_range, entry, entry_weight, needed,
    absolute_sum: float, depth: int, width: int, slabs,
) -> None:  # fmt: skip
    """Adjoint of :func:`spin`, summed over the spins of each direction; weights with the absolute values of the taps.

    values `(2, rows, n)` complex and weights, real, for two halves. Spins (as there, but for the first number) of direction d:
    ``spin_start[d]`` to ``spin_start[d + 1]``. A patch is 2 × 2 columns of the cylinder, a tile TILE × TILE patches, one after
    the other. tile_range `(angles, layers, tiles, 2)` int32: for each tile the range of columns of the half-ball that bear on
    it and reach a layer of KZ voxels; of these, longest first, source `(sources, 4)` int32, first voxel of a column by quarter
    turn, and source_count, how many voxels. patch_range `(angles, layers, patches, 2)`: for each patch the range of its
    entries: number among the tile's columns, and entry_weight `(entries, 4)`, on each of the four. needed `(width² depth,)`
    uint8: where a cylinder is read. slabs as for :func:`tilt_back`.
    """
    side = round(patch_range.shape[2] ** 0.5)
    tile, within = np.divmod(np.arange(side**2), TILE**2)
    y, x = (TILE * a + b for a, b in zip(np.divmod(tile, side // TILE), np.divmod(within, TILE), strict=True))
    kz, room = np.arange(depth), max(2 * side, width)

    def summed(ends: np.ndarray, values: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Runs of `values` `(entries, depth)`, weighted in four ways, as columns of the cylinder."""
        numbers = np.arange(len(values))
        slab = np.zeros((room, room, depth), values.dtype)
        for j in range(4):
            slab[2 * y + j // 2, 2 * x + j % 2] = csr_matrix((w[:, j], numbers, ends), (len(x), len(values))) @ values
        return slab[:width, :width].ravel() * needed

    slabs[:] = 0
    for h in range(2):
        for d, (begin, end) in enumerate(pairwise(spin_start.tolist())):
            for _, angle, *members in spins[begin:end].tolist():
                start, stop = patch_range[angle, 0].T  # the first layer, which all columns reach
                mine, ends = slice(start[0], stop[-1]), np.append(start, stop[-1]) - start[0]
                column = np.repeat(tile_range[angle, 0, tile, 0], stop - start) + entry[mine]
                inside, w = kz < source_count[column, None], entry_weight[mine]
                for quarter, r in enumerate(members):
                    if r < 0:
                        continue
                    at = np.where(inside, source[column, quarter, None] + kz, 0)
                    data = summed(ends, np.where(inside, values[h, r, at], 0), w)
                    slabs[d, :, h, 0] += data.real
                    slabs[d, :, h, 1] += data.imag
                    slabs[d, :, h, 2] += summed(ends, np.where(inside, weights[h, r, at], 0), np.abs(w)) / absolute_sum


def collect(values, rows, order, out) -> None:
    """``values[rows][:, order]``, and 0 where the order is -1: values `(m, width)` complex or real, rows and order int32."""
    out[:] = np.where(order < 0, values.dtype.type(0), values[rows[:, None], order])


def phases(turns, k, out) -> None:
    """``exp(-2 pi i k.t)``: turns `(m, 3)` float64, shifts over the box; k `(n, 3)` int32; out `(m, n)`."""
    out[:] = np.exp(-2j * np.pi * (turns @ k.T.astype(np.float64)))


def moved_pairs(images, shift_phases, pairs, even, odd) -> None:
    """Each image moved by each shift, as sums (`even`) and differences (`odd`) of the voxels of pairs.

    images `(p, >= n)` complex; shift_phases `(S, n)`; pairs `(2, m)` int32, of which -1 stands for 0; even, odd `(p S, m)`.
    """
    factors = np.where(pairs < 0, 0, shift_phases[:, pairs])
    one, other = (images[:, None, pairs] * factors).reshape(-1, *pairs.shape).swapaxes(0, 1)
    even[:], odd[:] = one + other, one - other


def score(
    rows, data, weight, shift_phases, blocks, entry_start, entry_row, entry_out, entry_prior, shift_start, shift, shift_prior,
    scores, *, tile: int,
) -> None:  # fmt: skip
    """Log-posteriors (but for a constant) of particles' entries (rotations) × shifts.

    rows `(r, n)` complex; data `(p, ≥ n)` complex, b/σ²; weight likewise, w/σ²; shift_phases `(shifts, n)`. Ragged by particle:
    entries (their row, the place of their first score, their log prior), and shifts (number, log prior). blocks `(·, 4)` int32:
    what is scored, at most `tile` entries and as many shifts each: particle, its first entry, its first shift (counted from
    the particle's own), and nothing.
    """
    n = rows.shape[1]
    for i, entry, first, _ in blocks.tolist():
        begin, end = entry_start[i] + entry, min(entry_start[i] + entry + tile, entry_start[i + 1])
        mine = slice(shift_start[i] + first, min(shift_start[i] + first + tile, shift_start[i + 1]))
        moved = shift_phases[shift[mine]] * data[i, :n]
        some = rows[entry_row[begin:end]]
        values = (some.conj() @ moved.T).real - 0.5 * (np.abs(some) ** 2 @ weight[i, :n])[:, None]
        values += entry_prior[begin:end, None] + shift_prior[mine]
        scores[entry_out[begin:end, None] + first + np.arange(len(moved))] = values


def normalise(scores, start, peak, total, best) -> None:
    """Scores (ragged) to weights relative to the largest; its value, the sum of the weights, and the largest's place."""
    for i, (begin, end) in enumerate(pairwise(start.tolist())):
        mine = scores[begin:end]
        best[i] = begin + mine.argmax()
        peak[i] = mine.max()
        mine[:] = np.exp(mine - mine.max())
        total[i] = mine.sum(dtype=np.float64)


def threshold(weights, start, target, cap: int, out) -> None:
    """The largest limit (above 0) at which the weights that reach it sum to `target` or are `cap` in number, per particle."""
    for i, (begin, end) in enumerate(pairwise(start.tolist())):
        ordered = np.sort(weights[begin:end])[::-1]
        enough = int(np.searchsorted(np.cumsum(ordered, dtype=np.float64), target[i]))
        at = min(enough, cap - 1, len(ordered) - 1)
        out[i] = max(ordered[at], np.nextafter(ordered.dtype.type(0), ordered.dtype.type(1)))


def entry_sums(
    weights, base, stride: int, particle, shift_start, shift_line, shift_prior, limit, total, count, lines, mass, moment
) -> None:
    """Of each entry: how many of its weights reach the limit, on how many lines, their sum, and their sum with the shifts' log
    priors.

    Weight s of entry e is ``weights[base[e] + s * stride]``; sums are divided by the particle's `total`. Shifts with the same
    `shift_line` follow one another.
    """
    for e, i in enumerate(particle.tolist()):
        of_particle = slice(shift_start[i], shift_start[i + 1])
        prior = shift_prior[of_particle]
        mine = weights[base[e] + stride * np.arange(len(prior))].astype(np.float64)
        kept = mine >= limit[i]
        count[e], mass[e], moment[e] = kept.sum(), mine[kept].sum() / total[i], mine[kept] @ prior[kept] / total[i]
        lines[e] = len(np.unique(shift_line[of_particle][kept]))


def samples(
    weights, base, stride: int, particle, shift_start, shift, limit, total, sample_start, sample_shift, sample_weight
) -> None:  # fmt: skip
    """The weights that reach the limit, normalised, and their shifts; those of entry e from ``sample_start[e]`` on."""
    for e, i in enumerate(particle.tolist()):
        mine = shift[shift_start[i] : shift_start[i + 1]]
        w = weights[base[e] + stride * np.arange(len(mine))]
        kept = w >= limit[i]
        to = slice(sample_start[e], sample_start[e] + int(kept.sum()))
        sample_shift[to], sample_weight[to] = mine[kept], w[kept] / total[i]


def column_sums(values, sums) -> None:
    """Sums over the first axis of `values`, added to `sums`, float64."""
    sums += values.sum(0, dtype=np.float64)


def shell_sums(values, factor, voxel, start, sums) -> None:
    """Σ factor × value over the voxels of each shell: values `(rows, n)` float64, factor `(n,)`; those of shell s from
    ``start[s]`` to ``start[s + 1]`` in `voxel`, int32 both. sums `(rows, shells)` float64."""
    for s, (begin, end) in enumerate(pairwise(start.tolist())):
        mine = voxel[begin:end]
        sums[:, s] = values[:, mine] @ factor[mine].astype(np.float64)


def own_power(raw, raw_weight, particle, run_start, sums) -> None:
    """Σ |b|² and Σ w of runs of particles: raw, raw_weight `(p, n)`; run i from ``run_start[i]`` to ``run_start[i + 1]`` in
    `particle`, int32 both. sums `(runs, 2, n)`, of few terms each."""
    for i, (begin, end) in enumerate(pairwise(run_start.tolist())):
        mine = particle[begin:end]
        sums[i] = (np.abs(raw[mine]) ** 2).sum(0), raw_weight[mine].sum(0)


def wave_planes(
    waves, lines, disc, sample_start, sample_count, sample_shift, sample_weight, plane_start, planes, plane_z, *,
    first: int, members: int,
) -> None:  # fmt: skip
    """Σ_t p e^{-2πi (kx x + ky y)/N} over the samples t of some members, for each z by itself.

    waves `(m, width)`: ``exp(-2 pi i k s)`` along an axis for some shifts s, and k from 1 - width/2 on, which is even; lines
    `(shifts, 4)` int32: which of them each shift has in x, y and z. disc `(d, 2)` int32: kx and ky of each column of the
    half-ball. The samples of each member are sorted by z, then y. Planes of member ``first + i``, of `members`: `(d,)` complex,
    from ``plane_start[first + i] - plane_start[first]`` on in `planes`; their z is written to `plane_z`.
    """
    x, y = disc.T + waves.shape[1] // 2 - 1
    for m in range(first, first + members):
        mine = slice(sample_start[m], sample_start[m] + sample_count[m])
        along_x, along_y, along_z, _ = lines[sample_shift[mine]].T
        parts = sample_weight[mine, None] * waves[along_x[:, None], x] * waves[along_y[:, None], y]
        different, begin = np.unique(along_z, return_index=True)
        some = slice(plane_start[m] - plane_start[first], plane_start[m + 1] - plane_start[first])
        planes[some], plane_z[some] = np.add.reduceat(parts, begin), different


def row_sums(
    rows, waves, pair, row_start, particle, group, mass, plane_start, planes, plane_z, unmasked, weight, raw, raw_weight, half,
    gradient, total, noise, *, rows_at_once: int,
) -> None:  # fmt: skip
    """What the significant samples of each rotation say: residual and weight by half, and its part of the noise.

    rows `(r, n)`, n even; pair as for :func:`spin`. Members of row r (ragged by row): particle, optics group, summed weight
    (`mass`), planes, of which the first member's are the first in `planes` (see :func:`wave_planes`). unmasked, weight
    `(p, n)`: b/σ², w/σ²; raw, raw_weight: masked b, w. gradient, total `(2, r, n)` are set. For every `rows_at_once` rows,
    noise `(·, groups, n)` is added to: Σ_t p |w A e^{...}|² - 2 Re conj(w A) b e^{...}, to which the particles' own power is
    still to be added.
    """
    gradient[:], total[:] = 0, 0
    column, kz = np.repeat(pair >> KZ_BITS, 2), pair & ((1 << KZ_BITS) - 1)
    along_z = waves[:, np.stack([kz, kz + 1], 1).ravel() + waves.shape[1] // 2 - 1]
    for r, (begin, end) in enumerate(pairwise(row_start.tolist())):
        energy, block = np.abs(rows[r]) ** 2, r // rows_at_once
        for m in range(begin, end):
            i, some = int(particle[m]), slice(*(plane_start[m : m + 2] - plane_start[row_start[0]]))
            wave = (planes[some][:, column] * along_z[plane_z[some]]).sum(0)
            gradient[half[i], r] += wave * unmasked[i] - mass[m] * weight[i] * rows[r]
            total[half[i], r] += mass[m] * weight[i]
            seen = (rows[r].conj() * wave * raw[i]).real
            noise[block, group[m]] += raw_weight[i] * (raw_weight[i] * mass[m] * energy - 2 * seen)
    np.maximum(total, 0, out=total)
