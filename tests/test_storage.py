"""A session on disc: what resumes is what was saved, on the run's own particles, and nobody else's files are written over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers_vdamkit import OPTIONS, same

import vdamkit as vk
from vdamkit import storage
from vdamkit.errors import InputError, OutputError, SettingsError
from vdamkit.io.checkpoint import load_checkpoint, save_checkpoint
from vdamkit.io.star_tables import as_list, read_star, write_star


def test_resume_goes_on_bit_for_bit(job, tmp_path):
    job.run(2)
    job.save(tmp_path / "job", final=False)
    job.run(2)
    again = vk.Session.resume(tmp_path / "job")
    assert again.iteration == 2 and len(again.reports()) == 2
    again.run(2)
    assert same(job.state, again.state)


def test_a_resumed_run_has_the_reports_of_before_once_and_with_its_classes(folder, tmp_path):
    """Also where classes were split, which is a line of the log without a mini-batch of its own."""
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS), output=tmp_path / "job")
    job.run(2)
    job.split_class()
    job.run(2)
    again = vk.Session.resume(tmp_path / "job")
    before = [(report.iteration, report.class_populations) for report in job.reports()]
    assert [(report.iteration, report.class_populations) for report in again.reports()] == before
    assert [len(populations) for _, populations in before] == [1, 1, 2, 2]
    again.step()
    assert [report.iteration for report in vk.Session.resume(tmp_path / "job").reports()] == [1, 2, 3, 4, 5]


def test_files_name_the_settings_that_the_state_was_made_with(job, tmp_path):
    job.step()
    job.change(mask_diameter=200.0)
    job.save(tmp_path / "job")
    blocks = read_star(tmp_path / "job" / "run_it001_optimiser.star")
    assert float(as_list(next(iter(blocks.values())))["rlnParticleDiameter"]) == 230
    assert vk.Session.resume(tmp_path / "job").settings.mask_diameter == 200, "which is still to come"


def test_what_is_saved_while_a_mini_batch_lands_is_of_one_state(job, tmp_path, monkeypatch):
    job.step()
    write = storage.write_relion_files
    monkeypatch.setattr(storage, "write_relion_files", lambda *a, **k: (job.step(), write(*a, **k))[1])
    job.save(tmp_path / "job")
    assert job.iteration == 2 and (tmp_path / "job" / "run_it001_model.star").exists()
    assert vk.Session.resume(tmp_path / "job").iteration == 1


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
    straight = job.branch()
    straight.step(), again.step()
    assert same(straight.state, again.state)


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
    assert [node.settings.symmetry for node in again._history.line()] == ["C1", "C6"]
    assert "axes" in again.history["note"].iloc[0], "the maps were turned first"


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
    star, out = folder / "stacks2d" / "optimisation_set.star", folder / "job"
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
    with pytest.raises(OutputError, match="is an input of this run"):
        vk.Session(out / "run_optimisation_set.star", vk.Settings(**OPTIONS)).save(out, overwrite=True)
    new = vk.Session(star, vk.Settings(**OPTIONS), output=out, overwrite=True)
    assert vk.Session.resume(out).iteration == 2 and (out / "initial_model.mrc").exists(), "until something replaces it"
    assert new.state and vk.Session.resume(out).iteration == 0 and not (out / "initial_model.mrc").exists()


def test_two_live_sessions_do_not_write_by_turns(folder, tmp_path):
    first = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS), output=tmp_path / "job")
    first.run(2)
    second = vk.Session.resume(tmp_path / "job")
    second.step()
    with pytest.raises(OutputError, match=r"another session has written .* \(mini-batch 3\)"):
        first.step()
    assert first.iteration == 3, "what was computed stays"
    assert load_checkpoint(tmp_path / "job" / "checkpoint.npz")[0].iteration == 3
    second.step()
    first.save(tmp_path / "mine")
    first.save(overwrite=True)
    first.step()
    with pytest.raises(OutputError, match="another session has written"):
        second.step()


def test_a_save_while_mini_batches_land_takes_its_turn(job, tmp_path, monkeypatch):
    """Its own writes are not another session's, whichever thread wrote last."""

    def slowly(*args, **options):
        save_checkpoint(*args, **options)
        time.sleep(0.1)

    monkeypatch.setattr("vdamkit.storage.save_checkpoint", slowly)
    job.output = tmp_path / "job"
    job.step()
    done = threading.Event()

    def keep_saving():
        while not done.is_set():
            job.save(final=False)

    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(keep_saving)
        try:
            job.run(3)
        finally:
            done.set()
        saving.result()
    assert vk.Session.resume(tmp_path / "job").iteration == 4


def test_a_folder_needs_a_name(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="no name"):
        job.save("")
    assert not list(tmp_path.iterdir())
