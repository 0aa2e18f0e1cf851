"""From places where the axes may lie to where they do lie: refinement, and the choice among what is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from vdamkit.backend import get_backend
from vdamkit.compare import moved
from vdamkit.imaging.fsc import fsc, resolution_at
from vdamkit.imaging.masks import soft_sphere
from vdamkit.sampling.point_groups import operators, parse_symmetry
from vdamkit.symmetry.axes import (
    BAND,
    TurnedCopies,
    arrangements,
    axes_of,
    axis_scores,
    elements_for,
    shrunk,
    weighted_shells,
)

POINTS = (2_500, 4_000, 12_000)  # voxels, about, at which maps are compared in the three refinements
FINE_BOX = 2.5  # px of the last refinement's box per shell
STEP, SWEEPS = 0.1, 2  # of the last refinement: 0.6 degrees and 0.1 px; rounds over all coordinates
JUDGES = 3  # turned copies that decide between candidates
MORE = 14  # turns at most in the very last refinement
FINAL = 2  # candidates that are refined at full resolution


@dataclass(frozen=True)
class SymmetryMatch:
    """How a map has to be moved so that a point group's axes lie as RELION sets them: ``x_new = rotation @ x + shift``."""

    group: str
    rotation: np.ndarray  # (3, 3), acts on xyz columns
    shift: np.ndarray  # (3,) xyz, Å, from box centre to box centre
    fsc: np.ndarray  # (N//2 + 1,) between the map and its copies turned by the group, mean over some of them
    correlation: float  # mean of that over the shells looked at
    resolution: float  # Å, where it falls below 0.5

    def __str__(self) -> str:
        angle = np.degrees(np.linalg.norm(Rotation.from_matrix(self.rotation).as_rotvec()))
        return (
            f"{self.group}: the map agrees with its turned copies (FSC 0.5) to {self.resolution:.1f} Å, mean FSC "
            f"{self.correlation:.2f}, after a turn of {angle:.1f}° and a shift of {np.linalg.norm(self.shift):.1f} Å"
        )


