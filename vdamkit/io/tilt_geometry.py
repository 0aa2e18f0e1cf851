"""Tilt geometry: how every tilt image looks at the tomogram, and what its CTF and dose are."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vdamkit.errors import InputError
from vdamkit.io.star_tables import (
    as_table,
    find_block,
    numeric_column,
    read_star,
    require_columns,
    resolve_path,
    text_column,
    vector_column,
)

PROJECTION_COLUMNS = ("rlnTomoProjX", "rlnTomoProjY", "rlnTomoProjZ", "rlnTomoProjW")


def projection_rotation(x_tilt: np.ndarray, y_tilt: np.ndarray, z_rot: np.ndarray) -> np.ndarray:
    """Rotation of the tomogram into the frame of a tilt image.

    Parameters
    ----------
    x_tilt, y_tilt, z_rot: `(...)` float (broadcast together), degrees
        rlnTomoXTilt, rlnTomoYTilt, rlnTomoZRot.

    Returns
    -------
    `(..., 3, 3)` float64 ``R = Rz(z_rot) @ Ry(y_tilt) @ Rx(x_tilt)``, active right-handed rotations that
    left-multiply column vectors in xyz order: ``x_image = R @ x_tomogram``; row 2 is the beam direction.

    Source: RELION jaz/tomography/tomogram.cpp:setProjectionMatrix.
    """
    angles = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (x_tilt, y_tilt, z_rot)))
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians(angles)), np.sin(np.radians(angles))
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


@dataclass(frozen=True, eq=False)
class Tomogram:
    """One row of tomograms.star together with its tilt series; per-tilt arrays follow the file's order."""

    name: str  # rlnTomoName
    hand: float  # rlnTomoHand, +1 or -1: sign of the depth in the defocus
    pixel_size: float  # Å, unbinned (rlnTomoTiltSeriesPixelSize)
    size: np.ndarray  # (3,) float64, unbinned px, xyz (rlnTomoSizeX/Y/Z)
    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float
    optics_group_name: str  # "" where the file has none
    defocus_slope: float  # rlnTomoDefocusSlope, 1 by default
    b_factor_per_dose: float  # Å² per e/Å² (rlnCtfBfactorPerElectronDose), 0 by default
    rotations: np.ndarray  # (n_tilts, 3, 3) float64: x_image = R @ x_tomogram, xyz
    projection: np.ndarray | None  # (n_tilts, 4, 4) float64, unbinned px, rlnTomoProjX/Y/Z/W if there
    defocus_u: np.ndarray  # (n_tilts,) Å, at the tomogram's centre
    defocus_v: np.ndarray  # (n_tilts,) Å
    defocus_angle: np.ndarray  # (n_tilts,) degrees
    phase_shift: np.ndarray  # (n_tilts,) degrees, 0 by default
    ctf_scale: np.ndarray  # (n_tilts,) rlnCtfScalefactor, 1 by default
    dose: np.ndarray  # (n_tilts,) e/Å² before the exposure (rlnMicrographPreExposure)

    @property
    def n_tilts(self) -> int:
        """Number of tilt images in the series."""
        return len(self.dose)

    def depths(self, points: np.ndarray) -> np.ndarray:
        """Height of a point along the beam in every tilt, ``(P_f x - P_f centre)_z`` in Å.

        Parameters
        ----------
        points: `(..., 3)` float
            xyz in Å from the tomogram's centre (half of `size`).

        Returns
        -------
        `(..., n_tilts)` float64, Å. The defocus there is ``defocus + hand * defocus_slope * depth``.

        Source: RELION jaz/tomography/tomogram.cpp:getDepthOffset.
        """
        beam = self.rotations[:, 2, :] if self.projection is None else self.projection[:, 2, :3]
        return np.asarray(points, np.float64) @ beam.T


def read_tomograms(path: str | os.PathLike, *, names: Collection[str] | None = None) -> dict[str, Tomogram]:
    """Read tomograms.star and the tilt-series files it names; images are never opened.

    Parameters
    ----------
    path: the tomograms.star file. Tilt-series paths are looked for from the current directory, then from
        the file's own folder and its parents.
    names: tomograms wanted; the others' tilt series are not read. Default: all.

    Returns
    -------
    Tomograms by name, in the order of the file.

    Raises
    ------
    InputError: a missing file, block, column or value.

    Source: RELION jaz/tomography/tomogram_set.cpp:read, loadTomogram.
    """
    path = Path(path)
    blocks = read_star(path)
    table = as_table(find_block(blocks, "global", path))
    require_columns(table, ["rlnTomoName"], path, "global")
    all_names = text_column(table, "rlnTomoName", path, "global")
    if not len(all_names):
        raise InputError(f"{path}: data_global has no rows; give a file with at least one tomogram.")
    duplicated = pd.Series(all_names).duplicated().to_numpy()
    if duplicated.any():
        row = int(np.argmax(duplicated))
        raise InputError(
            f"{path}: data_global row {row + 1}, column rlnTomoName: '{all_names[row]}' was already named in "
            f"an earlier row; remove or rename one of them."
        )
    columns = _global_columns(table, path)
    result = {}
    for row, name in enumerate(all_names):
        if names is not None and name not in names:
            continue
        tilts, tilt_path, block = _tilt_table(table, row, name, blocks, path)
        values = {key: column[row] if column.ndim > 1 else column.item(row) for key, column in columns.items()}
        result[name] = Tomogram(name=name, **values, **_tilt_arrays(tilts, tilt_path, block))
    return result


