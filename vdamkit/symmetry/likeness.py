"""How well turns about a point fit a map: the functions that the search for symmetry maximises and decides by."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter
from scipy.spatial.transform import Rotation

from vdamkit.climb import climb, correlation_model, normalised, slopes
from vdamkit.imaging.fsc import fsc
from vdamkit.imaging.masks import soft_sphere
from vdamkit.symmetry.axes import axes_of

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
        self._volume = np.asarray(volume, np.float64)
        self._target = normalised(self._volume.ravel()[inside], self._weight)[0]
        self._map = spline_filter(self._volume, order=order) if order > 1 else self._volume

    @cached_property
    def _slopes(self) -> list[np.ndarray]:
        """Of the map; only a refinement wants them."""
        return slopes(self._volume)

    def _places(self, rotation: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Where the turned copies show the map, `(3, turns × points)` zyx."""
        turns = rotation.T @ self._elements @ rotation
        places = turns @ (self._points - centre[:, None]) + centre[:, None] + self._middle
        return np.moveaxis(places, 0, 1).reshape(3, -1)[::-1]

    def __call__(self, pose: tuple[np.ndarray, np.ndarray]) -> float:
        return self._look(pose)[0]

    def _look(self, pose: tuple[np.ndarray, np.ndarray]) -> tuple[float, tuple]:
        places = self._places(*pose)
        values = map_coordinates(self._map, places, order=self._order, prefilter=False)
        copies, deviations = normalised(values.reshape(len(self._elements), -1), self._weight)
        return float(np.mean(copies @ (self._weight * self._target))), (places, copies, deviations)

    def _model(self, pose: tuple[np.ndarray, np.ndarray], seen: tuple) -> tuple[np.ndarray, np.ndarray]:
        """Curvature and slope for small turns and moves in RELION's setting; see :func:`vdamkit.climb.climb`."""
        (rotation, centre), (places, copies, deviations) = pose, seen
        slope = np.stack([map_coordinates(part, places, order=1) for part in self._slopes]).reshape(3, *copies.shape)
        arm = rotation @ (self._points - centre[:, None])
        curvature, total = 0, 0
        for number, turn in enumerate(self._elements):
            here = rotation @ slope[:, number]
            there = turn.T @ here
            change = np.concatenate([np.cross(arm, there, axis=0) - np.cross(turn @ arm, here, axis=0), here - there])
            parts = correlation_model(change / deviations[number], copies[number], self._target, self._weight)
            curvature, total = curvature + parts[0], total + parts[1]
        return curvature, total

    def refine(
        self, pose: tuple[np.ndarray, np.ndarray], group: str, *, tolerance: float = 2e-2
    ) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
        """Greatest likeness near a start, and its rotation and centre; of a single axis only direction and place matter."""
        free = np.array([0, 1, 3, 4] if len(axes_of(group)) == 1 else range(6))

        def model(near: tuple[np.ndarray, np.ndarray], seen: tuple) -> tuple[np.ndarray, np.ndarray]:
            curvature, slope = self._model(near, seen)
            return curvature[np.ix_(free, free)], slope[free]

        def step(near: tuple[np.ndarray, np.ndarray], by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            full = np.zeros(6)
            full[free] = by
            return Rotation.from_rotvec(full[:3]).as_matrix() @ near[0], near[1] + near[0].T @ full[3:]

        return climb(pose, self._look, model, step, tolerance=tolerance)


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
