"""What a mini-batch searches: levels of orientation grids, candidates, priors, and what all particles share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vdamkit.backend import Backend
from vdamkit.imaging.halfball import half_ball
from vdamkit.imaging.projector import Projector, get_projector
from vdamkit.sampling.euler import upright
from vdamkit.sampling.orientations import OrientationGrid, angular_step, orientation_grid
from vdamkit.sampling.priors import OrientationPrior, unique_centres
from vdamkit.sampling.shifts import child_offsets, shift_grid

if TYPE_CHECKING:
    from vdamkit.state import State
    from vdamkit.vdam.start import Particles

COSTLY_PASS = 5e9  # FLOP per particle of a full coarse pass beyond which most mini-batches search locally, on a CPU
COSTLY_ON_DEVICE = 2e10  # the same on a GPU, which does the product faster than lists of neighbourhoods
KEPT_BYTES = 400 * 2**20  # of the last level's rotated references, kept for the M-step


@dataclass(frozen=True)
class Level:
    """One pass: an orientation grid, the half-ball it is scored on, and whether shifts are oversampled."""

    grid: OrientationGrid
    radius: int
    fine_shifts: bool


@dataclass(frozen=True)
class Candidates:
    """What is still in play for one particle: orientations of the level's grid (per class) and coarse shifts."""

    classes: np.ndarray  # (m,)
    orientations: np.ndarray  # (m,)
    shifts: np.ndarray  # (s,) indices of coarse shifts


@dataclass
class Block:
    """Scores of one particle in one group of rotations: log-posterior, later weights; `(rows, shifts)`."""

    group: tuple[int, int]
    class_index: int
    orientations: np.ndarray  # (rows,) in the level's grid, ascending
    scores: np.ndarray


@dataclass
class Posterior:
    """One particle's posterior on the last level."""

    blocks: list[Block]
    shifts: np.ndarray  # (s,) indices into the mini-batch's table of shifts
    log_evidence: float = 0.0
    best: tuple[int, int, int] = (0, 0, 0)  # class, orientation, shift index into `shifts`
    pmax: float = 0.0
    n_significant: int = 0

    def share(self, class_index: int) -> float:
        """Part of the posterior that a class holds, over all orientations and shifts that were kept."""
        kept = [float(block.scores.sum(dtype=np.float64)) for block in self.blocks]
        mine = [value for value, block in zip(kept, self.blocks, strict=True) if block.class_index == class_index]
        return sum(mine) / sum(kept)


@dataclass(frozen=True)
class Batch:
    """Particles of one mini-batch, ready for scoring: everything already divided by the noise variance.

    Arrays are on the half-ball of the current radius; b is moved by the particle's last offset.
    """

    index: np.ndarray  # (p,) particle numbers
    masked: Any  # (p, n) complex, b / sigma², Friedel weights applied, k = 0 left out
    unmasked: Any  # (p, n) complex, the same of the unmasked images, k = 0 kept
    weight: Any  # (p, n) real, w / sigma², Friedel weights applied
    offsets: np.ndarray  # (p, 3) px, last offset
    offset_priors: np.ndarray  # (p, 3) px
    centre: np.ndarray  # (p,) row of each particle among the prior centres