def _global_columns(table: pd.DataFrame, path: Path) -> dict[str, np.ndarray]:
    """Checked columns of data_global as arrays with one entry per tomogram."""

    def number(column: str, default: float | None = None) -> np.ndarray:
        return numeric_column(table, column, path, "global", default=default)

    hand, pixel_size = number("rlnTomoHand"), number("rlnTomoTiltSeriesPixelSize")
    size = np.stack([number(f"rlnTomoSize{axis}") for axis in "XYZ"], -1)
    checks = [
        ("rlnTomoHand", hand, np.abs(hand) == 1, "the hand is 1 or -1"),
        (
            "rlnTomoTiltSeriesPixelSize",
            pixel_size,
            pixel_size > 0,
            "give the unbinned pixel size in Å, above 0",
        ),
    ]
    for column, values, good, remedy in checks:
        if not good.all():
            row = int(np.argmin(good))
            raise InputError(f"{path}: data_global row {row + 1}, column {column}: value {values[row]:g} is wrong; {remedy}.")
    optics_names = np.full(len(table), "", object)
    if "rlnOpticsGroupName" in table.columns:
        optics_names = text_column(table, "rlnOpticsGroupName", path, "global")
    return {
        "hand": hand,
        "pixel_size": pixel_size,
        "size": size,
        "voltage_kv": number("rlnVoltage"),
        "cs_mm": number("rlnSphericalAberration"),
        "amplitude_contrast": number("rlnAmplitudeContrast"),
        "optics_group_name": optics_names,
        "defocus_slope": number("rlnTomoDefocusSlope", 1.0),
        "b_factor_per_dose": number("rlnCtfBfactorPerElectronDose", 0.0),
    }


def _tilt_table(table: pd.DataFrame, row: int, name: str, blocks: dict, path: Path) -> tuple[pd.DataFrame, Path, str]:
    """Tilt-series table of one tomogram, with the file and block it came from.

    RELION 5 names a file per tomogram; RELION 4 keeps the tables as blocks of tomograms.star itself.
    """
    column = "rlnTomoTiltSeriesStarFile"
    if column not in table.columns:
        if name not in blocks:
            raise InputError(
                f"{path}: data_global has no column {column} and there is no block data_{name}; give the "
                f"tomograms.star written by RELION's tomogram import or reconstruction job."
            )
        return as_table(blocks[name]), path, name
    text = text_column(table, column, path, "global")[row]
    tilt_path = resolve_path(text, path)
    if tilt_path is None:
        raise InputError(
            f"{path}: data_global row {row + 1}, column {column}: file '{text}' was not found from the "
            f"current directory or from any folder above {path.name}; start from the project folder or "
            f"correct the path."
        )
    tilt_blocks = read_star(tilt_path)
    if name in tilt_blocks:
        return as_table(tilt_blocks[name]), tilt_path, name
    if len(tilt_blocks) == 1:
        block = next(iter(tilt_blocks))
        return as_table(tilt_blocks[block]), tilt_path, block
    raise InputError(
        f"{tilt_path}: no block data_{name} (found: {', '.join('data_' + b for b in tilt_blocks)}); the "
        f"block must be named like the tomogram, correct its name or rlnTomoName in {path}."
    )


def _tilt_arrays(tilts: pd.DataFrame, path: Path, block: str) -> dict[str, np.ndarray | None]:
    """Per-tilt arrays of a tilt-series table."""
    if not len(tilts):
        raise InputError(f"{path}: data_{block} has no rows; a tilt series needs at least one tilt.")

    def number(column: str, default: float | None = None) -> np.ndarray:
        return numeric_column(tilts, column, path, block, default=default)

    projection = None
    if all(column in tilts.columns for column in PROJECTION_COLUMNS):
        rows = [vector_column(tilts, column, path, block, length=4) for column in PROJECTION_COLUMNS]
        projection = np.stack(rows, -2)
        rotations = projection[:, :3, :3].copy()
    else:
        require_columns(tilts, ["rlnTomoYTilt", "rlnTomoZRot"], path, block)
        rotations = projection_rotation(number("rlnTomoXTilt", 0.0), number("rlnTomoYTilt"), number("rlnTomoZRot"))
    required = ["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnMicrographPreExposure"]
    require_columns(tilts, required, path, block)
    return {
        "rotations": rotations,
        "projection": projection,
        "defocus_u": number("rlnDefocusU"),
        "defocus_v": number("rlnDefocusV"),
        "defocus_angle": number("rlnDefocusAngle"),
        "phase_shift": number("rlnPhaseShift", 0.0),
        "ctf_scale": number("rlnCtfScalefactor", 1.0),
        "dose": number("rlnMicrographPreExposure"),
    }
