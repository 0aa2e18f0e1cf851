"""Tilt geometry: rotations, depths, and reading tomograms.star."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import make_project
from scipy.spatial.transform import Rotation

from vdamkit.errors import InputError
from vdamkit.io.tilt_geometry import projection_rotation, read_tomograms

REFERENCE = Path(__file__).parents[2].parent / "shared" / "relion_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="RELION reference data not there")


def test_projection_rotation_is_active_zyx():
    angles = np.random.default_rng(1).uniform(-180, 180, (4, 5, 3))
    expected = Rotation.from_euler("ZYX", angles.reshape(-1, 3), degrees=True).as_matrix()
    found = projection_rotation(angles[..., 2], angles[..., 1], angles[..., 0])
    assert found.shape == (4, 5, 3, 3)
    np.testing.assert_allclose(found.reshape(-1, 3, 3), expected, atol=1e-12)


def test_projection_rotation_hand_and_broadcasting():
    # Rz turns x towards y; tilting about y by +90 brings x onto -z and z onto x
    np.testing.assert_allclose(projection_rotation(0, 0, 90) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(projection_rotation(0, 90, 0) @ [0, 0, 1], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(projection_rotation(90, 0, 0) @ [0, 1, 0], [0, 0, 1], atol=1e-12)
    assert projection_rotation(0, np.zeros(7), 3.0).shape == (7, 3, 3)


def test_defaults_of_missing_columns(tmp_path):
    project = make_project(tmp_path)
    for column in ("rlnTomoXTilt", "rlnCtfScalefactor"):
        project.drop("tilt_series/01.star", "01", column)
    project.drop("tomograms.star", "global", "rlnOpticsGroupName")
    project.write()
    tomogram = read_tomograms(tmp_path / "tomograms.star")["01"]
    assert (tomogram.defocus_slope, tomogram.b_factor_per_dose, tomogram.optics_group_name) == (1, 0, "")
    assert (tomogram.phase_shift == 0).all() and (tomogram.ctf_scale == 1).all()
    np.testing.assert_allclose(tomogram.rotations, projection_rotation(0, [-40, -20, 0, 20, 40], 85))
    assert tomogram.n_tilts == 5 and tomogram.hand == -1
    np.testing.assert_array_equal(tomogram.size, [400, 300, 101])


def test_depth_of_a_point_above_the_centre(tmp_path):
    make_project(tmp_path).write()
    tomogram = read_tomograms(tmp_path / "tomograms.star")["TS_2"]
    y_tilt, x_tilt = np.radians([-30, 0, 30, 60]), np.radians(1)
    np.testing.assert_allclose(tomogram.depths([0, 0, 50.0]), 50 * np.cos(y_tilt) * np.cos(x_tilt))
    np.testing.assert_allclose(tomogram.depths([50.0, 0, 0]), -50 * np.sin(y_tilt), atol=1e-9)
    points = np.random.default_rng(2).normal(size=(2, 6, 3))
    looped = [[tomogram.depths(point) for point in row] for row in points]
    np.testing.assert_allclose(tomogram.depths(points), looped, atol=1e-9)


def test_relion4_matrices_give_the_same_depths(tmp_path):
    project = make_project(tmp_path)
    table = project.stars["tilt_series/01.star"]["01"]
    matrices = np.tile(np.eye(4), (5, 1, 1))
    matrices[:, :3, :3] = projection_rotation(1, table["rlnTomoYTilt"], table["rlnTomoZRot"])
    matrices[:, :3, 3] = [10.0, 20.0, 30.0]
    for row, axis in enumerate("XYZW"):
        table[f"rlnTomoProj{axis}"] = [f"[{','.join(f'{v:.12g}' for v in m[row])}]" for m in matrices]
    project.write()
    first = read_tomograms(tmp_path / "tomograms.star")["01"]
    project.drop("tilt_series/01.star", "01", *[f"rlnTomoProj{axis}" for axis in "XYZW"])
    project.write()
    second = read_tomograms(tmp_path / "tomograms.star")["01"]
    assert second.projection is None
    np.testing.assert_allclose(first.projection, matrices, atol=1e-10)
    np.testing.assert_allclose(first.rotations, second.rotations, atol=1e-10)
    np.testing.assert_allclose(first.depths([3, -40, 50]), second.depths([3, -40, 50]), atol=1e-8)


def test_relion4_tables_inside_tomograms_star(tmp_path):
    project = make_project(tmp_path)
    project.drop("tomograms.star", "global", "rlnTomoTiltSeriesStarFile")
    for name in ("01", "TS_2"):
        project.stars["tomograms.star"][name] = project.stars[f"tilt_series/{name}.star"][name]
    project.write()
    assert [t.n_tilts for t in read_tomograms(tmp_path / "tomograms.star").values()] == [5, 4]


def test_single_block_of_another_name_and_selection(tmp_path):
    project = make_project(tmp_path)
    series = project.stars["tilt_series/01.star"]
    series["other"] = series.pop("01")
    project.raw["tilt_series/TS_2.star"] = b"broken"  # must not be opened
    project.write()
    found = read_tomograms(tmp_path / "tomograms.star", names={"01"})
    assert list(found) == ["01"] and found["01"].n_tilts == 5


def test_two_blocks_of_other_names(tmp_path):
    project = make_project(tmp_path)
    series = project.stars["tilt_series/01.star"]
    series["1"] = series.pop("01")
    series["b"] = pd.DataFrame({"rlnAngle": [1.0]})
    project.write()
    with pytest.raises(InputError, match=r"01\.star: no block data_01 \(found: data_1, data_b\)"):
        read_tomograms(tmp_path / "tomograms.star")


@needs_reference
def test_reference_tomograms():
    tomograms = read_tomograms(REFERENCE / "tomograms.star")
    assert list(tomograms) == ["TS_01", "TS_43"]
    assert [t.n_tilts for t in tomograms.values()] == [40, 41]
    first = tomograms["TS_01"]
    assert first.hand == -1 and first.pixel_size == pytest.approx(8.1)
    assert first.dose[0] == pytest.approx(114) and first.ctf_scale[0] == pytest.approx(0.544639)
    eye = np.einsum("fij,fkj->fik", first.rotations, first.rotations)
    np.testing.assert_allclose(eye, np.broadcast_to(np.eye(3), eye.shape), atol=1e-12)
