"""What one mini-batch needs and what it says: plain, immutable data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Poses:
    """Where every particle stands; arrays over all particles of the set, in file order."""

    angles: np.ndarray  # (n, 3) degrees rot, tilt, psi
    offsets: np.ndarray  # (n, 3) Å, xyz in the subtomogram frame (rlnOriginX/Y/ZAngst)
    class_number: np.ndarray  # (n,) int32, 1-based; 0: never visited
    pmax: np.ndarray  # (n,) float32, rlnMaxValueProbDistribution
    log_likelihood: np.ndarray  # (n,) float64, rlnLogLikeliContribution
    n_significant: np.ndarray  # (n,) int32, rlnNrOfSignificantSamples
    last_visit: np.ndarray  # (n,) int32, mini-batch of the last visit; 0: never
    class_share: np.ndarray  # (n,) float32, part of the posterior that its class holds, over all poses

    def updated(self, index: np.ndarray, **values: np.ndarray) -> Poses:
        """A copy with new values at `index`."""
        new = {}
        for name, value in values.items():
            new[name] = getattr(self, name).copy()
            new[name][index] = value
        return dataclasses.replace(self, **new)


@dataclass(frozen=True)
class Plan:
    """Which part of the schedule a mini-batch is in. Changing the number of mini-batches in mid-run keeps the part that is
    done and spreads the rest over what is to come."""

    total: int = 0  # mini-batches of the schedule in force; 0: none has run yet
    start: int = 0  # mini-batch at which the number was last changed
    done: float = 0.0  # part of the schedule behind that mini-batch, 0 … 1

    def position(self, iteration: int) -> float:
        """Mini-batch number in a schedule of `total` that was never changed; beyond `total` when past the end."""
        if self.start == 0:
            return float(iteration)
        if self.total <= self.start or iteration >= self.total:
            return float(self.total + max(0, iteration - max(self.start, self.total)))
        rest = (iteration - self.start) / (self.total - self.start)
        return self.total * (self.done + (1 - self.done) * rest)

    def changed(self, iteration: int, total: int) -> Plan:
        """The plan after mini-batch `iteration` when it is to end with mini-batch `total`."""
        if total == self.total:
            return self
        if iteration == 0 or self.total == 0:
            return Plan(total)
        return Plan(total, iteration, min(1.0, self.position(iteration) / self.total))


@dataclass(frozen=True)
class State:
    """Everything that a mini-batch leaves to the next. Arrays are never changed in place.

    Grey values are in vdamkit's internal scale: data × `grey_scale` has a noise variance near 1.
    """

    iteration: int
    maps: np.ndarray  # (K, N, N, N) zyx
    moment1: np.ndarray  # (K, 2, N, N, N//2 + 1) complex, per pseudo-half-set
    moment2: np.ndarray  # (K, N, N, N//2 + 1) real
    sigma2: np.ndarray  # (G, N//2 + 1) noise variance per optics group and shell, per real component
    class_probability: np.ndarray  # (K,)
    sigma_offset: float  # Å
    perturbation: float
    resolution_shell: int
    healpix_order: int
    offset_range: float  # Å
    offset_step: float  # Å
    no_gain: int  # mini-batches without better resolution
    offset_change2: float  # mean |change of offset|² over the last batch, Å²
    poses: Poses
    data_vs_prior: np.ndarray  # (K, N//2 + 1)
    tau2: np.ndarray  # (K, N//2 + 1)
    wiener: np.ndarray  # (K, N//2 + 1) Wiener factor of the last update
    half_fsc: np.ndarray  # (K, N//2 + 1) FSC of the two pseudo-halves' first moments
    accuracy_rotation: float  # degrees; nan until estimated
    accuracy_offset: float  # Å
    grey_scale: float
    bad_particles: tuple[int, ...] = ()
    plan: Plan = Plan()

    def position(self, settings) -> float:
        """Place of the current mini-batch in the schedule of `settings`, see :class:`Plan`."""
        return self.plan.changed(self.iteration, settings.mini_batches).position(self.iteration)

    def replace(self, **changes) -> State:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class StepReport:
    """What one mini-batch found, in plain numbers."""

    iteration: int
    n_particles: int
    resolution: float  # Å
    radius: int  # px, half-ball in use
    healpix_order: int
    search: str  # how the orientations were searched
    n_rotations: int  # of the last level, as planned
    T: float  # in force
    step_size: float
    pmax: float
    sigma_offset: float  # Å
    angle_change: float  # degrees, median over particles visited before; nan if none
    offset_change: float  # Å, root mean square
    class_populations: tuple[float, ...]
    log_likelihood: float  # mean per particle
    bad: tuple[str, ...]  # particles left out in this mini-batch, one sentence each
    seconds: float
    timings: dict[str, float]
    notes: tuple[str, ...] = ()  # what a person should know of how it went, such as memory that ran out on a device

    def __str__(self) -> str:
        populations = (
            ""
            if len(self.class_populations) == 1
            else ", classes " + "/".join(f"{100 * p:.0f}%" for p in self.class_populations)
        )
        step = 60 / 2**self.healpix_order
        return (
            f"mini-batch {self.iteration}: {self.n_particles} particles, {self.resolution:.1f} Å, T {self.T:.2f}, "
            f"Pmax {self.pmax:.2f}, step {step:g}° / {step / 2:g}°, offsets σ {self.sigma_offset:.1f} Å{populations} "
            f"({self.seconds:.2f} s)" + "".join(f"; {note}" for note in self.notes)
        )
