"""Rotation of a reference and its adjoint, against Fourier transforms known in closed form."""

import numpy as np
import pytest
from helpers_vdamkit import Blobs, random_rotations, relative_error, rotations
from hypothesis import given, settings
from hypothesis import strategies as st

from vdamkit.imaging.halfball import gather_half_ball, half_ball, map_to_fourier
from vdamkit.imaging.masks import soft_sphere
from vdamkit.imaging.projector import PaddedGrid, Projector
from vdamkit.imaging.turns import Turns
from vdamkit.sampling.euler import euler_to_matrix

BOX, RADIUS = 24, 10
DOUBLE = Projector(BOX, RADIUS, np.float64)
SINGLE = Projector(BOX, RADIUS, np.float32)
OBJECT = Blobs.random(12, reach=5.5, sigma=1.3, seed=4)  # within ±0.3 of the box
MAP = OBJECT.map(BOX)
PREPARED = DOUBLE.prepare(MAP)


def gap_of_adjoint(projector: Projector, rotation: np.ndarray, seed: int) -> float:
    """|<rotate(x), y> - <x, adjoint(y)>| over the norms of rotate(x) and y, for random x and y."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, projector.grid.size)).astype(projector.dtype)
    y = (rng.normal(size=(len(projector.ball), 2)) @ [1, 1j]).astype(projector.complex)
    forward = projector.rotate(x, rotation)
    back = projector.adjoint(rotation, y)
    left = (forward.conj().astype(complex) * y).real.sum()
    right = (x.astype(float) * back.astype(float)).sum()
    return abs(left - right) / (np.linalg.norm(forward) * np.linalg.norm(y))


@settings(max_examples=15)
@given(rotations(), st.integers(0, 1000))
def test_adjoint_in_double_precision(rotation, seed):
    assert gap_of_adjoint(DOUBLE, rotation, seed) < 1e-12


@settings(max_examples=10)
@given(rotations(), st.integers(0, 1000))
def test_adjoint_in_single_precision(rotation, seed):
    assert gap_of_adjoint(SINGLE, rotation, seed) < 1e-5


def test_scatter_is_the_adjoint_and_spreads_weights():
    """The third row is real, never negative, and no larger on average than a plain adjoint of ones would make it."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(len(DOUBLE.ball), 2)) @ [1, 1j]
    weight = rng.uniform(0, 2, len(DOUBLE.ball))
    for rotation in random_rotations(5, 5):
        cube = DOUBLE.scatter(rotation, values, weight)
        np.testing.assert_allclose(cube[:2], DOUBLE.adjoint(rotation, values), atol=1e-13)
        assert cube[2].min() >= 0
        assert cube[2].sum() == pytest.approx(weight.sum(), rel=0.05)


@pytest.mark.parametrize("box", [12, 16])
def test_from_map_and_to_map_are_adjoint(box):
    """<from_map(v), c> = <v, to_map(c)> / (2 box³): box³ from Parseval's theorem, 2 for the Friedel mates."""
    grid = PaddedGrid(box, box / 2 - 2, np.float64)
    rng = np.random.default_rng(1)
    volume, cube = rng.normal(size=(box,) * 3), rng.normal(size=(2, grid.size))
    cube = cube[0] + 1j * cube[1]
    left = (grid.from_map(volume) * cube.conj()).real.sum()
    right = (volume * grid.to_map(cube)).sum() / (2 * box**3)
    assert left == pytest.approx(right, rel=1e-12)


def test_padded_transform_is_the_fourier_integral():
    """At even points of the padded grid, without the apodisation, lie the values of the map's own transform."""
    grid = PaddedGrid(BOX, 6, np.float64)
    taper = grid.taper[:, None, None] * grid.taper[:, None] * grid.taper
    cube = grid.from_map(MAP * taper).reshape(grid.shape)
    transform = map_to_fourier(MAP)
    w = grid.half_width
    for k in ((0, 0, 0), (3, -2, 4), (5, 5, -1), (0, 2, -6)):
        kx, ky, kz = k
        assert cube[w + 2 * kz, w + 2 * ky, 2 * kx] == pytest.approx(transform[kz, ky, kx], abs=1e-15)


