"""What moves with a map: poses, moments; and the job that applies symmetry later."""

import numpy as np
import pytest
from click.testing import CliRunner
from helpers_vdamkit import reconstruct
from scipy.spatial.transform import Rotation

import vdamkit as vk
from vdamkit.cli import cli
from vdamkit.compare import align, moved
from vdamkit.imaging.fsc import fsc, low_pass
from vdamkit.imaging.halfball import fourier_to_map, map_to_fourier
from vdamkit.imaging.masks import soft_sphere
from vdamkit.io.mrc import read_map, write_mrc
from vdamkit.io.star_tables import read_star
from vdamkit.sampling.euler import euler_to_matrix, rotation_angle
from vdamkit.sampling.point_groups import operators
from vdamkit.simulate import simulate
from vdamkit.symmetry import SymmetryMatch, moved_angles_and_offsets, moved_state
from vdamkit.symmetry.apply import _turned_weights
from vdamkit.symmetry.of_session import taken_up


def a_match(group="C6", seed=0, size=20.0) -> SymmetryMatch:
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(random_state=int(rng.integers(1000))).as_matrix()
    return SymmetryMatch(group, rotation, rng.normal(size=3) * size, np.ones(17), 1.0, 10.0)


def test_a_point_of_the_particle_stays_where_it_is_in_the_tomogram():
    rng, match = np.random.default_rng(3), a_match()
    angles, offsets = rng.uniform(-90, 90, (9, 3)), rng.normal(size=(9, 3)) * 10
    new_angles, new_offsets = moved_angles_and_offsets(angles, offsets, match)
    x = rng.normal(size=3) * 40
    before = euler_to_matrix(angles) @ x - offsets
    after = euler_to_matrix(new_angles) @ (match.rotation @ x + match.shift) - new_offsets
    np.testing.assert_allclose(after, before, atol=1e-9)


def test_weights_turn_as_the_power_of_a_map_does():
    small = soft_sphere(32, 4.0, edge=3.0)  # a small particle has a smooth power spectrum
    volume = low_pass(np.random.default_rng(0).normal(size=(32,) * 3), 7) * small
    turn = Rotation.from_rotvec([0.4, -0.3, 0.9]).as_matrix()
    expected = np.abs(map_to_fourier(moved(volume, turn, np.zeros(3)))) ** 2
    found = _turned_weights(np.abs(map_to_fourier(volume)) ** 2, turn[None])
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98
    kept = _turned_weights(expected, np.eye(3)[None])
    np.testing.assert_allclose(kept[..., :-1], expected[..., :-1], rtol=1e-6, atol=1e-6 * expected.max())


@pytest.fixture(scope="module")
def c1_job(tmp_path_factory):
    """A hexamer's run in C1 with symmetry for later, a dozen mini-batches."""
    folder = tmp_path_factory.mktemp("c1")
    simulate(folder, particles=40, volumes=0, box=24, pixel_size=14.0, tilts=13, variance_ratio=1.0, seed=5)
    settings = vk.Settings(
        mini_batches=10, symmetry="C6", run_in_c1=True, tilt_prior_width=10.0, psi_prior_width=15.0, mask_diameter=230.0,
        threads=2, batch_initial=40,
    )  # fmt: skip
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", settings, output=folder / "job")
    job.run()
    return folder, job


def agreement(session, truth, volume=None):
    match = align(session.map if volume is None else volume, truth, session.pixel_size, radius=100)
    return match.mean_fsc


def test_symmetry_applied_is_a_node_and_the_run_goes_on(c1_job):
    folder, first = c1_job
    job, (truth, _) = first.branch(), read_map(folder / "true_map.mrc")
    before = agreement(job, truth)
    (match,) = job.apply_symmetry()
    assert [report.iteration for report in job.reports()] == list(range(1, 11)), "no mini-batch is told twice"
    assert match.correlation > 0.4 and job.settings.symmetry == "C6" and not job.settings.run_in_c1
    assert job.iteration == 10 and "symmetry applied" in job.history["note"].iloc[-1]
    turn = Rotation.from_euler("z", 60, degrees=True).as_matrix()
    scale = np.abs(job.map).max()
    assert np.abs(moved(job.map, turn, np.zeros(3)) - job.map)[4:-4, 4:-4, 4:-4].max() < 0.05 * scale
    after = agreement(job, truth)
    assert after > before
    job.step()  # moments, poses and map fit each other: the next mini-batch does not have to begin anew
    assert agreement(job, truth) > after - 0.03 and job.report.pmax > 0.5 * first.report.pmax
    job.undo(2)
    np.testing.assert_array_equal(job.map, first.map)
    assert job.settings.symmetry == "C6" and job.settings.run_in_c1


