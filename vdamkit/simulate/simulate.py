"""From a known particle to RELION pseudo-subtomograms with known poses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from vdamkit.backend import Backend, get_backend
from vdamkit.backend.device import Device
from vdamkit.errors import InputError, OutputError, SettingsError
from vdamkit.imaging.ctf import dose_envelope
from vdamkit.io.star_tables import write_star
from vdamkit.simulate.extract import Extracted, backproject, extract, unpad
from vdamkit.simulate.models import particle_model
from vdamkit.simulate.output import (
    optics_table,
    picked_table,
    true_table,
    write_map,
    write_particle_set,
    write_tilt_series,
)
from vdamkit.simulate.scene import Scene, scenes_from_star, simulated_scene, with_kinds
from vdamkit.simulate.settings import SimulationSettings
from vdamkit.simulate.tilt_series import TiltSeries, render_tilt_images
from vdamkit.simulate.truth import average_neighbourhood


def simulate(output: str | Path, *, device: str = "cpu", threads: int | None = None, **options) -> dict[str, Path]:
    """Make virtual tilt series of a known particle and extract the particles as RELION 5 would.

    Parameters
    ----------
    output: folder to write, made if missing; becomes the RELION project folder all paths refer to.
    device: ``"cpu"`` or ``"cuda:N"``, where images are made and particles cut out; the data are the same to rounding.
    threads: of this machine; None: all cores.
    options: the fields of :class:`vdamkit.simulate.settings.SimulationSettings`, among them

        - ``model="hexamer"``: ``"hexamer"``, ``"asymmetric"`` or the path of any MRC map
        - ``particles=110``, ``volumes=24``, ``tomograms=2``: how many stacks, volumes and tilt series
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
    InputError: the map or the STAR file given cannot be used. OutputError: `output` cannot be written.
    """
    known = {field.name for field in fields(SimulationSettings)}
    if unknown := sorted(set(options) - known):
        raise SettingsError(f"simulate: no such option {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    settings, folder, backend = SimulationSettings(**options), Path(output), _backend(device, threads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: no folder can be made here ({error.strerror}); choose another.") from None
    scene_seed, noise_seed = np.random.SeedSequence(settings.seed).spawn(2)
    scenes = _scenes(settings, scene_seed.spawn(settings.tomograms))
    noise_seeds = noise_seed.spawn(len(scenes))
    pixel_size = scenes[0].series.pixel_size
    densities = _densities(settings, pixel_size)
    stacks, volumes, truth = [], [], []
    of_volumes = _shares(settings.volumes, [len(scene.picked) for scene in scenes])
    for number, scene in enumerate(scenes):
        with backend.limits(), backend.device.active():
            images = _noisy_images(scene, densities, settings, np.random.default_rng(noise_seeds[number]), backend)
            if settings.write_tilt_images:
                _write_tilt_images(folder, scene.series, images, backend.device)
            stack_rows, volume_rows = _extract_all(folder, scene, images, settings, of_volumes[number], backend)
        stacks.append(stack_rows)
        volumes.append(volume_rows)
        truth.append(true_table(scene, settings.fold))
    return _write_tables(folder, scenes, settings, densities, stacks, volumes, truth)


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


def _noisy_images(
    scene: Scene, densities: list[np.ndarray], settings: SimulationSettings, rng: np.random.Generator, backend: Backend
) -> Any:
    """Tilt images `(n_tilts, y, x)` float32 with white noise, the same in every exposure; on the device."""
    series, sites, device = scene.series, scene.sites, backend.device
    images = device.xp.zeros((len(series.table), *series.size[1::-1]), np.float32)
    for kind, density in enumerate(densities, start=1):
        there = sites.of_kind(kind)
        images += render_tilt_images(series, density, sites.centres[there], sites.rotations[there], backend)
    if settings.variance_ratio is None:
        return images
    first = int(np.argmin(series.table["rlnMicrographPreExposure"]))
    positions, _ = series.project(scene.coordinates)
    pixels = np.indices(images.shape[1:])[::-1].reshape(2, -1).T
    around = cKDTree(positions[first]).query(pixels, distance_upper_bound=settings.box / 2)[0] < settings.box / 2
    deviation = np.sqrt(device.get(images[first]).ravel()[around].var() / settings.variance_ratio)
    noise = rng.standard_normal(images.shape, np.float32)
    noise *= np.float32(deviation)
    images += device.put(noise)
    return images


def _extract_all(
    folder: Path, scene: Scene, images: Any, settings: SimulationSettings, n_volumes: int, backend: Backend
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write one tomogram's stacks and volumes; rows of both particle tables."""
    series, box, device = scene.series, settings.box, backend.device
    stems = [f"Subtomograms/{series.name}/{number + 1}" for number in range(len(scene.coordinates))]
    names = [f"stacks2d/{stem}_stack2d.mrcs" for stem in stems]
    volume_names = [[f"volumes3d/{stem}_{what}.mrc" for stem in stems] for what in ("data", "weights")]

    def one(number: int) -> np.ndarray:
        with device.active():
            particle = extract(
                series, images, scene.coordinates[number], scene.frames[number], box=box, big_box=2 * box, device=device
            )
            stack = unpad(particle.images, box, 2)
            write_map(folder / names[number], device.get(stack), series.pixel_size, stack=True, half=True)
            if number < n_volumes:
                _write_volume([folder / name[number] for name in volume_names], series, particle.on_host(device), box)
        return particle.visible

    table = picked_table(scene, np.array(backend.map(one, range(len(stems)))))
    volumes = table.drop(columns="rlnTomoVisibleFrames").iloc[:n_volumes]
    volumes = volumes.assign(rlnImageName=volume_names[0][:n_volumes], rlnCtfImage=volume_names[1][:n_volumes])
    return table.assign(rlnImageName=names), volumes


