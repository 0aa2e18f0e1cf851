"""From places where the axes may lie to where they do lie: refinement, and the choice among what is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from vdamkit.backend import Backend, get_backend
from vdamkit.compare import moved
from vdamkit.imaging.fsc import resolution_at
from vdamkit.imaging.masks import soft_sphere
from vdamkit.sampling.point_groups import operators, parse_symmetry
from vdamkit.symmetry.axes import (
    BAND,
    SMALL_BOX,
    TurnedCopies,
    arrangements,
    axes_of,
    axis_scores,
    checked_map,
    elements_for,
    shrunk,
    telling_turns,
    weighted_shells,
)
from vdamkit.symmetry.likeness import Judge, Likeness

POINTS = (2_500, 4_000, 12_000)  # voxels, about, at which maps are compared in the three refinements
FINE_BOX = 2.5  # px of the last refinement's box per shell
MORE = 14  # turns at most in the very last refinement
POOR = 0.4  # mean FSC below which no turn of a group fits well
ROUND = 0.95  # mean FSC of turns by any angle from which the map is round about an axis
APART_FROM_CHANCE = 0.5  # of the way from chance to the best turn about an axis that a group's own turns must go
FINAL = 2  # candidates that are refined at full resolution


@dataclass(frozen=True)
class SymmetryMatch:
    """How a map has to be moved so that a point group's axes lie as RELION sets them: ``x_new = rotation @ x + shift``."""

    group: str
    rotation: np.ndarray  # (3, 3), acts on xyz columns
    shift: np.ndarray  # (3,) xyz, Å, from box centre to box centre
    fsc: np.ndarray  # (N//2 + 1,) between the map and its copies turned by the group, mean over some of them
    correlation: float  # mean of that over the shells before it falls below 0.3
    resolution: float  # Å, where it falls below 0.5
    warning: str = ""  # what speaks against the group, in a sentence

    def __str__(self) -> str:
        angle = np.degrees(np.linalg.norm(Rotation.from_matrix(self.rotation).as_rotvec()))
        return (
            f"{self.group}: the map agrees with its turned copies (FSC 0.5) to {self.resolution:.1f} Å, mean FSC of the shells "
            f"that agree {self.correlation:.2f}, after a turn of {angle:.1f}° and a shift of {np.linalg.norm(self.shift):.1f} Å"
            f"{f'. Beware: {self.warning}' if self.warning else ''}"
        )


