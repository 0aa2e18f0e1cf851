"""The mean of a map over a point group."""

import numpy as np
import pytest

from vdamkit.backend import Backend
from vdamkit.backend.device import Device
from vdamkit.imaging.group_mean import group_mean, lattice_factors
from vdamkit.sampling.point_groups import operators

GROUPS = ["C1", "C2", "C5", "C6", "D2", "D7", "T", "O", "I1", "I2", "I3", "I4"]


def within(radius, box):
    squares = (np.arange(box) - box // 2) ** 2
    return squares[:, None, None] + squares[:, None] + squares <= radius**2


def blobs(places, box, width=1.8):
    """A Gaussian at each place, `(n, 3)` xyz px from the centre of the box."""
    line = np.arange(box) - box // 2
    x, y, z = (np.exp(-0.5 * ((line - places[:, [i]]) / width) ** 2) for i in range(3))
    return np.einsum("nz,ny,nx->zyx", z, y, x)


@pytest.mark.parametrize("group", GROUPS)
def test_each_operator_is_one_turn_and_one_exchange(group):
    exchanges, turns = lattice_factors(group)
    products = np.concatenate([exchanges @ turn for turn in turns])
    every = operators(group)
    assert len(products) == len(every)
    assert all(np.abs(products - operator).max((1, 2)).min() < 1e-6 for operator in every)
    np.testing.assert_array_equal(turns[0], np.eye(3))


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("group", GROUPS)
def test_each_blob_is_shared_out_among_its_mates(group, box):
    places = np.random.default_rng(0).uniform(-4, 4, (5, 3))
    mates = np.einsum("gij,nj->gni", operators(group), places).reshape(-1, 3)
    expected = blobs(mates, box) / len(operators(group))
    mean = group_mean(blobs(places, box), group)
    exact, inside = len(lattice_factors(group)[1]) == 1, within(box // 2 - 1, box)
    np.testing.assert_allclose(mean[inside], expected[inside], rtol=0, atol=(1e-12 if exact else 2e-3) * expected.max())


def test_a_small_sphere_is_read_from_a_small_box():
    volume = blobs(np.random.default_rng(1).uniform(-3, 3, (4, 3)), 48)
    whole = group_mean(volume, "C6")
    np.testing.assert_allclose(group_mean(volume, "C6", 14.5), whole, rtol=0, atol=1e-3 * whole.max())


def test_outside_the_sphere_nothing_changes():
    volume = np.random.default_rng(2).normal(size=(16,) * 3)
    outside = ~within(5, 16)
    mean = group_mean(volume, "C3", 5)
    np.testing.assert_array_equal(mean[outside], volume[outside])
    assert (mean[~outside] != volume[~outside]).any()


def test_threads_do_not_matter(monkeypatch):
    monkeypatch.setattr("vdamkit.imaging.group_mean.AT_ONCE", 100)
    volume = np.random.default_rng(3).normal(size=(16,) * 3)
    np.testing.assert_array_equal(group_mean(volume, "D3", backend=Backend(2)), group_mean(volume, "D3"))


@pytest.mark.parametrize("group", ["C6", "D7", "I2"])
def test_a_device_gives_the_same(group):
    volume = np.random.default_rng(4).normal(size=(16,) * 3)
    there = group_mean(volume, group, 6, Backend(1, (Device(),)))
    np.testing.assert_allclose(there, group_mean(volume, group, 6), rtol=0, atol=1e-13)
