"""The batched engine against the one on threads, which the other tests hold against definitions: same weights, same sums."""

import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_vdamkit import Blobs, make_search, plant
from test_posterior import grid_poses, tick

import vdamkit as vk
from vdamkit.backend import Backend
from vdamkit.backend.device import Device, OutOfDeviceMemory
from vdamkit.imaging.device_projector import DeviceProjector, device_projector, reached_points
from vdamkit.imaging.projector import PaddedGrid, get_projector
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.priors import OrientationPrior
from vdamkit.sampling.shifts import child_offsets, shift_grid
from vdamkit.source import ParticleSource
from vdamkit.vdam import accumulate as threaded_sums
from vdamkit.vdam import posterior as threaded
from vdamkit.vdam.advance import advance
from vdamkit.vdam.batched import accumulate as batched_sums
from vdamkit.vdam.batched import posterior as batched
from vdamkit.vdam.batched.engine import DeviceBatch, Engine, ShiftLines
from vdamkit.vdam.batched.entries import Entries, Rows
from vdamkit.vdam.batched.gradients import half_gradients as batched_gradients
from vdamkit.vdam.batched.posterior import best_tile, score_blocks
from vdamkit.vdam.batched.visit import share_out
from vdamkit.vdam.moments import half_gradients
from vdamkit.vdam.search import Candidates, Level

BOX, RADIUS, COARSE = 12, 5, orientation_grid(0)
MAPS = np.stack([Blobs.random(6, reach=3.0, sigma=1.1, seed=s).map(BOX) for s in (1, 2)])
POWER = float((MAPS[0] ** 2).sum()) / BOX**6
SUMS = ("cubes", "noise", "noise_weight", "class_weight", "offset2")


def problem(levels, n=7, classes=2, seed=1, snr=0.01, **changes):
    """A search with particles at known poses of its last grid: in both halves, two optics groups, off their centres."""
    options = {"log_class": np.log([0.7, 0.3][:classes]), "perturbation": 11.0, "adaptive_fraction": 0.97, "sigma_offset": 2.0,
               "max_significant": 20, "child_offsets": child_offsets(1.0)} | changes  # fmt: skip
    search = make_search(MAPS[:classes], levels, shift_grid(1, 1) + 0.2, **options)
    poses, _ = grid_poses(search, n, seed, classes)
    index = np.random.default_rng(2).permutation(40)[:n]
    batch, raw = plant(search, poses, POWER / snr, 3, index=index, optics=np.arange(n) % 2)
    rng = np.random.default_rng(4)
    centre = rng.integers(len(search.centres), size=n)
    batch = replace(batch, offsets=rng.uniform(-1, 1, (n, 3)), offset_priors=rng.uniform(-1, 1, (n, 3)), centre=centre)
    return search, batch, raw


def on_device(engine, batch, raw) -> DeviceBatch:
    """The same particles with their voxels in the device's order."""
    in_order = engine.projector(engine.search.levels[-1].radius).in_order
    arrays = (engine.device.put(in_order(a)) for a in (batch.masked, batch.unmasked, batch.weight, raw.masked, raw.weight))
    return DeviceBatch(batch.index, *arrays, batch.offsets, batch.offset_priors, batch.centre, raw.optics)


def entries_of(candidates) -> Entries:
    """Candidates of single particles as one."""
    sizes = [len(c.orientations) for c in candidates]
    columns = (np.concatenate([getattr(c, name) for c in candidates]) for name in ("classes", "orientations"))
    shifts = [c.shifts for c in candidates]
    start = np.append(0, np.cumsum([len(s) for s in shifts]))
    return Entries(np.repeat(np.arange(len(candidates)), sizes), *columns, start, np.concatenate(shifts))


def both(search, batch, raw, device, start=None):
    """Posteriors and sums of both engines: (threaded posteriors, sums), (batched samples, sums)."""
    posteriors = threaded.run_search(search, batch, start, tick)
    sums = threaded_sums.accumulate(search, batch, raw, posteriors, 2, tick)
    engine = Engine(search, device)
    particles = on_device(engine, batch, raw)
    found = batched.run_search(engine, particles, None if start is None else entries_of(start), tick)
    return (posteriors, sums), (found, batched_sums.accumulate(engine, particles, found, 2, tick))


