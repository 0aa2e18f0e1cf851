"""One particle's image files: found, checked and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vdamkit.errors import InputError, ParticleError
from vdamkit.io.mrc import mrc_header, open_mrc
from vdamkit.io.particle import TiltStack, Volume
from vdamkit.io.star_tables import resolve_path

if TYPE_CHECKING:
    from vdamkit.io.particles import ParticleSet

LARGEST = 1e15  # grey value whose transform can still be squared in single precision


def particle_error(particles: ParticleSet, i: int, column: str, text: str) -> ParticleError:
    """ParticleError whose text starts with the STAR file, the row (from 1) and the column."""
    where = f"{particles.paths.particles_file}: data_particles row {i + 1}, column {column}: "
    return ParticleError(where + text, index=i)


def as_it_lies(path: Path) -> Path:
    """The file itself: what `locate` is where no local copy is wanted."""
    return path


def find_file(particles: ParticleSet, i: int, column: str) -> Path:
    """File that `column` of particle `i` names, looked for as :func:`resolve_path` does."""
    star = particles.paths.particles_file
    name = particles.file_names[column][i]
    path = resolve_path(name, star)
    if path is None:
        text = f"file '{name}' was not found from the current directory or from any folder above {star.name}"
        remedy = "start from the project folder, restore the file or remove the particle"
        raise particle_error(particles, i, column, f"{text}; {remedy}.")
    return path


def check_header(particles: ParticleSet, i: int, column: str) -> Path:
    """Find a file of particle `i` and check its header, length and shape; ParticleError if they are wrong."""
    path = find_file(particles, i, column)
    try:
        shape, _, _ = mrc_header(path)
    except InputError as error:
        raise particle_error(particles, i, column, str(error)) from None
    _check_shape(particles, i, column, path, shape)
    return path


def load_stack(particles: ParticleSet, i: int, locate: Callable[[Path], Path] = as_it_lies) -> TiltStack:
    """Read a particle extracted as 2D stack.

    The file holds one section per visible tilt, or one per tilt of the series (then the invisible ones are
    left out). Sections that are zero everywhere are left out as well.

    Raises
    ------
    ParticleError: see :meth:`ParticleSet.load`.

    Source: RELION exp_model.cpp:read, addImageToParticle; jaz/tomography/tomogram.cpp:getCtf.
    """
    column = "rlnImageName"
    data, path = _open(particles, i, column, locate)
    tilts = np.flatnonzero(particles.visible_patterns[particles.visible_index[i]])
    images = np.array(data if len(data) == len(tilts) else data[tilts], np.float32)
    _check_values(particles, i, column, path, images)
    present = images.any(axis=(1, 2))
    if not present.all():
        images, tilts = images[present], tilts[present]
    tomogram = particles.tomograms[particles.tomogram_names[i]]
    defocus = tomogram.hand * tomogram.defocus_slope * tilt_depths(particles, i)[tilts]
    return TiltStack(
        images=images,
        rotations=tomogram.rotations[tilts] @ particles.subtomogram_rotations[i],
        defocus_u=tomogram.defocus_u[tilts] + defocus,
        defocus_v=tomogram.defocus_v[tilts] + defocus,
        defocus_angle=tomogram.defocus_angle[tilts],
        phase_shift=tomogram.phase_shift[tilts],
        ctf_scale=tomogram.ctf_scale[tilts],
        dose=tomogram.dose[tilts],
        b_factor_per_dose=tomogram.b_factor_per_dose,
        optics=particles.optics[particles.optics_index[i]],
    )


def tilt_depths(particles: ParticleSet, i: int) -> np.ndarray:
    """Height of particle `i` along the beam in every tilt of its series, `(n_tilts,)` Å from the centre.

    At ``coordinate - A_sub @ origin`` with the origins of the input file, plus the particle's trajectory.
    Source: RELION jaz/tomography/particle_set.cpp:getPosition, getTrajectoryInPixels.
    """
    tomogram = particles.tomograms[particles.tomogram_names[i]]
    position = particles.coordinates[i] - particles.subtomogram_rotations[i] @ particles.origins[i]
    depths = tomogram.depths(position)
    column = "rlnTomoParticleName"
    if not particles.trajectories or column not in particles.table.columns:
        return depths
    name = particles.table[column].iloc[i]
    motion = particles.trajectories.get(name)
    if motion is None:
        return depths
    if len(motion) != tomogram.n_tilts:
        where = f"trajectory of '{name}' in {particles.paths.trajectories_file}"
        text = f"has {len(motion)} rows but the tilt series has {tomogram.n_tilts} tilts"
        remedy = "use the trajectories made with this tilt series, or none"
        raise particle_error(particles, i, column, f"{where} {text}; {remedy}.")
    return depths + np.diagonal(tomogram.depths(motion))


def load_volume(particles: ParticleSet, i: int, locate: Callable[[Path], Path] = as_it_lies) -> Volume:
    """Read a particle extracted as 3D pseudo-subtomogram, with its CTF² and multiplicity.

    Raises
    ------
    ParticleError: see :meth:`ParticleSet.load`.

    Source: RELION ml_optimiser.cpp:get3DCTFAndMulti.
    """
    data, path = _open(particles, i, "rlnImageName", locate)
    data = np.array(data, np.float32)
    _check_values(particles, i, "rlnImageName", path, data)
    weights, path = _open(particles, i, "rlnCtfImage", locate)
    weights = np.array(weights, np.float32)
    _check_values(particles, i, "rlnCtfImage", path, weights)
    ctf2, multiplicity = split_weights(weights)
    return Volume(data, ctf2, multiplicity, particles.optics[particles.optics_index[i]])


def split_weights(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """CTF² and multiplicity of a weights file in rfft layout.

    Parameters
    ----------
    weights: zyx; `(n, n, n)` full transform with the origin at n//2, or `(n, n, n//2 + 1)` half transform
        with the origin at 0, or `(2n, n, n//2 + 1)` the same with the multiplicity in its second half.

    Returns
    -------
    ctf2, multiplicity: `(n, n, n//2 + 1)` float32, zyx, origin at index 0, absolute values; multiplicity is
    None where the file has none. A full transform is read at -k, as RELION does.

    Source: RELION ml_optimiser.cpp:get3DCTFAndMulti.
    """
    n = weights.shape[1]
    weights = np.abs(weights)
    if weights.shape[0] == 2 * n:
        return np.ascontiguousarray(weights[:n]), np.ascontiguousarray(weights[n:])
    if weights.shape[2] == n:
        index = (n // 2 - np.arange(n)) % n
        weights = weights[np.ix_(index, index, index[: n // 2 + 1])]
    return np.ascontiguousarray(weights), None


def _open(particles: ParticleSet, i: int, column: str, locate: Callable[[Path], Path]) -> tuple[np.ndarray, Path]:
    """Memory-mapped array of a particle's file, of a shape that was checked, and the path of what was read."""
    path = locate(find_file(particles, i, column))
    try:
        data, _ = open_mrc(path)
    except InputError as error:
        raise particle_error(particles, i, column, str(error)) from None
    _check_shape(particles, i, column, path, data.shape)
    return data, path


