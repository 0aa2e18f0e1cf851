"""Half-balls and transforms: order, Friedel weights, Parseval, phases, and the direct Fourier sum."""

import numpy as np
import pytest

from vdamkit.imaging.halfball import (
    fourier_grid,
    fourier_to_map,
    gather_half_ball,
    half_ball,
    map_to_fourier,
)


def direct_transform(volume: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The Fourier sum as it is defined: origin at voxel box//2, divided by the number of voxels."""
    box = volume.shape[0]
    x = np.arange(box) - box // 2
    waves = [np.exp(-2j * np.pi / box * np.outer(k[:, axis], x)) for axis in range(3)]
    return np.einsum("zyx,nx,ny,nz->n", volume, *waves, optimize=True) / volume.size


@pytest.mark.parametrize("radius", [1, 2, 5, 9])
def test_half_ball_lists_every_voxel_once(radius):
    ball = half_ball(radius)
    line = np.arange(-radius, radius + 1)
    whole = np.stack(np.meshgrid(line, line, line), -1).reshape(-1, 3)
    whole = whole[(whole**2).sum(1) < radius**2]
    found = {tuple(k) for k in ball.k}
    assert len(found) == len(ball)
    assert found == {tuple(k) for k in whole if k[2] >= 0}
    # 2 x weights count the whole ball: each pair once per member
    assert 2 * ball.weight.sum() == len(whole)


def test_smaller_ball_is_a_prefix():
    large = half_ball(9)
    for radius in range(1, 9):
        small = half_ball(radius)
        n = len(small)
        for name in ("k", "shell", "weight"):
            np.testing.assert_array_equal(getattr(small, name), getattr(large, name)[:n])
        np.testing.assert_array_equal(small.starts, large.starts[: small.n_shells])


def test_shells_are_contiguous_and_rounded():
    ball = half_ball(8)
    assert (np.diff(ball.shell) >= 0).all()
    np.testing.assert_array_equal(ball.shell, np.rint(np.linalg.norm(ball.k, axis=1)))
    assert ball.k[0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(ball.shell_sums(np.ones(len(ball))), np.bincount(ball.shell))
    values = np.random.default_rng(0).normal(size=(3, len(ball)))
    means = ball.shell_means(values)
    for s in range(ball.n_shells):
        inside = ball.shell == s
        wanted = np.average(values[:, inside], weights=ball.weight[inside], axis=1)
        np.testing.assert_allclose(means[:, s], wanted, rtol=1e-6)


@pytest.mark.parametrize("box", [16, 17])
def test_parseval(box):
    """Half the sum over the whole ball: twice the weighted half-ball sum is the mean square of a band-limited map."""
    radius = box // 2
    transform = map_to_fourier(np.random.default_rng(0).normal(size=(box,) * 3))
    transform = np.where(fourier_grid(box).k2 < radius**2, transform, 0)
    volume = fourier_to_map(transform)
    ball = half_ball(radius)
    power = 2 * (ball.weight * np.abs(gather_half_ball(transform, ball)) ** 2).sum()
    assert power == pytest.approx((volume**2).mean(), rel=1e-6)
    grid = fourier_grid(box)
    assert (grid.weight * np.abs(transform) ** 2).sum() == pytest.approx((volume**2).mean(), rel=1e-6)


def test_shell_means_agree_between_the_two_layouts():
    box, radius = 16, 7
    transform = map_to_fourier(np.random.default_rng(1).normal(size=(box,) * 3))
    ball = half_ball(radius)
    a = ball.shell_means(np.abs(gather_half_ball(transform, ball)) ** 2)
    b = fourier_grid(box).shell_means(np.abs(transform) ** 2, radius)
    np.testing.assert_allclose(a, b[: len(a)], rtol=1e-6)
    assert (b[len(a) :] == 0).all()


@pytest.mark.parametrize("box", [12, 16])
def test_round_trip_of_a_map(box):
    volume = np.random.default_rng(2).normal(size=(box,) * 3)
    np.testing.assert_allclose(fourier_to_map(map_to_fourier(volume)), volume, atol=1e-12)


def test_gather_is_the_fourier_sum():
    volume = np.random.default_rng(3).normal(size=(12,) * 3)
    ball = half_ball(6)
    found = gather_half_ball(map_to_fourier(volume), ball)
    np.testing.assert_allclose(found, direct_transform(volume, ball.k), atol=1e-14)


def test_delta_at_the_centre_has_a_flat_transform():
    volume = np.zeros((10,) * 3)
    volume[5, 5, 5] = 1000
    np.testing.assert_allclose(map_to_fourier(volume), 1, atol=1e-12)


@pytest.mark.parametrize("shift", [(2, 0, 0), (0, -3, 0), (0, 0, 1), (2, -1, 3)])
def test_phases_move_a_delta_by_plus_the_shift(shift):
    """rlnOrigin is what has to be added to a particle to centre it: one that sits at -t comes to the centre."""
    box, radius = 16, 8
    ball = half_ball(radius)
    x, y, z = shift
    at_minus, centred = np.zeros((2, box, box, box))
    at_minus[box // 2 - z, box // 2 - y, box // 2 - x] = 1
    centred[box // 2, box // 2, box // 2] = 1
    moved = gather_half_ball(map_to_fourier(at_minus), ball) * ball.phases(np.array(shift), box, np.complex128)[0]
    np.testing.assert_allclose(moved, gather_half_ball(map_to_fourier(centred), ball), atol=1e-15)


def test_phases_of_any_shift():
    ball, box = half_ball(7), 20
    shifts = np.random.default_rng(0).uniform(-8, 8, (5, 3))
    wanted = np.exp(-2j * np.pi / box * shifts @ ball.k.T)
    np.testing.assert_allclose(ball.phases(shifts, box, np.complex128), wanted, atol=1e-13)
    np.testing.assert_allclose(ball.phases(shifts, box), wanted, atol=1e-6)
    np.testing.assert_allclose(ball.phases(shifts[0] + shifts[1], box, np.complex128)[0], wanted[0] * wanted[1], atol=1e-13)