def agree(first, second, rtol):
    """The same weights, evidence and best pose of every particle; the same sums."""
    (posteriors, sums), (found, device_sums) = first, second
    owner = found.entries.particle
    for i, posterior in enumerate(posteriors):
        mass = {(block.class_index, int(r)): float(w.sum()) for block in posterior.blocks
                for r, w in zip(block.orientations, block.scores, strict=True)}  # fmt: skip
        mine = np.flatnonzero(owner == i)
        other = dict(zip(zip(found.entries.class_index[mine].tolist(), found.entries.orientation[mine].tolist(), strict=True),
                         found.mass[mine].tolist(), strict=True))  # fmt: skip
        assert set(mass) == set(other)
        assert all(other[key] == pytest.approx(mass[key], rel=rtol, abs=rtol) for key in mass)
        assert found.pmax[i] == pytest.approx(posterior.pmax, rel=rtol)
        assert found.log_evidence[i] == pytest.approx(posterior.log_evidence, rel=rtol)
        k, r, s = posterior.best
        assert found.best[i].tolist() == [k, r, posterior.shifts[s]]
        assert found.count[mine].sum() == posterior.n_significant
    for name in SUMS:
        a, b = np.asarray(getattr(sums, name)), np.asarray(getattr(device_sums, name))
        np.testing.assert_allclose(b, a, rtol=10 * rtol, atol=10 * rtol * np.abs(a).max(), err_msg=name)


TWO = [Level(COARSE, 4, False), Level(COARSE.children, RADIUS, True)]
CASES = {
    "dense": ([Level(COARSE, RADIUS, False)], {}),
    "dense, fine shifts, prior": (
        [Level(COARSE.children, RADIUS, True)],
        {"prior": OrientationPrior(tilt=20.0), "centres": np.array([[0, 40.0, 0], [0, 110.0, 0]])},
    ),
    "dense, prior on psi": (
        [Level(COARSE, RADIUS, False)],
        {"prior": OrientationPrior(tilt=30.0, psi=20.0), "centres": np.array([[0, 60.0, 40.0]])},
    ),
    "two levels": (TWO, {}),
    "one class": (TWO, {"classes": 1}),
    "three levels, prior, symmetry": (
        [Level(orientation_grid(0, "C2"), 4, False), Level(orientation_grid(0, "C2").children, 4, False),
         Level(orientation_grid(0, "C2").children.children, RADIUS, True)],
        {"prior": OrientationPrior(rot=40.0, tilt=30.0), "centres": np.array([[30.0, 50, 0], [-20, 100, 0]]), "symmetry": "C2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_engines_agree(case):
    levels, changes = CASES[case]
    search, batch, raw = problem(levels, **changes)
    agree(*both(search, batch, raw, Device()), rtol=1e-9)


def test_both_engines_agree_in_single_precision():
    """Weights to 1e-4 of each other: the two add in different orders."""
    search, batch, raw = problem(TWO, dtype="float32")
    agree(*both(search, batch, raw, Device()), rtol=1e-4)


def test_both_engines_agree_on_a_local_search():
    search, batch, raw = problem(TWO)
    rng = np.random.default_rng(3)
    start = [Candidates(np.repeat([0, 1], 6), np.tile(np.sort(rng.permutation(len(COARSE))[:6]), 2), np.arange(7))
             for _ in batch.index]  # fmt: skip
    agree(*both(search, batch, raw, Device(), start), rtol=1e-9)


def test_small_pieces_give_the_same():
    """Memory for one particle and a few rotations at a time, against all at once."""
    search, batch, raw = problem(TWO)
    whole, pieces = (both(search, batch, raw, Device(memory))[1] for memory in (None, 200_000))
    assert Engine(search, Device(200_000)).rows_at_once(100, 50) < 10
    np.testing.assert_allclose(pieces[0].mass, whole[0].mass, rtol=1e-12)
    for name in SUMS:
        a, b = np.asarray(getattr(whole[1], name)), np.asarray(getattr(pieces[1], name))
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12 * np.abs(a).max(), err_msg=name)


def test_runs_of_rows():
    """Of one class, as large as may be; a row that is too large is a run of its own."""
    rows = Rows(np.repeat([0, 1], [5, 4]), np.arange(9), np.zeros(0, int))
    assert rows.pieces(3) == [slice(0, 3), slice(3, 5), slice(5, 8), slice(8, 9)]
    sizes = np.array([1, 1, 9, 1, 1.5, 1, 1, 1, 1])
    assert rows.pieces(3, sizes) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 8), slice(8, 9)]


