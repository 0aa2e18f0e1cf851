"""Sessions on a GPU: the same results as on the CPU, whatever the memory, with one device or two, and when one is lost."""

import gc
import shutil

import numpy as np
import pytest

import vdamkit as vk
from vdamkit.backend.cuda import CudaDevice
from vdamkit.backend.device import DeviceLost, OutOfDeviceMemory
from vdamkit.errors import SettingsError
from vdamkit.io.particle_files import find_file
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.priors import OrientationPrior
from vdamkit.vdam.accumulate import Sums
from vdamkit.vdam.batched.engine import Engine
from vdamkit.vdam.batched.store import Store, _reader
from vdamkit.vdam.batched.visit import _total, find_poses
from vdamkit.vdam.schedule import draw_batch
from vdamkit.vdam.search import make_search

OPTIONS = {"mini_batches": 12, "symmetry": "C1", "mask_diameter": 220.0, "batch_initial": 10, "batch_final": 12, "threads": 1,
           "offset_range": 1.0, "offset_step": 1.0, "max_significant": 12, "seed": 3}  # fmt: skip


CHUNKS = 5e-3  # what another division into chunks may change: negative sums of weights are cut off chunk by chunk


def session(few_particles, device="cuda", **options) -> vk.Session:
    return vk.Session(few_particles, vk.Settings(**OPTIONS | {"device": device} | options))


