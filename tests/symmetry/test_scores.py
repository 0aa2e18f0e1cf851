"""Which groups a map supports."""

import numpy as np
import pytest
from planted import planted

from vdamkit.errors import SettingsError
from vdamkit.notebook.figures import png
from vdamkit.notebook.symmetry_figure import symmetry_figure
from vdamkit.sampling.point_groups import operators
from vdamkit.symmetry import symmetry_scores
from vdamkit.symmetry.axes import axes_of, telling_turns
from vdamkit.symmetry.scores import GROUPS, _above_chance, is_subgroup

SMALL = ("C2", "C3", "C4", "C5", "C6", "C7", "D2", "D3", "D6", "O")
FEW = ("C2", "C3", "C4", "C5", "C6")


@pytest.mark.parametrize("large", GROUPS)
def test_subgroups_are_those_whose_axes_a_group_has(large):
    """A subgroup's order divides the group's, and the group has axes of all its folds."""
    folds = [axis.fold for axis in axes_of(large)]
    for small in GROUPS:
        if is_subgroup(small, large):
            assert len(operators(large)) % len(operators(small)) == 0
            assert all(any(fold % axis.fold == 0 for fold in folds) for axis in axes_of(small)), (small, large)
        elif small[0] == "C":  # every cyclic group of an axis is one
            assert not any(fold % int(small[1:]) == 0 for fold in folds), (small, large)


@pytest.mark.parametrize("group", [*GROUPS, "C1" + "7"])
def test_telling_turns_make_up_the_group(group):
    """Products of the telling turns reach every element of the group, and no other."""
    made = {tuple(np.round(np.eye(3), 4).ravel() + 0.0)}
    turns, new = telling_turns(group), [np.eye(3)]
    while new:
        candidates = [turn @ matrix for turn in turns for matrix in new]
        new = []
        for matrix in candidates:
            key = tuple(np.round(matrix, 4).ravel() + 0.0)
            if key not in made:
                made.add(key)
                new.append(matrix)
        assert len(made) <= len(operators(group))
    assert len(made) == len(operators(group))


def test_groups_are_refined_whose_axes_stand_out_from_chance():
    """Of two folds alone nobody knows which one is chance; and a map without symmetry keeps what chance gives best."""
    by_chance = dict.fromkeys(range(2, 15), 0.4)
    assert _above_chance(by_chance | {2: 0.9, 3: 0.95, 6: 0.8, 7: 0.6}) == {2, 3, 6}
    assert _above_chance({2: 0.4, 5: 0.9}) == {2, 5}
    assert 7 in _above_chance(by_chance | {7: 0.45})


@pytest.fixture(scope="module")
def of_c6():
    volume, rotation, _ = planted("C6", 5, box=40, blobs=60)
    return symmetry_scores(volume, 2.0, groups=SMALL), rotation


def test_the_true_group_is_named(of_c6):
    scores, rotation = of_c6
    assert scores.named == "C6" and "C6" in str(scores)
    table = scores.table()
    assert (table.loc[["C2", "C3", "C6"], "relative"] > 0.9).all()
    assert (table.drop(index=["C2", "C3", "C6"])["relative"] < 0.5).all()
    assert table["score"].is_monotonic_decreasing
    ((fold, direction),) = scores["C6"].axes
    assert fold == 6 and abs(direction @ rotation[2]) > np.cos(np.radians(1.5))


def test_a_wrong_choice_is_warned_of(of_c6):
    scores, _ = of_c6
    assert scores.warning("C6") == "" and scores.warning("C3") == ""
    assert "a wrong group typically" in scores.warning("C5")
    assert "subgroup C6" in scores.warning("D6")


def test_a_dihedral_group_is_told_from_its_main_axis():
    volume, _, _ = planted("D3", 2, box=40, blobs=60)
    scores = symmetry_scores(volume, 2.0, groups=SMALL)
    assert scores.named == "D3"
    assert scores["D3"].relative > 0.9 > scores["D6"].relative


def test_no_symmetry_is_not_made_up():
    volume, _, _ = planted("C1", 7, box=40, blobs=60)
    scores = symmetry_scores(volume, 2.0, groups=[*FEW, "C7", "D2"])
    assert scores.named == "C1" or "C1" in scores.possible


def test_scores_do_not_depend_on_the_grey_scale(of_c6):
    volume, _, _ = planted("C6", 5, box=40, blobs=60)
    again = symmetry_scores(1e3 * volume + 7, 2.0, groups=SMALL).table()
    np.testing.assert_allclose(again["score"], of_c6[0].table().loc[again.index, "score"], atol=2e-3)


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="cube"):
        symmetry_scores(np.zeros((4, 5, 6)), 1.0)
    with pytest.raises(ValueError, match="nothing"):
        symmetry_scores(np.zeros((16, 16, 16)), 1.0)
    with pytest.raises(SettingsError, match="C60x"):
        symmetry_scores(np.random.default_rng(0).normal(size=(16,) * 3), 1.0, groups=["C60x"])


def test_the_picture_marks_what_fits(of_c6):
    scores, _ = of_c6
    figure = symmetry_figure(scores, heading="after mini-batch 7")
    assert png(figure)[:4] == b"\x89PNG"
    left, right = figure.axes
    assert [label.get_text() for label in left.get_xticklabels()] == list(SMALL)
    assert "C6" in right.get_title() and "mini-batch 7" in figure.get_suptitle()


def test_a_nearly_round_map_is_not_said_to_have_no_symmetry():
    """Fourteen copies of six blobs: every turn about the axis fits; the true group is listed, nothing is named."""
    volume, _, _ = planted("C14", 7003)
    scores = symmetry_scores(volume, 1.0, groups=("C2", "C3", "C4", "C5", "C7", "C11", "C13", "C14"))
    assert scores.named is None
    assert {"C14", "C1"} <= set(scores.possible)
    assert "nearly round" in str(scores)
