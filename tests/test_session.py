"""The session's contract: run is n steps, undo and redo, branch, change, cancel, score, judge."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from helpers_vdamkit import OPTIONS, same

import vdamkit as vk
from vdamkit.errors import InputError, SettingsError
from vdamkit.imaging.masks import soft_sphere
from vdamkit.io.particle_files import find_file
from vdamkit.scoring import score_all
from vdamkit.vdam.schedule import draw_batch
from vdamkit.vdam.visit import Cancelled, no_tick


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


@pytest.mark.parametrize(("order", "coarse"), [(0, True), (1, False)])
def test_a_grid_too_coarse_for_the_resolution_is_in_the_verdict(folder, order, coarse):
    """30 degrees move the edge of a 230 Å mask by 60 Å, 15 degrees by 30 Å; the map is said to resolve 53 Å."""
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | {"healpix_order": order}))
    job.run(5)
    assert "too coarse" not in str(job.verdict()), "the job has not ended"
    job.step()
    job._edited(job.state.replace(resolution_shell=6), "planted")
    verdict = job.verdict()
    assert verdict.figures["edge_step"] == pytest.approx(np.radians(30 / 2**order) * 115)
    assert ("too coarse" in str(verdict)) == ("ten more mini-batches" in str(verdict)) == coarse


def test_grids_changed_between_mini_batches_are_used(job):
    """RELION takes --healpix_order, --offset_range and --offset_step on --continue as well."""
    job.step()
    before = job.state
    job.change(healpix_order=2, offset_range=3, offset_step=1, sigma_offset=5)
    assert job.step().healpix_order == 2
    assert (job.state.offset_range, job.state.offset_step) == (3 * job.pixel_size, job.pixel_size)
    assert job.step().healpix_order == 2, "once, not each time"
    job.change(healpix_order=1)
    job.score_all()
    assert job._history.node.in_force.healpix_order == 2, "scoring all particles takes nothing up"
    assert job.step().healpix_order == 1, "nor does it lose what is to be taken up"
    job.undo(4)
    assert job.state is before and job.settings.healpix_order == 1 and job.step().healpix_order == 1
    with pytest.raises(SettingsError, match="noise_particles only matters for the start"):
        job.change(noise_particles=5)


@pytest.mark.parametrize(("iteration", "counted"), [(7, 0), (8, 1), (9, 3)])
def test_mini_batches_without_gain_are_counted_from_the_ninth_on(job, iteration, counted):
    """So that the grid may become finer at the tenth. Source: RELION ml_optimiser.cpp:updateAngularSampling."""
    job.change(auto_sampling=False)
    job._ensure_start()
    no_gain = 2 if iteration == 9 else 0
    job._edited(job.state.replace(iteration=iteration, resolution_shell=10, no_gain=no_gain), "no resolution is better")
    job.step()
    assert job.state.iteration == iteration + 1 and job.state.no_gain == counted


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
    job = vk.Session(copy / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS, batch_initial=24))
    report = job.step()
    assert report.n_particles == 23 and len(job.state.bad_particles) == 1
    assert files[0].name in report.bad[0]
    job.step()
    for file in files[1:5]:
        file.write_bytes(b"")
    broken = vk.Session(copy / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS, batch_initial=24))
    with pytest.raises(InputError, match="more than 10 %"):
        broken.step()


def with_one_empty_file(folder, tmp_path, **options) -> tuple[vk.Session, int]:
    """A job one of whose files is empty, and the particle's number: the first that is drawn."""
    shutil.copytree(folder, tmp_path / "copy")
    job = vk.Session(tmp_path / "copy" / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | options))
    drawn = int(draw_batch(1, options["batch_initial"], 24, job.settings)[0])
    find_file(job.particles, drawn, "rlnImageName").write_bytes(b"")
    return job, drawn


def test_one_bad_particle_of_a_small_mini_batch_is_left_out(folder, tmp_path):
    """One of 24 is below the limit, however few particles are drawn, or scored together."""
    job, drawn = with_one_empty_file(folder, tmp_path, batch_initial=8, batch_final=8, chunk_particles=1)
    reports = [job.step() for _ in range(2)]
    assert [len(report.bad) for report in reports] == [1, 0], "told once, then never drawn"
    assert job.state.bad_particles == (drawn,) and reports[0].n_particles == 7 and np.isfinite(job.map).all()


def test_a_mini_batch_without_a_usable_particle_is_one_sentence(folder, tmp_path):
    job, drawn = with_one_empty_file(folder, tmp_path, batch_initial=1)
    before = job.state
    with pytest.raises(InputError, match=r"no particle of this mini-batch can be used .*truncated.*larger"):
        job.step()
    assert job.state is before
    others = tuple(i for i in range(24) if i != drawn)
    scored = score_all(before.replace(bad_particles=others), job.settings, job._source, job._backend, no_tick)
    assert scored.bad_particles == tuple(range(24)), "nor has scoring anything to do"


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
        assert job.state is job.state, "read once, then held again, and another put away"
        assert sum(node.held is not None for node in nodes) == 2
    branch = job.branch()
    branch.undo(3)
    branch.step()
    assert same(branch.state, states[3])
    del job, branch, nodes
    gc.collect()
    assert not shelf.exists()


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


@pytest.mark.parametrize(
    ("turned", "said"), [(1, None), (3, "a faint upside-down ghost may be"), (6, "an upside-down ghost is")]
)
def test_particles_on_their_heads_are_in_the_verdict(job, turned, said):
    job.step()
    angles = np.tile([0.0, 90.0, 0.0], (24, 1))
    angles[:turned, 2] = 180
    poses = job.state.poses.updated(np.arange(24), angles=angles, class_number=np.ones(24, int))
    job._edited(job.state.replace(poses=poses), "planted")
    verdict = job.verdict()
    assert verdict.figures["upside_down"] == pytest.approx(turned / 24)
    text = str(verdict)
    assert (said is None and "ghost" not in text) or (said in text and "--sigma-psi" in text)
    assert turned < 6 or not verdict.good


def test_without_a_particle_of_half_0_a_map_stays(folder):
    """Source: RELION ml_optimiser.cpp:maximization."""
    settings = vk.Settings(**OPTIONS | {"batch_initial": 1})
    odd = (s for s in range(99) if draw_batch(1, 1, 24, settings.replace(seed=s))[0] % 2)
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", settings.replace(seed=next(odd)))
    before = job.state.maps
    job.step()
    assert (job.state.poses.last_visit == 1).sum() == 1
    np.testing.assert_array_equal(job.state.maps, before)


def test_a_symmetry_asked_for_while_another_is_taken_up_waits_for_the_next_mini_batch(folder):
    coarse = {"healpix_order": 0, "offset_range": 2.0, "batch_initial": 8, "tilt_prior_width": None, "symmetry": "C1"}
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | coarse))
    job.step()
    job.change(symmetry="C6")
    ask = lambda stage, fraction: job.change(symmetry="C4")  # noqa: E731 - as a cell may meanwhile
    job.listeners.append(ask)
    job.step()
    job.listeners.remove(ask)
    assert [node.settings.symmetry for node in job._history.line()] == ["C1", "C1", "C6"]
    job.step()
    assert [node.settings.symmetry for node in job._history.line()] == ["C1", "C1", "C6", "C4"]
