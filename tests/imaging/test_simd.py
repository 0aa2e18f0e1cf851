"""Short vectors in compiled functions, against NumPy."""

import numpy as np
import pytest

pytest.importorskip("numba", reason="the extra [fast] is not installed")
from numba import njit

from vdamkit.imaging.simd import BYTES, fused, load, scaled, store, summed, swapped, zeros


@njit
def combined(a, b, number, out):
    """Writes b + a number, then a b, then a with neighbours exchanged, then zeros; returns the sum of a."""
    lanes = BYTES // a.itemsize
    x, y = load(a, 3), load(b, 1)
    store(out, 1, fused(x, number, y))
    store(out, 1 + lanes, scaled(x, y))
    store(out, 1 + 2 * lanes, swapped(x))
    store(out, 1 + 3 * lanes, zeros(a))
    return summed(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_are_read_combined_and_written_where_they_should(dtype):
    """At places that no vector begins at by itself; nothing beside them is touched."""
    lanes = BYTES // np.dtype(dtype).itemsize
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 5, lanes)).astype(dtype)
    out = np.full(4 * lanes + 2, np.nan, dtype)
    total = combined(a, b, dtype(1.7), out)
    x, y = a.ravel()[3 : 3 + lanes], b.ravel()[1 : 1 + lanes]
    wanted = [y + x * dtype(1.7), x * y, x.reshape(-1, 2)[:, ::-1].ravel(), np.zeros(lanes)]
    np.testing.assert_allclose(out[1:-1], np.concatenate(wanted), rtol=1e-6 if dtype == np.float32 else 1e-14, atol=1e-7)
    assert np.isnan(out[[0, -1]]).all()
    assert total == pytest.approx(x.sum(dtype=np.float64), abs=1e-5 if dtype == np.float32 else 1e-13)
