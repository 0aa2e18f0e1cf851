"""Tilt series: geometry, dose and CTF as in RELION's tomograms.star, and the tilt images themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vdamkit.backend import Backend
from vdamkit.backend.device import HOST, Device
from vdamkit.errors import InputError
from vdamkit.imaging.ctf import ctf, dose_envelope
from vdamkit.io.star_tables import as_table, find_block, read_star, require_columns, resolve_path
from vdamkit.io.tilt_geometry import projection_rotation

PATCHES = 256  # particles of one tilt image that are made at a time


@dataclass(frozen=True)
class TiltSeries:
    """One tomogram's tilt series. Tables have RELION's column names, one row per tilt."""

    name: str  # rlnTomoName
    size: tuple[int, int, int]  # tomogram x, y, z in px; the tilt images are x by y
    pixel_size: float  # Å
    table: pd.DataFrame
    optics_group: int = 1
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    hand: float = -1.0  # rlnTomoHand

    @cached_property
    def rotations(self) -> np.ndarray:
        """`(n_tilts, 3, 3)`, x_image = R @ x_tomogram (RELION tomogram.cpp:setProjectionMatrix)."""
        return projection_rotation(*(self.table[f"rlnTomo{a}"].to_numpy() for a in ("XTilt", "YTilt", "ZRot")))

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points of the tomogram fall on the tilt images.

        Parameters
        ----------
        points: `(n, 3)` Å, xyz from the tomogram centre (rlnCenteredCoordinate*Angst).

        Returns
        -------
        positions: `(n_tilts, n, 2)` px, x and y as indices into the images.
        depths: `(n_tilts, n)` Å along the beam, relative to the tomogram centre.
        """
        size = np.array(self.size)
        from_centre = points / self.pixel_size + (size / 2 - size // 2)
        rotated = np.einsum("tij,nj->tni", self.rotations, from_centre)
        shifts = self.table[["rlnTomoXShiftAngst", "rlnTomoYShiftAngst"]].to_numpy() / self.pixel_size
        return rotated[..., :2] + size[:2] // 2 + shifts[:, None], rotated[..., 2] * self.pixel_size

    def transfer(self, tilts: np.ndarray, depths: np.ndarray, box: int, device: Device = HOST) -> Any:
        """CTF times dose envelope of several images of particles.

        The defocus of a particle is that of the image plus ``hand * depth``
        (RELION tomogram.cpp:getCtf, getDepthOffset).

        Parameters
        ----------
        tilts: `(n,)` rows of `table`, or `(1,)` for all. depths: `(n,)` Å. box: px. device: where the result is made.

        Returns
        -------
        `(n, box, box // 2 + 1)` float64, rfft2 layout (y, x). Sign as in :func:`vdamkit.imaging.ctf.ctf`:
        positive at low frequency for an underfocused image, so protein is dark in ``-transfer * projection``.
        """
        rows = self.table.iloc[tilts]

        def column(name: str, default: float = 0.0) -> Any:
            values = rows[name].to_numpy(np.float64) if name in rows else np.full(len(rows), default)
            return device.put(values[:, None, None])

        frequencies = np.meshgrid(np.fft.fftfreq(box, self.pixel_size), np.fft.rfftfreq(box, self.pixel_size), indexing="ij")
        fy, fx = (device.put(f) for f in frequencies)
        offset = device.put(self.hand * np.asarray(depths)[:, None, None])
        value = ctf(
            fx,
            fy,
            defocus_u=column("rlnDefocusU") + offset,
            defocus_v=column("rlnDefocusV") + offset,
            defocus_angle=column("rlnDefocusAngle"),
            voltage_kv=self.voltage_kv,
            cs_mm=self.cs_mm,
            amplitude_contrast=self.amplitude_contrast,
            phase_shift=column("rlnPhaseShift"),
            scale=column("rlnCtfScalefactor", 1.0),
        )
        return value * dose_envelope(np.hypot(fx, fy), column("rlnMicrographPreExposure"))


def dose_symmetric_order(tilts: int) -> np.ndarray:
    """Rank `(tilts,)` of every tilt in the order of exposure: 0, then pairs on alternating sides.

    Tilts are counted from the most negative to the most positive angle.
    """
    sequence = [tilts // 2]
    for step in range(1, tilts // 2 + 1):  # 0 +1 −1 −2 +2 +3 −3 −4 …
        side = 1 if step % 2 else -1
        sequence += [t for t in (tilts // 2 + side * step, tilts // 2 - side * step) if t < tilts]
    rank = np.empty(tilts, int)
    rank[sequence] = np.arange(tilts)
    return rank


def make_tilt_series(
    rng: np.random.Generator,
    *,
    name: str,
    size: tuple[int, int, int],
    pixel_size: float,
    tilts: int,
    defocus: float,
    max_tilt: float = 60.0,
    dose_per_tilt: float = 3.0,
    optics_group: int = 1,
) -> TiltSeries:
    """A dose-symmetric tilt series with drifting shifts, an in-plane tilt axis near 85° and some astigmatism.

    Parameters
    ----------
    size: tomogram x, y, z in px. pixel_size: Å. tilts: number of images from −max_tilt to +max_tilt degrees.
    defocus: Å, of the tomogram centre; single images scatter by 300 Å about it.
    dose_per_tilt: e/Å².
    """
    angles = np.linspace(-max_tilt, max_tilt, tilts)
    rank = dose_symmetric_order(tilts)
    defocus_u = defocus + rng.normal(0, 300, tilts)
    drift = np.cumsum(rng.normal(0, 12, (tilts, 2)), axis=0)
    drift -= drift[tilts // 2]
    table = pd.DataFrame(
        {
            "rlnMicrographName": [f"images/{name}_{i:03d}.mrc" for i in range(tilts)],
            "rlnTomoNominalStageTiltAngle": angles,
            "rlnTomoNominalTiltAxisAngle": 85.0,
            "rlnMicrographPreExposure": rank * dose_per_tilt,
            "rlnDefocusU": defocus_u,
            "rlnDefocusV": defocus_u - np.abs(rng.normal(0, 250, tilts)),
            "rlnDefocusAngle": rng.uniform(-90, 90, tilts),
            "rlnTomoXTilt": 0.0,
            "rlnTomoYTilt": angles,
            "rlnTomoZRot": 85.0 + np.linspace(-0.3, 0.3, tilts),
            "rlnTomoXShiftAngst": drift[:, 0],
            "rlnTomoYShiftAngst": drift[:, 1],
            "rlnCtfScalefactor": np.cos(np.radians(angles)),
        }
    ).round(6)
    return TiltSeries(name=name, size=size, pixel_size=pixel_size, table=table, optics_group=optics_group)


TILT_COLUMNS = (
    "rlnMicrographPreExposure",
    "rlnDefocusU",
    "rlnDefocusV",
    "rlnDefocusAngle",
    "rlnTomoYTilt",
    "rlnTomoZRot",
)
OPTIONAL_TILT_COLUMNS = ("rlnTomoXTilt", "rlnTomoXShiftAngst", "rlnTomoYShiftAngst")


def read_tilt_series(tomograms: Path) -> dict[str, TiltSeries]:
    """Tilt series of a tomograms.star written by RELION 5, by name; missing x tilts and shifts are 0."""
    rows = as_table(find_block(read_star(tomograms), "global", tomograms))
    sizes = [f"rlnTomoSize{a}" for a in "XYZ"]
    optics = ["rlnTomoTiltSeriesPixelSize", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"]
    texts = ["rlnTomoName", "rlnTomoTiltSeriesStarFile"]
    require_columns(rows, [*texts, *sizes, *optics, "rlnTomoHand"], tomograms, "global")
    result = {}
    for row in rows.to_dict("records"):
        name, text = row["rlnTomoName"], row["rlnTomoTiltSeriesStarFile"]
        file = resolve_path(text, tomograms)
        if file is None:
            raise InputError(f"{tomograms}: file '{text}' was not found; correct its path.")
        table = as_table(find_block(read_star(file), name, file))
        require_columns(table, TILT_COLUMNS, file, name)
        missing = {column: 0.0 for column in OPTIONAL_TILT_COLUMNS if column not in table.columns}
        pixel_size, voltage, cs, contrast = (float(row[column]) for column in optics)
        result[name] = TiltSeries(
            name=name,
            size=tuple(int(row[column]) for column in sizes),
            pixel_size=pixel_size,
            table=table.assign(**missing),
            voltage_kv=voltage,
            cs_mm=cs,
            amplitude_contrast=contrast,
            hand=float(row["rlnTomoHand"]),
        )
    return result


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


def shift_phases(fractions: np.ndarray, box: int, device: Device = HOST) -> Any:
    """Factors `(n, box, box // 2 + 1)` on the device that move images by `fractions` `(n, 2)` px along x and y."""
    along_x = np.exp(-2j * np.pi * fractions[:, 0, None] * np.arange(box // 2 + 1) / box)
    along_y = np.exp(-2j * np.pi * fractions[:, 1, None] * np.fft.fftfreq(box))
    return device.put(along_y)[:, :, None] * device.put(along_x)[:, None, :]


def render_tilt_images(
    series: TiltSeries, density: np.ndarray, centres: np.ndarray, rotations: np.ndarray, backend: Backend | None = None
) -> Any:
    """Noise-free tilt images of particles: protein dark, every particle with its own defocus.

    Parameters
    ----------
    density: `(box, box, box)` zyx at the pixel size of the series; `box` must leave room for the CTF's rings.
    centres: `(n, 3)` Å from the tomogram centre. rotations: `(n, 3, 3)`, x_tomogram = rotation @ x_reference.
    backend: who makes the images; None: this thread.

    Returns
    -------
    `(n_tilts, size_y, size_x)` float32 on the back-end's device.
    """
    backend = backend or Backend()
    device = backend.device
    xp, slices, box = device.xp, CentralSlices(density, device), density.shape[0]
    positions, depths = series.project(centres)
    width, height = series.size[:2]
    images = xp.zeros((len(series.table), height + 2 * box, width + 2 * box), np.float32)
    corners = np.round(positions).astype(int)
    inside = np.all((corners > -box // 2) & (corners < np.array([width, height]) + box // 2), axis=-1)

    def add_some(tilt: int, chosen: np.ndarray) -> None:
        spectra = slices(series.rotations[tilt] @ rotations[chosen])
        spectra *= shift_phases(positions[tilt, chosen] - corners[tilt, chosen], box, device)
        spectra *= -series.transfer([tilt], depths[tilt, chosen], box, device)
        patches = xp.fft.fftshift(xp.fft.irfft2(spectra, s=(box, box)), axes=(1, 2)).astype(np.float32)
        for patch, (x, y) in zip(patches, corners[tilt, chosen] + box // 2, strict=True):
            place = images[tilt, y : y + box, x : x + box]
            place += patch

    def add_all(tilt: int) -> None:
        with device.active():
            here = np.flatnonzero(inside[tilt])
            for first in range(0, len(here), PATCHES):
                add_some(tilt, here[first : first + PATCHES])

    backend.map(add_all, range(len(images)))
    return images[:, box : box + height, box : box + width]
