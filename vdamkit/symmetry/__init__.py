"""Symmetry found in a map (:func:`find_symmetry`) and applied to maps, moments and poses."""

from vdamkit.symmetry.apply import moved_angles_and_offsets, moved_state, symmetrised
from vdamkit.symmetry.fit import SymmetryMatch, find_symmetry

__all__ = ["SymmetryMatch", "find_symmetry", "moved_angles_and_offsets", "moved_state", "symmetrised"]
