"""The VDAM step on planted moments, and gradients that lead to the object."""

import numpy as np
import pytest
from helpers_vdamkit import Blobs, random_rotations, relative_error

from vdamkit.backend import get_backend
from vdamkit.imaging.fsc import fsc
from vdamkit.imaging.halfball import fourier_grid, fourier_to_map, map_to_fourier
from vdamkit.imaging.masks import soft_sphere
from vdamkit.imaging.projector import Projector
from vdamkit.vdam.moments import (
    HalfGradients,
    complete,
    constrained,
    half_gradients,
    resolution_statistics,
    symmetrise,
    vdam_update,
)

BOX, RADIUS = 16, 6
HALF = BOX // 2 + 1
GRID = fourier_grid(BOX)
INSIDE = GRID.k2 < RADIUS**2
CPU = get_backend("cpu", 1)
OBJECT = Blobs.random(7, reach=3.5, sigma=1.1, seed=3)
MAP = OBJECT.map(BOX) * soft_sphere(BOX, 5, 3, 2.0)


def transforms(seed: int, scale: float = 1e-3) -> np.ndarray:
    """Transforms of two random real maps, `(2, ...)`."""
    noise = np.random.default_rng(seed).normal(size=(2, BOX, BOX, BOX))
    return np.stack([map_to_fourier(n) for n in noise]) * scale * BOX**1.5


def update(d, moment1=None, moment2=None, volume=MAP, **changes):
    options = {"radius": RADIUS, "step": 0.7, "T": 4.0, "momentum": 0.9, "second_momentum": 0.999} | changes
    moment1 = np.zeros((2, BOX, BOX, HALF), complex) if moment1 is None else moment1
    moment2 = np.ones((BOX, BOX, HALF)) if moment2 is None else moment2
    return vdam_update(volume, moment1, moment2, HalfGradients(d, np.ones((2, HALF))), **options)


def test_first_moment_is_copied_once_then_decays():
    d, m = transforms(0), transforms(1)
    first = update(np.where(INSIDE, d, 0))
    np.testing.assert_allclose(first.moment1[:, INSIDE], d[:, INSIDE])
    later = update(d, m)
    np.testing.assert_allclose(later.moment1[:, INSIDE], 0.9 * m[:, INSIDE] + 0.1 * d[:, INSIDE])
    np.testing.assert_array_equal(later.moment1[:, ~INSIDE], m[:, ~INSIDE])


def test_first_moment_beyond_the_radius_stays_empty():
    """Shells that enter later start from 0, also in the very first call."""
    first = update(transforms(0))
    assert (first.moment1[:, ~INSIDE] == 0).all()


def test_second_moment_is_noise_to_signal():
    d, v = transforms(2), np.random.default_rng(3).uniform(0.5, 2, (BOX, BOX, HALF))
    ratio = np.abs(d[1] - d[0]) ** 2 / np.abs(0.5 * (d[0] + d[1])) ** 2
    found = update(d, moment2=v).moment2
    np.testing.assert_allclose(found[INSIDE], (0.999 * v + 0.001 * ratio)[INSIDE], rtol=1e-6)
    np.testing.assert_array_equal(found[~INSIDE], v[~INSIDE])


def test_second_moment_of_planted_values():
    """Halves 3 and 1: |1 - 3|² / 2² = 1. Equal halves: 0. Opposite halves: the limit, not infinity."""
    one = np.where(INSIDE, 1.0 + 0j, 0)
    for a, b, ratio in ((3, 1, 1.0), (2, 2, 0.0), (1j, 1j, 0.0), (1, 0, 4.0)):
        found = update(np.stack([a * one, b * one]), second_momentum=0.9).moment2[INSIDE]
        np.testing.assert_allclose(found, 0.9 + 0.1 * ratio, rtol=1e-9)
    opposite = update(np.stack([one, -one])).moment2[INSIDE]
    assert np.isfinite(opposite).all()
    assert (opposite > 100).all()


