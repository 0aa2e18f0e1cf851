"""The particles of a job: particles.star, its tomograms, and each particle's files on demand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from vdamkit.errors import InputError
from vdamkit.io.optimisation_set import InputPaths, locate_inputs, read_trajectories
from vdamkit.io.particle import Optics, TiltStack, Volume
from vdamkit.io.particle_checks import problems
from vdamkit.io.particle_columns import (
    centred_coordinates,
    check_tomogram_names,
    file_names,
    optics_indices,
    read_optics,
    stack2d_flag,
    triplet,
    visible_tilts,
)
from vdamkit.io.particle_files import as_it_lies, load_stack, load_volume
from vdamkit.io.star_tables import as_list, as_table, find_block, read_star, require_columns, text_column
from vdamkit.io.tilt_geometry import Tomogram, read_tomograms
from vdamkit.sampling.euler import euler_to_matrix, upright

__all__ = ["ParticleSet", "open_particles", "problems"]


@dataclass(frozen=True, eq=False)
class ParticleSet:
    """All particles of a job as their STAR files describe them; arrays have one row per particle (n)."""

    table: pd.DataFrame  # data_particles, every input column untouched
    optics_table: pd.DataFrame  # data_optics, likewise
    general: dict  # data_general
    optics: tuple[Optics, ...]  # rows of data_optics
    optics_index: np.ndarray  # (n,) int64, row in `optics`, from 0
    is_stack2d: bool  # 2D stacks, else 3D pseudo-subtomograms
    box: int  # px, of the first optics group
    pixel_size: float  # Å, of the first optics group
    angles: np.ndarray  # (n, 3) rot, tilt, psi in degrees: the particle in its subtomogram's frame
    origins: np.ndarray  # (n, 3) xyz, Å: offset in the subtomogram's frame
    angle_priors: np.ndarray  # (n, 3) rot, tilt, psi in degrees, NaN where there is none
    origin_priors: np.ndarray  # (n, 3) xyz, Å, 0 where there is none
    subtomogram_rotations: np.ndarray  # (n, 3, 3): x_tomogram = A_sub @ x_subtomogram, xyz
    coordinates: np.ndarray  # (n, 3) xyz, Å from the tomogram's centre, as picked (origins not applied)
    tomogram_names: np.ndarray  # (n,) str objects
    tomograms: dict[str, Tomogram]  # by name; empty if none was given (3D only)
    paths: InputPaths
    group_index: np.ndarray  # (n,) int64, row in `group_names`
    group_names: tuple[str, ...]  # rlnGroupName, else the tomogram names
    visible_patterns: tuple[np.ndarray, ...]  # the different visible-tilt vectors, (n_tilts,) bool; 2D only
    visible_index: np.ndarray  # (n,) int64, row in `visible_patterns`
    trajectories: dict[str, np.ndarray] | None  # (n_tilts, 3) Å by particle name, see read_trajectories

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def file_names(self) -> dict[str, np.ndarray]:
        """Columns with names of image files, `(n,)` str objects each."""
        return {column: self.table[column].to_numpy(object) for column in image_columns(self.is_stack2d)}

    def load(self, i: int, *, locate: Callable[[Path], Path] = as_it_lies) -> TiltStack | Volume:
        """Read particle `i` (from 0) from its files; `locate` may send it to a local copy of each.

        Raises
        ------
        ParticleError: a file is missing, truncated, of the wrong shape, not finite, or all zero; the text
            names file, row (from 1) and column.
        """
        return load_stack(self, i, locate) if self.is_stack2d else load_volume(self, i, locate)


def open_particles(
    optimisation_set: str | os.PathLike | None = None,
    *,
    particles: str | os.PathLike | None = None,
    tomograms: str | os.PathLike | None = None,
    trajectories: str | os.PathLike | None = None,
) -> ParticleSet:
    """Read the STAR files of a job; images stay closed until :meth:`ParticleSet.load`.

    Parameters
    ----------
    optimisation_set: path of an optimisation_set.star.
    particles, tomograms, trajectories: STAR files given directly; they win over the set's. Tomograms may be
        missing for 3D pseudo-subtomograms with centred coordinates.

    Raises
    ------
    InputError: one sentence with file, row, column, value and remedy.

    Source: RELION exp_model.cpp:read, jaz/tomography/particle_set.cpp:read.
    """
    given = {"particles": particles, "tomograms": tomograms, "trajectories": trajectories}
    paths = locate_inputs(optimisation_set, **given)
    path = paths.particles_file
    blocks = read_star(path)
    table, optics_table = (as_table(find_block(blocks, name, path)) for name in ("particles", "optics"))
    general = as_list(blocks.get("general", {}))
    if not len(table):
        raise InputError(f"{path}: data_particles has no rows; give a file with at least one particle.")
    is_stack2d = stack2d_flag(general, optics_table, path)
    optics = read_optics(optics_table, path)
    require_columns(table, _required_columns(is_stack2d), path, "particles")
    for column in image_columns(is_stack2d):
        file_names(table, column, path)
    names = text_column(table, "rlnTomoName", path, "particles")
    tomogram_by_name = _tomograms_of(names, paths, is_stack2d)
    no_patterns = (), np.zeros(len(table), np.int64)
    visible = visible_tilts(table, names, tomogram_by_name, path) if is_stack2d else no_patterns
    group_index, group_names = _groups(table, names, path)
    return ParticleSet(
        table=table,
        optics_table=optics_table,
        general=general,
        optics=optics,
        optics_index=optics_indices(table, optics, path),
        is_stack2d=is_stack2d,
        box=optics[0].box,
        pixel_size=optics[0].pixel_size,
        **_pose_columns(table, path),
        coordinates=centred_coordinates(table, names, tomogram_by_name, path),
        tomogram_names=names,
        tomograms=tomogram_by_name,
        paths=paths,
        group_index=group_index,
        group_names=group_names,
        visible_patterns=visible[0],
        visible_index=visible[1],
        trajectories=read_trajectories(paths.trajectories_file) if paths.trajectories_file else None,
    )


def image_columns(is_stack2d: bool) -> tuple[str, ...]:
    """Columns of data_particles that name image files."""
    return ("rlnImageName",) if is_stack2d else ("rlnImageName", "rlnCtfImage")


def _pose_columns(table: pd.DataFrame, path: Path) -> dict[str, np.ndarray]:
    """Fields of ParticleSet that hold angles and offsets, `(n, 3)`, and the subtomogram rotations."""
    angles, axes = ("Rot", "Tilt", "Psi"), ("X", "Y", "Z")
    return {
        "angles": triplet(table, "rlnAngle{}", angles, path, default=0.0),
        "origins": triplet(table, "rlnOrigin{}Angst", axes, path, default=0.0),
        "angle_priors": upright(triplet(table, "rlnAngle{}Prior", angles, path, default=np.nan, allow_nan=True)),
        "origin_priors": triplet(table, "rlnOrigin{}PriorAngst", axes, path, default=0.0),
        "subtomogram_rotations": euler_to_matrix(triplet(table, "rlnTomoSubtomogram{}", angles, path, default=0.0)),
    }


def _required_columns(is_stack2d: bool) -> tuple[str, ...]:
    """Columns data_particles must have, besides the coordinates."""
    last = "rlnTomoVisibleFrames" if is_stack2d else "rlnCtfImage"
    return ("rlnTomoName", "rlnOpticsGroup", "rlnImageName", last)


def _tomograms_of(names: np.ndarray, paths: InputPaths, is_stack2d: bool) -> dict[str, Tomogram]:
    """The tomograms the particles lie in; empty where none were given and none are needed."""
    if paths.tomograms_file is None:
        if is_stack2d:
            raise InputError(
                f"{paths.particles_file}: its particles are 2D stacks and no tomograms file was given, but "
                f"the tilt geometry is needed; give tomograms=... or an optimisation set that names them."
            )
        return {}
    tomograms = read_tomograms(paths.tomograms_file, names=frozenset(names))
    check_tomogram_names(names, tomograms, paths.particles_file, paths.tomograms_file)
    return tomograms


def _groups(table: pd.DataFrame, tomogram_names: np.ndarray, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Group of each particle, `(n,)` int64 row in the tuple of names. Source: RELION exp_model.cpp:read."""
    column = "rlnGroupName"
    named = column in table.columns
    codes, unique = pd.factorize(text_column(table, column, path, "particles") if named else tomogram_names)
    return codes.astype(np.int64), tuple(unique)
