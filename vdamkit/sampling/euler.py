"""RELION's Euler angles (rot, tilt, psi) and rotation matrices. Degrees everywhere."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation


def euler_to_matrix(angles: np.ndarray) -> np.ndarray:
    """Rotation matrices of RELION Euler angles.

    Parameters
    ----------
    angles: `(..., 3)` float
        rot, tilt, psi in degrees (ZYZ).

    Returns
    -------
    `(..., 3, 3)` float64, matrices that left-multiply column vectors in xyz order:
    ``x_view = A @ x_reference``; row 2 of A is the viewing direction in the reference frame.
    For tomography ``x_tomogram = A_subtomogram @ A @ x_reference``.

    Source: RELION euler.cpp:Euler_angles2matrix (A = Rz'(psi) Ry'(tilt) Rz'(rot), passive matrices).
    """
    angles = np.asarray(angles, np.float64)
    flat = Rotation.from_euler("ZYZ", angles.reshape(-1, 3), degrees=True).as_matrix()
    return np.swapaxes(flat, -1, -2).reshape(*angles.shape[:-1], 3, 3)


def matrix_to_euler(matrices: np.ndarray) -> np.ndarray:
    """RELION Euler angles of rotation matrices, the inverse of :func:`euler_to_matrix`.

    Parameters
    ----------
    matrices: `(..., 3, 3)` float, as returned by :func:`euler_to_matrix`.

    Returns
    -------
    `(..., 3)` float64 rot, tilt, psi in degrees; rot and psi in (-180, 180], tilt in [0, 180].
    Where tilt is 0 or 180 the split between rot and psi is free: rot is set to 0.

    Source: RELION euler.cpp:Euler_matrix2angles.
    """
    m = np.asarray(matrices, np.float64)
    sin_tilt = np.hypot(m[..., 0, 2], m[..., 1, 2])
    tilt = np.arctan2(sin_tilt, m[..., 2, 2])
    flat = sin_tilt < 1e-9
    rot = np.where(flat, 0.0, np.arctan2(m[..., 2, 1], m[..., 2, 0]))
    psi = np.where(flat, np.arctan2(m[..., 0, 1], m[..., 1, 1]), np.arctan2(m[..., 1, 2], -m[..., 0, 2]))
    return np.degrees(np.stack([rot, tilt, psi], -1))


def upright(angles: np.ndarray) -> np.ndarray:
    """The same rotations with 0 <= tilt <= 180: `(..., 3)` degrees; what is nan stays so.

    Other programs write tilt angles of ±180, and a prior compares them as they stand.
    """
    rot, tilt, psi = np.moveaxis(np.asarray(angles, np.float64), -1, 0)
    tilt = np.mod(tilt, 360)
    over = tilt > 180
    return np.stack([np.where(over, rot + 180, rot), np.where(over, 360 - tilt, tilt), np.where(over, psi + 180, psi)], -1)


def rotation_angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angle in degrees between rotations `a` and `b`, both `(..., 3, 3)` (broadcast)."""
    cosine = (np.einsum("...ij,...ij->...", a, b) - 1) / 2
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))
