"""The session's contract: run is n steps, undo and redo, branch, change, resume, cancel, score, judge."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers_vdamkit import hold

import vdamkit as vk
from vdamkit import session as session_module
from vdamkit.errors import InputError, OutputError, SettingsError
from vdamkit.imaging.masks import soft_sphere
from vdamkit.io.checkpoint import load_checkpoint, save_checkpoint
from vdamkit.io.star_tables import read_star, write_star
from vdamkit.simulate import simulate
from vdamkit.vdam.start import initial_state
from vdamkit.vdam.visit import Cancelled

OPTIONS = {"mini_batches": 6, "mask_diameter": 230.0, "threads": 2, "seed": 3, "symmetry": "C6", "tilt_prior_width": 10.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 hexamers as stacks, 6 of them as volumes, in a small box."""
    out = tmp_path_factory.mktemp("hexamers")
    simulate(out, particles=24, volumes=6, box=20, pixel_size=16.0, tilts=9, variance_ratio=1.0, seed=5)
    return out


@pytest.fixture
def job(folder):
    return vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))


def same(a, b) -> bool:
    """Whether two states are equal bit for bit."""
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x):
            if not same(x, y):
                return False
        elif not np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f"):
            return False
    return True


def test_run_is_n_steps_bit_for_bit(job, folder):
    other = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    job.run(3)
    for _ in range(3):
        other.step()
    assert same(job.state, other.state)


def test_threads_do_not_change_a_bit(job, folder):
    one = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | {"threads": 1}))
    assert same(job.state, one.state)
    job.step(), one.step()
    assert same(job.state, one.state)


def test_another_seed_is_another_run(job, folder):
    other = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | {"seed": 4}))
    job.step(), other.step()
    assert not same(job.state, other.state)


def test_undo_and_redo(job):
    job.run(2)
    states = [job.state]
    job.step()
    states.append(job.state)
    assert job.undo() == 2 and same(job.state, states[0])
    assert job.redo() == 3 and job.state is states[1]
    job.undo()
    job.step()
    assert same(job.state, states[1]), "stepping again after undo gives the same mini-batch"
    assert job.undo(99) == 0 and job.iteration == 0


def test_undo_restores_the_settings_of_then(job):
    job.step()
    job.change(T=1.5)
    job.step()
    assert job.settings.T == 1.5
    job.undo(2)
    assert job.settings.T == 4


def test_change_acts_at_the_next_mini_batch_and_is_recorded(job):
    job.run(2)
    branch = job.branch("higher T", T=50.0, T_scheme="constant")
    job.step(), branch.step()
    assert branch.report.T == 50 and job.report.T < 4
    assert not np.array_equal(job.map, branch.map)
    assert branch.history["note"].str.contains("T 4.0 → 50.0").any()
    assert job.settings.T == 4, "a branch does not touch its parent"


def test_symmetry_prior_and_mask_change_in_mid_run(job):
    job.step()
    for options in ({"symmetry": "C1"}, {"tilt_prior_width": None}, {"psi_prior_width": 15.0}, {"symmetry": "C3"},
                    {"mask_diameter": 200.0}):  # fmt: skip
        job.change(**options)
        job.step()
        assert np.isfinite(job.map).all()
    beyond = soft_sphere(20, 100 / 16.0, 3) == 0
    assert job.map.std() > 0 and (job.map[beyond] == 0).all()


def test_wrong_change_changes_nothing(job):
    job.step()
    with pytest.raises(SettingsError, match="C60x"):
        job.change(symmetry="C60x", T=2)
    assert job.settings.T == 4
    with pytest.raises(SettingsError, match="mask_diameter"):
        job.change(mask_diameter=1e4)
    with pytest.raises(SettingsError, match="classes"):
        job.change(classes=2)
    with pytest.raises(SettingsError, match="cuda:63"):
        job.change(device="cuda:63", T=2, mask_diameter=150)
    assert job.settings.T == 4 and job.settings.device == "cpu"
    job.step()


def test_cancel_keeps_the_state_before(job):
    job.step()
    before = job.state
    job.listeners.append(lambda stage, fraction: job.cancel() if stage == "M-step" else None)
    with pytest.raises(Cancelled):
        job.step()
    assert job.state is before
    job.listeners.clear()
    assert job.step().iteration == 2


def test_progress_within_a_mini_batch_rises_to_one(job):
    seen = []
    job.listeners.append(lambda stage, fraction: seen.append(fraction))
    job.step()
    assert len(seen) > 5 and seen[-1] == 1 and max(np.diff(seen).min(), -0.05) >= -0.05


