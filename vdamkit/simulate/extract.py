"""Particles cut out of tilt images: what relion_tomo_subtomo does, at binning 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.backend.device import HOST, Device
from vdamkit.simulate.render import filled_up, shift_phases
from vdamkit.simulate.tilt_series import TiltSeries, Transfer

SOFT_EDGE = 5  # px, of the circular window; RELION subtomo.cpp:processTomograms, extraction.cpp:cropCircle
DOSE_CUTOFF = 0.01  # RELION subtomo.cpp, --cutoff_fract


@dataclass(frozen=True)
class Extracted:
    """Images of particles, those of one after those of another, still in the bigger box in which RELION multiplies with the
    CTF; the first two on a device."""

    images: Any  # (n, big_box, big_box) float32, yx, particle at big_box // 2, density positive
    transfer: Any  # (n, big_box, big_box // 2 + 1) CTF times dose envelope, rfft2 layout
    rotations: np.ndarray  # (n, 3, 3) x_image = rotation @ x_subtomogram
    visible: np.ndarray  # (n_particles, n_tilts) bool; n in all

    @property
    def starts(self) -> np.ndarray:
        """`(n_particles + 1,)`: the images of particle i are numbers ``starts[i]`` to ``starts[i + 1]``."""
        return np.concatenate([[0], np.cumsum(self.visible.sum(axis=1))])

    def on_host(self, number: int, device: Device) -> Extracted:
        """One of the particles, in the machine's memory."""
        mine = slice(*self.starts[number : number + 2])
        images, transfer = device.get(self.images[mine]), device.get(self.transfer[mine])
        return Extracted(images, transfer, self.rotations[mine], self.visible[number : number + 1])


def visible_tilts(series: TiltSeries, points: np.ndarray, box: int) -> np.ndarray:
    """`(n_tilts, n)` bool: the projected point is at least half a box inside the image.

    Source: RELION tomogram.cpp:isVisible.
    """
    return _whole(series, series.project(points)[0], box)


def _whole(series: TiltSeries, positions: np.ndarray, box: int) -> np.ndarray:
    """Whether boxes around `positions` `(..., 2)` px lie within the images, `(...)` bool."""
    low, high = box / 2, np.array(series.size[:2]) - box / 2
    return np.all((positions > low) & (positions < high), axis=-1)


class Cutter:
    """Cuts particles out of the images of one tilt series; what all particles share is made once."""

    def __init__(self, series: TiltSeries, images: Any, *, box: int, big_box: int, device: Device = HOST):
        """images: `(n_tilts, size_y, size_x)` on the device. box: px, of the written images; big_box: of the working ones."""
        self._series, self._images, self._device = series, images, device
        self._box, self._big_box = box, big_box
        self._transfer = Transfer(series, big_box, device)
        self._steps = device.xp.arange(big_box) - big_box // 2
        axis = np.arange(big_box) - big_box // 2
        r = np.hypot(axis[:, None], axis)
        self._outside = device.put(np.flatnonzero(r > box / 2))
        self._window = device.put(0.5 - 0.5 * np.cos(np.pi * np.clip((box / 2 - r) / SOFT_EDGE, 0, 1)))

    def __call__(self, coordinates: np.ndarray, frames: np.ndarray, *, length: int = 0) -> Extracted:
        """Cut particles out of the tilt images, multiply with CTF and dose weight, window.

        Parameters
        ----------
        coordinates: `(n_particles, 3)` Å from the tomogram centre, as picked. frames: `(n_particles, 3, 3)` A_subtomogram.
        length: number of images to compute, where that is more than there are (see :func:`~.render.filled_up`).

        Notes
        -----
        Integer crop (pixels beyond the edge repeat the edge), sub-pixel Fourier shift that puts the particle at
        index ``big_box // 2``, times ``-CTF * dose`` so that density is positive, circular window of the small
        box. Source: RELION subtomo.cpp:processTomograms, extraction.cpp:extractAt2D_Fourier, cropCircle.
        """
        positions, depths = self._series.project(coordinates)
        visible = _whole(self._series, positions, self._box)
        particles, tilts = np.nonzero(visible.T)
        n, rotations = len(tilts), self._series.rotations[tilts] @ frames[particles]
        tilts, particles = filled_up(tilts, length), filled_up(particles, length)
        exact = positions[tilts, particles]
        corners = np.round(exact).astype(int)
        shifts = self._device.put(np.column_stack([corners - exact, depths[tilts, particles]]))
        pixels = self._device.put(np.column_stack([tilts, corners]))
        images, transfer = self._multiplied(pixels, shifts)
        return Extracted(self._windowed(images)[:n], transfer[:n], rotations, visible.T)

    def _multiplied(self, pixels: Any, shifts: Any) -> tuple[Any, Any]:
        """Crops times ``-CTF * dose``, and the latter; given of each tilt, x, y, and shift along x and y (px), depth (Å)."""
        xp, size = self._device.xp, self._big_box
        height, width = self._images.shape[1:]
        columns = xp.clip(pixels[:, 1:2] + self._steps, 0, width - 1)
        rows = xp.clip(pixels[:, 2:] + self._steps, 0, height - 1)
        cropped = self._images[pixels[:, :1, None], rows[:, :, None], columns[:, None, :]]
        transfer = self._transfer(pixels[:, 0], shifts[:, 2])
        spectra = xp.fft.rfft2(cropped) * shift_phases(shifts, size, self._device) * -transfer
        return xp.fft.irfft2(spectra, s=(size, size)), transfer

    def _windowed(self, images: Any) -> Any:
        """Images minus their mean outside the circle of the small box, times a window falling to 0 at its edge; float32."""
        background = images.reshape(len(images), -1).take(self._outside, axis=1).mean(axis=1)
        return ((images - background[:, None, None]) * self._window).astype(np.float32)


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
