"""Several classes: told apart, split, merged, dropped; each edit a node of the history."""

import numpy as np
import pytest

import vdamkit as vk
from vdamkit.classes import within_group
from vdamkit.compare import Match
from vdamkit.io.star_tables import as_table, find_block, read_star
from vdamkit.simulate import simulate


def kinds_of(folder):
    path = folder / "particles_true_poses.star"
    return as_table(find_block(read_star(path), "particles", path))["rlnClassNumber"].to_numpy(int)


@pytest.fixture(scope="module")
def junk(tmp_path_factory):
    """Sixty places on spheres, three of ten empty, and a run with two classes."""
    folder = tmp_path_factory.mktemp("junk")
    simulate(folder, particles=60, volumes=0, box=24, pixel_size=14.0, tilts=13, variance_ratio=0.5, junk=0.3, seed=5,
             lattice_spacing=200.0)  # fmt: skip
    settings = vk.Settings(mini_batches=24, symmetry="C6", tilt_prior_width=10.0, mask_diameter=200.0, classes=2, threads=2)
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", settings, output=folder / "job")
    job.run()
    return folder, job


def test_the_simulation_knows_what_is_where(junk):
    kinds = kinds_of(junk[0])
    assert np.bincount(kinds).tolist() == [18, 42]


def test_two_models_share_the_particles(tmp_path):
    paths = simulate(tmp_path, particles=20, volumes=0, box=16, pixel_size=20.0, tilts=5, poses="random", tomograms=1,
                     model="asymmetric", second_model="hexamer", second_share=0.3)  # fmt: skip
    assert np.bincount(kinds_of(tmp_path)).tolist() == [0, 14, 6]
    assert paths["second_model"].exists()


def test_junk_sinks_into_a_class_of_its_own(junk):
    folder, job = junk
    kinds, found = kinds_of(folder), job.state.poses.class_number
    good = np.bincount(found[kinds == 1], minlength=3)[1:].argmax() + 1
    assert np.mean(found[kinds == 1] == good) >= 0.9
    assert np.mean(found[kinds == 0] != good) >= 0.8
    assert job.state.class_probability[good - 1] > 0.6


def test_the_star_says_how_sure_a_class_is(junk):
    folder, job = junk
    share = read_star(folder / "job" / "run_it024_data.star")["particles"]["vdamkitClassProbability"].to_numpy(float)
    assert ((share >= 0.5 - 1e-6) & (share <= 1 + 1e-6)).mean() > 0.9  # the class of the best pose nearly always leads
    np.testing.assert_allclose(share, job.state.poses.class_share, atol=1e-5)
    assert (share >= job.state.poses.pmax - 1e-5).all()


def test_every_class_starts_with_power(junk):
    start = junk[1]._history.nodes[0].state
    assert len(start.maps) == 2 and all(np.ptp(volume) > 0 for volume in start.maps)
    assert np.corrcoef(start.maps[0].ravel(), start.maps[1].ravel())[0, 1] < 0.99


def test_a_class_is_split_and_undo_takes_it_back(junk):
    job = junk[1].branch()
    before = job.state
    largest = int(np.argmax(before.class_probability)) + 1
    new = job.split_class()
    assert new == 3 and job.settings.classes == 3 and len(job.maps) == 3
    state = job.state
    np.testing.assert_allclose(state.class_probability.sum(), 1)
    assert state.class_probability[largest - 1] == state.class_probability[2] == before.class_probability[largest - 1] / 2
    mean = 0.5 * (state.maps[largest - 1] + state.maps[2])
    assert not np.array_equal(state.maps[2], state.maps[largest - 1])
    assert np.corrcoef(mean.ravel(), before.maps[largest - 1].ravel())[0, 1] > 0.9
    report = job.step()
    assert len(report.class_populations) == 3 and np.isfinite(job.maps).all()
    job.undo(2)
    assert job.settings.classes == 2
    np.testing.assert_array_equal(job.state.maps, before.maps)


def test_split_halves_merge_again(junk):
    job = junk[1].branch()
    largest = int(np.argmax(job.state.class_probability)) + 1
    before = job.state
    new = job.split_class(largest)
    job.merge_classes(new, largest)
    assert len(job.maps) == 2 and job.settings.classes == 2
    np.testing.assert_allclose(job.state.class_probability, before.class_probability)
    np.testing.assert_array_equal(job.state.poses.class_number, before.poses.class_number)


