"""Which files a job reads: the optimisation set, or the particles and tomograms given one by one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vdamkit.errors import InputError
from vdamkit.io.star_tables import as_list, numeric_column, read_star, require_columns, resolve_path

COLUMNS = {
    "particles": "rlnTomoParticlesFile",
    "tomograms": "rlnTomoTomogramsFile",
    "trajectories": "rlnTomoTrajectoriesFile",
}


@dataclass(frozen=True)
class InputPaths:
    """Input files, each as it was given (text, for the output files) and as it was found (path)."""

    particles: str
    tomograms: str | None
    trajectories: str | None
    optimisation_set: str | None
    particles_file: Path
    tomograms_file: Path | None
    trajectories_file: Path | None
    entries: dict = field(default_factory=dict)  # every entry of the optimisation set, to be carried over


def locate_inputs(
    optimisation_set: str | os.PathLike | None = None,
    *,
    particles: str | os.PathLike | None = None,
    tomograms: str | os.PathLike | None = None,
    trajectories: str | os.PathLike | None = None,
) -> InputPaths:
    """Find the files of a job.

    Parameters
    ----------
    optimisation_set: an optimisation_set.star; the names in it are looked for from the current directory,
        then from its own folder and the folders above.
    particles, tomograms, trajectories: files given directly; they win over the optimisation set's.

    Raises
    ------
    InputError: nothing was given, or a file is missing.

    Source: RELION ml_optimiser.cpp:parseInitial, jaz/tomography/optimisation_set.cpp:read.
    """
    given = {"particles": particles, "tomograms": tomograms, "trajectories": trajectories}
    given = {kind: os.fspath(name) if name is not None else None for kind, name in given.items()}
    if optimisation_set is None and given["particles"] is None:
        raise InputError(
            "No input: neither an optimisation set nor a particles file was given; give "
            "optimisation_set.star, or particles=... together with tomograms=..."
        )
    files = {kind: Path(name) if name else None for kind, name in given.items()}
    entries: dict = {}
    if optimisation_set is not None:
        set_path = Path(optimisation_set)
        blocks = read_star(set_path)
        if "particles" in blocks:
            raise InputError(
                f"{set_path}: is a particle file; give it as particles=... and its tomograms as tomograms=..., or give the "
                f"optimisation set that names both."
            )
        entries = as_list(next(iter(blocks.values())))
        if given["particles"] is None:
            require_columns(entries, [COLUMNS["particles"]], set_path, "")
        for kind, column in COLUMNS.items():
            text = str(entries.get(column, "")).strip()
            if given[kind] is None and text not in ("", "None"):
                given[kind], files[kind] = text, resolve_path(text, set_path)
                if files[kind] is None:
                    raise InputError(
                        f"{set_path}: row 1, column {column}: file '{text}' was not found from the current "
                        f"directory or from any folder above {set_path.name}; start from the project folder "
                        f"or correct the path."
                    )
        if files["particles"] is None:
            raise InputError(
                f"{set_path}: row 1, column {COLUMNS['particles']}: value '' names no file; give the "
                f"particles file there or directly."
            )
    return InputPaths(
        **given,
        optimisation_set=None if optimisation_set is None else os.fspath(optimisation_set),
        **{f"{kind}_file": file for kind, file in files.items()},
        entries=dict(entries),
    )


def read_trajectories(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Motion of each particle, from a trajectories (motion.star) file.

    Returns
    -------
    By particle name (rlnTomoParticleName): `(n_tilts, 3)` float64 displacement per tilt, xyz, Å, in the
    tomogram's frame. Blocks without the columns rlnOriginX/Y/ZAngst are passed over.

    Raises
    ------
    InputError: the file cannot be read, or a value is not a number.

    Source: RELION jaz/tomography/motion/trajectory.cpp:read.
    """
    path = Path(path)
    columns = [f"rlnOrigin{axis}Angst" for axis in "XYZ"]
    result = {}
    for name, block in read_star(path).items():
        if isinstance(block, dict) or any(column not in block.columns for column in columns):
            continue
        result[name] = np.stack([numeric_column(block, column, path, name) for column in columns], -1)
    return result
