"""Rotating a reference and its adjoint: the only two primitives that move between frames.

A rotation ``A = Rz(psi) · D`` (D: everything but psi) is done in two steps.

*Tilt*: the map, zero-padded twice and transformed, is sampled by trilinear interpolation on a cylinder of integer
voxels in the frame of D. That costs some 100 ns a voxel, but is shared by all psi of one direction.

*Spin*: psi turns every plane kz = const in the same way, so one small sparse matrix (4 × 4 taps, least-squares
weights for an object that fills 60 % of the box) turns all planes at once, at 5 ns a voxel.

Against an exact Fourier transform the two together differ by 6 % (relative L2, a 230 Å mask in a 40 × 8.1 Å box);
direct trilinear interpolation without padding, RELION's choice in this job, by 13 %.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft

from vdamkit.backend import Backend, get_backend
from vdamkit.imaging.halfball import half_ball

PAD = 2  # real-space padding of the sampled transform
TAPS = 4  # taps per axis of the in-plane interpolation
PASSBAND = 0.30  # of the box: extent (±) for which the in-plane weights are optimal


def trilinear(coordinates: np.ndarray, half_width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners and weights of trilinear interpolation in the half cube kx >= 0.

    Parameters
    ----------
    coordinates: `(n, 3)` float xyz in voxels of the cube.
    half_width: the cube spans ±half_width in y and z, and 0 … half_width + 1 in x.

    Returns
    -------
    indices `(n, 8)` int32 into the flattened zyx cube, weights `(n, 8)`, sign `(n,)`: -1 where the Friedel mate was
    taken, so that the imaginary part changes sign.
    """
    dtype = coordinates.dtype
    sign = np.where(coordinates[:, 0] < 0, dtype.type(-1), dtype.type(1))
    x, y, z = np.ascontiguousarray(coordinates.T) * sign
    width, row = 2 * half_width + 1, half_width + 2
    corner, parts = [], []
    for axis, offset in ((x, 0), (y, half_width), (z, half_width)):
        floor = np.floor(axis)
        corner.append(floor.astype(np.int32) + offset)
        parts.append(axis - floor)
    base = (corner[2] * width + corner[1]) * row + corner[0]
    fx, fy, fz = parts
    gx, gy, gz = 1 - fx, 1 - fy, 1 - fz
    indices = np.empty((len(x), 8), np.int32)
    weights = np.empty((len(x), 8), dtype)
    planes = ((gz * gy, 0), (gz * fy, row), (fz * gy, row * width), (fz * fy, row * width + row))
    for j, (weight, offset) in enumerate(planes):
        np.multiply(weight, gx, out=weights[:, 2 * j])
        np.multiply(weight, fx, out=weights[:, 2 * j + 1])
        np.add(base, offset, out=indices[:, 2 * j])
        np.add(base, offset + 1, out=indices[:, 2 * j + 1])
    return indices, weights, sign


def csr_rows(backend: Backend, indices: np.ndarray, weights: np.ndarray, n_columns: int) -> Any:
    """Sparse matrix with the same number of entries in every row."""
    n, per_row = indices.shape
    pointer = np.arange(0, n * per_row + 1, per_row, dtype=np.int32)
    xp = backend.xp
    parts = tuple(xp.asarray(a) for a in (weights.ravel(), indices.ravel(), pointer))
    return backend.sparse.csr_matrix(parts, shape=(n, n_columns))


