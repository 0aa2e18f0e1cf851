"""Auto-sampling: how precisely the current map can be aligned, and what that means for the grids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vdamkit.backend import Backend
from vdamkit.backend.device import HOST, Device, or_on_host
from vdamkit.imaging.device_projector import device_projector
from vdamkit.imaging.projector import Projector
from vdamkit.imaging.turns import Turns
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.sampling.orientations import angular_step
from vdamkit.state import State
from vdamkit.vdam import schedule

P_VALUE = 4.60517  # -ln 0.01: an error is noticed when it costs that much log-likelihood
ANGLES = np.array([0.5, 1, 2, 4, 8, 15, 30])  # degrees
SHIFTS = np.array([0.1, 0.25, 0.5, 1, 2, 4, 10])  # px


def alignment_accuracy(
    volumes: np.ndarray, projector: Projector, backend: Backend, weights: np.ndarray, angles: np.ndarray, rng
) -> tuple[float, float]:  # fmt: skip
    """Errors (degrees, px) at which a particle's log-likelihood drops by P_VALUE, averaged over some particles.

    volumes: maps of the classes. weights `(p, n)`: w/σ² of the particles. angles `(p, 3)`: their rot, tilt, psi in degrees.
    Of each particle one angle, drawn at random, and a shift along a random axis are raised. The best class counts. A ladder of
    errors with log-log interpolation replaces RELION's small steps.
    Source: RELION ml_optimiser.cpp:calculateExpectedAngularErrors.
    """
    best = (np.inf, np.inf)
    k = projector.ball.k
    for volume in volumes:
        turns, directions = np.eye(3)[rng.integers(3, size=(2, len(weights)))]
        raised = angles + np.append(0, ANGLES)[:, None, None] * turns  # (1 + errors, p, 3); the first is as it is
        rows = _rotated(volume, projector, backend, euler_to_matrix(raised))

        def errors(i: int, rows=rows, directions=directions) -> tuple[float, float]:
            base = rows[0, i]
            costs = [float(0.5 * (weights[i] * np.abs(moved - base) ** 2).sum()) for moved in rows[1:, i]]
            angular = _crossing(ANGLES, np.array(costs))
            phase = 2 * np.pi / projector.box * (k @ directions[i])
            energy = weights[i] * np.abs(base) ** 2
            costs = [float((energy * (1 - np.cos(phase * t))).sum()) for t in SHIFTS]
            return angular, _crossing(SHIFTS, np.array(costs))

        found = backend.map(errors, range(len(weights)))
        best = min(best, tuple(float(np.mean(values)) for values in zip(*found, strict=True)))
    return best


def _rotated(volume: np.ndarray, projector: Projector, backend: Backend, rotations: np.ndarray) -> np.ndarray:
    """A map at rotations `(..., 3, 3)`, `(..., n)` complex on the host."""
    many = rotations.reshape(-1, 3, 3)

    def work(device: Device) -> np.ndarray:
        if device is HOST:
            cube = projector.prepare(volume)

            return np.concatenate(backend.map(lambda one: projector.rotate_rows(cube, Turns.single(one[None])), many))
        there = device_projector(projector, device)
        return device.get(there.rotate(there.prepare(volume), Turns.single(many)))[:, there.place]

    return or_on_host(backend.device, work).reshape(*rotations.shape[:-2], -1)


def _crossing(errors: np.ndarray, costs: np.ndarray) -> float:
    """Error at which the cost first reaches P_VALUE; the largest error where it never does."""
    above = np.flatnonzero(costs >= P_VALUE)
    if not len(above):
        return float(errors[-1])
    i = above[0]
    if i == 0:
        return float(errors[0] * np.sqrt(P_VALUE / costs[0]))
    x = np.log(errors[i - 1 : i + 1])
    y = np.log(np.maximum(costs[i - 1 : i + 1], 1e-12))
    return float(np.exp(x[0] + (np.log(P_VALUE) - y[0]) * (x[1] - x[0]) / max(y[1] - y[0], 1e-12)))


@dataclass(frozen=True)
class Sampling:
    healpix_order: int
    offset_range: float  # Å
    offset_step: float  # Å
    no_gain: int


def refined_sampling(state: State, settings, *, is_stack: bool, accuracy: tuple[float, float], pixel_size: float) -> Sampling:
    """Next grids, if the resolution has stalled and the map can be aligned better than the grid.

    Source: RELION ml_optimiser.cpp:updateAngularSampling.
    """
    same = Sampling(state.healpix_order, state.offset_range, state.offset_step, state.no_gain)
    rotation, offset = accuracy
    oversampled = angular_step(state.healpix_order) / 2
    if state.no_gain < 1 or oversampled < 0.75 * rotation:
        return same
    order = min(state.healpix_order + 1, settings.max_healpix_order)
    # RELION's 1.5 is in Å and meant for fine pixels: here no step falls below half a pixel after oversampling
    step = max(state.offset_step / 2, 2 * min(1.5, 0.75 * offset))
    step = max(step, pixel_size)
    factor = 5 if is_stack else 3
    spread = factor * np.sqrt(state.offset_change2 / 2)
    reach = max(min(spread, 1.3 * state.offset_range), 1.5 * step)
    if reach > 4 * step:
        reach /= 2
    if reach > 4 * step:
        step = reach / 4
    if step > state.offset_step:
        reach, step = state.offset_range, state.offset_step
    return Sampling(order, float(reach), float(step), 0)


def changed_sampling(state: State, old, new, pixel_size: float) -> State:
    """The state with what a person changed of the grids between two mini-batches, from settings `old` to `new`."""
    px = {"healpix_order": 1, "offset_range": pixel_size, "offset_step": pixel_size, "sigma_offset": 1}
    changed = [name for name in px if getattr(old, name) != getattr(new, name)]
    return state.replace(**{name: getattr(new, name) * px[name] for name in changed})


def due(iteration: int) -> bool:
    """Auto-sampling is considered at every tenth mini-batch."""
    return iteration % 10 == 0


def accuracy_generator(settings, iteration: int) -> np.random.Generator:
    return schedule.generator(settings.seed, iteration, schedule.ACCURACY)
