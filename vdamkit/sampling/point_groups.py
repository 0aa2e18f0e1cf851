"""Point groups in RELION's setting of the axes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from scipy.spatial.transform import Rotation

from vdamkit.errors import SettingsError

ALLOWED = "C1, C2, ... (any Cn), D1, D2, ... (any Dn), T, O, I (= I2), I1, I2, I3, I4"

# (order, axis xyz) of the generators; RELION symmetries.cpp:fill_symmetry_class
_POLYHEDRAL = {
    "T": ((3, (0, 0, 1)), (2, (0, 0.816496580927726, 0.577350269189626))),
    "O": ((3, (0.577350269189626, 0.577350269189626, 0.577350269189626)), (4, (0, 0, 1))),
    "I1": (
        (2, (1, 0, 0)),
        (5, (0.850650808352040, 0, -0.525731112119134)),
        (3, (0.934172358962716, 0.356822089773090, 0)),
    ),
    "I2": (
        (2, (0, 0, 1)),
        (5, (0.525731112119134, 0, 0.850650808352040)),
        (3, (0, 0.356822089773090, 0.934172358962716)),
    ),
    "I3": (
        (2, (-0.525731112119134, 0, 0.850650808352040)),
        (5, (0, 0, 1)),
        (3, (-0.491123473188423, 0.356822089773090, 0.794654472291766)),
    ),
    "I4": (
        (2, (0.525731112119134, 0, 0.850650808352040)),
        (5, (0.894427190999916, 0, 0.447213595499958)),
        (3, (0.491123473188423, 0.356822089773090, 0.794654472291766)),
    ),
}


def parse_symmetry(name: str) -> str:
    """The canonical name of a point group: upper case, ``I`` becomes ``I2``.

    Raises
    ------
    SettingsError
        where `name` is not a group of proper rotations that vdamkit knows; the text lists what is allowed.
    """
    text = str(name).strip().upper()
    if text == "I":
        text = "I2"
    if text in _POLYHEDRAL:
        return text
    match = re.fullmatch(r"([CD])([1-9][0-9]*)", text)
    if not match:
        raise SettingsError(f"symmetry is {name!r}, which is not a point group vdamkit knows; allowed are {ALLOWED}")
    return f"{match[1]}{int(match[2])}"


def _turn(order: int, axis: tuple[float, float, float]) -> np.ndarray:
    unit = np.asarray(axis, np.float64)
    return Rotation.from_rotvec(2 * np.pi / order * unit / np.linalg.norm(unit)).as_matrix()


@lru_cache(maxsize=64)
def operators(name: str) -> np.ndarray:
    """All rotations of a point group, `(order, 3, 3)` float64, the identity first; read-only.

    Cn: n about z. Dn: also 2 about x. T: 3 about z. O: 4 about z. I1-I4 as RELION sets them. Matrices left-multiply
    xyz vectors of the reference frame. Source: RELION symmetries.cpp:fill_symmetry_class.
    """
    group = parse_symmetry(name)
    if group in _POLYHEDRAL:
        generators = [_turn(*g) for g in _POLYHEDRAL[group]]
    else:
        n = int(group[1:])
        turns = np.stack([Rotation.from_euler("z", 360 * i / n, degrees=True).as_matrix() for i in range(n)])
        if group[0] == "D":
            turns = np.concatenate([turns, turns @ _turn(2, (1, 0, 0))])
        return _frozen(turns)
    return _frozen(generated(generators))


def generated(generators: Iterable[np.ndarray]) -> np.ndarray:
    """The finite group that some rotations generate, `(order, 3, 3)`, the identity first."""
    generators = list(generators)
    found = [np.eye(3)]
    queue = [np.eye(3)]
    while queue:
        base = queue.pop()
        for generator in generators:
            candidate = generator @ base
            if min(np.abs(candidate - known).max() for known in found) > 1e-6:
                found.append(candidate)
                queue.append(candidate)
    return np.stack(found)


def _frozen(matrices: np.ndarray) -> np.ndarray:
    matrices.flags.writeable = False
    return matrices


def in_asymmetric_unit(directions: np.ndarray, name: str) -> np.ndarray:
    """Which unit vectors `(n, 3)` lie in one asymmetric unit of the group; bool `(n,)`.

    The unit is the set of directions that are nearer to a generic axis than to any of that axis's symmetry mates (a
    Dirichlet domain), so it serves every group alike. For Cn it is a wedge about rot = 0.
    """
    group = operators(name)
    generic = np.array([1.0, 1.7e-3, 0.61803])
    generic /= np.linalg.norm(generic)
    mates = np.einsum("gij,j->gi", group, generic)
    others = mates[np.abs(mates - generic).max(1) > 1e-9]
    if not len(others):
        return np.ones(len(directions), bool)
    return (directions @ (generic - others).T >= -1e-9).all(1)
