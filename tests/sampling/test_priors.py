"""Orientation priors: value, cut, wrap-around and symmetry mates."""

import numpy as np
import pytest

from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.priors import OrientationPrior, unique_centres, wrap


def one(prior: OrientationPrior, angles, centre, symmetry: str = "C1") -> float:
    return float(prior.distance(euler_to_matrix([angles]), np.array([centre], float), symmetry)[0, 0])


def test_tilt_prior_is_a_gaussian_of_the_tilt():
    prior = OrientationPrior(tilt=10)
    for tilt, wanted in ((90, 0), (100, 1), (70, 4), (95, 0.25)):
        assert one(prior, [33, tilt, -71], [0, 90, 0]) == pytest.approx(wanted, abs=1e-9)
    assert one(prior, [33, 80, -71], [120, 90, 50]) == pytest.approx(1, abs=1e-9)  # rot and psi are free


def test_widths_add_up():
    assert one(OrientationPrior(tilt=10, psi=20), [5, 100, 20], [0, 90, 0]) == pytest.approx(2, abs=1e-9)
    assert one(OrientationPrior(rot=10, psi=20), [5, 100, 20], [0, 90, 0]) == pytest.approx(1.25, abs=1e-9)


def test_rot_and_tilt_together_are_a_cone_of_directions():
    """Near the pole rot alone says nothing: directions a few degrees apart are near, whatever their rot."""
    prior = OrientationPrior(rot=5, tilt=10)
    assert one(prior, [0, 100, 50], [0, 90, 0]) == pytest.approx(1, abs=1e-9)
    assert one(prior, [10, 90, 50], [0, 90, 0]) == pytest.approx(1, abs=1e-9)  # the larger width for both
    assert one(prior, [180, 4, 0], [0, 3, 0]) == pytest.approx(0.49, abs=1e-9)
    grid = orientation_grid(2).rotations()
    admitted = prior.within_cut(grid, np.array([[0.0, 3, 0]]), "C1")[0]
    away = np.degrees(np.arccos(np.clip(grid[:, 2] @ euler_to_matrix([[0.0, 3, 0]])[0, 2], -1, 1)))
    np.testing.assert_array_equal(admitted, away < 30)


def test_psi_wraps():
    prior = OrientationPrior(psi=2)
    assert one(prior, [0, 90, 179], [0, 90, -179]) == pytest.approx(1, abs=1e-9)
    assert one(prior, [0, 90, -179], [0, 90, 179]) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(wrap(np.array([0, 179, 180, 181, -180, -181, 540])), [0, 179, -180, -179, -180, 179, -180])


def test_psi_flip_is_far_away():
    """180 degrees in psi is as far as can be: no folding of the polarity."""
    assert one(OrientationPrior(psi=10), [0, 90, 180], [0, 90, 0]) == pytest.approx(324)


def test_rot_prior_counts_to_the_nearest_mate():
    prior = OrientationPrior(rot=5)
    assert one(prior, [65, 90, 0], [0, 90, 0], "C6") == pytest.approx(1, abs=1e-9)
    assert one(prior, [-125, 90, 0], [0, 90, 0], "C6") == pytest.approx(1, abs=1e-9)
    assert one(prior, [65, 90, 0], [0, 90, 0], "C1") == pytest.approx(169, abs=1e-6)


def test_tilt_prior_sees_the_mates_of_a_dihedral_group():
    """The two-fold about x takes tilt to 180 - tilt, so either side of the equator is as good."""
    prior = OrientationPrior(tilt=10)
    assert one(prior, [20, 150, 40], [0, 30, 0], "D3") == pytest.approx(0, abs=1e-9)
    assert one(prior, [20, 150, 40], [0, 30, 0], "C3") == pytest.approx(144, abs=1e-6)


@pytest.mark.parametrize("symmetry", ["C1", "C6", "D2"])
def test_the_nearest_mate_gives_the_same_value_for_all_mates(symmetry):
    from vdamkit.sampling.point_groups import operators

    prior = OrientationPrior(rot=11, tilt=7, psi=13)
    base = euler_to_matrix([[20.0, 75.0, -30.0]])
    centre = np.array([[10.0, 90.0, 0.0]])
    values = [prior.distance(base @ operator, centre, symmetry)[0, 0] for operator in operators(symmetry)]
    np.testing.assert_allclose(values, values[0], rtol=1e-9)


def test_cut_is_three_widths():
    grid = orientation_grid(2)
    rotations = grid.rotations()
    tilt = np.repeat(grid.directions[:, 1], grid.n_psi)
    centres, width = np.array([[0, 90.0, 0], [0, 20.0, 0]]), 9.7  # no grid direction lies on the cut itself
    inside = OrientationPrior(tilt=width).within_cut(rotations, centres, "C1")
    np.testing.assert_array_equal(inside[0], np.abs(tilt - 90) < 3 * width)
    np.testing.assert_array_equal(inside[1], np.abs(tilt - 20) < 3 * width)
    assert 0 < inside[1].sum() < inside[0].sum() < len(grid)


def test_cut_of_psi_wraps():
    grid = orientation_grid(1)
    inside = OrientationPrior(psi=15).within_cut(grid.rotations(), np.array([[0, 0, 180.0]]), "C1")
    psi = np.tile(grid.psis, grid.n_directions)
    np.testing.assert_array_equal(inside[0], np.abs(wrap(psi - 180)) < 45)


def test_at_least_the_nearest_orientation_is_kept():
    grid = orientation_grid(1)
    rotations = grid.rotations()
    tilt = np.repeat(grid.directions[:, 1], grid.n_psi)
    centre = 37.0
    inside = OrientationPrior(tilt=0.1).within_cut(rotations, np.array([[0, centre, 0]]), "C1")
    assert inside.sum() == 1
    assert np.abs(tilt[inside[0]] - centre) == pytest.approx(np.abs(tilt - centre).min(), abs=1e-6)


def test_no_width_no_prior():
    assert not OrientationPrior().active
    assert OrientationPrior(psi=5.0).active


def test_unique_centres_give_every_particle_its_row():
    centres = np.array([[0, 90, 0], [1, 2, 3], [0, 90, 0.000001], [1, 2, 3.5]])
    distinct, row = unique_centres(centres)
    assert len(distinct) == 3
    np.testing.assert_allclose(distinct[row], centres, atol=1e-4)
