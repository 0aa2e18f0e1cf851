"""Columns of particles.star as checked arrays, computed for all rows at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from vdamkit.errors import InputError
from vdamkit.io.particle import Optics
from vdamkit.io.star_tables import (
    cell_error,
    numeric_column,
    parse_vector,
    require_columns,
    text_column,
)
from vdamkit.io.tilt_geometry import Tomogram

SMALLEST_BOX = 8


def stack2d_flag(general: dict, optics_table: pd.DataFrame, path: Path) -> bool:
    """Whether particles are 2D stacks: rlnTomoSubTomosAre2DStacks of data_general, 0 where it is missing.

    Source: RELION jaz/single_particle/obs_model.cpp:loadSafely.
    """
    name = "rlnTomoSubTomosAre2DStacks"
    value = general.get(name, 0)
    if value not in (0, 1):
        remedy = "write 1 for 2D stacks, else 0"
        raise cell_error(path, "general", 0, name, value, "is neither 0 nor 1", remedy)
    dimensionality = "rlnImageDimensionality"
    if dimensionality in optics_table.columns:
        expected = 2 if value else 3
        for row, found in enumerate(numeric_column(optics_table, dimensionality, path, "optics")):
            if found != expected:
                wrong = f"contradicts {name} = {value} in data_general"
                remedy = "set that flag to 1 for 2D stacks and to 0 for 3D pseudo-subtomograms"
                raise cell_error(path, "optics", row, dimensionality, found, wrong, remedy)
    return bool(value)


def read_optics(table: pd.DataFrame, path: Path) -> tuple[Optics, ...]:
    """Rows of data_optics, in the order of the file.

    Raises
    ------
    InputError: a missing column, an odd or tiny box, a pixel size that is not above 0, a contrast in percent, a number used
        twice.
    """
    if not len(table):
        raise InputError(f"{path}: data_optics has no rows; give a particles file with its optics groups.")

    def number(column: str, default: float | None = None) -> np.ndarray:
        return numeric_column(table, column, path, "optics", default=default)

    required = ("rlnOpticsGroup", "rlnImagePixelSize", "rlnImageSize", "rlnVoltage")
    require_columns(table, (*required, "rlnSphericalAberration", "rlnAmplitudeContrast"), path, "optics")
    groups, boxes = number("rlnOpticsGroup"), number("rlnImageSize")
    pixels, voltages = number("rlnImagePixelSize"), number("rlnVoltage")
    names = [f"opticsGroup{int(group)}" for group in groups]
    if "rlnOpticsGroupName" in table.columns:
        names = list(text_column(table, "rlnOpticsGroupName", path, "optics"))
    cs, contrast = number("rlnSphericalAberration"), number("rlnAmplitudeContrast")
    _check_optics(groups, boxes, pixels, voltages, contrast, path)
    premultiplied = number("rlnCtfDataAreCtfPremultiplied", 0.0)
    corrected = number("rlnCtfDataAreCtfCorrected", 0.0)
    return tuple(
        Optics(
            number=int(groups[row]),
            name=names[row],
            voltage_kv=float(voltages[row]),
            cs_mm=float(cs[row]),
            amplitude_contrast=float(contrast[row]),
            pixel_size=float(pixels[row]),
            box=int(boxes[row]),
            premultiplied=bool(premultiplied[row]),
            ctf_corrected=bool(corrected[row]),
        )
        for row in range(len(table))
    )


def _check_optics(
    groups: np.ndarray, boxes: np.ndarray, pixels: np.ndarray, voltages: np.ndarray, contrasts: np.ndarray, path: Path
) -> None:
    """Raise InputError naming the first group with an impossible number, box, pixel size, voltage or contrast."""
    checks = [
        (
            "rlnOpticsGroup",
            groups,
            groups == np.round(groups),
            "is not a whole number",
            "number the groups 1, 2, …",
        ),
        (
            "rlnOpticsGroup",
            groups,
            ~pd.Series(groups).duplicated(),
            "is used twice",
            "number each group once",
        ),
        (
            "rlnImageSize",
            boxes,
            (boxes >= SMALLEST_BOX) & (boxes % 2 == 0),
            f"is not an even box of at least {SMALLEST_BOX} px",
            "extract the particles with such a box",
        ),
        ("rlnImagePixelSize", pixels, pixels > 0, "is not above 0", "give the pixel size in Å"),
        ("rlnVoltage", voltages, voltages > 0, "is not above 0", "give the voltage in kV"),
        (
            "rlnAmplitudeContrast",
            contrasts,
            (contrasts >= 0) & (contrasts <= 1),
            "is not between 0 and 1",
            "give it as a fraction, such as 0.1, not in percent",
        ),
    ]
    for column, values, good, wrong, remedy in checks:
        good = np.asarray(good)
        if not good.all():
            row = int(np.argmin(good))
            raise cell_error(path, "optics", row, column, values[row], wrong, remedy)


def optics_indices(table: pd.DataFrame, optics: tuple[Optics, ...], path: Path) -> np.ndarray:
    """`(n,)` int64: for each particle its row in `optics`, from 0."""
    groups = numeric_column(table, "rlnOpticsGroup", path, "particles")
    rows = pd.Index([group.number for group in optics]).get_indexer(groups)
    if (rows < 0).any():
        row = int(np.argmin(rows))
        numbers = ", ".join(str(group.number) for group in optics)
        wrong = f"is no optics group of data_optics (there: {numbers})"
        remedy = "correct it or add the group"
        raise cell_error(path, "particles", row, "rlnOpticsGroup", groups[row], wrong, remedy)
    return rows.astype(np.int64)


def triplet(
    table: pd.DataFrame,
    pattern: str,
    parts: tuple[str, str, str],
    path: Path,
    *,
    default: float,
    allow_nan: bool = False,
) -> np.ndarray:
    """`(n, 3)` float64 of three columns, `pattern` with each of `parts`; `default` where one is missing."""
    columns = [pattern.format(part) for part in parts]
    arrays = [numeric_column(table, column, path, "particles", default=default, allow_nan=allow_nan) for column in columns]
    return np.stack(arrays, -1)


def file_names(table: pd.DataFrame, column: str, path: Path) -> None:
    """Raise InputError unless every row of `column` names a whole file (no ``n@``)."""
    names = pd.Series(text_column(table, column, path, "particles"))
    at = names.str.contains("@", regex=False).to_numpy(bool)
    if at.any():
        row = int(np.argmax(at))
        wrong = "is a section of a stack (single-particle data)"
        remedy = "give subtomogram data, where each particle has its own file"
        raise cell_error(path, "particles", row, column, names[row], wrong, remedy)


def centred_coordinates(table: pd.DataFrame, names: np.ndarray, tomograms: dict[str, Tomogram], path: Path) -> np.ndarray:
    """Picked positions, `(n, 3)` float64, xyz, Å from the tomogram's centre.

    Either rlnCenteredCoordinateX/Y/ZAngst, or RELION-4 rlnCoordinateX/Y/Z (unbinned px from the corner).
    Source: RELION jaz/tomography/particle_set.cpp:getPosition.
    """
    centred = [f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]
    corner = [f"rlnCoordinate{axis}" for axis in "XYZ"]
    if any(column not in table.columns for column in centred) and all(c in table.columns for c in corner):
        if not tomograms:
            raise InputError(
                f"{path}: data_particles has the columns {', '.join(corner)} in tomogram pixels and no "
                f"tomograms file was given; give tomograms.star."
            )
        points = np.stack([numeric_column(table, column, path, "particles") for column in corner], -1)
        codes, unique = pd.factorize(names)
        half = np.stack([tomograms[name].size / 2 for name in unique])[codes]
        return (points - half) * np.array([tomograms[name].pixel_size for name in unique])[codes, None]
    require_columns(table, centred, path, "particles")
    return np.stack([numeric_column(table, column, path, "particles") for column in centred], -1)


def check_tomogram_names(names: np.ndarray, tomograms: dict[str, Tomogram], path: Path, tomograms_path: Path) -> None:
    """Raise InputError naming the first particle whose tomogram is not in tomograms.star."""
    codes, unique = pd.factorize(names)
    unknown = np.array([name not in tomograms for name in unique])[codes]
    if unknown.any():
        row = int(np.argmax(unknown))
        wrong = f"is not a tomogram of {tomograms_path} ({int(unknown.sum())} such particles)"
        remedy = "add that tomogram there or remove the particles"
        raise cell_error(path, "particles", row, "rlnTomoName", names[row], wrong, remedy)


def visible_tilts(
    table: pd.DataFrame, names: np.ndarray, tomograms: dict[str, Tomogram], path: Path
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Visible tilts of every particle (rlnTomoVisibleFrames), each different text parsed once.

    Returns
    -------
    patterns: each `(n_tilts,)` bool, in tilt-series order. index: `(n,)` int64, each particle's pattern.
    """
    column = "rlnTomoVisibleFrames"
    codes, texts = pd.factorize(text_column(table, column, path, "particles"))
    patterns = []
    for code, text in enumerate(texts):
        vector = parse_vector(text)
        if vector is None or not np.isin(vector, (0, 1)).all():
            row = int(np.argmax(codes == code))
            wrong = "is not a vector of 0 and 1"
            raise cell_error(path, "particles", row, column, text, wrong, "write it as [1,1,0,...]")
        patterns.append(vector == 1)
    tomogram_codes, unique = pd.factorize(names)
    expected = np.array([tomograms[name].n_tilts for name in unique])[tomogram_codes]
    found = np.array([len(pattern) for pattern in patterns])[codes]
    if (found != expected).any():
        row = int(np.argmax(found != expected))
        wrong = f"has {found[row]} entries but the tilt series of {names[row]} has {expected[row]} tilts"
        remedy = "use the tilt-series file the particles were extracted with"
        raise cell_error(path, "particles", row, column, texts[codes[row]], wrong, remedy)
    return tuple(patterns), codes.astype(np.int64)
