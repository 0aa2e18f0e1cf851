"""The map to reach: the particle with its neighbours, as an average with true poses would show it."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from vdamkit.simulate.scene import Scene

NEIGHBOURHOODS = 12  # particles whose surroundings are averaged


def average_neighbourhood(scene: Scene, density: np.ndarray, *, box: int, fold: int) -> np.ndarray:
    """What an average with true poses shows: the particle with what stands around it.

    Parameters
    ----------
    density: `(n, n, n)` zyx, the single particle at the pixel size of the scene. box: px of the result.
    fold: n of the Cn the result is averaged over.

    Returns
    -------
    `(box, box, box)` float32, zyx.
    """
    spline = ndimage.spline_filter(density, order=3)
    grid = np.indices((box, box, box))[::-1].reshape(3, -1) - box // 2  # xyz
    reach = (box / 2 + density.shape[0] / 2) * np.sqrt(3)
    total = np.zeros(box**3)
    chosen = scene.picked[:: max(1, len(scene.picked) // NEIGHBOURHOODS)][:NEIGHBOURHOODS]
    for index in chosen:
        to_particle = scene.sites.rotations[index].T
        places = (scene.sites.centres - scene.sites.centres[index]) @ to_particle.T / scene.series.pixel_size
        for other in np.flatnonzero(np.linalg.norm(places, axis=1) < reach):
            turn = (to_particle @ scene.sites.rotations[other]).T
            points = turn @ (grid - places[other][:, None]) + density.shape[0] // 2
            total += ndimage.map_coordinates(spline, points[::-1], order=3, prefilter=False)
    average = ndimage.spline_filter(total.reshape(box, box, box), order=3)
    turns = Rotation.from_rotvec([[0, 0, 360 / fold * n] for n in range(fold)], degrees=True).as_matrix()
    points = [(turn @ grid + box // 2)[::-1] for turn in turns]
    symmetric = sum(ndimage.map_coordinates(average, p, order=3, prefilter=False, mode="nearest") for p in points)
    return (symmetric / (fold * len(chosen))).reshape(box, box, box).astype(np.float32)
