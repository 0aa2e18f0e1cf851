"""Classes split, merged and dropped between mini-batches: pure functions from state to state.

RELION has no counterpart: its gradient jobs keep the number of classes that they began with.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vdamkit.compare import Match
from vdamkit.errors import SettingsError
from vdamkit.imaging.halfball import fourier_to_map, map_to_fourier
from vdamkit.sampling.point_groups import parse_symmetry
from vdamkit.state import Poses, State
from vdamkit.symmetry.apply import moved_poses
from vdamkit.symmetry.fit import SymmetryMatch
from vdamkit.vdam.moments import constrained

PER_CLASS = ("maps", "moment1", "moment2", "class_probability", "data_vs_prior", "tau2", "wiener", "half_fsc")
"""Arrays of a state whose first axis are the classes."""


def split(state: State, k: int, *, solvent: str, mask_radius: float) -> State:
    """One class more: class `k` (from 0) goes on as two, each where one of its pseudo-halves alone would take the map.

    Their first moments start anew; the populations are halved. Particles are told apart by the next mini-batches, until
    then they stay with class `k`. solvent, mask_radius (px): as after a mini-batch.

    Raises
    ------
    SettingsError: no mini-batch has run with that class, so there are no halves to tell apart.
    """
    if not state.moment1[k].any():
        raise SettingsError(f"class {k + 1} has seen no mini-batch; run one before it can be split")
    reference = map_to_fourier(state.maps[k].astype(np.float64))
    halves = [fourier_to_map(reference + state.moment1[k, half]) for half in (0, 1)]
    halves = [constrained(volume, solvent, mask_radius).astype(state.maps.dtype) for volume in halves]
    arrays = {name: np.concatenate([getattr(state, name), getattr(state, name)[[k]]]) for name in PER_CLASS}
    new = len(state.maps)
    arrays["maps"][k], arrays["maps"][new] = halves
    arrays["moment1"][[k, new]] = 0
    arrays["class_probability"][[k, new]] = state.class_probability[k] / 2
    return replace(state, **arrays)


def drop(state: State, k: int) -> State:
    """One class less: class `k` (from 0) goes; its particles count as never visited until a mini-batch takes them."""
    arrays = {name: np.delete(getattr(state, name), k, axis=0) for name in PER_CLASS}
    total = arrays["class_probability"].sum()
    rest = len(arrays["maps"])
    arrays["class_probability"] = arrays["class_probability"] / total if total > 0 else np.full(rest, 1 / rest)
    mine = np.flatnonzero(state.poses.class_number == k + 1)
    poses = state.poses.updated(mine, class_number=0, last_visit=0)
    return replace(state, **arrays, poses=_renumbered(poses, k))


def merge(state: State, k: int, into: int, match: SymmetryMatch) -> State:
    """One class less: the particles of class `k` join class `into`, whose map stays; numbers from 0.

    match: how class `k`'s map lies on the other's; the particles' poses move with it.
    """
    poses = moved_poses(state.poses, match, state.poses.class_number == k + 1)
    poses = poses.updated(np.flatnonzero(poses.class_number == k + 1), class_number=into + 1)
    probability = state.class_probability.copy()
    probability[into] += probability[k]
    arrays = {name: np.delete(getattr(state, name), k, axis=0) for name in PER_CLASS if name != "class_probability"}
    return replace(state, **arrays, class_probability=np.delete(probability, k), poses=_renumbered(poses, k))


def _renumbered(poses: Poses, gone: int) -> Poses:
    """Class numbers after class `gone` (from 0) has gone."""
    return replace(poses, class_number=np.where(poses.class_number > gone + 1, poses.class_number - 1, poses.class_number))


def within_group(match: Match, group: str) -> SymmetryMatch:
    """The part of a rigid motion that leaves a point group's axes where they are.

    Of Cn a turn about z, with or without a flip about an axis across it, and a shift along z; of the others, whose axes
    fix orientation and centre, nothing.
    """
    group = parse_symmetry(group)
    rotation, shift = match.rotation, match.shift
    if group[0] == "C" and group != "C1":
        flip = np.diag([1.0, -1.0, -1.0]) if rotation[2, 2] < 0 else np.eye(3)
        turn = rotation @ flip
        angle = np.arctan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1])
        c, s = np.cos(angle), np.sin(angle)
        rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ flip
        shift = np.array([0, 0, shift[2]])
    elif group != "C1":
        rotation, shift = np.eye(3), np.zeros(3)
    return SymmetryMatch(group, rotation, shift, match.fsc, match.mean_fsc, match.resolution)
