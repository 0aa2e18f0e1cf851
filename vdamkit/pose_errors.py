"""Errors of poses whose truth is known, after the one rigid motion that all particles share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from vdamkit.sampling.euler import euler_to_matrix, rotation_angle
from vdamkit.sampling.point_groups import operators, parse_symmetry

CANDIDATES = 150  # particles that may suggest the common rotation
INLIER = 20.0  # degrees; particles nearer than this vote on it


@dataclass(frozen=True)
class PoseErrors:
    """Errors per particle; ``print(errors)`` is meant for people."""

    angles: np.ndarray  # (n,) degrees
    offsets: np.ndarray  # (n,) Å
    vectors: np.ndarray  # (n, 3) Å, found − true centre; tomogram frame if its rotations were given, else subtomogram
    rotation: np.ndarray  # (3, 3): x_found_map = rotation @ x_true_map + shift
    shift: np.ndarray  # (3,) Å

    def __str__(self) -> str:
        inside = float((self.angles < INLIER).mean())
        return (
            f"median error {np.median(self.angles):.1f}° and {np.median(self.offsets):.1f} Å; "
            f"{100 * inside:.0f} % of the particles within {INLIER:g}°"
        )


def pose_errors(
    found_angles: np.ndarray,
    found_offsets: np.ndarray,
    true_angles: np.ndarray,
    true_offsets: np.ndarray,
    subtomogram_rotations: np.ndarray | None = None,
    symmetry: str = "C1",
) -> PoseErrors:
    """Compare poses with the truth, particle by particle.

    Parameters
    ----------
    found_angles, true_angles: `(n, 3)` degrees rot, tilt, psi. found_offsets, true_offsets: `(n, 3)` Å, rlnOrigin.
    subtomogram_rotations: `(n, 3, 3)`, only to give the vectors in the tomogram's frame.
    symmetry: point group of the true particle; its mates count as the same pose.

    Notes
    -----
    A point x of the map lies at ``x_tomo = coordinate − A_sub o + A_sub A x``. If the found map is the true one moved
    by ``y = Q x + d``, the same points are explained by ``A_found Q = A_true S`` (S any operator of the group) and
    ``o_found = o_true + A_found d``. Q is taken from the particle whose suggestion leaves the least median error, then
    averaged over those that agree with it; d is the median over particles of ``A_found^T (o_found − o_true)``.

    Raises
    ------
    ValueError: the arrays differ in length, or are empty.
    """
    if not len(found_angles) == len(found_offsets) == len(true_angles) == len(true_offsets) > 0:
        raise ValueError(
            f"poses must be as many as true poses, got {len(found_angles)} and {len(found_offsets)} "
            f"against {len(true_angles)} and {len(true_offsets)}"
        )
    found, true = euler_to_matrix(found_angles), euler_to_matrix(true_angles)
    group = operators(parse_symmetry(symmetry))
    rotation = _common_rotation(found, true, group)
    offset_change = np.asarray(found_offsets, np.float64) - np.asarray(true_offsets, np.float64)
    shift = np.median(np.einsum("nji,nj->ni", found, offset_change), axis=0)
    vectors = -(offset_change - found @ shift)  # a larger origin is a centre further back
    if subtomogram_rotations is not None:
        vectors = np.einsum("nij,nj->ni", subtomogram_rotations, vectors)
    angles = rotation_angle(found @ rotation, true @ _nearest(found, true, group, rotation))
    return PoseErrors(angles, np.linalg.norm(vectors, axis=1), vectors, rotation, shift)


def _nearest(found: np.ndarray, true: np.ndarray, group: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """The operator `(n, 3, 3)` that brings each true pose nearest to the found one."""
    relative = np.swapaxes(true, 1, 2) @ found @ rotation
    return group[np.einsum("nij,gij->ng", relative, group).argmax(1)]


def _common_rotation(found: np.ndarray, true: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Q of ``A_found Q = A_true S`` for most particles, `(3, 3)`."""
    backwards = np.swapaxes(found, 1, 2)
    some = np.linspace(0, len(found) - 1, min(len(found), CANDIDATES)).astype(int)
    candidates = backwards[some] @ true[some]
    inverse = np.swapaxes(true, 1, 2) @ found

    def median_error(candidate: np.ndarray) -> float:
        traces = np.einsum("nij,gij->ng", inverse @ candidate, group).max(1)
        return float(np.median(-traces))

    best = candidates[int(np.argmin([median_error(c) for c in candidates]))]
    for _ in range(3):
        suggested = backwards @ true @ _nearest(found, true, group, best)
        good = rotation_angle(suggested, best) < INLIER
        if not good.any():
            break
        best = Rotation.from_matrix(suggested[good]).mean().as_matrix()
    return best
