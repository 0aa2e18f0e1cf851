"""What a GPU makes of it: checked against the CPU, then ceilings, kernels, mini-batches, and the tutorial's job as a table.

    python benchmarks/gpu.py [--device cuda:0] [--out docs/gpu.md] [--quick] [--rows 10000] [--distinct 10000]

Needs nothing but the device and 4 GB of disc for the simulated particles (`--distinct` 10000). FLOPs and bytes are counted as
written beside each row; medians of five or more. Mini-batches of the tables by box are of particles made up here (a known map
at known poses, in noise), whose arrays come back for many rows; the job is of 2D stacks on disc, simulated on the device; with
fewer `--distinct` than `--rows` the rows repeat image files. Ends with exit status 1 where the device's results are not the
CPU's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

import vdamkit as vk
from vdamkit.backend import Backend, available_cores, get_backend
from vdamkit.backend.device import HOST, Device
from vdamkit.imaging.convert import HalfBallParticle
from vdamkit.imaging.device_convert import upload_half_balls
from vdamkit.imaging.halfball import half_ball
from vdamkit.imaging.masks import soft_sphere
from vdamkit.imaging.projector import get_projector
from vdamkit.imaging.turns import turns_of
from vdamkit.io.star_tables import read_star, write_star
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.simulate import simulate
from vdamkit.vdam.advance import advance
from vdamkit.vdam.batched.accumulate import accumulate
from vdamkit.vdam.batched.dense import ByHalfTurns
from vdamkit.vdam.batched.engine import Engine
from vdamkit.vdam.batched.entries import Rows
from vdamkit.vdam.batched.posterior import run_search
from vdamkit.vdam.batched.visit import make_batch
from vdamkit.vdam.dense import before_half_turns, interleaved
from vdamkit.vdam.search import make_search
from vdamkit.vdam.start import initial_state

PER_TOMOGRAM = 500  # simulated particles
DATA = Path(__file__).resolve().parents[1] / "data"
TUTORIAL = {"symmetry": "C6", "tilt_prior_width": 10, "mask_diameter": 230, "T": 4}
WORTH = 100  # of log-likelihood: a pose of particles made up, so that their posteriors are as narrow as late in a job
AGREE = {"maps": 1e-3, "moment1": 1e-2, "sigma2": 1e-4}  # relative L2 after one mini-batch from the same state


class Table:
    """Rows of a Markdown table: printed as they come, and kept."""

    def __init__(self, lines: list[str], title: str, *columns: str):
        self._lines = lines
        self.say("", f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns))

    def say(self, *lines: str) -> None:
        """Text below the table."""
        for line in lines:
            print(line, flush=True)
        self._lines += lines

    def row(self, *cells: object) -> None:
        self.say("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def median_time(device: Device, work: Callable[[], object]) -> float:
    """Seconds of one call, everything it asked for included: the median of five, or of as many as a tenth of a second holds."""
    with device.active():
        work()
        device.synchronize()
        times: list[float] = []
        while len(times) < 5 or sum(times) < 0.1:
            began = time.perf_counter()
            work()
            device.synchronize()
            times.append(time.perf_counter() - began)
    return float(np.median(times))


# particles made up -------------------------------------------------------------------------------------------------------


class MadeUp:
    """Particles of a known map at known poses in noise, on any number of rows: row i is particle ``i % len(pool)``."""

    mask_ndim, n_optics = 3, 1

    def __init__(self, box: int, pixel_size: float, rows: int, pool: int = 32, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.box, self.pixel_size, self.identity = box, pixel_size, ("made up", box, rows)
        psi = 7.5 * rng.integers(48, size=rows)  # few, as each has an operator on a CPU
        self.angles = np.stack([rng.uniform(0, 360, rows), rng.normal(90, 8, rows), psi], -1)
        self.angle_priors = np.where([False, True, False], self.angles, np.nan)
        self.offsets, self.offset_priors = np.zeros((2, rows, 3))
        self.optics = np.zeros(rows, int)
        radius = box // 2
        ball, projector = half_ball(radius), get_projector(box, radius, "float32")
        smooth = np.fft.rfftn(rng.normal(size=(box,) * 3)) * _gaussian(box, 20 / pixel_size)
        shape = np.fft.irfftn(smooth, s=(box,) * 3, axes=(0, 1, 2))
        self.map = (shape / shape.std() * soft_sphere(box, 100 / pixel_size, 3)).astype(np.float32)
        reference = projector.prepare(self.map)
        k = np.sqrt((ball.k**2).sum(1))
        unmoved = projector.rotate(reference, np.eye(3))
        self.sigma2 = 0.6 * float((np.abs(unmoved) ** 2).sum()) / (2 * WORTH)  # 0.6: mean of w

        def particle(i: int) -> HalfBallParticle:
            rng = np.random.default_rng((seed, i))
            w = (0.1 + np.cos(rng.uniform(0.2, 0.5) * k) ** 2).astype(np.float32)
            noise = (rng.normal(size=(len(ball), 2)) @ [1, 1j]) * np.sqrt(w * self.sigma2)
            b = (w * projector.rotate(reference, euler_to_matrix(self.angles[i])) + noise).astype(np.complex64)
            return HalfBallParticle(radius, b, b, w)

        self._pool = Backend(available_cores()).map(particle, range(min(pool, rows)))
        self._there: dict = {}  # by device

    def __len__(self) -> int:
        return len(self.optics)

    def fetch(self, index: np.ndarray, radius: int) -> tuple[list[HalfBallParticle], np.ndarray, list[str]]:
        return [self._pool[i % len(self._pool)].crop(radius) for i in index], np.arange(len(index)), []

    def fetch_on(self, device: Device, index: np.ndarray, radius: int) -> tuple[tuple, np.ndarray, list[str]]:
        if device not in self._there:
            self._there[device] = upload_half_balls(self._pool, self.box // 2, device)
        rows, n = device.put(np.asarray(index) % len(self._pool)), len(half_ball(radius))
        return tuple(array[rows, :n] for array in self._there[device]), np.arange(len(index)), []

    def take_notes(self) -> tuple[str, ...]:
        return ()


def _gaussian(box: int, width: float) -> np.ndarray:
    f = np.fft.fftfreq(box)
    f2 = f[:, None, None] ** 2 + f[None, :, None] ** 2 + np.fft.rfftfreq(box)[None, None] ** 2
    return np.exp(-2 * np.pi**2 * f2 * width**2)


# parts -------------------------------------------------------------------------------------------------------------------


def agreement(lines: list[str], device: str) -> bool:
    """One mini-batch on `data/` from the same state on CPU and device."""
    table = Table(lines, "The device against the CPU", "one mini-batch on data/stacks2d", "difference (relative L2)", "allowed")
    job = vk.Session(DATA / "stacks2d" / "optimisation_set.star", vk.Settings(**TUTORIAL))
    job.run(5)
    other = job.branch(device=device)
    job.step(), other.step()
    good = True
    for name, allowed in AGREE.items():
        a, b = np.asarray(getattr(other.state, name)), np.asarray(getattr(job.state, name))
        gap = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        good &= gap <= allowed
        table.row(name, gap, allowed)
    poses = (job.state.poses.angles == other.state.poses.angles).all(1).mean()
    table.row("poses that are the same", f"{100 * poses:.0f} %", "95 %")
    return bool(good and poses >= 0.95)


def ceilings(lines: list[str], device: Device, size: int) -> dict[str, float]:
    """Rates of a large matrix product and of copies, measured on the spot."""
    xp = device.xp
    with device.active():
        a, b = (device.put(np.random.default_rng(i).random((size, size), np.float32)) for i in (0, 1))
        big, other = xp.ones((2, 8 * size * size), np.float32)  # several times what a cache holds
        host = np.ones(size * size, np.float32)
    flop = 2.0 * size**3
    rates = {
        "fp32": flop / median_time(device, lambda: device.matmul(a, b)),
        "tf32": flop / median_time(device, lambda: device.matmul(a, b, tf32=True)),
        "copy": 2.0 * big.nbytes / median_time(device, lambda: xp.copyto(other, big)),
        "upload": host.nbytes / median_time(device, lambda: device.upload(host)),
    }
    table = Table(lines, "Ceilings, measured", "what", "rate")
    table.row(f"fp32 GEMM, {size}³", f"{rates['fp32'] / 1e12:.1f} TFLOP/s")
    table.row(f"TF32 GEMM, {size}³", f"{rates['tf32'] / 1e12:.1f} TFLOP/s")
    table.row("copy on the device (read + write)", f"{rates['copy'] / 1e9:.0f} GB/s")
    table.row("host to device, page-locked, staging included", f"{rates['upload'] / 1e9:.1f} GB/s")
    return rates


def kernels(
    lines: list[str], device: Device, rates: dict[str, float], sizes: Iterable[tuple[int, int]], particles: int, order: int
) -> None:
    """The E-step's product, the projector, its adjoint and the M-step in their own shapes, against what the ceilings allow.

    Bytes: what goes in read once, what comes out written once, and what lies between two kernels written and read. Coarse
    scores are counted as the product that gives them row by row; half turns share half of it.
    """
    table = Table(lines, "Kernels", "box, radius", "what", "counted", "ms", "rate", "of the ceiling")
    for box, radius in sizes:
        timed = [*_kernel_work(device, box, radius, particles, order), _m_step(device, box, radius, 10 * particles)]
        for what, work, size, kind in timed:
            seconds = median_time(device, work)
            if kind == "copy":
                counted, rate = f"{size / 1e9:.2f} GB", f"{size / seconds / 1e9:.0f} GB/s"
                share = f"{seconds / (size / rates['copy']):.1f} × its time at copy speed"
            else:
                counted, rate = f"{size / 1e9:.0f} GFLOP", f"{size / seconds / 1e12:.1f} TFLOP/s"
                share = f"{100 * size / seconds / rates[kind]:.0f} % of {kind} GEMM"
            table.row(f"{box}, {radius}", what, counted, 1e3 * seconds, rate, share)


Timed = tuple[str, Callable[[], object], float, str]  # what is timed, how, FLOPs or bytes, and the ceiling it is held against


def _kernel_work(device: Device, box: int, radius: int, particles: int, order: int) -> list[Timed]:
    """The E-step's product of some particles' shifts, and the projector, with all orientations of a grid."""
    made_up, settings = MadeUp(box, 512 / box, 64, pool=2), vk.Settings(**TUTORIAL)
    state = initial_state(made_up, settings, Backend(available_cores()))
    search = make_search(state, settings, made_up, Backend(1, (device,)), radius, np.arange(64))
    engine, grid = Engine(search, device), orientation_grid(order, "C6")
    tensor_cores = Engine(search, device, tf32=True)
    rng = np.random.default_rng(0)
    with device.active():
        turns = turns_of(grid, 3.0, np.arange(len(grid)))
        projector, cube = engine.projector(radius), engine.cube(radius, 0)
        n, shifts, rows = len(projector.order), search.shifts(False), projector.rotate(cube, turns)
        moved = device.put(rng.normal(size=(particles * len(shifts), 2 * n)).astype(np.float32))
        images = device.put((rng.normal(size=(particles, n, 2)) @ [1, 1j]).astype(np.complex64))
        first_half = before_half_turns(grid, np.arange(len(grid)))
        half = projector.rotate(cube, turns_of(grid, 3.0, first_half))
        coarse = [ByHalfTurns(one, radius, half, grid.n_psi // 2, one.phases(radius, shifts)) for one in (engine, tensor_cores)]
        real = interleaved(rows, engine.real)
        values, weights = device.xp.stack([rows, rows]), device.xp.ones((2, *rows.shape), np.float32)
        out = device.xp.zeros((2, 3, projector.projector.grid.size))
    flop = 2.0 * len(moved) * len(real) * 2 * n
    slabs = 8.0 * len(turns.tilts) * projector.slab_size
    scattered = 3.0 * rows.nbytes + 6 * slabs + 48 * cube.size
    return [
        ("E-step product, fp32", lambda: device.matmul(moved, real), flop, "fp32"),
        ("E-step product, TF32", lambda: device.matmul(moved, real, tf32=True), flop, "tf32"),
        ("coarse scores, half turns, fp32", lambda: coarse[0].overlaps(images), flop, "fp32"),
        ("coarse scores, half turns, TF32", lambda: coarse[1].overlaps(images), flop, "tf32"),
        ("rotate", lambda: projector.rotate(cube, turns), 2 * slabs + rows.nbytes + cube.nbytes, "copy"),
        ("scatter", lambda: projector.scatter(turns, values, weights, out), scattered, "copy"),
    ]


def _m_step(device: Device, box: int, radius: int, particles: int) -> Timed:
    """All sums of some particles, from their posteriors on the second level."""
    made_up, settings = MadeUp(box, 512 / box, particles, pool=particles), vk.Settings(**TUTORIAL)
    state, index = initial_state(made_up, settings, Backend(available_cores())), np.arange(particles)
    state = state.replace(sigma2=np.full_like(state.sigma2, made_up.sigma2 * state.grey_scale**2))
    search = make_search(state, settings, made_up, Backend(1, (device,)), radius, index)
    search = replace(search, volumes=made_up.map[None] * state.grey_scale)  # posteriors as narrow as later in a job
    engine, level = Engine(search, device), search.levels[-1]
    with device.active():
        batch, _ = make_batch(engine, state, made_up, index)
        found = run_search(engine, batch, None, lambda fraction: None)
    projector = engine.projector(radius)
    rows = Rows.of(found.entries, level.grid).orientation
    directions = len(np.unique(rows // level.grid.n_psi))
    voxels = 24.0 * len(index) + (2 * 8 + 2 * 24) * len(rows)  # particles, references, residuals
    planes, cylinders = 8.0 * found.planes.sum() * len(projector.disc), (8.0 + 24) * directions * projector.slab_size
    size = len(projector.order) * voxels + 2 * (planes + cylinders)
    what = f"M-step, {len(index)} particles on {len(rows)} rotations"
    return what, lambda: accumulate(engine, batch, found, 1, lambda fraction: None), size, "copy"


def mini_batches(lines: list[str], backend: Backend, boxes: Iterable[int], batches: Iterable[int], steps: int) -> None:
    """Whole mini-batches of made-up particles, after some that warmed up."""
    table = Table(lines, "Mini-batches", "box", "symmetry", "particles", "radius", "read", "E-step", "M-step", "update",
                  "in all (s)")  # fmt: skip
    for box in boxes:
        made_up = MadeUp(box, 512 / box, 2000)
        for symmetry in ("C6", "C1"):
            for size in batches:
                settings = vk.Settings(**TUTORIAL | {"symmetry": symmetry}, batch_initial=size, batch_final=size)
                reports = run(made_up, settings, backend, steps)
                last = reports[len(reports) // 2 :]
                parts = [float(np.median([r.timings[k] for r in last])) for k in ("read", "E-step", "M-step", "update")]
                table.row(box, symmetry, size, last[-1].radius, *parts, float(np.median([r.seconds for r in last])))


def run(particles, settings: vk.Settings, backend: Backend, steps: int) -> list:
    """Reports of the first mini-batches of a job."""
    state, reports = initial_state(particles, settings, backend), []
    for _ in range(steps):
        state, report = advance(state, settings, particles, backend)
        reports.append(report)
    return reports


def scaling(lines: list[str], backend: Backend, rows: Iterable[int], size: int, steps: int) -> None:
    """Mini-batches of the same size from sets of different sizes."""
    table = Table(lines, "Particles in the set", "rows", f"mini-batch of {size} (s, median)", "of the smallest set's")
    first = None
    for n in rows:
        settings = vk.Settings(**TUTORIAL, batch_initial=size, batch_final=size)
        reports = run(MadeUp(64, 8.0, n), settings, backend, steps)
        seconds = float(np.median([report.seconds for report in reports[2:]]))
        first = first or seconds
        table.row(n, seconds, f"{seconds / first:.2f}")


def reading(lines: list[str], device: Device) -> None:
    """From disc to half-balls, read on all cores."""
    table = Table(lines, f"Reading and conversion, {available_cores()} cores", "what", "converted by", "particles",
                  "ms per particle")  # fmt: skip
    for kind, where in (("stacks2d", HOST), ("stacks2d", device), ("volumes3d", HOST)):
        job = vk.Session(DATA / kind / "optimisation_set.star", vk.Settings(**TUTORIAL))
        index = np.arange(len(job.particles))
        with where.active():
            job._source.fetch_on(where, index[:16], 16)
            job.free()
            where.synchronize()
            began = time.perf_counter()
            job._source.fetch_on(where, index, 16)
            where.synchronize()
        table.row(kind, where.description, len(index), 1e3 * (time.perf_counter() - began) / len(index))


def whole_job(lines: list[str], device: str, rows: int, distinct: int, box: int, steps: int) -> None:
    """The tutorial's job at its scale, from files on a local disc; fp32 and TF32."""
    title = f"The tutorial's job: {rows} particles as 2D stacks (41 tilts, box {box}, 8 Å), {steps} mini-batches"
    table = Table(lines, title, "arithmetic", "in all (s)", "mini-batch, median (s)", "largest (s)", "mini-batches over 0.3 s",
                  "resolution (Å)", "Pmax")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        made = simulate(
            name, device=device, particles=distinct, volumes=0, box=box, pixel_size=8.0, tilts=41,
            tomograms=max(2, distinct // PER_TOMOGRAM),
        )  # fmt: skip
        simulated = f"{distinct} of the particles simulated on the device, files written: {time.perf_counter() - began:.1f} s."
        star = Path(made["stacks2d"]).with_name("particles.star")
        blocks = read_star(star)
        table_of = blocks["particles"]
        many = table_of.iloc[np.arange(rows) % len(table_of)].reset_index(drop=True)
        many["rlnTomoParticleName"] = [f"{t}/{i + 1}" for i, t in enumerate(many["rlnTomoName"])]
        many_star = star.with_name("many.star")
        write_star(many_star, blocks | {"particles": many})
        for tf32 in (False, True):
            settings = vk.Settings(**TUTORIAL, mini_batches=steps, device=device, tf32=tf32)
            began = time.perf_counter()
            job = vk.Session(settings=settings, particles=many_star, tomograms=made["tomograms"])
            job.run()
            seconds = [report.seconds for report in job.reports()]
            table.row("TF32" if tf32 else "fp32", time.perf_counter() - began, float(np.median(seconds)), max(seconds),
                      sum(s > 0.3 for s in seconds), job.report.resolution, job.report.pmax)  # fmt: skip
            job.free()
    table.say("", f"{simulated} All kernels had been compiled before, as they are from the second job on a machine on.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all of it runs")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=10_000)
    options = parser.parse_args()
    backend = get_backend(options.device)
    device, lines = backend.devices[0], []
    print(f"{device.name}: {device.description}; {available_cores()} CPU cores")
    try:
        good = measure(lines, options, backend)
    finally:  # a part that fails loses no other
        if options.out:
            heading = f"# vdamkit on {device.description}\n\nMade by `python benchmarks/gpu.py`; medians, float32.\n"
            options.out.write_text("\n".join([heading, *lines, ""]), encoding="utf-8")
    if not good:
        sys.exit("the device's results are not the CPU's")


def measure(lines: list[str], options: argparse.Namespace, backend: Backend) -> bool:
    """All parts, one after the other; whether the device's results are the CPU's."""
    device, quick = backend.devices[0], options.quick
    good = agreement(lines, options.device)
    rates = ceilings(lines, device, 256 if quick else 8192)
    kernels(lines, device, rates, [(16, 6)] if quick else [(40, 12), (64, 16), (64, 24), (96, 32)], 2 if quick else 64,
            1 if quick else 3)  # fmt: skip
    mini_batches(lines, backend, [16] if quick else [40, 64, 96], [6] if quick else [200, 1000], 3 if quick else 6)
    scaling(lines, backend, [20, 40] if quick else [1000, 10_000, 100_000], 6 if quick else 1000, 4 if quick else 7)
    reading(lines, device)
    whole_job(lines, options.device, 40 if quick else options.rows, 20 if quick else options.distinct, 32 if quick else 64,
              3 if quick else 100)  # fmt: skip
    return good


if __name__ == "__main__":
    main()
