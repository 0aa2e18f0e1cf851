"""Where the axes of a point group may lie in a map: every axis on a grid is scored, then their arrangement.

A map with an n-fold axis u through the point c equals its copy turned by 2π/n about u through c. A turn about the origin
instead gives the same copy, shifted by (1 - h) c, with h the turn. So one cross-correlation scores an axis for all points at
once, and no start can miss. Groups with several axes then need look-ups only: for every orientation of the group the scores
of all its axes are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import healpix
import numpy as np
import scipy.fft
import scipy.sparse
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from vdamkit.backend import Backend
from vdamkit.imaging.halfball import fourier_grid, fourier_to_map, map_to_fourier
from vdamkit.imaging.masks import soft_sphere
from vdamkit.imaging.projector import Projector
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.point_groups import operators, parse_symmetry

AXIS_SIDE = 16  # HEALPix nside of the grid of axes, 3.7 degrees apart
GROUP_ORDER = 4  # HEALPix order of the grid of a group's orientations, 3.75 degrees
BAND = 13  # shells at most that the search looks at
SMALL_BOX = 2.3  # px of the search's box per shell
TURNS = 2  # turns per axis that are scored, at least
KEPT = 8  # arrangements that go on to be refined
APART = 10.0  # degrees between them
AXES_AT_ONCE = 16  # that one worker takes at a time
REACH = 0.2  # of the box, how far a centre's shift may reach


@dataclass(frozen=True)
class Axis:
    """A rotation axis of a point group: unit vector xyz in RELION's setting, and its fold."""

    direction: tuple[float, float, float]
    fold: int


@lru_cache(maxsize=64)
def axes_of(group: str) -> tuple[Axis, ...]:
    """All rotation axes of a point group, each once, with the highest fold; none for C1."""
    found: list[list] = []
    for operator in operators(group)[1:]:
        vector = Rotation.from_matrix(operator).as_rotvec()
        vector /= np.linalg.norm(vector)
        for item in found:
            if abs(abs(item[0] @ vector) - 1) < 1e-6:
                item[1] += 1
                break
        else:
            found.append([vector, 2])
    return tuple(Axis(tuple(vector.tolist()), fold) for vector, fold in found)


