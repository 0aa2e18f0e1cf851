"""How well turns about a point fit a map: the functions that the search for symmetry maximises and decides by."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from vdamkit.backend import get_backend
from vdamkit.imaging.fsc import fsc
from vdamkit.imaging.masks import soft_sphere
from vdamkit.symmetry.axes import axes_of

STEP, SWEEPS = 0.1, 2  # of the last refinement: 0.6 degrees and 0.1 px; rounds over all coordinates
JUDGES = 3  # turned copies that decide between candidates


class Likeness:
    """Mean correlation of a map with its turned copies, for a rotation (onto RELION's setting) and a centre (px)."""

    def __init__(self, volume: np.ndarray, mask: np.ndarray, elements: np.ndarray, *, order: int, points: int = 0):
        inside = np.flatnonzero(mask.ravel() > 0.02)
        inside = inside[:: max(1, len(inside) // points) if points else 1]
        self._middle, self._order, self._elements = mask.shape[0] // 2, order, elements
        self._points = np.stack(np.unravel_index(inside, mask.shape))[::-1].astype(np.float64) - self._middle
        weight = mask.ravel()[inside].astype(np.float64) ** 2
        self._weight = weight / weight.sum()
        values = np.asarray(volume, np.float64).ravel()[inside]
        values = values - self._weight @ values
        self._target = values * self._weight / np.sqrt(self._weight @ values**2)
        self._map = spline_filter(np.asarray(volume, np.float64), order=order) if order > 1 else volume

    def __call__(self, rotation: np.ndarray, centre: np.ndarray) -> float:
        turns = rotation.T @ self._elements @ rotation
        places = turns @ (self._points - centre[:, None]) + centre[:, None] + self._middle
        flat = np.moveaxis(places, 0, 1).reshape(3, -1)[::-1]
        values = map_coordinates(self._map, flat, order=self._order, prefilter=False).reshape(len(turns), -1)
        mean = values @ self._weight
        variance = np.maximum(values**2 @ self._weight - mean**2, 1e-30)
        return float(np.mean(values @ self._target / np.sqrt(variance)))

    def _around(self, rotation: np.ndarray, centre: np.ndarray, group: str):
        """Poses near one, as a function of few numbers; for one axis only what matters, its direction and place."""
        per_part = 2 if len(axes_of(group)) == 1 else 3

        def pose(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            turn, move = np.zeros(3), np.zeros(3)
            turn[:per_part], move[:per_part] = 0.1 * x[:per_part], x[per_part:]  # radians, px: one unit of the search each
            return Rotation.from_rotvec(turn).as_matrix() @ rotation, centre + rotation.T @ move

        return pose, 2 * per_part

    def refine(self, rotation: np.ndarray, centre: np.ndarray, group: str) -> tuple[np.ndarray, np.ndarray]:
        """Rotation and centre of greatest likeness near a start."""
        pose, n = self._around(rotation, centre, group)
        options = {"xtol": 2e-2, "ftol": 1e-6, "maxiter": 5}
        return pose(minimize(lambda x: -self(*pose(x)), np.zeros(n), method="Powell", options=options).x)

    def polish(self, rotation: np.ndarray, centre: np.ndarray, group: str) -> tuple[np.ndarray, np.ndarray]:
        """The same very near a start, with few evaluations: parabolas through three values along each coordinate in turn.

        It uses the worker threads, so it must not be called in one.
        """
        pose, n = self._around(rotation, centre, group)
        x = np.zeros(n)
        here = self(*pose(x))
        for _ in range(SWEEPS):
            for i in range(n):
                both = [pose(x + sign * STEP * np.eye(n)[i]) for sign in (-1, 1)]
                low, high = get_backend().map(lambda near: self(*near), both)
                bend = low + high - 2 * here
                move = -np.sign(low - high) if bend >= 0 else np.clip(0.5 * (low - high) / bend, -1, 1)
                new = x + STEP * move * np.eye(n)[i]
                value = self(*pose(new))
                x, here = (new, value) if value > here else (x, here)
        return pose(x)


class Judge:
    """Mean FSC of a map with some of its turned copies: the normalised correlation by shell that decides."""

    def __init__(self, volume: np.ndarray, radius: float, elements: np.ndarray, band: int, *, at_most: int = JUDGES):
        n = volume.shape[0]
        self._volume, self.band = volume, band
        self._spline = spline_filter(volume, order=3)
        self._mask = soft_sphere(n, radius, edge=0.06 * n)
        chosen = np.unique(np.linspace(0, len(elements) - 1, min(at_most, len(elements))).astype(int))
        self._elements = elements[chosen]
        self._inside = np.flatnonzero(self._mask)
        self._points = np.stack(np.unravel_index(self._inside, volume.shape))[::-1].astype(np.float64) - n // 2

    def curves(self, pose: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """FSC with each copy, `(m, N//2 + 1)`."""
        rotation, centre = pose
        curves = []
        for turn in rotation.T @ self._elements @ rotation:
            places = turn @ (self._points - centre[:, None]) + centre[:, None] + self._volume.shape[0] // 2
            copy = np.zeros(self._volume.shape)
            copy.flat[self._inside] = map_coordinates(self._spline, places[::-1], order=3, prefilter=False)
            curves.append(fsc(copy, self._volume, self._mask))
        return np.array(curves)

    def curve(self, pose: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Their mean, `(N//2 + 1,)`."""
        return self.curves(pose).mean(0)

    def __call__(self, pose: tuple[np.ndarray, np.ndarray]) -> float:
        return float(self.curve(pose)[1 : self.band + 1].mean())

    def weights(self, pose: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Weight of each shell in the last refinement, `(N//2 + 1,)`: that FSC, up to where it falls below 0.3.

        With the power made even, a voxel's say is then about its signal's share in it.
        """
        curve = self.curve(pose)
        last = max(np.flatnonzero(np.append(curve[1:], -1) < 0.3)[0] + 1, min(self.band, len(curve) - 2))
        shells = np.arange(len(curve))
        return np.where((shells >= 1) & (shells <= last), np.clip(curve, 0, 1), 0)