def test_resume_goes_on_bit_for_bit(job, tmp_path):
    job.run(2)
    job.save(tmp_path / "job", final=False)
    job.run(2)
    again = vk.Session.resume(tmp_path / "job")
    assert again.iteration == 2 and len(again.reports()) == 2
    again.run(2)
    assert same(job.state, again.state)


def test_killed_run_resumes_to_the_same_end(folder, tmp_path):
    """kill -9 in mid-run loses at most the mini-batch that was running."""
    star = folder / "stacks2d" / "optimisation_set.star"
    code = (
        "import vdamkit as vk, sys\n"
        f"job = vk.Session({str(star)!r}, vk.Settings(**{OPTIONS!r}), output={str(tmp_path / 'job')!r})\n"
        "for _ in range(6):\n    job.step(); print(job.iteration, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while (line := process.stdout.readline()) and int(line) < 2:
        pass
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    again = vk.Session.resume(tmp_path / "job")
    assert again.iteration >= 2
    again.run()
    whole = vk.Session(star, vk.Settings(**OPTIONS))
    whole.run()
    assert again.iteration == whole.iteration == 6 and same(again.state, whole.state)


def test_resume_needs_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint.npz"):
        vk.Session.resume(tmp_path)


def rewritten(path, inputs_of=None, **changes):
    """Change a checkpoint's settings, and its inputs by a function."""
    state, settings, log, inputs = load_checkpoint(path)
    save_checkpoint(path, state, settings.replace(**changes), log, inputs_of(inputs) if inputs_of else inputs)


def older(inputs):
    """The inputs as checkpoints had them before they told particles apart."""
    return {name: value for name, value in inputs.items() if name not in ("digest", "in_force")}


@pytest.mark.parametrize("as_before", [False, True])
def test_resume_takes_the_files_that_were_given_beside_the_set(folder, tmp_path, as_before):
    star = folder / "stacks2d" / "optimisation_set.star"
    blocks = read_star(folder / "stacks2d" / "particles.star")
    write_star(folder / "stacks2d" / "reversed.star", blocks | {"particles": blocks["particles"][::-1].reset_index(drop=True)})
    job = vk.Session(star, vk.Settings(**OPTIONS), particles=folder / "stacks2d" / "reversed.star", output=tmp_path / "job")
    job.step()
    rewritten(tmp_path / "job" / "checkpoint.npz", older if as_before else None)
    again = vk.Session.resume(tmp_path / "job")
    assert again.particles.paths.particles_file == folder / "stacks2d" / "reversed.star"
    job.step(), again.step()
    assert same(job.state, again.state)


def test_poses_do_not_come_to_lie_on_other_particles(folder, tmp_path):
    """Fewer particles, another order, other places, another box: one sentence, and the checkpoint stays."""
    data, tomograms = folder / "stacks2d" / "changing.star", folder / "tomograms.star"
    blocks = read_star(folder / "stacks2d" / "particles.star")
    write_star(data, blocks)
    vk.Session(particles=data, tomograms=tomograms, settings=vk.Settings(**OPTIONS)).save(tmp_path / "job", final=False)
    table, optics = blocks["particles"], blocks["optics"]
    moved = table.assign(rlnCenteredCoordinateXAngst=table["rlnCenteredCoordinateXAngst"] + 50)
    for change, words in (
        ({"particles": table[:-1]}, "24 particles but .* now has 23"),
        ({"particles": table[::-1]}, "other particles"),
        ({"particles": moved}, "other particles"),
        ({"optics": optics.assign(rlnImageSize=16)}, "box of 20 px .* now have 16 px"),
    ):
        write_star(data, blocks | change)
        with pytest.raises(InputError, match=words + ".*put the old files back"):
            vk.Session.resume(tmp_path / "job")
    rewritten(tmp_path / "job" / "checkpoint.npz", older)
    with pytest.raises(InputError, match="box of 20 px"):
        vk.Session.resume(tmp_path / "job")
    write_star(data, blocks)
    assert vk.Session.resume(tmp_path / "job").iteration == 0


def test_a_symmetry_not_yet_taken_up_outlives_a_save(folder, tmp_path):
    star = folder / "stacks2d" / "optimisation_set.star"
    coarse = {"healpix_order": 0, "offset_range": 2.0, "batch_initial": 8, "tilt_prior_width": None}
    job = vk.Session(star, vk.Settings(**OPTIONS | coarse | {"symmetry": "C1"}))
    job.step()
    job.change(symmetry="C6")
    job.save(tmp_path, final=False)
    again = vk.Session.resume(tmp_path)
    again.step()
    assert [node.settings.symmetry for node in again._history.line()] == ["C1", "C6", "C6"]
    assert "axes" in again.history["note"].iloc[1], "the maps were turned first"


def test_a_run_of_a_gpu_goes_on_without_one(job, tmp_path):
    job.save(tmp_path, final=False)
    rewritten(tmp_path / "checkpoint.npz", device="cuda:63")
    with pytest.raises(SettingsError, match="cuda:63"):
        vk.Session.resume(tmp_path)
    again = vk.Session.resume(tmp_path, device="cpu", T=2)
    assert again.step().iteration == 1 and again.settings.device == "cpu"
    assert "device cuda:63 → cpu, T 4.0 → 2" in again.history["note"].iloc[0]


def test_another_run_is_not_written_over(folder, tmp_path):
    """A cell that is executed again, a branch that saves to its parent's folder: refused before anything is written."""
    star, out = folder / "stacks2d" / "optimisation_set.star", tmp_path / "job"
    job = vk.Session(star, vk.Settings(**OPTIONS), output=out)
    job.step()
    with pytest.raises(OutputError, match=r"already holds a run \(mini-batch 1\).*Session.resume.*overwrite=True"):
        vk.Session(star, vk.Settings(**OPTIONS), output=out)
    branch = job.branch()
    with pytest.raises(OutputError, match="already holds a run"):
        branch.save(out)
    assert branch.save(tmp_path / "other", final=False) and job.save()
    copy = out / "checkpoint_1.npz"
    copy.write_bytes((out / "checkpoint.npz").read_bytes())
    again = vk.Session.resume(out)
    assert again.step().iteration == vk.Session.resume(out).iteration == 2, "whoever resumed it goes on with it"
    with pytest.raises(OutputError, match="mini-batch 2"):
        vk.Session.resume(copy).save()
    new = vk.Session(star, vk.Settings(**OPTIONS), output=out, overwrite=True)
    assert vk.Session.resume(out).iteration == 2 and (out / "initial_model.mrc").exists(), "until something replaces it"
    assert new.state and vk.Session.resume(out).iteration == 0 and not (out / "initial_model.mrc").exists()


def test_a_folder_needs_a_name(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="no name"):
        job.save("")
    assert not list(tmp_path.iterdir())


def test_small_batches_leave_flags_and_score_all_clears_them(folder):
    settings = vk.Settings(**OPTIONS | {"batch_initial": 8, "batch_final": 8})
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", settings)
    job.step()
    poses = job.poses
    assert (poses["rlnClassNumber"] == 0).sum() == 16
    maps = job.map
    scored = job.score_all()
    assert (scored["rlnClassNumber"] > 0).all()
    assert np.array_equal(maps, job.map)
    job.undo()
    assert (job.poses["rlnClassNumber"] == 0).sum() == 16


def test_posterior_of_one_particle(job):
    job.run(2)
    posterior = job.posterior(7)
    assert 0.99 < posterior.probability.sum() <= 1 + 1e-5
    assert (np.diff(posterior.probability) <= 0).all()
    assert len(posterior.credible_set(0.5)) <= len(posterior.credible_set(0.9))
    with pytest.raises(InputError, match="999"):
        job.posterior(999)


def test_verdict_says_so_when_nothing_has_run(job):
    verdict = job.verdict()
    assert not verdict.good and verdict.advice
    job.run(5)
    assert "Å" in str(job.verdict())


def test_two_classes_and_volumes(folder):
    job = vk.Session(folder / "volumes3d" / "optimisation_set.star", vk.Settings(**OPTIONS | {"classes": 2}))
    report = job.run(2)
    assert job.maps.shape == (2, 20, 20, 20)
    assert sum(report.class_populations) == pytest.approx(1)
    assert all(volume.std() > 0 for volume in job.maps)


def test_single_bad_particle_is_left_out_and_many_are_fatal(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    files = sorted((copy / "stacks2d").rglob("*.mrcs"))
    files[0].write_bytes(files[0].read_bytes()[:2000])
    job = vk.Session(copy / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    report = job.step()
    assert report.n_particles == 23 and len(job.state.bad_particles) == 1
    assert files[0].name in report.bad[0]
    job.step()
    for file in files[1:5]:
        file.write_bytes(b"")
    broken = vk.Session(copy / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    with pytest.raises(InputError, match="more than 10 %"):
        broken.step()


def test_grey_scale_of_the_data_does_not_matter(folder, tmp_path):
    """Images × 1e3 and × 1e-3 give the same map up to that factor."""
    import mrcfile

    maps = []
    for factor in (1.0, 1e3, 1e-3):
        copy = tmp_path / f"grey{factor:g}"
        shutil.copytree(folder, copy)
        for file in (copy / "stacks2d").rglob("*.mrcs"):
            data = mrcfile.read(file).astype(np.float32) * np.float32(factor)
            with mrcfile.new(file, overwrite=True) as handle:
                handle.set_data(data)
                handle.voxel_size = 16.0
        job = vk.Session(copy / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
        job.run(3)
        maps.append(job.map.astype(np.float64) / factor)
    for other in maps[1:]:
        assert np.linalg.norm(other - maps[0]) < 2e-3 * np.linalg.norm(maps[0])


def test_single_precision_follows_double_precision(folder):
    """The map after one mini-batch within 1e-3 (relative L2), log posteriors within 0.05 where p > 1e-3."""
    jobs = []
    for precision in ("single", "double"):
        settings = vk.Settings(**OPTIONS | {"precision": precision})
        jobs.append(vk.Session(folder / "stacks2d" / "optimisation_set.star", settings))
        jobs[-1].step()
    single, double = (j.map.astype(np.float64) for j in jobs)
    assert np.linalg.norm(single - double) < 1e-3 * np.linalg.norm(double)
    for particle in (0, 11):
        a, b = (j.posterior(particle) for j in jobs)
        strong = b.probability > 1e-3
        table = {(*np.round(x, 3), *np.round(o, 2)): p for x, o, p in zip(a.angles, a.offsets, a.probability, strict=True)}
        keys = [(*np.round(x, 3), *np.round(o, 2)) for x, o in zip(b.angles[strong], b.offsets[strong], strict=True)]
        found = np.array([table.get(key, np.nan) for key in keys])
        assert np.isfinite(found).mean() > 0.9
        gap = np.abs(np.log(found) - np.log(b.probability[strong]))
        assert np.nanmax(gap) < 0.05


def test_nothing_computed_is_lost(folder, monkeypatch):
    """States beyond the few that stay in memory come back from disc, bit for bit, and their folder goes with the session."""
    import gc

    from vdamkit import history

    monkeypatch.setattr(history, "KEPT_STATES", 2)
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    states = [job.state]
    for _ in range(5):
        job.step()
        states.append(job.state)
    nodes = job._history.nodes
    assert sum(node.held is not None for node in nodes) == 2
    shelf = nodes[0].path.parent
    assert job.undo(99) == 0 and same(job.state, states[0])
    for number, state in enumerate(states):
        assert job.go_to(number) == number and same(job.state, state)
    branch = job.branch()
    branch.undo(3)
    branch.step()
    assert same(branch.state, states[3])
    del job, branch, nodes
    gc.collect()
    assert not shelf.exists()


def test_sessions_side_by_side_put_their_states_away_under_different_names(job, monkeypatch):
    """A session and its branch share the folder; here both write at the same moment."""
    from vdamkit import history

    job.state  # noqa: B018 - the start
    branch, both, save = job.branch(), threading.Barrier(2, timeout=20), history.save_checkpoint
    monkeypatch.setattr(history, "KEPT_STATES", 1)
    monkeypatch.setattr(history, "save_checkpoint", lambda *a, **k: (both.wait(), save(*a, **k)))
    states = [job.state.replace(iteration=number) for number in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        for session, state in ((job, states[0]), (branch, states[1])):
            pool.submit(session._history.append, state, session.settings, None)
    with ThreadPoolExecutor(2) as pool:
        for session in (job, branch):
            pool.submit(session._history.append, job.state, session.settings, None)
    for session, state in ((job, states[0]), (branch, states[1])):
        node = session._history.nodes[1]
        assert node.held is None and same(node.state, state)


def test_any_node_of_the_table_can_be_gone_to(job):
    """The table's column of parents is one of floats; what is no node changes nothing."""
    job.run(2)
    assert job.go_to(job.history.loc[2, "parent"]) == 1 and job.line() == [0, 1]
    for wrong in (0.5, float("nan"), 3, -1, "1", None):
        with pytest.raises(SettingsError, match="there is no node"):
            job.go_to(wrong)
    assert job.iteration == 1 and job.step().iteration == 2


def test_changing_the_number_of_mini_batches_spreads_the_rest(job):
    """T in force goes on from where it is, and the new end is the end of the schedule."""
    job.run(3)
    before = job.report.T
    job.change(mini_batches=9)
    assert job.step().T == pytest.approx(before, abs=1.2)
    longer = [job.step().T for _ in range(5)]
    assert job.iteration == 9 and longer[-1] == pytest.approx(4, abs=0.01) and np.diff(longer).min() > -1e-9
    assert job.step().T == pytest.approx(4, abs=0.01), "beyond the end the final values hold"


def test_pause_keeps_what_is_done_and_changes_nothing(job):
    """The mini-batch waits within half a second, stands still, and ends as if it had never waited."""
    whole = job.branch()
    whole.step()
    asked, seen = threading.Event(), []
    job.listeners.append(lambda stage, fraction: seen.append(fraction))
    held = hold(job, until=asked.is_set)
    thread = threading.Thread(target=job.step)
    thread.start()
    held.wait(10)
    began = time.perf_counter()
    job.pause()
    asked.set()
    while not job.paused and time.perf_counter() < began + 5:
        time.sleep(0.005)
    assert job.paused and time.perf_counter() - began < 0.5
    ticks = len(seen)
    time.sleep(0.3)
    assert len(seen) == ticks and thread.is_alive() and job.iteration == 0
    job.unpause()
    thread.join(30)
    assert not thread.is_alive() and not job.paused
    assert same(job.state, whole.state)


def test_a_paused_mini_batch_can_be_stopped(job):
    errors, asked = [], threading.Event()
    held = hold(job, until=asked.is_set)

    def step():
        try:
            job.step()
        except Cancelled as stop:
            errors.append(stop)

    thread = threading.Thread(target=step)
    thread.start()
    held.wait(10)
    job.pause()
    asked.set()
    while not job.paused:
        time.sleep(0.005)
    job.cancel()
    thread.join(10)
    assert len(errors) == 1 and job.iteration == 0
    assert job.step().iteration == 1, "the brake is off for the next one"


# several threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def held_start(monkeypatch):
    """A start that waits: the event that says so, and the one that lets it go on."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go_on.wait(20)
        return initial_state(*arguments)

    monkeypatch.setattr(session_module, "initial_state", slow)
    return begun, go_on


def test_a_start_that_another_thread_prepares_is_waited_for(job, held_start):
    """As a panel does it: a mini-batch asked for meanwhile follows it, and the number of classes cannot change any more."""
    begun, go_on = held_start
    with ThreadPoolExecutor(3) as pool:
        start = pool.submit(lambda: job.state)
        assert begun.wait(20)
        step, change = pool.submit(job.step), pool.submit(job.change, classes=3)
        job.change(T=2.0)
        time.sleep(0.1)
        assert not (step.done() or change.done())
        go_on.set()
        with pytest.raises(SettingsError, match="classes is 3 but this run has 1"):
            change.result(20)
        assert step.result(20).iteration == 1 and start.result().iteration == 0
    assert len(job._history) == 2 and job.settings.classes == len(job.state.maps) == 1
    assert [node.settings.T for node in job._history.line()] == [4, 2], "the start bears what it was computed with"


def test_nothing_slips_in_while_a_mini_batch_runs(job):
    """Moves, edits and a second mini-batch are refused; options, branches and saving are not, and act at the next."""
    job.run(2)
    done = threading.Event()
    held = hold(job, until=done.is_set)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(job.step)
        assert held.wait(20)
        acts = (job.step, job.undo, job.redo, lambda: job.go_to(0), job.split_class, lambda: job.drop_class(1),
                lambda: job.merge_classes(1, 2), job.score_all, job.apply_symmetry)  # fmt: skip
        for act in acts:
            with pytest.raises(SettingsError, match="at work in another thread"):
                act()
        job.change(T=2.0)
        branch = job.branch()
        assert branch.undo() == 1 and branch.split_class() == 2
        done.set()
        assert step.result(20).iteration == 3
    assert job.line() == [0, 1, 2, 3] and [report.iteration for report in job.reports()] == [1, 2, 3]
    assert job.settings.T == 2 and job.undo() == 2 and job.split_class() == 2


def test_followers_may_move_on_when_a_mini_batch_has_landed(job):
    job.followers.append(lambda: job.iteration == 1 and len(job.state.maps) == 1 and job.split_class())
    job.step()
    assert len(job.state.maps) == 2 and job.step().iteration == 2
