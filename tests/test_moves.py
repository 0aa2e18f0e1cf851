"""Moves in the history and interruptions: what was computed, and what was asked for, stays."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers_vdamkit import OPTIONS

import vdamkit as vk
from vdamkit.compare import resample
from vdamkit.errors import InputError, OutputError
from vdamkit.history import KEPT_STATES
from vdamkit.vdam.visit import Cancelled


def test_a_mini_batch_that_is_stopped_leaves_the_map_as_it_was(folder):
    """Also the first one in another symmetry, for which the maps are turned."""
    coarse = {"healpix_order": 0, "offset_range": 2.0, "batch_initial": 8, "tilt_prior_width": None, "symmetry": "C1"}
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | coarse))
    job.run(2)
    before, stop = job.state, lambda stage, fraction: job.cancel()
    job.change(symmetry="C6")
    job.listeners.append(stop)
    with pytest.raises(Cancelled):
        job.step()
    job.listeners.remove(stop)
    assert job.state is before and len(job._history) == 3 and "axes" not in job._history.node.note
    job.step()
    assert "axes" in job._history.nodes[2].note
    assert job.undo() == 2 and job.state is before, "one step back is the map in the other symmetry"


def test_a_move_that_leads_nowhere_keeps_what_was_asked_for(folder):
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    job.run(1)
    job.change(T=1.5)
    job.redo()
    job.undo(0)
    job.go_to(1)
    assert job.settings.T == 1.5
    job.undo()
    assert job.settings.T == vk.Settings().T and job.iteration == 0
    job.change(T=2.5)
    job.undo()
    assert job.settings.T == 2.5, "at the start already"


def test_a_state_whose_file_is_gone_leaves_the_session_where_it_is(folder):
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    job.run(1)
    for _ in range(KEPT_STATES):
        job._history.append(job.state, job.settings, job.report)
    shutil.rmtree(job._history._shelf._folder)
    before = job.state
    for move in (lambda: job.go_to(0), lambda: job.undo(KEPT_STATES + 1)):
        with pytest.raises(InputError, match="mini-batch 0 was put away"):
            move()
        assert job.state is before and job.iteration == 1 and not job._history.can_redo
    job.step()


def test_scores_count_in_the_symmetry_that_the_maps_have(folder):
    """Not in one that is still to be taken up, whose poses would be a part of the sphere."""
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | {"symmetry": "C1"}))
    job.run(2)
    other = job.branch(symmetry="O")
    np.testing.assert_array_equal(job.posterior(0).angles, other.posterior(0).angles)
    np.testing.assert_array_equal(job.score_all(), other.score_all())
    assert other.settings.symmetry == "O" and other._history.node.in_force.symmetry == "C1"


def test_a_mini_batch_whose_files_cannot_be_written_stays(folder, tmp_path, monkeypatch):
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS), output=tmp_path / "job")
    job.run(1)

    def full(*_, **__):
        raise OutputError("checkpoint.npz: could not be written (No space left on device).")

    monkeypatch.setattr("vdamkit.storage.save_checkpoint", full)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        job.step()
    monkeypatch.undo()
    assert caught.value.__notes__ == ["Mini-batch 2 itself is done and in memory; save() writes it."]
    assert job.iteration == 2 == job.report.iteration
    job.save()
    assert vk.Session.resume(tmp_path / "job").iteration == 2


def test_a_relative_output_folder_lies_where_the_session_was_made(folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS), output="job")
    job.run(1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    job.step()
    job.save()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert vk.Session.resume(tmp_path / "job").iteration == 2


def test_a_final_model_that_is_missing_is_written_when_the_run_goes_on(folder, tmp_path, monkeypatch):
    """As after a full disc, or a process that was ended between the checkpoint and the files."""
    stack, out = folder / "stacks2d" / "optimisation_set.star", tmp_path / "job"
    job = vk.Session(stack, vk.Settings(**OPTIONS | {"mini_batches": 2}), output=out)
    job.step()
    monkeypatch.setattr("vdamkit.storage.write_relion_files", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.run()
    monkeypatch.undo()
    assert not (out / "initial_model.mrc").exists()
    other = vk.Session.resume(out)
    other.run()
    written = out / "run_optimisation_set.star"
    assert other.iteration == 2 and (out / "initial_model.mrc").exists() and written.exists()
    before = written.stat().st_mtime_ns
    vk.Session.resume(out).run()
    assert written.stat().st_mtime_ns == before, "once"
    vk.Session.resume(out, mini_batches=3).run()
    assert "run_it003_data.star" in written.read_text()


def test_a_command_keeps_no_old_states_on_disc(folder):
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    job._history.forget_old_states()
    job.run(1)
    for _ in range(KEPT_STATES):
        job._history.append(job.state, job.settings, job.report)
    assert len(job.history) == KEPT_STATES + 2 and job._history.nodes[0].path is None
    with pytest.raises(InputError, match="not kept"):
        job.go_to(0)
    job.step()


def test_another_seed_may_have_another_box_and_pixel_size(folder, tmp_path):
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    job.step()
    other = job.branch()
    wide, px = 40, job.pixel_size / 2
    maps = resample(job.state.maps[0], job.pixel_size, px, wide)[None].astype(np.float32)
    other.particles = replace(other.particles, box=wide, pixel_size=px)
    other._history.append(other.state.replace(maps=maps), other.settings, other.report)
    assert job.verdict(other).figures["second_seed_resolution"] == job.verdict(job.branch()).figures["second_seed_resolution"]


def test_a_current_folder_that_was_removed_stops_nobody(folder, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS), output=tmp_path / "job")
    job.run(1)
    assert vk.Session.resume(tmp_path / "job").iteration == 1
