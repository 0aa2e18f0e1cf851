"""napari reads RELION's files: ``napari run_it100_data.star``, ``napari run_it100_class001.mrc``.

An npe2 plugin (see napari.yaml): particles as points with orientation vectors, maps as isosurfaces, all in Å.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vdamkit.errors import InputError
from vdamkit.io.mrc import read_map
from vdamkit.io.particle_columns import centred_coordinates, triplet
from vdamkit.io.star_tables import as_table, find_block, numeric_column, read_star, text_column
from vdamkit.notebook.layers import LayerData, map_layers, particle_layers
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.state import Poses

MAPS = (".mrc", ".map")


@dataclass(frozen=True)
class PlacedParticles:
    """Where the particles of a STAR file lie; see :class:`vdamkit.notebook.layers.Placed`."""

    coordinates: np.ndarray
    subtomogram_rotations: np.ndarray
    angle_priors: np.ndarray
    tomogram_names: np.ndarray


def get_reader(path: str | Sequence[str]) -> Callable[[Any], list[LayerData]] | None:
    """A function that reads `path` into layers, or None where it is nothing for us (npe2's contract)."""
    paths = [path] if isinstance(path, str) else list(path)
    suffixes = {Path(item).suffix.lower() for item in paths}
    if suffixes <= {".star"} and all(_has_particles(item) for item in paths):
        return lambda some: [layer for item in _as_list(some) for layer in read_particles(item)]
    if suffixes <= set(MAPS):
        return lambda some: [layer for item in _as_list(some) for layer in read_mrc(item)]
    return None


def _as_list(path: str | Sequence[str]) -> list[str]:
    return [path] if isinstance(path, str) else list(path)


def _has_particles(path: str) -> bool:
    try:
        return "particles" in read_star(path)
    except InputError:
        return False


def read_particles(path: str | Path) -> list[LayerData]:
    """Points, orientation vectors and prior directions of every tomogram in a particles.star; the first one visible.

    Centred coordinates (RELION 5) are needed; poses, offsets, classes and priors are used where they are there.

    Raises
    ------
    InputError: a column is missing or not a number.
    """
    path = Path(path)
    table = as_table(find_block(read_star(path), "particles", path))
    names = text_column(table, "rlnTomoName", path, "particles")
    angles, axes = ("Rot", "Tilt", "Psi"), ("X", "Y", "Z")
    frames = euler_to_matrix(triplet(table, "rlnTomoSubtomogram{}", angles, path, default=0.0))
    priors = triplet(table, "rlnAngle{}Prior", angles, path, default=np.nan, allow_nan=True)
    particles = PlacedParticles(centred_coordinates(table, names, {}, path), frames, priors, names)
    n = len(table)
    classes = numeric_column(table, "rlnClassNumber", path, "particles", default=1)
    pmax = numeric_column(table, "rlnMaxValueProbDistribution", path, "particles", default=0)
    poses = Poses(
        triplet(table, "rlnAngle{}", angles, path, default=0.0), triplet(table, "rlnOrigin{}Angst", axes, path, default=0.0),
        classes.astype(np.int32), pmax.astype(np.float32), np.zeros(n), np.zeros(n, np.int32), np.zeros(n, np.int32),
        np.ones(n, np.float32),
    )  # fmt: skip
    out: list[LayerData] = []
    for number, name in enumerate(dict.fromkeys(names.tolist())):
        for data, options, kind in particle_layers(particles, poses, name):
            title = options["name"] if kind == "points" else f"{options['name']}, {name}"
            out.append((data, options | {"name": title, "visible": number == 0}, kind))
    return out


def read_mrc(path: str | Path) -> list[LayerData]:
    """A map as an isosurface with its centre at the origin; anything that is not a cube as a plain image."""
    volume, pixel_size = read_map(path)
    pixel_size = pixel_size or 1.0
    name = Path(path).stem
    if len(set(volume.shape)) > 1:
        return [(volume, {"name": name, "scale": (pixel_size,) * volume.ndim}, "image")]
    ((data, options, kind),) = map_layers(volume[None], pixel_size)
    return [(data, options | {"name": name}, kind)]
