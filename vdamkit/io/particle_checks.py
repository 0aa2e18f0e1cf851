"""Everything that can be found wrong with a set of particles without reading their images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vdamkit.errors import ParticleError
from vdamkit.io.particle_files import check_header, tilt_depths
from vdamkit.io.star_tables import parse_vector

if TYPE_CHECKING:
    from vdamkit.io.particles import ParticleSet

UNSUPPORTED = (
    "rlnOddZernike",
    "rlnEvenZernike",
    "rlnMagMat00",
    "rlnMagMat01",
    "rlnMagMat10",
    "rlnMagMat11",
    "rlnMtfFileName",
    "rlnBeamTiltX",
    "rlnBeamTiltY",
)
"""Columns of data_optics that would change the image formation and are not modelled."""

VOLTAGES = (50.0, 1000.0)  # kV, of microscopes
LEAST_DEFOCUS = 100.0  # Å, below which numbers are rather micrometres
THREADS = 8  # waiting for a file server, not computing


def problems(particle_set: ParticleSet, *, mask_diameter: float | None = None, limit: int = 50) -> list[str]:
    """Check headers of all files at once, and the columns that would be ignored.

    Parameters
    ----------
    mask_diameter: Å; checked against the box.
    limit: number of sentences about files before the rest is only counted.

    Returns
    -------
    One sentence per problem with file, row, column, value and remedy; those that do not stand in the way of a
    run start with "warning:". Empty where nothing is wrong.
    """
    found = _mask_problems(particle_set, mask_diameter)
    columns = ("rlnImageName",) if particle_set.is_stack2d else ("rlnImageName", "rlnCtfImage")
    for column in columns:
        found += _file_problems(particle_set, column)
    found += _trajectory_problems(particle_set)
    hidden = len(found) - limit
    if hidden > 0:
        found = [
            *found[:limit],
            f"{particle_set.paths.particles_file}: and {hidden} more problems like these.",
        ]
    return found + _warnings(particle_set) + _unlikely_values(particle_set)


def _mask_problems(particles: ParticleSet, mask_diameter: float | None) -> list[str]:
    """The mask must fit the box."""
    width = particles.box * particles.pixel_size
    if mask_diameter is None or 0 < mask_diameter <= width:
        return []
    return [
        f"Mask diameter {mask_diameter:g} Å does not fit the box of {particles.box} px x "
        f"{particles.pixel_size:g} Å = {width:g} Å; choose one above 0 and at most {width:g} Å."
    ]


def _file_problems(particles: ParticleSet, column: str) -> list[str]:
    """Problems of the different files of one column: each file is opened once, for its first row."""
    names = particles.table[column]
    rows = np.flatnonzero(~names.duplicated().to_numpy())

    def sentence(i: int) -> str | None:
        try:
            check_header(particles, int(i), column)
        except ParticleError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        return [text for text in pool.map(sentence, rows) if text is not None]


def _trajectory_problems(particles: ParticleSet) -> list[str]:
    """Particles whose trajectory does not fit their tilt series."""
    if not particles.trajectories or not particles.is_stack2d:
        return []
    found = []
    for i in range(len(particles)):
        try:
            tilt_depths(particles, i)
        except ParticleError as error:
            found.append(str(error))
    return found


def _warnings(particles: ParticleSet) -> list[str]:
    """What is odd or will be ignored."""
    path, found = particles.paths.particles_file, []
    for column in UNSUPPORTED:
        if column in particles.optics_table.columns and _has_effect(column, particles.optics_table[column]):
            row, value = _first_effect(column, particles.optics_table[column])
            found.append(
                f"warning: {path}: data_optics row {row + 1}, column {column}: value {value} is ignored, "
                f"this aberration is not modelled; correct for it at extraction or set it aside knowingly."
            )
    for index, group in enumerate(particles.optics):
        if not particles.is_stack2d and not group.premultiplied and not group.ctf_corrected:
            found.append(
                f"warning: {path}: data_optics row {index + 1}, column rlnCtfDataAreCtfPremultiplied: value "
                f"0 but pseudo-subtomograms are taken as premultiplied; extract them as such or set it to 1."
            )
        if (group.box, group.pixel_size) != (particles.box, particles.pixel_size):
            found.append(
                f"warning: {path}: data_optics row {index + 1}, column rlnImageSize: value {group.box} px at "
                f"{group.pixel_size:g} Å differs from the first group ({particles.box} px at "
                f"{particles.pixel_size:g} Å), which sets the map's; extract all groups alike."
            )
    duplicated = particles.table["rlnImageName"].duplicated()
    if duplicated.any():
        row = int(np.argmax(duplicated.to_numpy()))
        found.append(
            f"warning: {path}: data_particles row {row + 1}, column rlnImageName: value "
            f"'{particles.table['rlnImageName'].iloc[row]}' also stands in an earlier row "
            f"({int(duplicated.sum())} such rows); remove duplicates."
        )
    return found


def _unlikely_values(particles: ParticleSet) -> list[str]:
    """Numbers that can be used but look as if they were in another unit, or of another tomogram."""
    path, found = particles.paths.particles_file, []
    for row, group in enumerate(particles.optics, start=1):
        if not VOLTAGES[0] <= group.voltage_kv <= VOLTAGES[1]:
            found.append(f"warning: {path}: data_optics row {row}, column rlnVoltage: value {group.voltage_kv:g} is no voltage "
                         "of a microscope in kV; correct it.")  # fmt: skip
    for tomogram in particles.tomograms.values():
        largest = float(np.abs([tomogram.defocus_u, tomogram.defocus_v]).max(initial=0))
        if 0 < largest < LEAST_DEFOCUS:
            found.append(f"warning: tilt series {tomogram.name}, columns rlnDefocusU and rlnDefocusV: no value is above "
                         f"{largest:g} Å; they must be in Å, not in µm.")  # fmt: skip
    width = particles.box * particles.pixel_size
    reach = np.full_like(particles.coordinates, np.inf)
    for name, tomogram in particles.tomograms.items():
        reach[particles.tomogram_names == name] = 0.5 * tomogram.size * tomogram.pixel_size
    for what, values, limits, where in (
        ("rlnCenteredCoordinate{}Angst", particles.coordinates, reach, "outside its tomogram"),
        ("rlnOrigin{}Angst", particles.origins, np.full_like(particles.origins, width / 2), "outside the particle's box"),
    ):
        far = np.abs(values) > np.where(limits > 0, limits, np.inf)
        if far.any():
            row, axis = np.argwhere(far)[0]
            found.append(
                f"warning: {path}: data_particles row {row + 1}, column {what.format('XYZ'[axis])}: value "
                f"{values[row, axis]:g} Å lies {where} ({int(far.any(1).sum())} such rows); correct it."
            )
    return found


def _has_effect(column: str, values: pd.Series) -> bool:
    return _first_effect(column, values) is not None


def _first_effect(column: str, values: pd.Series) -> tuple[int, object] | None:
    """Row and value of the first entry that differs from "no effect" (0, identity, an empty name)."""
    neutral = 1.0 if column in ("rlnMagMat00", "rlnMagMat11") else 0.0
    for row, value in enumerate(values):
        if isinstance(value, str):
            vector = parse_vector(value)
            effect = bool(vector.any()) if vector is not None else value not in ("", "None")
        else:
            effect = bool(value != neutral)
        if effect:
            return row, value
    return None
