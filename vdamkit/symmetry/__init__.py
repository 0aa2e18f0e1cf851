"""Symmetry found in a map (:func:`find_symmetry`) and applied to maps, moments and poses."""

from vdamkit.symmetry.apply import moved_angles_and_offsets, moved_state, symmetrised
from vdamkit.symmetry.fit import SymmetryMatch, find_symmetry
from vdamkit.symmetry.scores import GroupScore, SymmetryScores, symmetry_scores

__all__ = [
    "GroupScore",
    "SymmetryMatch",
    "SymmetryScores",
    "find_symmetry",
    "moved_angles_and_offsets",
    "moved_state",
    "symmetrised",
    "symmetry_scores",
]
