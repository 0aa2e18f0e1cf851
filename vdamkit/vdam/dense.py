"""Scores of all admitted rotations at all coarse shifts: the matrix products of the E-step's first level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vdamkit.imaging.halfball import half_turn_pairs
from vdamkit.sampling.orientations import OrientationGrid


def interleaved(array: Any, real: np.dtype) -> Any:
    """Complex `(m, n)` as real `(m, 2 n)`, so that one real matrix product gives Re Σ conj(a) b."""
    return array.view(real).reshape(len(array), -1)


def scored_energy(rows: Any) -> Any:
    """``|A|²`` of rotated references `(R, n)`, without k = 0, which images have no part in: a class of another mean density
    would pay for it."""
    energy = rows.real**2 + rows.imag**2
    energy[:, 0] = 0
    return energy


class RowByRow:
    """Every rotated reference with every moved image.

    Parameters
    ----------
    parts: what :meth:`parts_of` makes of all rotated references. phases: `(S, n)` complex, of the shifts.
    """

    def __init__(self, parts: Sequence[Any], phases: Any):
        self._rows, self._energy = parts
        self.n_rows, self._phases = len(self._rows), phases

    @staticmethod
    def parts_of(rows: Any) -> tuple[Any, ...]:
        """Operands made of some rotated references `(rows, n)` complex; those of more stand one below the other."""
        return rows, scored_energy(rows)

    def scores(self, images: Any, weight: Any) -> Any:
        """``Re Σ conj(A) b e^{…} − ½ Σ w |A|²`` without priors, `(R, p, S)` real, in ``4 R p S n`` operations.

        images: b `(p, n)` complex. weight: w `(p, n)` real.
        """
        real = self._energy.dtype
        moved = (images[:, None] * self._phases).reshape(-1, images.shape[1])
        scores = interleaved(self._rows, real) @ interleaved(moved, real).T
        scores = scores.reshape(self.n_rows, len(images), -1)
        scores -= 0.5 * (self._energy @ weight.T)[:, :, None]
        return scores


class ByHalfTurns:
    """The same scores where every rotation is asked for together with its half turn about z, in half the operations.

    A half turn exchanges the voxels of pairs, 0 and 1. With the sum and the difference of a pair (P, M of a reference; u, v of
    an image) both scores have the same two parts:

        score = ½ Σ_pairs conj(P) u  ±  ½ Σ_pairs conj(M) v ,    − after the half turn.

    Parameters
    ----------
    parts: what :meth:`parts_of` makes of the references at the first half of the angles psi of all directions. n_angles: of
    these in a direction; scores are ordered by direction, half turn, angle. radius: of the half-ball.
    phases: `(S, n)` complex, of the shifts.
    """

    def __init__(self, parts: Sequence[Any], n_angles: int, radius: int, phases: Any):
        self._rows, self._energy = parts[:2], parts[2:]
        self.n_rows, self._n_angles = 2 * len(parts[0]), n_angles
        self._pairs, self._alone = half_turn_pairs(radius)
        self._phases = np.ascontiguousarray(phases.take(self._pairs, axis=1).swapaxes(0, 1))  # (2, S, m)

    @staticmethod
    def parts_of(rows: Any, radius: int) -> tuple[Any, ...]:
        """As :meth:`RowByRow.parts_of`."""
        out = []
        for values in (0.5 * rows, 0.25 * scored_energy(rows)):
            pairs = values.take(half_turn_pairs(radius)[0], axis=1)
            out += [pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]]
        return tuple(out)

    def scores(self, images: Any, weight: Any) -> Any:
        """As :meth:`RowByRow.scores`; rows are ordered as the class says."""
        _, shifts, m = self._phases.shape
        even, odd = (np.empty((len(images), shifts, m), images.dtype) for _ in range(2))
        for i, image in enumerate(self._each_once(images)):  # one after the other: what is moved stays in the cache
            moved = image[:, None] * self._phases
            np.add(moved[0], moved[1], out=even[i])
            np.subtract(moved[0], moved[1], out=odd[i])
        scores = self._combine(self._rows, (even.reshape(-1, m), odd.reshape(-1, m))).reshape(self.n_rows, len(images), -1)
        once = self._each_once(weight)
        scores -= self._combine(self._energy, (once[:, 0] + once[:, 1], once[:, 0] - once[:, 1]))[:, :, None]
        return scores

    def _each_once(self, values: Any) -> Any:
        """Values of the half-ball `(p, n)` by pairs `(p, 2, m)`; a voxel on the axis, its own partner, counts once."""
        pairs = values.take(self._pairs, axis=1)
        pairs[:, 1, self._alone] = 0
        return pairs

    def _combine(self, rows: tuple[Any, Any], images: tuple[Any, Any]) -> Any:
        real = images[0].real.dtype
        even, odd = (
            (interleaved(a, real) @ interleaved(b, real).T).reshape(-1, self._n_angles, len(b))
            for a, b in zip(rows, images, strict=True)
        )
        return np.stack([even + odd, even - odd], 1).reshape(self.n_rows, -1)


def dense_scorer(
    rotate: Callable[[np.ndarray, Callable], Sequence[Any]], grid: OrientationGrid, orientations: np.ndarray, radius: int,
    phases: Any,
) -> RowByRow | ByHalfTurns:  # fmt: skip
    """What scores the ascending `orientations` of a grid, in their order.

    rotate: gives the parts that a function makes of the reference at some orientations, or of several classes' references one
    after the other. phases: `(S, n)` complex.
    """
    first_half = before_half_turns(grid, orientations)
    if first_half is None:
        return RowByRow(rotate(orientations, RowByRow.parts_of), phases)
    parts = rotate(first_half, lambda rows: ByHalfTurns.parts_of(rows, radius))
    return ByHalfTurns(parts, grid.n_psi // 2, radius, phases)


def before_half_turns(grid: OrientationGrid, orientations: np.ndarray) -> np.ndarray | None:
    """Those of the ascending `orientations` of a grid whose half turns about z are the others.

    None where these are not all there: a prior on psi leaves some out.
    """
    n_directions = len(np.unique(orientations // grid.n_psi))
    if n_directions * grid.n_psi != len(orientations):
        return None
    return orientations[orientations % grid.n_psi < grid.n_psi // 2]