@dataclass(frozen=True)
class Search:
    """What all particles of a mini-batch share."""

    box: int
    backend: Backend
    dtype: str
    levels: tuple[Level, ...]
    perturbation: float  # degrees δ of A(δ, δ, δ)
    coarse_shifts: np.ndarray  # (s, 3) px, perturbed
    child_offsets: np.ndarray  # (8, 3) px
    prior: OrientationPrior
    centres: np.ndarray  # (c, 3) degrees
    symmetry: str
    sigma_offset: float  # px
    log_class: np.ndarray  # (K,) log prior of each class
    adaptive_fraction: float
    max_significant: int
    volumes: np.ndarray  # (K, box, box, box)
    references: dict = field(default_factory=dict, repr=False)  # radius -> prepared references; filled on demand
    tables: dict = field(default_factory=dict, repr=False)
    kept: dict = field(default_factory=dict, repr=False)  # group -> (orientations, rows), for the M-step

    def projector(self, radius: int) -> Projector:
        return get_projector(self.box, radius, self.dtype)

    def prepared(self, radius: int) -> list[Any]:
        """References of all classes, transformed for a half-ball of `radius`."""
        if radius not in self.references:
            projector = self.projector(radius)
            self.references[radius] = [projector.prepare(volume) for volume in self.volumes]
        return self.references[radius]

    def shifts(self, fine: bool) -> np.ndarray:
        """Shifts in px `(n, 3)`; fine shift ``8 s + c`` is child c of coarse shift s."""
        return self._fine_shifts if fine else self.coarse_shifts

    @cached_property
    def _fine_shifts(self) -> np.ndarray:
        return (self.coarse_shifts[:, None] + self.child_offsets).reshape(-1, 3)

    def phases(self, radius: int, fine: bool, subset: np.ndarray) -> Any:
        """Phase factors `(shifts, n)`, of which the rows `subset` are valid; the workers compute them, once."""
        projector = self.projector(radius)
        shifts = self.shifts(fine)
        key = (radius, fine)
        if key not in self.tables:
            empty = np.empty((len(shifts), len(projector.ball)), projector.complex)
            self.tables[key] = (empty, np.zeros(len(shifts), bool))
        table, known = self.tables[key]
        missing, ball = subset[~known[subset]], projector.ball
        if not len(missing):
            return table
        if fine:  # a shift and then a child's, which is less work than from waves along the axes
            coarse = self.phases(radius, False, np.unique(missing // 8))
            child = ball.phases(self.child_offsets, self.box, table.dtype)
            self.backend.map(lambda i: np.multiply(coarse[i // 8], child[i % 8], out=table[i]), missing, at_once=16)
        else:
            self.backend.map(lambda i: ball.phases(shifts[i], self.box, table.dtype, table[i : i + 1]), missing, at_once=4)
        known[missing] = True
        return table

    def keep(self, key: tuple, orientations: np.ndarray, rows: Any) -> None:
        """Keep a group's rotated references for the M-step while there is room; without them it computes them again."""
        if rows.nbytes + sum(kept.nbytes for _, kept in list(self.kept.values())) <= KEPT_BYTES:
            self.kept[key] = (orientations, rows)

    def log_offset(self, batch: Batch, i: int, fine: bool, subset: np.ndarray) -> np.ndarray:
        """Log prior of particle i's offset (last offset + shift); centred on rlnOrigin*Prior or 0, in Å as it should
        be (RELION mixes px and Å)."""
        away = batch.offsets[i] + self.shifts(fine)[subset] - batch.offset_priors[i]
        return -0.5 * (away**2).sum(1) / self.sigma_offset**2

    def log_prior(self, grid: OrientationGrid, orientations: np.ndarray) -> np.ndarray:
        """Log prior `(centres, rows)` at the orientations actually scored, i.e. after the perturbation."""
        if not self.prior.active:
            return np.zeros((len(self.centres), len(orientations)))
        rotations = grid.rotations(self.perturbation, orientations)
        return -0.5 * self.prior.distance(rotations, self.centres, self.symmetry)


def coarse_radius(box: int, pixel_size: float, mask_diameter: float, step: float, limit: int) -> int:
    """Half-ball radius that an angular `step` (degrees) can resolve; 1.2 is a safety factor.

    Source: RELION ml_optimiser.cpp:updateImageSizeAndResolutionPointers.
    """
    resolution = np.pi * mask_diameter * step / 360 / 1.2
    return min(limit, max(4, int(np.ceil(pixel_size * box / resolution))))


def plan_levels(
    order: int, symmetry: str, *, box: int, pixel_size: float, mask_diameter: float, radius: int, adaptive: bool
) -> tuple[Level, ...]:
    """The passes for a HEALPix order: coarse, then children; or one exhaustive pass at the oversampled step.

    Starts no finer than order 2 (15°); order 3 is reached through it, so that no pass scores more than some thousand
    orientations of every particle.
    """
    start = min(order, 2)
    grids = [orientation_grid(start, symmetry)]
    while grids[-1].order < order + 1:
        grids.append(grids[-1].children)
    if not adaptive:
        return (Level(grids[-1], radius, True),)
    radii = [coarse_radius(box, pixel_size, mask_diameter, angular_step(g.order), radius) for g in grids[:-1]]
    levels = [Level(g, r, False) for g, r in zip(grids, radii, strict=False)]
    return (*levels, Level(grids[-1], radius, True))


def make_search(state: State, settings, particles: Particles, backend: Backend, radius: int, index: np.ndarray) -> Search:
    """What the particles of a mini-batch share: grids, priors, references."""
    px, box = particles.pixel_size, particles.box
    symmetry = settings.search_symmetry
    prior = OrientationPrior(settings.rot_prior_width, settings.tilt_prior_width, settings.psi_prior_width)
    levels = plan_levels(
        state.healpix_order, symmetry, box=box, pixel_size=px, mask_diameter=settings.mask_diameter, radius=radius,
        adaptive=settings.adaptive,
    )  # fmt: skip
    centres, _ = unique_centres(prior_centres(state, particles, index, prior))
    step, p = state.offset_step / px, state.perturbation
    # No class is likelier than another before the data speak, as in RELION's runs with angular priors
    # (ml_optimiser.cpp:convertAllSquaredDifferencesToWeights). With populations as priors a class that loses a few particles
    # early on, when maps are blobs, loses all.
    log_class = np.full(len(state.maps), -np.log(len(state.maps)))
    return Search(
        box=box, backend=backend, dtype=settings.real, levels=levels,
        perturbation=p * angular_step(levels[0].grid.order if settings.adaptive else state.healpix_order),
        coarse_shifts=shift_grid(state.offset_range / px, step) + p * step, child_offsets=child_offsets(step),
        prior=prior, centres=centres, symmetry=symmetry, sigma_offset=state.sigma_offset / px, log_class=log_class,
        adaptive_fraction=settings.adaptive_fraction, max_significant=settings.max_significant, volumes=state.maps,
    )  # fmt: skip


def is_local(settings, search: Search, iteration: int) -> bool:
    """Whether this mini-batch searches around last poses only (`Settings.global_search_every`); by shapes alone."""
    every = settings.global_search_every
    if every is None:
        level = search.levels[0]
        voxels = len(half_ball(level.radius))
        cost = 4 * voxels * len(level.grid) * len(search.shifts(level.fine_shifts)) * len(search.volumes)
        every = 5 if cost > (COSTLY_ON_DEVICE if search.backend.on_device else COSTLY_PASS) else 1
    return every > 1 and iteration % every != 0


def prior_centres(state: State, particles: Particles, index: np.ndarray, prior: OrientationPrior) -> np.ndarray:
    """Prior centres `(p, 3)` in degrees: the file's, or the current angle where it has none (it then walks along)."""
    if not prior.active:
        return np.zeros((len(index), 3))
    priors = particles.angle_priors[index]
    centres = np.where(np.isnan(priors), upright(state.poses.angles[index]), priors)
    free = [width is None for width in (prior.rot, prior.tilt, prior.psi)]
    return np.where(free, 0.0, centres)
