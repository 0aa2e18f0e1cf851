"""The map to reach: the particle with its neighbours, as an average with true poses would show it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from vdamkit.simulate.scene import Scene

NEIGHBOURHOODS = 12  # particles whose surroundings are averaged
NOTHING = 1e-6  # of the greatest density: what is less does not count


def average_neighbourhood(scene: Scene, densities: Sequence[np.ndarray], *, box: int, fold: int) -> np.ndarray:
    """What an average of the particles of the first kind with true poses shows: the particle with what stands around it.

    Parameters
    ----------
    densities: `(n, n, n)` zyx each, the single particle of every kind at the pixel size of the scene. box: px of the result.
    fold: n of the Cn the result is averaged over.

    Returns
    -------
    `(box, box, box)` float32, zyx.
    """
    splines = [(ndimage.spline_filter(density, order=3), _reach(density)) for density in densities]
    grid = np.indices((box, box, box))[::-1].reshape(3, -1) - box // 2  # xyz
    tree, total = cKDTree(grid.T), np.zeros(box**3)
    first = scene.picked[scene.kinds == 1]
    chosen = first[:: max(1, len(first) // NEIGHBOURHOODS)][:NEIGHBOURHOODS]
    for index in chosen:
        to_particle = scene.sites.rotations[index].T
        places = (scene.sites.centres - scene.sites.centres[index]) @ to_particle.T / scene.series.pixel_size
        for kind, (spline, reach) in enumerate(splines, start=1):
            there = scene.sites.of_kind(kind)
            for other, near in zip(there, tree.query_ball_point(places[there], reach), strict=True):
                turn = (to_particle @ scene.sites.rotations[other]).T
                points = turn @ (grid[:, near] - places[other][:, None]) + len(spline) // 2
                total[near] += ndimage.map_coordinates(spline, points[::-1], order=3, prefilter=False)
    average = ndimage.spline_filter(total.reshape(box, box, box), order=3)
    turns = Rotation.from_rotvec([[0, 0, 360 / fold * n] for n in range(fold)], degrees=True).as_matrix()
    points = [(turn @ grid + box // 2)[::-1] for turn in turns]
    symmetric = sum(ndimage.map_coordinates(average, p, order=3, prefilter=False, mode="nearest") for p in points)
    return (symmetric / (fold * len(chosen))).reshape(box, box, box).astype(np.float32)


def _reach(density: np.ndarray) -> float:
    """Distance (px) from its centre to which a density reaches, and two pixels for the interpolation."""
    far = np.argwhere(np.abs(density) > NOTHING * np.abs(density).max()) - density.shape[0] // 2
    return float(np.linalg.norm(far, axis=1).max()) + 2
