"""Rotations sorted for the projectors, of the host and of a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vdamkit.sampling.orientations import OrientationGrid


@dataclass(frozen=True)
class Turns:
    """Rotations as the projector takes them: sorted by direction, which a cylinder serves.

    An angle psi is a base angle and 0 … 3 quarter turns, which only permute voxels: one interpolation serves up to four rows.
    """

    tilts: np.ndarray  # (d, 3, 3): the part of each direction that does not depend on psi
    direction: np.ndarray  # (rows,) number of each row's direction, ascending
    base: np.ndarray  # (rows,) number of each row's base angle in `psis`
    quarter: np.ndarray  # (rows,) its quarter turns; no two rows have all three the same
    psis: np.ndarray  # (angles,) base angles, degrees

    @classmethod
    def one(cls, rotation: np.ndarray) -> Turns:
        """A rotation ``Rz(psi) @ direction`` `(3, 3)`, with a direction of zero psi."""
        from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler  # slow to import, and of no use to a grid

        rot, tilt, psi = matrix_to_euler(rotation)
        none = np.zeros(1, int)
        return cls(euler_to_matrix([[rot, tilt, 0.0]]), none, none, none, np.array([psi]))

    @classmethod
    def single(cls, rotations: np.ndarray) -> Turns:
        """Rotations `(n, 3, 3)` that share no direction: all of each is its tilt."""
        n = len(rotations)
        return cls(rotations, np.arange(n), np.zeros(n, int), np.zeros(n, int), np.zeros(1))

    @cached_property
    def spins(self) -> np.ndarray:
        """The interpolations to be done, sorted by direction, `(s, 6)` int32: direction, base angle, and the row that each
        quarter turn gives, or -1."""
        keys, number = np.unique(self.direction * len(self.psis) + self.base, return_inverse=True)
        out = np.full((len(keys), 6), -1, np.int32)
        out[:, 0], out[:, 1] = np.divmod(keys, len(self.psis))
        out[number, 2 + self.quarter] = np.arange(len(number))
        return out

    def pieces(self, directions: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tilts and spins of so many directions at a time, which the spins count from 0."""
        out = []
        for first in range(0, len(self.tilts), directions):
            tilts = self.tilts[first : first + directions]
            ends = np.searchsorted(self.spins[:, 0], (first, first + len(tilts)))
            out.append((tilts, self.spins[slice(*ends)] - np.array([first, 0, 0, 0, 0, 0], np.int32)))
        return out


def turns_of(grid: OrientationGrid, perturbation: float, orientations: np.ndarray) -> Turns:
    """Orientations of a grid, ascending, as a projector takes them."""
    directions, psi = np.divmod(orientations, grid.n_psi)
    present, number = np.unique(directions, return_inverse=True)
    quarter, base = grid.quarter_turns(psi)
    return Turns(grid.tilts(perturbation, present), number, base, quarter, grid.psis[: grid.n_bases])
