"""Step size, T, batch size and resolution as functions of the place in the schedule.

The place (`position`) is the mini-batch number, unless the number of mini-batches was changed in mid-run (`state.Plan`).
"""

from __future__ import annotations

import numpy as np

FEWEST = 10  # particles of a mini-batch, unless it is said otherwise


def phases(mini_batches: int, ini_fraction: float, fin_fraction: float) -> tuple[int, int, int]:
    """Lengths of the initial, middle and final phase. Source: RELION ml_optimiser.cpp:parseInitial."""
    total = ini_fraction + fin_fraction
    if total > 0.9:
        ini_fraction, fin_fraction = ini_fraction / (total + 0.1), fin_fraction / (total + 0.1)
    first, last = int(ini_fraction * mini_batches), int(fin_fraction * mini_batches)
    return first, mini_batches - first - last, last


def sigmoid(iteration: float, begin: float, length: int) -> float:
    """From 1 to 0 around ``begin + length/2``: ``1 / (1 + 10^((x - b - L/2) / (L/4)))``."""
    if length <= 0:
        return 1.0 if iteration <= begin else 0.0
    return float(1 / (1 + 10 ** np.clip((iteration - begin - length / 2) / (length / 4), -300, 300)))


def step_size(position: float, settings) -> float:
    """η: 0.9 → 0.5. Source: RELION ml_optimiser.cpp:updateStepSize."""
    if settings.step_scheme == "constant":
        return settings.step_final
    first, middle, _ = phases(settings.mini_batches, settings.ini_fraction, settings.fin_fraction)
    s = sigmoid(position, first, middle // 2)
    return settings.step_initial * s + settings.step_final * (1 - s)


def tau2_fudge(position: float, settings) -> float:
    """T in force: 1 → T. Source: RELION ml_optimiser.cpp:updateTau2Fudge."""
    if settings.T_scheme == "constant":
        return settings.T
    first, middle, _ = phases(settings.mini_batches, settings.ini_fraction, settings.fin_fraction)
    s = sigmoid(position, first, middle // 4)
    return min(1.0, settings.T) * s + settings.T * (1 - s)


def batch_size(position: float, n_particles: int, settings, *, last: bool = False) -> int:
    """Particles of a mini-batch; `n_particles` where all are used, as in the `last` one of several classes.

    Source: RELION ml_optimiser.cpp:initialiseGeneral, updateSubsetSize. RELION takes all of a set of 200 or fewer from the
    start, so that each particle finds its own noise in the map wherever it first came to lie, and stays there (upside down,
    say). A quarter of the set to begin with is less of that, and less work. Several classes need all to be told apart.
    """
    most = n_particles if settings.classes > 1 else max(FEWEST, n_particles // 4)
    initial = settings.batch_initial or min(int(max(min(0.005 * n_particles, 5000), 200)), most)
    final = settings.batch_final or min(int(max(min(0.1 * n_particles, 50000), 1000)), n_particles)
    first, middle, _ = phases(settings.mini_batches, settings.ini_fraction, settings.fin_fraction)
    if position < first:
        size = initial
    elif position < first + middle:
        size = initial + round((position - first) / middle * (final - initial))
    else:
        size = final
    if settings.classes > 1 and last:
        return n_particles
    return min(size, n_particles)


def generator(seed: int, iteration: int, purpose: int) -> np.random.Generator:
    """The random numbers of one mini-batch and one purpose (see the constants below); nothing is shared or global."""
    sequence = np.random.SeedSequence(seed, spawn_key=(iteration, purpose))
    return np.random.Generator(np.random.Philox(sequence))


SHUFFLE, PERTURBATION, START, ACCURACY = range(4)


def draw_batch(iteration: int, size: int, n_particles: int, settings) -> np.ndarray:
    """Numbers of the `size` particles of a mini-batch, ascending, without replacement.

    Source: RELION exp_model.cpp:randomiseParticlesOrder.
    """
    if size >= n_particles:
        return np.arange(n_particles)
    order = generator(settings.seed, iteration, SHUFFLE).permutation(n_particles)
    return np.sort(order[:size])


def next_perturbation(previous: float, iteration: int, settings) -> float:
    """p in [-0.5, 0.5): fraction of the coarse step that this mini-batch's grids are moved by.

    Source: RELION healpix_sampling.cpp:resetRandomlyPerturbedSampling (`--perturb`).
    """
    if settings.perturbation == 0:
        return 0.0
    factor = settings.perturbation
    p = previous + generator(settings.seed, iteration, PERTURBATION).uniform(0.5 * factor, factor)
    return float((p + factor) % (2 * factor) - factor)


def resolution_shell(data_vs_prior: np.ndarray, minimum: int, largest: int) -> int:
    """Last shell before data_vs_prior `(K, n)` first falls below 1, best class; within [minimum, largest].

    Source: RELION ml_optimiser.cpp:updateCurrentResolution.
    """
    best = 0
    for curve in np.atleast_2d(data_vs_prior):
        below = np.flatnonzero(curve[1:] < 1)
        best = max(best, below[0] if len(below) else len(curve) - 1)
    return int(np.clip(best, minimum, largest))


def current_radius(shell: int, settings, box: int) -> int:
    """Half-ball radius in use: the resolution shell plus `shell_increment`, at most box/2 (RELION --incr_size)."""
    return int(min(box // 2, shell + settings.shell_increment))
