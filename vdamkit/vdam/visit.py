"""Visiting the particles of a mini-batch: read, score and sum, a chunk at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from vdamkit.backend.device import HOST, Device
from vdamkit.errors import InputError
from vdamkit.imaging.halfball import half_ball
from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler
from vdamkit.sampling.point_groups import operators
from vdamkit.state import State
from vdamkit.vdam.accumulate import RawBatch, Sums, accumulate
from vdamkit.vdam.posterior import run_search
from vdamkit.vdam.search import Batch, Candidates, Posterior, Search, prior_centres
from vdamkit.vdam.start import Particles

Tick = Callable[[str, float], None]
TRACES = 2**24  # of products of rotations that exist at a time
MAX_BAD = 0.1  # share of unreadable particles at which a run gives up


class Cancelled(Exception):
    """Raised by a progress callback to leave a mini-batch; the state before it stays valid."""


@dataclass(frozen=True)
class Found:
    """Best poses of one chunk of particles."""

    index: np.ndarray
    angles: np.ndarray
    offsets: np.ndarray  # Å
    classes: np.ndarray
    pmax: np.ndarray
    class_share: np.ndarray
    log_likelihood: np.ndarray
    n_significant: np.ndarray


def no_tick(stage: str, fraction: float) -> None:
    """The progress callback of someone who does not watch."""


@dataclass(frozen=True)
class Visited:
    """What a mini-batch's particles say."""

    sums: Sums
    found: list[Found]
    bad: dict[int, str]  # a sentence about each particle that cannot be used
    notes: tuple[str, ...] = ()  # what a person should know of how it went


class Progress:
    """Tells a mini-batch's progress as its particles are done; chunks may be at work side by side."""

    def __init__(self, tick: Tick, n_particles: int):
        self._tick, self._n, self._done = tick, n_particles, 0

    def part(self, size: int) -> Callable[..., Callable[[float], None]]:
        """For a chunk of so many particles: from a stage, its share of the chunk's work and where that begins, a callback that
        takes fractions of the stage as they are done."""

        def stage(name: str, share: float, begin: float = 0.0) -> Callable[[float], None]:
            done = [0.0]

            def add(fraction: float) -> None:
                done[0] += fraction
                self._tick(name, 0.95 * (self._done + size * (begin + share * min(done[0], 1.0))) / self._n)

            return add

        return stage

    def done(self, size: int) -> None:
        """So many particles are behind us."""
        self._done += size


def all_bad(state: State, bad: dict[int, str], n: int) -> tuple[int, ...]:
    """Numbers of the particles that cannot be used, those of `bad` among them; InputError beyond MAX_BAD of the whole set.

    The set is what counts: of a small mini-batch a single one may be a tenth.
    """
    known = tuple(sorted({*state.bad_particles, *bad}))
    if len(known) > MAX_BAD * n:
        first = next(iter(bad.values()), "")
        raise InputError(f"{len(known)} of {n} particles cannot be used (more than {100 * MAX_BAD:.0f} %); e.g. {first}")
    return known


def none_left(bad: dict[int, str]) -> InputError:
    """The error where not one particle of a mini-batch can be used."""
    first = next(iter(bad.values()), "all were left out before")
    return InputError(f"no particle of this mini-batch can be used ({first}); make mini-batches larger or repair the particles")


def in_chunks(index: np.ndarray, size: int) -> list[np.ndarray]:
    """`index` in even pieces of about `size`, at most half as many again: rotations are made for each piece, so that a small
    rest would cost nearly as much as a full one."""
    return np.array_split(index, max(1, round(len(index) / size)))


def visit(
    state: State, settings, particles: Particles, search: Search, index: np.ndarray, local: bool, clock: dict, tick: Tick
) -> Visited:
    """Read, score and sum all particles, a chunk at a time."""
    chunks = in_chunks(index, settings.chunk_particles)
    total: Sums | None = None
    found: list[Found] = []
    bad: dict[int, str] = {}
    radius = search.levels[-1].radius
    progress = Progress(tick, len(index))
    for chunk in chunks:
        part = progress.part(len(chunk))
        lap = time.perf_counter()
        part("read", 0.0)(0.0)
        search.kept.clear()
        batch, raw, complaints = make_batch(state, search, particles, chunk, radius)
        bad.update(complaints)
        all_bad(state, bad, len(particles))
        clock["read"] = clock.get("read", 0) + time.perf_counter() - lap
        if not len(batch.index):
            progress.done(len(chunk))
            continue
        lap = time.perf_counter()
        start = local_candidates(state, search, settings, batch.index) if local else None
        posteriors = run_search(search, batch, start, part("E-step", 0.6, 0.05))
        clock["E-step"] = clock.get("E-step", 0) + time.perf_counter() - lap
        lap = time.perf_counter()
        sums = accumulate(search, batch, raw, posteriors, particles.n_optics, part("M-step", 0.35, 0.65))
        clock["M-step"] = clock.get("M-step", 0) + time.perf_counter() - lap
        total = sums if total is None else total + sums
        found.append(best_poses(search, batch, posteriors, particles.pixel_size))
        progress.done(len(chunk))
    if total is None:
        raise none_left(bad)
    return Visited(total, found, bad)


