"""Whole data sets: their files, their truth, and agreement with what RELION extracted."""

import json
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from vdamkit.errors import OutputError, SettingsError
from vdamkit.imaging.ctf import ctf, dose_envelope
from vdamkit.io.star_tables import parse_vector, read_star
from vdamkit.io.tilt_geometry import read_tomograms
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.simulate import simulate
from vdamkit.simulate.extract import Extracted, backproject
from vdamkit.simulate.simulate import _shares
from vdamkit.simulate.tilt_series import Transfer, read_tilt_series

REFERENCE = Path(__file__).parents[2].parent / "shared" / "relion_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no RELION reference data at {REFERENCE}")

SUBTOMOGRAM = ["rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi"]
ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
ORIGIN = ["rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst"]
COORDINATE = ["rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst"]


def load(path):
    return np.asarray(mrcfile.read(path), np.float32)


def true_pose_map(folder, fold):
    """Nearest-neighbour back-projection of all stacks with their true poses, apart from vdamkit's own.

    x_image = M (A x_reference - origin), with M = P A_subtomogram.
    """
    blocks = read_star(folder / "stacks2d/particles.star")
    tomograms = read_tomograms(folder / "tomograms.star")
    truth = read_star(folder / "particles_true_poses.star")["particles"]
    box, pixel = int(blocks["optics"]["rlnImageSize"][0]), float(blocks["optics"]["rlnImagePixelSize"][0])
    ky, kx = np.meshgrid(*[np.fft.fftfreq(box, 1 / box)] * 2, indexing="ij")
    inside = np.hypot(kx, ky) < box / 2 - 1
    kx, ky = kx[inside], ky[inside]
    data, weight = np.zeros((box, box, box), complex), np.zeros((box, box, box))
    for (_, particle), (_, pose) in zip(blocks["particles"].iterrows(), truth.iterrows(), strict=True):
        series = tomograms[particle["rlnTomoName"]]
        frame = euler_to_matrix(particle[SUBTOMOGRAM].to_numpy(float))
        turn = euler_to_matrix(pose[ANGLES].to_numpy(float))
        depths = series.hand * series.depths(particle[COORDINATE].to_numpy(float))
        shown = np.flatnonzero(parse_vector(particle["rlnTomoVisibleFrames"]))
        for image, tilt in zip(load(folder / particle["rlnImageName"]), shown, strict=True):
            to_image = series.rotations[tilt] @ frame
            x, y, _ = -to_image @ pose[ORIGIN].to_numpy(float) / pixel
            transform = np.fft.fft2(np.fft.ifftshift(image))[inside]
            transform *= np.exp(2j * np.pi * (kx * x + ky * y) / box)
            transfer = ctf(
                kx / box / pixel,
                ky / box / pixel,
                defocus_u=series.defocus_u[tilt] + depths[tilt],
                defocus_v=series.defocus_v[tilt] + depths[tilt],
                defocus_angle=series.defocus_angle[tilt],
                voltage_kv=series.voltage_kv,
                cs_mm=series.cs_mm,
                amplitude_contrast=series.amplitude_contrast,
                scale=series.ctf_scale[tilt],
            ) * dose_envelope(np.hypot(kx, ky) / box / pixel, series.dose[tilt])
            for azimuth in 2 * np.pi * np.arange(fold) / fold:
                c, s = np.cos(azimuth), np.sin(azimuth)
                rows = (to_image @ turn @ [[c, -s, 0], [s, c, 0], [0, 0, 1]])[:2]
                place = np.round(np.outer(rows[0], kx) + np.outer(rows[1], ky)).astype(int)
                np.add.at(data, tuple(place[::-1]), transform)
                np.add.at(weight, tuple(place[::-1]), transfer**2)
    return np.fft.fftshift(np.fft.ifftn(data / (weight + 0.02 * weight.max())).real)


def correlation_inside(a, b, radius):
    """Correlation of two maps within `radius` px of the centre."""
    axis = np.arange(len(a)) - len(a) // 2
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < radius**2
    return np.corrcoef(a[inside], b[inside])[0, 1]


def mirror(density):
    return np.roll(density[:, ::-1], 1, axis=1)


