"""White noise in tilt images, as strong as a ratio of variances near the particles asks for."""

from __future__ import annotations

import numpy as np


def white_noise(seed: np.random.SeedSequence, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of that shape, with variance 1."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def near_any(points: np.ndarray, radius: float, shape: tuple[int, int]) -> np.ndarray:
    """Pixels that are less than `radius` px from any of the points.

    Parameters
    ----------
    points: `(n, 2)` px, x and y as indices into the image; they may lie outside. shape: of the image, (y, x).

    Returns
    -------
    bool, of that shape.
    """
    near, size = np.zeros(shape, bool), np.array(shape[::-1])
    for point in points:
        first = np.maximum(np.ceil(point - radius), 0).astype(int)
        end = np.maximum(np.minimum(np.floor(point + radius) + 1, size), first).astype(int)
        dx, dy = (np.arange(a, b) - p for a, b, p in zip(first, end, point, strict=True))
        near[first[1] : end[1], first[0] : end[0]] |= np.sqrt(dx**2 + dy[:, None] ** 2) < radius
    return near