def make_batch(
    state: State, search: Search, particles: Particles, chunk: np.ndarray, radius: int
) -> tuple[Batch, RawBatch, dict[int, str]]:
    """Read particles and divide them by the noise; complaints about unreadable ones by particle number."""
    items, at, sentences = particles.fetch(chunk, radius)
    missing = np.setdiff1d(np.arange(len(chunk)), at)
    complaints = dict(zip(chunk[missing].tolist(), sentences, strict=True))
    index = chunk[at]
    ball = half_ball(radius)
    projector = search.projector(radius)
    offsets = state.poses.offsets[index] / particles.pixel_size
    priors = particles.offset_priors[index] / particles.pixel_size
    n = len(ball)
    masked = np.empty((len(index), n), projector.complex)
    unmasked, scaled = np.empty_like(masked), np.empty_like(masked)
    weight, raw_weight = (np.empty((len(index), n), projector.dtype) for _ in range(2))
    no_zero = ball.weight.copy()
    no_zero[0] = 0  # the E-step leaves out k = 0
    of_group = {}  # what divides by an optics group's noise, with and without k = 0
    for group in set(particles.optics[index].tolist()):
        inverse = (1 / state.sigma2[group])[ball.shell]
        of_group[group] = [(inverse * mates).astype(projector.dtype) for mates in (ball.weight, no_zero)]

    def fill(j: int) -> None:
        item, (inverse, without_zero) = items[j], of_group[int(particles.optics[index[j]])]
        moved = ball.phases(offsets[j], search.box, projector.complex)[0] * projector.dtype.type(state.grey_scale)
        masked[j] = item.masked * moved
        scaled[j] = masked[j] * without_zero
        unmasked[j] = item.unmasked * moved * inverse
        raw_weight[j] = item.weight
        weight[j] = item.weight * inverse

    search.backend.map(fill, range(len(index)), at_once=8)
    centre = centre_rows(state, particles, index, search)
    batch = Batch(index, scaled, unmasked, weight, offsets, priors, centre)
    return batch, RawBatch(masked, raw_weight, particles.optics[index]), complaints


def centre_rows(state: State, particles: Particles, index: np.ndarray, search: Search) -> np.ndarray:
    """Which of the mini-batch's prior centres each particle has."""
    return cKDTree(search.centres).query(prior_centres(state, particles, index, search.prior))[1]


def local_orientations(state: State, search: Search, settings, index: np.ndarray, device: Device = HOST) -> np.ndarray:
    """Coarse orientations around each particle's last pose, or all that any centre admits for one that was never visited.

    device: where the angles between poses and grid are found. Returns bool `(p, orientations)` on the host.
    """
    grid, group = search.levels[0].grid, operators(search.symmetry)
    rotations = device.put(grid.rotations(search.perturbation).reshape(len(grid), 9)).T
    poses = euler_to_matrix(state.poses.angles[index])
    limit = np.cos(np.radians(settings.local_range * 360 / grid.n_psi)) - 1e-9  # whatever rounding makes of the very edge
    near = np.empty((len(index), len(grid)), bool)
    at_once = max(1, TRACES // (len(grid) * len(group)))
    for first in range(0, len(index), at_once):
        some = slice(first, first + at_once)
        mates = device.put((poses[some, None] @ group).reshape(-1, 9))
        trace = (mates @ rotations).reshape(-1, len(group), len(grid)).max(1)
        near[some] = device.get((trace - 1) / 2 >= limit)
    new = state.poses.last_visit[index] == 0
    if new.any():
        inside = search.prior.within_cut(grid.rotations(0.0), search.centres, search.symmetry) if search.prior.active else True
        near[new] = np.any(inside, axis=0)
    near[~near.any(1)] = True
    return near


def local_candidates(state: State, search: Search, settings, index: np.ndarray) -> list[Candidates]:
    """What a local search starts from: :func:`local_orientations` in every class, with all coarse shifts."""
    classes, shifts = np.arange(len(search.volumes)), np.arange(len(search.coarse_shifts))
    found = [np.flatnonzero(mine) for mine in local_orientations(state, search, settings, index)]
    return [Candidates(np.repeat(classes, len(mine)), np.tile(mine, len(classes)), shifts) for mine in found]


def best_poses(search: Search, batch: Batch, posteriors: list[Posterior], pixel_size: float) -> Found:
    """Pose of greatest weight of every particle; offsets in Å."""
    level = search.levels[-1]
    shifts = search.shifts(level.fine_shifts)
    best = np.array([p.best for p in posteriors])
    rotations = level.grid.rotations(search.perturbation, best[:, 1])
    chosen = np.array([shifts[p.shifts[p.best[2]]] for p in posteriors])
    return Found(
        batch.index, matrix_to_euler(rotations), (batch.offsets + chosen) * pixel_size, best[:, 0],
        np.array([p.pmax for p in posteriors]), np.array([p.share(p.best[0]) for p in posteriors]),
        np.array([p.log_evidence for p in posteriors]),
        np.array([p.n_significant for p in posteriors]),
    )  # fmt: skip
