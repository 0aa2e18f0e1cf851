"""Refinement of a pose by damped Gauss-Newton steps: few evaluations, and no direction is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

Pose, Seen = TypeVar("Pose"), TypeVar("Seen")

STEPS = 30  # at most
ARM = 10.0  # px from the centre, where a turn counts as a move
FLAT = 1e-9  # of the trace: the least curvature along a coordinate that does not matter, such as a round map's turns
DAMPED = (1e-2, 1e4)  # how much of the curvature's diagonal is added at first, and from where on nothing more is tried


def climb(
    pose: Pose, look: Callable[[Pose], tuple[float, Seen]], model: Callable[[Pose, Seen], tuple[np.ndarray, np.ndarray]],
    moved: Callable[[Pose, np.ndarray], Pose], *, tolerance: float,
) -> tuple[float, Pose]:  # fmt: skip
    """The greatest score near a pose, and where.

    Parameters
    ----------
    look: what is to be greatest, at a pose; and whatever `model` need not find again there.
    model: from a pose and that, ``curvature, slope``: positive `(m, m)` and `(m,)`. The first half of the m coordinates are
        turns (radians), the others moves (px).
    moved: the pose after a step `(m,)` from another. tolerance: px; the last step moves a point ARM px from the centre less.
    """
    (best, seen), (damping, enough) = look(pose), DAMPED
    for _ in range(STEPS):
        curvature, slope = model(pose, seen)
        diagonal = np.diag(np.diag(curvature) + FLAT * max(np.trace(curvature), 1e-30))
        while damping < enough:
            step = np.linalg.solve(curvature + damping * diagonal, slope)
            there = moved(pose, step)
            value, seen_there = look(there)
            if value > best:
                break
            damping *= 8
        else:
            break
        pose, seen, best, damping = there, seen_there, value, damping / 4
        turn, move = np.split(step, 2)
        if max(ARM * np.linalg.norm(turn), np.linalg.norm(move)) < tolerance:
            break
    return best, pose


def slopes(volume: np.ndarray) -> list[np.ndarray]:
    """Derivatives of a periodic map `(N, N, N)` zyx along x, y and z, per px."""
    n = len(volume)
    frequency, spectrum = 2j * np.pi * np.fft.fftfreq(n), np.fft.fftn(volume)
    return [np.fft.ifftn(spectrum * frequency.reshape(axes)).real for axes in ((1, 1, n), (1, n, 1), (n, 1, 1))]


def normalised(values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values `(..., n)` of zero mean and unit variance under weights `(n,)` that sum to 1, and their deviation `(..., 1)`."""
    values = values - (values @ weight)[..., None]
    deviation = np.sqrt(np.maximum(values**2 @ weight, 1e-30))[..., None]
    return values / deviation, deviation


def correlation_model(
    change: np.ndarray, now: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Curvature `(m, m)` and slope `(m,)` of the correlation of values with a target, brightness and contrast being free.

    change: `(m, n)`, of the values with each coordinate, over their deviation. now, target: `(n,)`, normalised. weight: `(n,)`.
    """
    change = change - (change @ weight)[:, None]
    change = change - (change @ (weight * now))[:, None] * now
    return (change * weight) @ change.T, change @ (weight * (target - now))
