"""Scoring particles against a map that stays as it is: single posteriors, and a pose for everyone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vdamkit.backend import Backend
from vdamkit.errors import InputError
from vdamkit.sampling.euler import matrix_to_euler
from vdamkit.state import State
from vdamkit.vdam import schedule
from vdamkit.vdam.batched.visit import find_poses
from vdamkit.vdam.posterior import run_search
from vdamkit.vdam.search import make_search
from vdamkit.vdam.start import Particles
from vdamkit.vdam.visit import best_poses, in_chunks, make_batch


@dataclass(frozen=True)
class ParticlePosterior:
    """The samples that carry a particle's posterior, most probable first."""

    probability: np.ndarray  # (n,) sums to about 1
    rotations: np.ndarray  # (n, 3, 3)
    angles: np.ndarray  # (n, 3) degrees rot, tilt, psi
    offsets: np.ndarray  # (n, 3) Å
    classes: np.ndarray  # (n,) 1-based
    log_evidence: float

    def credible_set(self, level: float = 0.9) -> np.ndarray:
        """Indices of the smallest set of samples that holds `level` of the probability."""
        n = int(np.searchsorted(np.cumsum(self.probability), level)) + 1
        return np.arange(min(n, len(self.probability)))


def _search(state: State, settings, particles: Particles, backend: Backend, index: np.ndarray):
    radius = schedule.current_radius(state.resolution_shell, settings, particles.box)
    return make_search(state, settings, particles, backend, radius, index), radius


def particle_posterior(state: State, settings, particles: Particles, backend: Backend, particle: int) -> ParticlePosterior:
    """Posterior of one particle over class × rotation × shift against the maps of `state`, on its current grids.

    Raises
    ------
    InputError
        where there is no such particle, or its files cannot be used.
    """
    if particle not in range(len(particles)):
        raise InputError(f"there is no particle {particle}; the set has 0 to {len(particles) - 1}")
    index = np.array([particle])
    with backend.limits():
        search, radius = _search(state, settings, particles, backend, index)
        batch, _, complaints = make_batch(state, search, particles, index, radius)
        if complaints:
            raise InputError(complaints[particle])
        posterior = run_search(search, batch, None, lambda fraction: None)[0]
    level = search.levels[-1]
    shifts = search.shifts(level.fine_shifts)[posterior.shifts]
    weights, orientations, offsets, classes = [], [], [], []
    for block in posterior.blocks:
        rows, columns = np.nonzero(block.scores)
        weights.append(block.scores[rows, columns])
        orientations.append(block.orientations[rows])
        offsets.append((batch.offsets[0] + shifts[columns]) * particles.pixel_size)
        classes.append(np.full(len(rows), block.class_index + 1))
    probability = np.concatenate(weights).astype(np.float64)
    order = np.argsort(-probability, kind="stable")
    rotations = level.grid.rotations(search.perturbation, np.concatenate(orientations)[order])
    return ParticlePosterior(
        probability[order], rotations, matrix_to_euler(rotations), np.concatenate(offsets)[order],
        np.concatenate(classes)[order], posterior.log_evidence,
    )  # fmt: skip


def score_all(state: State, settings, particles: Particles, backend: Backend, tick: Callable[[str, float], None]) -> State:
    """The state with a fresh pose for every particle; maps, moments and mini-batch number are unchanged.

    Poses come from a global search on the run's grids, or on those of order 3 (3.75° after oversampling) where they are finer.
    """
    sharp = state.replace(healpix_order=max(state.healpix_order, min(3, settings.max_healpix_order)))
    everyone = np.setdiff1d(np.arange(len(particles)), np.asarray(state.bad_particles, int))
    poses = state.poses
    bad = set(state.bad_particles)
    with backend.limits():
        size = settings.chunk_particles if not backend.on_device else 10 * settings.chunk_particles
        done = 0
        for chunk in in_chunks(everyone, size):
            search, radius = _search(sharp, settings, particles, backend, chunk)
            if backend.on_device:
                parts, complaints = find_poses(sharp, settings, particles, search, chunk)
            else:
                batch, _, complaints = make_batch(sharp, search, particles, chunk, radius)
                parts = []
                if len(batch.index):
                    posteriors = run_search(search, batch, None, lambda f: None)
                    parts = [best_poses(search, batch, posteriors, particles.pixel_size)]
            bad |= set(complaints)
            for found in parts:
                poses = poses.updated(
                    found.index, angles=found.angles, offsets=found.offsets, class_number=found.classes + 1, pmax=found.pmax,
                    class_share=found.class_share,
                    log_likelihood=found.log_likelihood, n_significant=found.n_significant,
                )  # fmt: skip
            done += len(chunk)
            tick("score", done / len(everyone))
    return replace(state, poses=poses, bad_particles=tuple(sorted(bad)))