def test_particles_of_a_merged_class_keep_fitting(junk):
    """Both classes the same map, one of them turned about its axis: merging lays its particles onto the other."""
    from vdamkit.compare import moved

    job = junk[1].branch()
    k = int(np.argmax(job.state.class_probability))
    turn = np.array([[np.cos(0.4), -np.sin(0.4), 0], [np.sin(0.4), np.cos(0.4), 0], [0, 0, 1.0]])
    state = job.state
    maps = state.maps.copy()
    maps[1 - k] = moved(state.maps[k], turn, np.array([0, 0, 0.7]))
    job._history.append(state.replace(maps=maps), job.settings, job.report)
    there = np.flatnonzero(state.poses.class_number == 2 - k)
    job.merge_classes(2 - k, k + 1)
    poses = job.state.poses
    assert (poses.class_number[state.poses.class_number > 0] == 1).all()
    rot = np.abs(poses.angles[there, 0] - state.poses.angles[there, 0]) % 60
    assert np.allclose(np.minimum(rot, 60 - rot), np.degrees(0.4), atol=3)
    moved_by = np.linalg.norm(poses.offsets[there] - state.poses.offsets[there], axis=1)
    np.testing.assert_allclose(moved_by, 0.7 * job.pixel_size, atol=0.3 * job.pixel_size)


def test_a_class_is_dropped(junk):
    job = junk[1].branch()
    small = int(np.argmin(job.state.class_probability)) + 1
    gone = np.flatnonzero(job.state.poses.class_number == small)
    job.drop_class(small)
    assert job.settings.classes == 1 and job.state.class_probability.tolist() == [1.0]
    assert (job.state.poses.class_number[gone] == 0).all() and (job.state.poses.last_visit[gone] == 0).all()
    rest = np.setdiff1d(np.arange(60), gone)
    assert (job.state.poses.class_number[rest] == 1).all()
    assert np.isfinite(job.step().pmax)


def test_edits_that_cannot_be(junk, tmp_path):
    job = junk[1].branch()
    for k in (0, 3, "1"):
        with pytest.raises(vk.SettingsError, match="there is no class"):
            job.drop_class(k)
    with pytest.raises(vk.SettingsError, match="itself"):
        job.merge_classes(1, 1)
    empty = job.branch()
    empty._history.append(job.state.replace(maps=job.state.maps * [[[[1]]], [[[0]]]]), job.settings, job.report)
    with pytest.raises(vk.SettingsError, match=r"class 2 is empty.*drop_class\(2\)"):
        empty.merge_classes(2, 1)
    with pytest.raises(vk.SettingsError, match="split_class"):
        job.change(classes=3)
    one = job.restart(classes=1)
    with pytest.raises(vk.SettingsError, match="only one"):
        one.drop_class(1)
    with pytest.raises(vk.SettingsError, match="no mini-batch"):
        one.split_class()


def test_what_was_split_is_resumed(junk, tmp_path):
    job = junk[1].branch()
    job.split_class()
    job.save(tmp_path)
    again = vk.Session.resume(tmp_path)
    assert again.settings.classes == 3
    np.testing.assert_array_equal(again.state.maps, job.state.maps)
    assert again.step().class_populations == job.step().class_populations


@pytest.mark.parametrize("group", ["C1", "C4", "D2"])
def test_a_motion_within_a_group_leaves_its_axes(group):
    from vdamkit.sampling.euler import euler_to_matrix
    from vdamkit.sampling.point_groups import operators

    match = Match(np.zeros((2, 2, 2)), euler_to_matrix([20.0, 5.0, 30.0]), np.array([1.0, 2, 3]), 1, np.ones(2), 1.0, 1.0)
    moved = within_group(match, group)
    turned = moved.rotation @ operators(group) @ moved.rotation.T
    for operator in turned:
        assert np.abs(operators(group) - operator).max((1, 2)).min() < 1e-9
        if group != "C1":
            np.testing.assert_allclose(operator @ moved.shift, moved.shift, atol=1e-9)
