"""Layer data against known poses, and the picture without OpenGL against the right hand."""

import io

import numpy as np
import pytest
from hand import BLOBS, BOX, PIXEL, check_hand, hand_layers, hand_maps
from matplotlib.image import imread

from vdamkit.notebook.figures import png
from vdamkit.notebook.layers import (
    LIGHT,
    as_surfaces,
    colour_values,
    lattice_layers,
    layers_for,
    map_layers,
    particle_layers,
    prior_directions,
    surface_of,
    zyx,
)
from vdamkit.notebook.reader import PlacedParticles, get_reader, read_mrc, read_particles
from vdamkit.notebook.static_view import static_figure
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.state import Poses


def poses_of(angles, offsets, classes=None) -> Poses:
    n = len(angles)
    classes = np.ones(n, np.int32) if classes is None else np.asarray(classes, np.int32)
    return Poses(np.array(angles, float), np.array(offsets, float), classes, np.linspace(0.1, 0.9, n).astype(np.float32),
                 np.zeros(n), np.zeros(n, np.int32), np.ones(n, np.int32), np.ones(n, np.float32))  # fmt: skip


def placed(coordinates, frames=None, priors=None, names=None) -> PlacedParticles:
    n = len(coordinates)
    frames = np.tile(np.eye(3), (n, 1, 1)) if frames is None else np.asarray(frames)
    priors = np.full((n, 3), np.nan) if priors is None else np.asarray(priors, float)
    return PlacedParticles(np.array(coordinates, float), frames, priors, np.array(names or ["T"] * n, object))


def layer(layers, kind, name=""):
    return next(item for item in layers if item[2] == kind and name in item[1]["name"])


def test_a_pose_worked_out_by_hand():
    """Tilt 90, psi 0 turns the particle's z axis to -x of its frame; a frame turned by 90° about z makes that -y.

    The centre is coordinate - A_sub origin: an origin of +10 Å along the frame's x is -10 Å along the tomogram's y.
    """
    frame = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # active turn by 90° about z
    particles = placed([[100.0, 200, 300]], [frame])
    points, vectors = particle_layers(particles, poses_of([[0, 90, 0]], [[10.0, 0, 0]]), "T", length=50)
    np.testing.assert_allclose(points[0], [[300, 190, 100]], atol=1e-9)  # zyx
    np.testing.assert_allclose(vectors[0][0], [[300, 190, 100], [0, -50, 0]], atol=1e-9)


def test_maps_as_surfaces_lie_where_the_maps_cross_their_thresholds():
    """Each blob of the hand becomes a closed surface about its centre, brightest towards the lamp; a flat map is left out."""
    layers = hand_layers()
    blobs = as_surfaces(layers)
    assert [options["name"] for _, options, _ in blobs] == [options["name"] for _, options, _ in layers]
    for (_, image, _), (data, options, kind), (centre, size) in zip(layers, blobs, BLOBS, strict=True):
        points, faces, brightness = zyx(data[0]), data[1], data[2]
        assert kind == "surface" and options["colormap"] == image["colormap"]
        radius = size / 1.5 * np.sqrt(2 * np.log(1 / image["iso_threshold"]))  # where a Gaussian of height 1 crosses it
        np.testing.assert_allclose(np.linalg.norm(points - centre, axis=1), radius, atol=0.1 * PIXEL)
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
        assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all(), "every edge belongs to two triangles"
        np.testing.assert_allclose(brightness, 0.5 + 0.4 * (points - centre) @ LIGHT / radius, atol=0.03)
    flat = (np.zeros((8, 8, 8), np.float32), layers[0][1], "image")
    points = (np.zeros((1, 3)), {"name": "particles"}, "points")
    assert as_surfaces([flat, points]) == [points]


def test_orientations_are_the_third_column_of_the_rotation():
    rng = np.random.default_rng(0)
    angles, frames = rng.uniform(0, 180, (20, 3)), euler_to_matrix(rng.uniform(0, 180, (20, 3)))
    particles = placed(rng.normal(size=(20, 3)) * 100, frames)
    vectors = layer(particle_layers(particles, poses_of(angles, np.zeros((20, 3))), "T", length=1.0), "vectors")[0]
    wanted = np.einsum("nij,nj->ni", frames, euler_to_matrix(angles)[:, :, 2])
    np.testing.assert_allclose(zyx(vectors[:, 1]), wanted, atol=1e-12)


def test_priors_of_a_sphere_picker_point_outwards(two_steps):
    """On a convex surface the outward normals of neighbours diverge: (x - x') · (n - n') > 0."""
    particles = two_steps.particles
    normals = prior_directions(particles)
    diverging = []
    for name in np.unique(particles.tomogram_names):
        mine = np.flatnonzero(particles.tomogram_names == name)
        x, n = particles.coordinates[mine], normals[mine]
        away = np.linalg.norm(x[:, None] - x, axis=-1) + 1e9 * np.eye(len(x))
        nearest = away.argmin(1)
        diverging += list(((x - x[nearest]) * (n - n[nearest])).sum(1) > 0)
    assert np.mean(diverging) > 0.9


def test_without_priors_there_is_no_prior_layer():
    kinds = [kind for _, _, kind in particle_layers(placed([[0, 0, 0]]), poses_of([[0, 0, 0]], [[0, 0, 0]]), "T")]
    assert kinds == ["points", "vectors"]


def test_colours_tell_classes_and_those_never_visited():
    particles = placed(np.zeros((3, 3)))
    points = particle_layers(particles, poses_of(np.zeros((3, 3)), np.zeros((3, 3)), [0, 1, 2]), "T")[0]
    colours = points[1]["face_color"]
    assert len(np.unique(colours, axis=0)) == 3
    assert np.ptp(colours[0, :3]) < 0.01, "never visited: grey"


