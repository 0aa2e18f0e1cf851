"""Point groups: RELION's axes, closure, and asymmetric units that lose no direction."""

import numpy as np
import pytest
from helpers_vdamkit import random_rotations

from vdamkit.errors import SettingsError
from vdamkit.sampling.orientations import angular_step, orientation_grid
from vdamkit.sampling.point_groups import in_asymmetric_unit, operators, parse_symmetry

ORDERS = {f"C{n}": n for n in range(1, 21)} | {f"D{n}": 2 * n for n in range(1, 13)}
ORDERS |= {"T": 12, "O": 24, "I1": 60, "I2": 60, "I3": 60, "I4": 60}

# (fold, axis) as RELION sets them (symmetries.cpp:fill_symmetry_class), to the printed digits
AXES = {
    **{f"C{n}": [(n, (0, 0, 1))] for n in range(1, 21)},
    **{f"D{n}": [(n, (0, 0, 1)), (2, (1, 0, 0))] for n in range(1, 13)},
    "T": [(3, (0, 0, 1)), (2, (0, 0.8165, 0.5774))],
    "O": [(4, (0, 0, 1)), (3, (1, 1, 1))],
    "I1": [(2, (1, 0, 0)), (5, (0.8507, 0, -0.5257)), (3, (0.9342, 0.3568, 0))],
    "I2": [
        (2, (1, 0, 0)), (2, (0, 1, 0)), (2, (0, 0, 1)), (5, (0.5257, 0, 0.8507)), (3, (0, 0.3568, 0.9342)),
    ],
    "I3": [(5, (0, 0, 1)), (2, (-0.5257, 0, 0.8507)), (3, (-0.4911, 0.3568, 0.7947))],
    "I4": [(2, (0.5257, 0, 0.8507)), (5, (0.8944, 0, 0.4472)), (3, (0.4911, 0.3568, 0.7947))],
}  # fmt: skip
SOME = ["C2", "C3", "C6", "C7", "C20", "D1", "D2", "D3", "D7", "D12", "T", "O", "I1", "I2", "I3", "I4"]


def turn(fold: int, axis) -> np.ndarray:
    """Rodrigues' formula for a turn by 360/fold degrees about an axis."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = 2 * np.pi / fold
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def contains(group: np.ndarray, matrices: np.ndarray, tolerance: float) -> bool:
    gap = np.abs(matrices[:, None] - group[None]).max((2, 3)).min(1)
    return bool((gap < tolerance).all())


@pytest.mark.parametrize("name", ORDERS)
def test_group_is_closed_proper_and_complete(name):
    group = operators(name)
    assert len(group) == ORDERS[name]
    np.testing.assert_array_equal(group[0], np.eye(3))
    assert np.abs(group @ group.transpose(0, 2, 1) - np.eye(3)).max() < 1e-12
    np.testing.assert_allclose(np.linalg.det(group), 1, atol=1e-12)
    if len(group) > 1:
        gaps = np.abs(group[:, None] - group[None]).max((2, 3)) + 2 * np.eye(len(group))
        assert gaps.min() > 0.1  # no element twice
    products = (group[:, None] @ group[None]).reshape(-1, 3, 3)
    assert contains(group, products, 1e-9)
    assert contains(group, group.transpose(0, 2, 1), 1e-9)


@pytest.mark.parametrize("name", AXES)
def test_axes_are_relions(name):
    wanted = np.stack([turn(fold, axis) for fold, axis in AXES[name]])
    assert contains(operators(name), wanted, 1e-3)


def test_i1_is_i2_turned_about_y():
    quarter = turn(4, (0, 1, 0))
    for q in (quarter, quarter.T):
        assert contains(operators("I1"), q @ operators("I2") @ q.T, 1e-9)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("C1", "C1"),
        ("c6", "C6"),
        ("c6 ", "C6"),
        (" D12", "D12"),
        ("i", "I2"),
        ("I", "I2"),
        ("i4", "I4"),
        ("t", "T"),
        ("O", "O"),
    ],
)
def test_names_become_canonical(text, name):
    assert parse_symmetry(text) == name


@pytest.mark.parametrize(
    "bad",
    ["", " ", "C", "D", "C0", "D0", "C00", "C06", "C60x", "xC6", "C-6", "C+6", "C6.0", "C 6", "C6,C2", "c6\n7", "I0", "I5",
     "I6", "T2", "O1", "Cs", "Ci", "CN", "C6v", "C6h", "D3d", "S4", "Td", "Th", "Oh", "Ih", "I2h", "6", "None", None, 6,
     "C1\u0663"],
)  # fmt: skip
def test_what_is_no_group_is_refused_with_the_list(bad):
    with pytest.raises(SettingsError) as caught:
        parse_symmetry(bad)
    text = str(caught.value)
    assert repr(bad) in text
    for allowed in ("C1", "D1", "T", "O", "I1", "I4"):
        assert allowed in text


def test_operators_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        operators("D3")[0, 0, 0] = 5
    np.testing.assert_array_equal(operators("I"), operators("I2"))


@pytest.mark.parametrize("name", SOME)
def test_asymmetric_unit_holds_each_orbit_once(name):
    """Of a generic direction and its mates exactly one lies in the unit."""
    group = operators(name)
    directions = random_rotations(300, 1)[:, 2]
    orbits = np.einsum("gij,nj->ngi", group, directions)
    inside = in_asymmetric_unit(orbits.reshape(-1, 3), name).reshape(orbits.shape[:2])
    np.testing.assert_array_equal(inside.sum(1), 1)


def gap_to_grid(directions: np.ndarray, name: str, order: int) -> np.ndarray:
    """Degrees from each direction to the nearest symmetry mate of a grid direction."""
    rot, tilt = np.radians(orientation_grid(order, name).directions).T
    kept = np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], -1)
    best = np.full(len(directions), -1.0)
    for operator in operators(name):
        best = np.maximum(best, (directions @ operator.T @ kept.T).max(1))
    return np.degrees(np.arccos(np.clip(best, -1, 1)))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", SOME)
def test_grid_reaches_every_direction(name, order):
    """No direction is further from the grid, up to symmetry, than the grid's step."""
    directions = random_rotations(400, 2)[:, 2]
    gap = gap_to_grid(directions, name, order)
    full = gap_to_grid(directions, "C1", order)
    assert gap.max() < angular_step(order)
    assert gap.mean() < 1.25 * full.mean()


@pytest.mark.parametrize("name", SOME)
def test_grid_size_is_the_sphere_over_the_order(name):
    wanted = 12 * 4**4 / ORDERS[name]
    assert orientation_grid(4, name).n_directions == pytest.approx(wanted, rel=0.2)  # thin wedges have much border
