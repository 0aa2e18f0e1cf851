"""RELION's files: blocks and columns as RELION wrote them, moment layout, atomic writing, reading back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from builders import BOX, PIXEL, make_project
from states import SETTINGS, make_state

from vdamkit.errors import OutputError
from vdamkit.imaging.halfball import fourier_to_map, map_to_fourier
from vdamkit.io.mrc import read_map
from vdamkit.io.particles import open_particles
from vdamkit.io.relion_model import _direction_shares
from vdamkit.io.relion_output import pack_moment, pose_columns, unpack_moment, write_relion_files
from vdamkit.io.star_tables import read_star
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.vdam.schedule import tau2_fudge

REFERENCE = Path(__file__).parents[2].parent / "shared" / "relion_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="RELION reference data not there")
RUNS = {"stack": ("stacks2d", "run_it010"), "volume": ("volumes3d", "run_it020")}


@pytest.fixture(params=["stack", "volume"])
def project(request, tmp_path):
    """A tiny project opened from its folder."""
    return make_project(tmp_path, request.param)


def write(project, *, iteration: int = 10, classes: int = 2, **options):
    """Write the files of a random state; returns particles, state and the files by name."""
    particles = open_particles(project.write())
    folder = project.folder / "InitialModel" / "job010"
    folder.mkdir(parents=True, exist_ok=True)
    state = make_state(len(particles), particles.box, classes=classes, iteration=iteration)
    settings = SETTINGS.replace(classes=classes)
    written = write_relion_files(folder, state, settings, particles, **options)
    assert len(set(written)) == len(written) and sorted(os.listdir(folder)) == sorted(p.name for p in written)
    return particles, state, {path.name: path for path in written}


def test_names(project):
    _, _, files = write(project)
    stars = [f"run_it010_{k}.star" for k in ("data", "model", "sampling", "optimiser", "optimisation_set")]
    maps = [f"run_it010_class{k:03d}.mrc" for k in (1, 2)] + [f"run_it010_2moment{k:03d}.mrc" for k in (1, 2)]
    maps += [f"run_it010_1moment{k:03d}.mrc" for k in (1, 2, 3, 4)]
    assert sorted(files) == sorted(stars + maps)


def test_start_has_no_sampling_file(project):
    _, _, files = write(project, iteration=0)
    assert "run_it000_sampling.star" not in files and "run_it000_data.star" in files
    optimiser = read_star(files["run_it000_optimiser.star"])["optimiser_general"]
    assert optimiser["rlnOrientSamplingStarFile"] == "None"
    general = read_star(files["run_it000_model.star"])["model_general"]
    assert (general["rlnAveragePmax"], general["rlnLogLikelihood"]) == (0, 0)


@needs_reference
@pytest.mark.parametrize("kind", ["stack", "volume"])
@pytest.mark.parametrize("star", ["data", "model", "sampling", "optimiser", "optimisation_set"])
def test_blocks_and_columns_are_those_of_relion(tmp_path, kind, star):
    particles, _, files = write(make_project(tmp_path, kind), classes=1)
    folder, root = RUNS[kind]
    expected = read_star(REFERENCE / "relion_run" / folder / f"{root}_{star}.star")
    found = read_star(files[f"run_it010_{star}.star"])
    assert list(found) == list(expected)
    optional = {"rlnSpectralOrientabilityContribution"}
    for name, block in expected.items():
        wanted = [column for column in block if column not in optional]
        columns = list(found[name])
        if name == "optics":  # an input table, carried over
            assert columns == list(particles.optics_table.columns)
        elif name == "particles":  # the input's columns first, then RELION's new ones
            n = len(particles.table.columns)
            assert columns[:n] == list(particles.table.columns) and columns[n:] == wanted[-6:]
        else:
            assert columns == wanted


def test_data_keeps_the_input_and_marks_the_unvisited(project):
    particles, state, files = write(project)
    blocks = read_star(files["run_it010_data.star"])
    assert ("general" in blocks) == particles.is_stack2d
    table = blocks["particles"]
    kept = [0, 2]  # 1 cannot be read
    assert list(state.bad_particles) == [1] and len(table) == 2
    assert list(table["rlnClassNumber"]) == [0, 1]
    assert list(table["rlnGroupNumber"]) == [1, 2] and set(table["rlnNormCorrection"]) == {1}
    assert list(table["rlnNrOfSignificantSamples"]) == [0, 7]
    new = pose_columns(state)
    for column in particles.table.columns:
        if column not in new:
            assert list(table[column]) == list(particles.table[column].iloc[kept]), column
    np.testing.assert_allclose(table["rlnAngleTilt"], state.poses.angles[kept, 1], rtol=1e-8)
    np.testing.assert_allclose(table["rlnLogLikeliContribution"], state.poses.log_likelihood[kept], rtol=1e-8)
    assert "rlnGroupNumber" not in particles.table.columns  # the input is not changed


def test_model_values(project):
    particles, state, files = write(project)
    blocks = read_star(files["run_it010_model.star"])
    general, extent = blocks["model_general"], BOX * PIXEL
    assert general["rlnCurrentResolution"] == pytest.approx(extent / 3)
    assert (general["rlnCurrentImageSize"], general["rlnPixelSize"], general["rlnNrGroups"]) == (
        BOX,
        PIXEL,
        2,
    )
    widths = [general[f"rlnSigmaPrior{name}Angle"] for name in ("Rot", "Tilt", "Psi")]
    assert widths == [0, 10, 0] and general["rlnOrientationalPriorMode"] == 1
    assert general["rlnAveragePmax"] == pytest.approx(state.poses.pmax[1:].mean())
    T = tau2_fudge(10, SETTINGS)
    assert general["rlnTau2FudgeFactor"] == pytest.approx(T)
    classes = blocks["model_classes"]
    assert list(classes["rlnAccuracyRotations"]) == [999, 999]
    assert list(classes["rlnGradMoment1"]) == [files[f"run_it010_1moment{k:03d}.mrc"].as_posix() for k in (1, 2)]
    scale = (BOX if particles.is_stack2d else 1) / 4.0
    for k in (0, 1):
        table = blocks[f"model_class_{k + 1}"]
        np.testing.assert_allclose(table["rlnReferenceTau2"], state.tau2[k] * scale**2, rtol=1e-8)
        known = state.data_vs_prior[k] > 0
        ratio = T * table["rlnReferenceTau2"] / table["rlnReferenceSigma2"].where(known, 1)
        np.testing.assert_allclose(ratio[known], state.data_vs_prior[k][known], rtol=1e-7)
        sigma2 = blocks[f"model_optics_group_{k + 1}"]["rlnSigma2Noise"]
        np.testing.assert_allclose(sigma2, state.sigma2[k] / 16, rtol=1e-8)
        pdf = blocks[f"model_pdf_orient_class_{k + 1}"]["rlnOrientationDistribution"]
        assert len(pdf) == orientation_grid(2, "C2").n_directions
        assert pdf.sum() == pytest.approx(state.class_probability[k])
    assert list(blocks["model_groups"]["rlnGroupNrParticles"]) == [2, 1]


def test_particles_are_counted_where_they_are_seen_from():
    """Poses near two directions of the grid, in any of their mates, and at any psi."""
    state, grid = make_state(40, BOX), orientation_grid(2, "C6")
    chosen = np.where(np.arange(40) < 30, 3, 17)
    rot, tilt = grid.directions[chosen].T
    angles = np.column_stack([rot + 1 + 60.0 * np.arange(40), tilt - 1, np.linspace(-180, 180, 40)])
    poses = state.poses.updated(np.arange(40), angles=angles, class_number=np.ones(40, int))
    state = state.replace(poses=poses, healpix_order=2)
    shares = _direction_shares(state, "C6", 0)
    assert shares[3] == 0.75 and shares[17] == 0.25
    assert set(_direction_shares(state, "C6", 1)) == {1 / grid.n_directions}, "nobody is there"


def test_sampling_and_optimiser_values(project):
    particles, _, files = write(project, command="vdamkit run\n--T 3")
    blocks = read_star(files["run_it010_sampling.star"])
    general = blocks["sampling_general"]
    assert (general["rlnOffsetRange"], general["rlnOffsetStep"], general["rlnPsiStep"]) == (12, 4, 15)
    assert general["rlnOffsetRangeOriginal"] == SETTINGS.offset_range * PIXEL
    assert general["rlnSymmetryGroup"] == "C2"
    grid = orientation_grid(2, "C2")
    np.testing.assert_allclose(blocks["sampling_directions"], grid.directions, atol=1e-6)
    first, second = files["run_it010_optimiser.star"].read_text().splitlines()[:2]
    assert first.startswith("# vdamkit optimiser; version ") and second == "# vdamkit run --T 3"
    general = read_star(files["run_it010_optimiser.star"])["optimiser_general"]
    assert general["rlnModelStarFile"] == files["run_it010_model.star"].as_posix()
    assert general["rlnTomoTomogramsFile"] == "tomograms.star" and general["rlnTomoTrajectoriesFile"] == ""
    assert (general["rlnCurrentIteration"], general["rlnRandomSeed"]) == (10, 5)
    assert general["rlnChangesOptimalOffsets"] == pytest.approx(3.0)
    assert general["rlnSgdSubsetSize"] == -1 and general["rlnSgdStepsizeScheme"] == "1.8-step"
    assert len(particles) == 3


def test_maps_are_in_the_grey_values_of_the_data(project):
    particles, state, files = write(project, final=True)
    for k in (0, 1):
        volume, pixel = read_map(files[f"run_it010_class{k + 1:03d}.mrc"])
        np.testing.assert_array_equal(volume, state.maps[k] / 4)
        assert pixel == PIXEL
        second, _ = read_map(files[f"run_it010_2moment{k + 1:03d}.mrc"])
        np.testing.assert_array_equal(unpack_moment(second), state.moment2[k])
        for half in (0, 1):
            first, _ = read_map(files[f"run_it010_1moment{2 * half + k + 1:03d}.mrc"])
            scale = (BOX if particles.is_stack2d else 1) / 4
            np.testing.assert_allclose(unpack_moment(first), state.moment1[k, half] * scale, rtol=1e-6)
    np.testing.assert_array_equal(read_map(files["initial_model.mrc"])[0], state.maps[1] / 4)  # the largest


@pytest.mark.parametrize("k", [(0, 0, 3), (2, -1, 0), (-3, 2, 1)], ids=str)
def test_a_plane_wave_lies_where_relion_looks_for_it(k):
    """cos(2 pi k.x / N + phase) around the box centre: one voxel (and its mate) at N/2 + kz, N/2 + ky, kx."""
    n, (kz, ky, kx) = 12, k
    z, y, x = np.meshgrid(*[np.arange(n) - n // 2] * 3, indexing="ij")
    wave = np.cos(2 * np.pi * (kz * z + ky * y + kx * x) / n + 0.3)
    stored = pack_moment(map_to_fourier(wave))
    assert stored.shape == (n, n, n + 2) and stored.dtype == np.float32
    value = stored[n // 2 + kz, n // 2 + ky, 2 * kx] + 1j * stored[n // 2 + kz, n // 2 + ky, 2 * kx + 1]
    assert value == pytest.approx(0.5 * np.exp(0.3j), abs=1e-6)
    assert (np.abs(stored) > 1e-6).sum() == (4 if kx == 0 else 2)
    np.testing.assert_allclose(fourier_to_map(unpack_moment(stored)), wave, atol=1e-6)


@needs_reference
def test_relions_own_moments_are_understood():
    folder, names = (
        REFERENCE / "relion_run" / "volumes3d",
        ("1moment001", "1moment002", "2moment001", "class001"),
    )
    stored, other, second, reference = (read_map(folder / f"run_it020_{name}.mrc")[0] for name in names)
    n = reference.shape[0]
    assert stored.shape == second.shape == pack_moment(map_to_fourier(reference)).shape == (n, n, n + 2)
    moment = unpack_moment(stored)
    np.testing.assert_array_equal(pack_moment(moment), stored)
    plane = moment[:, :, 0]
    mates = np.conj(np.roll(plane[::-1, ::-1], 1, (0, 1)))
    assert np.abs(plane - mates).max() < 0.01 * np.abs(plane).max()  # the plane x = 0 is Hermitian about N/2
    v = unpack_moment(second)
    radius = np.sqrt(sum(np.square(f) for f in np.meshgrid(*[np.fft.fftfreq(n) * n] * 2, np.arange(n // 2 + 1))))
    assert not v.imag[radius < n // 2].any() and v.real.min() > 0
    transform = map_to_fourier(reference)  # shells that grow: the gradient points along the map, phases included
    grows = (radius > 8.5) & (radius < 11.5)
    step = (moment + unpack_moment(other))[grows] / np.sqrt(v.real[grows])
    similarity = np.vdot(transform[grows], step).real
    assert similarity > 0.8 * np.linalg.norm(transform[grows]) * np.linalg.norm(step)


def test_written_sets_open_again(project):
    particles, state, files = write(project, final=True)
    for name in ("run_optimisation_set.star", "run_it010_optimisation_set.star"):
        again = open_particles(files[name])
        kept = np.delete(np.arange(3), state.bad_particles)
        np.testing.assert_allclose(again.angles, state.poses.angles[kept], rtol=1e-8)
        np.testing.assert_allclose(again.origins, state.poses.offsets[kept], rtol=1e-8)
        np.testing.assert_array_equal(again.angle_priors, particles.angle_priors[kept])
        assert again.is_stack2d == particles.is_stack2d and again.group_names == particles.group_names
        assert type(again.load(1)) is type(particles.load(2))


def test_names_are_relative_to_the_current_folder_and_other_entries_stay(tmp_path, monkeypatch):
    project = make_project(tmp_path)
    project.stars["optimisation_set.star"][""]["rlnTomoReferenceFscFile"] = "PostProcess/fsc.star"
    project.write()
    monkeypatch.chdir(tmp_path)
    particles = open_particles("optimisation_set.star")
    folder = Path("InitialModel/job010")
    folder.mkdir(parents=True)
    write_relion_files(folder, make_state(3, BOX), SETTINGS, particles, final=True)
    assert read_star(folder / "run_optimisation_set.star")[""] == {
        "rlnTomoParticlesFile": "InitialModel/job010/run_it010_data.star",
        "rlnTomoTomogramsFile": "tomograms.star",
        "rlnTomoReferenceFscFile": "PostProcess/fsc.star",
        "rlnTomoTrajectoriesFile": "",
    }
    classes = read_star(folder / "run_it010_model.star")["model_classes"]
    assert classes["rlnReferenceImage"][0] == "InitialModel/job010/run_it010_class001.mrc"
    assert len(open_particles(folder / "run_optimisation_set.star")) == 2  # one of three cannot be read


def test_a_failed_write_leaves_the_old_files(project, monkeypatch):
    particles, state, files = write(project, final=True)
    before = {name: path.read_bytes() for name, path in files.items()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    folder = files["initial_model.mrc"].parent
    with pytest.raises(OutputError, match="No space left on device"):
        write_relion_files(folder, state.replace(maps=state.maps * 2), SETTINGS, particles, final=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_missing_folder_is_said(project):
    particles = open_particles(project.write())
    with pytest.raises(OutputError, match="job099"):
        write_relion_files(project.folder / "job099", make_state(3, BOX), SETTINGS, particles)
