"""What was found is applied: maps, moments and poses move together, so that they go on fitting each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.ndimage import map_coordinates

from vdamkit.compare import moved
from vdamkit.imaging.group_mean import group_mean
from vdamkit.imaging.halfball import fourier_to_map, map_to_fourier
from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler
from vdamkit.sampling.point_groups import operators
from vdamkit.state import Poses, State
from vdamkit.symmetry.fit import SymmetryMatch


def symmetrised(volume: np.ndarray, group: str) -> np.ndarray:
    """The mean of a map over a point group about the box centre, `(N, N, N)` float64 zyx; see :func:`group_mean`.

    What lies outside the inscribed sphere, where copies leave the box, becomes 0; in C1 nothing changes.
    """
    if len(operators(group)) == 1:
        return np.asarray(volume, np.float64)
    n = volume.shape[0]
    squares = (np.arange(n) - n // 2) ** 2
    inside = squares[:, None, None] + squares[:, None] + squares <= (n // 2 - 1) ** 2
    return group_mean(volume, group) * inside


def moved_angles_and_offsets(angles: np.ndarray, offsets: np.ndarray, match: SymmetryMatch) -> tuple[np.ndarray, np.ndarray]:
    """Poses that refer to the moved map as the given ones refer to the old map.

    A point x of the old map lies at ``A x - o`` from the particle's coordinate (A the rotation, o rlnOrigin). With
    ``x_new = R x + s`` that is ``A Rᵀ x_new - (o + A Rᵀ s)``.

    Parameters
    ----------
    angles: `(n, 3)` degrees rot, tilt, psi. offsets: `(n, 3)` Å, rlnOriginX/Y/ZAngst.

    Returns
    -------
    Angles and offsets of the same shapes and units.
    """
    turned = euler_to_matrix(angles) @ match.rotation.T
    return matrix_to_euler(turned), offsets + turned @ match.shift


def moved_poses(poses: Poses, match: SymmetryMatch, which: np.ndarray) -> Poses:
    """:func:`moved_angles_and_offsets` of some particles; `which` bool `(n,)`."""
    index = np.flatnonzero(which)
    angles, offsets = moved_angles_and_offsets(poses.angles[index], poses.offsets[index], match)
    return poses.updated(index, angles=angles, offsets=offsets)


def moved_state(state: State, matches: Sequence[SymmetryMatch], pixel_size: float) -> State:
    """A state whose maps, moments and poses are moved, class by class, onto a point group's axes and symmetrised.

    matches: one per class. Particles never visited move with the fullest class.
    """

    def onto(volume: np.ndarray, match: SymmetryMatch) -> np.ndarray:
        shift = match.shift / pixel_size
        still = np.array_equal(match.rotation, np.eye(3)) and not shift.any()  # then nothing has to be interpolated
        return symmetrised(volume if still else moved(volume, match.rotation, shift), match.group)

    maps, moment1, moment2 = (np.empty_like(a) for a in (state.maps, state.moment1, state.moment2))
    for k, match in enumerate(matches):
        maps[k] = onto(state.maps[k], match)
        for half in range(2):
            moment1[k, half] = map_to_fourier(onto(fourier_to_map(state.moment1[k, half]), match))
        moment2[k] = _turned_weights(state.moment2[k], operators(match.group) @ match.rotation)
    poses, main = state.poses, int(np.argmax(state.class_probability))
    for k, match in enumerate(matches):
        mine = (state.poses.class_number == k + 1) | ((state.poses.class_number == 0) & (k == main))
        poses = moved_poses(poses, match, mine)
    return replace(state, maps=maps, moment1=moment1, moment2=moment2, poses=poses)


def _turned_weights(values: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The mean over some turns of a real function of frequency, `(N, N, N//2 + 1)` in rfft layout; linear interpolation."""
    n = values.shape[0]
    half = np.fft.fftshift(values, axes=(0, 1))  # k = 0 at n//2
    full = np.zeros((n,) * 3)
    full[:, :, n // 2 :] = half[:, :, : n - n // 2]
    mirrored = np.roll(full[::-1, ::-1, ::-1], 1 if n % 2 == 0 else 0, axis=(0, 1, 2))
    full[:, :, : n // 2] = mirrored[:, :, : n // 2]
    line = np.fft.fftfreq(n) * n
    kz, ky, kx = np.meshgrid(line, line, np.arange(n // 2 + 1), indexing="ij")
    k = np.stack([kx, ky, kz]).reshape(3, -1)
    total = sum(map_coordinates(full, (turn.T @ k + n // 2)[::-1], order=1, mode="nearest") for turn in turns)
    return (total / len(turns)).reshape(values.shape).astype(values.dtype)
