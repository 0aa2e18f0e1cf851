"""What would lose or spoil something is refused, and what was probably meant is said."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers_vdamkit import OPTIONS

import vdamkit as vk
from vdamkit.cli import cli
from vdamkit.errors import InputError, OutputError, SettingsError
from vdamkit.history import KEPT_STATES
from vdamkit.io.mrc import write_mrc
from vdamkit.simulate import simulate
from vdamkit.symmetry.fit import SymmetryMatch

FEW = {"particles": 3, "tomograms": 1, "tilts": 3, "box": 16, "pixel_size": 20.0}


def test_simulate_replaces_no_project(tmp_path):
    """Neither RELION's nor an earlier simulation with other options; the same options make the same files again."""
    (tmp_path / "tomograms.star").write_text("data_\n")
    with pytest.raises(OutputError, match=r"already holds tomograms.star of a project that was not simulated"):
        simulate(tmp_path, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["tomograms.star"]
    made = simulate(tmp_path / "new", **FEW)
    particles = made["stacks2d"].read_bytes()
    assert len(list((tmp_path / "new" / "volumes3d").rglob("*_data.mrc"))) == 3, "24 volumes, or all if fewer"
    with pytest.raises(OutputError, match="other options"):
        simulate(tmp_path / "new", **FEW | {"seed": 9})
    assert made["stacks2d"].read_bytes() == particles
    simulate(tmp_path / "new", **FEW)


@pytest.mark.parametrize(
    ("name", "says"),
    [("sigma_tilt", "RELION's --sigma_tilt is tilt_prior_width"), ("K", "is classes"), ("grad_stepsize", "is step_final"),
     ("symetry", "did you mean symmetry?"), ("xyzzy", "options are")],
)  # fmt: skip
def test_an_unknown_option_is_explained(name, says):
    for make in (vk.Settings, vk.Settings().replace):
        with pytest.raises(SettingsError, match=f"no option {name!r}") as caught:
            make(**{name: 3})
        assert says in str(caught.value)


def test_settings_that_are_none_are_named(folder):
    with pytest.raises(SettingsError, match="settings is a dict"):
        vk.Session(folder / "stacks2d" / "optimisation_set.star", {"T": 4})


@pytest.mark.parametrize("value", [1.5, "2", -1, True])
def test_what_counts_is_a_whole_number(job, value):
    for act in (job.run, job.undo, job.redo):
        with pytest.raises(SettingsError, match="whole number"):
            act(value)


def test_a_truth_is_a_file_or_a_map_of_the_box(job, tmp_path):
    cube = np.random.default_rng(0).normal(size=(20,) * 3)
    write_mrc(tmp_path / "cube.mrc", cube, job.pixel_size)
    write_mrc(tmp_path / "slab.mrc", cube[:7], job.pixel_size)
    for truth in (cube, tmp_path / "cube.mrc", str(tmp_path / "cube.mrc")):
        assert job.picture("resolution", truth=truth).data.startswith(b"\x89PNG")
    for truth, says in ((cube[:8], "an array"), (tmp_path / "slab.mrc", "20 x 20 x 7"), (3.0, "a float")):
        with pytest.raises(InputError, match=says):
            job.picture("resolution", truth=truth)


@pytest.mark.parametrize("warning", ["", "some turn of C5 fits no better"])
def test_the_verdict_doubts_a_group_that_the_final_model_does_not_have(job, warning):
    """A run in C1 whose final model was symmetrised, as `vdamkit run --run-in-c1 --sym C5` writes it."""
    match = SymmetryMatch("C5", np.eye(3), np.zeros(3), np.ones(11), 0.6, 40.0, warning)
    job.run(5)
    job._final_matches = (job._history.current, [match])
    verdict = job.verdict()
    assert "The final model was symmetrised. C5" in str(verdict)
    assert any("does not have that symmetry" in advice for advice in verdict.advice) == bool(warning)
    written = job._history.current
    for _ in range(KEPT_STATES + 1):  # its state goes to disc
        job._history.append(job.state, job.settings, job.report)
    assert "symmetrised" not in str(job.verdict()), "another state's model says nothing of this one"
    job.go_to(written)
    assert "The final model was symmetrised. C5" in str(job.verdict())


def test_a_run_says_what_the_check_warns_of(folder, tmp_path):
    star = folder / "stacks2d" / "optimisation_set.star"
    arguments = ["run", str(star), "--o", str(tmp_path / "job"), "--iter", "1", "--particle-diameter", "60"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert "note: the mask of 60 Å is only 3.8 px wide" in done.stderr
    again = CliRunner().invoke(cli, ["demo", "--o", str(tmp_path / "job")])
    assert again.exit_code == 2 and "no demo; choose another folder" in again.stderr


def test_a_project_that_was_moved_is_resumed_by_its_new_place(folder, tmp_path):
    shutil.copytree(folder / "stacks2d", tmp_path / "old" / "stacks2d")
    for name in ("tilt_series", "tomograms.star"):
        (tmp_path / "old" / name).symlink_to(folder / name)
    star = Path("stacks2d", "optimisation_set.star")
    vk.Session(tmp_path / "old" / star, vk.Settings(**OPTIONS), output=tmp_path / "job").step()
    (tmp_path / "old").rename(tmp_path / "new")
    lost = CliRunner().invoke(cli, ["resume", str(tmp_path / "job")])
    assert lost.exit_code == 2 and "checkpoint.npz names cannot be used" in lost.stderr and "give --ios FILE" in lost.stderr
    session = vk.Session.resume(tmp_path / "job", optimisation_set=tmp_path / "new" / star)
    session.step()
    found = CliRunner().invoke(cli, ["resume", str(tmp_path / "job"), "--ios", str(tmp_path / "new" / star), "--iter", "3"])
    assert found.exit_code == 0 and "Going on after mini-batch 2 of 3" in found.stdout, found.output
    with pytest.raises(InputError, match="particles"):
        vk.Session.resume(tmp_path / "job", optimisation_set=folder / "volumes3d" / "optimisation_set.star")


def test_a_slow_run_says_something_twice_a_minute(job, monkeypatch, capsys):
    monkeypatch.setattr("vdamkit.progress.PATIENCE", 0.0)
    job.run(2, progress=True)
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["mini-batch 1", "mini-batch 2"]


def test_two_outputs_are_two_files(folder, tmp_path):
    """A map and a STAR file of the same name would leave the STAR file alone."""
    cube, out = tmp_path / "cube.mrc", str(tmp_path / "new" / "out.mrc")
    write_mrc(cube, np.random.default_rng(0).normal(size=(20,) * 3), 16.0)
    particles = folder / "stacks2d" / "particles.star"
    arguments = ["align-symmetry", "--i", str(cube), "--sym", "C2", "--o", out, "--particles", str(particles)]
    done = CliRunner().invoke(cli, [*arguments, "--o-particles", out])
    assert done.exit_code == 2 and "give two names" in done.stderr and not (tmp_path / "new").exists()


def test_no_command_at_all_shows_the_help_as_it_is():
    done = CliRunner().invoke(cli, [])
    assert "\n  run " in done.output and "vdamkit: Usage" not in done.output


def test_an_offset_prior_has_a_width():
    with pytest.raises(SettingsError, match=r"sigma_offset is inf; it must be"):
        vk.Settings(sigma_offset=float("inf"))


def test_a_particle_is_a_whole_number_and_a_small_mask_no_traceback(job):
    job.run(1)
    with pytest.raises(InputError, match=r"there is no particle 1\.5"):
        job.posterior(1.5)
    assert job.branch(mask_diameter=1).symmetry_scores().shells > 0