def test_step_is_the_formula():
    """P + eta (f g - (1 - f) P), with f and g written out."""
    d, m, v = transforms(4), transforms(5), np.random.default_rng(6).uniform(0.5, 2, (BOX, BOX, HALF))
    found = update(d, m, v, step=0.6, T=3.0)
    m0, m1 = 0.9 * m + 0.1 * d
    v = 0.999 * v + 0.001 * np.abs(d[1] - d[0]) ** 2 / np.abs(0.5 * (d[0] + d[1])) ** 2
    P = map_to_fourier(MAP)
    f = np.zeros(HALF)
    for s in range(RADIUS + 1):
        at = INSIDE & (GRID.shell == s)
        weight = GRID.weight[at]
        signal, noise = (np.average(np.abs(x)[at], weights=weight) for x in (P, m0 - m1))
        f[s] = 2 * 3.0 * signal / noise / (1 + 2 * 3.0 * signal / noise)
    np.testing.assert_allclose(found.wiener[: RADIUS + 1], f[: RADIUS + 1], rtol=1e-6)
    F = f[np.minimum(GRID.shell, HALF - 1)]
    new = np.where(INSIDE, P + 0.6 * (F * 0.5 * (m0 + m1) / np.sqrt(v) - (1 - F) * P), 0)
    r = np.sqrt((np.stack(np.indices((BOX,) * 3) - BOX // 2) ** 2).sum(0))
    core = r <= BOX // 2 - 3  # further out the corners are blended
    np.testing.assert_allclose(found.map[core], fourier_to_map(new)[core], atol=1e-9 * np.abs(found.map).max())


def test_no_noise_gives_a_factor_of_one_no_signal_of_zero():
    d = transforms(7)[0]
    almost = update(np.stack([d, d * (1 + 1e-9)]))
    np.testing.assert_allclose(almost.wiener[: RADIUS - 1], 1, atol=1e-6)
    none = update(transforms(8), volume=np.zeros((BOX,) * 3))
    assert (none.wiener == 0).all()
    assert np.abs(none.map).max() == 0


def test_more_t_more_trust():
    d = transforms(9)
    factors = [update(d, T=T).wiener[1:RADIUS] for T in (0.5, 1, 4, 16)]
    assert (np.diff(factors, axis=0) > 0).all()
    assert (np.array(factors) < 1).all()


def test_empty_shell_stays_empty():
    """P = 0 is a fixed point of a shell."""
    P = np.where(GRID.shell == 4, 0, map_to_fourier(MAP))
    found = update(transforms(10), volume=fourier_to_map(P))
    assert found.wiener[4] < 1e-9
    assert found.wiener[3] > 0.01


def test_map_has_nothing_beyond_the_radius():
    """Up to the blending of the corners, for an object that does not reach them."""
    gradient = map_to_fourier(MAP)
    found = update(np.stack([1.1 * gradient, 0.9 * gradient]))
    power = np.abs(map_to_fourier(found.map)) ** 2
    assert power[~INSIDE].sum() < 1e-3 * power[INSIDE].sum()


def test_grey_scale_has_no_effect():
    """Data, map and moments times 1000: everything scales, no constant interferes."""
    d, m = transforms(11), transforms(12)
    a = update(d, m)
    for scale in (1e3, 1e-3):
        b = update(scale * d, scale * m, volume=scale * MAP)
        np.testing.assert_allclose(b.map, scale * a.map, atol=1e-9 * scale * np.abs(a.map).max())
        np.testing.assert_allclose(b.moment2, a.moment2, rtol=1e-9)
        np.testing.assert_allclose(b.wiener, a.wiener, rtol=1e-9)


def test_half_fsc_is_that_of_the_moments():
    d = transforms(13)
    found = update(np.where(INSIDE, d, 0)).half_fsc
    maps = [fourier_to_map(np.where(INSIDE, x, 0)) for x in d]
    np.testing.assert_allclose(found[: RADIUS - 1], fsc(*maps)[: RADIUS - 1], atol=1e-9)
    same = np.where(INSIDE, d[0], 0)
    np.testing.assert_allclose(update(np.stack([same, same])).half_fsc[: RADIUS - 1], 1)


def test_resolution_statistics():
    weight = np.linspace(5, 1, HALF)
    tau2, ratio = resolution_statistics(update(transforms(0)).power, weight, 4.0)
    P2 = np.abs(map_to_fourier(MAP)) ** 2
    for s in range(RADIUS):
        at = INSIDE & (GRID.shell == s)
        assert tau2[s] == pytest.approx(np.average(P2[at], weights=GRID.weight[at]) / 2, rel=1e-6)
    np.testing.assert_allclose(ratio, 4 * tau2 * weight)
    assert (ratio[RADIUS + 1 :] == 0).all()


@pytest.mark.parametrize("how", ["mask", "mask+non-negative", "none"])
def test_solvent(how):
    volume = np.random.default_rng(14).normal(size=(BOX,) * 3)
    out = constrained(volume, how, 2.5)
    r = np.sqrt((np.stack(np.indices(volume.shape) - BOX // 2) ** 2).sum(0))
    if how == "none":
        np.testing.assert_array_equal(out, volume)
        return
    assert (out[r >= 7.5] == 0).all()
    core = volume[r <= 2.5]
    np.testing.assert_allclose(out[r <= 2.5], np.maximum(core, 0) if "non" in how else core)
    assert (out.min() < 0) == (how == "mask")


# from scattered sums ------------------------------------------------------------------------------------------------


def scattered(projector: Projector, rotations: np.ndarray, truth: Blobs, volume: np.ndarray, noise: float = 0.0):
    """Half cubes `(2, 3, size)` of noise-free particles at known rotations, residuals against `volume`."""
    rng = np.random.default_rng(0)
    ball, prepared = projector.ball, projector.prepare(volume)
    cubes = np.zeros((2, 3, projector.grid.size), projector.dtype)
    for i, rotation in enumerate(rotations):
        w = ball.weight * (0.2 + np.cos(0.4 * np.linalg.norm(ball.k, axis=1) + i) ** 2)
        a = truth.turned(rotation).transform(ball.k, BOX) - projector.rotate(prepared, rotation)
        a = a + noise * (rng.normal(size=(len(ball), 2)) @ [1, 1j]) / np.sqrt(w)
        cubes[i % 2] += projector.scatter(rotation, w * a, w)
    return cubes


PROJECTOR = Projector(BOX, RADIUS, np.float64)
ROTATIONS = random_rotations(60, 4)


def test_gradient_leads_to_the_object():
    """The residual over its weight points to the truth; a few full steps arrive there."""
    volume, errors = np.zeros((BOX,) * 3), []
    truth = fourier_to_map(np.where(INSIDE, map_to_fourier(OBJECT.map(BOX)), 0))
    for _ in range(6):
        cubes = scattered(PROJECTOR, ROTATIONS, OBJECT, volume)
        d = half_gradients(PROJECTOR.grid, cubes, "C1", RADIUS, CPU).d
        volume = fourier_to_map(np.where(INSIDE, map_to_fourier(volume) + d.mean(0), 0)) * soft_sphere(BOX, 5, 3, 2.0)
        errors.append(relative_error(volume, truth))
    assert errors[0] < 0.5
    assert errors[-1] < 0.12
    assert errors[-1] < errors[0]


def test_gradient_of_a_perfect_map_is_small():
    volume = OBJECT.map(BOX)
    ends = []
    for start in (0 * volume, volume):
        cubes = scattered(PROJECTOR, ROTATIONS, OBJECT, start)
        ends.append(np.linalg.norm(half_gradients(PROJECTOR.grid, cubes, "C1", RADIUS, CPU).d[:, INSIDE]))
    assert ends[1] < 0.1 * ends[0]


def test_gradient_does_not_depend_on_the_grey_scale_or_the_number_of_particles():
    cubes = scattered(PROJECTOR, ROTATIONS[:20], OBJECT, np.zeros((BOX,) * 3))
    base = half_gradients(PROJECTOR.grid, cubes, "C1", RADIUS, CPU)
    for s in (1e-3, 7.0, 1e3):
        other = half_gradients(PROJECTOR.grid, s * cubes, "C1", RADIUS, CPU)
        np.testing.assert_allclose(other.d, base.d, atol=1e-9 * np.abs(base.d).max())
        np.testing.assert_allclose(other.weight, s * base.weight, rtol=1e-9)


def test_weight_is_the_information_of_the_particles():
    """Mean weight of a shell x voxels of the shell = sum of w over the particles of the half."""
    cubes = scattered(PROJECTOR, ROTATIONS, OBJECT, np.zeros((BOX,) * 3))
    found = half_gradients(PROJECTOR.grid, cubes, "C1", RADIUS, CPU).weight
    ball = PROJECTOR.ball
    k = np.linalg.norm(ball.k, axis=1)
    wanted = sum(ball.shell_means(0.2 + np.cos(0.4 * k + i) ** 2) for i in range(0, 60, 2))
    np.testing.assert_allclose(found[0, 2 : RADIUS - 1], wanted[2 : RADIUS - 1], rtol=0.15)


def test_completed_plane_is_hermitian():
    grid = PROJECTOR.grid
    cubes = np.random.default_rng(1).normal(size=(2, 3, grid.size))
    done = complete(grid, cubes).reshape(2, 3, *grid.shape)
    real, imaginary, weight = done.swapaxes(0, 1)[..., 0]
    np.testing.assert_allclose(real, real[:, ::-1, ::-1])
    np.testing.assert_allclose(imaginary, -imaginary[:, ::-1, ::-1])
    np.testing.assert_allclose(weight, weight[:, ::-1, ::-1])
    np.testing.assert_array_equal(done[..., 1:], cubes.reshape(2, 3, *grid.shape)[..., 1:])


def turned_map(volume: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``out(x) = volume(matrix x)`` about the centre, cubic interpolation."""
    from scipy.ndimage import map_coordinates

    zyx = np.stack(np.indices(volume.shape)).reshape(3, -1) - BOX // 2
    at = (matrix @ zyx[::-1])[::-1] + BOX // 2
    return map_coordinates(volume, at, order=3).reshape(volume.shape)


@pytest.mark.parametrize(
    ("group", "tolerance"),
    [
        ("C2", 0.01),
        ("C4", 0.01),
        ("D2", 0.01),
        ("O", 0.01),
        ("C3", 0.1),
        ("D3", 0.1),
        ("T", 0.1),
        ("I1", 0.1),
    ],
)
def test_symmetrised_gradient_is_invariant(group, tolerance):
    """Turning the gradient's map by any operator changes nothing; turns by 90 degrees hit the lattice and are exact
    but for the crop to an even box."""
    from vdamkit.sampling.point_groups import operators

    cubes = scattered(PROJECTOR, ROTATIONS[:10], OBJECT, np.zeros((BOX,) * 3))
    d = half_gradients(PROJECTOR.grid, cubes, group, RADIUS, CPU).d
    plain = half_gradients(PROJECTOR.grid, cubes, "C1", RADIUS, CPU).d
    r = np.sqrt((np.stack(np.indices((BOX,) * 3) - BOX // 2) ** 2).sum(0))
    core = r < 5
    volume, free = (fourier_to_map(np.where(INSIDE, x[0], 0)) for x in (d, plain))
    for operator in operators(group)[1:6]:
        assert relative_error(turned_map(volume, operator)[core], volume[core]) < tolerance
    if group != "I1":
        assert max(relative_error(turned_map(free, o)[core], free[core]) for o in operators(group)) > 0.2


def test_symmetrising_in_c1_changes_nothing():
    grid = PROJECTOR.grid
    cubes = np.random.default_rng(2).normal(size=(2, 3, grid.size))
    np.testing.assert_array_equal(symmetrise(grid, cubes, "C1", CPU), cubes)


def test_symmetrising_sums():
    """A constant becomes the number of operators times itself inside the radius."""
    grid = PROJECTOR.grid
    ones = np.ones((3, grid.size))
    line = np.arange(-grid.half_width, grid.half_width + 1)
    k = np.sqrt((line[:, None, None] ** 2 + line[None, :, None] ** 2 + np.arange(grid.half_width + 2) ** 2).ravel())
    summed = symmetrise(grid, ones, "D3", CPU)[[0, 2]]
    np.testing.assert_allclose(summed[:, k < 2 * RADIUS], 6, atol=1e-9)
