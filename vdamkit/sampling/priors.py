"""Gaussian priors on rot, tilt and psi about each particle's picked orientation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.backend.device import HOST, Device
from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler
from vdamkit.sampling.point_groups import operators

# from values of rotations `(n,)` and of prior centres `(m,)` to two arrays that go through all pairs
Meet = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
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

        The tilt is compared as it stands (0 … 180), psi and rot modulo 360; there is no coupling of tilt and psi. Where both
        rot and tilt have a width, the angle between the two directions of view counts instead, in the larger of the two widths:
        near tilt 0 and 180 rot alone says nothing.
        Source: RELION healpix_sampling.cpp:selectOrientationsWithNonZeroPriorProbability; there psi ignores the mates,
        which is the same for Cn.
        """
        return self._distance(rotations, centres, symmetry, _everyone(device))

    def pair_distance(
        self, rotations: np.ndarray, centres: np.ndarray, pairs: tuple[Any, Any], symmetry: str, device: Device = HOST
    ) -> Any:
        """:meth:`distance` of some pairs alone: `pairs` are numbers of rotations and of centres, `(m,)` each, on the device;
        `(m,)`."""
        r, c = pairs

        def meet(of_rotations: np.ndarray, of_centres: np.ndarray) -> tuple[Any, Any]:
            of_rotations, of_centres = device.put_all(of_rotations, of_centres)
            return of_rotations[r], of_centres[c]

        return self._distance(rotations, centres, symmetry, meet)

    def _distance(self, rotations: np.ndarray, centres: np.ndarray, symmetry: str, meet: Meet) -> Any:
        """Least squared distance over the mates."""
        best = None
        for operator in self._mates(symmetry):
            first, *others = self._apart(rotations @ operator, centres, meet)
            total = sum((part**2 for part in others), first**2)
            best = total if best is None else np.minimum(best, total)
        assert best is not None
        return best

    def _apart(self, rotations: np.ndarray, centres: np.ndarray, meet: Meet) -> list[Any]:
        """How far rotations lie from centres, in widths, for each thing that has one."""
        angles = matrix_to_euler(rotations)
        widths: list[tuple[int, float | None]] = list(enumerate((self.rot, self.tilt, self.psi)))
        out = []
        if self.rot is not None and self.tilt is not None:
            ours, theirs = rotations[:, 2], euler_to_matrix(centres)[:, 2]
            pairs = (meet(ours[:, axis], theirs[:, axis]) for axis in range(3))
            cosine = sum(a * b for a, b in pairs)
            out.append(np.degrees(np.arccos(np.minimum(np.maximum(cosine, -1), 1))) / max(self.rot, self.tilt))
            widths = widths[2:]
        for axis, width in widths:
            if width is not None:
                angle, centre = meet(angles[:, axis], centres[:, axis])
                out.append(abs(wrap(angle - centre)) / width)
        return out

    def _mates(self, symmetry: str) -> np.ndarray:
        """Operators that make a difference: a turn about z changes rot alone."""
        group = operators(symmetry)
        return group[:1] if self.rot is None and symmetry.startswith("C") else group

    def within_cut(self, rotations: np.ndarray, centres: np.ndarray, symmetry: str, device: Device = HOST) -> Any:
        """Which coarse orientations each prior centre admits, bool `(m, n)` on the device; at least the nearest one.

        The cut is CUT widths, of each angle by itself (of directions where both rot and tilt have a width). Where nothing is
        left the nearest orientation is kept (RELION aborts there for psi: "prior on psi is zero").
        """
        put = device.put
        admitted = device.xp.zeros((len(centres), len(rotations)), bool)
        for operator in self._mates(symmetry):
            inside = device.xp.ones_like(admitted)
            for part in self._apart(rotations @ operator, centres, _everyone(device)):
                inside &= part < CUT
            admitted |= inside
        empty = np.flatnonzero(~device.get(admitted.any(1)))
        if len(empty):
            nearest = self.distance(rotations, centres[empty], symmetry, device).argmin(1)
            admitted[put(empty), nearest] = True
        return admitted


def _everyone(device: Device) -> Meet:
    """Each centre with each rotation, `(m, n)` on a device."""
    return lambda of_rotations, of_centres: (device.put(of_rotations)[None], device.put(of_centres)[:, None])


def unique_centres(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of `(n, 3)` prior centres and each particle's row among them."""
    distinct, index = np.unique(np.round(centres, 4), axis=0, return_inverse=True)
    return distinct, index.reshape(-1)
