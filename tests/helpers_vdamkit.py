"""What several tests need: objects known in closed form, rotations, held mini-batches, reconstruction from given poses."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import vdamkit as vk
from vdamkit.backend import get_backend
from vdamkit.imaging.halfball import fourier_to_map
from vdamkit.imaging.projector import get_projector
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.simulate import simulate
from vdamkit.source import ParticleSource
from vdamkit.vdam.moments import half_gradients

OPTIONS = {"mini_batches": 6, "mask_diameter": 230.0, "threads": 2, "seed": 3, "symmetry": "C6", "tilt_prior_width": 10.0}
"""Of a short run on :func:`hexamers`."""


def hexamers(out: Path) -> Path:
    """24 hexamers as stacks, 6 of them as volumes, in a small box."""
    simulate(out, particles=24, volumes=6, box=20, pixel_size=16.0, tilts=9, variance_ratio=1.0, seed=5)
    return out


def same(a, b) -> bool:
    """Whether two states are equal bit for bit; prints what differs, which is seen where a test fails."""
    found = differences(a, b)
    print(*found, sep="\n", end="\n" if found else "")
    return not found


def differences(a, b) -> list[str]:
    """A line about each field of two states that is not equal bit for bit."""
    out = []
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x):
            out += [f"{field.name}.{line}" for line in differences(x, y)]
            continue
        x, y = np.asarray(x), np.asarray(y)
        if x.shape != y.shape or x.dtype != y.dtype:
            out.append(f"{field.name}: {x.shape} of {x.dtype} and {y.shape} of {y.dtype}")
        elif not np.array_equal(x, y, equal_nan=x.dtype.kind in "fc"):
            wrong = np.flatnonzero(x != y)
            out.append(f"{field.name}: {len(wrong)} of {x.size}, the first at {wrong[0]}, by up to {np.abs(x - y).max():.2g}")
    return out


def random_rotations(n: int, seed: int = 0) -> np.ndarray:
    """Uniform random rotation matrices `(n, 3, 3)`."""
    return Rotation.random(n, rng=np.random.default_rng(seed)).as_matrix()


def rotations() -> st.SearchStrategy:
    """Hypothesis strategy: rotation matrices `(3, 3)`, from Euler angles that include the degenerate ones."""
    angle = st.one_of(st.sampled_from([0.0, 90.0, 180.0, -90.0]), st.floats(-180, 180))
    return st.tuples(angle, angle, angle).map(lambda a: Rotation.from_euler("ZYZ", a, degrees=True).as_matrix())


def hold(session, until: Callable[[], bool], seconds: float = 30.0) -> threading.Event:
    """Let the session's next mini-batch wait at its first chunk until something is true, however fast the machine is.

    What a test does meanwhile is then certain to happen within that mini-batch. The event returned says that it waits.
    """
    held = threading.Event()

    def wait(stage: str, fraction: float) -> None:
        held.set()
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, "what the mini-batch was held for did not happen in time"
            time.sleep(0.002)
        if wait in session.listeners:  # several threads may tell it at once
            session.listeners.remove(wait)

    session.listeners.append(wait)
    return held


@dataclass(frozen=True)
class Blobs:
    """Gaussian blobs; positions and widths in Å (or px, where the pixel size is 1), xyz."""

    amplitude: np.ndarray  # (m,)
    position: np.ndarray  # (m, 3)
    sigma: np.ndarray  # (m,)

    @classmethod
    def random(cls, m: int, reach: float, sigma: float, seed: int = 0) -> Blobs:
        """`m` positive blobs of width about `sigma` within `reach` of the centre, off-centre and asymmetric."""
        rng = np.random.default_rng(seed)
        direction = rng.normal(size=(m, 3))
        radius = reach * rng.uniform(0.3, 1, m) ** (1 / 2)
        position = direction / np.linalg.norm(direction, axis=1)[:, None] * radius[:, None]
        return cls(rng.uniform(0.5, 1.5, m), position, sigma * rng.uniform(0.8, 1.25, m))

    def turned(self, rotation: np.ndarray) -> Blobs:
        """The object seen in a view: ``x_view = rotation @ x``."""
        return Blobs(self.amplitude, self.position @ rotation.T, self.sigma)

    def moved(self, by: np.ndarray) -> Blobs:
        return Blobs(self.amplitude, self.position + np.asarray(by), self.sigma)

    def map(self, box: int, pixel: float = 1.0) -> np.ndarray:
        """Density sampled at the voxels, `(box,)*3` zyx, centre at box//2."""
        line = (np.arange(box) - box // 2) * pixel
        out = np.zeros((box,) * 3)
        for a, x, s in zip(self.amplitude, self.position, self.sigma, strict=True):
            gx, gy, gz = (np.exp(-((line - c) ** 2) / (2 * s * s)) for c in x)
            out += a * gz[:, None, None] * gy[:, None] * gx
        return out

    def projection(self, box: int, pixel: float, unit: float) -> np.ndarray:
        """Line integrals along z in units of `unit` Å, `(box, box)` yx."""
        line = (np.arange(box) - box // 2) * pixel
        out = np.zeros((box, box))
        for a, x, s in zip(self.amplitude, self.position, self.sigma, strict=True):
            gx, gy = (np.exp(-((line - c) ** 2) / (2 * s * s)) for c in x[:2])
            out += a * np.sqrt(2 * np.pi) * s / unit * gy[:, None] * gx
        return out

    def transform(self, k: np.ndarray, box: int, pixel: float = 1.0) -> np.ndarray:
        """Fourier integral at frequencies ``k / (box pixel)``, `k` `(n, 3)` xyz, divided by the volume of the box."""
        length = box * pixel
        f = np.asarray(k, np.float64) / length
        out = np.zeros(len(f), complex)
        for a, x, s in zip(self.amplitude, self.position, self.sigma, strict=True):
            size = a * (2 * np.pi) ** 1.5 * s**3 / length**3
            out += size * np.exp(-2 * np.pi**2 * s * s * (f * f).sum(1) - 2j * np.pi * (f @ x))
        return out


def relative_error(found: np.ndarray, truth: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    """Root mean square of the difference over that of the truth."""
    return float(np.sqrt((weight * np.abs(found - truth) ** 2).sum() / (weight * np.abs(truth) ** 2).sum()))


# particles with known poses ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    """A planted pose: rotation of the reference, and where the search should say the particle has to be moved."""

    rotation: np.ndarray  # (3, 3)
    shift: np.ndarray  # (3,) px
    class_index: int = 0


def make_search(volumes, levels, coarse_shifts, **changes):
    """A search over given levels without priors, in double precision."""
    from vdamkit.backend import get_backend
    from vdamkit.sampling.priors import OrientationPrior
    from vdamkit.vdam.search import Search

    volumes = np.asarray(volumes)
    options = {
        "box": volumes.shape[1], "backend": get_backend("cpu", 1), "dtype": "float64", "levels": tuple(levels),
        "perturbation": 0.0, "coarse_shifts": np.asarray(coarse_shifts, float), "child_offsets": np.zeros((8, 3)),
        "prior": OrientationPrior(), "centres": np.zeros((1, 3)), "symmetry": "C1", "sigma_offset": 1e3,
        "log_class": np.zeros(len(volumes)), "adaptive_fraction": 1.0, "max_significant": 10**6, "volumes": volumes,
    }  # fmt: skip
    return Search(**(options | changes))


def plant(search, poses: list[Pose], sigma2: float, seed: int = 0, *, index=None, optics=None, model=None):
    """Noisy particles at known poses, `b = w A e^{+2 pi i k.t/N} + noise`, as a batch and its raw counterpart.

    The noise is that of b: variance ``w sigma2`` per real component. `model(pose, k)` gives the transform of the object;
    by default the search's own reference, rotated.
    """
    from vdamkit.imaging.halfball import gather_half_ball, map_to_fourier
    from vdamkit.vdam.accumulate import RawBatch
    from vdamkit.vdam.search import Batch

    radius = search.levels[-1].radius
    projector, box = search.projector(radius), search.box
    ball, rng = projector.ball, np.random.default_rng(seed)
    k = np.linalg.norm(ball.k, axis=1)
    b, w = np.empty((len(poses), len(ball)), complex), np.empty((len(poses), len(ball)))
    for i, pose in enumerate(poses):
        w[i] = 0.3 + 1.5 * np.cos(rng.uniform(0.2, 0.5) * k + rng.uniform(0, 3)) ** 2  # an even function, like CTF²
        if model is None:
            a = projector.rotate(search.prepared(radius)[pose.class_index], pose.rotation)
        else:
            a = model(pose, ball.k)
        white = gather_half_ball(map_to_fourier(rng.normal(size=(box,) * 3)), ball) * np.sqrt(2 * box**3 * sigma2)
        b[i] = w[i] * a * np.exp(2j * np.pi / box * ball.k @ pose.shift) + np.sqrt(w[i]) * white
    seen = ball.weight.copy()
    seen[0] = 0
    real, kind = projector.dtype, projector.complex
    batch = Batch(
        np.arange(len(poses)) if index is None else np.asarray(index), (b * seen / sigma2).astype(kind),
        (b * ball.weight / sigma2).astype(kind), (w * ball.weight / sigma2).astype(real), np.zeros((len(poses), 3)),
        np.zeros((len(poses), 3)), np.zeros(len(poses), int),
    )  # fmt: skip
    groups = np.zeros(len(poses), int) if optics is None else np.asarray(optics)
    return batch, RawBatch(b.astype(kind), w.astype(real), groups)


def grid_row(search, reference, r: int) -> np.ndarray:
    """One orientation of the last level, tilted and spun as the search does it.

    ``Projector.rotate`` of the same matrix interpolates at other places once the grid is perturbed.
    """
    level = search.levels[-1]
    projector, grid = search.projector(level.radius), level.grid
    direction, psi = divmod(int(r), grid.n_psi)
    tilt = grid.tilts(search.perturbation)[direction]
    slab = projector.tilt(reference, tilt[None])[0]
    planes = projector.spin(slab, float(grid.psis[psi]))
    return projector.on_ball(planes, 0, np.empty(len(projector.ball), projector.complex))


def grid_rows(search) -> np.ndarray:
    """Every orientation of the last level, `(K, orientations, n)`."""
    projector = search.projector(search.levels[-1].radius)
    prepared = [projector.prepare(volume) for volume in search.volumes]
    return np.array([[grid_row(search, a, r) for r in range(len(search.levels[-1].grid))] for a in prepared])


def brute_log_posterior(search, batch, i: int, rows: np.ndarray) -> np.ndarray:
    """Log posterior of particle i up to a constant, straight from its definition: `(K, orientations, shifts)`.

    `rows` from :func:`grid_rows`; no priors on orientation. k = 0, the first voxel, takes no part.
    """
    level = search.levels[-1]
    shifts = search.shifts(level.fine_shifts)
    moved = batch.masked[i] * np.exp(-2j * np.pi / search.box * shifts @ search.projector(level.radius).ball.k.T)
    overlap = (rows.conj() @ moved.T).real
    energy = (batch.weight[i] * np.abs(rows) ** 2)[..., 1:].sum(-1)
    away = batch.offsets[i] + shifts - batch.offset_priors[i]
    prior = search.log_class[:, None, None] - 0.5 * (away**2).sum(1) / search.sigma_offset**2
    return overlap - 0.5 * energy[..., None] + prior


def dense_posterior(search, posterior) -> np.ndarray:
    """A posterior's blocks as one array of weights `(K, orientations, shifts)`; 0 where nothing was kept."""
    level = search.levels[-1]
    out = np.zeros((len(search.volumes), len(level.grid), len(search.shifts(level.fine_shifts))))
    for block in posterior.blocks:
        out[block.class_index][np.ix_(block.orientations, posterior.shifts)] = block.scores
    return out


def reconstruct(star: Path, angles: np.ndarray, offsets: np.ndarray, symmetry: str) -> np.ndarray:
    """Map `(box,)*3` zyx from the particles of an optimisation set with given poses: Σ adjoint(b) / Σ adjoint(w).

    angles `(n, 3)` degrees, offsets `(n, 3)` Å, in the order of the file.
    """
    cpu = get_backend("cpu", 1)
    particles = vk.open_particles(star)
    source = ParticleSource(particles, vk.Settings(), cpu)
    radius = particles.box // 2
    projector = get_projector(particles.box, radius, "float32")
    ball = projector.ball
    cubes = np.zeros((2, 3, projector.grid.size), np.float32)
    for i, item in enumerate(source.fetch(np.arange(len(particles)), radius)[0]):
        values = item.unmasked * ball.phases(offsets[i] / particles.pixel_size, particles.box)[0] * ball.weight
        weights = np.maximum(item.weight, 0) * ball.weight
        cubes[i % 2] += projector.scatter(euler_to_matrix(angles[i]), values, weights)
    return fourier_to_map(half_gradients(projector.grid, cubes, symmetry, radius, cpu).d.mean(0))


class LooksAway:
    """A lock that a thread takes again only long after it let go: whatever others may do between two turns, they do."""

    def __init__(self, thread: str):
        self._lock, self._thread = threading.Lock(), thread

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *problem):
        self._lock.release()
        if threading.current_thread().name == self._thread:
            time.sleep(0.05)