@pytest.fixture
def no_collector():
    """Nothing is freed but what nobody refers to."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def on_cpu(few_particles) -> vk.Session:
    """Three mini-batches on the CPU."""
    job = session(few_particles, "cpu")
    job.run(3)
    return job


def same(job: vk.Session, other: vk.Session, tolerance: float = 2e-3) -> None:
    """The same poses of nearly all; maps, moments and noise but for `tolerance` (relative L2, single precision).

    After some mini-batches a sample at the edge of significance may count here and not there.
    """
    a, b = job.state, other.state
    alike = (a.poses.angles == b.poses.angles).all(1) & (a.poses.last_visit == b.poses.last_visit)
    assert alike.mean() > 0.9
    for name in ("maps", "moment1", "sigma2", "class_probability", "tau2"):
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name
    assert job.report.log_likelihood == pytest.approx(other.report.log_likelihood, rel=1e-3, abs=1e-3)


def test_cpu_and_gpu_agree(cuda, few_particles, on_cpu):
    job = session(few_particles)
    job.run(3)
    same(job, on_cpu)
    assert job.report.notes == ()


def test_one_mini_batch_from_the_same_state(cuda, few_particles, on_cpu):
    """Posterior, gradient and map within single precision: nothing has had time to grow."""
    here, there = on_cpu.branch(), on_cpu.branch(device="cuda")
    here.step(), there.step()
    same(there, here, tolerance=3e-5)
    np.testing.assert_allclose(there.state.poses.pmax, here.state.poses.pmax, rtol=1e-4)


def test_a_run_repeats_bit_for_bit(cuda, few_particles):
    first, second = (session(few_particles) for _ in range(2))
    first.run(2), second.run(2)
    np.testing.assert_array_equal(first.state.maps, second.state.maps)


SEARCHES = [
    {"classes": 2, "seed": 4}, {"symmetry": "C2", "psi_prior_width": 40.0}, {"precision": "double"}, {"global_search_every": 2},
    {"adaptive": False, "symmetry": "C4", "batch_initial": 6},
]  # fmt: skip


@pytest.mark.parametrize("options", SEARCHES)
def test_every_kind_of_search(cuda, few_particles, options):
    """Two classes, symmetry and priors, one exhaustive level, double precision, local searches."""
    here, there = (session(few_particles, device, **options) for device in ("cpu", "cuda"))
    here.run(2), there.run(2)
    same(there, here)


def test_two_devices_share_a_mini_batch(stub, few_particles):
    """As the CPU does in two chunks, to rounding; as one device to the little that chunks make (`CHUNKS`)."""
    both, one = session(few_particles, "cuda:0,cuda:1"), session(few_particles)
    here = session(few_particles, "cpu", chunk_particles=5)
    for job in (both, here, one):
        job.step()
    same(both, here, tolerance=3e-5)
    same(both, one, tolerance=CHUNKS)


def test_an_unusable_chunk_is_passed_over(stub, few_particles, tmp_path):
    """The first device has nothing to add: its only particle cannot be read."""
    shutil.copytree(few_particles.parent.parent, tmp_path / "copy")
    few = tmp_path / "copy" / "stacks2d" / few_particles.name
    here, there = (session(few, device, batch_initial=2) for device in ("cpu", "cuda:0,cuda:1"))
    first = draw_batch(1, 2, 24, here.settings)[0]
    find_file(here.particles, first, "rlnImageName").write_bytes(b"")
    here.step(), there.step()
    assert here.state.bad_particles == there.state.bad_particles == (first,)
    same(there, here, tolerance=3e-5)
    search = make_search(there.state, there.settings, there._source, there._backend, 4, np.array([first]))
    assert find_poses(there.state, there.settings, there._source, search, np.array([first]))[0] == []


def test_everyone_is_scored_on_the_device(cuda, few_particles):
    here, there = (session(few_particles, device) for device in ("cpu", "cuda"))
    for job in (here, there):
        job.run(2)
        job.score_all()
    assert (there.state.poses.pmax > 0).all()
    assert (here.state.poses.angles == there.state.poses.angles).all(1).mean() > 0.9


def test_memory_that_runs_out(stub, few_particles, on_cpu):
    """A limit that the first plan exceeds: smaller pieces, told in the report; the result is the same."""
    job = session(few_particles)
    stub.limit(0, 16_000_000)
    try:
        job.run(3)
    finally:
        stub.limit(0, None)
    notes = [note for report in job.reports() for note in report.notes]
    assert notes and all("no memory left" in note for note in notes)
    assert str(job.reports()[0]).endswith(notes[0]) or len(job.reports()[0].notes) > 1
    same(job, on_cpu, tolerance=CHUNKS)


def test_memory_that_runs_out_between_chunks(stub, few_particles, monkeypatch):
    """While sums are added: the chunk is done again, and progress does not count it twice."""
    add, fractions, failures = Sums.__add__, [], [OutOfDeviceMemory("full")]

    def once_full(sums, other):
        if failures:
            raise failures.pop()
        return add(sums, other)

    monkeypatch.setattr(Engine, "particles_at_once", lambda engine: 1)
    monkeypatch.setattr(Sums, "__add__", once_full)
    job = session(few_particles, batch_initial=2, batch_final=2, max_significant=2)
    job.listeners.append(lambda stage, fraction: fractions.append(fraction))
    job.step()
    assert job.report.n_particles == 2 and len(job.report.notes) == 1
    assert max(fractions) <= 1


def test_sums_of_two_devices_take_no_more_room(stub):
    """On the first device, which has room for its own alone."""
    devices, totals = (CudaDevice(0), CudaDevice(1)), {}
    for device in devices:
        with device.active():
            totals[device] = Sums(device.xp.ones((1, 2, 3, 1000), np.float32), *3 * [np.ones(1)], 1.0)
    stub.limit(0, stub.get_default_memory_pool().used_bytes())
    total = _total(devices, totals)
    with devices[0].active():
        assert (devices[0].get(total.cubes) == 2).all() and total.noise == [2] and total.offset2 == 2


def test_memory_that_is_never_enough(stub, few_particles):
    """One clear error, the state before is kept, and the CPU can go on from it."""
    job = session(few_particles)
    job.run(1)
    before = job.state
    stub.limit(0, 10_000)
    with pytest.raises(OutOfDeviceMemory, match=r"cuda:0 has not enough memory for a single particle.*device='cpu'"):
        job.step()
    assert job.state is before
    job.change(device="cpu")
    assert job.step().iteration == 2


def test_a_planned_limit_is_kept(stub, few_particles):
    """`device_memory` bounds what is planned for, the particles that stay there included, without an error on the way."""
    device = CudaDevice(0, memory=3_000_000)
    assert device.room == 3_000_000
    device.halve()
    assert device.room == 1_500_000
    job = session(few_particles, device_memory=0.02)
    job.run(1)
    assert job.report.notes == ()
    (device,) = job._backend.devices
    assert 0 < device.kept < 0.02 * 2**30 and device.room == int(0.02 * 2**30) - device.kept
    job.free()
    assert device.kept == 0


def test_free_gives_the_memory_back(stub, few_particles):
    job = session(few_particles)
    job.run(2)
    pool = stub.get_default_memory_pool()
    assert pool.used_bytes() > 100_000
    job.free()
    gc.collect()
    assert pool.used_bytes() == 0
    assert job.step().iteration == 3


def test_memory_goes_with_the_last_session(stub, few_particles, no_collector):
    """What is on a device stays while a session or its branch computes there, no longer."""
    job, pool = session(few_particles, batch_initial=3, batch_final=3, max_significant=2), stub.get_default_memory_pool()
    job.step()
    branch = job.branch()
    job.change(device="cpu")
    _reader().submit(int).result()  # nothing is on the way any more
    assert pool.used_bytes() > 100_000
    del branch
    assert pool.used_bytes() == 0


ERRORS = {
    OutOfDeviceMemory: ["CuFFTError CUFFT_ALLOC_FAILED", "CuFFTError CUFFT_INTERNAL_ERROR", "MemoryError std::bad_alloc",
                        "CUBLASError CUBLAS_STATUS_NOT_INITIALIZED", "CUBLASError CUBLAS_STATUS_ALLOC_FAILED",
                        "CUDARuntimeError cudaErrorMemoryAllocation: out of memory", "OutOfMemoryError Out of memory"],
    DeviceLost: ["CUDARuntimeError cudaErrorLaunchFailure: unspecified launch failure", "CuFFTError CUFFT_EXEC_FAILED",
                 "CUBLASError CUBLAS_STATUS_EXECUTION_FAILED"],
    RuntimeError: ["RuntimeError generator raised StopIteration"],
    MemoryError: ["_ArrayMemoryError Unable to allocate 3 GiB for an array"],
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "said"), [(kind, said) for kind, all_said in ERRORS.items() for said in all_said])
def test_what_an_error_of_cupy_means(stub, wanted, said):
    """That memory ran out, that the device is lost, or nothing that concerns it."""
    name, _, text = said.partition(" ")
    base = MemoryError if "Memory" in name else RuntimeError
    error = base if name == base.__name__ else type(name, (base,), {})
    with pytest.raises(wanted, match=text) as caught, CudaDevice(0).active():
        raise error(text)
    assert caught.type in (wanted, error)


def test_uploads_share_a_stream(stub, monkeypatch):
    """CuPy's pool keeps memory apart by stream, so a new one each time would never find what was used before."""
    made, stream = [], stub.cuda.Stream
    monkeypatch.setattr(stub.cuda, "Stream", lambda **options: made.append(1) or stream(**options))
    device = CudaDevice(1)
    for _ in range(3):
        with device.uploading():
            assert stub.zeros(3).device.id == 1
    assert made == [1]


