"""Trilinear interpolation in the half cube kx >= 0 of a transform, as a sparse operator.

It takes over a hundred bytes for each point. Fresh memory costs more, page by page, than the arithmetic in it, so that a thread
that makes one operator after the other does so in the same memory (:class:`vdamkit.backend.kept.Scratch`).
"""

from __future__ import annotations

import sys
from copy import copy
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.sparse

from vdamkit.backend.kept import Scratch


def corners(
    coordinates: np.ndarray, half_width: int, scratch: Scratch | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Corners and weights of trilinear interpolation in the half cube kx >= 0.

    Parameters
    ----------
    coordinates: `(3, n)` float, rows x, y, z in voxels of the cube.
    half_width: the cube spans ±half_width in y and z, and 0 … half_width + 1 in x.
    scratch: where the result lies, if it need not last.

    Returns
    -------
    indices `(n, 8)` int32 into the flattened zyx cube, weights `(n, 8)`, sign `(n,)`: -1 where the Friedel mate was
    taken, so that the imaginary part changes sign.
    """
    n, dtype = coordinates.shape[1], coordinates.dtype
    scratch = scratch or Scratch()
    base, fraction, sign = _cells(coordinates, half_width, scratch)
    rest = np.subtract(1, fraction, out=scratch.empty("rest", (3, n), dtype))
    indices, weights = scratch.empty("indices", (n, 8), np.int32), scratch.empty("weights", (n, 8), dtype)
    # neighbours along x are written in pairs: one 64-bit sum holds both 32-bit indices
    pair, pairs = np.int64(2**32 + 1), indices.view(np.int64)
    base *= pair
    base += np.int64(2**32 if sys.byteorder == "little" else 1)
    _, row, plane = _steps(half_width)
    weight = scratch.empty("weight", (n,), dtype)
    for j, offset in enumerate((0, row, plane, plane + row)):
        np.multiply((fraction if j >= 2 else rest)[2], (fraction if j % 2 else rest)[1], out=weight)
        np.multiply(weight, rest[0], out=weights[:, 2 * j])
        np.multiply(weight, fraction[0], out=weights[:, 2 * j + 1])
        np.add(base, offset * pair, out=pairs[:, j])
    return indices, weights, sign


def _cells(coordinates: np.ndarray, half_width: int, scratch: Scratch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells in which points lie: place of the first corner `(n,)` int64, how far beyond it `(3, n)`, Friedel sign `(n,)`."""
    n, dtype = coordinates.shape[1], coordinates.dtype
    sign, base = scratch.empty("sign", (n,), dtype), scratch.empty("base", (n,), np.int64)
    at, floor = scratch.empty("at", (3, n), dtype), scratch.empty("floor", (3, n), dtype)
    sign[:] = 1
    np.negative(sign, out=sign, where=coordinates[0] < 0)
    np.multiply(coordinates, sign, out=at)
    np.floor(at, out=floor)
    at -= floor
    step = _steps(half_width)
    base[:] = half_width * (step[1] + step[2])
    whole = scratch.empty("whole", (n,), np.int32)
    for values, stride in zip(floor, step, strict=True):
        np.copyto(whole, values, casting="unsafe")
        whole *= np.int32(stride)
        base += whole
    return base, at, sign


def _steps(half_width: int) -> tuple[int, int, int]:
    """To the next voxel along x, y and z, in a flattened half cube."""
    row = half_width + 2
    return 1, row, row * (2 * half_width + 1)


def csr_rows(indices: np.ndarray, weights: np.ndarray, n_columns: int) -> Any:
    """Sparse matrix with the same number of entries in every row; it shares the arrays."""
    n, per_row = indices.shape
    out = _empty(scipy.sparse.csr_matrix, n, n_columns, weights.dtype)
    out.data, out.indices = weights.ravel(), indices.ravel()
    out.indptr = np.arange(0, n * per_row + 1, per_row, dtype=np.int32)
    return out


def transposed(matrix: Any) -> Any:
    """The transpose of a CSR matrix, which shares its arrays (`matrix.T` copies views of larger ones)."""
    out = _empty(scipy.sparse.csc_matrix, *matrix.shape[::-1], matrix.dtype)
    out.data, out.indices, out.indptr = matrix.data, matrix.indices, matrix.indptr
    return out


def _empty(kind: Any, n_rows: int, n_columns: int, dtype: Any) -> Any:
    """A matrix whose arrays are still to be given to it. The constructor would copy those that are views of larger ones."""
    return copy(_template(kind, n_rows, n_columns, dtype))


@lru_cache(maxsize=32)
def _template(kind: Any, n_rows: int, n_columns: int, dtype: Any) -> Any:
    return kind((n_rows, n_columns), dtype=dtype)
