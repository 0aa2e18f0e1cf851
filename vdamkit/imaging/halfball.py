"""The half-ball of Fourier voxels that represents a particle or a rotated reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import scipy.fft


@dataclass(frozen=True)
class HalfBall:
    """Voxels with kz >= 0 and ``|k| < radius``, sorted by ``|k|``.

    The order does not depend on the radius: a smaller ball is a prefix of a larger one, so cropping to a lower
    resolution is a slice, and every shell is a contiguous run.
    """

    radius: int  # px, exclusive
    k: np.ndarray  # (n, 3) int32, xyz
    shell: np.ndarray  # (n,) int32, round(|k|)
    weight: np.ndarray  # (n,) float32: 1, and 0.5 on kz = 0 where both Friedel mates are listed
    starts: np.ndarray  # (n_shells,) first voxel of each shell

    def __len__(self) -> int:
        return len(self.k)

    @property
    def n_shells(self) -> int:
        return len(self.starts)

    def shell_sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over shells of `values` `(..., n)`; float64 `(..., n_shells)`. Friedel weights are not applied."""
        return np.add.reduceat(np.asarray(values, np.float64), self.starts, axis=-1)

    def shell_means(self, values: np.ndarray) -> np.ndarray:
        """Friedel-weighted means over shells of `values` `(..., n)`; float64 `(..., n_shells)`."""
        return self.shell_sums(values * self.weight) / self.shell_sums(self.weight)

    def phases(self, shifts: np.ndarray, box: int, dtype=np.complex64, out: np.ndarray | None = None) -> np.ndarray:
        """Factors that move a particle by `shifts`: ``exp(-2 pi i k.t / box)``.

        `shifts` is `(m, 3)` xyz in px; returns `(m, n)`, in `out` if that is given. A particle whose rlnOrigin is t is brought
        to the centre by the shift +t (RELION ml_optimiser.cpp:precalculateShiftedImagesCtfsAndInvSigma2s).
        """
        shifts = np.atleast_2d(np.asarray(shifts, np.float64))
        line = np.arange(-self.radius, self.radius + 1)
        waves = np.exp(-2j * np.pi / box * shifts[:, :, None] * line).astype(dtype)  # (m, 3, 2 radius + 1)
        plane = (waves[:, 1, :, None] * waves[:, 0, None, :]).reshape(len(shifts), -1)
        in_plane, z = self._places
        out = plane.take(in_plane, axis=1, out=out, mode="clip")  # no check, no copy
        out *= waves[:, 2].take(z, axis=1)
        return out

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each voxel in a plane ``(2 radius + 1)²``, and its z, both counted from -radius."""
        x, y, z = self.k.T.astype(np.intp) + self.radius
        return y * (2 * self.radius + 1) + x, z


@lru_cache(maxsize=32)
def half_ball(radius: int) -> HalfBall:
    """The half-ball ``|k| < radius`` (px); cached."""
    line = np.arange(-radius + 1, radius)
    kz, ky, kx = np.meshgrid(np.arange(radius), line, line, indexing="ij")
    k = np.stack([kx, ky, kz], -1).reshape(-1, 3)
    k2 = (k * k).sum(1)
    order = np.lexsort((k[:, 0], k[:, 1], k[:, 2], k2))
    order = order[k2[order] < radius * radius]
    k = k[order].astype(np.int32)
    shell = np.rint(np.sqrt(k2[order])).astype(np.int32)
    weight = np.where(k[:, 2] == 0, 0.5, 1.0).astype(np.float32)
    starts = np.searchsorted(shell, np.arange(shell[-1] + 1))
    return HalfBall(radius, k, shell, weight, starts)


@lru_cache(maxsize=8)
def half_turn_pairs(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of a half-ball that a half turn about z exchanges, ``(x, y)`` and ``(-x, -y)``.

    Returns their places `(2, m)`, and which are alone, on the axis, `(m,)` bool: those stand in both rows.
    """
    x, y, z = half_ball(radius).k.T
    place = np.zeros((radius, 2 * radius - 1, 2 * radius - 1), np.int64)
    place[z, y, x] = np.arange(len(x))  # negative indices count from the end
    first = (x > 0) | ((x == 0) & (y >= 0))
    x, y, z = x[first], y[first], z[first]
    return np.stack([place[z, y, x], place[z, -y, -x]]), (x == 0) & (y == 0)