def test_centred_gaussian_stays_put():
    """Under 100 random rotations."""
    gaussian = Blobs(np.ones(1), np.zeros((1, 3)), np.array([1.5]))
    prepared = DOUBLE.prepare(gaussian.map(BOX))
    truth = gaussian.transform(DOUBLE.ball.k, BOX)
    for rotation in random_rotations(100, 0):
        assert relative_error(DOUBLE.rotate(prepared, rotation), truth) < 0.05


def test_centred_delta_stays_put():
    delta = np.zeros((BOX,) * 3)
    delta[(BOX // 2,) * 3] = BOX**3
    prepared = DOUBLE.prepare(delta)
    for rotation in random_rotations(100, 1):
        assert relative_error(DOUBLE.rotate(prepared, rotation), np.ones(len(DOUBLE.ball))) < 0.06


def test_object_turns_as_the_matrix_says():
    """x_view = A x_reference, for one blob off the centre: a wrong sense, order or axis is an error near 1."""
    blob = Blobs(np.ones(1), np.array([[3.5, -2.0, 2.5]]), np.array([1.1]))
    prepared = DOUBLE.prepare(blob.map(BOX))
    right, wrong = [], []
    for rotation in random_rotations(40, 2):
        found = DOUBLE.rotate(prepared, rotation)
        right.append(relative_error(found, blob.turned(rotation).transform(DOUBLE.ball.k, BOX)))
        wrong.append(relative_error(found, blob.turned(rotation.T).transform(DOUBLE.ball.k, BOX)))
    assert max(right) < 0.05
    assert np.median(wrong) > 0.8


@pytest.mark.parametrize("angles", [(0, 0, 37), (0, 0, -150), (51, 0, 0), (0, 40, 0), (0, 90, 0), (0, 180, 0), (20, 90, -70)])
def test_single_angles(angles):
    rotation = euler_to_matrix(angles)
    truth = OBJECT.turned(rotation).transform(DOUBLE.ball.k, BOX)
    assert relative_error(DOUBLE.rotate(PREPARED, rotation), truth) < 0.05


def test_no_rotation():
    """Whole numbers need no interpolation: what is left is the taper's inverse, made for the average position."""
    truth = gather_half_ball(map_to_fourier(MAP), DOUBLE.ball)
    assert relative_error(DOUBLE.rotate(PREPARED, np.eye(3)), truth) < 0.05


def plain_trilinear(volume: np.ndarray, rotation: np.ndarray, radius: int) -> np.ndarray:
    """Trilinear interpolation in the unpadded transform with the sinc² correction: RELION's choice in this job."""
    from scipy.ndimage import map_coordinates

    box = volume.shape[0]
    taper = np.sinc((np.arange(box) - box // 2) / box) ** 2
    r2 = taper[:, None, None] * taper[None, :, None] * taper[None, None]
    transform = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume / r2))) / volume.size
    at = (half_ball(radius).k @ rotation)[:, ::-1].T + box // 2
    return map_coordinates(transform.real, at, order=1) + 1j * map_coordinates(transform.imag, at, order=1)


def test_error_is_below_that_of_plain_interpolation():
    """Density everywhere inside a spherical mask of 0.58 of the box, as a reference has; exact sum as the truth."""
    rng = np.random.default_rng(6)
    mask = soft_sphere(BOX, 0.29 * BOX, 3, 3.0)
    volume = rng.normal(size=(BOX,) * 3) * mask
    prepared = DOUBLE.prepare(volume)
    ball = DOUBLE.ball
    z, y, x = np.indices(volume.shape).reshape(3, -1) - BOX // 2
    inside = np.flatnonzero(volume.ravel())
    positions = np.stack([x, y, z], -1)[inside]
    ours, plain = [], []
    for rotation in random_rotations(4, 7):
        truth = np.exp(-2j * np.pi / BOX * (ball.k @ rotation) @ positions.T) @ volume.ravel()[inside] / volume.size
        ours.append(relative_error(DOUBLE.rotate(prepared, rotation), truth, ball.weight))
        plain.append(relative_error(plain_trilinear(volume, rotation, RADIUS), truth, ball.weight))
    assert max(ours) < 0.08
    assert max(ours) < 0.7 * min(plain)


def test_precisions_agree():
    prepared = SINGLE.prepare(MAP)
    for rotation in random_rotations(5, 8):
        assert relative_error(SINGLE.rotate(prepared, rotation), DOUBLE.rotate(PREPARED, rotation)) < 1e-5


def test_result_is_friedel_symmetric():
    """On kz = 0 both mates are listed and must be conjugates."""
    ball = DOUBLE.ball
    plane = np.flatnonzero(ball.k[:, 2] == 0)
    where = {tuple(k): i for i, k in zip(plane, ball.k[plane], strict=True)}
    mate = np.array([where[tuple(-ball.k[i])] for i in plane])
    for rotation in random_rotations(5, 9):
        values = DOUBLE.rotate(PREPARED, rotation)
        np.testing.assert_allclose(values[plane], values[mate].conj(), atol=1e-5 * np.abs(values).max())


def test_spin_and_tilt_make_the_rotation():
    for rotation in random_rotations(20, 10):
        turns = Turns.one(rotation)
        direction, psi = turns.tilts[0], float(turns.psis[0])
        np.testing.assert_allclose(euler_to_matrix([0, 0, psi]) @ direction, rotation, atol=1e-9)
        tilted = DOUBLE.tilt(PREPARED, direction[None])[0]
        spun = DOUBLE.on_ball(DOUBLE.spin(tilted, psi), 0, np.empty(len(DOUBLE.ball), complex))
        np.testing.assert_allclose(spun, DOUBLE.rotate(PREPARED, rotation), atol=1e-15)


def test_a_quarter_turn_is_a_permutation():
    """Turned by psi and then by quarters, the half-ball is what a turn by the sum of both makes of it."""
    rng = np.random.default_rng(12)
    tilted = DOUBLE.tilt(PREPARED, random_rotations(1, 12))[0]
    out, n = np.empty(len(DOUBLE.ball), complex), len(DOUBLE.ball)
    values, weights = rng.normal(size=(4, n)) + 1j * rng.normal(size=(4, n)), rng.random((4, n))
    slab = weight = 0
    for quarter in range(4):
        whole = DOUBLE.spin(tilted, 17.0 + 90 * quarter)
        np.testing.assert_allclose(
            DOUBLE.on_ball(DOUBLE.spin(tilted, 17.0), quarter, out), DOUBLE.on_ball(whole, 0, np.empty(n, complex)), atol=1e-14
        )
        slab = slab + DOUBLE.spin_adjoint([(0, values[quarter])], 17.0 + 90 * quarter)
        weight = weight + DOUBLE.spread_weight([(0, weights[quarter])], 17.0 + 90 * quarter)
    np.testing.assert_allclose(DOUBLE.spin_adjoint(list(enumerate(values)), 17.0), slab, atol=1e-12)
    np.testing.assert_allclose(DOUBLE.spread_weight(list(enumerate(weights)), 17.0), weight, atol=1e-12)


def test_the_adjoint_of_several_tilts_is_the_sum_of_their_adjoints():
    tilts = random_rotations(3, 11)
    slabs = DOUBLE.tilt(PREPARED, tilts)
    np.testing.assert_array_equal(slabs[1], DOUBLE.tilt(PREPARED, tilts[1:2])[0])
    weights = [np.abs(slab[:, ::2]) for slab in slabs]
    together, alone = (np.zeros((3, DOUBLE.grid.size)) for _ in range(2))
    DOUBLE.add_tilt_adjoint(together, tilts, slabs, weights)
    for tilt, slab, weight in zip(tilts, slabs, weights, strict=True):
        DOUBLE.add_tilt_adjoint(alone, tilt[None], [slab], [weight])
    np.testing.assert_allclose(together, alone, atol=1e-12 * np.abs(alone).max())
