"""What a job would do, from headers alone: data found, memory, time, and every problem at once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from vdamkit.backend import Backend, available_cores, get_backend
from vdamkit.backend.device import Device
from vdamkit.errors import SettingsError
from vdamkit.imaging.halfball import half_ball
from vdamkit.imaging.masks import EDGE
from vdamkit.io.particles import ParticleSet, problems
from vdamkit.io.scratch import scratch_problem
from vdamkit.io.star_tables import resolve_path
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.priors import OrientationPrior
from vdamkit.sampling.shifts import shift_grid
from vdamkit.source import ParticleSource
from vdamkit.vdam import schedule
from vdamkit.vdam.posterior import CHUNK_BYTES
from vdamkit.vdam.search import KEPT_BYTES, plan_levels

TYPICAL_ROWS, TYPICAL_SHIFTS = 12, 8  # coarse samples of a particle that are refined, as a rule
M_STEP = 2.0  # work of the M-step over that of the last level
EFFICIENCY = 0.65  # of the matrix products' rate that a mini-batch reaches as a whole
SHOWN = 6  # problems, and warnings, that are printed: a screen has room for so many sentences
SMALLEST_MASK = 8  # px, below which a mask shows next to nothing
GIB = 2**30


@dataclass(frozen=True)
class JobCheck:
    """What was found and what would run; ``print(check)`` is meant for people."""

    n_particles: int
    kind: str  # "2D stacks" or "3D pseudo-subtomograms"
    box: int  # px
    pixel_size: float  # Å
    optics_groups: int
    tomograms: int
    tilts: int  # images per tilt series, the most
    mini_batches: int
    batch_sizes: tuple[int, int]  # first and last
    memory: float  # bytes, all together
    kept: float  # bytes of it for particles
    flops: float  # of one mini-batch at the start
    flops_per_second: float
    seconds_per_mini_batch: float
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    hints: tuple[str, ...] = field(default=())

    @property
    def good(self) -> bool:
        """Whether nothing stands in the way of a run."""
        return not self.problems

    @property
    def seconds(self) -> float:
        """Expected time of the whole job."""
        return self.seconds_per_mini_batch * self.mini_batches

    def __str__(self) -> str:
        first, last = self.batch_sizes
        size = f"{first}" if first == last else f"{first} to {last}"
        lines = [
            f"{self.n_particles} particles ({self.kind}), box {self.box} px of {self.pixel_size:g} Å "
            f"({self.box * self.pixel_size:.0f} Å)",
            f"{self.optics_groups} optics group(s), {self.tomograms} tomogram(s)"
            + (f", up to {self.tilts} tilts" if self.tilts else ""),
            f"{self.mini_batches} mini-batches of {size} particles",
            f"memory about {self.memory / GIB:.1f} GiB, of it {self.kept / GIB:.2f} GiB for particles that stay loaded",
            f"time about {_span(self.seconds_per_mini_batch)} per mini-batch, {_span(self.seconds)} in all (rough: "
            f"{self.flops / 1e12:.2g} Tflop at {self.flops_per_second / 1e9:.0f} Gflop/s)",
        ]
        for title, texts in (("Problem", self.problems), ("Warning", self.warnings), ("Hint", self.hints)):
            lines += [f"{title}: {text}" for text in texts[:SHOWN]]
            if len(texts) > SHOWN:
                lines.append(f"{title}: and {len(texts) - SHOWN} more.")
        if self.good:
            lines.append("Ready to run.")
        return "\n".join(lines)


def check_job(particles: ParticleSet, settings, *, measure: bool = True) -> JobCheck:
    """Check a job without reading an image.

    Parameters
    ----------
    particles: the open particle set. settings: the options of the job.
    measure: time a matrix product (0.2 s) to say how long a mini-batch takes; otherwise the time is nan.
    """
    backend, found = _backend(settings)
    sentences = [*found, *problems(particles, mask_diameter=settings.mask_diameter, limit=3 * len(particles))]
    is_warning = [text.startswith("warning:") for text in sentences]
    warnings = [text.removeprefix("warning: ") for text, w in zip(sentences, is_warning, strict=True) if w]
    n = len(particles)
    total = settings.mini_batches
    sizes = [schedule.batch_size(i, n, settings, last=i == total) for i in np.linspace(1, total, 50).tolist()]
    flops = expected_flops(particles, settings, float(np.mean(sizes)))
    speed = _speed(backend) if measure else float("nan")
    kept, memory = expected_memory(particles, settings, backend, max(sizes))
    tilts = max((t.n_tilts for t in particles.tomograms.values()), default=0)
    return JobCheck(
        n_particles=n, kind="2D stacks" if particles.is_stack2d else "3D pseudo-subtomograms", box=particles.box,
        pixel_size=particles.pixel_size, optics_groups=len(particles.optics),
        tomograms=len(set(particles.tomogram_names)), tilts=tilts, mini_batches=settings.mini_batches,
        batch_sizes=(sizes[0], sizes[-1]), memory=memory, kept=kept, flops=flops, flops_per_second=speed,
        seconds_per_mini_batch=flops / (EFFICIENCY * speed),
        problems=tuple(text for text, w in zip(sentences, is_warning, strict=True) if not w),
        warnings=tuple(warnings + setting_warnings(particles, settings)),
        hints=tuple(_hints(particles, settings, kept, backend)),
    )  # fmt: skip


def _backend(settings) -> tuple[Backend, list[str]]:
    try:
        return get_backend(settings.device, settings.threads, settings.device_memory), []
    except SettingsError as problem:
        return get_backend("cpu", settings.threads), [str(problem)]


# memory and time ----------------------------------------------------------------------------------------------------


def expected_memory(particles: ParticleSet, settings, backend: Backend, batch: int) -> tuple[float, float]:
    """Bytes of particles that stay loaded, and of everything together (rough)."""
    box, real = particles.box, np.dtype(settings.real).itemsize
    source = ParticleSource(particles, settings, backend)
    kept = min(len(particles) * source.bytes_per_particle(box // 2), settings.memory_budget * GIB)
    state = settings.classes * box**2 * (box * real + (box // 2 + 1) * 5 * real)
    chunk = min(1.5 * settings.chunk_particles, batch) * len(half_ball(box // 2)) * 10 * real
    work = backend.threads * 2 * CHUNK_BYTES + KEPT_BYTES
    phases = (
        len(shift_grid(settings.offset_range, settings.offset_step)) * len(half_ball(_first_radius(box, settings))) * 2 * real
    )
    return float(kept), float(kept + 20 * state + chunk + work + phases)


def expected_flops(particles: ParticleSet, settings, batch: float) -> float:
    """Floating-point operations of one mini-batch of `batch` particles at the start (rough)."""
    px, box = particles.pixel_size, particles.box
    radius = _first_radius(box, settings)
    levels = plan_levels(
        settings.healpix_order, settings.search_symmetry, box=box, pixel_size=px, mask_diameter=settings.mask_diameter,
        radius=radius, adaptive=settings.adaptive,
    )  # fmt: skip
    rows = _admitted(particles, settings, levels[0].grid.order) * settings.classes
    shifts = len(shift_grid(settings.offset_range, settings.offset_step)) * (8 if levels[0].fine_shifts else 1)
    total = 8.0 * rows * shifts * len(half_ball(levels[0].radius))
    last = min(rows, TYPICAL_ROWS * settings.classes) * 8 * min(shifts, TYPICAL_SHIFTS) * 8
    for level in levels[1:]:
        total += 8.0 * last / (1 if level.fine_shifts else 8) * len(half_ball(level.radius))
    total += M_STEP * 8.0 * last * len(half_ball(radius))
    return total * batch


def _first_radius(box: int, settings) -> int:
    """Radius of the half-balls (px) in the first mini-batch."""
    shell = max(settings.min_resolution_shell, round(settings.start_fraction * box))
    return schedule.current_radius(shell, settings, box)


def _admitted(particles: ParticleSet, settings, order: int) -> int:
    """Coarse orientations of one particle that its prior admits."""
    grid = orientation_grid(order, settings.search_symmetry)
    prior = OrientationPrior(settings.rot_prior_width, settings.tilt_prior_width, settings.psi_prior_width)
    if not prior.active:
        return len(grid)
    centre = np.where(np.isnan(particles.angle_priors[:1]), particles.angles[:1], particles.angle_priors[:1])
    return int(prior.within_cut(grid.rotations(), centre, settings.search_symmetry).sum())


def _speed(backend: Backend) -> float:
    """Measured flop/s of float32 matrix products of the shape of the E-step, all workers together."""
    if backend.on_device:
        return _device_speed(backend.devices[0])
    n = 512
    a = np.ones((n, n), "float32")
    with backend.limits():
        (a @ a).sum()
        began, laps = time.perf_counter(), 0
        while time.perf_counter() - began < 0.1 and laps < 200:
            a @ a
            laps += 1
        seconds = time.perf_counter() - began
    return 2.0 * n**3 * laps / seconds * min(backend.threads, available_cores())


def _device_speed(device: Device) -> float:
    """The same of a GPU."""
    n = 4096
    with device.active():
        a = device.put(np.ones((n, n), np.float32))
        device.matmul(a, a)
        device.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            device.matmul(a, a)
        device.synchronize()
        return 5 * 2.0 * n**3 / (time.perf_counter() - began)


def _span(seconds: float) -> str:
    if not np.isfinite(seconds):
        return "an unknown time"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


# what is odd --------------------------------------------------------------------------------------------------------


def setting_warnings(particles: ParticleSet, settings) -> list[str]:
    """Options that fit the data badly but can run."""
    found, path = [], particles.paths.particles_file
    width, px = particles.box * particles.pixel_size, particles.pixel_size
    if settings.mask_diameter < SMALLEST_MASK * px:
        found.append(
            f"the mask of {settings.mask_diameter:g} Å is only {settings.mask_diameter / px:.1f} px wide; its diameter is in "
            "Å, not in nm or px."
        )
    if settings.mask_diameter <= width < settings.mask_diameter + 2 * EDGE * px:
        found.append(
            f"the mask of {settings.mask_diameter:g} Å fits the box of {width:g} Å but its soft edge of {EDGE:g} px does "
            f"not; at most {width - 2 * EDGE * px:g} Å leave room for it."
        )
    for axis, column, option in ((0, "Rot", "rot"), (1, "Tilt", "tilt"), (2, "Psi", "psi")):
        missing = np.isnan(particles.angle_priors[:, axis])
        if getattr(settings, f"{option}_prior_width") is None or not missing.any():
            continue
        found.append(
            f"{path}: a {option} prior was asked for but {missing.sum()} of {len(missing)} particles have no "
            f"rlnAngle{column}Prior; for these it follows the particle's last {option} angle."
        )
    if settings.offset_range > particles.box / 2:
        found.append(f"offset_range of {settings.offset_range:g} px reaches beyond half the box of {particles.box} px.")
    if settings.scratch_dir is not None:
        paths = [resolve_path(names[0], path) for names in particles.file_names.values()]
        wanted = len(particles) * sum(file.stat().st_size for file in paths if file is not None)
        if problem := scratch_problem(settings.scratch_dir, wanted):
            found.append(f"scratch_dir is {settings.scratch_dir!r} but {problem}; the rest is read from where it lies.")
    if settings.mini_batches < 20:
        found.append(f"{settings.mini_batches} mini-batches are few; the tutorial's job has 100.")
    if len(particles) < 20 * settings.classes:
        found.append(f"{len(particles)} particles are few for {settings.classes} class(es).")
    return found


def _hints(particles: ParticleSet, settings, kept: float, backend: Backend) -> list[str]:
    found = []
    if settings.tilt_prior_width is None and np.isfinite(particles.angle_priors[:, 1]).any():
        found.append("the particles have tilt priors; --sigma-tilt 10 makes use of them and is faster.")
    wanted = len(particles) * ParticleSource(particles, settings, backend).bytes_per_particle(particles.box // 2)
    if wanted > kept:
        found.append(f"--memory-budget {wanted / GIB:.1f} would keep all particles loaded instead of reading them again.")
    if not backend.on_device and misses_avx512():
        found.append("this CPU has AVX-512 but OpenBLAS does not use it; OPENBLAS_CORETYPE=SkylakeX is up to 1.9 times faster.")
    return found


def misses_avx512(cpuinfo: Path = Path("/proc/cpuinfo"), libraries: list[dict] | None = None) -> bool:
    """Whether OpenBLAS runs AVX2 kernels on a CPU with AVX-512 (it does not know every new processor)."""
    libraries = threadpool_info() if libraries is None else libraries
    slow = any(
        library.get("internal_api") == "openblas" and library.get("architecture") in ("Haswell", "Zen", "Sandybridge")
        for library in libraries
    )
    try:
        return slow and "avx512f" in cpuinfo.read_text()
    except OSError:
        return False
