"""Fourier shell correlation and spectra of maps."""

from __future__ import annotations

import numpy as np

from vdamkit.imaging.halfball import GridPoints, fourier_grid, fourier_to_map, map_to_fourier


def fsc(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Fourier shell correlation of two maps `(n, n, n)` zyx, `(n//2 + 1,)` float64; shells by rounding |k|.

    A shell without power has correlation 0.
    """
    if a.shape != b.shape:
        raise ValueError(f"maps must have the same shape, got {a.shape} and {b.shape}")
    if mask is not None:
        a, b = a * mask, b * mask
    return transform_fsc(map_to_fourier(a), map_to_fourier(b), a.shape[0] // 2 + 1)


def transform_fsc(fa: np.ndarray, fb: np.ndarray, radius: int) -> np.ndarray:
    """FSC of two rfft-layout transforms inside ``|k| < radius``; `(n//2 + 1,)` float64."""
    inside = fourier_grid(fa.shape[0]).within(radius)
    return points_fsc(inside, fa.ravel()[inside.at], fb.ravel()[inside.at])


def points_fsc(inside: GridPoints, fa: np.ndarray, fb: np.ndarray) -> np.ndarray:
    """The same of values at the points of a radius, `(m,)` each."""
    cross = inside.means((fa * fb.conj()).real)
    power = inside.means(np.abs(fa) ** 2) * inside.means(np.abs(fb) ** 2)
    return np.where(power > 0, cross / np.sqrt(np.where(power > 0, power, 1)), 0.0)


def resolution_at(curve: np.ndarray, threshold: float, box: int, pixel_size: float) -> float:
    """Resolution in Å at which a curve first falls below `threshold`, linearly between shells; Nyquist where it does not.

    The curve is one value per shell, the last at `box // 2`; shell 0 does not count.
    """
    curve = np.asarray(curve, np.float64)[: box // 2 + 1]
    below = np.flatnonzero(curve[1:] < threshold)
    if not len(below):
        return 2 * pixel_size
    first = int(below[0]) + 1
    if first == 1:
        return box * pixel_size
    above, under = curve[first - 1], curve[first]
    return float(box * pixel_size / (first - 1 + (above - threshold) / (above - under)))


def crossing(curve: np.ndarray, threshold: float, box: int, pixel_size: float) -> str:
    """:func:`resolution_at` in words: ``"24.3 Å"``, or ``"21.2 Å or finer"`` where the curve holds to Nyquist."""
    resolution = resolution_at(curve, threshold, box, pixel_size)
    return f"{resolution:.1f} Å" + (" or finer" if resolution == 2 * pixel_size else "")


def crop_or_pad(volume: np.ndarray, box: int) -> np.ndarray:
    """The same map in a cubic box of another side, centre on centre; zeros are added outside."""
    old = volume.shape[0]
    out = np.zeros((box,) * 3, volume.dtype)
    keep = min(old, box)
    source = slice(old // 2 - keep // 2, old // 2 - keep // 2 + keep)
    target = slice(box // 2 - keep // 2, box // 2 - keep // 2 + keep)
    out[(target,) * 3] = volume[(source,) * 3]
    return out


def low_pass(volume: np.ndarray, shell: float, width: float = 2.0) -> np.ndarray:
    """Raised-cosine low-pass: 0.5 at `shell`, `width` shells from 1 to 0 (RELION fftw.cpp:lowPassFilterMap)."""
    grid = fourier_grid(volume.shape[0])
    ramp = np.clip((np.sqrt(grid.k2) - (shell - width / 2)) / width, 0, 1)
    return fourier_to_map(map_to_fourier(volume) * (0.5 + 0.5 * np.cos(np.pi * ramp)))
