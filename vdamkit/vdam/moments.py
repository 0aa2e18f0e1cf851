"""The VDAM step: from the sums of a mini-batch to moments, Wiener factor and the next map.

Source: RELION backprojector.cpp:reweightGrad, getFristMoment, getSecondMoment, applyMomenta, reconstructGrad
Weight floor and epsilon are relative to shell means, so that the grey scale of the data has no
effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vdamkit.backend import Backend
from vdamkit.imaging.fsc import points_fsc
from vdamkit.imaging.group_mean import group_mean, lattice_factors
from vdamkit.imaging.halfball import fourier_grid, fourier_to_map, map_to_fourier
from vdamkit.imaging.masks import EDGE, soft_sphere, soften_corners
from vdamkit.imaging.projector import PAD, PaddedGrid, points_within
from vdamkit.imaging.trilinear import corners, csr_rows

WEIGHT_FLOOR = 1e-3  # of the shell mean of the weight (RELION: max(1, weight))
EPSILON = 1e-12  # of the shell mean of |d|², in the second moment
RATIO_LIMIT = 1e6  # of one voxel's noise-to-signal ratio, which has no finite mean


@lru_cache(maxsize=24)
def _turn_operator(half_width: int, radius: float, matrix: bytes, dtype: str) -> tuple:
    """Sparse operator that reads a half cube at ``R K`` for all its points within `radius`, and the Friedel signs."""
    rotation = np.frombuffer(matrix).reshape(3, 3)
    points, _ = points_within(half_width, radius)
    indices, weights, sign = corners((rotation @ points).astype(dtype), half_width)
    operator = csr_rows(indices, weights, (2 * half_width + 1) ** 2 * (half_width + 2))
    operator.eliminate_zeros()  # a turn that keeps planes, or the whole grid, needs a half or an eighth of the corners
    return operator, sign


def complete(grid: PaddedGrid, cubes: np.ndarray) -> np.ndarray:
    """Make the plane kx = 0 of half cubes `(..., 3, size)` hold the sum of both Friedel mates, as the rest implies.

    Source: RELION backprojector.cpp:enforceHermitianSymmetry (sum, not mean).
    """
    out = cubes.reshape(-1, 3, *grid.shape).copy()
    mate = out[:, :, ::-1, ::-1, 0].copy()
    out[:, ::2, :, :, 0] += mate[:, ::2]
    out[:, 1, :, :, 0] -= mate[:, 1]  # the imaginary part changes sign with the mate
    return out.reshape(cubes.shape)


def symmetrise(grid: PaddedGrid, cubes: np.ndarray, group: str, backend: Backend) -> np.ndarray:
    """Sum completed half cubes `(..., 3, size)` over the operators of a point group (sums, not means): over those that keep the
    lattice, then over what is left.

    Source: RELION backprojector.cpp:applyPointGroupSymmetry.
    """
    exchanges, turns = lattice_factors(group)
    if len(exchanges) * len(turns) == 1:
        return cubes
    rows = cubes.reshape(-1, grid.size)
    # what turns read beyond the points that they are summed at must hold the exchanges' sum too
    reach = ((grid.half_width - 1 + np.sqrt(3)) / PAD, (grid.half_width - 1) / PAD)
    steps = []
    for some, radius in zip((exchanges, turns), reach, strict=True):
        made = [_turn_operator(grid.half_width, radius, m.astype(float).tobytes(), grid.dtype.name) for m in some[1:]]
        if made:
            steps.append((points_within(grid.half_width, radius)[1], made))

    def summed(number: int) -> np.ndarray:
        out = rows[number]
        for flat, made in steps:
            total = out[flat]
            for matrix, sign in made:
                values = matrix @ out
                total += values * sign if number % 3 == 1 else values  # the imaginary part changes sign with the mate
            out = out.copy()
            out[flat] = total
        return out

    return np.stack(backend.map(summed, range(len(rows)))).reshape(cubes.shape)


@dataclass(frozen=True)
class HalfGradients:
    """Local least-squares residuals of the two pseudo-halves and their weights, on the map's own Fourier grid."""

    d: np.ndarray  # (2, N, N, N//2 + 1) complex
    weight: np.ndarray  # (2, N//2 + 1) weight per voxel of the map's grid, mean over shells


