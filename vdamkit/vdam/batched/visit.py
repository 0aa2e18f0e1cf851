"""Visiting particles on devices: shared out, brought there, searched and summed; smaller pieces where memory runs out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import numpy as np

from vdamkit.backend.device import Device, OutOfDeviceMemory
from vdamkit.sampling.euler import matrix_to_euler
from vdamkit.state import State
from vdamkit.vdam.accumulate import Sums
from vdamkit.vdam.batched.accumulate import accumulate
from vdamkit.vdam.batched.engine import DeviceBatch, Engine
from vdamkit.vdam.batched.entries import Entries
from vdamkit.vdam.batched.posterior import Significant, run_search
from vdamkit.vdam.batched.store import store_for
from vdamkit.vdam.search import Search
from vdamkit.vdam.start import Particles
from vdamkit.vdam.visit import Found, Progress, Visited, all_bad, centre_rows, local_orientations, none_left

T = TypeVar("T")
MOST_HALVINGS = 20


def visit(
    state: State, settings, particles: Particles, search: Search, index: np.ndarray, local: bool, clock: dict, tick: Callable,
    upcoming: np.ndarray,
) -> Visited:  # fmt: skip
    """Search and sum the particles of a mini-batch on the devices of `search.backend`; as `vdam.visit.visit`.

    upcoming: particles of the next mini-batch, fetched while this one computes.
    """
    progress, lock = Progress(tick, len(index)), threading.Lock()
    bad: dict[int, str] = {}
    totals: dict[Device, Sums] = {}  # of the chunks each device has done

    def task(engine: Engine, chunk: np.ndarray, ahead: np.ndarray | None) -> Found | None:
        """Read, search and sum one chunk on one device; None where none of its particles can be used.

        While it computes, particles to come are fetched.
        """
        part = progress.part(len(chunk))
        laps = [time.perf_counter()]
        part("read", 0.0)(0.0)
        batch, complaints = make_batch(engine, state, particles, chunk, ahead)
        with lock:
            bad.update(complaints)
            all_bad(state, bad, len(particles))
        if batch is None:
            progress.done(len(chunk))
            return None
        laps.append(time.perf_counter())
        start = local_entries(engine, state, settings, batch.index) if local else None
        found = run_search(engine, batch, start, part("E-step", 0.6, 0.05))
        laps.append(time.perf_counter())
        sums = accumulate(engine, batch, found, particles.n_optics, part("M-step", 0.35, 0.65))
        laps.append(time.perf_counter())
        with lock:
            for stage, seconds in zip(("read", "E-step", "M-step"), np.diff(laps).tolist(), strict=True):
                clock[stage] = clock.get(stage, 0) + seconds
        poses = poses_of(search, batch, found, particles.pixel_size)
        mine = totals.get(engine.device)
        totals[engine.device] = sums if mine is None else mine + sums
        progress.done(len(chunk))  # and nothing that can fail after the sums: what fails is done again
        return poses

    found, notes = share_out(search, index, task, upcoming, tf32=settings.tf32)
    if not found:
        raise none_left(bad)
    return Visited(_total(search.backend.devices, totals), found, bad, notes)


def _total(devices: tuple[Device, ...], totals: dict[Device, Sums]) -> Sums:
    """The sums of all devices, on the first; added up by the host, so that they need no more room there than its own did."""
    first, parts = devices[0], []
    if list(totals) == [first]:
        return totals[first]
    for device in devices:
        if device in totals:
            with device.active():
                cubes = device.get(totals[device].cubes)
            parts.append(replace(totals.pop(device), cubes=cubes))
    total = reduce(Sums.__add__, parts)
    with first.active():
        return replace(total, cubes=first.put(total.cubes))


def find_poses(
    state: State, settings, particles: Particles, search: Search, index: np.ndarray
) -> tuple[list[Found], dict[int, str]]:
    """The best pose of each of some particles, without sums; and a sentence about each that cannot be used."""
    bad: dict[int, str] = {}

    def task(engine: Engine, chunk: np.ndarray, ahead: None) -> Found | None:
        """Read and search one chunk on one device."""
        batch, complaints = make_batch(engine, state, particles, chunk)
        bad.update(complaints)
        if batch is None:
            return None
        return poses_of(search, batch, run_search(engine, batch, None, lambda fraction: None), particles.pixel_size)

    return share_out(search, index, task, tf32=settings.tf32)[0], bad


def share_out(
    search: Search, index: np.ndarray, task: Callable[[Engine, np.ndarray, np.ndarray | None], T | None],
    upcoming: np.ndarray | None = None, *, tf32: bool,
) -> tuple[list[T], tuple[str, ...]]:  # fmt: skip
    """Results of `task` (but None) for chunks of particles, in the order of `index`; chunks go to the devices in turn.

    With a device's last chunk the task is given what that device will have of the `upcoming` particles, else None. Where a
    device has no memory left for a chunk, it is done in halves from then on, and a note says so.

    Raises
    ------
    OutOfDeviceMemory: where even single particles in small pieces do not fit.
    """
    devices = search.backend.devices
    notes: list[str] = []
    engines = [Engine(search, device, tf32=tf32) for device in devices]
    with devices[0].active():
        most = engines[0].particles_at_once()
    chunks = _chunks(index, most, len(devices))
    shares = {} if upcoming is None else _shares(_chunks(upcoming, most, len(devices)), devices)
    ends = {int(chunk[-1]) for chunk in chunks[-len(devices) :]}  # particles, as chunks may be halved

    def attempt(engine: Engine, chunk: np.ndarray) -> list[T] | None:
        try:
            with engine.device.active():
                return [task(engine, chunk, shares.pop(engine.device, None) if int(chunk[-1]) in ends else None)]
        except OutOfDeviceMemory:
            return None  # only after this block is what the failed attempt held let go

    def serve(number: int) -> list[tuple[int, list[T]]]:
        mine = range(number, len(chunks), len(devices))
        return [(place, _in_halves(engines[number], chunks[place], attempt, notes)) for place in mine]

    if len(devices) == 1:
        done = serve(0)
    else:
        done = sorted(_side_by_side(devices, serve), key=lambda item: item[0])
    return [result for _, results in done for result in results if result is not None], tuple(notes)


def _chunks(index: np.ndarray, most: int, n_devices: int) -> list[np.ndarray]:
    """`index` in chunks of at most `most`, one at least for each device where there are enough; they go round in turn."""
    size = max(1, min(most, -(-len(index) // n_devices)))
    return [index[first : first + size] for first in range(0, len(index), size)]


def _shares(chunks: list[np.ndarray], devices: tuple[Device, ...]) -> dict[Device, np.ndarray]:
    """All particles of each device that has any, from chunks that go round in turn."""
    mine = {device: chunks[number :: len(devices)] for number, device in enumerate(devices)}
    return {device: np.concatenate(some) for device, some in mine.items() if some}


def _side_by_side(devices: tuple[Device, ...], serve: Callable[[int], list[T]]) -> list[T]:
    """What ``serve(number)`` returns for all devices, each served by a thread of its own; all have ended when this does."""
    with ExitStack() as stack:
        threads = [stack.enter_context(device.thread()) for device in devices]
        begun = [thread.submit(serve, number) for number, thread in enumerate(threads)]
        try:
            return [item for future in begun for item in future.result()]
        finally:
            wait(begun)


def _in_halves(engine: Engine, chunk: np.ndarray, attempt: Callable, notes: list[str]) -> list[T]:
    results = attempt(engine, chunk)
    if results is not None:
        return results
    device = engine.device
    if device.halvings >= MOST_HALVINGS:
        raise OutOfDeviceMemory(
            f"{device.name} has not enough memory for a single particle of this mini-batch; close other programs that use it, "
            "use a smaller box or max_healpix_order, or device='cpu'"
        )
    engine.drop()
    device.halve()
    middle = max(1, len(chunk) // 2)
    notes.append(f"{device.name} had no memory left for {len(chunk)} particles at a time; went on with {middle}")
    halves = [part for part in (chunk[:middle], chunk[middle:]) if len(part)]
    return [result for part in halves for result in _in_halves(engine, part, attempt, notes)]


def make_batch(
    engine: Engine, state: State, particles: Particles, chunk: np.ndarray, upcoming: np.ndarray | None = None
) -> tuple[DeviceBatch | None, dict[int, str]]:
    """Particles on the device, moved by their last offsets and divided by the noise; see `vdam.visit.make_batch`.

    None where none of them can be used.
    """
    search, real = engine.search, engine.real
    radius = search.levels[-1].radius
    projector = engine.projector(radius)
    (masked, unmasked, weight), at, complaints = _on_device(engine, particles, chunk, radius, upcoming)
    index = chunk[at]
    if not len(index):
        return None, complaints
    offsets = state.poses.offsets[index] / particles.pixel_size
    group = engine.put(particles.optics[index], np.int64)
    moved = engine.phases(radius, offsets) * real.type(state.grey_scale)
    inverse = engine.put(1 / state.sigma2, real)[:, projector.shell] * projector.friedel  # per optics group
    divided = inverse[group]
    inverse[:, int(projector.place[0])] = 0  # the E-step leaves out k = 0
    raw = masked * moved
    batch = DeviceBatch(
        index, raw * inverse[group], unmasked * moved * divided, weight * divided, raw, weight, offsets,
        particles.offset_priors[index] / particles.pixel_size, centre_rows(state, particles, index, search),
        particles.optics[index],
    )  # fmt: skip
    return batch, complaints


def _on_device(
    engine: Engine, particles: Particles, chunk: np.ndarray, radius: int, upcoming: np.ndarray | None
) -> tuple[tuple, np.ndarray, dict[int, str]]:
    """Half-balls `(p, n)`, voxels in the device's order: masked, unmasked, weight; from the device's store where that has room
    for the chunk."""
    device, projector = engine.device, engine.projector(radius)
    store = store_for(device, particles, radius, engine.real, len(chunk))
    if store is not None:
        out = store.gather(particles, chunk, projector)
        if upcoming is not None and len(upcoming):
            store.fetch_ahead(particles, upcoming, chunk)
        return out
    arrays, at, sentences = particles.fetch_on(device, chunk, radius)
    complaints = dict(zip(np.delete(chunk, at).tolist(), sentences, strict=True))
    return tuple(projector.columns_of(array, np.arange(len(at))) for array in arrays), at, complaints


def local_entries(engine: Engine, state: State, settings, index: np.ndarray) -> Entries:
    """What a local search starts from; see `vdam.visit.local_orientations`."""
    search = engine.search
    mine = local_orientations(state, search, settings, index, engine.device)
    return Entries.chosen(mine, len(search.volumes), len(search.coarse_shifts))


def poses_of(search: Search, batch: DeviceBatch, found: Significant, pixel_size: float) -> Found:
    """Pose of greatest weight of every particle; offsets in Å."""
    level, entries = search.levels[-1], found.entries
    rotations = level.grid.rotations(search.perturbation, found.best[:, 1])
    chosen = search.shifts(level.fine_shifts)[found.best[:, 2]]
    mine = entries.class_index == np.repeat(found.best[:, 0], np.diff(entries.start))
    first = entries.start[:-1]  # every particle has some
    share = np.add.reduceat(found.mass * mine, first) / np.add.reduceat(found.mass, first)
    return Found(
        batch.index, matrix_to_euler(rotations), (batch.offsets + chosen) * pixel_size, found.best[:, 0], found.pmax, share,
        found.log_evidence, np.add.reduceat(found.count, first, dtype=int),
    )  # fmt: skip
