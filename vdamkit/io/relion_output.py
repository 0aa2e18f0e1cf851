"""RELION's files of a run: STAR files, maps and moments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from vdamkit.io.mrc import write_mrc
from vdamkit.io.particles import ParticleSet
from vdamkit.io.relion_model import (
    VERSION_LINE,
    FileNames,
    fourier_scale,
    model_blocks,
    sampling_blocks,
)
from vdamkit.io.relion_optimiser import optimiser_block, optimiser_comments
from vdamkit.io.star_tables import Block, write_star
from vdamkit.settings import Settings
from vdamkit.state import State


def write_relion_files(
    folder: str | Path,
    state: State,
    settings: Settings,
    particles: ParticleSet,
    *,
    command: str = "",
    final: bool = False,
    model: State | None = None,
) -> list[Path]:
    """Write ``run_itNNN_*`` of one mini-batch, in RELION's names, blocks, columns and units.

    Maps and moments are divided by `state.grey_scale`: they are in the grey values of the data (first moments
    of 2D stacks are N times that, as RELION's transforms are). Names inside the files are `folder` / name, as
    seen from the current directory, like RELION's.

    Parameters
    ----------
    folder: an existing folder. state, settings: of the mini-batch. particles: those of the run.
    command: command line, kept as a comment in the optimiser file.
    final: also write ``run_optimisation_set.star`` and ``initial_model.mrc`` (the most populated class).
    model: state of that map and of the particles that refer to it, where it is not `state`: a run in C1 whose symmetry was
    applied. Its particles are in ``initial_model_data.star``, which ``run_optimisation_set.star`` then names.

    Returns
    -------
    The files, in the order they were written; the optimisation sets come last, so that whoever sees one finds
    all that it names.

    Raises
    ------
    OutputError: no permission, no such folder, or the disc is full; every file is the old one or complete.

    Source: RELION ml_optimiser.cpp:write, ml_model.cpp:write, healpix_sampling.cpp:write.
    """
    names = FileNames(Path(folder), state.iteration, len(state.maps))
    written = _write_maps(names, state, particles)

    def star(path: Path, blocks: dict[str, Block], comments: tuple[str, ...] = ()) -> None:
        write_star(path, blocks, comments=(*comments, VERSION_LINE))
        written.append(path)

    star(names.data, data_blocks(state, particles))
    star(names.model, model_blocks(names, state, settings, particles))
    if state.iteration > 0:
        star(names.sampling, sampling_blocks(state, settings, particles.pixel_size))
    optimiser = optimiser_block(names, state, settings, particles)
    star(names.optimiser, {"optimiser_general": optimiser}, optimiser_comments(names, command))
    optimisation_set = {"": optimisation_set_block(names, particles)}
    star(names.star("optimisation_set"), optimisation_set)
    if final:
        shown = state if model is None else model
        best = int(np.argmax(shown.class_probability))
        path = names.folder / "initial_model.mrc"
        write_mrc(path, shown.maps[best] / shown.grey_scale, particles.pixel_size)
        written.append(path)
        if model is not None:
            moved = names.folder / "initial_model_data.star"
            star(moved, data_blocks(model, particles))
            optimisation_set[""]["rlnTomoParticlesFile"] = moved.as_posix()
        star(names.folder / "run_optimisation_set.star", optimisation_set)
    return written


# particles --------------------------------------------------------------------------------------------


def pose_columns(state: State) -> dict[str, np.ndarray]:
    """Every particle's pose under RELION's column names, `(n,)` each; degrees and Å.

    rlnClassNumber 0 marks a particle that was never visited; it still has its input pose.
    With several classes the column vdamkitClassProbability (RELION has none) says what part of the particle's posterior
    its class holds. Source: RELION ml_optimiser.cpp:setMetaDataSubset.
    """
    poses = state.poses
    columns = {f"rlnAngle{name}": poses.angles[:, i] for i, name in enumerate(("Rot", "Tilt", "Psi"))}
    columns |= {f"rlnOrigin{axis}Angst": poses.offsets[:, i] for i, axis in enumerate("XYZ")}
    if len(state.maps) > 1:
        columns["vdamkitClassProbability"] = poses.class_share
    return columns | {
        "rlnClassNumber": poses.class_number,
        "rlnNormCorrection": np.ones(len(poses.class_number)),
        "rlnLogLikeliContribution": poses.log_likelihood,
        "rlnMaxValueProbDistribution": poses.pmax,
        "rlnNrOfSignificantSamples": poses.n_significant,
    }


def data_blocks(state: State, particles: ParticleSet) -> dict[str, Block]:
    """Blocks of data.star: every input column, poses updated in place, missing columns added at the end.

    Particles whose files cannot be read are left out, as RELION stops at the first of them. data_general is there for 2D stacks
    only. Source: RELION exp_model.cpp:write.
    """
    new = {"rlnGroupNumber": particles.group_index + 1, **pose_columns(state)}
    order = [*particles.table.columns, *(name for name in new if name not in particles.table.columns)]
    table = pd.DataFrame({name: new[name] if name in new else particles.table[name].to_numpy() for name in order})
    table = table.drop(index=list(state.bad_particles))
    general = {**particles.general, "rlnTomoSubTomosAre2DStacks": 1}
    head: dict[str, Block] = {"general": general} if particles.is_stack2d else {}
    return {**head, "optics": particles.optics_table, "particles": table}


def optimisation_set_block(names: FileNames, particles: ParticleSet) -> dict[str, object]:
    """The input set's entries with our particles; tomograms and trajectories as given ("" if not)."""
    return {
        **particles.paths.entries,
        "rlnTomoParticlesFile": names.data.as_posix(),
        "rlnTomoTomogramsFile": particles.paths.tomograms or "",
        "rlnTomoTrajectoriesFile": particles.paths.trajectories or "",
    }


# maps and moments -------------------------------------------------------------------------------------


def _write_maps(names: FileNames, state: State, particles: ParticleSet) -> list[Path]:
    """Maps (Å per px in the header) and both moments (1 per px, as RELION has it) of all classes."""
    classes = len(state.maps)
    scale = fourier_scale(particles) / state.grey_scale
    written = []
    for k in range(classes):
        write_mrc(names.map(k), state.maps[k] / state.grey_scale, particles.pixel_size)
        written.append(names.map(k))
    for k in range(classes):
        for half in (0, 1):
            path = names.moment1(k, half)
            write_mrc(path, pack_moment(state.moment1[k, half] * scale), 1.0)
            written.append(path)
        write_mrc(names.moment2(k), pack_moment(state.moment2[k]), 1.0)
        written.append(names.moment2(k))
    return written


def pack_moment(transform: np.ndarray) -> np.ndarray:
    """A moment as RELION stores it: real and imaginary parts interleaved along x, origin in the middle.

    Parameters
    ----------
    transform: `(N, N, N//2 + 1)` zyx real or complex, rfft layout with the origin at index 0.

    Returns
    -------
    `(N, N, 2 (N//2 + 1))` float32: z and y from -N/2 with the origin at index N/2, x from 0.

    Source: RELION ml_model.cpp:write (Igrad1, Igrad2).
    """
    centred = np.fft.fftshift(transform, axes=(0, 1)).astype(np.complex64)
    return np.ascontiguousarray(centred).view(np.float32)


def unpack_moment(stored: np.ndarray) -> np.ndarray:
    """Inverse of :func:`pack_moment`: complex64 `(N, N, N//2 + 1)`, rfft layout."""
    centred = np.ascontiguousarray(stored, np.float32).view(np.complex64)
    return np.fft.ifftshift(centred, axes=(0, 1))
