"""Maps with symmetry axes where we know them."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vdamkit.imaging.halfball import fourier_grid, map_to_fourier
from vdamkit.sampling.point_groups import operators
from vdamkit.symmetry.axes import axes_of


def planted(group: str, seed: int, *, box: int = 64, blobs: int = 90, noise: float = 1.0, reach: float = 0.3):
    """A map of Gaussian blobs with a point group, turned and shifted at random, in noise.

    The noise is white with the signal's power at a third of Nyquist (times `noise`²): there the FSC of two such maps is 0.5.

    Returns
    -------
    map `(box,) * 3`, rotation `(3, 3)` and shift `(3,)` px that lay it onto RELION's setting.
    """
    rng = np.random.default_rng(seed)
    group_turns = operators(group)
    rotation = Rotation.random(random_state=rng.integers(2**31)).as_matrix()
    shift = rng.normal(size=3)
    shift *= rng.uniform(0, 4) / np.linalg.norm(shift)
    number = max(3, blobs // len(group_turns))
    places = rng.normal(size=(number, 3))
    places *= (reach * box * rng.uniform(0.1, 1, number) ** (1 / 2) / np.linalg.norm(places, axis=1))[:, None]
    weights = rng.uniform(0.5, 1.5, number)
    everywhere = np.einsum("gij,nj->gni", group_turns, places).reshape(-1, 3)
    volume = _gaussians((everywhere - shift) @ rotation, np.tile(weights, len(group_turns)), box, width=1.6)
    grid = fourier_grid(box)
    power = grid.shell_means(np.abs(map_to_fourier(volume)) ** 2, box)[box // 6]
    white = rng.normal(size=volume.shape)
    scale = np.sqrt(power / grid.shell_means(np.abs(map_to_fourier(white)) ** 2, box)[box // 6])
    return volume + noise * scale * white, rotation, shift


def _gaussians(places: np.ndarray, weights: np.ndarray, box: int, width: float) -> np.ndarray:
    line = np.arange(box) - box // 2
    x, y, z = (np.exp(-0.5 * ((line - places[:, [i]]) / width) ** 2) for i in range(3))
    return ((z * weights[:, None]).T @ (y[:, :, None] * x[:, None, :]).reshape(len(places), -1)).reshape((box,) * 3)


def errors(group: str, found: tuple, true: tuple) -> tuple[float, float]:
    """Largest angle (degrees) between an axis found and the nearest true one of that fold, and the centres' distance (px).

    `found` and `true`: rotation and shift (px). Along the axis of a Cn map there is no centre.
    """
    axes = axes_of(group)
    places = [(np.array([r.T @ np.array(a.direction) for a in axes]), -r.T @ s) for r, s in (found, true)]
    folds = np.array([axis.fold for axis in axes])
    cosine = np.abs(places[0][0] @ places[1][0].T) * (folds[:, None] == folds)
    angle = np.degrees(np.arccos(np.clip(cosine.max(1).min(), -1, 1)))
    away = places[0][1] - places[1][1]
    if len(axes) == 1:
        away = away - (away @ places[1][0][0]) * places[1][0][0]
    return float(angle), float(np.linalg.norm(away))
