"""Translation grids."""

from __future__ import annotations

import numpy as np


def shift_grid(search_range: float, step: float) -> np.ndarray:
    """Points of a cubic grid within a sphere, `(n, 3)` float64 xyz, in the unit of the arguments; the origin is one.

    6 and 2 px give 123 points. Source: RELION healpix_sampling.cpp:setTranslations.
    """
    n = int(np.floor(search_range / step + 1e-6))
    line = np.arange(-n, n + 1) * step
    z, y, x = np.meshgrid(line, line, line, indexing="ij")
    points = np.stack([x, y, z], -1).reshape(-1, 3)
    return points[(points**2).sum(1) <= search_range**2 * (1 + 1e-9)]


def child_offsets(step: float) -> np.ndarray:
    """The 8 oversampled children of a translation: ± step/4 along each axis, `(8, 3)`."""
    corners = np.array([[x, y, z] for z in (-1, 1) for y in (-1, 1) for x in (-1, 1)], np.float64)
    return corners * (step / 4)
