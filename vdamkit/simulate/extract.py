"""Particles cut out of tilt images: what relion_tomo_subtomo does, at binning 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vdamkit.backend.device import HOST, Device
from vdamkit.simulate.tilt_series import TiltSeries, shift_phases

SOFT_EDGE = 5  # px, of the circular window; RELION subtomo.cpp:processTomograms, extraction.cpp:cropCircle
DOSE_CUTOFF = 0.01  # RELION subtomo.cpp, --cutoff_fract


@dataclass(frozen=True)
class Extracted:
    """One particle's images, still in the bigger box in which RELION multiplies with the CTF; the first two on a device."""

    images: Any  # (n_visible, big_box, big_box) float32, yx, particle at big_box // 2, density positive
    transfer: Any  # (n_visible, big_box, big_box // 2 + 1) CTF times dose envelope, rfft2 layout
    rotations: np.ndarray  # (n_visible, 3, 3) x_image = rotation @ x_subtomogram
    visible: np.ndarray  # (n_tilts,) bool

    def on_host(self, device: Device) -> Extracted:
        """The same in the machine's memory."""
        return replace(self, images=device.get(self.images), transfer=device.get(self.transfer))


def visible_tilts(series: TiltSeries, points: np.ndarray, box: int) -> np.ndarray:
    """`(n_tilts, n)` bool: the projected point is at least half a box inside the image.

    Source: RELION tomogram.cpp:isVisible.
    """
    return _whole(series, series.project(points)[0], box)


def _whole(series: TiltSeries, positions: np.ndarray, box: int) -> np.ndarray:
    """Whether boxes around `positions` `(..., 2)` px lie within the images, `(...)` bool."""
    low, high = box / 2, np.array(series.size[:2]) - box / 2
    return np.all((positions > low) & (positions < high), axis=-1)


def _circular_window(images: Any, radius: float, device: Device) -> Any:
    """Images minus their mean outside the circle of `radius` px, times a window falling to 0 at `radius`."""
    box = images.shape[-1]
    axis = np.arange(box) - box // 2
    r = np.hypot(axis[:, None], axis)
    outside = device.put(np.flatnonzero(r > radius))
    background = images.reshape(len(images), -1).take(outside, axis=1).mean(axis=1)
    window = 0.5 - 0.5 * np.cos(np.pi * np.clip((radius - r) / SOFT_EDGE, 0, 1))
    return (images - background[:, None, None]) * device.put(window)


def extract(
    series: TiltSeries,
    images: Any,
    coordinate: np.ndarray,
    frame: np.ndarray,
    *,
    box: int,
    big_box: int,
    device: Device = HOST,
) -> Extracted:
    """Cut one particle out of the tilt images, multiply with CTF and dose weight, window.

    Parameters
    ----------
    images: `(n_tilts, size_y, size_x)` on the device. coordinate: `(3,)` Å from the tomogram centre, as picked.
    frame: `(3, 3)` A_subtomogram. box: px, of the written images. big_box: px, of the working images.

    Notes
    -----
    Integer crop (pixels beyond the edge repeat the edge), sub-pixel Fourier shift that puts the particle at
    index ``big_box // 2``, times ``-CTF * dose`` so that density is positive, circular window of the small
    box. Source: RELION subtomo.cpp:processTomograms, extraction.cpp:extractAt2D_Fourier, cropCircle.
    """
    positions, depths = series.project(coordinate[None])
    visible = _whole(series, positions[:, 0], box)
    height, width = images.shape[1:]
    steps = np.arange(big_box) - big_box // 2
    chosen = np.flatnonzero(visible)
    corners = np.round(positions[chosen, 0]).astype(int)
    columns = device.put(np.clip(corners[:, :1] + steps, 0, width - 1))
    rows = device.put(np.clip(corners[:, 1:] + steps, 0, height - 1))
    cropped = images[device.put(chosen)[:, None, None], rows[:, :, None], columns[:, None, :]]
    transfer = series.transfer(chosen, depths[chosen, 0], big_box, device)
    spectra = device.xp.fft.rfft2(cropped) * shift_phases(corners - positions[chosen, 0], big_box, device) * -transfer
    multiplied = device.xp.fft.irfft2(spectra, s=(big_box, big_box))
    return Extracted(
        images=_circular_window(multiplied, box / 2, device).astype(np.float32),
        transfer=transfer,
        rotations=series.rotations[chosen] @ frame,
        visible=visible,
    )


