"""The state before the first mini-batch: noise spectrum, grey scale, start maps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import numpy as np

from vdamkit.backend.device import Device, or_on_host
from vdamkit.errors import InputError
from vdamkit.imaging.convert import HalfBallParticle
from vdamkit.imaging.halfball import fourier_to_map, half_ball
from vdamkit.imaging.masks import mask_power
from vdamkit.imaging.projector import get_projector
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.state import Poses, State
from vdamkit.vdam import schedule
from vdamkit.vdam.moments import constrained, half_gradients


class Particles(Protocol):
    """What the algorithm asks of a set of particles; `vdamkit.source.ParticleSource` is one."""

    box: int
    pixel_size: float
    mask_ndim: int  # 2 for stacks, 3 for volumes: how many dimensions a particle's mask has
    optics: np.ndarray  # (n,) optics group index
    n_optics: int
    angles: np.ndarray  # (n, 3) degrees, input poses
    offsets: np.ndarray  # (n, 3) Å
    angle_priors: np.ndarray  # (n, 3) degrees, nan where the file has none
    offset_priors: np.ndarray  # (n, 3) Å
    identity: Hashable  # changes when what `fetch` returns does

    def __len__(self) -> int: ...

    def fetch(self, index: np.ndarray, radius: int) -> tuple[list[HalfBallParticle], np.ndarray, list[str]]:
        """Particles on at least `radius`, the positions in `index` that could be read, complaints about the rest."""
        ...

    def fetch_on(self, device: Device, index: np.ndarray, radius: int) -> tuple[tuple, np.ndarray, list[str]]:
        """As :meth:`fetch`, on exactly `radius` and on a device: masked, unmasked and weight, `(p, n)` each."""
        ...

    def take_notes(self) -> tuple[str, ...]:
        """What a person should know of how reading went, told once."""
        ...


def initial_state(particles: Particles, settings, backend) -> State:
    """State 0: noise from masked particles, and a low-passed average of randomly turned ones for every class.

    Unlike RELION (one particle per optics group) some 100 particles serve, and every class gets
    its own orientations, so that no class starts empty. Source: RELION
    ml_optimiser.cpp:calculateSumOfPowerSpectraAndAverageImage, setSigmaNoiseEstimatesAndSetAverageImage.
    """
    n, box, px = len(particles), particles.box, particles.pixel_size
    radius = box // 2
    rng = schedule.generator(settings.seed, 0, schedule.START)
    chosen = _first_of_each_group(particles.optics, settings.noise_particles, rng)
    sigma2, grey = or_on_host(backend.device, lambda device: _noise(particles, chosen, radius, settings, device))
    shell = max(2, round(settings.start_fraction * box))
    picks = chosen if len(chosen) <= settings.start_particles else np.sort(rng.permutation(chosen)[: settings.start_particles])
    maps = _start_maps(particles, picks, sigma2, grey, shell, settings, backend, rng)
    half = box // 2 + 1
    classes, real = settings.classes, np.dtype(settings.real)
    kind = np.complex64 if real == np.float32 else np.complex128
    poses = Poses(
        np.array(particles.angles, np.float64), np.array(particles.offsets, np.float64), np.zeros(n, np.int32),
        np.zeros(n, np.float32), np.zeros(n), np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.float32),
    )  # fmt: skip
    return State(
        iteration=0, maps=maps.astype(real), moment1=np.zeros((classes, 2, box, box, half), kind),
        moment2=np.ones((classes, box, box, half), real), sigma2=sigma2,
        class_probability=np.full(classes, 1 / classes), sigma_offset=settings.sigma_offset,
        perturbation=schedule.next_perturbation(0.0, 0, settings),
        resolution_shell=max(settings.min_resolution_shell, shell), healpix_order=settings.healpix_order,
        offset_range=settings.offset_range * px, offset_step=settings.offset_step * px, no_gain=0, offset_change2=0.0,
        poses=poses, data_vs_prior=np.zeros((classes, half)), tau2=np.zeros((classes, half)),
        wiener=np.zeros((classes, half)), half_fsc=np.zeros((classes, half)), accuracy_rotation=float("nan"),
        accuracy_offset=float("nan"), grey_scale=grey,
    )  # fmt: skip


def _first_of_each_group(optics: np.ndarray, per_group: int, rng: np.random.Generator) -> np.ndarray:
    parts = []
    for group in np.unique(optics):
        members = np.flatnonzero(optics == group)
        parts.append(members if len(members) <= per_group else rng.permutation(members)[:per_group])
    return np.sort(np.concatenate(parts))


def _noise(particles: Particles, chosen: np.ndarray, radius: int, settings, device: Device) -> tuple[np.ndarray, float]:
    """Noise variance per optics group and shell (ratio of shell sums), and the grey scale that makes it O(1).

    Raises InputError where no particle can be used.
    """
    ball = half_ball(radius)
    n_shells = particles.box // 2 + 1
    power, weight = np.zeros((2, particles.n_optics, n_shells))
    complaints: list[str] = []
    for first in range(0, len(chosen), 32):
        part = chosen[first : first + 32]
        (masked, _, weights), at, sentences = particles.fetch_on(device, part, radius)
        complaints += sentences
        sums = (ball.shell_sums(device.get(values) * ball.weight) for values in (abs(masked) ** 2, weights))
        for i, mine, total in zip(part[at], *sums, strict=True):
            group = particles.optics[i]
            power[group, : ball.n_shells] += mine
            weight[group, : ball.n_shells] += total
    if not power[:, 1:].any():
        what = f"can be used; e.g. {complaints[0]}" if complaints else "holds anything but a constant"
        raise InputError(f"none of the {len(chosen)} particles that the noise is estimated from {what}")
    kept = mask_power(particles.box, settings.mask_diameter / (2 * particles.pixel_size), particles.mask_ndim)
    sigma2 = np.where(weight > 0, power / np.maximum(weight, 1e-300), 0) / 2 / kept
    known = sigma2[:, 1:][sigma2[:, 1:] > 0]
    grey = float(1 / np.sqrt(np.median(known)))
    sigma2 = np.stack([_fill(row) for row in sigma2]) * grey**2
    return sigma2, grey


def _fill(spectrum: np.ndarray) -> np.ndarray:
    """Give shells without an estimate the value of the nearest one that has it."""
    good = np.flatnonzero(spectrum > 0)
    if not len(good):
        return np.ones_like(spectrum)
    nearest = np.abs(np.arange(len(spectrum))[:, None] - good).argmin(1)
    return spectrum[good[nearest]]


def _start_maps(
    particles: Particles, picks: np.ndarray, sigma2: np.ndarray, grey: float, shell: int, settings, backend, rng
) -> np.ndarray:
    """Averages of randomly turned particles up to `shell`, soft-masked so that every shell has some power."""
    projector = get_projector(particles.box, shell, settings.real)
    n = len(projector.ball)
    found, at, _ = particles.fetch(picks, shell)
    groups = particles.optics[picks[at]]
    maps = []
    for _ in range(settings.classes):
        cube = np.zeros((3, projector.grid.size), settings.real)
        for j, particle in enumerate(found):
            angles = rng.uniform([0, 0, 0], [360, 180, 360])  # tilt uniform, as RELION draws it
            inverse = (projector.ball.weight / sigma2[groups[j], projector.ball.shell]).astype(settings.real)
            values = (particle.unmasked[:n] * (grey * inverse)).astype(projector.complex)
            weights = np.maximum(particle.weight[:n], 0) * inverse
            cube += projector.scatter(euler_to_matrix(angles), values, weights)
        d = half_gradients(projector.grid, np.stack([cube, cube]), "C1", shell, backend).d[0]
        how = "mask" if settings.solvent == "none" else settings.solvent
        radius = settings.mask_diameter / (2 * particles.pixel_size)
        maps.append(constrained(fourier_to_map(d), how, radius))
    return np.stack(maps)