def test_poses_found_in_c1_fit_the_moved_map(c1_job):
    """Particles scored again against the moved map hardly move from where their moved poses are."""
    _, first = c1_job
    job = first.branch()
    job.apply_symmetry("C6")
    moved_poses = job.state.poses
    job.score_all()
    one, other = (euler_to_matrix(poses.angles) for poses in (job.state.poses, moved_poses))
    turned = np.min([rotation_angle(one, other @ operator) for operator in operators("C6")], axis=0)
    away = np.linalg.norm(job.state.poses.offsets - moved_poses.offsets, axis=1)
    assert np.median(turned) < 12 and np.median(away) < 14  # the grid's step is 15°, and none of its shifts is 0


def test_a_run_in_c1_ends_with_the_symmetric_model_and_its_particles(c1_job):
    folder, job = c1_job
    model, _ = read_map(folder / "job" / "initial_model.mrc")
    raw, _ = read_map(folder / "job" / "run_it010_class001.mrc")
    truth, _ = read_map(folder / "true_map.mrc")
    assert agreement(job, truth, model) > agreement(job, truth, raw)
    entries = read_star(folder / "job" / "run_optimisation_set.star")
    names = str(next(iter(entries.values()))["rlnTomoParticlesFile"])
    assert names.endswith("initial_model_data.star")
    table = read_star(folder / "job" / "initial_model_data.star")["particles"]
    old = read_star(folder / "job" / "run_it010_data.star")["particles"]
    assert len(table) == len(old) and not np.allclose(table["rlnAngleRot"], old["rlnAngleRot"])


def test_a_reconstruction_from_the_moved_particles_is_the_symmetric_map(c1_job):
    """It agrees with the map at least as well as one from the poses before agrees with the map before."""
    folder, first = c1_job
    star = folder / "stacks2d" / "optimisation_set.star"
    free = vk.Session(star, first.settings.replace(tilt_prior_width=None, psi_prior_width=None))  # any frame will do
    free.run()

    def fit(poses, volume: np.ndarray, symmetry: str) -> float:
        made = reconstruct(star, poses.angles, poses.offsets, symmetry)
        return fsc(made, volume, soft_sphere(24, 100 / 14.0, 3))[1:9].mean()

    before, raw = free.state.poses, free.map
    (match,) = free.apply_symmetry()
    assert 10 < np.degrees(np.linalg.norm(Rotation.from_matrix(match.rotation).as_rotvec()))
    after = fit(free.state.poses, free.map, "C6")
    assert after > 0.85 and after >= fit(before, raw, "C1")
    assert after > fit(before, free.map, "C6") + 0.3, "poses that were not moved do not fit"


def test_without_a_group_there_is_nothing_to_apply(c1_job):
    job = c1_job[1].branch(symmetry="C1", run_in_c1=False)
    with pytest.raises(vk.VdamkitError, match="C1"):
        job.apply_symmetry()


def test_every_class_moves_onto_its_own_axes_with_its_own_particles(c1_job):
    job = c1_job[1]
    state = job.state
    two = state.replace(
        maps=np.repeat(state.maps, 2, 0), moment1=np.repeat(state.moment1, 2, 0), moment2=np.repeat(state.moment2, 2, 0),
        class_probability=np.array([0.5, 0.5]),
        poses=state.poses.updated(np.arange(0, 40, 2), class_number=np.full(20, 2)),
    )  # fmt: skip
    matches = [a_match(seed=1), a_match(seed=2)]
    new = moved_state(two, matches, job.pixel_size)
    for k, match in enumerate(matches):
        mine = two.poses.class_number == k + 1
        angles, offsets = moved_angles_and_offsets(two.poses.angles[mine], two.poses.offsets[mine], match)
        np.testing.assert_allclose(euler_to_matrix(new.poses.angles[mine]), euler_to_matrix(angles), atol=1e-6)
        np.testing.assert_allclose(new.poses.offsets[mine], offsets)
    assert np.abs(new.maps[0] - new.maps[1]).max() > 0.1 * np.abs(new.maps[0]).max()
    gradient = fourier_to_map(new.moment1[0, 0])
    assert np.isfinite(gradient).all() and np.isfinite(new.moment2).all() and (new.moment2 >= 0).all()


# command line -------------------------------------------------------------------------------------------------------