def unpad(array: Any, box: int, dimensions: int) -> Any:
    """The middle `box` pixels of the last `dimensions` axes; index N // 2 stays the centre."""
    start = array.shape[-1] // 2 - box // 2
    return array[(..., *[slice(start, start + box)] * dimensions)]


def _insertion(particle: Extracted, dose_weights: np.ndarray, box: int) -> np.ndarray:
    """Trilinear insertion of all slices of the big box into a cube of the small box.

    The slices are `big_box / box` times more finely sampled than the cube; every sample carries the
    area it stands for, so that the sums are those of slices sampled like the cube.

    Returns
    -------
    `(4, box, box, box // 2 + 1)` float64, zyx in rfftn layout: real and imaginary part of the data, weights,
    multiplicity.
    """
    big_box = particle.images.shape[-1]
    step, half = box / big_box, box // 2
    transform = np.fft.fft2(np.fft.ifftshift(particle.images, axes=(1, 2)), norm="ortho")
    squared = _full_plane(particle.transfer**2)
    axis = np.fft.fftfreq(big_box, 1 / box)
    ky, kx = np.meshgrid(axis, axis, indexing="ij")
    measured = _full_plane(dose_weights >= DOSE_CUTOFF) & (np.hypot(kx, ky) < half - 1e-6)
    k = np.einsum("tij,iyx->jtyx", particle.rotations[:, :2], np.stack([kx, ky]))[:, measured]
    floor = np.floor(k).astype(int)
    values = [transform[measured].real, transform[measured].imag, squared[measured], np.ones(measured.sum())]
    area = np.where(np.hypot(kx, ky) == 0, 2, 1) * step**2  # RELION inserts the origin and its mate: twice
    area = np.broadcast_to(area, measured.shape)[measured]
    size = box + 1  # one more plane: samples just below half a box also reach it
    sums = np.zeros((4, size**3))
    for corner in np.ndindex(2, 2, 2):
        offset = np.array(corner)[:, None]
        weight = area * np.prod(np.where(offset, k - floor, 1 - (k - floor)), axis=0)
        x, y, z = floor + offset + half
        index = (z * size + y) * size + x
        for total, value in zip(sums, values, strict=True):
            total += np.bincount(index, weight * value, minlength=size**3)
    return np.fft.ifftshift(sums.reshape(4, size, size, size)[:, :box, :box, half:], axes=(1, 2))


def _full_plane(half_planes: np.ndarray) -> np.ndarray:
    """`(n, N, N // 2 + 1)` rfft2 layout of an even function -> `(n, N, N)` fft2 layout."""
    size = half_planes.shape[1]
    mirrored = np.roll(half_planes[:, ::-1, 1 : size // 2][:, :, ::-1], 1, axis=1)
    return np.concatenate([half_planes, mirrored], axis=2)


def backproject(particle: Extracted, dose_weights: np.ndarray, *, box: int) -> tuple[np.ndarray, np.ndarray]:
    """A 3D pseudo-subtomogram and its weights, from a particle on the host.

    Parameters
    ----------
    dose_weights: `(n_visible, big_box, big_box // 2 + 1)`; frequencies below 0.01 are left out.
    box: px, of the result.

    Returns
    -------
    data: `(box, box, box)` float32, zyx, real space: the sum of the inserted slices, not divided by anything.
    weights: `(2 * box, box, box // 2 + 1)` float32, rfftn layout, origin at index 0: planes 0 … box − 1 hold
        the sum of (CTF·dose)², planes box … 2 box − 1 the multiplicity.

    Notes
    -----
    FFTs carry 1/√n; the volume is scaled by big_box / box.
    Source: RELION subtomo.cpp:processTomograms, Fourier_backprojection.h.
    """
    real, imaginary, weights, multiplicity = _insertion(particle, dose_weights, box)
    spectrum = (real + 1j * imaginary) * (particle.images.shape[-1] / box)
    data = np.fft.fftshift(np.fft.irfftn(spectrum, s=(box, box, box), axes=(0, 1, 2), norm="ortho"))
    return data.astype(np.float32), np.concatenate([weights, multiplicity]).astype(np.float32)