def find_symmetry(
    volume: np.ndarray, pixel_size: float, group: str, *, radius: float | None = None, resolution: float | None = None
) -> SymmetryMatch:
    """Find a point group's axes and centre in a map that was made without it.

    Parameters
    ----------
    volume: `(N, N, N)` zyx. pixel_size: Å. group: e.g. "C6".
    radius: Å, of the sphere that is looked at; default 0.4 of the box.
    resolution: Å, finest detail to look at in the search; by default two thirds of Nyquist, and at most 13 shells.

    Returns
    -------
    :class:`SymmetryMatch`; deterministic. All axes and centres are searched (:mod:`vdamkit.symmetry.axes`), the best
    arrangements refined. A Cn map's place along its axis, which symmetry leaves open, is set by its centre of mass; of the
    positions that fit equally well, the one with the smallest turn is taken.

    Raises
    ------
    SettingsError: no such group. ValueError: not a cube, or a map that holds nothing.

    RELION's counterpart: apps/align_symmetry.cpp (400 random orientations, then a local grid).
    """
    group = parse_symmetry(group)
    volume = np.asarray(volume, np.float64)
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise ValueError(f"a map must be a cube, got {volume.shape}")
    if not np.isfinite(volume).all() or np.ptp(volume) == 0:
        raise ValueError("the map holds nothing (constant, or not finite)")
    n = volume.shape[0]
    radius_px = min(0.4 * n if radius is None else radius / pixel_size, n / 2 - 2)
    band = max(4, min(BAND, n // 3 if resolution is None else int(n * pixel_size / resolution)))
    if group == "C1":
        return SymmetryMatch(group, np.eye(3), np.zeros(3), np.ones(n // 2 + 1), 1.0, 2 * pixel_size)
    copies = TurnedCopies(volume, radius_px, band)
    scores = axis_scores(copies, {axis.fold for axis in axes_of(group)})
    elements = elements_for(group)
    judge = _Judge(volume, radius_px, elements, band)

    coarse = _Likeness(copies.map, copies.mask, elements, order=1, points=POINTS[0])

    def first(turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centre = _centre(copies, turn, elements)
        rotation, centre = coarse.refine(turn.T, centre / copies.px, group)
        return rotation, centre * copies.px

    poses = get_backend().map(first, arrangements(group, scores))
    fits = get_backend().map(judge, poses)
    leading = [poses[i] for i in np.argsort(-np.array(fits), kind="stable")[:FINAL]]
    rotation, centre = _last_refinement(volume, radius_px, group, leading, judge)
    return _result(volume, pixel_size, group, rotation, centre, radius_px, judge)


def _last_refinement(
    volume: np.ndarray, radius: float, group: str, leading: list, judge: _Judge
) -> tuple[np.ndarray, np.ndarray]:
    """Refine some candidates with all that the map knows, and once more the best with more of the group's turns."""
    weights, n = judge.weights(leading[0]), volume.shape[0]
    box = min(n, 2 * int(np.ceil(FINE_BOX * np.flatnonzero(weights).max() / 2)) + n % 2)
    px = n / box  # no detail is lost: the grid is finer than the last shell needs
    fine, mask = shrunk(weighted_shells(volume, weights), box), soft_sphere(box, radius / px, edge=0.06 * box)

    def likeness(elements: np.ndarray, points: int) -> _Likeness:
        return _Likeness(fine, mask, elements, order=3, points=points)

    def at_scale(pose: tuple, act) -> tuple[np.ndarray, np.ndarray]:
        rotation, centre = act(pose[0], pose[1] / px, group)
        return rotation, centre * px

    some = likeness(elements_for(group), POINTS[1])
    best = max([*leading, *get_backend().map(lambda pose: at_scale(pose, some.refine), leading)], key=judge)
    return at_scale(best, likeness(elements_for(group, MORE), POINTS[2]).polish)


def _centre(copies: TurnedCopies, turn: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """The point (px from the box centre) about which an arrangement's turns fit best: (1 - h) c = shift, least squares."""
    turns = turn @ elements @ turn.T
    shifts = np.concatenate([copies.best(h)[1] for h in turns])
    return np.linalg.lstsq(np.concatenate(np.eye(3) - turns), shifts, rcond=1e-6)[0]


class _Likeness:
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
        """The same very near a start, with few evaluations: parabolas through three values along each coordinate in turn."""
        pose, n = self._around(rotation, centre, group)
        x = np.zeros(n)
        here = self(*pose(x))
        for _ in range(SWEEPS):
            for i in range(n):
                low, high = (self(*pose(x + sign * STEP * np.eye(n)[i])) for sign in (-1, 1))
                bend = low + high - 2 * here
                move = -np.sign(low - high) if bend >= 0 else np.clip(0.5 * (low - high) / bend, -1, 1)
                new = x + STEP * move * np.eye(n)[i]
                value = self(*pose(new))
                x, here = (new, value) if value > here else (x, here)
        return pose(x)


class _Judge:
    """Mean FSC of a map with some of its turned copies: the normalised correlation by shell that decides."""

    def __init__(self, volume: np.ndarray, radius: float, elements: np.ndarray, band: int):
        n = volume.shape[0]
        self._volume, self._band = volume, band
        self._spline = spline_filter(volume, order=3)
        self._mask = soft_sphere(n, radius, edge=0.06 * n)
        chosen = np.unique(np.linspace(0, len(elements) - 1, JUDGES).astype(int))
        self._elements = elements[chosen]
        self._grid = (np.indices(volume.shape)[::-1].reshape(3, -1) - n // 2).astype(np.float64)

    def curve(self, pose: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        rotation, centre = pose
        curves = []
        for turn in rotation.T @ self._elements @ rotation:
            places = turn @ (self._grid - centre[:, None]) + centre[:, None] + self._volume.shape[0] // 2
            copy = map_coordinates(self._spline, places[::-1], order=3, prefilter=False).reshape(self._volume.shape)
            curves.append(fsc(copy, self._volume, self._mask))
        return np.mean(curves, axis=0)

    def __call__(self, pose: tuple[np.ndarray, np.ndarray]) -> float:
        return float(self.curve(pose)[1 : self._band + 1].mean())

    def weights(self, pose: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Weight of each shell in the last refinement, `(N//2 + 1,)`: that FSC, up to where it falls below 0.3.

        With the power made even, a voxel's say is then about its signal's share in it.
        """
        curve = self.curve(pose)
        last = max(np.flatnonzero(np.append(curve[1:], -1) < 0.3)[0] + 1, min(self._band, len(curve) - 2))
        shells = np.arange(len(curve))
        return np.where((shells >= 1) & (shells <= last), np.clip(curve, 0, 1), 0)


def _result(
    volume: np.ndarray, pixel_size: float, group: str, rotation: np.ndarray, centre: np.ndarray, radius: float, judge: _Judge
) -> SymmetryMatch:
    curve = judge.curve((rotation, centre))
    mates = operators(group) @ rotation
    rotation = mates[int(np.argmax(np.trace(mates, axis1=1, axis2=2)))]
    shift = -rotation @ centre
    if len(axes_of(group)) == 1:
        shift[2] -= _height(moved(volume, rotation, shift), radius)
    n = volume.shape[0]
    last = max(2, int(np.flatnonzero(np.append(curve[1:], -1) < 0.3)[0]))
    return SymmetryMatch(
        group, rotation, shift * pixel_size, curve, float(curve[1 : last + 1].mean()), resolution_at(curve, 0.5, n, pixel_size)
    )


def _height(volume: np.ndarray, radius: float) -> float:
    """Centre of mass along z (px) of what stands out of the map's noise, inside a sphere."""
    n = volume.shape[0]
    mask = soft_sphere(n, radius, edge=0.06 * n)
    density = np.maximum(volume - volume.mean() - volume.std(), 0) * mask
    return float((density.sum((1, 2)) * (np.arange(n) - n // 2)).sum() / density.sum())
