"""Which point groups a map supports: every group is fitted, and judged by the turn of it that fits least.

A map with a point group G equals its copies turned by any element of G equally well, however noisy it is; a turn that is not
in G fits less, and a group's axes are found by chance alone in any map, to some degree. So the best group's score is what a
true symmetry gives in this map, the median over all single axes is what chance gives (most folds must be wrong), and every
group stands somewhere between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vdamkit.backend import Backend, get_backend
from vdamkit.imaging.masks import soft_sphere
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.sampling.point_groups import operators, parse_symmetry
from vdamkit.symmetry.axes import (
    BAND,
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

GROUPS = (*(f"C{n}" for n in range(2, 15)), *(f"D{n}" for n in range(2, 13)), "T", "O", "I")
POINTS = (2_500, 5_000)  # voxels, about, at which maps are compared in the coarse and the fine refinement
SMALLEST = 2.0  # px, radius of the sphere that is looked at
STARTS = 2  # arrangements of a group that are refined
AROUND = 2.5  # degrees between the two-fold axes of a dihedral group that are tried about its main axis
CLOSE = 0.5  # of the way from chance to the best: from here a group is refined further
FEW = 6  # folds that are too few to tell what chance gives
SUPPORTED, REFUTED = 0.8, 0.55  # of that way: above, a group fits as the best does; below, it does not
NONE, SOME = 0.3, 0.45  # of the way from chance to perfect agreement: below, the map has no symmetry; above, it has one
ROUND = 0.65  # chance that says the map is nearly round about an axis: every turn about it fits, and little tells them apart


@dataclass(frozen=True)
class GroupScore:
    """How well one point group fits a map."""

    group: str
    score: float  # mean FSC, over the shells looked at, with the map turned by that element of the group which fits least
    relative: float  # where that stands between what chance gives (0) and what the best group reaches (1)
    fsc: np.ndarray  # (N//2 + 1,) of that element
    rotation: np.ndarray  # (3, 3), turns the map onto RELION's setting of the group's axes
    centre: np.ndarray  # (3,) Å xyz, where the axes meet (or a point on the only one), from the box centre

    @property
    def axes(self) -> list[tuple[int, np.ndarray]]:
        """Fold and direction (xyz, in the map's frame) of every axis."""
        return [(axis.fold, self.rotation.T @ np.array(axis.direction)) for axis in axes_of(self.group)]


@dataclass(frozen=True)
class SymmetryScores:
    """All groups, best first, and what they say about the map; ``print`` it."""

    groups: tuple[GroupScore, ...]
    chance: float  # score that an axis reaches by chance in this map, the median: half of the wrong groups lie above it
    shells: int  # shells 1 … that were compared
    resolution: float  # Å, of the last of them
    named: str | None  # the group the map supports; "C1" if none; None where undecided
    possible: tuple[str, ...]  # where undecided: what cannot be told apart

    def __getitem__(self, group: str) -> GroupScore:
        group = parse_symmetry(group)
        return next(item for item in self.groups if item.group == group)

    def table(self) -> pd.DataFrame:
        """Group, score and relative score, best first."""
        rows = [{"group": g.group, "score": g.score, "relative": g.relative} for g in self.groups]
        return pd.DataFrame(rows).set_index("group")

    def warning(self, group: str) -> str:
        """What speaks against a group that a person has chosen; empty if nothing does."""
        group = parse_symmetry(group)
        chosen = next((item for item in self.groups if item.group == group), None)
        if chosen is None or (chosen.relative >= REFUTED and self.named != "C1"):
            return ""
        better = [g for g in self.groups if is_subgroup(g.group, group) and g.group != group and g.relative >= SUPPORTED]
        start = f"{group} does not fit this map"
        if chosen.relative > 0.2 and self.named != "C1":
            start = f"{group} fits this map worse than a true symmetry would"
        text = (
            f"{start} (mean FSC {chosen.score:.2f}; a wrong group typically reaches {self.chance:.2f}, the best one "
            f"{self.groups[0].score:.2f})"
        )
        if better and self.named != "C1":
            largest = max(better, key=lambda g: len(operators(g.group)))
            text += f"; its subgroup {largest.group} fits ({largest.score:.2f})"
        return text

    def __str__(self) -> str:
        best = self.groups[0]
        figures = f"mean FSC {best.score:.2f} to {self.resolution:.1f} Å; a wrong group typically reaches {self.chance:.2f}"
        if self.named == "C1":
            return f"No symmetry: the best group is {best.group} ({figures})."
        if self.named is not None:
            return f"The map has {self.named} symmetry ({figures})."
        why = "; the map is nearly round about an axis" if self.chance >= ROUND else ""
        return f"Undecided between {', '.join(self.possible)} ({figures}{why})."


def is_subgroup(small: str, large: str) -> bool:
    """Whether some orientation of the point group `small` is part of `large`."""
    small, large = parse_symmetry(small)[:3], parse_symmetry(large)
    if small == "C1" or small == large:
        return True
    inside = {
        "T": {"C2", "C3", "D2"}, "O": {"C2", "C3", "C4", "D2", "D3", "D4", "T"}, "I": {"C2", "C3", "C5", "D2", "D3", "D5", "T"},
    }.get(large[0])  # fmt: skip
    if inside is not None:
        return small in inside or small[0] == large[0]
    if not small[1:].isdigit() or small[0] not in "CD":
        return False
    m, n = int(small[1:]), int(large[1:])
    if small[0] == "D":
        return large[0] == "D" and n % m == 0
    return n % m == 0 or (large[0] == "D" and m == 2)


def symmetry_scores(
    volume: np.ndarray, pixel_size: float, *, radius: float | None = None, resolution: float | None = None,
    groups: Sequence[str] = GROUPS, threads: int | None = None,
) -> SymmetryScores:  # fmt: skip
    """How well each point group fits a map that was made without symmetry.

    Parameters
    ----------
    volume: `(N, N, N)` zyx. pixel_size: Å. radius: Å, of the sphere that is looked at; default 0.4 of the box,
        at least SMALLEST px.
    resolution: Å, finest detail to look at, of at most 26 shells; by default two thirds of Nyquist. Detail beyond what the
        best group reaches does not count.
    groups: those to try. threads: worker threads (RELION --j); default every core.

    Returns
    -------
    :class:`SymmetryScores`; deterministic.

    Raises
    ------
    ValueError: not a cube, or a map that holds nothing. SettingsError: no such group.
    """
    volume = checked_map(volume)
    n = volume.shape[0]
    radius_px = float(np.clip(0.4 * n if radius is None else radius / pixel_size, SMALLEST, n / 2 - 2))
    finest = min(2 * BAND, n // 3 if resolution is None else min(n // 2 - 1, int(n * pixel_size / resolution)))
    groups = [parse_symmetry(group) for group in groups]
    backend = get_backend(threads=threads)
    with backend.limits():
        fits = _Fits(volume, radius_px, max(4, min(BAND, finest)), backend)
        poses = fits.search(groups)
        # one scale for all: the shells to which the leading group agrees with itself
        curves = fits.weakest(poses, max(4, finest))
        curves, poses, last = fits.refined(curves, poses, max(4, finest))
    return _result(curves, poses, last, n, pixel_size)


class _Fits:
    """The best pose of each group in one map, and how well it fits."""

    def __init__(self, volume: np.ndarray, radius: float, band: int, backend: Backend):
        self._volume, self._radius, self._band = volume, radius, band
        self._copies = TurnedCopies(volume, radius, band)
        self._backend = backend

    def search(self, groups: Sequence[str]) -> dict[str, tuple]:
        """Rotation onto RELION's setting and centre (px) of every group, from a search of all axes and a coarse refinement."""
        copies = self._copies
        folds = {axis.fold for group in groups for axis in axes_of(group)}
        folds |= {int(group[1:]) for group in groups if group[0] == "D"}
        scan = axis_scores(copies, folds, self._backend, quick=True)
        run = self._backend.map
        starts = [(fold, turn) for fold in sorted(folds) for turn in arrangements(f"C{fold}", scan)[:STARTS]]
        refined = run(lambda start: self._refined(f"C{start[0]}", start[1]), starts)
        single = {fold: [pose for (of, _), pose in zip(starts, refined, strict=True) if of == fold] for fold in folds}
        likely = _above_chance({fold: max(value for value, _ in found) for fold, found in single.items()})

        def best_of(group: str) -> tuple:
            refine = all(axis.fold in likely for axis in axes_of(group))
            if group[0] == "C":
                found = single[int(group[1:])]
            elif group[0] == "D":
                found = [self._dihedral(group, pose, refine) for _, pose in single[int(group[1:])]]
            else:
                found = [self._refined(group, turn, refine) for turn in arrangements(group, scan)[:STARTS]]
            return max(found, key=lambda item: item[0])[1]

        return dict(zip(groups, run(best_of, groups), strict=True))

    def _refined(self, group: str, turn: np.ndarray, refine: bool = True) -> tuple[float, tuple]:
        """Likeness and pose after a coarse refinement from an orientation `turn` (from the setting into the map)."""
        copies, elements = self._copies, elements_for(group)
        coarse = Likeness(copies.map, copies.mask, elements, order=1, points=POINTS[0])
        pose = turn.T, copies.centre(turn, elements) / copies.px
        value, (rotation, centre) = coarse.refine(pose, group) if refine else (coarse(pose), pose)
        return value, (rotation, centre * copies.px)

    def _dihedral(self, group: str, main: tuple, refine: bool) -> tuple[float, tuple]:
        """A dihedral group about a main axis: two-fold axes are tried all around it."""
        fold = int(group[1:])
        flip = np.diag([1.0, -1, -1])
        around = np.arange(0, 180 / fold, AROUND)
        turns = main[0].T @ euler_to_matrix(np.stack([-around, 0 * around, 0 * around], -1))
        values = [self._copies.best(turn @ flip @ turn.T)[0] for turn in turns]
        return self._refined(group, turns[int(np.argmax(values))], refine)

    def weakest(self, poses: dict[str, tuple], finest: int) -> dict[str, np.ndarray]:
        """FSC with the copy turned by each group's least fitting turn, `(N//2 + 1,)`."""
        n = self._volume.shape[0]
        box = min(n, 2 * int(np.ceil(2.2 * (finest + 1) / 2)) + n % 2)
        px = n / box
        small = shrunk(self._volume, box)

        def curve(group: str) -> np.ndarray:
            judge = Judge(small, self._radius / px, telling_turns(group), finest, at_most=99)
            curves = judge.curves((poses[group][0], poses[group][1] / px))
            low = curves[int(np.argmin(curves[:, 1 : self._band + 1].mean(1)))]
            return np.pad(low, (0, n // 2 + 1 - len(low)))

        return dict(zip(poses, self._backend.map(curve, poses), strict=True))

    def refined(
        self, curves: dict[str, np.ndarray], poses: dict[str, tuple], finest: int
    ) -> tuple[dict[str, np.ndarray], dict[str, tuple], int]:
        """Curves and poses after a fine refinement of the groups that are in the running; and the last shell to count."""
        scores = {group: float(curve[1 : self._band + 1].mean()) for group, curve in curves.items()}
        chance, best = _chance(scores), max(scores.values())
        close = [group for group, score in scores.items() if score >= chance + CLOSE * (best - chance)]
        leader = curves[max(scores, key=lambda group: scores[group])]
        weights = np.where((np.arange(len(leader)) >= 1) & (np.arange(len(leader)) <= finest), np.clip(leader, 0.05, 1), 0)
        n = self._volume.shape[0]
        box = min(n, 2 * int(np.ceil(2.5 * finest / 2)) + n % 2)
        px = n / box
        fine = shrunk(weighted_shells(self._volume, weights), box)
        mask = soft_sphere(box, self._radius / px, edge=0.06 * box)

        def refine(group: str) -> tuple:
            likeness = Likeness(fine, mask, elements_for(group), order=3, points=POINTS[1])
            _, (rotation, centre) = likeness.refine((poses[group][0], poses[group][1] / px), group)
            return rotation, centre * px

        better = dict(zip(close, self._backend.map(refine, close), strict=True))
        again = self.weakest(better, finest)
        for group in close:
            if again[group][1 : finest + 1].mean() >= curves[group][1 : finest + 1].mean():
                curves, poses = curves | {group: again[group]}, poses | {group: better[group]}
        top = max(curves.values(), key=lambda curve: curve[1 : self._band + 1].mean())
        last = max(4, min(finest, int(np.flatnonzero(np.append(top[1:], -1) < 0.3)[0])))
        return curves, poses, last


def _above_chance(likeness: dict[int, float]) -> set[int]:
    """The folds whose best single axis stands out from chance. A group with an axis of another fold fits no better than that
    axis does, so there is no need to refine it."""
    best, chance = max(likeness.values()), float(np.median(list(likeness.values())))
    return {fold for fold, value in likeness.items() if len(likeness) < FEW or value >= chance + CLOSE * (best - chance)}


def _chance(scores: dict[str, float]) -> float:
    """What an axis reaches that the map does not have: the median over the single axes, most of which must be wrong."""
    single = [score for group, score in scores.items() if group[0] == "C"]
    return float(np.median(single or list(scores.values())))


def _result(curves: dict[str, np.ndarray], poses: dict[str, tuple], last: int, n: int, pixel_size: float) -> SymmetryScores:
    scores = {group: float(curve[1 : last + 1].mean()) for group, curve in curves.items()}
    chance, best = _chance(scores), max(scores.values())
    span = max(best - chance, 1e-6)
    items = [
        GroupScore(group, scores[group], (scores[group] - chance) / span, curves[group], poses[group][0],
                   poses[group][1] * pixel_size)
        for group in curves
    ]  # fmt: skip
    items.sort(key=lambda item: -item.score)
    named, possible = _decide(items, chance, best)
    return SymmetryScores(tuple(items), chance, last, n * pixel_size / last, named, possible)


def _decide(items: Sequence[GroupScore], chance: float, best: float) -> tuple[str | None, tuple[str, ...]]:
    """The one group of which all that fit are part, unless a larger one may fit too.

    That the best group stands out little is no sign against symmetry where the map is nearly round: then nothing is named.
    """
    contrast = (best - chance) / (1 - chance)
    if contrast < NONE and chance < ROUND:
        return "C1", ()
    fitting = [item.group for item in items if item.relative >= SUPPORTED]
    doubtful = [item.group for item in items if REFUTED < item.relative < SUPPORTED]

    def largest(groups: Sequence[str]) -> list[str]:
        return [g for g in groups if not any(g != other and is_subgroup(g, other) for other in groups)]

    top = largest(fitting)
    open_ones = [group for group in doubtful if not any(is_subgroup(group, sure) for sure in top)]
    if len(top) == 1 and not open_ones and contrast > SOME:
        return top[0], ()
    return None, tuple(dict.fromkeys([*top, *largest(open_ones), *(["C1"] if contrast <= SOME else [])]))
