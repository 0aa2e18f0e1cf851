"""Trilinear interpolation as a sparse operator, and the memory that it is made in."""

import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vdamkit.backend.kept import Scratch
from vdamkit.imaging.trilinear import corners, csr_rows, transposed


@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_corners_are_exact_for_linear_functions(seed):
    """Weights are positive, sum to 1, and reproduce the coordinate itself; negative x takes the mate."""
    at = np.random.default_rng(seed).uniform(-5, 5, (40, 3))
    indices, weights, sign = corners(np.ascontiguousarray(at.T), 6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    assert weights.min() >= 0
    z, rest = np.divmod(indices, 13 * 8)
    y, x = np.divmod(rest, 8)
    corner = np.stack([x, y - 6, z - 6], -1)
    np.testing.assert_allclose((weights[:, :, None] * corner).sum(1), at * sign[:, None], atol=1e-12)
    np.testing.assert_array_equal(sign, np.where(at[:, 0] < 0, -1, 1))


def test_scratch_changes_nothing():
    """Larger, smaller and of another precision, one after the other in the same memory."""
    rng, scratch = np.random.default_rng(0), Scratch()
    for n, real in ((30, np.float32), (70, np.float32), (50, np.float64), (20, np.float32)):
        at = rng.uniform(-5, 5, (3, n)).astype(real)
        for own, shared in zip(corners(at, 6), corners(at, 6, scratch), strict=True):
            assert own.dtype == shared.dtype
            np.testing.assert_array_equal(own, shared)


def test_scratch_is_used_again_but_by_its_own_thread():
    scratch = Scratch()
    first = scratch.empty("a", (6, 5), np.float32)
    assert np.shares_memory(first, scratch.empty("a", (3, 4), np.float32))
    assert not np.shares_memory(first, scratch.empty("b", (6, 5), np.float32))
    assert not np.shares_memory(first, scratch.empty("a", (6, 5), np.float64))
    found = []
    other = threading.Thread(target=lambda: found.append(scratch.empty("a", (6, 5), np.float32)))
    other.start()
    other.join()
    assert not np.shares_memory(first, found[0])


def test_a_sparse_matrix_and_its_transpose_share_their_arrays():
    rng = np.random.default_rng(1)
    indices, weights = rng.integers(0, 9, (40, 8)).astype(np.int32)[10:20], rng.random((40, 8))[10:20]
    matrix = csr_rows(indices, weights, 9)
    dense = np.zeros((10, 9))
    np.add.at(dense, (np.arange(10)[:, None], indices), weights)
    np.testing.assert_allclose(matrix.toarray(), dense)
    np.testing.assert_allclose(transposed(matrix).toarray(), dense.T)
    np.testing.assert_allclose(transposed(matrix) @ np.arange(10.0), dense.T @ np.arange(10))
    assert np.shares_memory(matrix.data, weights) and np.shares_memory(transposed(matrix).indices, indices)