def find_symmetry(
    volume: np.ndarray, pixel_size: float, group: str, *, radius: float | None = None, resolution: float | None = None,
    threads: int | None = None,
) -> SymmetryMatch:  # fmt: skip
    """Find a point group's axes and centre in a map that was made without it.

    Parameters
    ----------
    volume: `(N, N, N)` zyx. pixel_size: Å. group: e.g. "C6".
    radius: Å, of the sphere that is looked at; default 0.4 of the box.
    resolution: Å, finest detail to look at in the search; by default two thirds of Nyquist, and at most 13 shells.
    threads: worker threads (RELION --j); default every core.

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
    volume = checked_map(volume)
    n = volume.shape[0]
    radius_px = min(0.4 * n if radius is None else radius / pixel_size, n / 2 - 2)
    band = max(4, min(BAND, n // 3 if resolution is None else min(n // 2 - 1, int(n * pixel_size / resolution))))
    if group == "C1":
        return SymmetryMatch(group, np.eye(3), np.zeros(3), np.ones(n // 2 + 1), 1.0, 2 * pixel_size)
    backend = get_backend(threads=threads)
    with backend.limits():
        return _search(volume, pixel_size, group, radius_px, band, backend)


def _search(volume: np.ndarray, pixel_size: float, group: str, radius_px: float, band: int, backend: Backend) -> SymmetryMatch:
    """The best of all arrangements of the group's axes, refined."""
    copies = TurnedCopies(volume, radius_px, band)
    scores = axis_scores(copies, {axis.fold for axis in axes_of(group)}, backend)
    elements = elements_for(group)
    judge = Judge(volume, radius_px, elements, band)
    coarse = Likeness(copies.map, copies.mask, elements, order=1, points=POINTS[0])

    def first(turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centre = copies.centre(turn, elements)
        _, (rotation, centre) = coarse.refine((turn.T, centre / copies.px), group)
        return rotation, centre * copies.px

    poses = backend.map(first, arrangements(group, scores))
    fits = backend.map(judge, poses)
    leading = [poses[i] for i in np.argsort(-np.array(fits), kind="stable")[:FINAL]]
    rotation, centre = _last_refinement(volume, radius_px, group, leading, judge, backend)
    return _result(volume, pixel_size, group, rotation, centre, radius_px, judge)


def _last_refinement(
    volume: np.ndarray, radius: float, group: str, leading: list, judge: Judge, backend: Backend
) -> tuple[np.ndarray, np.ndarray]:
    """Refine some candidates with all that the map knows, and once more the best with more of the group's turns."""
    weights, n = judge.weights(leading[0]), volume.shape[0]
    box = min(n, 2 * int(np.ceil(FINE_BOX * np.flatnonzero(weights).max() / 2)) + n % 2)
    px = n / box  # no detail is lost: the grid is finer than the last shell needs
    fine, mask = shrunk(weighted_shells(volume, weights), box), soft_sphere(box, radius / px, edge=0.06 * box)

    def refined(likeness: Likeness, pose: tuple, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        _, (rotation, centre) = likeness.refine((pose[0], pose[1] / px), group, tolerance=tolerance)
        return rotation, centre * px

    some, many = (
        Likeness(fine, mask, elements, order=3, points=points)
        for elements, points in ((elements_for(group), POINTS[1]), (elements_for(group, MORE), POINTS[2]))
    )
    poses = [*leading, *backend.map(lambda pose: refined(some, pose, 2e-2), leading)]
    best = poses[int(np.argmax(backend.map(judge, poses)))]
    return refined(many, best, 5e-3)


def _result(
    volume: np.ndarray, pixel_size: float, group: str, rotation: np.ndarray, centre: np.ndarray, radius: float, judge: Judge
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
        group, rotation, shift * pixel_size, curve, float(curve[1 : last + 1].mean()), resolution_at(curve, 0.5, n, pixel_size),
        _doubt(volume, group, mates[0], centre, radius, judge.band),
    )  # fmt: skip


def _doubt(volume: np.ndarray, group: str, rotation: np.ndarray, centre: np.ndarray, radius: float, band: int) -> str:
    """What speaks against a group where it was found: none of its turns fits well, or others about its main axis fit as well.

    The map is turned by all angles about that axis. Where it is symmetric the group's own turns stand out from the rest.
    """
    n = volume.shape[0]
    box = min(n, 2 * int(np.ceil(SMALL_BOX * (band + 1) / 2)) + n % 2)
    main = max(axes_of(group), key=lambda axis: axis.fold)
    around = Rotation.from_rotvec(np.radians(np.arange(20.0, 181.0, 4.0))[:, None] * np.array(main.direction)).as_matrix()
    own = telling_turns(group)
    judge = Judge(shrunk(volume, box), radius * box / n, np.concatenate([own, around]), band, at_most=len(own) + len(around))
    fits = judge.curves((rotation, centre * box / n))[:, 1 : band + 1].mean(1)
    worst, chance, best = fits[: len(own)].min(), float(np.median(fits[len(own) :])), fits.max()
    if fits[: len(own)].max() < POOR:
        return f"no turn of {group} fits well (mean FSC {fits[: len(own)].max():.2f}); the map may have no symmetry, or another"
    if worst < chance + APART_FROM_CHANCE * (best - chance):
        if chance > ROUND:
            return f"the map is round about this axis: turns by any angle fit as those of {group} do (mean FSC {chance:.2f})"
        return (
            f"some turn of {group} fits no better (mean FSC {worst:.2f}) than turns by other angles do ({chance:.2f}, at best "
            f"{best:.2f}); see symmetry_scores()"
        )
    return ""


def _height(volume: np.ndarray, radius: float) -> float:
    """Centre of mass along z (px) of what stands out of the map's noise, inside a sphere."""
    n = volume.shape[0]
    mask = soft_sphere(n, radius, edge=0.06 * n)
    density = np.maximum(volume - volume.mean() - volume.std(), 0) * mask
    return float((density.sum((1, 2)) * (np.arange(n) - n // 2)).sum() / density.sum())