def half_gradients(grid: PaddedGrid, cubes: np.ndarray, group: str, radius: int, backend: Backend) -> HalfGradients:
    """``d_h = data_h / max(weight_h, floor)`` for ``|k| < radius`` from scattered sums `(2, 3, size)` of one class.

    The division happens on the padded grid, where each value is an average of residuals with positive weights; only then
    is d cropped to the map's box. (Cropping data and weight first and dividing after lets strong voxels leak into weak
    ones, and low shells, where the CTF is near 0, diverge.) Source: RELION backprojector.cpp:reweightGrad.
    """
    cubes = symmetrise(grid, complete(grid, cubes), group, backend)
    shells = padded_shells(grid.half_width, radius, grid.box)
    means = np.zeros((2, grid.box // 2 + 1))

    def gradient(h: int) -> np.ndarray:
        real, imaginary, w = cubes[h][:, shells.inside]
        means[h], floor = weight_floor(shells, w)
        d = np.zeros(grid.size, np.result_type(w.dtype, np.complex64))
        d[shells.inside] = (real + 1j * imaginary) / np.maximum(w, floor[shells.shell])
        d.reshape(grid.shape)[..., 0] *= 0.5  # to_map lets every entry stand for its mate too; kx = 0 holds both
        return map_to_fourier(grid.to_map(d) / PAD**3)

    d = backend.map(gradient, (0, 1))
    return HalfGradients(np.stack(d), means * PAD**3)


@dataclass(frozen=True)
class PaddedShells:
    """The points of a padded half cube within a radius of the map's grid."""

    shell: np.ndarray  # (m,) of the map's grid
    inside: np.ndarray  # (m,) place in the flattened cube
    counts: np.ndarray  # (m,) how often each counts: 2 where the Friedel mate is implied
    total: np.ndarray  # (N//2 + 1,) counts of each shell


def weight_floor(shells: PaddedShells, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean weight of every shell, and what a residual is at least divided by there: infinity where nothing is known."""
    means = np.bincount(shells.shell, weight * shells.counts, len(shells.total)) / np.maximum(shells.total, 1)
    floor = np.maximum(WEIGHT_FLOOR * means, np.finfo(weight.dtype).tiny)
    return means, np.where(means > 0, floor, np.inf).astype(weight.dtype)


@lru_cache(maxsize=8)
def padded_shells(half_width: int, radius: int, box: int) -> PaddedShells:
    """The points of a padded half cube of ±`half_width` within `radius` px; `box`: of the map."""
    line = np.arange(-half_width, half_width + 1) / PAD
    x = np.arange(half_width + 2) / PAD
    k = np.sqrt(line[:, None, None] ** 2 + line[None, :, None] ** 2 + x[None, None] ** 2)
    counts = np.full(k.shape, 2.0)
    counts[..., 0] = 1
    inside = np.flatnonzero(k < radius)
    shell = np.minimum(np.rint(k.ravel()[inside]).astype(np.int32), box // 2)
    counts = counts.ravel()[inside]
    return PaddedShells(shell, inside, counts, np.bincount(shell, counts, box // 2 + 1))


@dataclass(frozen=True)
class Update:
    """Result of :func:`vdam_update` for one class."""

    map: np.ndarray
    moment1: np.ndarray
    moment2: np.ndarray
    wiener: np.ndarray  # (N//2 + 1,)
    half_fsc: np.ndarray  # (N//2 + 1,)
    power: np.ndarray  # (N//2 + 1,) mean |P|² of the map before, by shell


def vdam_update(
    volume: np.ndarray, moment1: np.ndarray, moment2: np.ndarray, gradients: HalfGradients, *,
    radius: int, step: float, T: float, momentum: float, second_momentum: float,
) -> Update:  # fmt: skip
    """One VDAM step of one class.

    Parameters
    ----------
    volume: `(N, N, N)` zyx, the current map. moment1: `(2, N, N, N//2+1)`. moment2: `(N, N, N//2+1)`.
    radius: px; only ``|k| < radius`` changes, and the new map has nothing beyond.
    step: η of this class. T: regularisation in force.

    Formulas, per voxel (m: first moments, v: second, s: shell):

        m_h ← λ1 m_h + (1 − λ1) d_h            (the first time m_h = d_h)
        v   ← λ2 v + (1 − λ2) |d_1 − d_0|² / |(d_0 + d_1)/2|²
        g   = ½ (m_0 + m_1) / √v
        f(s) = snr / (1 + snr),   snr(s) = 2 T ⟨|P|⟩ / ⟨|m_0 − m_1|⟩
        P   ← P + η [ f g − (1 − f) P ]
    """
    box = volume.shape[0]
    inside = fourier_grid(box).within(radius)
    shell = np.minimum(inside.shell, box // 2)
    d0, d1 = d = gradients.d.reshape(2, -1)[:, inside.at]
    new1, new2 = moment1.copy(), moment2.copy()
    flat1, flat2 = new1.reshape(2, -1), new2.reshape(-1)  # views
    for h, mine in enumerate(flat1):
        mine[inside.at] = momentum * mine[inside.at] + (1 - momentum) * d[h] if moment1[h].any() else d[h]
    floor = EPSILON * inside.means(np.abs(d0) ** 2 + np.abs(d1) ** 2)[shell] + np.finfo(np.float64).tiny
    ratio = np.minimum(np.abs(d1 - d0) ** 2 / (np.abs(0.5 * (d0 + d1)) ** 2 + floor), RATIO_LIMIT)
    flat2[inside.at] = second_momentum * flat2[inside.at] + (1 - second_momentum) * ratio

    m0, m1 = flat1[:, inside.at].astype(np.complex128)
    g = 0.5 * (m0 + m1) / np.sqrt(np.maximum(flat2[inside.at], 1e-24))
    P = map_to_fourier(volume).ravel()[inside.at]
    noise, signal = inside.means(np.abs(m0 - m1)), inside.means(np.abs(P))
    snr = np.where(noise > 0, 2 * T * signal / np.where(noise > 0, noise, 1), 0.0)
    f = snr / (1 + snr)
    factor = f[shell]
    new = np.zeros(moment2.shape, np.complex128)
    new.reshape(-1)[inside.at] = P + step * (factor * g - (1 - factor) * P)
    new_map = soften_corners(fourier_to_map(new))
    return Update(new_map, new1, new2, f, points_fsc(inside, m0, m1), inside.means(np.abs(P) ** 2))


def constrained(
    volume: np.ndarray, solvent: str, mask_radius: float, group: str = "C1", backend: Backend | None = None
) -> np.ndarray:  # fmt: skip
    """What the settings ask of a map: nothing outside the mask, a point group's symmetry, nothing negative.

    volume: `(N, N, N)` zyx. solvent: as in `Settings.solvent`. mask_radius: px.

    Averaging over the group makes sure that a map made in C6 is C6. RELION only sums the gradient over the group: what breaks
    the symmetry, as interpolation and the second moment do by a little in every mini-batch, is then corrected by no data and
    piles up (a map that RELION itself made in C6 differs from its C6 mean by 9 % after 20 mini-batches).
    Source of the rest: RELION ml_optimiser.cpp:solventFlatten.
    """
    masked = solvent != "none"
    if masked:
        volume = volume * soft_sphere(volume.shape[0], mask_radius, 3)
    volume = group_mean(volume, group, mask_radius + EDGE if masked else None, backend)
    return np.maximum(volume, 0) if solvent == "mask+non-negative" else volume


def resolution_statistics(power: np.ndarray, weight: np.ndarray, T: float) -> tuple[np.ndarray, np.ndarray]:
    """tau2 (``mean |P|² / 2``) and data_vs_prior (``T tau2 × mean weight of half 0``) by shell, `(N//2 + 1,)` each.

    `power` `(N//2 + 1,)`: mean |P|² of the map before the update, by shell; `weight` likewise, of half 0. Source: RELION
    backprojector.cpp:updateSSNRarrays; without avgctf2, since the weight holds CTF²/σ² already.
    """
    tau2 = power / 2
    return tau2, T * tau2 * weight
