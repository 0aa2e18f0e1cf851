"""Projections and tilt images against direct calculation; a device's way to add them up against the host's."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vdamkit.backend import Backend
from vdamkit.backend.device import Device
from vdamkit.simulate import render
from vdamkit.simulate.models import gaussian_density
from vdamkit.simulate.render import CentralSlices, layers, render_tilt_images
from vdamkit.simulate.tilt_series import make_tilt_series


def series(tilts=7):
    options = {"name": "TS_01", "size": (96, 80, 40), "pixel_size": 10.0, "defocus": 30000.0}
    return make_tilt_series(np.random.default_rng(0), tilts=tilts, **options)


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
    images = render_tilt_images(one, CentralSlices(density), point, np.eye(3)[None])
    assert images.shape == (5, 80, 96)
    positions, _ = one.project(point)
    for image, (x, y) in zip(images, positions[:, 0], strict=True):
        assert image.min() < -2 * image.max()
        row, column = np.unravel_index(image.argmin(), image.shape)
        assert abs(column - x) <= 1
        assert abs(row - y) <= 1


def test_without_a_particle_there_is_nothing_to_see():
    density = gaussian_density(np.zeros((1, 3)), np.array([25.0]), np.ones(1), box=32, pixel_size=10.0)
    nobody = np.zeros((0, 3)), np.zeros((0, 3, 3))
    assert not render_tilt_images(series(tilts=3), CentralSlices(density), *nobody).any()


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_device_adds_to_the_bit_what_threads_add_one_by_one(monkeypatch, at_once):
    rng = np.random.default_rng(2)
    centres, turns = rng.uniform(-700, 700, (40, 3)) * [1, 1, 0.2], Rotation.random(40, rng=rng).as_matrix()
    slices = CentralSlices(gaussian_density(np.zeros((1, 3)), np.array([25.0]), np.ones(1), box=32, pixel_size=10.0))
    expected = render_tilt_images(series(), slices, centres, turns)
    monkeypatch.setattr(render, "BYTES", at_once * 8 * 32**2)
    found = render_tilt_images(series(), slices, centres, turns, Backend(1, (Device(),)))
    np.testing.assert_array_equal(found, expected)


def test_layers_hold_no_overlap_and_keep_the_order():
    rng = np.random.default_rng(3)
    places, inside, box = rng.integers(-20, 100, (3, 60, 2)), rng.random((3, 60)) < 0.8, 16
    found = layers(places, inside, box)
    np.testing.assert_array_equal(found > 0, inside)
    for tilt in range(3):
        here = np.flatnonzero(inside[tilt])
        for n, i in enumerate(here):
            for j in here[n + 1 :]:
                if np.abs(places[tilt, i] - places[tilt, j]).max() < box:
                    assert found[tilt, i] < found[tilt, j]