@dataclass(frozen=True)
class FourierGrid:
    """The half grid of a map's Fourier transform, ``numpy.fft.rfftn`` layout: `(box, box, box//2 + 1)` zyx."""

    box: int
    shell: np.ndarray  # int32, round(|k|)
    k2: np.ndarray  # int32, |k|²
    weight: np.ndarray  # float32: 2 where the Friedel mate is implied, else 1

    def shell_means(self, values: np.ndarray, radius: int) -> np.ndarray:
        """Means over shells of `values` (grid shape) inside ``|k| < radius``; `(box//2 + 1,)`, 0 where empty."""
        inside = self.within(radius)
        return inside.means(values.ravel()[inside.at])

    def within(self, radius: int) -> GridPoints:
        """The points inside ``|k| < radius``; kept."""
        return _grid_points(self.box, radius)

    def expand(self, by_shell: np.ndarray) -> np.ndarray:
        """A value per shell laid out on the grid; shells beyond the last take the last."""
        return by_shell[np.minimum(self.shell, len(by_shell) - 1)]


@dataclass(frozen=True)
class GridPoints:
    """Those points of a :class:`FourierGrid` that lie within a radius; arrays of them are flat."""

    at: np.ndarray  # (m,) places in the flattened grid, ascending
    shell: np.ndarray  # (m,)
    weight: np.ndarray  # (m,) float64: 2 where the Friedel mate is implied, else 1
    counts: np.ndarray  # (box//2 + 1,) sums of weights

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means over shells of values `(m,)`; `(box//2 + 1,)`, 0 where empty."""
        n = len(self.counts)
        return np.bincount(self.shell, values * self.weight, n)[:n] / np.maximum(self.counts, 1)


@lru_cache(maxsize=16)
def _grid_points(box: int, radius: int) -> GridPoints:
    grid, n = fourier_grid(box), box // 2 + 1
    at = np.flatnonzero(grid.k2 < radius * radius)
    shell, weight = grid.shell.ravel()[at], grid.weight.ravel()[at].astype(np.float64)
    return GridPoints(at, shell, weight, np.bincount(shell, weight, n)[:n])


@lru_cache(maxsize=8)
def fourier_grid(box: int) -> FourierGrid:
    """Shells and radii of the rfft half grid of a cubic map of side `box`; cached."""
    f = np.rint(np.fft.fftfreq(box) * box).astype(np.int64)
    k2 = f[:, None, None] ** 2 + f[None, :, None] ** 2 + np.arange(box // 2 + 1)[None, None] ** 2
    weight = np.full(k2.shape, 2, np.float32)
    weight[..., 0] = 1
    if box % 2 == 0:
        weight[..., -1] = 1
    return FourierGrid(box, np.rint(np.sqrt(k2)).astype(np.int32), k2.astype(np.int32), weight)


def map_to_fourier(volume: np.ndarray) -> np.ndarray:
    """Fourier transform of a map `(box, box, box)` zyx with its centre at box//2: rfft layout, carrying 1/box³."""
    return scipy.fft.rfftn(scipy.fft.ifftshift(volume)) / volume.size


def fourier_to_map(transform: np.ndarray) -> np.ndarray:
    """Inverse of :func:`map_to_fourier`; float64 `(box, box, box)`."""
    box = transform.shape[0]
    return scipy.fft.fftshift(scipy.fft.irfftn(transform * box**3, s=(box,) * 3))


def gather_half_ball(transform: np.ndarray, ball: HalfBall) -> np.ndarray:
    """Values of an rfft-layout transform (:func:`map_to_fourier`) on a half-ball, `(n,)`."""
    at, flip = places(transform.shape[0], ball.radius)
    values = transform.ravel()[at]
    if np.iscomplexobj(values):
        values[flip] = values[flip].conj()
    return values


@lru_cache(maxsize=32)
def places(box: int, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the voxels of a half-ball lie in a flattened rfft-layout transform, and which of them as their mates."""
    k = half_ball(radius).k
    flip = np.flatnonzero(k[:, 0] < 0)
    sign = np.where(k[:, 0] < 0, -1, 1)
    x, y, z = (k * sign[:, None]).T
    return ((z % box) * box + y % box) * (box // 2 + 1) + x, flip
