"""Noise-free tilt images: projections of a density, each with its own defocus, added up where its particle is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from vdamkit.backend import Backend
from vdamkit.backend.device import HOST, Device
from vdamkit.simulate.tilt_series import TiltSeries, Transfer

PATCHES = 256  # particles of one tilt image that a thread makes at a time
BYTES = 2**26  # of one array of images that a device makes at a time; about a dozen such arrays are alive at once


class CentralSlices:
    """Projections of a density by the projection-slice theorem.

    The density is padded twofold, divided by the interpolation's sinc² window and Fourier transformed;
    slices are read with trilinear interpolation.
    """

    def __init__(self, density: np.ndarray, device: Device = HOST):
        """`density`: `(box, box, box)` zyx, particle at index ``box // 2``; `box` even. device: where slices are made."""
        self.box, self._device = density.shape[0], device
        padded_box = 2 * self.box
        axis = np.arange(self.box) - self.box // 2
        window = np.sinc(axis / padded_box) ** 2
        corrected = density / (window[:, None, None] * window[:, None] * window)
        padded = np.pad(corrected, self.box // 2)
        transform = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(padded)))
        self._parts = [device.put(part) for part in (transform.real, transform.imag)]
        ky, kx = np.meshgrid(np.fft.fftfreq(self.box, 1 / self.box), np.arange(self.box // 2 + 1.0), indexing="ij")
        self._in_image = device.put(np.stack([kx.ravel(), ky.ravel()]))

    def __call__(self, rotations: np.ndarray) -> Any:
        """Transforms of the projections along the beam.

        Parameters
        ----------
        rotations: `(n, 3, 3)`, x_image = rotation @ x_reference.

        Returns
        -------
        `(n, box, box // 2 + 1)` complex128 on the device, rfft2 layout (y, x), phases relative to the particle centre.
        """
        # k_reference = rotationᵀ k_image, with k_image = (kx, ky, 0): only its first two rows matter
        k = self._device.put(np.swapaxes(rotations[:, :2], 1, 2)) @ self._in_image
        coordinates = 2 * k.reshape(len(rotations), 3, self.box, -1).transpose(1, 0, 2, 3)[::-1] + self.box
        real, imaginary = (self._device.ndimage.map_coordinates(part, coordinates, order=1) for part in self._parts)
        return real + 1j * imaginary


def shift_phases(fractions: Any, box: int, device: Device = HOST) -> Any:
    """Factors `(n, box, box // 2 + 1)` that move images by `fractions` `(n, 2)` px along x and y; both on the device."""
    xp = device.xp
    along_x = xp.exp(-2j * np.pi * fractions[:, 0, None] * xp.arange(box // 2 + 1) / box)
    along_y = xp.exp(-2j * np.pi * fractions[:, 1, None] * xp.fft.fftfreq(box))
    return along_y[:, :, None] * along_x[:, None, :]


def images_at_once(box: int) -> int:
    """How many images of `box` px a device makes at a time."""
    return max(1, BYTES // (8 * box**2))


def filled_up(numbers: np.ndarray, length: int) -> np.ndarray:
    """`numbers` with zeros behind, at least `length` long: a device plans its FFTs anew for each number of images."""
    return np.pad(numbers, (0, max(0, length - len(numbers))))


class _Patches:
    """Images of single particles in their own boxes."""

    def __init__(self, series: TiltSeries, slices: CentralSlices, centres: np.ndarray, rotations: np.ndarray, device: Device):
        """As :func:`render_tilt_images`."""
        self.box = box = slices.box
        self._device, self._slices, self._transfer = device, slices, Transfer(series, box, device)
        self._turns, self._rotations = series.rotations, rotations
        positions, self._depths = series.project(centres)
        self.nearest = np.round(positions).astype(int)  # (n_tilts, n, 2) px, where index box // 2 of each patch belongs
        self._fractions = positions - self.nearest
        self.inside = np.all((self.nearest > -box // 2) & (self.nearest < np.array(series.size[:2]) + box // 2), axis=-1)

    def __call__(self, tilts: np.ndarray, particles: np.ndarray) -> Any:
        """`(n, box, box)` float32 on the device; `tilts` `(n,)`, or `(1,)` for all, and `particles` `(n,)`, their numbers."""
        device, box = self._device, self.box
        spectra = self._slices(self._turns[tilts] @ self._rotations[particles])
        shifts = device.put(np.column_stack([self._fractions[tilts, particles], self._depths[tilts, particles]]))
        spectra *= shift_phases(shifts, box, device)
        spectra *= -self._transfer(device.put(tilts), shifts[:, 2])
        images = device.xp.fft.irfft2(spectra, s=(box, box))
        return device.xp.fft.fftshift(images, axes=(1, 2)).astype(np.float32)


def render_tilt_images(
    series: TiltSeries, slices: CentralSlices, centres: np.ndarray, rotations: np.ndarray, backend: Backend | None = None
) -> Any:
    """Noise-free tilt images of particles: protein dark, every particle with its own defocus.

    Parameters
    ----------
    slices: of the density at the pixel size of the series, on the back-end's device; its box must leave room for the
        CTF's rings.
    centres: `(n, 3)` Å from the tomogram centre. rotations: `(n, 3, 3)`, x_tomogram = rotation @ x_reference.
    backend: who makes the images; None: this thread.

    Returns
    -------
    `(n_tilts, size_y, size_x)` float32 on the back-end's device.
    """
    backend, box = backend or Backend(), slices.box
    width, height = series.size[:2]
    images = backend.device.xp.zeros((len(series.table), height + 2 * box, width + 2 * box), np.float32)
    if len(centres):
        patches = _Patches(series, slices, centres, rotations, backend.device)
        if backend.on_device:
            _add_in_layers(images, patches, backend.device)
        else:
            backend.map(lambda tilt: _add_one_by_one(images[tilt], patches, tilt), range(len(images)))
    return images[:, box : box + height, box : box + width]


def _add_one_by_one(image: np.ndarray, patches: _Patches, tilt: int) -> None:
    """Add the patches of one tilt to its image, with a margin of `box` px all around, on the host."""
    box, here = patches.box, np.flatnonzero(patches.inside[tilt])
    for first in range(0, len(here), PATCHES):
        chosen = here[first : first + PATCHES]
        some = patches(np.array([tilt]), chosen)
        for patch, (x, y) in zip(some, patches.nearest[tilt, chosen] + box // 2, strict=True):
            place = image[y : y + box, x : x + box]
            place += patch


def _add_in_layers(images: Any, patches: _Patches, device: Device) -> None:
    """What :func:`_add_one_by_one` does for all tilts, to the bit, in few steps.

    Patches that do not overlap are added at once, and what overlaps in the order of the particles.
    """
    xp, box, size = device.xp, patches.box, images_at_once(patches.box)
    tilts, particles = np.nonzero(patches.inside)
    layer = layers(patches.nearest, patches.inside, box)[tilts, particles]
    order = np.argsort(layer, kind="stable")
    tilts, particles, layer = tilts[order], particles[order], layer[order]
    _, height, width = images.shape
    x, y = (patches.nearest[tilts, particles] + box // 2).T
    start = (tilts * height + y) * width + x
    pixels, flat = xp.arange(box)[:, None] * width + xp.arange(box), images.reshape(-1)
    length = size if len(order) > size else 0
    for first in range(0, len(order), size):
        part = slice(first, first + size)
        some = patches(filled_up(tilts[part], length), filled_up(particles[part], length))
        places = device.put(start[part])[:, None, None] + pixels
        for begin, end in pairwise([0, *np.flatnonzero(np.diff(layer[part])) + 1, len(places)]):
            flat[places[begin:end]] += some[begin:end]


def layers(places: np.ndarray, inside: np.ndarray, box: int) -> np.ndarray:
    """Layers of square patches: none overlaps another of its own, and of two that overlap the later is in the higher.

    Parameters
    ----------
    places: `(n_tilts, n, 2)` px, whole numbers. inside: `(n_tilts, n)` bool, the patches that are drawn. box: px.

    Returns
    -------
    `(n_tilts, n)` int, from 1; 0 for a patch that is not drawn.
    """
    x, y = np.ascontiguousarray(places.T, np.int32)  # (n, n_tilts) each
    layer = np.zeros(x.shape, np.int32)
    for i in range(len(x)):
        overlapping = (np.abs(x[:i] - x[i]) < box) & (np.abs(y[:i] - y[i]) < box)
        layer[i] = np.where(inside[:, i], 1 + (layer[:i] * overlapping).max(axis=0, initial=0), 0)
    return layer.T
