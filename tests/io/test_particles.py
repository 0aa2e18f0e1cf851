"""Opening particle sets and reading particles, on tiny projects and on RELION's own files."""

import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import BOX, NAMES, make_project

from vdamkit.errors import InputError, ParticleError
from vdamkit.io.particle import TiltStack, Volume
from vdamkit.io.particle_files import split_weights
from vdamkit.io.particles import open_particles, problems
from vdamkit.io.star_tables import read_star, write_star
from vdamkit.sampling.euler import euler_to_matrix

REFERENCE = Path(__file__).parents[2].parent / "shared" / "relion_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="RELION reference data not there")


@pytest.mark.parametrize("kind", ["stack", "volume"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tiny_project(tmp_path, kind, dtype):
    project = make_project(tmp_path, kind, dtype=dtype)
    particles = open_particles(project.write())
    assert len(particles) == 3 and particles.is_stack2d == (kind == "stack")
    assert (particles.box, particles.pixel_size) == (BOX, 4.0)
    assert list(particles.optics_index) == [0, 0, 1] and particles.optics[1].voltage_kv == 200
    assert list(particles.tomogram_names) == NAMES and set(particles.tomograms) == set(NAMES)
    assert list(particles.group_index) == [0, 0, 1] and particles.group_names == ("01", "TS_2")
    np.testing.assert_array_equal(particles.angles[1], [5, 90, 0])
    np.testing.assert_array_equal(particles.angle_priors[1], [np.nan, 90, 0])
    np.testing.assert_array_equal(particles.origins[2], [-4, 3, 5])
    assert not particles.origin_priors.any()
    np.testing.assert_allclose(particles.subtomogram_rotations[1], euler_to_matrix([30, 90, 10]))
    assert list(particles.table["rlnUnknownColumn"]) == [7, 8, 9]
    assert list(particles.table.columns) == list(project.particles.columns)
    assert problems(particles, mask_diameter=30) == []
    assert all(isinstance(particles.load(i), TiltStack if kind == "stack" else Volume) for i in range(3))


def test_stack_sections_belong_to_visible_tilts(tmp_path):
    project = make_project(tmp_path)
    particles = open_particles(project.write())
    stack = particles.load(1)
    tilts = [0, 2, 3, 4]
    np.testing.assert_allclose(stack.images, project.images["sub/1_stack2d.mrcs"])
    assert stack.images.dtype == np.float32
    tomogram = particles.tomograms["01"]
    np.testing.assert_array_equal(stack.dose, tomogram.dose[tilts])
    np.testing.assert_array_equal(stack.ctf_scale, tomogram.ctf_scale[tilts])
    np.testing.assert_allclose(stack.rotations, tomogram.rotations[tilts] @ euler_to_matrix([30, 90, 10]))


def test_defocus_follows_the_depth(tmp_path):
    project = make_project(tmp_path)
    project.tomograms["rlnTomoDefocusSlope"] = [0.5, 1.0]
    particles = open_particles(project.write())
    tomogram, stack = particles.tomograms["01"], particles.load(1)
    position = np.array([-50, 60, -20]) - euler_to_matrix([30, 90, 10]) @ [1, 2, 3]
    depth = np.array([rotation[2] @ position for rotation in tomogram.rotations])[[0, 2, 3, 4]]
    np.testing.assert_allclose(stack.defocus_u, tomogram.defocus_u[[0, 2, 3, 4]] - 0.5 * depth)
    np.testing.assert_allclose(stack.defocus_v, tomogram.defocus_v[[0, 2, 3, 4]] - 0.5 * depth)


def test_trajectories_shift_the_depth_only(tmp_path):
    project = make_project(tmp_path)
    path = project.write()
    motion = pd.DataFrame({"rlnOriginXAngst": 0.0, "rlnOriginYAngst": [5.0] * 5, "rlnOriginZAngst": np.arange(5.0)})
    write_star(tmp_path / "motion.star", {"general": {"rlnParticleNumber": 1}, "01/2": motion})
    still, moved = open_particles(path), open_particles(path, trajectories=tmp_path / "motion.star")
    for i in (0, 2):
        np.testing.assert_array_equal(moved.load(i).defocus_u, still.load(i).defocus_u)
    shifts = [still.tomograms["01"].rotations[f, 2] @ [0, 5, f] for f in (0, 2, 3, 4)]
    np.testing.assert_allclose(moved.load(1).defocus_u - still.load(1).defocus_u, -np.array(shifts))
    np.testing.assert_array_equal(moved.load(1).images, still.load(1).images)
    write_star(tmp_path / "motion.star", {"01/2": motion[:3]})
    with pytest.raises(ParticleError, match="has 3 rows but the tilt series has 5 tilts"):
        open_particles(path, trajectories=tmp_path / "motion.star").load(1)
    assert len(problems(open_particles(path, trajectories=tmp_path / "motion.star"))) == 1


def test_stack_with_all_tilts_and_blank_sections(tmp_path):
    project = make_project(tmp_path)
    images = np.random.default_rng(1).normal(size=(5, BOX, BOX)).astype(np.float32)
    images[1] = np.nan  # not visible, so it does not matter
    images[3] = 0
    project.images["sub/1_stack2d.mrcs"] = images
    project.images["sub/0_stack2d.mrcs"][4] = 0
    particles = open_particles(project.write())
    stack = particles.load(1)
    np.testing.assert_array_equal(stack.images, images[[0, 2, 4]])
    assert list(stack.dose) == [0, 6, 12] and len(stack.rotations) == 3
    assert list(particles.load(0).dose) == [0, 3, 6, 9]
    assert problems(particles) == []


def test_coordinates_from_the_corner(tmp_path):
    project = make_project(tmp_path)
    centred = project.particles[[f"rlnCenteredCoordinate{a}Angst" for a in "XYZ"]].to_numpy()
    for axis, size, column in zip("XYZ", (400, 300, 101), centred.T, strict=True):
        project.particles[f"rlnCoordinate{axis}"] = column / 2.0 + size / 2
    project.drop("particles.star", "particles", *[f"rlnCenteredCoordinate{a}Angst" for a in "XYZ"])
    np.testing.assert_allclose(open_particles(project.write()).coordinates, centred, atol=1e-6)


@pytest.mark.parametrize("layout", ["full", "half", "both"])
def test_weights_layouts_agree(layout):
    rng = np.random.default_rng(3)
    n = 8
    # squared modulus of the transform of a real volume: obeys Friedel's law like any CTF²
    full = np.abs(np.fft.fftn(rng.normal(size=(n, n, n)))) ** 2
    half = full[:, :, : n // 2 + 1]
    given = {"full": np.fft.fftshift(full), "half": -half, "both": np.concatenate([half, 2 * half])}[layout]
    ctf2, multiplicity = split_weights(given.astype(np.float32))
    assert ctf2.shape == (n, n, n // 2 + 1) and ctf2.flags.c_contiguous
    np.testing.assert_allclose(ctf2, half, rtol=1e-6)
    if layout == "both":
        np.testing.assert_allclose(multiplicity, 2 * half, rtol=1e-6)
    else:
        assert multiplicity is None


def test_full_cube_is_read_at_minus_k():
    cube = np.zeros((8, 8, 8), np.float32)
    cube[4 + 1, 4 - 2, 4 - 3] = 1
    assert np.argwhere(split_weights(cube)[0]).tolist() == [[7, 2, 3]]


def test_volume_project_with_other_weights(tmp_path):
    project = make_project(tmp_path, "volume")
    project.images["sub/1_weights.mrc"] = np.ones((BOX, BOX, BOX), np.float32)
    project.images["sub/2_weights.mrc"] = np.ones((BOX, BOX, BOX // 2 + 1), np.float16)
    particles = open_particles(project.write())
    assert [particles.load(i).multiplicity is None for i in range(3)] == [False, True, True]
    assert particles.load(2).ctf2.dtype == np.float32
    assert problems(particles) == []


def test_files_given_directly_win(tmp_path):
    project = make_project(tmp_path)
    path = project.write()
    os.rename(tmp_path / "particles.star", tmp_path / "renamed.star")
    with pytest.raises(InputError, match=r"rlnTomoParticlesFile: file 'particles\.star' was not found"):
        open_particles(path)
    both = open_particles(path, particles=tmp_path / "renamed.star")
    alone = open_particles(particles=tmp_path / "renamed.star", tomograms=tmp_path / "tomograms.star")
    assert both.paths.particles == str(tmp_path / "renamed.star") and both.paths.tomograms == "tomograms.star"
    assert alone.paths.optimisation_set is None and both.paths.optimisation_set == str(path)
    assert both.paths.tomograms_file == tmp_path / "tomograms.star"
    np.testing.assert_array_equal(alone.coordinates, both.coordinates)


def test_project_read_from_elsewhere_and_with_dos_line_ends(tmp_path, monkeypatch):
    project = make_project(tmp_path / "project")
    job = "Extract/job009/"
    project.stars[job + "particles.star"] = project.stars["particles.star"]
    project.stars[job + "optimisation_set.star"] = {
        "optimisation_set": {
            "rlnTomoParticlesFile": job + "particles.star",
            "rlnTomoTomogramsFile": "tomograms.star",
            "rlnTomoTrajectoriesFile": "",
        }
    }
    project.write()
    for star in (tmp_path / "project").rglob("*.star"):
        star.write_bytes(star.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    particles = open_particles(f"../project/{job}optimisation_set.star")
    assert particles.paths.particles == job + "particles.star" and particles.trajectories is None
    assert particles.tomogram_names[0] == "01" and len(particles.load(2).images) == 3
    assert particles.paths.entries["rlnTomoTomogramsFile"] == "tomograms.star"


def test_volumes_without_tomograms(tmp_path):
    project = make_project(tmp_path, "volume")
    project.drop("particles.star", "particles", "rlnAngleTiltPrior", "rlnAnglePsiPrior", "rlnOriginXAngst")
    project.stars["particles.star"].pop("general")
    project.particles["rlnGroupName"] = ["07", "8", "07"]
    project.write()
    particles = open_particles(particles=tmp_path / "particles.star")
    assert not particles.is_stack2d and particles.tomograms == {}
    assert np.isnan(particles.angle_priors).all() and not particles.origins[:, 0].any()
    assert particles.group_names == ("07", "8") and list(particles.group_index) == [0, 1, 0]


def test_one_optics_group_as_list_block(tmp_path):
    project = make_project(tmp_path)
    project.stars["particles.star"]["optics"] = project.optics.iloc[0].to_dict()
    project.particles["rlnOpticsGroup"] = 1
    assert len(open_particles(project.write()).optics) == 1


def test_warnings_about_what_is_not_modelled(tmp_path):
    project = make_project(tmp_path, "volume")
    project.optics["rlnOddZernike"] = ["[0,0,0]", "[0,0.1,0]"]
    project.optics["rlnEvenZernike"] = "[0,0,0]"
    project.optics["rlnMagMat00"] = 1.0
    project.optics["rlnMagMat01"] = [0.01, 0.0]
    project.optics["rlnMtfFileName"] = "mtf.star"
    project.optics["rlnCtfDataAreCtfPremultiplied"] = [1, 0]
    project.optics["rlnImagePixelSize"] = [4.0, 4.1]
    project.set("particles.star", "particles", 1, "rlnImageName", "sub/0_data.mrc")
    found = problems(open_particles(project.write()))
    assert all(text.startswith("warning: ") for text in found)
    columns = [
        "rlnOddZernike",
        "rlnMagMat01",
        "rlnMtfFileName",
        "rlnCtfDataAreCtfPremultiplied",
        "rlnImageSize",
    ]
    assert len(found) == 6
    for column, text in zip([*columns, "rlnImageName"], found, strict=True):
        assert f"column {column}:" in text
    assert "row 2, column rlnOddZernike" in found[0]


def test_warnings_about_numbers_in_another_unit(tmp_path):
    project = make_project(tmp_path)
    assert problems(open_particles(project.write())) == []
    project.optics["rlnVoltage"] = [300.0, 200_000.0]
    project.particles["rlnCenteredCoordinateYAngst"] = [10.0, 60.0, 5000.0]
    project.particles["rlnOriginXAngst"] = [0.0, -1e9, 1e9]
    tilts = next(blocks["01"] for blocks in project.stars.values() if "01" in blocks)
    tilts["rlnDefocusU"], tilts["rlnDefocusV"] = 3.1, 3.0
    found = problems(open_particles(project.write()))
    assert all(text.startswith("warning: ") for text in found) and len(found) == 4
    wanted = ("data_optics row 2, column rlnVoltage: value 200000", "tilt series 01",
              "row 3, column rlnCenteredCoordinateYAngst",
              "row 2, column rlnOriginXAngst: value -1e+09 Å lies outside the particle's box (2 such rows)")  # fmt: skip
    for text, words in zip(found, wanted, strict=True):
        assert words in text


def test_problems_are_collected_and_capped(tmp_path):
    project = make_project(tmp_path, "volume")
    project.images["sub/0_data.mrc"] = np.ones((4, 4, 4), np.float32)
    project.images["sub/1_weights.mrc"] = b""
    del project.images["sub/2_data.mrc"]
    particles = open_particles(project.write())
    found = problems(particles, mask_diameter=100)
    assert len(found) == 4
    assert "Mask diameter 100 Å" in found[0] and "at most 32 Å" in found[0]
    assert "row 1, column rlnImageName" in found[1] and "8 x 8 x 8" in found[1]
    assert "row 3, column rlnImageName" in found[2] and "row 2, column rlnCtfImage" in found[3]
    capped = problems(particles, limit=1)
    assert len(capped) == 2 and "and 2 more problems" in capped[1]


@needs_reference
@pytest.mark.parametrize(("folder", "count"), [("stacks2d", 100), ("volumes3d", 40)])
def test_reference_data(folder, count):
    particles = open_particles(REFERENCE / folder / "optimisation_set.star")
    assert len(particles) == count and particles.box == 40 and len(particles.optics) == 2
    assert problems(particles, mask_diameter=230) == []
    for i in (0, count - 1):
        particle = particles.load(i)
        if particles.is_stack2d:
            n = len(particle.images)
            assert particle.images.shape == (n, 40, 40) and particle.rotations.shape == (n, 3, 3)
            assert np.linalg.det(particle.rotations) == pytest.approx(np.ones(n))
            assert particle.defocus_u.shape == (n,) and (particle.defocus_u > 1e4).all()
        else:
            assert particle.data.shape == (40, 40, 40) and particle.ctf2.shape == (40, 40, 21)
            assert particle.ctf2.min() >= 0 and (particle.ctf2 <= particle.multiplicity * 1.01 + 1e-3).all()


def _slice_correlation(stack: TiltStack, volume: Volume, rotations: np.ndarray) -> float:
    """Mean correlation of the tilts with the nearest voxels of the volume's central slices, 3 < |k| < 15."""
    volume_ft = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume.data)))
    ky, kx = np.mgrid[-15:16, -15:16]
    inside = (np.hypot(kx, ky) < 15) & (np.hypot(kx, ky) > 3)
    plane = np.stack([kx[inside], ky[inside], 0 * kx[inside]], -1)
    found = []
    for image, rotation in zip(stack.images, rotations, strict=True):
        image_ft = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image)))[20 + plane[:, 1], 20 + plane[:, 0]]
        x, y, z = np.rint(plane @ rotation).astype(int).T + 20
        values = volume_ft[z, y, x]
        found.append(np.vdot(values, image_ft).real / np.linalg.norm(values) / np.linalg.norm(image_ft))
    return float(np.mean(found))


@needs_reference
def test_both_kinds_of_the_same_particle_agree_in_geometry():
    stacks = open_particles(REFERENCE / "stacks2d" / "optimisation_set.star")
    volumes = open_particles(REFERENCE / "volumes3d" / "optimisation_set.star")
    assert volumes.table["rlnTomoParticleName"].iloc[0] == stacks.table["rlnTomoParticleName"].iloc[0]
    stack, volume = stacks.load(0), volumes.load(0)
    right = _slice_correlation(stack, volume, stack.rotations)
    assert right > 0.33  # measured: 0.366; each slice is one of many that cross in a voxel
    turned = stack.rotations
    wrong = [
        np.swapaxes(turned, 1, 2),
        turned @ np.diag([1, 1, -1]),
        turned[::-1],
        np.diag([-1, -1, 1]) @ turned,
    ]
    assert max(_slice_correlation(stack, volume, rotations) for rotations in wrong) < 0.8 * right


@needs_reference
def test_hundred_thousand_particles_open_quickly(tmp_path):
    blocks = read_star(REFERENCE / "stacks2d" / "particles.star")
    text = (REFERENCE / "stacks2d" / "particles.star").read_text().rstrip()
    rows = text.splitlines()[-len(blocks["particles"]) :]
    (tmp_path / "big.star").write_text(text + "\n" + "\n".join(rows * 999) + "\n")
    start = time.perf_counter()
    particles = open_particles(particles=tmp_path / "big.star", tomograms=REFERENCE / "tomograms.star")
    elapsed = time.perf_counter() - start
    assert len(particles) == 100_000 and len(particles.visible_patterns) < 10
    assert elapsed < 10, f"opening took {elapsed:.1f} s; the aim is 5 s on an idle machine"
