"""From a known particle to RELION pseudo-subtomograms with known poses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vdamkit.backend import Backend, get_backend
from vdamkit.backend.device import Device
from vdamkit.errors import InputError, OutputError, SettingsError
from vdamkit.imaging.ctf import dose_envelope
from vdamkit.io.star_tables import write_star
from vdamkit.simulate.extract import Cutter, Extracted, backproject, unpad
from vdamkit.simulate.models import particle_model
from vdamkit.simulate.noise import near_any, white_noise
from vdamkit.simulate.output import (
    optics_table,
    picked_table,
    true_table,
    write_map,
    write_particle_set,
    write_tilt_series,
)
from vdamkit.simulate.render import CentralSlices, images_at_once, render_tilt_images
from vdamkit.simulate.scene import Scene, scenes_from_star, simulated_scene, with_kinds
from vdamkit.simulate.settings import SimulationSettings
from vdamkit.simulate.tilt_series import TiltSeries
from vdamkit.simulate.truth import average_neighbourhood
from vdamkit.simulate.workers import Workers


def simulate(output: str | Path, *, device: str = "cpu", threads: int | None = None, **options) -> dict[str, Path]:
    """Make virtual tilt series of a known particle and extract the particles as RELION 5 would.

    Parameters
    ----------
    output: folder to write, made if missing; becomes the RELION project folder all paths refer to.
    device: ``"cpu"`` or ``"cuda:N"``, where images are made and particles cut out; the data are the same to rounding.
    threads: of this machine; None: all cores.
    options: the fields of :class:`vdamkit.simulate.settings.SimulationSettings`, among them

        - ``model="hexamer"``: ``"hexamer"``, ``"asymmetric"`` or the path of any MRC map
        - ``particles=110``, ``volumes=24`` (or all if fewer), ``tomograms=2``: how many stacks, volumes and tilt series
        - ``box=32``, ``pixel_size=10.6``, ``tilts=31``
        - ``variance_ratio=0.1``: signal over noise, in the circles of the particles, in the first exposure
        - ``picking_error=6.0`` Å, ``orientation_error=6.0`` degrees
        - ``poses="sphere"``: on virus-like spheres with their neighbours and priors; ``"random"``: free, no
          priors; or a STAR file with coordinates and true poses beside its tomograms.star
        - ``second_model="asymmetric"``, ``second_share=0.4``: another kind of particle among them
        - ``junk=0.3``: that part of the picked places holds no particle
        - ``seed=0``: same seed, same data

    Returns
    -------
    Paths by name: ``stacks2d`` and ``volumes3d`` (the optimisation sets; the latter only with volumes),
    ``tomograms``, ``true_poses`` (with rlnClassNumber 1, 2, or 0 for junk, where there are several kinds), ``model`` (and
    ``second_model``), ``recipe`` and, on spheres, ``true_map``.

    Raises
    ------
    SettingsError: an option is unknown or has a value that cannot work, or the device does not answer.
    InputError: the map or the STAR file given cannot be used. OutputError: `output` cannot be written, or holds a project
    other than the one that the same options made there.
    """
    known = {field.name for field in fields(SimulationSettings)}
    if unknown := sorted(set(options) - known):
        raise SettingsError(f"simulate: no such option {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    settings, folder, backend = SimulationSettings(**options), Path(output), _backend(device, threads)
    _begin(folder, settings)
    scene_seed, noise_seed = np.random.SeedSequence(settings.seed).spawn(2)
    scenes = _scenes(settings, scene_seed.spawn(settings.tomograms))
    densities = _densities(settings, scenes[0].series.pixel_size)
    of_volumes = _shares(settings.volumes, [len(scene.picked) for scene in scenes])
    noise_seeds = noise_seed.spawn(len(scenes))
    stacks, volumes = [], []
    with backend.limits(), backend.device.active(), Workers(backend) as workers:
        true_map = workers.prepare(_true_map, scenes[0], densities, settings)
        noise = workers.prepare(_noise, scenes[0], settings, noise_seeds[0])
        slices = [CentralSlices(density, backend.device) for density in densities]
        for number, scene in enumerate(scenes):
            images = _noisy_images(scene, slices, settings, noise, backend)
            if number + 1 < len(scenes):
                noise = workers.prepare(_noise, scenes[number + 1], settings, noise_seeds[number + 1])
            if settings.write_tilt_images:
                _write_tilt_images(folder, scene.series, images, backend.device, workers)
            stack_rows, volume_rows = _extract_all(folder, scene, images, settings, of_volumes[number], backend, workers)
            stacks.append(stack_rows)
            volumes.append(volume_rows)
        around = true_map()
    return _write_tables(folder, scenes, settings, densities, around, pd.concat(stacks), pd.concat(volumes))


def _begin(folder: Path, settings: SimulationSettings) -> None:
    """Make the folder and write the recipe; a project that is already there, not made by the same one, is refused."""
    path, recipe = folder / "recipe.json", json.dumps(asdict(settings), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = [name for name in ("tomograms.star", "stacks2d", "volumes3d", "tilt_series") if (folder / name).exists()]
        if found and not (path.exists() and path.read_text(encoding="utf-8") == recipe):
            whose = "an earlier simulation with other options" if path.exists() else "a project that was not simulated"
            raise OutputError(f"{folder} already holds {found[0]} of {whose}; choose another folder, or remove that one first.")
        path.write_text(recipe, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: no folder can be made here ({error.strerror}); choose another.") from None


def _backend(device: str, threads: int | None) -> Backend:
    if threads is not None and not 1 <= threads <= 1024:
        raise SettingsError(f"simulate: threads is {threads!r}; give 1 to 1024, or None for all cores.")
    backend = get_backend(device, threads)
    if len(backend.devices) > 1:
        raise SettingsError(f"simulate: device is {device!r}; give one GPU, such as 'cuda:0'.")
    return backend


def _densities(settings: SimulationSettings, pixel_size: float) -> list[np.ndarray]:
    """The model, and the second one with the same power, so that neither is told by its contrast."""
    box = 2 * (3 * settings.box // 4)
    first = particle_model(settings.model, box=box, pixel_size=pixel_size)
    if settings.second_model is None:
        return [first]
    second = particle_model(settings.second_model, box=box, pixel_size=pixel_size)
    return [first, second * np.float32(np.sqrt((first**2).sum() / (second**2).sum()))]


def _shares(total: int, limits: list[int]) -> list[int]:
    """`total`, or the sum of `limits` if that is less, divided as evenly as the limits allow."""
    turns = sorted((turn, part) for part, limit in enumerate(limits) for turn in range(limit))
    parts = [part for _, part in turns[:total]]
    return [parts.count(part) for part in range(len(limits))]


def _scenes(settings: SimulationSettings, seeds: list[np.random.SeedSequence]) -> list[Scene]:
    if settings.poses in ("sphere", "random"):
        shares = _shares(settings.particles, [settings.particles] * settings.tomograms)
        scenes = [
            with_kinds(simulated_scene(seed, settings, number=i, count=share), settings, i)
            for i, (seed, share) in enumerate(zip(seeds, shares, strict=True))
        ]
    else:
        scenes = scenes_from_star(Path(settings.poses), settings.particles)
        if not scenes:
            raise InputError(f"{settings.poses}: no particle is in a tomogram of the tomograms.star beside it.")
        sizes = sorted({scene.series.pixel_size for scene in scenes})
        if len(sizes) > 1:
            raise InputError(f"{settings.poses}: its tilt series have pixel sizes {sizes}; give particles of one size.")
        return scenes
    found = sum(len(scene.picked) for scene in scenes)
    if found < settings.particles:
        raise SettingsError(
            f"simulate: particles is {settings.particles}, but only {found} are seen in enough tilts; "
            f"give fewer, more tomograms or another seed."
        )
    return scenes


def _true_map(scene: Scene, densities: list[np.ndarray], settings: SimulationSettings) -> np.ndarray | None:
    """The particle with its neighbours `(box, box, box)`; None where there is no lattice, or no particle of the first kind."""
    if settings.poses != "sphere" or not (scene.kinds == 1).any():
        return None
    return average_neighbourhood(scene, densities, box=settings.box, fold=settings.fold)


def _noise(
    scene: Scene, settings: SimulationSettings, seed: np.random.SeedSequence
) -> tuple[int, np.ndarray, np.ndarray] | None:
    """What a tomogram's images need for their noise, or None where they have none.

    Returns
    -------
    The tilt that was exposed first, its pixels near particles `(y, x)` bool, and noise of variance 1 `(n_tilts, y, x)`.
    """
    if settings.variance_ratio is None:
        return None
    series, shape = scene.series, scene.series.size[1::-1]
    first = int(np.argmin(series.table["rlnMicrographPreExposure"]))
    near = near_any(series.project(scene.coordinates)[0][first], settings.box / 2, shape)
    return first, near, white_noise(seed, (len(series.table), *shape))


def _noisy_images(
    scene: Scene,
    slices: list[CentralSlices],
    settings: SimulationSettings,
    noise: Callable[[], tuple[int, np.ndarray, np.ndarray] | None],
    backend: Backend,
) -> Any:
    """Tilt images `(n_tilts, y, x)` float32 with white noise, the same in every exposure; on the device.

    slices: of the densities. noise: gives what :func:`_noise` makes.
    """
    series, sites, device = scene.series, scene.sites, backend.device
    images = device.xp.zeros((len(series.table), *series.size[1::-1]), np.float32)
    for kind, of_density in enumerate(slices, start=1):
        there = sites.of_kind(kind)
        images += render_tilt_images(series, of_density, sites.centres[there], sites.rotations[there], backend)
    found = noise()
    if found is None:
        return images
    first, near, white = found
    deviation = np.sqrt(device.get(images[first])[near].var() / settings.variance_ratio)
    scaled = device.put(white)
    scaled *= np.float32(deviation)
    images += scaled
    return images


def _extract_all(
    folder: Path,
    scene: Scene,
    images: Any,
    settings: SimulationSettings,
    n_volumes: int,
    backend: Backend,
    workers: Workers,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write one tomogram's stacks and volumes; rows of both particle tables."""
    series, box, device, count = scene.series, settings.box, backend.device, len(scene.coordinates)
    stems = [f"Subtomograms/{series.name}/{number + 1}" for number in range(count)]
    names = [f"stacks2d/{stem}_stack2d.mrcs" for stem in stems]
    volume_names = [[f"volumes3d/{stem}_{what}.mrc" for stem in stems] for what in ("data", "weights")]
    cut = Cutter(series, images, box=box, big_box=2 * box, device=device)
    size = min(count, max(1, images_at_once(2 * box) // len(series.table))) if backend.on_device else 1
    length = size * len(series.table) if backend.on_device else 0

    def some(first: int) -> np.ndarray:
        part = slice(first, first + size)
        found = cut(scene.coordinates[part], scene.frames[part], length=length)
        stacks = device.get(unpad(found.images, box, 2).astype(np.float16))
        for i, stack in enumerate(np.split(stacks, found.starts[1:-1])):
            workers.do(_write_stack, folder / names[first + i], stack, series.pixel_size)
            if first + i < n_volumes:
                paths = [folder / name[first + i] for name in volume_names]
                workers.do(_write_volume, paths, series, found.on_host(i, device), box)
        return found.visible

    parts = range(0, count, size)
    visible = [some(first) for first in parts] if backend.on_device else backend.map(some, parts)
    table = picked_table(scene, np.concatenate(visible))
    volumes = table.drop(columns="rlnTomoVisibleFrames").iloc[:n_volumes]
    volumes = volumes.assign(rlnImageName=volume_names[0][:n_volumes], rlnCtfImage=volume_names[1][:n_volumes])
    return table.assign(rlnImageName=names), volumes


def _write_stack(path: Path, stack: np.ndarray, pixel_size: float) -> None:
    write_map(path, stack, pixel_size, stack=True, half=True)


def _write_volume(paths: Sequence[Path], series: TiltSeries, particle: Extracted, box: int) -> None:
    """A 3D pseudo-subtomogram and its weights, to two paths."""
    big_box = 2 * box
    frequency = np.hypot(np.fft.fftfreq(big_box, series.pixel_size)[:, None], np.fft.rfftfreq(big_box, series.pixel_size))
    doses = series.table["rlnMicrographPreExposure"].to_numpy()[particle.visible[0]]
    data, weights = backproject(particle, dose_envelope(frequency, doses[:, None, None]), box=box)
    write_map(paths[0], data, series.pixel_size, half=True)
    write_map(paths[1], weights, 1 / series.pixel_size, half=True)


def _write_tilt_images(folder: Path, series: TiltSeries, images: Any, device: Device, workers: Workers) -> None:
    for name, image in zip(series.table["rlnMicrographName"], images, strict=True):
        workers.do(partial(write_map, half=True), folder / name, device.get(image), series.pixel_size)


def _write_tables(
    folder: Path,
    scenes: list[Scene],
    settings: SimulationSettings,
    densities: list[np.ndarray],
    true_map: np.ndarray | None,
    stacks: pd.DataFrame,
    volumes: pd.DataFrame,
) -> dict[str, Path]:
    """STAR files, model, true map and recipe; the dictionary :func:`simulate` returns."""
    pixel_size = scenes[0].series.pixel_size
    paths = {
        "tomograms": write_tilt_series(folder, scenes),
        "stacks2d": write_particle_set(folder, "stacks2d", optics_table(scenes, settings, 2), stacks),
        "true_poses": folder / "particles_true_poses.star",
        "model": folder / "model.mrc",
        "recipe": folder / "recipe.json",
    }
    if len(volumes):
        paths["volumes3d"] = write_particle_set(folder, "volumes3d", optics_table(scenes, settings, 3), volumes)
    write_star(paths["true_poses"], {"particles": pd.concat([true_table(scene, settings.fold) for scene in scenes])})
    write_map(paths["model"], unpad(densities[0], settings.box, 3), pixel_size)
    for density in densities[1:]:
        paths["second_model"] = folder / "second_model.mrc"
        write_map(paths["second_model"], unpad(density, settings.box, 3), pixel_size)
    if true_map is not None:
        paths["true_map"] = folder / "true_map.mrc"
        write_map(paths["true_map"], true_map, pixel_size)
    return paths
