"""The search for axes against axes that were planted."""

import numpy as np
import pytest
from planted import errors, planted
from scipy.spatial.transform import Rotation

from vdamkit.compare import moved
from vdamkit.errors import SettingsError
from vdamkit.imaging.fsc import low_pass
from vdamkit.imaging.masks import soft_sphere
from vdamkit.sampling.point_groups import generated, operators
from vdamkit.symmetry import find_symmetry, symmetrised
from vdamkit.symmetry.axes import TurnedCopies, axes_of, axis_grid, elements_for, turns_of

BOX = 32


@pytest.mark.parametrize(
    ("group", "folds"),
    [("C1", {}), ("C6", {6: 1}), ("D2", {2: 3}), ("D7", {7: 1, 2: 7}), ("D6", {6: 1, 2: 6}), ("T", {3: 4, 2: 3}),
     ("O", {4: 3, 3: 4, 2: 6}), ("I2", {5: 6, 3: 10, 2: 15})],
)  # fmt: skip
def test_axes_of_a_group_are_those_of_the_textbook(group, folds):
    found = axes_of(group)
    assert {fold: sum(axis.fold == fold for axis in found) for fold in folds} == folds
    assert len(found) == sum(folds.values())
    assert 1 + sum(axis.fold - 1 for axis in found) == len(operators(group))


@pytest.mark.parametrize("fold", range(2, 15))
def test_the_scored_turns_generate_the_whole_axis(fold):
    turns = turns_of(fold)
    assert np.gcd.reduce([*turns, fold]) == 1
    assert max(turns) == fold // 2


@pytest.mark.parametrize("group", ["C2", "C7", "D2", "D7", "T", "O", "I1", "I4"])
def test_the_elements_that_stand_for_a_group_belong_to_it_and_generate_it(group):
    elements = elements_for(group)
    for element in elements:
        assert np.abs(operators(group) - element).max((1, 2)).min() < 1e-6
    assert len(generated(elements)) == len(operators(group))


def test_the_grid_holds_every_axis_once():
    grid = axis_grid()
    assert len(grid) == 12 * 16**2 // 2
    cosine = np.abs(grid @ np.random.default_rng(0).normal(size=(3, 500)))
    cosine /= np.linalg.norm(np.random.default_rng(0).normal(size=(3, 500)), axis=0)
    assert np.degrees(np.arccos(cosine.max(0).min())) < 3.7


@pytest.mark.parametrize("group", ["C7", "D2", "O"])
def test_planted_axes_are_found(group):
    volume, rotation, shift = planted(group, 11, box=BOX, reach=0.28, noise=0.5)
    match = find_symmetry(volume, 2.0, group)
    angle, centre = errors(group, (match.rotation, match.shift / 2.0), (rotation, shift))
    assert angle < 2 and centre < 0.5
    assert match.correlation > 0.5


def test_copies_about_an_axis_are_the_copies_turned_by_its_rotations():
    """Both searches see the same correlations: at a planted axis high, at another low; a turn by nothing fits perfectly."""
    volume, rotation, _ = planted("C5", 3, box=48)
    copies = TurnedCopies(volume, 0.4 * 48, 13)
    axis, other = rotation[2], rotation[0]
    for direction, fits in ((axis, True), (other, False)):
        (found,) = copies.about(direction[None], copies.turns([72.0, 144.0]))
        turned = [copies.best(Rotation.from_rotvec(np.radians(a) * direction).as_matrix())[0] for a in (72, 144)]
        np.testing.assert_allclose(found, turned, atol=0.03)
        assert (min(found) > 0.6) if fits else (max(found) < 0.6), found
    np.testing.assert_allclose(copies.about(axis[None], copies.turns([360.0])), 1, atol=1e-3)
    assert copies.best(np.eye(3))[0] == pytest.approx(1, abs=1e-5)


def test_detail_beyond_nyquist_is_not_asked_for():
    volume, *true = planted("C4", 1, box=24, reach=0.35)
    found = find_symmetry(volume, 1.0, "C4", resolution=1.0)
    angle, centre = errors("C4", (found.rotation, found.shift), true)
    assert angle < 3 and centre < 0.5


def test_the_smallest_turn_is_taken_and_a_cn_map_is_centred_along_its_axis():
    volume, _, _ = planted("C3", 2, box=BOX, reach=0.28, noise=0.2)
    first = find_symmetry(volume, 1.0, "C3")
    laid = moved(volume, first.rotation, first.shift)
    again = find_symmetry(laid, 1.0, "C3")
    axis_angle = np.degrees(np.arccos(again.rotation[2, 2]))
    assert axis_angle < 1.5 and np.linalg.norm(again.shift) < 0.6, "a map that lies right stays where it is"
    turn = np.degrees(np.arctan2(again.rotation[1, 0], again.rotation[0, 0]))
    assert abs(turn) < 1.5, "nothing turns it about its axis"
    alike = np.corrcoef(symmetrised(laid, "C3").ravel(), symmetrised(moved(volume, *_pair(again, first)), "C3").ravel())
    assert alike[0, 1] > 0.98


def _pair(second, first):
    return second.rotation @ first.rotation, second.rotation @ first.shift + second.shift


def test_grey_scale_and_threads_do_not_matter():
    volume, _, _ = planted("C2", 5, box=BOX, reach=0.28, noise=0.3)
    one, other = find_symmetry(volume, 1.0, "C2"), find_symmetry(1e3 * volume + 7, 1.0, "C2")
    np.testing.assert_allclose(one.rotation, other.rotation, atol=2e-3)
    np.testing.assert_allclose(one.shift, other.shift, atol=0.02)
    np.testing.assert_array_equal(one.rotation, find_symmetry(volume, 1.0, "C2").rotation)


def test_a_map_without_the_symmetry_says_so():
    right, _, _ = planted("C3", 7, box=BOX, reach=0.28, noise=0.3)
    assert find_symmetry(right, 1.0, "C3").correlation > find_symmetry(right, 1.0, "C4").correlation + 0.1


def test_bad_input_is_one_sentence():
    with pytest.raises(SettingsError, match="Q7"):
        find_symmetry(np.zeros((8, 8, 8)), 1.0, "Q7")
    with pytest.raises(ValueError, match="holds nothing"):
        find_symmetry(np.zeros((8, 8, 8)), 1.0, "C2")
    with pytest.raises(ValueError, match="cube"):
        find_symmetry(np.zeros((8, 8, 9)), 1.0, "C2")


@pytest.mark.parametrize("group", ["C3", "D2", "O"])
def test_a_symmetrised_map_has_the_symmetry_and_keeps_its_own(group):
    volume = np.random.default_rng(1).normal(size=(24,) * 3)
    volume = low_pass(volume, 5) * soft_sphere(24, 6.0, edge=4.0)
    once = symmetrised(volume, group)
    for operator in operators(group):
        np.testing.assert_allclose(moved(once, operator, np.zeros(3)), once, atol=5e-3 * np.abs(once).max())
    np.testing.assert_allclose(symmetrised(once, group), once, atol=5e-3 * np.abs(once).max())