def test_a_lost_device_leaves_a_session_on_the_cpu(stub, few_particles, on_cpu):
    job = session(few_particles)
    job.run(2)
    stub.lose(0)
    report = job.step()
    assert report.iteration == 3 and job.settings.device == "cpu"
    assert "cuda:0 does not answer any more" in job.history.note.iloc[2]
    same(job, on_cpu)
    job.undo()
    assert job.settings.device == "cpu", "going back does not bring the device back"
    assert job.step().iteration == 3


def test_a_device_lost_at_the_start_or_while_all_are_scored(stub, few_particles):
    job = session(few_particles)
    stub.lose(0)
    job.step()
    assert job.settings.device == "cpu" and "cuda does not answer any more" in job.history.note.iloc[0]
    other = session(few_particles, "cuda:1")
    other.step()
    stub.lose(1)
    found = other.score_all()
    assert other.settings.device == "cpu" and (found["rlnClassNumber"] > 0).all()
    assert "cuda:1 does not answer any more" in other.history.note.iloc[1]


def test_a_device_that_is_not_there(stub, few_particles):
    with pytest.raises(SettingsError, match="device is 'cuda:5' but this machine has 2 GPU"):
        session(few_particles, "cuda:5")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:0,cpu", "cuda:0,cuda"])
def test_a_device_that_is_no_device(name):
    with pytest.raises(SettingsError, match="device is"):
        vk.Settings(device=name)


# particles on the device -------------------------------------------------------------------------------------------------


def test_particles_are_read_once(stub, few_particles, monkeypatch):
    """After all were visited nothing is read, converted or copied again; the next ones are fetched ahead."""
    job = session(few_particles, batch_initial=24, batch_final=24)
    job.run(1)
    asked = []
    fetch = job._source.fetch
    monkeypatch.setattr(job._source, "fetch", lambda index, radius: asked.append(len(index)) or fetch(index, radius))
    job.run(1)
    assert asked == []


def test_the_next_mini_batch_is_fetched_during_the_last_chunk(stub, few_particles, monkeypatch):
    """Not earlier: chunks that are still to come would wait for it."""
    asked = []
    for name in ("gather", "fetch_ahead"):
        act = getattr(Store, name)
        monkeypatch.setattr(Store, name, lambda *given, name=name, act=act: asked.append(name) or act(*given))
    monkeypatch.setattr(Engine, "particles_at_once", lambda engine: 1)
    session(few_particles, batch_initial=2, batch_final=2, max_significant=2).step()
    assert asked == ["gather", "gather", "fetch_ahead"]


@pytest.mark.parametrize("symmetry", ["C3", "D2"])
def test_priors_are_the_cpus(cuda, symmetry):
    """Distances to prior centres and what they admit, among them a centre that admits nothing but the nearest."""
    prior, grid, device = OrientationPrior(rot=20, tilt=4, psi=6), orientation_grid(1), CudaDevice(0)
    centres = np.random.default_rng(0).uniform([-180, 0, -180], [180, 180, 180], (9, 3))
    rotations = grid.rotations(3.0)
    with device.active():
        distance = device.get(prior.distance(rotations, centres, symmetry, device))
        inside = device.get(prior.within_cut(rotations, centres, symmetry, device))
    np.testing.assert_allclose(distance, prior.distance(rotations, centres, symmetry), rtol=1e-12)
    np.testing.assert_array_equal(inside, prior.within_cut(rotations, centres, symmetry))
    assert inside.any(1).all() and not inside.all()


def test_accuracies_are_the_cpus(cuda, few_particles):
    """The tenth mini-batch estimates how well particles can be aligned; from the same state, here and there."""
    here = session(few_particles, "cpu")
    here.run(9)
    there = here.branch(device="cuda")
    here.step(), there.step()
    for name in ("accuracy_rotation", "accuracy_offset"):
        assert np.isfinite(getattr(here.state, name))
        assert getattr(there.state, name) == pytest.approx(getattr(here.state, name), rel=1e-5)
