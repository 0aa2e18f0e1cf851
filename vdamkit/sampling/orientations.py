"""Orientation grids: HEALPix directions × psi, and their oversampled children."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import healpix
import numpy as np

from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.sampling.point_groups import in_asymmetric_unit, operators, parse_symmetry


def angular_step(order: int) -> float:
    """Step in degrees of a HEALPix order, as RELION counts it: 30, 15, 7.5, ... for 1, 2, 3, ..."""
    return 60.0 / 2**order


@lru_cache(maxsize=8)
def _perturbing(angle: float) -> np.ndarray:
    """``A(δ, δ, δ)``, `(3, 3)`, which every group of orientations asks for again."""
    return euler_to_matrix([angle] * 3)


@dataclass(frozen=True)
class OrientationGrid:
    """Directions of one asymmetric unit × psi angles. Orientation ``r`` is direction ``r // n_psi``, psi ``r % n_psi``."""

    order: int
    pixels: np.ndarray  # (n_directions,) NEST pixel numbers
    psis: np.ndarray  # (n_psi,) degrees

    @property
    def n_psi(self) -> int:
        return len(self.psis)

    @property
    def n_directions(self) -> int:
        return len(self.pixels)

    def __len__(self) -> int:
        return self.n_directions * self.n_psi

    @cached_property
    def directions(self) -> np.ndarray:
        """rot and tilt in degrees, `(n_directions, 2)`; rot in (-180, 180]."""
        theta, phi = healpix.pix2ang(2**self.order, self.pixels, nest=True)
        rot = np.degrees(phi)
        return np.stack([np.where(rot > 180, rot - 360, rot), np.degrees(theta)], -1)

    @cached_property
    def _tilt_matrices(self) -> np.ndarray:
        rot, tilt = self.directions.T
        return euler_to_matrix(np.stack([rot, tilt, np.zeros_like(rot)], -1))

    @cached_property
    def _spin_matrices(self) -> np.ndarray:
        zeros = np.zeros(self.n_psi)
        return euler_to_matrix(np.stack([zeros, zeros, self.psis], -1))

    def quarter_turns(self, psi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of psi angles as a quarter turn, 0 … 3, after a base angle; both `(m,)`.

        A quarter turn maps a plane of the voxel lattice onto itself, so that a base angle and three permutations give four
        angles. Where 90° is no multiple of the step, every angle is a base of its own.
        """
        return np.divmod(psi, self.n_bases)

    @property
    def n_bases(self) -> int:
        """Base angles: the first of :attr:`psis`."""
        return self.n_psi // 4 if self.n_psi % 4 == 0 else self.n_psi

    def tilts(self, perturbation: float = 0.0, subset: np.ndarray | None = None) -> np.ndarray:
        """The part of rotations that does not depend on psi, for all directions or a subset, `(n, 3, 3)`.

        `perturbation` (degrees) δ turns every orientation to ``A(rot, tilt, psi) @ A(δ, δ, δ)``
        (RELION healpix_sampling.cpp:getOrientations).
        """
        base = self._tilt_matrices if subset is None else self._tilt_matrices[subset]
        return base @ _perturbing(perturbation)

    def rotations(self, perturbation: float = 0.0, subset: np.ndarray | None = None) -> np.ndarray:
        """Rotation matrices `(n, 3, 3)` of all orientations, or of those in `subset`."""
        index = np.arange(len(self)) if subset is None else np.asarray(subset)
        directions, psis = np.divmod(index, self.n_psi)
        return self._spin_matrices[psis] @ self.tilts(perturbation, directions)

    @cached_property
    def children(self) -> OrientationGrid:
        """The grid of the next order (kept): 4 directions per direction, psi ± a quarter step.

        Children of orientation (d, j) are (4 d + a, 2 j + b), a in 0..3, b in 0..1.
        Source: RELION healpix_sampling.cpp:getOrientations (oversampling order 1).
        """
        pixels = (4 * self.pixels[:, None] + np.arange(4)).ravel()
        quarter = 360 / self.n_psi / 4
        psis = (self.psis[:, None] + np.array([-quarter, quarter])).ravel()
        return OrientationGrid(self.order + 1, pixels, psis)

    def children_of(self, orientations: np.ndarray) -> np.ndarray:
        """Indices in :attr:`children` of the 8 children of each of `orientations` `(m,)`; `(m, 8)`."""
        d, j = np.divmod(np.asarray(orientations), self.n_psi)
        directions = 4 * d[:, None] + np.repeat(np.arange(4), 2)
        return directions * (2 * self.n_psi) + 2 * j[:, None] + np.tile([0, 1], 4)


@lru_cache(maxsize=32)
def orientation_grid(order: int, symmetry: str = "C1") -> OrientationGrid:
    """All orientations of a HEALPix order within one asymmetric unit of a point group; cached."""
    n_psi = round(360 / angular_step(order))
    pixels = np.arange(12 * 4**order)
    grid = OrientationGrid(order, pixels, np.arange(n_psi) * angular_step(order))
    vectors = _unit_vectors(grid)
    keep = _cover(vectors, in_asymmetric_unit(vectors, parse_symmetry(symmetry)), symmetry, angular_step(order))
    return OrientationGrid(order, pixels[keep], grid.psis)


def _unit_vectors(grid: OrientationGrid) -> np.ndarray:
    rot, tilt = np.radians(grid.directions).T
    return np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], -1)


def _cover(vectors: np.ndarray, keep: np.ndarray, symmetry: str, step: float) -> np.ndarray:
    """Add directions until every direction has a symmetry mate of a kept one within 0.7 `step`.

    An asymmetric unit smaller than a pixel (I at order 1) may hold no pixel at all, and pixels on its border may be
    lost to rounding of the grid; RELION keeps more than one unit and then removes near mates.
    """
    group = operators(symmetry)
    if len(group) == 1:
        return keep
    keep = keep.copy()
    limit = np.cos(np.radians(0.7 * step))
    best = np.full(len(vectors), -1.0)
    for i in np.flatnonzero(keep):
        best = np.maximum(best, (vectors @ (group @ vectors[i]).T).max(1))
    while best.min() < limit:
        worst = int(best.argmin())
        keep[worst] = True
        best = np.maximum(best, (vectors @ (group @ vectors[worst]).T).max(1))
    return keep