def test_files_are_those_of_relion(hexamers):
    folder, paths = hexamers
    assert set(paths) == {"tomograms", "stacks2d", "volumes3d", "true_poses", "true_map", "model", "recipe"}
    assert all(path.is_file() for path in paths.values())
    stacks, volumes = (read_star(folder / kind / "particles.star") for kind in ("stacks2d", "volumes3d"))
    assert list(stacks) == list(volumes) == ["general", "optics", "particles"]
    assert (stacks["general"]["rlnTomoSubTomosAre2DStacks"], len(stacks["particles"])) == (1, 60)
    assert (volumes["general"]["rlnTomoSubTomosAre2DStacks"], len(volumes["particles"])) == (0, 4)
    assert list(stacks["optics"]["rlnOpticsGroup"]) == [1, 2]
    assert set(stacks["particles"]["rlnOpticsGroup"]) == set(volumes["particles"]["rlnOpticsGroup"]) == {1, 2}
    for _, row in stacks["particles"].iterrows():
        with mrcfile.open(folder / row["rlnImageName"], header_only=True) as mrc:
            assert mrc.header.mode == 12
            assert mrc.header.nz == parse_vector(row["rlnTomoVisibleFrames"]).sum()
            assert (mrc.header.ny, mrc.header.nx) == (32, 32)
    for _, row in volumes["particles"].iterrows():
        data, weights = (mrcfile.read(folder / row[c]) for c in ("rlnImageName", "rlnCtfImage"))
        assert data.dtype == weights.dtype == np.float16
        assert data.shape == (32, 32, 32)
        assert weights.shape == (64, 32, 17)
    assert json.loads(paths["recipe"].read_text())["seed"] == 3


@needs_reference
@pytest.mark.parametrize("kind", ["stacks2d", "volumes3d"])
def test_columns_are_those_relion_wrote(hexamers, kind):
    ours, theirs = (read_star(f / kind / "particles.star") for f in (hexamers[0], REFERENCE))
    for block in ("optics", "particles"):
        assert list(ours[block].columns) == list(theirs[block].columns)
    name = "particles_true_poses.star"
    ours, theirs = (read_star(f / name)["particles"] for f in (hexamers[0], REFERENCE))
    assert list(ours.columns) == list(theirs.columns)
    ours, theirs = (read_star(f / "tomograms.star")["global"] for f in (hexamers[0], REFERENCE))
    assert list(ours.columns) == list(theirs.columns)


def test_truth_scatters_about_the_picker(hexamers):
    truth = read_star(hexamers[0] / "particles_true_poses.star")["particles"]
    assert truth["rlnAngleTilt"].mean() == pytest.approx(90, abs=3)
    assert truth["rlnAnglePsi"].mean() == pytest.approx(0, abs=3)
    assert 3 < truth["rlnAngleTilt"].std() < 9
    assert 3 < truth["rlnAnglePsi"].std() < 9
    assert truth["rlnAngleRot"].abs().max() <= 30
    assert truth["rlnAngleRot"].std() > 12
    assert 4 < truth[ORIGIN].to_numpy().std() < 8
    assert (truth["rlnAngleTiltPrior"] == 90).all()
    picked = read_star(hexamers[0] / "stacks2d/particles.star")["particles"]
    assert (picked[ANGLES] == [0, 90, 0]).all(axis=None)
    assert (picked[ORIGIN] == 0).all(axis=None)
    np.testing.assert_allclose(picked[COORDINATE], truth[COORDINATE])


def test_hexamers_with_true_poses_give_the_map(hexamers):
    folder, paths = hexamers
    found, model = true_pose_map(folder, 6), load(paths["model"])
    assert correlation_inside(found, model, 8) > 0.9
    assert correlation_inside(found, mirror(model), 8) < 0.75
    assert correlation_inside(found, load(paths["true_map"]), 12) > 0.85


def test_around_a_particle_stands_what_was_put_there(tmp_path):
    """Where half of the places are empty the neighbours of the true map's particle weigh less, and it is itself whole."""
    options = {
        "particles": 24,
        "volumes": 0,
        "box": 20,
        "pixel_size": 16.0,
        "tilts": 3,
        "tomograms": 1,
        "occupancy": 0.9,
        "seed": 5,
    }
    maps = [load(simulate(tmp_path / str(junk), junk=junk, **options)["true_map"]) for junk in (0.0, 0.5)]
    assert correlation_inside(*maps, 5) > 0.98
    axis = np.arange(20) - 10
    away = np.hypot(np.hypot(axis[:, None, None], axis[:, None]), axis)
    full, half = (volume[(away > 8) & (away < 10)].sum() for volume in maps)
    assert 0.3 < half / full < 0.9


