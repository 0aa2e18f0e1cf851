"""Tilt series: geometry, dose and CTF as in RELION's tomograms.star."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vdamkit.backend.device import HOST, Device
from vdamkit.errors import InputError
from vdamkit.imaging.ctf import ctf, dose_envelope
from vdamkit.io.star_tables import as_table, find_block, read_star, require_columns, resolve_path
from vdamkit.io.tilt_geometry import projection_rotation


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


class Transfer:
    """CTF times dose envelope of images of one tilt series; what belongs to the tilts is made once."""

    def __init__(self, series: TiltSeries, box: int, device: Device = HOST):
        """box: px, of the images. device: where the results are made."""

        def column(name: str, default: float = 0.0) -> Any:
            values = series.table[name].to_numpy(np.float64) if name in series.table else np.full(len(series.table), default)
            return device.put(values[:, None, None])

        axes = np.fft.fftfreq(box, series.pixel_size), np.fft.rfftfreq(box, series.pixel_size)
        self._fy, self._fx = (device.put(f) for f in np.meshgrid(*axes, indexing="ij"))
        self._series = series
        self._of_tilts = {
            "defocus_u": column("rlnDefocusU"),
            "defocus_v": column("rlnDefocusV"),
            "defocus_angle": column("rlnDefocusAngle"),
            "phase_shift": column("rlnPhaseShift"),
            "scale": column("rlnCtfScalefactor", 1.0),
        }
        self._envelopes = dose_envelope(np.hypot(self._fx, self._fy), column("rlnMicrographPreExposure"))

    def __call__(self, tilts: Any, depths: Any) -> Any:
        """The functions of several images of particles.

        The defocus of a particle is that of the image plus ``hand * depth``
        (RELION tomogram.cpp:getCtf, getDepthOffset).

        Parameters
        ----------
        tilts: `(n,)` rows of the series' table, or `(1,)` for all. depths: `(n,)` Å. Both on the device.

        Returns
        -------
        `(n, box, box // 2 + 1)` float64 on the device, rfft2 layout (y, x). Sign as in :func:`vdamkit.imaging.ctf.ctf`:
        positive at low frequency for an underfocused image, so protein is dark in ``-transfer * projection``.
        """
        series, offset = self._series, self._series.hand * depths[:, None, None]
        of_images = {name: values[tilts] for name, values in self._of_tilts.items()}
        value = ctf(
            self._fx,
            self._fy,
            defocus_u=of_images.pop("defocus_u") + offset,
            defocus_v=of_images.pop("defocus_v") + offset,
            voltage_kv=series.voltage_kv,
            cs_mm=series.cs_mm,
            amplitude_contrast=series.amplitude_contrast,
            **of_images,
        )
        return value * self._envelopes[tilts]


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
