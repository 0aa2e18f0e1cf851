"""Orientation grids, their children, the perturbation, and shift grids."""

import numpy as np
import pytest
from helpers_vdamkit import random_rotations

from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler, rotation_angle
from vdamkit.sampling.orientations import angular_step, orientation_grid
from vdamkit.sampling.shifts import child_offsets, shift_grid


def unit_vectors(directions: np.ndarray) -> np.ndarray:
    rot, tilt = np.radians(directions).T
    return np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], -1)


@pytest.mark.parametrize(("order", "directions", "psis", "step"), [(1, 48, 12, 30), (2, 192, 24, 15), (3, 768, 48, 7.5)])
def test_sizes_are_relions(order, directions, psis, step):
    grid = orientation_grid(order)
    assert (grid.n_directions, grid.n_psi, len(grid)) == (directions, psis, directions * psis)
    assert angular_step(order) == step
    np.testing.assert_allclose(np.diff(grid.psis), step)
    assert grid.directions[:, 0].min() > -180
    assert grid.directions[:, 0].max() <= 180


def test_directions_cover_the_sphere_evenly():
    """Equal areas: the mean of any linear or quadratic form over the directions is that over the sphere."""
    vectors = unit_vectors(orientation_grid(2).directions)
    assert np.abs(vectors.mean(0)).max() < 1e-12
    assert np.abs(vectors.T @ vectors / len(vectors) - np.eye(3) / 3).max() < 0.01


def test_orientation_number_is_direction_then_psi():
    grid = orientation_grid(1)
    rotations = grid.rotations()
    for number in (0, 11, 12, 100, 575):
        rot, tilt = grid.directions[number // 12]
        wanted = euler_to_matrix([rot, tilt, grid.psis[number % 12]])
        np.testing.assert_allclose(rotations[number], wanted, atol=1e-12)
    np.testing.assert_array_equal(grid.rotations(subset=np.array([3, 500])), rotations[[3, 500]])


@pytest.mark.parametrize("perturbation", [-15.0, 3.7, 14.9])
def test_perturbation_acts_on_the_right(perturbation):
    grid = orientation_grid(1, "C3")
    wanted = grid.rotations() @ euler_to_matrix([perturbation] * 3)
    np.testing.assert_allclose(grid.rotations(perturbation), wanted, atol=1e-12)
    subset = np.array([5, 17, 40])
    np.testing.assert_allclose(grid.rotations(perturbation, subset), wanted[subset], atol=1e-12)
    wrong = euler_to_matrix([perturbation] * 3) @ grid.rotations()
    assert np.abs(wrong - wanted).max() > 0.05


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("symmetry", ["C1", "C6", "D2", "I2"])
def test_children_are_a_partition_and_lie_near_their_parents(order, symmetry):
    grid = orientation_grid(order, symmetry)
    kids = grid.children
    table = grid.children_of(np.arange(len(grid)))
    assert table.shape == (len(grid), 8)
    np.testing.assert_array_equal(np.sort(table.ravel()), np.arange(len(kids)))
    step = angular_step(order)
    parents, below = grid.rotations(), kids.rotations()
    # the direction lies within the parent's pixel, psi a quarter step to either side
    between = np.degrees(np.arccos(np.clip((below[table][:, :, 2] * parents[:, None, 2]).sum(-1), -1, 1)))
    assert between.max() < 0.75 * step
    psi = kids.psis[table % kids.n_psi] - grid.psis[np.arange(len(grid)) % grid.n_psi][:, None]
    np.testing.assert_allclose(np.abs(psi), step / 4)
    np.testing.assert_allclose(psi.sum(1), 0, atol=1e-9)
    # and the four directions surround the parent's
    middle = below[table][:, :, 2].mean(1)
    middle /= np.linalg.norm(middle, axis=1)[:, None]
    assert np.degrees(np.arccos(np.clip((middle * parents[:, 2]).sum(1), -1, 1))).max() < 0.15 * step


def test_children_cover_as_well_as_a_grid_of_their_own():
    """Any rotation is near a child, and that child's parent is near it too."""
    grid = orientation_grid(1)
    kids = grid.children
    probes = random_rotations(100, 3)
    flat = kids.rotations().reshape(-1, 9)
    trace = probes.reshape(-1, 9) @ flat.T
    nearest = trace.argmax(1)
    gap = np.degrees(np.arccos(np.clip((trace.max(1) - 1) / 2, -1, 1)))
    assert gap.max() < angular_step(kids.order)
    parent_of = np.empty(len(kids), int)
    table = grid.children_of(np.arange(len(grid)))
    parent_of[table] = np.arange(len(grid))[:, None]
    away = rotation_angle(probes, grid.rotations()[parent_of[nearest]])
    assert away.max() < 1.5 * angular_step(grid.order)


def test_shift_grid_is_relions():
    points = shift_grid(6, 2)
    assert points.shape == (123, 3)
    assert len(np.unique(points, axis=0)) == 123
    assert (np.linalg.norm(points, axis=1) <= 6 + 1e-9).all()
    assert np.isin(np.abs(points), [0, 2, 4, 6]).all()
    assert (points == 0).all(1).any()
    np.testing.assert_array_equal(np.sort(points, 0), np.sort(-points, 0))
    # complete: the next points of the lattice are outside
    lattice = np.stack(np.meshgrid(*[np.arange(-4, 5) * 2] * 3), -1).reshape(-1, 3)
    assert ((lattice**2).sum(1) <= 36).sum() == 123


@pytest.mark.parametrize(
    ("reach", "step", "count"),
    [(0, 2, 1), (2, 2, 7), (0.6, 0.2, 123), (3.3, 1.1, 123), (5.9, 2, 33 + 24 + 24)],
)
def test_shift_grids_of_other_sizes(reach, step, count):
    points = shift_grid(reach, step)
    lattice = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3), -1).reshape(-1, 3)
    assert len(points) == ((lattice**2).sum(1) <= (reach / step + 1e-6) ** 2).sum()
    if count in (1, 7, 123):
        assert len(points) == count


def test_children_of_a_shift_halve_the_lattice():
    """Coarse points plus children make the lattice of half the step, shifted by a quarter."""
    points = (shift_grid(6, 2)[:, None] + child_offsets(2)).reshape(-1, 3)
    assert len(np.unique(points, axis=0)) == 8 * 123
    np.testing.assert_array_equal(np.abs(points) % 1, 0.5)
    assert child_offsets(2).sum() == 0


def test_euler_of_grid_rotations_round_trip():
    grid = orientation_grid(1)
    rotations = grid.rotations(7.3)
    np.testing.assert_allclose(euler_to_matrix(matrix_to_euler(rotations)), rotations, atol=1e-9)
