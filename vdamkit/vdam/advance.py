"""One mini-batch of VDAM: a pure function from state to state."""

from __future__ import annotations

import time

import numpy as np

from vdamkit.backend import Backend
from vdamkit.backend.device import Device, or_on_host
from vdamkit.imaging.halfball import half_ball
from vdamkit.imaging.masks import mask_power
from vdamkit.imaging.projector import get_projector
from vdamkit.sampling.euler import euler_to_matrix, rotation_angle
from vdamkit.sampling.point_groups import operators
from vdamkit.state import State, StepReport
from vdamkit.vdam import accuracy, schedule
from vdamkit.vdam.accumulate import Sums
from vdamkit.vdam.batched.gradients import half_gradients as half_gradients_on_device
from vdamkit.vdam.batched.visit import visit as visit_on_devices
from vdamkit.vdam.moments import constrained, half_gradients, resolution_statistics, vdam_update
from vdamkit.vdam.search import Search, is_local, make_search
from vdamkit.vdam.start import Particles
from vdamkit.vdam.visit import Found, Tick, Visited, all_bad, no_tick, none_left, visit

FIRST_COUNT = 9  # mini-batch from whose end on those without better resolution are counted, so that the tenth may refine grids


def advance(state: State, settings, particles: Particles, backend: Backend, tick: Tick = no_tick) -> tuple[State, StepReport]:
    """The state after one more mini-batch, and what it found.

    Parameters
    ----------
    state: from :func:`initial_state` or an earlier call. settings: in force for this mini-batch.
    tick: called with a stage and the fraction of the mini-batch that is done; may raise :class:`Cancelled`.

    Source of the order of steps: RELION ml_optimiser.cpp:iterate.
    """
    began = time.perf_counter()
    clock: dict[str, float] = {}
    iteration = state.iteration + 1
    with backend.limits():
        perturbation = schedule.next_perturbation(state.perturbation, iteration, settings)
        plan = state.plan.changed(state.iteration, settings.mini_batches)
        state = state.replace(perturbation=perturbation, plan=plan)
        last = iteration == settings.mini_batches
        size = schedule.batch_size(plan.position(iteration), len(particles), settings, last=last)
        index = schedule.draw_batch(iteration, size, len(particles), settings)
        index = np.setdiff1d(index, np.asarray(state.bad_particles, int))
        if not len(index):
            raise none_left({})
        radius = schedule.current_radius(state.resolution_shell, settings, particles.box)
        if settings.auto_sampling and accuracy.due(iteration):
            state = _update_sampling(state, settings, particles, backend, index, radius, iteration)
        search = make_search(state, settings, particles, backend, radius, index)
        local = is_local(settings, search, iteration)
        if backend.on_device:
            upcoming = _upcoming(state, settings, len(particles), iteration)
            seen = visit_on_devices(state, settings, particles, search, index, local, clock, tick, upcoming)
        else:
            seen = visit(state, settings, particles, search, index, local, clock, tick)
        tick("update", 0.97)
        lap = time.perf_counter()
        new = _maximise(state, settings, particles, backend, search, seen.sums, len(index), len(particles), iteration)
        clock["update"] = time.perf_counter() - lap
        new, changes = _write_poses(new, state, seen.found, iteration, search.symmetry)
        new = new.replace(bad_particles=all_bad(state, seen.bad, len(particles)))
    tick("done", 1.0)
    return new, _report(new, settings, particles, search, seen, changes, radius, local, clock, began)


def _upcoming(state: State, settings, n_particles: int, iteration: int) -> np.ndarray:
    """Particles of the mini-batch after this one, if the settings stay as they are."""
    if iteration >= settings.mini_batches:
        return np.zeros(0, int)
    last = iteration + 1 == settings.mini_batches
    size = schedule.batch_size(state.plan.position(iteration + 1), n_particles, settings, last=last)
    index = schedule.draw_batch(iteration + 1, size, n_particles, settings)
    return np.setdiff1d(index, np.asarray(state.bad_particles, int))


# M-step -------------------------------------------------------------------------------------------------------------