def call(*arguments):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_turns_map_and_particles(c1_job, tmp_path):
    folder, job = c1_job
    data = folder / "job" / "run_it010_data.star"
    code, out, err = call(
        "align-symmetry", "--i", folder / "job" / "run_it010_class001.mrc", "--sym", "C6", "--apply", "--o",
        tmp_path / "new" / "model.mrc", "--particles", data, "--radius", 115,
    )  # fmt: skip
    assert code == 0, err
    assert "C6: the map agrees" in out and str(tmp_path / "new" / "model_data.star") in out
    truth, _ = read_map(folder / "true_map.mrc")
    model, pixel = read_map(tmp_path / "new" / "model.mrc")
    assert pixel == pytest.approx(job.pixel_size) and agreement(job, truth, model) > agreement(job, truth)
    assert list(read_star(tmp_path / "new" / "model_data.star")) == list(read_star(data))


def test_mistakes_of_the_command_are_one_sentence(tmp_path):
    write_mrc(tmp_path / "flat.mrc", np.zeros((8, 8, 8), np.float32), 1.0)
    write_mrc(tmp_path / "map.mrc", np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32), 1.0)
    (tmp_path / "bare.star").write_text("data_particles\nloop_\n_rlnTomoName\nTS_01\n")
    (tmp_path / "file").write_text("")
    write_mrc(tmp_path / "slab.mrc", np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32), 1.0)
    write_mrc(tmp_path / "bare.mrc", np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32), 0.0)
    out = ("--o", tmp_path / "out.mrc")
    for arguments, words in (
        (("--i", tmp_path / "flat.mrc", "--sym", "C2", *out), "holds nothing"),
        (("--i", tmp_path / "missing.mrc", "--sym", "C2", *out), "missing.mrc"),
        (("--i", tmp_path / "map.mrc", "--sym", "C2x", *out), "not a point group"),
        (("--i", tmp_path / "map.mrc", "--sym", "C2", *out, "--particles", tmp_path / "bare.star"), "rlnAngleRot"),
        (("--i", tmp_path / "map.mrc", "--sym", "C2", "--o", tmp_path / "file" / "out.mrc"), "choose another"),
        (("--i", tmp_path / "slab.mrc", "--sym", "C2", *out), "8 x 8 x 6 voxels (x, y, z), not a cube"),
        (("--i", tmp_path / "bare.mrc", "--sym", "C2", *out), "no pixel size"),
        (("--i", tmp_path / "map.mrc", "--sym", "C2", *out, "--radius", "nan"), "--radius is nan"),
        (("--i", tmp_path / "map.mrc", "--sym", "C2", *out, "--radius", "-5"), "--radius is -5"),
        (("--i", tmp_path / "map.mrc", "--sym", "C2", *out, "--radius", "1"), "at least 2 px"),
        (("--i", tmp_path / "map.mrc", "--sym", "C2", "--o", tmp_path / "slab.mrc"), "slab.mrc exists already"),
        (("--i", tmp_path / "map.mrc", "--sym", "C2", "--o", tmp_path / "map.mrc", "--overwrite"), "is an input"),
        (("--i", tmp_path / "map.mrc", "--sym", "Q", *out), "--sym is 'Q'"),
    ):
        code, _, err = call("align-symmetry", *arguments)
        assert code == 2 and words in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "out.mrc").exists()
    for arguments, words in (
        (("--i", tmp_path / "bare.mrc"), "no pixel size"),
        (("--i", tmp_path / "map.mrc", "--resolution", "0"), "--resolution is 0"),
    ):
        code, _, err = call("symmetry-scores", *arguments)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def notes(job):
    return job.history.loc[job.line(), "note"].tolist()


def test_from_c1_to_c6_the_map_is_turned_onto_its_axes_first(c1_job):
    folder, first = c1_job
    job, (truth, _) = first.branch(run_in_c1=False), read_map(folder / "true_map.mrc")
    before = agreement(job, truth)
    nodes = len(job.line())
    job.step()
    assert len(job.line()) == nodes + 1 and "turned onto the axes of C6" in notes(job)[-2]
    assert [report.iteration for report in job.reports()] == list(range(1, 12))
    assert agreement(job, truth) > before - 0.02 and job.report.pmax > 0.5 * first.report.pmax
    job.undo()
    np.testing.assert_array_equal(job.map, first.map)


@pytest.mark.parametrize("smaller", ["C3", "C1"])
def test_a_smaller_symmetry_needs_no_turn(c1_job, smaller):
    job = c1_job[1].branch()
    job.apply_symmetry("C6")
    before, nodes = job.map, len(job.line())
    job.change(symmetry=smaller)
    job.step()
    assert len(job.line()) == nodes + 1
    assert np.corrcoef(before.ravel(), job.map.ravel())[0, 1] > 0.9


