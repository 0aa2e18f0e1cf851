"""Gaussian priors on rot, tilt and psi about each particle's picked orientation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.backend.device import HOST, Device
from vdamkit.sampling.euler import matrix_to_euler
from vdamkit.sampling.point_groups import operators

CUT = 3.0  # widths beyond which a coarse orientation is not searched (RELION healpix_sampling.cpp)


def wrap(degrees: np.ndarray) -> np.ndarray:
    """Angle differences brought to [-180, 180)."""
    return (degrees + 180) % 360 - 180


@dataclass(frozen=True)
class OrientationPrior:
    """Widths in degrees; None leaves an angle free (RELION --sigma_rot, --sigma_tilt, --sigma_psi)."""

    rot: float | None = None
    tilt: float | None = None
    psi: float | None = None

    @property
    def active(self) -> bool:
        return any(width is not None for width in (self.rot, self.tilt, self.psi))

    def distance(self, rotations: np.ndarray, centres: np.ndarray, symmetry: str, device: Device = HOST) -> Any:
        """Squared distance in widths from each prior centre to the nearest symmetry mate of each rotation.

        Parameters
        ----------
        rotations: `(n, 3, 3)`. centres: `(m, 3)` rot, tilt, psi in degrees. device: where it is computed.

        Returns
        -------
        `(m, n)` float64 on the device: ``min over mates of sum ((angle - centre) / width)²`` over the angles that have a width.

        The tilt is compared as it stands (0 … 180), psi and rot modulo 360; there is no coupling of tilt and psi.
        Source: RELION healpix_sampling.cpp:selectOrientationsWithNonZeroPriorProbability; there psi ignores the mates,
        which is the same for Cn.
        """
        put = device.put

        def away(angles: np.ndarray, axis: int) -> Any:
            return put(angles[:, axis])[None] - put(centres[:, axis])[:, None]

        return self._distance(rotations, symmetry, away)

    def pair_distance(
        self, rotations: np.ndarray, centres: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], symmetry: str
    ) -> np.ndarray:
        """:meth:`distance` of some pairs alone: `pairs` are numbers of rotations and of centres, `(m,)` each; `(m,)`."""
        r, c = pairs
        return self._distance(rotations, symmetry, lambda angles, axis: angles[r, axis] - centres[c, axis])

    def _distance(self, rotations: np.ndarray, symmetry: str, away: Callable[[np.ndarray, int], Any]) -> Any:
        """Least squared distance over the mates; `away`: from angles `(n, 3)` and an axis to differences in degrees."""
        best = None
        for operator in self._mates(symmetry):
            angles = matrix_to_euler(rotations @ operator)
            parts = [(wrap(away(angles, axis)) / width) ** 2 for axis, width in enumerate(self._widths) if width is not None]
            total = sum(parts[1:], parts[0])
            best = total if best is None else np.minimum(best, total)
        assert best is not None
        return best

    @property
    def _widths(self) -> tuple[float | None, float | None, float | None]:
        return self.rot, self.tilt, self.psi

    def _mates(self, symmetry: str) -> np.ndarray:
        """Operators that make a difference: a turn about z changes rot alone."""
        group = operators(symmetry)
        return group[:1] if self.rot is None and symmetry.startswith("C") else group

    def within_cut(self, rotations: np.ndarray, centres: np.ndarray, symmetry: str, device: Device = HOST) -> Any:
        """Which coarse orientations each prior centre admits, bool `(m, n)` on the device; at least the nearest one.

        The cut is CUT widths per angle. Where nothing is left the nearest orientation is kept (RELION aborts there
        for psi: "prior on psi is zero").
        """
        put = device.put
        admitted = device.xp.zeros((len(centres), len(rotations)), bool)
        for operator in self._mates(symmetry):
            angles = matrix_to_euler(rotations @ operator)
            inside = device.xp.ones_like(admitted)
            for axis, width in enumerate(self._widths):
                if width is not None:
                    inside &= abs(wrap(put(angles[:, axis])[None] - put(centres[:, axis])[:, None])) < CUT * width
            admitted |= inside
        empty = np.flatnonzero(~device.get(admitted.any(1)))
        if len(empty):
            nearest = self.distance(rotations, centres[empty], symmetry, device).argmin(1)
            admitted[put(empty), nearest] = True
        return admitted


def unique_centres(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of `(n, 3)` prior centres and each particle's row among them."""
    distinct, index = np.unique(np.round(centres, 4), axis=0, return_inverse=True)
    return distinct, index.reshape(-1)