class PaddedGrid:
    """A map of side `box` as its twice-padded Fourier transform on a half cube of ``|K| <= PAD * radius + margin``.

    `from_map` and `to_map` are adjoint (up to the factor 2 box³ of Friedel mates and Parseval's theorem); both undo the
    apodisation of trilinear interpolation, sinc² along each axis.
    """

    def __init__(self, box: int, radius: float, dtype=np.float32):
        self.box, self.dtype = box, np.dtype(dtype)
        self.half_width = int(np.ceil(PAD * radius)) + 1
        self.shape = (2 * self.half_width + 1, 2 * self.half_width + 1, self.half_width + 2)
        self.size = int(np.prod(self.shape))
        taper = np.sinc((np.arange(box) - box // 2) / (PAD * box)) ** 2
        self._apodisation = taper[:, None, None] * taper[None, :, None] * taper[None, None]
        yz = np.arange(-self.half_width, self.half_width + 1) % (PAD * box)
        self._at = np.ix_(yz, yz, np.arange(self.half_width + 2) % (PAD * box))

    def _window(self) -> tuple[slice, ...]:
        start = PAD * self.box // 2 - self.box // 2
        return (slice(start, start + self.box),) * 3

    def from_map(self, volume: np.ndarray) -> np.ndarray:
        """Flattened half cube `(size, 2)` (real, imaginary) of a map `(box,)*3` zyx; scaled by 1/box³."""
        padded = np.zeros((PAD * self.box,) * 3, self.dtype)
        padded[self._window()] = volume / self._apodisation / self.box**3
        transform = scipy.fft.fftn(np.fft.ifftshift(padded))[self._at]
        return np.ascontiguousarray(transform).view(self.dtype).reshape(self.size, 2)

    def to_map(self, cube: np.ndarray) -> np.ndarray:
        """Map `(box,)*3` of sums scattered into the half cube (complex, flattened or `shape`); each entry also stands
        for its Friedel mate. Scaled so that its :func:`map_to_fourier` gives sums per voxel of the map's own grid."""
        side = PAD * self.box
        folded = cube.reshape(self.shape)
        for axis in (0, 1):  # beyond the padded grid's Nyquist frequency the half cube wraps round
            at = np.arange(-self.half_width, self.half_width + 1) % side
            wide = np.moveaxis(folded, axis, 0)
            out = np.zeros((side, *wide.shape[1:]), cube.dtype)
            for part in (slice(0, side), slice(side, None)):
                out[at[part]] += wide[part]
            folded = np.moveaxis(out, 0, axis)
        # axis by axis, cutting the window out after each, so that later axes have fewer lines
        window = (np.arange(self.box) - self.box // 2) % side
        out = scipy.fft.ifft(folded, side, axis=2)[:, :, window]
        for axis in (1, 0):
            out = np.take(scipy.fft.ifft(out, axis=axis), window, axis=axis)
        return out.real / self._apodisation * (2 * PAD**3 * self.box**3)


def _least_squares_taps(fraction: np.ndarray) -> np.ndarray:
    """Weights `(n, TAPS)` that interpolate at `fraction` best for signals within ±PASSBAND of the box.

    Minimises the mean square of ``exp(2 pi i x f) - sum_j w_j exp(2 pi i x j)`` over |x| < PASSBAND.
    """
    taps = np.arange(TAPS) - (TAPS // 2 - 1)
    gram = np.sinc(2 * PASSBAND * (taps[:, None] - taps)) + 1e-6 * np.eye(TAPS)
    return np.linalg.solve(gram, np.sinc(2 * PASSBAND * (fraction[:, None] - taps)).T).T


@lru_cache(maxsize=1)
def _mean_absolute_sum() -> float:
    """Mean over all positions of the sum of absolute in-plane weights (their plain sum is about 1)."""
    return float(np.abs(_least_squares_taps((np.arange(256) + 0.5) / 256)).sum(1).mean() ** 2)


class Projector:
    """Rotates references of side `box` into half-balls of `radius`, and scatters half-balls back.

    Parameters
    ----------
    box: side of the map, px. radius: of the half-ball, px, at most box//2.
    dtype: of the real parts (float32, or float64 for tests). backend: where the arrays live.
    """

    def __init__(self, box: int, radius: int, dtype=np.float32, backend: Backend | None = None):
        self.box, self.radius, self.dtype = box, radius, np.dtype(dtype)
        self.complex = np.complex64 if self.dtype == np.float32 else np.complex128
        self.backend = backend or get_backend("cpu", 1)
        self.ball = half_ball(radius)
        margin = TAPS // 2
        self.width = 2 * (radius + margin) + 1
        self.grid = PaddedGrid(box, radius + margin + 0.5, dtype)
        line = np.arange(self.width) - self.width // 2
        y, x, z = np.meshgrid(line, line, np.arange(radius), indexing="ij")
        rho = np.maximum(np.hypot(x, y) - 0.75 * margin, 0)
        needed = rho * rho + z * z < radius * radius
        self._source = np.flatnonzero(needed)
        self._source_k = np.stack([x, y, z], -1)[needed].astype(np.float64)
        line = np.arange(-radius + 1, radius)
        ky, kx = np.meshgrid(line, line, indexing="ij")
        disc = kx * kx + ky * ky < radius * radius
        self._disc = np.stack([kx[disc], ky[disc]], -1)
        row = np.full((len(line), len(line)), -1)
        row[disc] = np.arange(len(self._disc))
        k = self.ball.k
        self._ball_at = row[k[:, 1] + radius - 1, k[:, 0] + radius - 1] * radius + k[:, 2]
        self._spins: dict[float, Any] = {}

    # reference preparation ------------------------------------------------------------------------------------

    def prepare(self, volume: np.ndarray) -> Any:
        """Padded transform of a map `(box,)*3` zyx, on the back-end's device."""
        return self.backend.xp.asarray(self.grid.from_map(volume))

    # tilt: one direction, every psi -----------------------------------------------------------------------------

    def tilt_matrix(self, direction: np.ndarray) -> tuple[Any, Any]:
        """Sparse operator (and Friedel signs) of the part ``D`` `(3, 3)` of a rotation ``Rz(psi) @ D``."""
        at = (self._source_k @ (PAD * direction)).astype(self.dtype)
        indices, weights, sign = trilinear(at, self.grid.half_width)
        return csr_rows(self.backend, indices, weights, self.grid.size), self.backend.xp.asarray(sign)

    def tilt(self, reference: Any, matrix: tuple[Any, Any]) -> Any:
        """The reference on the cylinder of one direction, `(width², radius * 2)`."""
        operator, sign = matrix
        values = operator @ reference
        values[:, 1] *= sign
        slab = self.backend.xp.zeros((self.width**2 * self.radius, 2), self.dtype)
        slab[self._source] = values
        return slab.reshape(self.width**2, self.radius * 2)

    def tilt_adjoint(self, slab: Any, matrix: tuple[Any, Any], weight: Any | None = None) -> Any:
        """Adjoint of :meth:`tilt`: `(width², radius * 2)` → `(grid.size, 2)`.

        With `weight` `(width², radius)`, which has no phase, a third column: its own scattered sums.
        """
        operator, sign = matrix
        values = self.backend.xp.empty((len(self._source), 2 if weight is None else 3), self.dtype)
        values[:, :2] = slab.reshape(-1, 2)[self._source]
        values[:, 1] *= sign
        if weight is not None:
            values[:, 2] = weight.reshape(-1)[self._source]
        return operator.T @ values

    # spin: psi ----------------------------------------------------------------------------------------------------

    def spin_matrix(self, psi: float) -> tuple[Any, Any]:
        """Sparse operator of the turn by `psi` degrees, and the one of its absolute values; kept for the grids' angles."""
        if psi not in self._spins:
            if len(self._spins) > 1024:
                self._spins.clear()
            c, s = np.cos(np.radians(psi)), np.sin(np.radians(psi))
            at = self._disc @ np.array([[c, s], [-s, c]])  # A^T k with A = Rz'(psi), passive
            floor = np.floor(at).astype(np.int64)
            wx, wy = (_least_squares_taps(at[:, j] - floor[:, j]) for j in (0, 1))
            first = floor - (TAPS // 2 - 1) + self.width // 2
            taps = np.arange(TAPS)
            columns = (first[:, 1, None] + taps)[:, :, None] * self.width + (first[:, 0, None] + taps)[:, None, :]
            weights = (wy[:, :, None] * wx[:, None, :]).astype(self.dtype).reshape(len(at), -1)
            columns = columns.reshape(len(at), -1).astype(np.int32)
            absolute = np.abs(weights) / _mean_absolute_sum()
            self._spins[psi] = tuple(
                csr_rows(self.backend, columns, values.astype(self.dtype), self.width**2) for values in (weights, absolute)
            )
        return self._spins[psi]

    def spin(self, slab: Any, psi: float) -> Any:
        """The reference turned by psi on the half-ball, `(n,)` complex."""
        plane = self.spin_matrix(psi)[0] @ slab
        return plane.view(self.complex).reshape(-1)[self._ball_at]

    def spin_adjoint(self, values: Any, psi: float) -> Any:
        """Adjoint of :meth:`spin`: `(n,)` complex → cylinder `(width², radius * 2)`."""
        plane = self.backend.xp.zeros(len(self._disc) * self.radius, self.complex)
        plane[self._ball_at] = values
        return self.spin_matrix(psi)[0].T @ plane.view(self.dtype).reshape(len(self._disc), -1)

    def spread_weight(self, weight: Any, psi: float) -> Any:
        """Sums of weights `(n,)` real over the voxels they bear on: cylinder `(width², radius)`.

        As :meth:`spin_adjoint`, but with the absolute values of the taps. Some taps are negative; dividing by their plain
        sums would blow up where strong neighbours cancel a weak voxel's own weight. Absolute sums make the division a
        Jacobi preconditioner that bounds every step; they are scaled to be right on average.
        """
        plane = self.backend.xp.zeros(len(self._disc) * self.radius, self.dtype)
        plane[self._ball_at] = weight
        return self.spin_matrix(psi)[1].T @ plane.reshape(len(self._disc), -1)

    # both, for any rotation --------------------------------------------------------------------------------------

    def rotate(self, reference: Any, rotation: np.ndarray) -> Any:
        """Values of the rotated reference on the half-ball: ``reference(A^T k)``, `(n,)` complex.

        `reference` from :meth:`prepare`; `rotation` `(3, 3)` as :func:`euler_to_matrix` gives it.
        Source: RELION projector.cpp:rotate3D (trilinear there, see the module's text).
        """
        direction, psi = split_spin(rotation)
        return self.spin(self.tilt(reference, self.tilt_matrix(direction)), psi)

    def adjoint(self, rotation: np.ndarray, values: Any) -> Any:
        """Adjoint of :meth:`rotate` (as a real-linear map): `(n,)` complex → padded half cube `(grid.size, 2)`."""
        direction, psi = split_spin(rotation)
        return self.tilt_adjoint(self.spin_adjoint(values, psi), self.tilt_matrix(direction))

    def scatter(self, rotation: np.ndarray, values: Any, weight: Any) -> Any:
        """:meth:`adjoint` of `values` and, as a third column, the sums of `weight`: `(grid.size, 3)`."""
        direction, psi = split_spin(rotation)
        matrix = self.tilt_matrix(direction)
        return self.tilt_adjoint(self.spin_adjoint(values, psi), matrix, self.spread_weight(weight, psi))


def split_spin(rotation: np.ndarray) -> tuple[np.ndarray, float]:
    """``rotation = Rz'(psi) @ direction`` with direction of zero psi; psi in degrees."""
    from vdamkit.sampling.euler import euler_to_matrix, matrix_to_euler

    rot, tilt, psi = matrix_to_euler(rotation)
    return euler_to_matrix([rot, tilt, 0.0]), float(psi)


@lru_cache(maxsize=16)
def get_projector(box: int, radius: int, dtype: str, backend: Backend) -> Projector:
    """A projector shared by everyone who asks for the same box, radius, precision and back-end."""
    return Projector(box, radius, np.dtype(dtype), backend)
