"""Tilt geometry against direct calculation."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vdamkit.io.tilt_geometry import read_tomograms
from vdamkit.simulate.output import write_tilt_series
from vdamkit.simulate.scene import Scene
from vdamkit.simulate.tilt_series import dose_symmetric_order, make_tilt_series, read_tilt_series


def series(tilts=7, **options):
    defaults = {"name": "TS_01", "size": (96, 80, 40), "pixel_size": 10.0, "defocus": 30000.0}
    return make_tilt_series(np.random.default_rng(0), tilts=tilts, **defaults | options)


def test_exposures_alternate_around_zero():
    np.testing.assert_array_equal(dose_symmetric_order(7), [6, 3, 2, 0, 1, 4, 5])
    assert sorted(dose_symmetric_order(10)) == list(range(10))


def test_a_point_projects_as_relion_says():
    one = series()
    point = np.array([[120.0, -55.0, 80.0]])
    positions, depths = one.project(point)
    for tilt, row in one.table.iterrows():
        rotation = Rotation.from_euler("yz", [row["rlnTomoYTilt"], row["rlnTomoZRot"]], degrees=True)
        x, y, z = rotation.apply(point[0])
        expected = [48 + (x + row["rlnTomoXShiftAngst"]) / 10, 40 + (y + row["rlnTomoYShiftAngst"]) / 10]
        np.testing.assert_allclose(positions[tilt, 0], expected)
        assert depths[tilt, 0] == pytest.approx(z)


def test_written_series_are_read_back_the_same(tmp_path):
    one = series()
    scene = Scene(one, None, np.arange(0), np.zeros((0, 3)), np.zeros((0, 3, 3)), False)
    path = write_tilt_series(tmp_path, [scene])
    found, as_reader = read_tilt_series(path)["TS_01"], read_tomograms(path)["TS_01"]
    np.testing.assert_allclose(found.rotations, one.rotations, atol=1e-9)
    np.testing.assert_allclose(as_reader.rotations, one.rotations, atol=1e-9)
    np.testing.assert_allclose(as_reader.dose, one.table["rlnMicrographPreExposure"])
    point = np.array([[100.0, -50.0, 70.0]])
    np.testing.assert_allclose(as_reader.depths(point)[0], one.project(point)[1][:, 0], atol=1e-6)
    assert found.size == one.size