def _check_shape(particles: ParticleSet, i: int, column: str, path: Path, shape: tuple[int, ...]) -> None:
    """Raise ParticleError unless a file of this shape can belong to `column` of particle `i`."""
    n = particles.optics[particles.optics_index[i]].box
    if particles.is_stack2d:
        visible = particles.visible_patterns[particles.visible_index[i]]
        allowed = [(int(visible.sum()), n, n), (len(visible), n, n)]
        meaning = "one section per visible tilt, or one per tilt, of rlnImageSize squared"
        if not visible.any():
            text = f"{path}: no tilt is visible (rlnTomoVisibleFrames is 0 everywhere); remove the particle."
            raise particle_error(particles, i, column, text)
    elif column == "rlnImageName":
        allowed, meaning = [(n, n, n)], "a cube of rlnImageSize"
    else:
        allowed, meaning = [(n, n, n), (n, n, n // 2 + 1), (2 * n, n, n // 2 + 1)], "CTF² of that box"
    if tuple(shape) not in allowed:
        expected = " or ".join(_size(item) for item in dict.fromkeys(allowed))
        text = f"{path}: is {_size(shape)} voxels (x, y, z) but {expected} were expected ({meaning})"
        raise particle_error(particles, i, column, f"{text}; extract it again or correct rlnImageSize.")


def _size(shape: tuple[int, ...]) -> str:
    """Shape (zyx) as people write it: x x y x z."""
    return " x ".join(str(length) for length in reversed(shape))


def _check_values(particles: ParticleSet, i: int, column: str, path: Path, values: np.ndarray) -> None:
    """Raise ParticleError where values are not finite, too large to compute with, or all zero."""
    good = np.abs(values) <= LARGEST  # neither is NaN
    if not good.all():
        where = np.unravel_index(int(np.argmin(good)), values.shape)
        text = f"{path}: value {values[where]:g} at section {where[0] + 1} is not a number of at most {LARGEST:g}"
        raise particle_error(particles, i, column, f"{text}; extract it again or remove the particle.")
    if not values.any():
        text = f"{path}: every value is 0"
        raise particle_error(particles, i, column, f"{text}; extract it again or remove the particle.")