def test_change_is_the_turn_since_before_modulo_symmetry():
    now, before = poses_of([[70.0, 30, 10]], np.zeros((1, 3))), poses_of([[0.0, 30, 10]], np.zeros((1, 3)))
    assert colour_values(now, "change", previous=before)[0] == pytest.approx(70)
    assert colour_values(now, "change", previous=before, symmetry="C6")[0] == pytest.approx(10)
    with pytest.raises(ValueError, match="coloured by one of"):
        colour_values(now, "height")


def test_map_layers_are_in_angstrom_about_the_box_centre():
    for (data, options, _), centre in zip(map_layers(hand_maps(), PIXEL), ((60, 0, 0), (0, 60, 0), (0, 0, 60)), strict=False):
        at = np.array(np.unravel_index(data.argmax(), data.shape)) * options["scale"] + options["translate"]
        np.testing.assert_allclose(zyx(at), centre, atol=PIXEL)


def test_the_lattice_map_lies_where_the_pose_puts_it():
    """A blob at 60 Å along x of the map: at the particle it is R (60, 0, 0) from the centre."""
    rng = np.random.default_rng(1)
    angles, frames = rng.uniform(0, 180, (3, 3)), euler_to_matrix(rng.uniform(0, 180, (3, 3)))
    centres = np.array([[0.0, 0, 0], [500, 0, 0], [0, 500, 100]])
    volume = hand_maps()[0]
    ((vertices, faces, values), options, kind),  = lattice_layers(
        placed(centres, frames), poses_of(angles, np.zeros((3, 3))), volume, PIXEL, "T", count=3, mask_diameter=220.0
    )  # fmt: skip
    assert kind == "surface" and "3 particles" in options["name"] and values.min() >= 0
    assert faces.max() == len(vertices) - 1
    copies, turns = zyx(vertices).reshape(3, -1, 3), euler_to_matrix(angles)
    for part, rotation, frame, centre in zip(copies, turns, frames, centres, strict=True):
        np.testing.assert_allclose(part.mean(0), centre + frame @ rotation @ [60, 0, 0], atol=3)


def test_the_surface_faces_outwards_and_is_cut_off():
    volume = hand_maps()[2]
    vertices, faces, normals = surface_of(volume, PIXEL, sigma=3.0, radius=120.0)
    out = vertices - vertices.mean(0)
    assert ((out * normals).sum(1) > 0).mean() > 0.98
    assert len(surface_of(volume, PIXEL, sigma=3.0, radius=20.0)[1]) == 0
    assert faces.min() == 0


def test_everything_of_a_session(two_steps):
    layers = layers_for(two_steps.state, two_steps.particles, two_steps.settings, paste=5, sigma=2.0)
    assert [kind for _, _, kind in layers["map"]] == ["image"]
    assert [kind for _, _, kind in layers["tomogram"]][:3] == ["points", "vectors", "vectors"]
    with pytest.raises(ValueError, match="there is no tomogram 'TS_99'"):
        layers_for(two_steps.state, two_steps.particles, two_steps.settings, tomogram="TS_99")


def test_the_picture_without_opengl_shows_the_right_hand():
    check_hand(imread(io.BytesIO(png(static_figure(hand_layers(), along=("z",))))))


def test_slices_show_the_right_hand():
    """xy: x right, y up; xz: z up; yz: z up. The blobs' places in the maps' own pixels."""
    from vdamkit.notebook.figures import map_figure

    figure = map_figure(hand_maps()[:1] + hand_maps()[1:2] * 2 + hand_maps()[2:3] * 3, PIXEL)
    blob = round(60 / PIXEL)
    for axis, wanted in zip(figure.axes[:3], (((1, 0), (2, 1)), ((1, 0), (3, 1)), ((2, 0), (3, 1))), strict=True):
        image = np.asarray(axis.images[0].get_array())
        assert axis.images[0].origin == "lower"
        for height, along in wanted:  # 1 at x, 2 at y, 3 at z
            at = (BOX // 2, BOX // 2 + blob) if along == 0 else (BOX // 2 + blob, BOX // 2)
            place = tuple(int((a + 0.5) * len(image) / BOX) for a in at)
            assert image[place] == pytest.approx(height, abs=0.3)


def test_napari_reads_what_the_session_writes(two_steps, tmp_path):
    """Points and vectors of run_itNNN_data.star are those of the session; the map is the map."""
    two_steps.branch().save(tmp_path / "job")
    star = next((tmp_path / "job").glob("run_it*_data.star"))
    read = get_reader(str(star))(str(star))
    name = str(two_steps.particles.tomogram_names[0])
    wanted = particle_layers(two_steps.particles, two_steps.state.poses, name)
    for data, _, kind in wanted:
        found = [item for item, options, k in read if k == kind and name in options["name"]]
        assert any(item.shape == data.shape and np.allclose(item, data, atol=0.02) for item in found), kind
    ((data, options, kind),) = read_mrc(tmp_path / "job" / "initial_model.mrc")
    np.testing.assert_allclose(data, two_steps.map, rtol=1e-5, atol=1e-6 * np.abs(two_steps.map).max())
    assert kind == "image" and options["scale"] == pytest.approx((16.0,) * 3)


def test_other_files_are_left_to_others(small_data, tmp_path):
    assert get_reader(str(small_data / "tomograms.star")) is None
    assert get_reader(str(tmp_path / "picture.tif")) is None
    with pytest.raises(Exception, match="rlnCenteredCoordinate"):
        (tmp_path / "bad.star").write_text("data_particles\nloop_\n_rlnTomoName\nTS_01\n")
        read_particles(tmp_path / "bad.star")