def test_a_group_whose_axes_are_not_there_is_imposed_where_the_frame_has_them(c1_job):
    job = c1_job[1].branch()
    job.apply_symmetry("C6")
    before, nodes = job.state.poses, len(job.line())
    job.change(symmetry="C5")
    made, _ = taken_up(job, job.settings)
    job.step()
    assert len(job.line()) == nodes + 1 and "C5 about the axes of the frame" in notes(job)[-2]
    np.testing.assert_allclose(made.poses.angles, before.angles, rtol=1e-12)
    turn = Rotation.from_euler("z", 72, degrees=True).as_matrix()
    away = np.abs(moved(made.maps[0], turn, np.zeros(3)) - made.maps[0])[4:-4, 4:-4, 4:-4]
    assert away.max() < 0.05 * np.abs(made.maps[0]).max()


def test_the_start_is_not_turned(c1_job):
    job = c1_job[1].branch()
    job.go_to(0)
    job.change(symmetry="C6", run_in_c1=False)
    job.step()
    assert len(job.line()) == 2


def test_which_groups_are_part_of_others():
    from vdamkit.symmetry.of_session import _is_part

    assert _is_part("C3", "C6") and _is_part("D2", "O") and _is_part("C1", "I1") and _is_part("C7", "D7")
    assert not _is_part("C6", "C3") and not _is_part("C5", "I2") and not _is_part("O", "T")


def test_axes_that_the_prior_does_not_admit_are_said():
    from vdamkit.symmetry.of_session import _clash

    settings = vk.Settings(tilt_prior_width=10)
    match = a_match()
    turned = [Rotation.from_euler("y", angle, degrees=True).as_matrix() for angle in (15, 30, 170)]
    said = [_clash(settings, SymmetryMatch("C6", turn, match.shift, match.fsc, 1.0, 10.0)) for turn in turned]
    assert said[0] == said[2] == "" and "30°" in said[1]
    assert _clash(vk.Settings(), match) == ""


def test_a_doubtful_symmetry_is_said(c1_job):
    job = c1_job[1]
    assert job.align_symmetry("C6")[0].warning == ""
    assert "Beware" in str(job.align_symmetry("C5")[0])


def test_the_largest_class_of_a_model_is_aligned(c1_job, tmp_path):
    """`--i run_itNNN_model.star --select-largest-class`: only particles of that class move."""
    job = c1_job[1].branch()
    job.split_class()
    poses = job.state.poses.updated(np.arange(0, 40, 4), class_number=2)
    job._history.append(job.state.replace(poses=poses, class_probability=np.array([0.7, 0.3])), job.settings, job.report)
    job.save(tmp_path, final=False)
    model = tmp_path / "run_it010_model.star"
    data = tmp_path / "run_it010_data.star"
    common = ["align-symmetry", "--i", str(model), "--sym", "C6", "--o", str(tmp_path / "out.mrc"), "--particles", str(data)]
    refused = CliRunner().invoke(cli, common)
    assert refused.exit_code == 2 and "--select-largest-class" in refused.output
    done = CliRunner().invoke(cli, [*common, "--select-largest-class"])
    assert done.exit_code == 0, done.output
    before, after = (read_star(path)["particles"] for path in (data, tmp_path / "out_data.star"))
    moved_rows = ~np.isclose(before["rlnAngleRot"], after["rlnAngleRot"], atol=1e-4)
    second = before["rlnClassNumber"].to_numpy() == 2
    assert second.sum() == 10 and not moved_rows[second].any() and moved_rows[~second].all()
    itself = [str(model.with_name("run_it010_class001.mrc")) if word.endswith("out.mrc") else word for word in common]
    refused = CliRunner().invoke(cli, [*itself, "--select-largest-class", "--overwrite"])
    assert refused.exit_code == 2 and "is an input" in refused.output
    model.with_name("run_it010_class001.mrc").unlink()
    gone = CliRunner().invoke(cli, [*common, "--select-largest-class", "--overwrite"])
    assert gone.exit_code == 2 and "rlnReferenceImage" in gone.output


def test_the_command_scores_a_map(c1_job, tmp_path):
    path = c1_job[0] / "job" / "run_it010_class001.mrc"
    done = CliRunner().invoke(
        cli, ["symmetry-scores", "--i", str(path), "--resolution", "40", "--radius", "110", "--o", str(tmp_path / "s.png")]
    )
    assert done.exit_code == 0, done.output
    assert "C6" in done.output.splitlines()[2] + done.output.splitlines()[3] + done.output.splitlines()[4]
    assert "wrong group" in done.output and (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    empty = tmp_path / "empty.mrc"
    write_mrc(empty, np.zeros((8, 8, 8), np.float32), 1.0)
    assert CliRunner().invoke(cli, ["symmetry-scores", "--i", str(empty)]).exit_code == 2