def test_free_particles_with_true_poses_give_the_map(free_particles):
    folder, paths = free_particles
    assert "true_map" not in paths
    assert "volumes3d" not in paths
    particles = read_star(folder / "stacks2d/particles.star")["particles"]
    assert "rlnAngleTiltPrior" not in particles
    assert (particles[SUBTOMOGRAM] == 0).all(axis=None)
    found, model = true_pose_map(folder, 1), load(paths["model"])
    assert correlation_inside(found, model, 11) > 0.9
    assert correlation_inside(found, mirror(model), 11) < 0.8


def test_volumes_are_the_stacks_back_projected(hexamers):
    folder = hexamers[0]
    stacks, volumes = (read_star(folder / k / "particles.star")["particles"] for k in ("stacks2d", "volumes3d"))
    names = dict(zip(stacks["rlnTomoParticleName"], stacks["rlnImageName"], strict=True))
    incomplete = stacks["rlnTomoVisibleFrames"].str.contains("0").to_numpy()
    row = volumes[~volumes["rlnTomoParticleName"].isin(stacks["rlnTomoParticleName"][incomplete])].iloc[0]
    stack, data = load(folder / names[row["rlnTomoParticleName"]]), load(folder / row["rlnImageName"])
    series = read_tomograms(folder / "tomograms.star")[row["rlnTomoName"]]
    frame = euler_to_matrix(row[SUBTOMOGRAM].to_numpy(float))
    axis = np.fft.fftfreq(32, 1 / 32)
    kz, ky, kx = np.meshgrid(axis, axis, axis[:17], indexing="ij")
    spectrum = np.fft.rfftn(np.fft.ifftshift(data))
    # On its own slice a tilt's image is a large part of the volume: they correlate, tilt by tilt.
    found = []
    for image, rotation in zip(stack, series.rotations @ frame, strict=True):
        depth = np.abs(np.einsum("i,izyx->zyx", rotation[2], np.stack([kx, ky, kz])))
        u, v = (np.einsum("i,izyx->zyx", rotation[i], np.stack([kx, ky, kz])) for i in (0, 1))
        near = (depth < 0.3) & (np.hypot(u, v) < 12) & (np.hypot(u, v) > 4)
        transform = np.fft.fft2(np.fft.ifftshift(image))
        expected = transform[np.round(v[near]).astype(int), np.round(u[near]).astype(int)]
        norm = np.linalg.norm(expected) * np.linalg.norm(spectrum[near])
        found.append(np.vdot(expected, spectrum[near]).real / norm)
    assert min(found) > 0.15
    assert np.mean(found) > 0.3


def test_same_seed_same_data(tmp_path):
    options = {"particles": 4, "volumes": 1, "tomograms": 1, "tilts": 5, "box": 24}
    for folder, seed in (("a", 7), ("b", 7), ("c", 8)):
        simulate(tmp_path / folder, seed=seed, **options)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.mrc*"))
    assert len(names) == 4 + 2 + 2
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    stack = "stacks2d/Subtomograms/TS_01/1_stack2d.mrcs"
    assert (tmp_path / "a" / stack).read_bytes() != (tmp_path / "c" / stack).read_bytes()
    a, b = (read_star(tmp_path / f / "particles_true_poses.star")["particles"] for f in "ab")
    assert a.equals(b)


def test_an_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken"):
        simulate(tmp_path / "taken", particles=2, volumes=0, tilts=3)


