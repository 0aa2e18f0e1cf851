"""Comparison with a reference: rigid alignment of maps with their FSC, and errors of poses with known truth.

A map has no absolute orientation or origin, so both comparisons first take out the one rigid motion that is free.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter
from scipy.spatial.transform import Rotation

from vdamkit.backend import Backend, get_backend
from vdamkit.climb import climb, correlation_model, normalised, slopes
from vdamkit.errors import InputError
from vdamkit.imaging.fsc import crop_or_pad, fsc, low_pass, resolution_at
from vdamkit.imaging.halfball import fourier_grid, fourier_to_map, map_to_fourier
from vdamkit.imaging.masks import soft_sphere
from vdamkit.io.mrc import read_map
from vdamkit.pose_errors import PoseErrors, pose_errors
from vdamkit.sampling.euler import euler_to_matrix, rotation_angle
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.shifts import shift_grid

__all__ = ["Match", "PoseErrors", "align", "known_map", "mirrored", "moved", "pose_errors", "resample"]

COARSE_BOX = 16  # px, of the maps in the search over all orientations
COARSE_ORDER = 2  # HEALPix order of that search, 15 degrees
KEPT = 8  # peaks of the search that are refined
BATCH = 32  # orientations scored together, and their quarter turns
EDGE_PX = 4.0  # soft edge of the sphere


@dataclass(frozen=True)
class Match:
    """A map laid onto a reference: ``x_reference = rotation @ x_moving + shift``, both from the box centres."""

    map: np.ndarray  # (N, N, N) float32 zyx, the moving map as it lies on the reference
    rotation: np.ndarray  # (3, 3), acts on xyz columns
    shift: np.ndarray  # (3,) xyz, Å
    correlation: float  # inside the sphere, up to the resolution
    fsc: np.ndarray  # (N//2 + 1,)
    resolution: float  # Å, FSC 0.5
    mean_fsc: float  # over the shells 1 … `mean_to`
    mirrored: bool = False  # whether the moving map was mirrored (z → -z) first
    mean_to: float = 20.0  # Å

    def __str__(self) -> str:
        hand = ", mirrored" if self.mirrored else ""
        angle = np.degrees(np.linalg.norm(Rotation.from_matrix(self.rotation).as_rotvec()))
        return (
            f"FSC 0.5 at {self.resolution:.1f} Å, mean FSC to {self.mean_to:g} Å {self.mean_fsc:.2f}, correlation "
            f"{self.correlation:.2f} after a turn of {angle:.0f}° and a shift of {np.linalg.norm(self.shift):.1f} Å{hand}"
        )


# maps ---------------------------------------------------------------------------------------------------------------


def resample(volume: np.ndarray, pixel_size: float, new_pixel_size: float, new_box: int) -> np.ndarray:
    """The same map at another pixel size and box, centre on centre.

    Parameters
    ----------
    volume: `(n, n, n)` zyx. pixel_size, new_pixel_size: Å. new_box: px.

    Returns
    -------
    `(new_box, new_box, new_box)` float64: cropped or padded in Fourier space, zeros outside the old box.
    """
    old = volume.shape[0]
    # a padded box whose side is a whole number of new pixels, as nearly as 0.1 %
    wide = np.arange(old, 4 * old + 1, 1 if old % 2 else 2)
    sides = wide * pixel_size / new_pixel_size
    error = np.abs(sides - 2 * np.round(sides / 2)) / sides
    padded = int(wide[np.flatnonzero(error < 1e-3)[0]] if (error < 1e-3).any() else wide[error.argmin()])
    middle = int(2 * np.round(padded * pixel_size / new_pixel_size / 2))
    volume = crop_or_pad(np.asarray(volume, np.float64), padded)
    if middle != padded:
        spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume))) / volume.size
        spectrum = crop_or_pad(spectrum, middle)
        volume = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(spectrum))).real * middle**3
    return crop_or_pad(volume, new_box)


def known_map(truth: str | os.PathLike | np.ndarray, pixel_size: float, box: int) -> np.ndarray:
    """A map to compare with as `(box, box, box)` float64 zyx at `pixel_size` (Å): from an MRC file, or an array of that shape.

    Raises
    ------
    InputError: the file cannot be read, or what is given is no such map.
    """
    if isinstance(truth, (str, os.PathLike)):
        volume, own = read_map(truth)
        if len(set(volume.shape)) != 1:
            raise InputError(f"{truth}: is {' x '.join(map(str, volume.shape[::-1]))} voxels (x, y, z); a map to compare with "
                             "is a cube")  # fmt: skip
        return resample(volume, own or pixel_size, pixel_size, box)
    volume = np.asarray(truth)
    if volume.shape != (box,) * 3 or volume.dtype.kind not in "fiu":
        what = f"an array {volume.shape} of {volume.dtype}" if volume.ndim else f"a {type(truth).__name__}"
        raise InputError(f"the map to compare with is {what}; give {(box,) * 3} numbers, or the path of an MRC file")
    return volume.astype(np.float64)


def mirrored(volume: np.ndarray) -> np.ndarray:
    """The map with z → -z about the box centre."""
    flipped = volume[::-1]
    return np.roll(flipped, 1, axis=0) if volume.shape[0] % 2 == 0 else flipped


def moved(volume: np.ndarray, rotation: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The map turned and then shifted: ``result(rotation @ x + shift) = volume(x)``.

    `volume` `(n, n, n)` zyx, `rotation` `(3, 3)` on xyz, `shift` `(3,)` xyz in px. Interpolated with cubic splines on a
    grid twice as fine, so that nothing is lost below Nyquist. float64 of the same shape.
    """
    n = volume.shape[0]
    fine = spline_filter(_finer(volume), order=3)
    grid = (np.indices(volume.shape)[::-1].reshape(3, -1) - n // 2).astype(np.float64)
    points = rotation.T @ (grid - np.asarray(shift)[:, None])
    values = map_coordinates(fine, 2 * points[::-1] + fine.shape[0] // 2, order=3, prefilter=False)
    return values.reshape(volume.shape)


def _turned(volume: np.ndarray, rotation: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """As :func:`moved`, quickly: cubic splines on the map's own grid."""
    n = volume.shape[0]
    grid = (np.indices(volume.shape)[::-1].reshape(3, -1) - n // 2).astype(np.float64)
    points = rotation.T @ (grid - shift[:, None])
    return map_coordinates(volume, points[::-1] + n // 2, order=3).reshape(volume.shape)


def _finer(volume: np.ndarray) -> np.ndarray:
    """The map on a grid twice as fine, `(2n, 2n, 2n)`."""
    return resample(volume, 2.0, 1.0, 2 * volume.shape[0])


def align(
    moving: np.ndarray,
    reference: np.ndarray,
    pixel_size: float,
    *,
    radius: float | None = None,
    seed: int = 0,
    mirror: bool = False,
    max_shift: float | None = None,
    mean_to: float = 20.0,
    start: Match | None = None,
    threads: int | None = None,
) -> Match:
    """Lay a map onto a reference by rotation and shift, and compare the two inside a soft sphere.

    Parameters
    ----------
    moving, reference: `(N, N, N)` zyx, the same box and pixel size (see :func:`resample`).
    pixel_size: Å.
    radius: Å, of the sphere about the reference's centre in which the maps are compared; default 0.35 of the box.
    seed: turns the grid of orientations; the result should not depend on it.
    mirror: align the mirror image of `moving` instead.
    max_shift: Å, default a quarter of the box. mean_to: Å, resolution up to which the FSC is averaged.
    start: an earlier match of nearly the same maps; it is refined and nothing else is searched.
    threads: worker threads (RELION --j); default every core.

    Returns
    -------
    :class:`Match`. All orientations are searched at low resolution, the best refined, the winner at full resolution.

    Raises
    ------
    ValueError: the maps differ in shape, are not cubes, or hold nothing.
    """
    _check(moving, reference)
    n = reference.shape[0]
    moving = np.asarray(mirrored(moving) if mirror else moving, np.float64)
    reference = np.asarray(reference, np.float64)
    radius_px = min((0.35 * n if radius is None else radius / pixel_size), n / 2 - 1)
    limit = n / 4 if max_shift is None else max_shift / pixel_size
    mask = soft_sphere(n, radius_px, edge=EDGE_PX)
    backend = get_backend(threads=threads)
    with backend.limits():
        if start is None:
            poses = _coarse(moving, reference, radius_px, limit, seed, backend)
            score = _Score(low_pass(moving, n / 6), low_pass(reference, n / 6), mask, order=1, every=3)
            poses = backend.map(lambda pose: score.refine(pose, tolerance=2e-2), poses)
        else:
            poses = [(start.rotation, start.shift / pixel_size)]
        every = 1 if start is None else 3  # voxels in a row of which one is compared
        return _sharpest(moving, reference, mask, poses, pixel_size, mean_to, mirror, every, backend)


def _sharpest(
    moving: np.ndarray, reference: np.ndarray, mask: np.ndarray, poses: list[tuple], pixel_size: float, mean_to: float,
    mirror: bool, every: int, backend: Backend,
) -> Match:  # fmt: skip
    """The best of some poses after a refinement with all that the maps have in common."""
    n = reference.shape[0]
    last = min(n // 2, max(1, int(np.floor(n * pixel_size / mean_to + 1e-6))))

    def agreement(pose: tuple) -> float:
        return float(fsc(_turned(moving, *pose), reference, mask)[1 : last + 1].mean())

    # low resolution alone may prefer a wrong turn of a symmetric map: the whole curve decides
    leading = sorted(poses, key=agreement)[-2:]
    curve = fsc(_turned(moving, *leading[-1]), reference, mask)
    band = int(np.clip(np.flatnonzero(np.append(curve[1:], -1) < 0.3)[0] + 1, n // 6, n // 2 - 1))
    sharp = _Score(_whitened(moving, mask, band), _whitened(reference, mask, band), mask, order=3, every=every)
    leading += backend.map(lambda pose: sharp.refine(pose, tolerance=5e-3), leading)
    best = max(leading, key=agreement)
    laid = moved(moving, *best)
    curve = fsc(laid, reference, mask)
    correlation = _Score(laid, reference, mask, order=1).at((np.eye(3), np.zeros(3)))
    return Match(
        laid.astype(np.float32), best[0], best[1] * pixel_size, correlation, curve,
        resolution_at(curve, 0.5, n, pixel_size), float(curve[1 : last + 1].mean()), mirror, mean_to,
    )  # fmt: skip


def _check(moving: np.ndarray, reference: np.ndarray) -> None:
    if moving.shape != reference.shape or len(set(reference.shape)) != 1 or reference.ndim != 3:
        raise ValueError(f"maps must be cubes of the same shape, got {moving.shape} and {reference.shape}; see resample()")
    for name, volume in (("moving map", moving), ("reference", reference)):
        if not np.isfinite(volume).all() or np.ptp(volume) == 0:
            raise ValueError(f"the {name} holds nothing to align (constant, or not finite)")


def _whitened(volume: np.ndarray, mask: np.ndarray, band: int) -> np.ndarray:
    """The map with the same power in all shells up to `band` and none beyond, judged inside the mask."""
    grid = fourier_grid(volume.shape[0])
    power = grid.shell_means(np.abs(map_to_fourier(volume * mask)) ** 2, volume.shape[0])
    gain = np.where(np.arange(len(power)) <= band, 1 / np.sqrt(np.maximum(power, 1e-12 * power.max())), 0)
    gain[0] = 0
    return fourier_to_map(map_to_fourier(volume) * grid.expand(gain))


class _Score:
    """Correlation of a moving map with a reference inside a soft sphere, at poses of six parameters."""

    def __init__(self, moving: np.ndarray, reference: np.ndarray, mask: np.ndarray, order: int, every: int = 1):
        inside = np.flatnonzero(mask.ravel() > 0.02)[::every]
        n = mask.shape[0]
        self.centre, self.order = n // 2, order
        self.points = np.stack(np.unravel_index(inside, mask.shape))[::-1].astype(np.float64) - n // 2  # xyz
        self.weight = mask.ravel()[inside].astype(np.float64) ** 2
        self.weight /= self.weight.sum()
        self.target = normalised(reference.ravel()[inside], self.weight)[0]
        self.plain, self.moving = moving, spline_filter(moving, order=order) if order > 1 else moving

    @cached_property
    def slopes(self) -> list[np.ndarray]:
        """Of the moving map; only a refinement wants them."""
        return slopes(self.plain)

    def _places(self, rotation: np.ndarray, shift: np.ndarray) -> np.ndarray:
        return (rotation.T @ (self.points - shift[:, None]))[::-1] + self.centre

    def at(self, pose: tuple[np.ndarray, np.ndarray]) -> float:
        """Correlation at a pose, a rotation and a shift in px."""
        return self._look(pose)[0]

    def _look(self, pose: tuple[np.ndarray, np.ndarray]) -> tuple[float, tuple]:
        places = self._places(*pose)
        values = map_coordinates(self.moving, places, order=self.order, prefilter=False)
        now, deviation = normalised(values, self.weight)
        return float(self.weight * self.target @ now), (places, now, deviation)

    def _model(self, pose: tuple[np.ndarray, np.ndarray], seen: tuple) -> tuple[np.ndarray, np.ndarray]:
        (rotation, shift), (places, now, deviation) = pose, seen
        slope = rotation @ np.stack([map_coordinates(part, places, order=1) for part in self.slopes])
        change = -np.concatenate([np.cross(self.points - shift[:, None], slope, axis=0), slope])
        return correlation_model(change / deviation, now, self.target, self.weight)

    def refine(self, pose: tuple[np.ndarray, np.ndarray], *, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """The best pose near a start; see :func:`vdamkit.climb.climb`."""

        def step(near: tuple[np.ndarray, np.ndarray], by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return Rotation.from_rotvec(by[:3]).as_matrix() @ near[0], near[1] + by[3:]

        return climb(pose, self._look, self._model, step, tolerance=tolerance)[1]


def _coarse(
    moving: np.ndarray, reference: np.ndarray, radius: float, limit: float, seed: int, backend: Backend
) -> list[tuple]:  # fmt: skip
    """Best rotations and shifts (px) of a search over all orientations, by correlation under the sphere.

    For every shift Σ m g f / sqrt(Σ m f² − (Σ m f)² / Σ m), with f the turned map, g the reference (mean removed under the
    mask m): sums over few voxels at few shifts, so three matrix products for many orientations at once.
    """
    n = reference.shape[0]
    crop = min(n, 2 * int(np.ceil(radius + EDGE_PX + limit / 2)))
    small = min(COARSE_BOX, crop)
    px = crop / small
    f, g = (
        resample(low_pass(volume, n / crop * small / 2.4), 1.0, px, small).astype(np.float32) for volume in (moving, reference)
    )
    mask = soft_sphere(small, radius / px, edge=EDGE_PX / px).astype(np.float32)
    g = (g - (mask * g).sum() / mask.sum()) * mask
    grid, perturbation = orientation_grid(COARSE_ORDER), 17.0 * (seed + 1) % 15.0
    turns = grid.rotations(perturbation)
    voxels = (np.indices((small,) * 3)[::-1].reshape(3, -1) - small // 2).astype(np.float64)
    voxels = voxels[:, (voxels**2).sum(0) < (small / 2) ** 2]
    quarters = _quarter_turns(voxels)
    shifts = shift_grid(np.hypot(min(limit / px, small), 1), 1.0)
    gs, ms = (_shifted(volume, voxels + small // 2, shifts) for volume in (g, mask))

    def search(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Best score of each of some orientations and its quarter turns, and number of its shift, `(4 orientations,)`."""
        points = turns[some].swapaxes(1, 2) @ voxels + small // 2
        turned = map_coordinates(f, points[:, ::-1].swapaxes(0, 1), order=1)[:, quarters].reshape(4 * len(some), -1)
        top, sums, squares = turned @ gs, turned @ ms, turned**2 @ ms
        variance = squares - sums**2 / mask.sum()
        value = top / np.sqrt(np.maximum(variance, 1e-3 * variance.max(1, keepdims=True)))
        return value.max(1), value.argmax(1)

    bases = np.flatnonzero(np.arange(len(grid)) % grid.n_psi < grid.n_bases)
    found = backend.map(search, [bases[i : i + BATCH] for i in range(0, len(bases), BATCH)])
    scores, places = (np.concatenate(part) for part in zip(*found, strict=True))
    turns = turns[(bases[:, None] + grid.n_bases * np.arange(4)).ravel()]
    return _distinct(turns, scores, px * shifts[places])


def _quarter_turns(voxels: np.ndarray) -> np.ndarray:
    """For 0 to 3 quarter turns about z, which of the voxels `(3, n)` xyz each of them shows: `(4, n)`.

    A turned map is only interpolated for a quarter of all psi: the others are the same values in another order.
    """
    key = voxels.T @ [1, 1000, 1000**2]
    order = np.argsort(key)
    mates = (euler_to_matrix([0, 0, psi]).T @ voxels for psi in (0, 90, 180, 270))
    return np.stack([order[np.searchsorted(key[order], np.rint(mate.T @ [1, 1000, 1000**2]))] for mate in mates])


def _shifted(volume: np.ndarray, at: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """What a map has at voxels `(3, points)` xyz moved by each of some whole shifts `(m, 3)`: `(points, m)`; 0 outside."""
    reach = int(np.abs(shifts).max())
    wide = np.pad(volume, reach)
    stride = np.array([1, len(wide), len(wide) ** 2])
    places = (stride @ (at + reach))[:, None] + shifts @ stride
    return wide.ravel()[places.astype(int)]


def _distinct(turns: np.ndarray, scores: np.ndarray, shifts: np.ndarray) -> list[tuple]:
    """The KEPT best orientations that differ by more than a step, with their shifts in px xyz."""
    kept: list[tuple] = []
    for i in np.argsort(-scores, kind="stable"):
        if all(rotation_angle(turns[i], other) > 22.0 for other, _ in kept):
            kept.append((turns[i], shifts[i]))
        if len(kept) == KEPT:
            break
    return kept
