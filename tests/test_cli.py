"""The command line: what it accepts, what it says, its exit codes; with real processes where that matters."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
from click.testing import CliRunner

from vdamkit import __version__
from vdamkit.cli import COMMANDS, cli
from vdamkit.cli_data import HELP
from vdamkit.cli_options import FLAGS, with_flags
from vdamkit.errors import OutputError
from vdamkit.io.checkpoint import load_checkpoint, save_checkpoint
from vdamkit.io.star_tables import read_star, write_star
from vdamkit.settings import Settings
from vdamkit.simulate import SimulationSettings, simulate

JOB = ("--sym", "C6", "--sigma-tilt", "10", "--particle-diameter", "200", "--j", "1", "--offset-range", "4")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with 12 simulated particles, box 16."""
    folder = tmp_path_factory.mktemp("tiny")
    simulate(folder, particles=12, volumes=0, tomograms=1, box=16, pixel_size=20.0, tilts=9, seed=1)
    return folder


def call(*arguments):
    """Exit code, stdout and stderr of ``vdamkit ARGUMENTS`` in this process."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def process(*arguments, **options):
    """The command line as a process of its own, not yet awaited."""
    # where the tests run in a shell's background, children would ignore interrupts
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from vdamkit.cli import main; main()"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of three mini-batches, as (folder, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("run") / "job001"
    code, out, err = call("run", tiny / "stacks2d" / "optimisation_set.star", "--o", folder, "--iter", 3, *JOB, "--score-all")
    assert code == 0, err
    return folder, out, err


def test_every_setting_has_its_flag_and_no_two_share_one():
    assert set(FLAGS) == {field.name for field in fields(Settings)}
    flags = [part for names in FLAGS.values() for name in names for part in name.split("/")]
    assert len(flags) == len(set(flags))
    assert set(HELP) == {field.name for field in fields(SimulationSettings)}


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_of_every_command(command):
    code, out, _ = call(*command, "--help")
    assert code == 0
    assert out.startswith("Usage:")
    for flags in FLAGS.values() if command == ("run",) else ():
        assert all(part in out for part in flags[0].split("/"))


def test_help_and_version_are_quick():
    began = time.perf_counter()
    with process("--version") as child:
        out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (0, f"vdamkit {__version__}\n", "")
    assert time.perf_counter() - began < 1.5


def test_a_run_writes_what_it_says(finished):
    folder, out, err = finished
    assert f"map: {folder / 'initial_model.mrc'}" in out
    assert (folder / "initial_model.mrc").exists() and (folder / "run_it003_data.star").exists()
    assert "mini-batch 3: 12 particles" in out
    assert sum(not line.startswith("note: ") for line in err.splitlines()) <= 2 and "\r" not in err  # no bar: no terminal
    _, settings, _, _ = load_checkpoint(folder / "checkpoint.npz")
    assert (settings.symmetry, settings.tilt_prior_width, settings.mini_batches) == ("C6", 10.0, 3)


def test_relions_underscores_and_aliases_mean_the_same(tiny):
    code, out, err = call(
        "check", "--i", tiny / "stacks2d" / "particles.star", "--tomograms", tiny / "tomograms.star", "--tau2_fudge", 2,
        "--seed", 3, "--sigma_tilt", -1, "--sigma_psi", "-1", "--particle_diameter", 150,
    )  # fmt: skip
    assert code == 0, err
    assert "12 particles (2D stacks), box 16 px of 20 Å" in out
    assert "Ready to run." in out


RELION = (
    "--iter 100 --grad --denovo_3dref --ios {set} --ctf --K 1 --sym C6 --flatten_solvent --zero_mask "
    "--dont_combine_weights_via_disc --preread_images --pool 3 --pad 1 --particle_diameter 230 --oversampling 1 "
    "--healpix_order 1 --offset_range 6 --offset_step 2 --auto_sampling --tau2_fudge 4 --sigma_tilt 10 --j 2 "
    "--pipeline_control InitialModel/job010/"
)


def test_the_command_line_of_relions_job_is_taken_as_it_is(tiny, tmp_path):
    data = tiny / "stacks2d" / "optimisation_set.star"
    words = RELION.format(set=data).split()
    code, out, err = call("check", *words)
    assert code == 0 and "100 mini-batches of 10 to 12 particles" in out
    assert err == (
        "note: without meaning here: --grad, --denovo_3dref, --zero_mask, --dont_combine_weights_via_disc, --pad, "
        "--oversampling, --pipeline_control\n"
        "note: --pool 3 is slow here, where particles scored together share rotations; leave it out\n"
    )
    code, _, err = call("run", *words, "--o", tmp_path / "job", "--iter", 1, "--offset-range", 4)
    assert code == 0, err
    _, settings, _, inputs = load_checkpoint(tmp_path / "job" / "checkpoint.npz")
    assert (settings.solvent, settings.memory_budget, settings.tilt_prior_width) == ("mask", float("inf"), 10)
    assert inputs["optimisation_set"] == str(data)


def test_help_speaks_the_command_lines_language():
    run, resume = (" ".join(call(command, "--help")[1].split()) for command in ("run", "resume"))
    for text in (run, resume):
        assert not re.search(r"\b(None|True|False|T_scheme)\b", text)
    assert "-1: 85 % of what is free" in run and "annealed from 1 (see --tau2-fudge-scheme)" in run
    assert "when first read. [default: none]" in run
    assert "default" not in resume.replace("by default", "").replace("plain mask is the default", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mask_diameter is 900 Å", "--particle-diameter is 900 Å"),
        ("T is -1; it must be", "--tau2-fudge is -1; it must be"),
        ("use max_healpix_order, or device='cpu'.", "use --max-healpix-order, or --device cpu."),
        ("a.star: give tomograms=... or an optimisation set.", "a.star: give --tomograms FILE or an optimisation set."),
        ("/data/mask_diameter/T_scheme.star: no device", "/data/mask_diameter/T_scheme.star: no device"),
    ],
)
def test_names_of_python_become_flags(text, said):
    assert with_flags(text) == said == with_flags(said)


def test_a_finished_run_is_not_written_over(tiny, finished):
    folder = finished[0]
    before = (folder / "checkpoint.npz").read_bytes()
    code, _, err = call("run", tiny / "stacks2d" / "optimisation_set.star", "--o", folder, *JOB)
    assert code == 2
    assert f"vdamkit resume {folder}" in err and "--overwrite" in err
    assert (folder / "checkpoint.npz").read_bytes() == before


def test_overwrite_leaves_no_old_files(tiny, tmp_path):
    data = tiny / "stacks2d" / "optimisation_set.star"
    assert call("run", data, "--o", tmp_path / "job", "--iter", 2, *JOB)[0] == 0
    assert call("run", data, "--o", tmp_path / "job", "--iter", 1, "--overwrite", *JOB)[0] == 0
    assert not list((tmp_path / "job").glob("run_it002*"))


RELION_JOB = ("run_it200_model.star", "run_it200_class001.mrc", "run_it200_data.star", "initial_model.mrc")
A_PERSONS = ("initial_model_sharpened_by_me.mrc", "run_it200_class001_masked.mrc", "note.txt")


def test_results_that_are_not_vdamkits_are_not_written_over(tiny, tmp_path):
    """A RELION job has such names too; with --overwrite its files go, and nothing else does."""
    folder, arguments = tmp_path / "job", ("run", tiny / "stacks2d" / "optimisation_set.star", "--iter", 1, *JOB)
    folder.mkdir()
    for name in RELION_JOB + A_PERSONS:
        (folder / name).write_text("precious")
    code, _, err = call(*arguments, "--o", folder)
    assert code == 2 and "already holds files of another job, such as initial_model.mrc" in err and "resume" not in err
    assert {path.name for path in folder.iterdir()} == {*RELION_JOB, *A_PERSONS}
    assert call(*arguments, "--o", folder, "--overwrite")[0] == 0
    assert not [path for path in folder.glob("run_it200_*") if path.name in RELION_JOB]
    assert all((folder / name).read_text() == "precious" for name in A_PERSONS)


def test_an_empty_folder_name_is_not_the_current_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("run", tiny / "stacks2d" / "optimisation_set.star", "--o", "", *JOB)
    assert code == 2 and "--o" in err and not list(tmp_path.iterdir())


def test_a_full_disc_is_said_with_what_is_on_it(tiny, tmp_path, monkeypatch):
    """The mini-batch that found no room is not among what is kept."""
    from vdamkit import storage

    save = storage.save_checkpoint

    def full(path, state, *rest):
        if state.iteration == 2:
            raise OutputError(f"{path}: could not be written (No space left on device)")
        save(path, state, *rest)

    monkeypatch.setattr(storage, "save_checkpoint", full)
    code, _, err = call("run", tiny / "stacks2d" / "optimisation_set.star", "--o", tmp_path / "job", "--iter", 3, *JOB)
    assert code == 2 and "No space left" in err and "Mini-batches up to 1 are kept" in err


def test_resume_says_what_changed_and_goes_on_to_the_end(tiny, tmp_path):
    folder = tmp_path / "job"
    assert call("run", tiny / "stacks2d" / "optimisation_set.star", "--o", folder, "--iter", 1, *JOB)[0] == 0
    code, out, _ = call("resume", folder, "--iter", 2, "--tau2-fudge", 2, "--sym", "C6")
    assert code == 0
    assert "mini_batches: 1 → 2" in out and "T: 4.0 → 2.0" in out and "symmetry" not in out
    assert "Going on after mini-batch 1 of 2." in out
    code, out, _ = call("resume", folder)
    assert code == 0 and "All 2 mini-batches are done" in out
    state, settings, log, inputs = load_checkpoint(folder / "checkpoint.npz")
    save_checkpoint(folder / "checkpoint.npz", state, settings.replace(device="cuda:63"), log, inputs)
    code, _, err = call("resume", folder)
    assert code == 2 and "--device is 'cuda:63'" in err
    code, out, _ = call("resume", folder, "--device", "cpu", "--iter", 3)
    assert code == 0 and "Going on after mini-batch 2 of 3." in out, "without the GPU that it began on"


def test_a_killed_run_resumes_to_the_same_result(tiny, tmp_path):
    data = tiny / "stacks2d" / "optimisation_set.star"
    with process("run", data, "--o", tmp_path / "whole", "--iter", 12, *JOB) as child:
        child.communicate(timeout=60)
    assert child.returncode == 0
    with process("run", data, "--o", tmp_path / "killed", "--iter", 12, *JOB) as child:
        while load_iteration(tmp_path / "killed") < 1 and child.poll() is None:
            time.sleep(0.01)
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    with process("resume", tmp_path / "killed") as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.npz")[0] for name in ("whole", "killed"))
    assert one.iteration == other.iteration == 12
    np.testing.assert_array_equal(one.maps, other.maps)
    np.testing.assert_array_equal(one.poses.angles, other.poses.angles)


def load_iteration(folder):
    """Mini-batch of the checkpoint in a folder; -1 before there is one."""
    path = folder / "checkpoint.npz"
    return load_checkpoint(path)[0].iteration if path.exists() else -1


def test_an_interrupt_says_what_is_kept(tiny, tmp_path):
    folder = tmp_path / "job"
    with process("run", tiny / "stacks2d" / "optimisation_set.star", "--o", folder, "--iter", 500, *JOB) as child:
        while load_iteration(folder) < 1 and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert "are kept in" in err and f"vdamkit resume {folder}" in err


MISTAKES = {
    "no input": ((), "no input"),
    "missing file": (("nothing.star",), "nothing.star"),
    "unknown symmetry": (("{set}", "--sym", "Q7"), "--sym is 'Q7'"),
    "negative T": (("{set}", "--tau2-fudge", "-1"), "--tau2-fudge is -1"),
    "tilt prior 0": (("{set}", "--sigma-tilt", "0"), "--sigma-tilt is 0"),
    "mask larger than the box": (("{set}", "--particle-diameter", "900"), "900 Å but the box is"),
    "no tomograms": (("--i", "{particles}"), "tomograms"),
    "not a number": (("{set}", "--iter", "many"), "'many' is not a valid integer"),
    "unknown option": (("{set}", "--tau3", "1"), "--tau3"),
    "unknown choice": (("{set}", "--flatten-solvent", "yes"), "--flatten-solvent is 'yes'"),
    "a GPU by name": (("{set}", "--gpu", "first"), "--gpu is 'first'"),
    "a particle file as set": (("{particles}",), "give it as --i FILE and its tomograms as --tomograms FILE, or"),
    "two sets": (("{set}", "--ios", "{set}"), "two optimisation sets"),
    "no tomograms, in flags": (("--i", "{particles}"), "give --tomograms FILE"),
    "another unit": (("{set}", "--ini_high", "50"), "--ini_high is --start-fraction here"),
    "GPU and CPU": (("{set}", "--gpu", "0", "--device", "cpu"), "give only one"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(tiny, tmp_path, name):
    arguments, expected = MISTAKES[name]
    files = {"set": tiny / "stacks2d" / "optimisation_set.star", "particles": tiny / "stacks2d" / "particles.star"}
    code, out, err = call("run", *(a.format(**files) for a in arguments), "--o", tmp_path / "job")
    assert (code, out) == (2, "")
    assert expected in err
    assert err.startswith("vdamkit: ") and err.count("\n") == 1
    assert not (tmp_path / "job").exists()


def test_an_output_folder_that_cannot_be_written_is_said_before_the_work(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "job"):
        code, _, err = call("run", tiny / "stacks2d" / "optimisation_set.star", "--o", folder, *JOB)
        assert code == 2 and str(folder) in err and err.count("\n") == 1


def test_unreadable_particles_stop_a_run_before_it_begins(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "data")
    stacks = sorted((tmp_path / "data" / "stacks2d").rglob("*.mrcs"))
    for path in stacks[:3]:
        path.write_bytes(path.read_bytes()[:-100])
    data = tmp_path / "data" / "stacks2d" / "optimisation_set.star"
    code, _, err = call("run", data, "--o", tmp_path / "job", *JOB)
    assert code == 2 and "truncated" in err and "2 more problems" in err
    code, out, _ = call("check", data)
    assert code == 2 and out.count("Problem: ") == 3


def test_a_run_goes_on_without_a_scratch_folder_and_says_so(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    data = tiny / "stacks2d" / "optimisation_set.star"
    code, _, err = call("run", data, "--o", tmp_path / "job", "--iter", 2, "--scratch-dir", tmp_path / "file", *JOB)
    assert code == 0
    assert err.count("nothing more can be copied to") == 1 and str(tmp_path / "file") in err


def test_a_run_says_which_columns_it_ignores(tiny, tmp_path):
    blocks, odd = read_star(tiny / "stacks2d" / "particles.star"), tiny / "stacks2d" / "odd.star"
    write_star(odd, blocks | {"optics": blocks["optics"].assign(rlnOddZernike="[0.5,0.5]")})
    code, _, err = call("run", "--i", odd, "--tomograms", tiny / "tomograms.star", "--o", tmp_path / "job", "--iter", 1, *JOB)
    assert code == 0 and err.count("rlnOddZernike") == 1 and "column rlnOddZernike: value [0.5,0.5] is ignored" in err


def test_resume_of_nothing_and_other_mistakes(tmp_path):
    for arguments, expected in (
        (("resume", tmp_path), "checkpoint.npz"),
        (("resume",), "FOLDER"),
        (("simulate", tmp_path / "x", "--particles", "0"), "--particles is 0"),
        (("simulate", tmp_path / "x", "--symmetry", "D2"), "--symmetry is 'D2'"),
        (("bogus",), "bogus"),
    ):
        code, _, err = call(*arguments)
        assert code == 2 and expected in err and err.count("\n") == 1


def test_simulate_writes_a_data_set(tmp_path):
    code, out, err = call(
        "simulate", tmp_path / "data", "--particles", 2, "--volumes", 1, "--tomograms", 1, "--box", 16, "--pixel-size", 20,
        "--tilts", 5, "--variance-ratio", "none", "--defocus", 20000, 30000,
    )  # fmt: skip
    assert code == 0, err
    assert f"stacks2d: {tmp_path / 'data' / 'stacks2d' / 'optimisation_set.star'}" in out
    assert (tmp_path / "data" / "true_map.mrc").exists()


def test_the_demo_ends_with_a_picture(tiny, tmp_path):
    from vdamkit.demo import is_demo, run_demo

    said = []
    result = run_demo(tmp_path / "demo", mini_batches=2, data=tiny, threads=1, progress=False, say=said.append)
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert result.map.exists() and result.aligned_map.exists()
    assert any("sphere of 100 Å: FSC 0.5 at" in line for line in said)
    assert str(result.picture) in said[-1]
    data = tiny / "stacks2d" / "optimisation_set.star"
    assert is_demo(tmp_path / "demo", data) and not is_demo(tmp_path / "demo", "mine.star"), "another may replace it"


# tutorial ---------------------------------------------------------------------------------------------------------------


def test_the_tutorial_never_overwrites_what_a_person_changed(tmp_path):
    code, out, _ = call("tutorial", tmp_path / "course", "--copy-only")
    copied = sorted((tmp_path / "course").glob("*.ipynb"))
    assert code == 0 and copied[0].name == "01_first_model.ipynb" and str(copied[0]) in out
    copied[1].write_text("mine")
    copied[2].unlink()
    code, out, _ = call("tutorial", tmp_path / "course", "--copy-only")
    assert code == 0 and f"kept your {copied[1]}" in out
    assert copied[1].read_text() == "mine" and copied[2].exists()


def test_the_tutorial_opens_jupyterlab_on_the_first_notebook(tmp_path, monkeypatch):
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    code, _, _ = call("tutorial", tmp_path / "course", "--no-browser", "--port", 8123, "--", "--allow-root")
    assert code == 0
    assert asked[0][1:4] == ["-m", "jupyter", "lab"] and asked[0][4].endswith("01_first_model.ipynb")
    assert {"--no-browser", "--ServerApp.port=8123", "--allow-root"} <= set(asked[0])


def test_a_tutorial_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call("tutorial", tmp_path / "file" / "course", "--copy-only")
    assert code == 2 and "choose another folder" in err
