"""What lies in each tomogram: all particles, the picked ones, and what the picker wrote about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from vdamkit.io.star_tables import as_table, find_block, numeric_column, read_star, require_columns
from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler
from vdamkit.simulate.extract import visible_tilts
from vdamkit.simulate.lattice import (
    Sites,
    free_sites,
    lattice_radius,
    picked_frames,
    sphere_sites,
)
from vdamkit.simulate.settings import SimulationSettings
from vdamkit.simulate.tilt_series import TiltSeries, make_tilt_series, read_tilt_series

COORDINATES = [f"rlnCenteredCoordinate{a}Angst" for a in "XYZ"]
SUBTOMOGRAM_ANGLES = [f"rlnTomoSubtomogram{a}" for a in ("Rot", "Tilt", "Psi")]
ANGLES = [f"rlnAngle{a}" for a in ("Rot", "Tilt", "Psi")]
ORIGINS = [f"rlnOrigin{a}Angst" for a in "XYZ"]

POSITION_DISORDER = 2.0  # Å, of the particles about their ideal lattice points
SEEN = 0.6  # a particle is picked only if this part of the tilts shows it
KINDS = 77  # key of the random numbers that say what is where
SUBDIVISIONS = (4, 3)  # of the spheres, in turn: two sizes


@dataclass(frozen=True)
class Scene:
    """One tomogram. `picked` has the first axis (n_picked,), and so have `coordinates` and `frames`."""

    series: TiltSeries
    sites: Sites
    picked: np.ndarray  # numbers into the sites
    coordinates: np.ndarray  # (n_picked, 3) Å, as picked
    frames: np.ndarray  # (n_picked, 3, 3) A_subtomogram
    priors: bool  # whether the picker wrote priors (tilt 90, psi 0)

    @property
    def kinds(self) -> np.ndarray:
        """Which model each picked particle is, `(n_picked,)`; 0: there is nothing at the picked place."""
        return np.ones(len(self.picked), int) if self.sites.kinds is None else self.sites.kinds[self.picked]

    def true_poses(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """True angles and offsets of the picked particles.

        Parameters
        ----------
        fold: n of the model's Cn; rot is given within ±180/n degrees (but for a second model, which has no symmetry).

        Returns
        -------
        angles: `(n, 3)` rot, tilt, psi in degrees. origins: `(n, 3)` Å, in the subtomogram frame, such that
        ``x_tomogram(true centre) = coordinate - A_subtomogram @ origin``.
        """
        in_frame = np.swapaxes(self.frames, 1, 2)
        angles = matrix_to_euler(in_frame @ self.sites.rotations[self.picked])
        period = np.where(self.kinds == 1, 360 / fold, 360.0)
        angles[:, 0] -= period * np.round(angles[:, 0] / period)
        missed = self.coordinates - self.sites.centres[self.picked]
        return angles, np.einsum("nij,nj->ni", in_frame, missed)


def _join(parts: list[Sites]) -> Sites:
    normals = None if parts[0].normals is None else np.concatenate([p.normals for p in parts])
    return Sites(np.concatenate([p.centres for p in parts]), np.concatenate([p.rotations for p in parts]), normals)


def _even(pixels: float) -> int:
    return 2 * int(np.ceil(pixels / 2))


def _spheres(rng: np.random.Generator, settings: SimulationSettings, count: int) -> tuple[Sites, np.ndarray]:
    """Spheres on a loose grid with at least twice `count` particles; and the extent `(3,)` in Å."""
    subdivisions: list[int] = []
    while len(subdivisions) < 2 or sum(10 * f * f - 10 for f in subdivisions) * settings.occupancy < 2 * count:
        subdivisions.append(SUBDIVISIONS[len(subdivisions) % 2])
    spacing = settings.lattice_spacing
    cell = 2 * lattice_radius(max(subdivisions), spacing) + spacing
    columns = int(np.ceil(np.sqrt(len(subdivisions))))
    parts = []
    for number, subdivision in enumerate(subdivisions):
        place = np.array([number % columns, number // columns, 0]) - [(columns - 1) / 2, (columns - 1) / 2, 0]
        slack = (cell - 2 * lattice_radius(subdivision, spacing)) / 2 - spacing / 2
        parts.append(
            sphere_sites(
                rng,
                centre=place * cell + rng.uniform(-1, 1, 3) * [slack, slack, spacing],
                subdivision=subdivision,
                spacing=spacing,
                occupancy=settings.occupancy,
                orientation_error=settings.orientation_error,
                position_disorder=POSITION_DISORDER,
            )
        )
    return _join(parts), np.array([columns * cell, columns * cell, cell + 2 * spacing])


def _free(rng: np.random.Generator, settings: SimulationSettings, count: int) -> tuple[Sites, np.ndarray]:
    """`count` free particles and a half more, with room around each; and the extent `(3,)` in Å."""
    count = int(np.ceil(1.5 * count))
    distance = 1.1 * settings.lattice_spacing
    side = max(4 * distance, np.sqrt(count * 1.6 * distance**3 / (3 * distance)))
    extent = np.array([side, side, 3 * distance])
    return free_sites(rng, count=count, half_size=extent / 2, distance=distance), extent


def simulated_scene(seed: np.random.SeedSequence, settings: SimulationSettings, *, number: int, count: int) -> Scene:
    """Tomogram `number` (from 0) with `count` picked particles on spheres or free."""
    rng = np.random.default_rng(seed)
    on_spheres = settings.poses == "sphere"
    sites, extent = (_spheres if on_spheres else _free)(rng, settings, count)
    margin = 0 if on_spheres else settings.box
    size = [_even(e / settings.pixel_size + margin) for e in extent]
    first, last = settings.defocus
    series = make_tilt_series(
        rng,
        name=f"TS_{number + 1:02d}",
        size=tuple(size),
        pixel_size=settings.pixel_size,
        tilts=settings.tilts,
        defocus=first + (last - first) * number / max(1, settings.tomograms - 1),
        dose_per_tilt=settings.dose_per_tilt,
        optics_group=number + 1,
    )
    missed = rng.normal(0, settings.picking_error, sites.centres.shape)
    coordinates = np.round(sites.centres + missed, 6)
    seen = visible_tilts(series, coordinates, settings.box).mean(axis=0) >= SEEN
    picked = np.sort(rng.permutation(np.flatnonzero(seen))[:count])
    frames = np.tile(np.eye(3), (len(picked), 1, 1))
    if on_spheres:
        written = np.round(matrix_to_euler(picked_frames(rng, sites.normals[picked])), 6)
        frames = euler_to_matrix(written)
    return Scene(series, sites, picked, coordinates[picked], frames, priors=on_spheres)


def with_kinds(scene: Scene, settings: SimulationSettings, number: int) -> Scene:
    """The scene with some of its particles replaced by a second model, or by nothing (`SimulationSettings.junk`)."""
    if not settings.junk and settings.second_model is None:
        return scene
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, number, KINDS]))
    share = settings.second_share if settings.second_model is not None else 0.0
    kinds = np.where(rng.random(len(scene.sites.centres)) < share, 2, 1)
    order = rng.permutation(scene.picked)  # of the picked ones exactly the shares asked for
    empty = round(settings.junk * len(order))
    second = round(share * (len(order) - empty))
    kinds[order[:empty]] = 0
    kinds[order[empty : empty + second]] = 2
    kinds[order[empty + second :]] = 1
    return replace(scene, sites=replace(scene.sites, kinds=kinds))


def scenes_from_star(path: Path, particles: int) -> list[Scene]:
    """Tomograms of a STAR file with true poses; `tomograms.star` must lie in the same folder.

    All its particles are there, the first `particles` are picked, at the coordinates of the file.
    """
    table = as_table(find_block(read_star(path), "particles", path))
    wanted = [*COORDINATES, *SUBTOMOGRAM_ANGLES, *ANGLES, *ORIGINS]
    require_columns(table, ["rlnTomoName", *wanted], path, "particles")
    values = pd.DataFrame({column: numeric_column(table, column, path, "particles") for column in wanted})
    names, scenes = table["rlnTomoName"].to_numpy(), []
    for name, series in read_tilt_series(path.parent / "tomograms.star").items():
        rows = np.flatnonzero(names == name)
        if not len(rows):
            continue
        here = values.iloc[rows]
        frames = euler_to_matrix(here[SUBTOMOGRAM_ANGLES].to_numpy())
        coordinates = here[COORDINATES].to_numpy()
        centres = coordinates - np.einsum("nij,nj->ni", frames, here[ORIGINS].to_numpy())
        sites = Sites(centres, frames @ euler_to_matrix(here[ANGLES].to_numpy()), None)
        picked = np.flatnonzero(rows < particles)
        priors = "rlnAngleTiltPrior" in table.columns
        scenes.append(Scene(series, sites, picked, coordinates[picked], frames[picked], priors))
    scenes = [scene for scene in scenes if len(scene.picked)]
    return [replace(s, series=replace(s.series, optics_group=n)) for n, s in enumerate(scenes, start=1)]
