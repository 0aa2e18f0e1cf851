"""Rigid alignment and pose errors against motions that are known."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vdamkit import backend
from vdamkit.compare import align, mirrored, moved, pose_errors, resample
from vdamkit.imaging.fsc import fsc, low_pass
from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler, rotation_angle
from vdamkit.sampling.point_groups import operators
from vdamkit.symmetry import find_symmetry, symmetry_scores

PX = 8.0
BOX = 32


@pytest.fixture(scope="module")
def chiral():
    """Blobs along a left-handed spiral of growing weight, `(32, 32, 32)`: no symmetry, no mirror image."""
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    volume = np.zeros((BOX,) * 3)
    for i, angle in enumerate(np.linspace(0, 2.2 * np.pi, 9)):
        centre = 6 * np.cos(angle), 5 * np.sin(angle), -5 + 1.2 * i
        away = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        volume += (1 + 0.15 * i) * np.exp(-away / 3.5)
    return volume


@pytest.mark.parametrize("number", range(2))
def test_a_known_motion_is_found(chiral, number):
    rng = np.random.default_rng(number)
    turn = Rotation.random(rng=rng).as_matrix()
    shift = rng.uniform(-2, 2, 3)
    reference = moved(chiral, turn, shift)
    noisy = chiral + low_pass(rng.normal(0, 0.2, chiral.shape), 10)
    match = align(noisy, reference, PX, radius=88)
    assert rotation_angle(match.rotation, turn) < 2.0
    assert np.linalg.norm(match.shift - PX * shift) < 0.25 * PX
    assert match.correlation > 0.9
    assert match.fsc[:6].min() > 0.9
    assert np.allclose(match.map, moved(noisy, match.rotation, match.shift / PX), atol=1e-4)


@pytest.fixture(scope="module")
def turned(chiral):
    """A reference and the match of `chiral` with it."""
    reference = moved(chiral, Rotation.from_rotvec([0.3, 1.0, -0.7]).as_matrix(), np.array([1.0, 0.0, -1.0]))
    return reference, align(chiral, reference, PX, radius=88)


def test_threads_are_as_many_as_were_asked_for(chiral, turned, monkeypatch):
    """With one the calling thread does everything; the result is the same."""
    monkeypatch.setattr(backend, "_pool", None)
    match = align(chiral, turned[0], PX, radius=88, threads=1)
    assert np.array_equal(match.rotation, turned[1].rotation) and np.array_equal(match.fsc, turned[1].fsc)
    find_symmetry(chiral, PX, "C2", threads=1)
    symmetry_scores(chiral, PX, groups=["C2", "C3", "D2"], threads=1)


def test_the_mirror_image_is_clearly_worse(chiral, turned):
    reference, same = turned
    other = align(chiral, reference, PX, radius=88, mirror=True)
    assert same.mean_fsc > other.mean_fsc + 0.2
    assert other.mirrored and "mirrored" in str(other)


def test_the_result_does_not_depend_on_the_seed(chiral, turned):
    reference, first = turned
    assert rotation_angle(first.rotation, align(chiral, reference, PX, radius=88, seed=5).rotation) < 1.0


def test_moved_follows_its_formula(chiral):
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    point, turn, shift = np.array([5.0, 2.0, -3.0]), euler_to_matrix([20.0, 70.0, -40.0]), np.array([1.0, -2.0, 0.5])
    blob = np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2 + (z - point[2]) ** 2) / 6)
    after = moved(blob, turn, shift)
    centre = [float((axis * after).sum() / after.sum()) for axis in (x, y, z)]
    np.testing.assert_allclose(centre, turn @ point + shift, atol=0.02)


@pytest.mark.parametrize(("new_pixel", "new_box"), [(8.0, 40), (8.0, 24), (16.0, 20), (5.0, 52), (9.3, 30)])
def test_resample_keeps_the_place_and_the_height_of_density(new_pixel, new_box):
    z, y, x = (np.indices((BOX,) * 3) - BOX // 2) * PX
    blob = np.exp(-((x - 20) ** 2 + (y + 12) ** 2 + z**2) / (2 * 22.0**2))
    out = resample(blob, PX, new_pixel, new_box)
    assert out.shape == (new_box,) * 3
    z, y, x = (np.indices(out.shape) - new_box // 2) * new_pixel
    expected = np.exp(-((x - 20) ** 2 + (y + 12) ** 2 + z**2) / (2 * 22.0**2))
    np.testing.assert_allclose(out, expected, atol=0.03)


@pytest.mark.parametrize("box", [9, 10])
def test_mirrored_twice_is_the_same_map_and_the_centre_stays(box):
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(box,) * 3)
    assert np.array_equal(mirrored(mirrored(volume)), volume)
    assert np.array_equal(mirrored(volume)[box // 2], volume[box // 2])


def test_maps_that_cannot_be_compared_are_refused(chiral):
    with pytest.raises(ValueError, match=r"same shape.*\(32, 32, 32\).*\(16, 16, 16\)"):
        align(chiral, np.zeros((16, 16, 16)), PX)
    with pytest.raises(ValueError, match="reference holds nothing"):
        align(chiral, np.zeros_like(chiral), PX)


def _poses(rng, n):
    return matrix_to_euler(Rotation.random(n, rng=rng).as_matrix()), rng.normal(0, 8, (n, 3))


@pytest.mark.parametrize("symmetry", ["C1", "C6", "D2"])
def test_a_common_motion_is_no_error(symmetry):
    rng = np.random.default_rng(3)
    angles, offsets = _poses(rng, 40)
    group = operators(symmetry)
    turn, shift = euler_to_matrix([33.0, 71.0, -120.0]), np.array([4.0, -9.0, 2.0])
    mates = group[rng.integers(len(group), size=40)]
    found = euler_to_matrix(angles) @ mates @ turn.T  # A_found Q = A_true S
    errors = pose_errors(matrix_to_euler(found), offsets + found @ shift, angles, offsets, symmetry=symmetry)
    assert errors.angles.max() < 1e-4
    assert errors.offsets.max() < 1e-6
    np.testing.assert_allclose(errors.shift, shift, atol=1e-6)


def test_the_motion_is_that_of_the_maps(chiral):
    """The same image is explained by (A_true, o_true) with the true map and by the found pose with the moved map."""
    rng = np.random.default_rng(4)
    turn, shift = euler_to_matrix([10.0, 40.0, 70.0]), np.array([1.5, -1.0, 0.5])
    found_map = moved(chiral, turn, shift)
    (angles,), (offset,) = _poses(rng, 1)
    offset = offset / 8  # px
    true = euler_to_matrix(angles)
    found = true @ turn.T
    image = moved(chiral, true, -offset)  # x_subtomogram = -o + A x
    again = moved(found_map, found, -(offset + found @ shift))
    assert fsc(image, again)[1:8].min() > 0.99


def test_errors_have_their_size_and_outliers_do_not_matter():
    rng = np.random.default_rng(5)
    angles, offsets = _poses(rng, 200)
    true = euler_to_matrix(angles)
    turn, shift = euler_to_matrix([0.0, 180.0, 25.0]), np.array([0.0, 0.0, 12.0])
    axes = rng.normal(size=(200, 3))
    axes *= np.radians(5.0) / np.linalg.norm(axes, axis=1, keepdims=True)
    found = Rotation.from_rotvec(axes).as_matrix() @ true @ turn.T
    found[:60] = Rotation.random(60, rng=rng).as_matrix()
    moves = rng.normal(0, 1.0, (200, 3))
    sub = Rotation.random(200, rng=rng).as_matrix()
    errors = pose_errors(matrix_to_euler(found), offsets + found @ shift + moves, angles, offsets, sub)
    assert np.median(errors.angles[60:]) == pytest.approx(5.0, abs=0.7)
    assert np.median(errors.angles[:60]) > 60
    assert np.median(errors.offsets[60:]) == pytest.approx(np.median(np.linalg.norm(moves, axis=1)), abs=0.4)
    expected = -np.einsum("nij,nj->ni", sub, moves)
    assert np.abs(errors.vectors - expected)[60:].max() < 0.6
    assert "median error" in str(errors)


def test_poses_of_other_length_are_refused():
    with pytest.raises(ValueError, match="got 2 and 2 against 3 and 3"):
        pose_errors(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((3, 3)), np.zeros((3, 3)))
