"""Euler angles: RELION's formula, the way back, and the degenerate tilts."""

import numpy as np
import pytest
from helpers_vdamkit import rotations
from hypothesis import given
from hypothesis import strategies as st

from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler, rotation_angle, upright

ANGLE = st.floats(-360, 360, allow_nan=False)


def relion_matrix(rot: float, tilt: float, psi: float) -> np.ndarray:
    """RELION's nine entries, written out (euler.cpp:Euler_angles2matrix)."""
    ca, sa = np.cos(np.radians(rot)), np.sin(np.radians(rot))
    cb, sb = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    cg, sg = np.cos(np.radians(psi)), np.sin(np.radians(psi))
    return np.array([
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ])  # fmt: skip


@given(ANGLE, ANGLE, ANGLE)
def test_matrix_is_relions_formula(rot, tilt, psi):
    assert np.abs(euler_to_matrix([rot, tilt, psi]) - relion_matrix(rot, tilt, psi)).max() < 1e-12


@given(rotations())
def test_angles_give_back_the_matrix(matrix):
    angles = matrix_to_euler(matrix)
    assert np.abs(euler_to_matrix(angles) - matrix).max() < 1e-7
    assert 0 <= angles[1] <= 180
    assert (np.abs(angles[[0, 2]]) <= 180).all()


@given(st.floats(-179.9, 179.9), st.floats(0.01, 179.99), st.floats(-179.9, 179.9))
def test_matrix_gives_back_the_angles(rot, tilt, psi):
    assert np.abs(matrix_to_euler(euler_to_matrix([rot, tilt, psi])) - [rot, tilt, psi]).max() < 1e-6


@pytest.mark.parametrize("tilt", [0.0, 180.0, 1e-9, 180 - 1e-9, 1e-6, 1e-5])
@pytest.mark.parametrize(("rot", "psi"), [(0, 0), (30, 50), (-170, 170), (90, -90), (0, 180), (180, 180)])
def test_degenerate_tilts_keep_the_rotation(tilt, rot, psi):
    matrix = euler_to_matrix([rot, tilt, psi])
    angles = matrix_to_euler(matrix)
    assert np.isfinite(angles).all()
    assert np.abs(euler_to_matrix(angles) - matrix).max() < 1e-7
    if tilt in (0.0, 180.0):
        assert angles[0] == 0


def test_viewing_direction_is_row_two():
    """rot and tilt are the polar angles of the direction that a view looks along, whatever psi."""
    rot, tilt = np.radians([40.0, 70.0])
    direction = [np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)]
    for psi in (0, 25, -100):
        matrix = euler_to_matrix([40.0, 70.0, psi])
        np.testing.assert_allclose(matrix[2], direction, atol=1e-12)
        np.testing.assert_allclose(matrix @ direction, [0, 0, 1], atol=1e-12)


def test_picked_normal_is_minus_x():
    """Pickers write (0, 90, 0) for a particle whose axis lies along the normal: -x of the subtomogram frame."""
    np.testing.assert_allclose(euler_to_matrix([0.0, 90.0, 0.0])[:, 2], [-1, 0, 0], atol=1e-12)


def test_batches_equal_single_calls():
    angles = np.random.default_rng(0).uniform(-180, 180, (2, 5, 3))
    batch = euler_to_matrix(angles)
    assert batch.shape == (2, 5, 3, 3)
    back = matrix_to_euler(batch)
    for i in np.ndindex(2, 5):
        np.testing.assert_allclose(batch[i], euler_to_matrix(angles[i]), atol=1e-15)
        np.testing.assert_allclose(back[i], matrix_to_euler(batch[i]), atol=1e-12)


@given(rotations(), st.floats(0.1, 179.9))
def test_rotation_angle(matrix, degrees):
    assert rotation_angle(matrix, matrix @ euler_to_matrix([degrees, 0, 0])) == pytest.approx(degrees, abs=1e-4)
    assert rotation_angle(matrix, matrix) < 1e-5


def test_tilt_angles_of_other_programs_are_the_same_rotations():
    angles = np.random.default_rng(5).uniform(-400, 400, (50, 3))
    found = upright(angles)
    assert ((found[:, 1] >= 0) & (found[:, 1] <= 180)).all()
    np.testing.assert_allclose(euler_to_matrix(found), euler_to_matrix(angles), atol=1e-12)
    np.testing.assert_array_equal(upright([np.nan, -90.0, np.nan]), [np.nan, 90, np.nan])