def _maximise(
    state: State, settings, particles: Particles, backend: Backend, search: Search, sums: Sums, n_used: int,
    n_particles: int, iteration: int,
) -> State:  # fmt: skip
    """Maps, moments, noise, populations, offset width and resolution from the sums of a mini-batch."""
    level = search.levels[-1]
    radius, box, px = level.radius, particles.box, particles.pixel_size
    projector = search.projector(radius)
    position = state.plan.position(iteration)
    T, eta = schedule.tau2_fudge(position, settings), schedule.step_size(position, settings)
    classes = len(state.maps)
    updated = {name: getattr(state, name).copy() for name in
               ("maps", "moment1", "moment2", "data_vs_prior", "tau2", "wiener", "half_fsc")}  # fmt: skip
    for k in range(classes):
        if state.class_probability[k] == 0 or sums.class_weight[k] == 0:
            continue
        gradients_of = half_gradients_on_device if backend.on_device else half_gradients
        gradients = gradients_of(projector.grid, sums.cubes[k], search.symmetry, radius, backend)
        if not gradients.weight[0].any():  # nobody of half 0, from whose weight the resolution comes: it keeps its map
            continue
        result = vdam_update(
            state.maps[k].astype(np.float64), state.moment1[k], state.moment2[k], gradients, radius=radius,
            step=eta * (1 - np.exp(-(3 * classes + 10) * state.class_probability[k])), T=T,
            momentum=settings.momentum, second_momentum=settings.second_momentum,
        )  # fmt: skip
        updated["tau2"][k], updated["data_vs_prior"][k] = resolution_statistics(result.power, gradients.weight[0], T)
        mask_radius = settings.mask_diameter / (2 * px)
        updated["maps"][k] = constrained(result.map, settings.solvent, mask_radius, search.symmetry, backend)
        updated["moment1"][k], updated["moment2"][k] = result.moment1, result.moment2
        updated["wiener"][k], updated["half_fsc"][k] = result.wiener, result.half_fsc

    mu = 0.0 if n_used >= n_particles - len(state.bad_particles) else settings.mu
    shell = schedule.resolution_shell(updated["data_vs_prior"], settings.min_resolution_shell, box // 2 - 1)
    probability = mu * state.class_probability + (1 - mu) * sums.class_weight / sums.class_weight.sum()
    spread2 = sums.offset2 * px**2 / (3 * sums.class_weight.sum())
    sigma_offset = np.sqrt(mu * state.sigma_offset**2 + (1 - mu) * spread2)
    gained = shell > state.resolution_shell
    return state.replace(
        **updated, iteration=iteration, sigma2=_noise(state, settings, particles, sums, mu),
        class_probability=probability / probability.sum(),
        sigma_offset=float(max(sigma_offset, settings.min_sigma_offset)), resolution_shell=shell,
        no_gain=0 if gained or iteration < FIRST_COUNT else state.no_gain + 1,
    )  # fmt: skip


def _noise(state: State, settings, particles: Particles, sums: Sums, mu: float) -> np.ndarray:
    """σ² per optics group and shell: shell sums of |b' − w'A|² over those of w', undone for the mask."""
    kept = mask_power(particles.box, settings.mask_diameter / (2 * particles.pixel_size), particles.mask_ndim)
    sigma2 = state.sigma2.copy()
    n = sums.noise.shape[1]
    known = (sums.noise_weight > 0) & (sums.noise > 0)
    fresh = sums.noise / np.maximum(sums.noise_weight, 1e-300) / 2 / kept
    sigma2[:, :n] = np.where(known, mu * sigma2[:, :n] + (1 - mu) * fresh, sigma2[:, :n])
    return sigma2


def _update_sampling(
    state: State, settings, particles: Particles, backend: Backend, index: np.ndarray, radius: int, iteration: int
) -> State:
    """Every tenth mini-batch: estimate accuracies, refine the grids if that helps."""
    rng = accuracy.accuracy_generator(settings, iteration)
    visited = index[state.poses.last_visit[index] > 0]
    if not len(visited):
        return state
    some = np.sort(rng.permutation(visited)[:12])
    projector = get_projector(particles.box, radius, settings.real)

    def seen(device: Device) -> tuple[np.ndarray, np.ndarray]:
        """w of the particles, and which of them can be used."""
        (_, _, weight), at, _ = particles.fetch_on(device, some, radius)
        return device.get(weight), at

    weight, at = or_on_host(backend.device, seen)
    if not len(at):
        return state
    ball = half_ball(radius)
    weights = (weight * ball.weight / state.sigma2[particles.optics[some[at]]][:, ball.shell]).astype(settings.real)
    volumes = state.maps[state.class_probability >= 0.01]
    rotation, offset = accuracy.alignment_accuracy(volumes, projector, backend, weights, state.poses.angles[some[at]], rng)
    found = (rotation, offset * particles.pixel_size)
    new = accuracy.refined_sampling(
        state, settings, is_stack=particles.mask_ndim == 2, accuracy=found, pixel_size=particles.pixel_size
    )
    return state.replace(
        healpix_order=new.healpix_order, offset_range=new.offset_range, offset_step=new.offset_step, no_gain=new.no_gain,
        accuracy_rotation=found[0], accuracy_offset=found[1],
    )  # fmt: skip


# book-keeping -------------------------------------------------------------------------------------------------------


def _write_poses(new: State, old: State, found: list[Found], iteration: int, symmetry: str) -> tuple[State, tuple]:
    """Poses into the state; also the median change of angle and the rms change of offset since the last visit."""
    index = np.concatenate([f.index for f in found])
    values = {
        "angles": np.concatenate([f.angles for f in found]),
        "offsets": np.concatenate([f.offsets for f in found]),
        "class_number": np.concatenate([f.classes for f in found]) + 1,
        "pmax": np.concatenate([f.pmax for f in found]),
        "class_share": np.concatenate([f.class_share for f in found]),
        "log_likelihood": np.concatenate([f.log_likelihood for f in found]),
        "n_significant": np.concatenate([f.n_significant for f in found]),
        "last_visit": np.full(len(index), iteration),
    }
    before = old.poses.last_visit[index] > 0
    angle = float("nan")
    if before.any():
        a = euler_to_matrix(values["angles"][before])
        b = euler_to_matrix(old.poses.angles[index[before]])
        turned = [rotation_angle(a, b @ operator) for operator in operators(symmetry)]
        angle = float(np.median(np.min(turned, 0)))
    change2 = ((values["offsets"] - old.poses.offsets[index]) ** 2).sum(1)
    new = new.replace(poses=old.poses.updated(index, **values), offset_change2=float(change2.mean()))
    return new, (angle, float(np.sqrt(change2.mean())))


def _report(
    new: State, settings, particles: Particles, search: Search, seen: Visited, changes: tuple, radius: int, local: bool,
    clock: dict[str, float], began: float,
) -> StepReport:  # fmt: skip
    found, position = seen.found, new.position(settings)
    n = sum(len(f.index) for f in found)
    kind = "exhaustive" if len(search.levels) == 1 else f"{'local' if local else 'global'}, {len(search.levels)} levels"
    return StepReport(
        iteration=new.iteration, n_particles=n,
        resolution=particles.box * particles.pixel_size / new.resolution_shell, radius=radius,
        healpix_order=new.healpix_order, search=kind, n_rotations=len(search.levels[-1].grid),
        T=schedule.tau2_fudge(position, settings), step_size=schedule.step_size(position, settings),
        pmax=float(np.mean(np.concatenate([f.pmax for f in found]))), sigma_offset=new.sigma_offset,
        angle_change=changes[0], offset_change=changes[1], class_populations=tuple(new.class_probability.tolist()),
        log_likelihood=float(np.mean(np.concatenate([f.log_likelihood for f in found]))),
        bad=tuple(seen.bad.values()), notes=(*seen.notes, *particles.take_notes()),
        seconds=time.perf_counter() - began, timings=dict(clock),
    )  # fmt: skip