def test_tilt_images_on_request(tmp_path):
    simulate(tmp_path, particles=2, volumes=0, tomograms=1, tilts=3, box=24, write_tilt_images=True)
    size = read_star(tmp_path / "tomograms.star")["global"].iloc[0]
    names = read_star(tmp_path / "tilt_series/TS_01.star")["TS_01"]["rlnMicrographName"]
    assert len(names) == 3
    for name in names:
        assert mrcfile.read(tmp_path / name).shape == (size["rlnTomoSizeY"], size["rlnTomoSizeX"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("box", 33),
        ("box", "32"),
        ("pixel_size", 0),
        ("particles", 0),
        ("volumes", 111),
        ("tilts", 2),
        ("model", "capsid"),
        ("poses", "nowhere.star"),
        ("variance_ratio", -1.0),
        ("picking_error", None),
        ("symmetry", "D3"),
        ("defocus", 20000.0),
        ("defocus", ("near", "far")),
        ("pixelsize", 10.6),
    ],
)
def test_wrong_options_are_named(tmp_path, option, value):
    with pytest.raises(SettingsError, match=option):
        simulate(tmp_path, **{option: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value"), [("threads", 0), ("threads", -1), ("device", "gpu")])
def test_who_computes_is_checked_first(tmp_path, option, value):
    with pytest.raises(SettingsError, match=option):
        simulate(tmp_path / "data", **{option: value})
    assert not list(tmp_path.iterdir())


def test_a_tomogram_may_lack_one_of_two_kinds(tmp_path):
    options = {"poses": "random", "second_model": "asymmetric", "volumes": 0, "tomograms": 2, "tilts": 3, "box": 16}
    paths = simulate(tmp_path, particles=2, pixel_size=20.0, **options)
    assert set(read_star(paths["true_poses"])["particles"]["rlnClassNumber"]) <= {1, 2}


def test_particles_are_shared_out_evenly():
    assert _shares(7, [9, 9]) == [4, 3]
    assert _shares(7, [1, 9]) == [1, 6]
    assert _shares(7, [1, 2]) == [1, 2]


@needs_reference
def test_volumes_made_from_relions_stacks_are_relions_volumes():
    """Same stack in, same volume and weights out: scale, frame, CTF, hand and file layout are RELION's."""
    stacks, volumes = (read_star(REFERENCE / k / "particles.star")["particles"] for k in ("stacks2d", "volumes3d"))
    series_of = read_tilt_series(REFERENCE / "tomograms.star")
    big_box, row = 96, volumes.iloc[3]
    series = series_of[row["rlnTomoName"]]
    same = stacks["rlnTomoParticleName"] == row["rlnTomoParticleName"]
    stack = stacks[same].iloc[0]
    visible = parse_vector(stack["rlnTomoVisibleFrames"]) > 0
    _, depths = series.project(row[COORDINATE].to_numpy(float)[None])
    transfer = Transfer(series, big_box)(np.flatnonzero(visible), depths[visible, 0])
    particle = Extracted(
        images=np.pad(load(REFERENCE / stack["rlnImageName"]), ((0, 0), (28, 28), (28, 28))),
        transfer=transfer,
        rotations=series.rotations[visible] @ euler_to_matrix(row[SUBTOMOGRAM].to_numpy(float)),
        visible=visible[None],
    )
    data, weights = backproject(particle, np.ones_like(transfer), box=40)
    for ours, name in ((data, "rlnImageName"), (weights, "rlnCtfImage")):
        theirs = load(REFERENCE / row[name])
        assert np.linalg.norm(ours - theirs) < 0.015 * np.linalg.norm(theirs)


@needs_reference
def test_particles_extracted_again_match_relions(tmp_path):
    """The model at RELION's true poses, without noise and without the neighbours RELION's images have."""
    simulate(
        tmp_path,
        model=REFERENCE / "hexamer_model.mrc",
        poses=REFERENCE / "particles_true_poses.star",
        particles=12,
        volumes=1,
        box=40,
        variance_ratio=None,
    )
    ours = read_star(tmp_path / "stacks2d/particles.star")["particles"]
    theirs = read_star(REFERENCE / "stacks2d/particles.star")["particles"]
    shared = [c for c in ours.columns if c.startswith(("rlnTomoName", "rlnTomoParticle", "rlnTomoVisible"))]
    assert ours[shared].equals(theirs[shared].iloc[:12])
    curves = []
    for a, b in zip(ours["rlnImageName"], theirs["rlnImageName"], strict=False):
        a, b = (np.fft.fft2(load(p)) for p in (tmp_path / a, REFERENCE / b))
        a[:, 0, 0] = b[:, 0, 0] = 0
        norm = np.linalg.norm(a, axis=(1, 2)) * np.linalg.norm(b, axis=(1, 2))
        curves.append((np.fft.ifft2(b * a.conj()).real * 1600 / norm[:, None, None]).mean(axis=0))
    assert min(curve[0, 0] for curve in curves) > 0.1
    mean = np.mean(curves, axis=0)
    assert np.unravel_index(mean.argmax(), mean.shape) == (0, 0)
    assert mean[0, 0] > 0.2
    assert mean[0, 0] > 20 * np.median(np.abs(mean))
