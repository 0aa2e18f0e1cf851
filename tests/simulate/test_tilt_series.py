"""Tilt geometry and projections against direct calculation."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vdamkit.io.tilt_geometry import read_tomograms
from vdamkit.simulate.models import gaussian_density
from vdamkit.simulate.output import write_tilt_series
from vdamkit.simulate.scene import Scene
from vdamkit.simulate.tilt_series import (
    CentralSlices,
    dose_symmetric_order,
    make_tilt_series,
    read_tilt_series,
    render_tilt_images,
)


def series(tilts=7, **options):
    defaults = {"name": "TS_01", "size": (96, 80, 40), "pixel_size": 10.0, "defocus": 30000.0}
    return make_tilt_series(np.random.default_rng(0), tilts=tilts, **defaults | options)


def test_exposures_alternate_around_zero():
    np.testing.assert_array_equal(dose_symmetric_order(7), [6, 3, 2, 0, 1, 4, 5])
    assert sorted(dose_symmetric_order(10)) == list(range(10))


def test_a_point_projects_as_relion_says():
    one = series()
    point = np.array([[120.0, -55.0, 80.0]])
    positions, depths = one.project(point)
    for tilt, row in one.table.iterrows():
        rotation = Rotation.from_euler("yz", [row["rlnTomoYTilt"], row["rlnTomoZRot"]], degrees=True)
        x, y, z = rotation.apply(point[0])
        expected = [48 + (x + row["rlnTomoXShiftAngst"]) / 10, 40 + (y + row["rlnTomoYShiftAngst"]) / 10]
        np.testing.assert_allclose(positions[tilt, 0], expected)
        assert depths[tilt, 0] == pytest.approx(z)


def test_slices_are_transforms_of_projections():
    rng = np.random.default_rng(1)
    centres, sigmas, weights = rng.uniform(-60, 60, (8, 3)), np.full(8, 16.0), rng.uniform(0.5, 1, 8)
    density = gaussian_density(centres, sigmas, weights, box=32, pixel_size=10.0)
    rotation = Rotation.from_quat(rng.normal(size=4))
    turned = gaussian_density(rotation.apply(centres), sigmas, weights, box=32, pixel_size=10.0)
    found = np.fft.irfft2(CentralSlices(density)(rotation.as_matrix()[None])[0], s=(32, 32))
    expected = np.fft.ifftshift(turned.sum(axis=0)) * (density.sum() / turned.sum())
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_protein_is_dark_and_in_its_place():
    one = series(tilts=5)
    density = gaussian_density(np.zeros((1, 3)), np.array([25.0]), np.ones(1), box=32, pixel_size=10.0)
    point = np.array([[83.0, 41.0, 66.0]])
    images = render_tilt_images(one, density, point, np.eye(3)[None])
    assert images.shape == (5, 80, 96)
    positions, _ = one.project(point)
    for image, (x, y) in zip(images, positions[:, 0], strict=True):
        assert image.min() < -2 * image.max()
        row, column = np.unravel_index(image.argmin(), image.shape)
        assert abs(column - x) <= 1
        assert abs(row - y) <= 1


def test_without_a_particle_there_is_nothing_to_see():
    density = gaussian_density(np.zeros((1, 3)), np.array([25.0]), np.ones(1), box=32, pixel_size=10.0)
    assert not render_tilt_images(series(tilts=3), density, np.zeros((0, 3)), np.zeros((0, 3, 3))).any()


def test_written_series_are_read_back_the_same(tmp_path):
    one = series()
    scene = Scene(one, None, np.arange(0), np.zeros((0, 3)), np.zeros((0, 3, 3)), False)
    path = write_tilt_series(tmp_path, [scene])
    found, as_reader = read_tilt_series(path)["TS_01"], read_tomograms(path)["TS_01"]
    np.testing.assert_allclose(found.rotations, one.rotations, atol=1e-9)
    np.testing.assert_allclose(as_reader.rotations, one.rotations, atol=1e-9)
    np.testing.assert_allclose(as_reader.dose, one.table["rlnMicrographPreExposure"])
    point = np.array([[100.0, -50.0, 70.0]])
    np.testing.assert_allclose(as_reader.depths(point)[0], one.project(point)[1][:, 0], atol=1e-6)
    assert found.size == one.size