def _write_volume(paths: Sequence[Path], series: TiltSeries, particle: Extracted, box: int) -> None:
    """A 3D pseudo-subtomogram and its weights, to two paths."""
    big_box = 2 * box
    frequency = np.hypot(np.fft.fftfreq(big_box, series.pixel_size)[:, None], np.fft.rfftfreq(big_box, series.pixel_size))
    doses = series.table["rlnMicrographPreExposure"].to_numpy()[particle.visible]
    data, weights = backproject(particle, dose_envelope(frequency, doses[:, None, None]), box=box)
    write_map(paths[0], data, series.pixel_size, half=True)
    write_map(paths[1], weights, 1 / series.pixel_size, half=True)


def _write_tilt_images(folder: Path, series: TiltSeries, images: Any, device: Device) -> None:
    for name, image in zip(series.table["rlnMicrographName"], images, strict=True):
        write_map(folder / name, device.get(image), series.pixel_size, half=True)


def _write_tables(
    folder: Path,
    scenes: list[Scene],
    settings: SimulationSettings,
    densities: list[np.ndarray],
    stacks: list[pd.DataFrame],
    volumes: list[pd.DataFrame],
    truth: list[pd.DataFrame],
) -> dict[str, Path]:
    """STAR files, model, true map and recipe; the dictionary :func:`simulate` returns."""
    pixel_size = scenes[0].series.pixel_size
    paths = {
        "tomograms": write_tilt_series(folder, scenes),
        "stacks2d": write_particle_set(folder, "stacks2d", optics_table(scenes, settings, 2), pd.concat(stacks)),
        "true_poses": folder / "particles_true_poses.star",
        "model": folder / "model.mrc",
        "recipe": folder / "recipe.json",
    }
    volume_rows = pd.concat(volumes)
    if len(volume_rows):
        paths["volumes3d"] = write_particle_set(folder, "volumes3d", optics_table(scenes, settings, 3), volume_rows)
    write_star(paths["true_poses"], {"particles": pd.concat(truth)})
    write_map(paths["model"], unpad(densities[0], settings.box, 3), pixel_size)
    for density in densities[1:]:
        paths["second_model"] = folder / "second_model.mrc"
        write_map(paths["second_model"], unpad(density, settings.box, 3), pixel_size)
    if settings.poses == "sphere":
        paths["true_map"] = folder / "true_map.mrc"
        around = average_neighbourhood(scenes[0], densities[0], box=settings.box, fold=settings.fold)
        write_map(paths["true_map"], around, pixel_size)
    paths["recipe"].write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    return paths