def test_shifts_lie_on_lines():
    """Sorted by z, then y; each where its coordinates say; fine shifts of a particle in the same order."""
    shifts = (shift_grid(3, 1)[:, None] + child_offsets(1)).reshape(-1, 3) + 0.3
    lines = ShiftLines.of(shifts)
    np.testing.assert_array_equal(lines.values[lines.place[:, :3]], shifts)
    x, y, z = shifts[lines.order].T
    np.testing.assert_array_equal(np.lexsort((x, y, z)), np.arange(len(x)))
    entries = Entries.chosen(np.ones((2, 1), bool), 1, 123).some(np.arange(2))
    entries = replace(entries, shift_start=np.array([0, 2, 5]), shift=np.array([7, 8, 0, 60, 122]))
    fine = entries.with_fine_shifts(lines.order)
    rank = np.argsort(lines.order)
    for mine, (begin, end) in zip(([7, 8], [0, 60, 122]), ((0, 16), (16, 40)), strict=True):
        assert set(fine.shift[begin:end] // 8) == set(mine) and (np.diff(rank[fine.shift[begin:end]]) > 0).all()
    assert fine.shift_start.tolist() == [0, 16, 40]


def test_particles_are_scored_in_tiles_of_their_size():
    """Few entries or shifts in small tiles, many in large ones; every pair in one tile, of particles without entries none."""
    entries, shifts = np.array([16, 0, 300, 2000, 16, 30]), np.array([16, 5, 200, 8, 8, 30])
    assert best_tile(entries, shifts, 5000).tolist() == [8, 8, 64, 8, 8, 32]
    assert best_tile(entries, shifts, 100)[0] == 32, "a block of few voxels costs its beginning and end"
    for tile in (8, 32, 64):
        seen = [np.zeros(shape, int) for shape in zip(entries, shifts, strict=True)]
        for i, entry, shift, _ in score_blocks(np.arange(6), entries, shifts, tile).tolist():
            assert seen[i][entry : entry + tile, shift : shift + tile].size > 0
            seen[i][entry : entry + tile, shift : shift + tile] += 1
        assert all((one == 1).all() for one in seen)


def test_sums_leave_the_device_together():
    """Only sums over shells, once: to wait for a device costs more than to add up."""

    class Counting(Device):
        got = 0

        def get(self, array):
            self.got += 1
            return super().get(array)

    search, batch, raw = problem(TWO)
    engine = Engine(search, Counting())
    particles = on_device(engine, batch, raw)
    found = batched.run_search(engine, particles, None, tick)
    before = engine.device.got
    sums = batched_sums.accumulate(engine, particles, found, 3, tick)
    assert engine.device.got == before + 1
    assert not sums.noise[2].any() and not sums.noise_weight[2].any(), "an optics group that no particle has"


def test_tables_of_a_projector():
    """Points that cylinders reach come in blocks of 8 × 8 × 4; shells hold the voxels of the half-ball alone."""
    projector, tables = get_projector(24, 11, "float64"), DeviceProjector(get_projector(24, 11, "float64"), Device())
    points = reached_points(projector)
    x, y, z = points + np.array([[0], [projector.grid.half_width], [projector.grid.half_width]])
    block = np.stack([z // 4, y // 8, x // 8])
    assert (np.diff(block) != 0).any(0).sum() + 1 == len(np.unique(block, axis=1).T) > 50
    np.testing.assert_array_equal(np.lexsort((x, y, z, *block[::-1])), np.arange(len(x)))
    ball, ones = projector.ball, np.ones((2, 3, len(tables.order)))
    sums = tables.shell_sums(ones * np.array([1.0, 2.0])[:, None, None])
    np.testing.assert_array_equal(sums[1, 2], 2 * np.bincount(ball.shell, ball.weight))
    assert sums.shape == (2, 3, ball.n_shells)


def test_chunks_go_to_devices_in_turn(monkeypatch):
    """Each device in its own thread, the same next time; with its last chunk it is told once which particles it will have
    next time, which is when they come to it."""
    monkeypatch.setattr(Engine, "particles_at_once", lambda engine: 3)
    devices, seen = (Device(), Device()), []
    search = SimpleNamespace(dtype="float32", backend=Backend(1, devices))

    def task(engine, chunk, ahead):
        ahead = None if ahead is None else ahead.tolist()
        seen.append((devices.index(engine.device), threading.current_thread(), chunk.tolist(), ahead))
        if chunk.tolist() == [6, 7, 8]:
            raise OutOfDeviceMemory("full")
        return chunk.tolist()

    for _ in range(2):
        found, notes = share_out(search, np.arange(12), task, np.arange(20, 34), tf32=False)
        assert found == [[0, 1, 2], [3, 4, 5], [6], [7, 8], [9, 10, 11]] and len(notes) == 1
    chunks = {number: [(chunk, ahead) for who, _, chunk, ahead in seen if who == number] for number in (0, 1)}
    next_time = [20, 21, 22, 26, 27, 28, 32, 33], [23, 24, 25, 29, 30, 31]
    assert chunks[0] == 2 * [([0, 1, 2], None), ([6, 7, 8], next_time[0]), ([6], None), ([7, 8], None)]
    assert chunks[1] == 2 * [([3, 4, 5], None), ([9, 10, 11], next_time[1])]
    seen.clear()
    share_out(search, np.arange(20, 34), task, tf32=False)
    for number in (0, 1):
        assert [i for who, _, chunk, _ in seen if who == number for i in chunk] == next_time[number]
    assert len({(number, thread) for number, thread, *_ in seen}) == 2 == len({thread for _, thread, *_ in seen})
    with devices[0].thread() as one, devices[0].thread() as other:
        assert one.submit(threading.current_thread).result() in {thread for _, thread, *_ in seen}
        assert other is not one, "a mini-batch that is paused does not hold up another"


# TF32 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tutorial():
    """The tutorial's job on the data of the repository, twelve mini-batches in."""
    data = Path(__file__).parents[2] / "data" / "stacks2d" / "optimisation_set.star"
    settings = vk.Settings(symmetry="C6", tilt_prior_width=10, mask_diameter=230, mini_batches=24, batch_initial=40)
    job = vk.Session(data, settings)
    job.run(12)
    return job


@pytest.mark.parametrize("adaptive", [True, False])
def test_tf32_changes_little(tutorial, adaptive):
    """With coarse scores from factors of 10 bits: evidence, map and poses after one mini-batch, against single precision.

    Where the coarse pass only chooses what is refined next to nothing changes; where it is the only pass, log-likelihoods
    change by some hundredths.
    """
    results = []
    state = tutorial.state.replace(offset_range=tutorial.state.offset_step)  # few shifts, for speed
    for tf32 in (False, True):
        settings = tutorial.settings.replace(adaptive=adaptive, tf32=tf32, global_search_every=1, batch_final=40)
        source = ParticleSource(tutorial.particles, settings, Backend(1))
        results.append(advance(state, settings, source, Backend(1, (Device(),)))[0])
    single, rounded = results
    change = rounded.poses.log_likelihood - single.poses.log_likelihood
    assert np.sqrt((change**2).mean()) < (0.01 if adaptive else 0.1)
    gap = np.linalg.norm(rounded.maps - single.maps) / np.linalg.norm(single.maps)
    assert gap < (1e-3 if adaptive else 1e-2)
    assert (rounded.poses.angles == single.poses.angles).all(1).mean() > 0.95
    if not adaptive:
        assert np.abs(change).max() > 0, "the rounding was not at work"


@pytest.mark.parametrize("group", ["C1", "C4", "D2"])
def test_gradients_are_the_threads(group):
    """Scattered sums of both halves to the gradient: completed, symmetrised, divided and cropped on a device."""
    rng, grid = np.random.default_rng(3), PaddedGrid(BOX, RADIUS + 2.5)
    cubes = rng.normal(size=(2, 3, grid.size)).astype(np.float32)
    cubes[:, 2] = np.abs(cubes[:, 2]) + 0.1
    backend = Backend(1, (Device(),))
    there = batched_gradients(grid, cubes, group, RADIUS, backend)
    here = half_gradients(grid, cubes, group, RADIUS, backend)
    np.testing.assert_allclose(there.weight, here.weight, rtol=1e-5)
    np.testing.assert_allclose(there.d, here.d, rtol=0, atol=1e-5 * np.abs(here.d).max())


def test_a_device_may_be_released_at_any_time():
    """As `session.free()` does while another thread computes: right after every look at what is kept there."""

    class Released(dict):
        def __contains__(self, key):
            return self.get(key) is not None

        def get(self, key, default=None):
            found = super().get(key, default)
            self.clear()
            return found

    device, grid = Device(), PaddedGrid(BOX, RADIUS + 2.5)
    device.tables, projector = Released(), get_projector(BOX, RADIUS, "float32")
    cubes = np.random.default_rng(3).random((2, 3, grid.size), np.float32)
    for _ in range(2):
        assert device_projector(projector, device).projector is projector
    for _ in range(2):
        batched_gradients(grid, cubes, "C1", RADIUS, Backend(1, (device,)))


def test_gradients_where_a_device_has_no_memory():
    """The machine computes them."""

    class Full(Device):
        @contextmanager
        def active(self):
            try:
                yield
            except MemoryError:
                raise OutOfDeviceMemory("full") from None

        @property
        def xp(self):
            raise MemoryError

        @xp.setter
        def xp(self, value):
            pass

    grid = PaddedGrid(BOX, RADIUS + 2.5)
    cubes = np.random.default_rng(3).random((2, 3, grid.size), np.float32)
    found = batched_gradients(grid, cubes, "C2", RADIUS, Backend(1, (Full(),)))
    np.testing.assert_array_equal(found.d, half_gradients(grid, cubes, "C2", RADIUS, Backend(1)).d)
