"""Spheres of hexamers, free particles, and what the picker writes about them."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler, rotation_angle
from vdamkit.simulate.lattice import (
    free_sites,
    hexagonal_sphere,
    lattice_radius,
    picked_frames,
    sphere_sites,
)

SPACING = 150.0


def perfect_sphere(**options):
    return sphere_sites(np.random.default_rng(1), centre=np.zeros(3), subdivision=4, spacing=SPACING, **options)


@pytest.mark.parametrize("subdivision", [1, 2, 3, 4, 5])
def test_geodesic_sphere_has_twelve_five_fold_points(subdivision):
    points, six_fold = hexagonal_sphere(subdivision)
    assert len(points) == 10 * subdivision**2 + 2
    assert (~six_fold).sum() == 12
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-12)


def test_every_particle_has_six_neighbours_at_the_lattice_distance():
    points, six_fold = hexagonal_sphere(4)
    points *= lattice_radius(4, SPACING)
    distances = cKDTree(points).query(points[six_fold], k=8)[0][:, 1:]
    assert distances[:, :6].mean() == pytest.approx(SPACING, rel=0.02)
    assert distances[:, :6].min() > 0.8 * SPACING
    assert distances[:, :6].max() < 1.15 * SPACING
    assert distances[:, 6].min() > 1.4 * SPACING


def test_neighbours_are_turned_alike():
    sites = perfect_sphere()
    np.testing.assert_allclose(sites.rotations[..., 2], sites.normals, atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(sites.rotations), 1)
    # A neighbour lies in the direction of the particle's x axis, or of one turned by 60 degrees.
    order = cKDTree(sites.centres).query(sites.centres, k=2)[1]
    bond = np.einsum("nji,nj->ni", sites.rotations, sites.centres[order[:, 1]] - sites.centres)
    azimuth = np.degrees(np.arctan2(bond[:, 1], bond[:, 0]))
    assert np.abs(azimuth - 60 * np.round(azimuth / 60)).max() < 8


def test_empty_sites_and_disorder():
    full, sparse = perfect_sphere(), perfect_sphere(occupancy=0.7, orientation_error=6.0)
    assert len(full.centres) == 150
    assert 85 < len(sparse.centres) < 125
    tilt = np.degrees(np.arccos(np.sum(sparse.rotations[..., 2] * sparse.normals, axis=1)))
    assert np.sqrt(np.mean(tilt**2) / 2) == pytest.approx(6, rel=0.2)


def test_picker_puts_the_normal_on_minus_x_and_the_axis_at_tilt_90():
    sites = perfect_sphere()
    frames = picked_frames(np.random.default_rng(2), sites.normals)
    np.testing.assert_allclose(-frames[..., 0], sites.normals, atol=1e-12)
    rot, tilt, psi = matrix_to_euler(np.swapaxes(frames, 1, 2) @ sites.rotations).T
    np.testing.assert_allclose(tilt, 90, atol=1e-6)
    np.testing.assert_allclose(psi, 0, atol=1e-6)
    assert np.histogram(rot, bins=4, range=(-180, 180))[0].min() > 20  # the picker does not know it
    axis = (frames @ euler_to_matrix([37.0, 90.0, 0.0]))[..., 2]
    np.testing.assert_allclose(axis, sites.normals, atol=1e-12)


def test_free_particles_keep_their_distance_and_point_anywhere():
    sites = free_sites(np.random.default_rng(3), count=60, half_size=np.array([1000, 1000, 400]), distance=250)
    assert sites.normals is None
    assert cKDTree(sites.centres).query(sites.centres, k=2)[0][:, 1].min() > 200
    assert (np.abs(sites.centres) <= [1000, 1000, 400]).all()
    angles = rotation_angle(sites.rotations[:30], sites.rotations[30:])
    assert angles.mean() == pytest.approx(126.5, abs=15)  # mean angle between uniform rotations