def primitive_turn(fold: int) -> int:
    """The largest multiple of 2π/fold, up to a half turn, that alone makes up the whole axis."""
    return next(k for k in range(fold // 2, 0, -1) if np.gcd(k, fold) == 1)


def turns_of(fold: int) -> list[int]:
    """Which multiples of 2π/fold are scored: the largest turns, as small ones hardly change a map, one of them primitive."""
    half = list(range(fold // 2, 0, -1))
    return sorted({primitive_turn(fold), *half[:TURNS]}, reverse=True)[: TURNS + 1]


def checked_map(volume: np.ndarray) -> np.ndarray:
    """The map as float64. Raises ValueError where it is no cube or holds nothing."""
    volume = np.asarray(volume, np.float64)
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise ValueError(f"a map must be a cube, got {volume.shape}")
    if not np.isfinite(volume).all() or np.ptp(volume) == 0:
        raise ValueError("the map holds nothing (constant, or not finite)")
    return volume


def weighted_shells(volume: np.ndarray, weight: np.ndarray, *, radius: float | None = None) -> np.ndarray:
    """The map with its mean power per voxel of Fourier space made `weight` in every shell.

    volume: `(N, N, N)` zyx. weight: `(N//2 + 1,)`. radius: px, of a soft sphere that is cut out first. float64.
    """
    n = volume.shape[0]
    kept = volume if radius is None else (volume - volume.mean()) * soft_sphere(n, radius, edge=0.06 * n)
    spectrum, grid = map_to_fourier(np.asarray(kept, np.float64)), fourier_grid(n)
    power = grid.shell_means(np.abs(spectrum) ** 2, n)
    return fourier_to_map(spectrum * grid.expand(np.sqrt(weight / np.maximum(power, 1e-12 * power.max()))))


def equal_shells(n: int, band: int) -> np.ndarray:
    """Weights `(n//2 + 1,)` with which the shells 1 … `band` count alike, so that correlations are means over shells."""
    shells = np.arange(n // 2 + 1)
    return np.where((shells >= 1) & (shells <= band), 1 / np.maximum(shells, 1.0) ** 2, 0)


def shrunk(volume: np.ndarray, box: int) -> np.ndarray:
    """The same map on a coarser grid over the same cube, `(box,) * 3`: cut out in Fourier space. Both sides even or odd."""
    n = volume.shape[0]
    spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume)))
    cut = slice(n // 2 - box // 2, n // 2 - box // 2 + box)
    return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(spectrum[cut, cut, cut]))).real


class TurnedCopies:
    """Correlates a map with turned copies of itself, for all shifts at once, in a small box.

    Parameters
    ----------
    volume: `(N, N, N)` zyx. radius: px, of the sphere that is looked at. band: shells.

    Attributes: `map` (the small map), `mask` (its sphere), `px` (px of the given map per px of the small one).
    """

    def __init__(self, volume: np.ndarray, radius: float, band: int):
        n = volume.shape[0]
        small = min(n, 2 * int(np.ceil(SMALL_BOX * band / 2)))
        self.px = n / small
        self.map = shrunk(weighted_shells(volume, equal_shells(n, band), radius=radius), small).astype(np.float32)
        self.mask = soft_sphere(small, radius / self.px, edge=0.06 * small)
        self._projector = Projector(small, band + 1)  # its own: the operators of many single turns go with it
        self._reference = self._projector.prepare(self.map)
        self._unturned = self._projector.rotate(self._reference, np.eye(3))
        line = np.rint(np.fft.fftfreq(small) * small)
        self._allowed = line[:, None, None] ** 2 + line[:, None] ** 2 + line**2 <= (REACH * small) ** 2
        disc, kz = self._projector.disc, np.arange(band + 1)
        inside = (disc**2).sum(1)[:, None] + kz**2 < (band + 1) ** 2
        self._weight = (inside * np.where(kz == 0, 0.5, 1)).astype(np.float32)  # of the half-ball, as columns along z
        shifts = np.argwhere(self._allowed[:, :, 0])
        self._waves = np.exp(2j * np.pi / small * (shifts @ disc.T)).astype(np.complex64)  # (shifts, columns)

    def best(self, turn: np.ndarray) -> tuple[float, np.ndarray]:
        """Correlation with the copy turned by `turn` (3, 3) at its best shift, and that shift (3,) xyz in px of the map."""
        small, ball = len(self.map), self._projector.ball
        turned = self._projector.rotate(self._reference, turn)
        product = np.zeros((small, small, small // 2 + 1), np.complex64)  # axes x, y, z
        product[ball.k[:, 0], ball.k[:, 1], ball.k[:, 2]] = self._unturned * turned.conj()
        # Σ_x map(x) turned(x - t) for every t
        value = np.where(self._allowed, scipy.fft.irfftn(product, self.map.shape, norm="forward"), -np.inf)
        place = np.unravel_index(int(value.argmax()), value.shape)
        shift = np.array([p if p <= small // 2 else p - small for p in place], np.float64)
        power = [float(ball.weight @ np.abs(values) ** 2) for values in (self._unturned, turned)]
        return float(value[place] / (2 * np.sqrt(power[0] * power[1]))), shift * self.px

    def turns(self, angles: Sequence[float]) -> Any:
        """What :meth:`about` needs of some angles, degrees: the projector's spins by 0 and by each of them, as one matrix."""
        return scipy.sparse.vstack([self._projector.spin_matrices(angle)[0] for angle in (0.0, *angles)], format="csr")

    def about(self, axes: np.ndarray, turns: Any) -> np.ndarray:
        """Correlation with copies turned about axes (m, 3) xyz, each at its best shift: `(m, angles)` of :meth:`turns`.

        An axis through a point c shifts a copy by (1 - h) c, which is perpendicular to it. So in the axis's frame, where every
        turn is one of the projector's spins, correlations are summed along z and the shifts have two coordinates.
        """
        slabs = self._projector.cylinders(self._reference, np.stack([_from_z(axis).T for axis in axes]))
        return np.array([self._in_frame(slab, turns) for slab in slabs])

    def _in_frame(self, slab: np.ndarray, turns: Any) -> np.ndarray:
        """:meth:`about` for the cylinder of one axis."""
        columns = (turns @ slab).view(np.complex64).reshape(-1, *self._weight.shape)  # unturned, then by each angle
        sums = np.einsum("ck,ack->ca", self._weight * columns[0].conj(), columns[1:])
        power = np.einsum("ck,ack->a", self._weight, columns.real**2 + columns.imag**2)
        return (self._waves @ sums).real.max(0) / np.sqrt(power[0] * power[1:])

    def centre(self, turn: np.ndarray, elements: np.ndarray) -> np.ndarray:
        """The point (px from the box centre) about which an arrangement's turns fit best: (1 - h) c = shift, least squares.

        turn: `(3, 3)`, from RELION's setting into the map's frame. elements: `(m, 3, 3)`, in RELION's setting.
        """
        turns = turn @ elements @ turn.T
        shifts = np.concatenate([self.best(h)[1] for h in turns])
        return np.linalg.lstsq(np.concatenate(np.eye(3) - turns), shifts, rcond=1e-6)[0]


@lru_cache(maxsize=1)
def axis_grid() -> np.ndarray:
    """Directions of one half of the sphere, `(m, 3)` xyz, 3.7 degrees apart."""
    vectors = np.stack(healpix.pix2vec(AXIS_SIDE, np.arange(12 * AXIS_SIDE**2)), -1)
    upper = (vectors[:, 2] > 1e-9) | ((np.abs(vectors[:, 2]) <= 1e-9) & (np.arctan2(vectors[:, 1], vectors[:, 0]) > 0))
    return vectors[upper]


def axis_scores(
    copies: TurnedCopies, folds: Iterable[int], backend: Backend, *, quick: bool = False
) -> dict[int, np.ndarray]:  # fmt: skip
    """How well an n-fold axis fits, for every direction of :func:`axis_grid`, `(m,)` per fold: mean correlation over turns.

    quick: one primitive turn stands for all.
    """
    turns = {fold: [Fraction(k, fold) for k in ([primitive_turn(fold)] if quick else turns_of(fold))] for fold in folds}
    parts = sorted({part for several in turns.values() for part in several})  # a half turn serves 2, 4 and 6 alike
    angles = [360 * float(part) for part in parts]
    spins, grid = copies.turns(angles), axis_grid()
    some = np.array_split(grid, len(grid) // AXES_AT_ONCE)
    table = np.concatenate(backend.map(lambda axes: copies.about(axes, spins), some))
    return {fold: table[:, [parts.index(part) for part in several]].mean(1) for fold, several in turns.items()}


def arrangements(group: str, scores: dict[int, np.ndarray]) -> list[np.ndarray]:
    """The best orientations of a group's axes, `(3, 3)` each, which turn RELION's setting into the map's frame.

    scores: :func:`axis_scores` of every fold the group has.
    """
    group = parse_symmetry(group)
    axes = axes_of(group)
    if len(axes) == 1:
        best = _best_apart(scores[axes[0].fold], axis_grid(), lambda a, b: np.degrees(np.arccos(np.clip(abs(a @ b), 0, 1))))
        return [_from_z(axis) for axis in best]
    tree = cKDTree(np.concatenate([axis_grid(), -axis_grid()]))
    turns = orientation_grid(GROUP_ORDER, group).rotations()
    total = np.zeros(len(turns))
    for axis in axes:
        value = scores[axis.fold] - scores[axis.fold].mean()
        nearest = tree.query(turns @ np.array(axis.direction))[1] % len(value)
        total += value[nearest]
    mates = operators(group)

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        trace = np.einsum("ij,gij->g", a.T @ b, np.swapaxes(mates, 1, 2)).max()
        return float(np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1))))

    return _best_apart(total, turns, apart)


def _best_apart(values: np.ndarray, turns: np.ndarray, apart) -> list[np.ndarray]:
    kept: list[np.ndarray] = []
    for i in np.argsort(-values, kind="stable"):
        if all(apart(turns[i], other) > APART for other in kept):
            kept.append(turns[i])
            if len(kept) == KEPT:
                break
    return kept


def _from_z(direction: np.ndarray) -> np.ndarray:
    """The smallest rotation that takes z to a direction."""
    axis = np.cross([0.0, 0, 1], direction)
    length = np.linalg.norm(axis)
    if length < 1e-12:
        return np.eye(3) if direction[2] > 0 else np.diag([1.0, -1, -1])
    angle = np.arctan2(length, direction[2])
    return Rotation.from_rotvec(angle * axis / length).as_matrix()


def elements_for(group: str, limit: int = 8) -> np.ndarray:
    """Some turns of a group that stand for all, `(m, 3, 3)`: per fold large turns about axes that are far apart."""
    out: list[np.ndarray] = []
    axes = sorted(axes_of(parse_symmetry(group)), key=lambda axis: -axis.fold)
    by_fold: dict[int, list[Axis]] = {}
    for axis in axes:
        by_fold.setdefault(axis.fold, []).append(axis)
    share = max(1, limit // max(1, len(by_fold)))
    for fold, members in by_fold.items():
        angles = turns_of(fold)
        chosen = [members[0]]
        while len(chosen) * len(angles) < share and len(chosen) < len(members):
            others = [a for a in members if a not in chosen]
            away = [max(abs(np.dot(a.direction, b.direction)) for b in chosen) for a in others]
            chosen.append(others[int(np.argmin(away))])
        for axis in chosen:
            out += [Rotation.from_rotvec(2 * np.pi * k / fold * np.array(axis.direction)).as_matrix() for k in angles]
    return np.stack(out)


def telling_turns(group: str) -> np.ndarray:
    """Turns of a group of which at least one fits badly where the group is wrong, `(m, 3, 3)`.

    All about one main axis (one of them alone may come close to a turn of another group: 5/12 of a full turn to 3/7), and one
    about an axis of every other fold, which together make up the group.
    """
    axes = sorted(axes_of(group), key=lambda axis: -axis.fold)
    main, others = axes[0], axes[1:]
    turns = [k / main.fold * np.array(main.direction) for k in range(1, main.fold // 2 + 1)]
    folds = sorted({axis.fold for axis in others} - {main.fold}) or [axis.fold for axis in others[:1]]
    for fold in folds:
        axis = next(axis for axis in others if axis.fold == fold)
        turns.append(primitive_turn(fold) / fold * np.array(axis.direction))
    return Rotation.from_rotvec(2 * np.pi * np.array(turns)).as_matrix()
