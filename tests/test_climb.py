"""Gauss-Newton refinement: its model is the derivative of its score, and a planted pose is found."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vdamkit.climb import climb, slopes
from vdamkit.compare import _Score, moved
from vdamkit.imaging.masks import soft_sphere
from vdamkit.sampling.euler import rotation_angle
from vdamkit.symmetry.axes import elements_for
from vdamkit.symmetry.likeness import Likeness

BOX = 32
MASK = soft_sphere(BOX, 12, edge=4)


def blobs(number, seed=0):
    """Smooth blobs at random places, `(32, 32, 32)`."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    places = rng.normal(0, 4, (number, 3))
    return sum((1 + i) * np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 8) for i, (a, b, c) in enumerate(places))


def ring(fold):
    """Blobs with a Cn axis along z through the centre."""
    turns = Rotation.from_rotvec([[0, 0, 2 * np.pi * k / fold] for k in range(fold)]).as_matrix()
    return sum(moved(blobs(4), turn, np.zeros(3)) for turn in turns)


def alignment():
    reference = blobs(8)
    turn = Rotation.from_rotvec([0.04, -0.08, 0.06]).as_matrix()
    score = _Score(moved(reference, turn.T, np.array([0.5, -0.4, 0.3])), reference, MASK, order=3)

    def step(pose, by):
        return Rotation.from_rotvec(by[:3]).as_matrix() @ pose[0], pose[1] + by[3:]

    return score._look, score._model, step


def symmetry():
    turn = Rotation.from_rotvec([0.05, 0.07, 0.02]).as_matrix()
    likeness = Likeness(moved(ring(3), turn, np.array([0.4, -0.3, 0.0])), MASK, elements_for("C3"), order=3)

    def step(pose, by):
        return Rotation.from_rotvec(by[:3]).as_matrix() @ pose[0], pose[1] + pose[0].T @ by[3:]

    return likeness._look, likeness._model, step


@pytest.mark.parametrize("problem", [alignment, symmetry])
def test_the_models_slope_is_the_derivative_of_the_score(problem):
    look, model, step = problem()
    pose, tiny = (Rotation.from_rotvec([0.3, 0.1, -0.2]).as_matrix(), np.array([0.2, 0.1, -0.3])), 1e-3
    expected = [(look(step(pose, by))[0] - look(step(pose, -by))[0]) / (2 * tiny) for by in tiny * np.eye(6)]
    curvature, slope = model(pose, look(pose)[1])
    assert np.abs(slope).max() > 0.01
    np.testing.assert_allclose(slope, expected, atol=0.06 * np.abs(expected).max())
    assert np.linalg.eigvalsh(curvature).min() > -1e-12


def test_a_planted_pose_is_found_in_few_evaluations():
    look, model, step = alignment()
    calls = []

    def counted(pose):
        calls.append(pose)
        return look(pose)

    best, (rotation, shift) = climb((np.eye(3), np.zeros(3)), counted, model, step, tolerance=1e-3)
    turn = Rotation.from_rotvec([0.04, -0.08, 0.06]).as_matrix()
    assert best > 0.999 and len(calls) < 25
    assert rotation_angle(rotation, turn) < 0.2  # degrees
    np.testing.assert_allclose(shift, -turn @ [0.5, -0.4, 0.3], atol=0.02)


def test_an_axis_is_found_and_what_does_not_matter_stays():
    turn, centre = Rotation.from_rotvec([0.05, 0.07, 0.0]).as_matrix(), np.array([0.4, -0.3, 0.0])
    likeness = Likeness(moved(ring(3), turn, centre), MASK, elements_for("C3"), order=3)
    value, (rotation, found) = likeness.refine((np.eye(3), np.zeros(3)), "C3", tolerance=1e-3)
    assert np.degrees(np.arccos(rotation[2] @ turn[:, 2])) < 0.2  # degrees between the axes
    off = found - centre
    assert np.linalg.norm(off - (off @ turn[:, 2]) * turn[:, 2]) < 0.03  # px from the axis
    assert value == likeness((rotation, found)) > 0.999


def test_where_nothing_is_better_the_pose_stays():
    start = (np.eye(3), np.zeros(3))
    best, pose = climb(
        start, lambda pose: (1.0, None), lambda pose, _: (np.eye(6), np.ones(6)), lambda pose, by: pose, tolerance=1e-3
    )
    assert best == 1.0 and pose is start


def test_coordinates_that_do_not_matter_do_no_harm():
    """As the turns of a round map, or all of them where nothing is in sight."""
    target = np.array([0.0, 0.0, 0.0, 1.0, -2.0, 0.0])
    curvature = np.diag([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])

    def look(x):
        return -float((target - x) @ curvature @ (target - x)), None

    def model(x, _):
        return curvature, curvature @ (target - x)

    _, found = climb(np.zeros(6), look, model, lambda x, by: x + by, tolerance=1e-6)
    np.testing.assert_allclose(found, target, atol=1e-6)
    flat = climb(np.ones(6), lambda x: (0.0, None), lambda x, _: (np.zeros((6, 6)), np.zeros(6)), np.add, tolerance=1e-6)
    np.testing.assert_array_equal(flat[1], np.ones(6))


def test_slopes_are_derivatives():
    x = np.arange(BOX)
    wave = np.sin(2 * np.pi * 3 * x / BOX)
    for axis, part in zip((2, 1, 0), slopes(np.broadcast_to(wave, (BOX,) * 3)), strict=True):
        expected = 2 * np.pi * 3 / BOX * np.cos(2 * np.pi * 3 * x / BOX) if axis == 2 else np.zeros(BOX)
        np.testing.assert_allclose(part[4, 5], expected, atol=1e-9)
