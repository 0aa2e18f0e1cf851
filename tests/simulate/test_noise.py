"""Where the variances of signal and noise are compared."""

import numpy as np
from scipy.spatial import cKDTree

from vdamkit.simulate.noise import near_any


def test_pixels_near_points_are_those_a_search_finds():
    points = np.random.default_rng(0).uniform(-15, 70, (25, 2))
    points[:3] = [[4, 5], [-8, 20], [20, 60]]  # whole pixels, on which distances equal the radius
    pixels = np.indices((40, 60))[::-1].reshape(2, -1).T
    expected = cKDTree(points).query(pixels)[0].reshape(40, 60) < 8
    np.testing.assert_array_equal(near_any(points, 8, (40, 60)), expected)
