"""From a particle on disc to its half-ball: the one representation for 2D stacks and 3D pseudo-subtomograms.

Either kind becomes ``b`` (sum over tilts of CTF × image) and ``w`` (sum over tilts of CTF²): the sufficient statistics of
the Gaussian model, still to be divided by the noise variance of each shell. ``b`` exists masked (E-step, noise) and
unmasked (gradient), as in RELION (ml_optimiser.cpp:getFourierTransformsAndCtfs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft

from vdamkit.backend.device import HOST, Device
from vdamkit.backend.kept import SCRATCH
from vdamkit.imaging.ctf import ctf, dose_envelope
from vdamkit.imaging.halfball import HalfBall, gather_half_ball, half_ball
from vdamkit.imaging.masks import blend_outside, soft_sphere
from vdamkit.imaging.projector import PAD, PaddedGrid, waves
from vdamkit.imaging.trilinear import corners, csr_rows, transposed
from vdamkit.io.particle import Optics, TiltStack, Volume

WEIGHT_FLOOR = 1e-3  # of the shell mean: below it a voxel of a pseudo-subtomogram counts as not measured
MULTIPLICITY_FLOOR = 0.01  # RELION --subtomo_multi_thr


@dataclass(frozen=True)
class ImagingOptions:
    """What the conversion needs to know of the job."""

    box: int  # px, of the model
    pixel_size: float  # Å, of the model
    radius: int  # px, half-ball to fill
    mask_diameter: float  # Å
    correct_ctf: bool = True
    intact_first_peak: bool = False
    grey_scale: float = 1.0  # every image is multiplied by it
    dtype: str = "float32"


@dataclass(frozen=True)
class HalfBallParticle:
    """A particle on ``|k| < radius``: arrays over the voxels of :func:`half_ball`."""

    radius: int
    masked: np.ndarray  # (n,) complex: b of the masked images
    unmasked: np.ndarray  # (n,) complex: b of the images as they are
    weight: np.ndarray  # (n,) float: w

    def crop(self, radius: int) -> HalfBallParticle:
        """The same particle on a half-ball of no larger radius (a view)."""
        n = len(half_ball(radius))
        return HalfBallParticle(radius, self.masked[:n], self.unmasked[:n], self.weight[:n])

    @property
    def nbytes(self) -> int:
        return self.masked.nbytes + self.unmasked.nbytes + self.weight.nbytes


def to_half_ball(particle: TiltStack | Volume, options: ImagingOptions) -> HalfBallParticle:
    """Half-ball of either kind of particle; see the module's text."""
    convert = _from_stack if isinstance(particle, TiltStack) else _from_volume
    return convert(particle, options)


def _finish(b: list[np.ndarray], w: np.ndarray, options: ImagingOptions) -> HalfBallParticle:
    real = np.dtype(options.dtype)
    kind = np.complex64 if real == np.float32 else np.complex128
    masked, unmasked = ((values * options.grey_scale).astype(kind) for values in b)
    return HalfBallParticle(options.radius, masked, unmasked, w.astype(real))


# 2D stacks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """Half-plane samples of a padded image; (n,) of them."""

    rows: np.ndarray  # (n,) ky and
    columns: np.ndarray  # (n,) kx of each, as indices into the transform below
    frequencies: np.ndarray  # (n, 2) xy, 1/Å
    at: np.ndarray  # (3, n) xyz, where they lie in the model's padded grid
    along_y: np.ndarray  # (ky, box) complex, transform of a column
    along_x: np.ndarray  # (box, 2 kx) real: of a row, real and imaginary parts interleaved


@lru_cache(maxsize=16)
def sample_plane(box: int, pixel_size: float, model_box: int, model_pixel_size: float, dtype: str) -> Plane:
    """Samples of an image of one optics group that the insertion grid of the model has room for."""
    model_extent, limit, n = model_box * model_pixel_size, PAD * model_box / 2 - 1, PAD * box
    ky, kx = np.meshgrid(np.arange(-n // 2 + 1, n // 2), np.arange(n // 2), indexing="ij")
    k = np.stack([kx, ky], -1)
    position = k * (model_extent / (box * pixel_size))
    keep = ((position**2).sum(-1) < limit**2) & ((k**2).sum(-1) < (n // 2 - 1) ** 2)
    keep &= ~((kx == 0) & (ky < 0))  # the mate of a listed sample
    rows, columns = np.nonzero(keep)
    at = np.concatenate([position[keep].T, np.zeros((1, len(rows)))])
    low, high = rows.min(), rows.max() + 1
    pixels = np.arange(box) - box // 2
    along_y = waves(ky[low:high, 0], pixels, n, dtype) / box**2
    along_x = np.ascontiguousarray(waves(np.arange(columns.max() + 1), pixels, n, dtype).T).view(dtype)
    return Plane(rows - low, columns, k[keep] / (n * pixel_size), at, along_y, along_x)


def stack_ctf(
    stacks: Sequence[TiltStack], frequencies: np.ndarray, options: ImagingOptions, device: Device = HOST
) -> Any:  # fmt: skip
    """CTF × dose envelope of every tilt of some stacks at `frequencies` `(n, 2)` in 1/Å; `(tilts of all, n)` float64.

    The stacks share `b_factor_per_dose` and whether their CTF is corrected already. All ones without CTF correction.
    device: where it is computed, and where the result lies.
    Source: RELION ml_optimiser.cpp:getFourierTransformsAndCtfs, ctf.h:getCTF.
    """
    if not options.correct_ctf or stacks[0].optics.ctf_corrected:
        return device.xp.ones((sum(len(stack.images) for stack in stacks), len(frequencies)))

    def per_tilt(name: str) -> Any:
        return device.put(np.concatenate([getattr(stack, name) for stack in stacks])[:, None])

    def per_stack(name: str) -> Any:
        values = [getattr(stack.optics, name) for stack in stacks]
        return values[0] if len(set(values)) == 1 else device.put(np.repeat(values, [len(s.images) for s in stacks])[:, None])

    fx, fy = device.put(frequencies).T
    transfer = ctf(
        fx, fy, **{name: per_tilt(name) for name in ("defocus_u", "defocus_v", "defocus_angle", "phase_shift")},
        **{name: per_stack(name) for name in ("voltage_kv", "cs_mm", "amplitude_contrast")}, scale=per_tilt("ctf_scale"),
        intact_first_peak=options.intact_first_peak,
    )  # fmt: skip
    return transfer * dose_envelope(np.hypot(fx, fy), per_tilt("dose"), b_factor_per_dose=stacks[0].b_factor_per_dose)


@dataclass(frozen=True)
class Factors:
    """What a stack's samples are multiplied with, beside their transfer; see :func:`insertion_factors`."""

    data: np.ndarray  # (n,)
    weight: np.ndarray  # (n,)


def insertion_factors(optics: Optics, plane: Plane, options: ImagingOptions) -> Factors:
    """Factors `(n,)` float64 of the samples of a plane, of data and of weights, at the model's scale.

    Projected density keeps its grey value at any pixel size, so transforms scale with the area of the box; a sample stands
    for the area between its neighbours, the origin for half of it, as its mate is itself.
    """
    area = (options.box * options.pixel_size / (optics.box * optics.pixel_size)) ** 2
    half = np.where((plane.at == 0).all(0), 0.5, 1.0) * (area / PAD**2)
    scale = options.box * area
    return Factors(half * scale, half * scale**2)


def _from_stack(stack: TiltStack, options: ImagingOptions) -> HalfBallParticle:
    """Insert every tilt's half-plane by the adjoint of trilinear interpolation, padding 2, then crop and de-apodise."""
    optics, real = stack.optics, np.dtype(options.dtype)
    grid = insertion_grid(options.box, options.dtype)
    plane = sample_plane(optics.box, optics.pixel_size, options.box, options.pixel_size, options.dtype)
    mask = soft_sphere(optics.box, options.mask_diameter / (2 * optics.pixel_size), 2)
    images = stack.images.astype(real, copy=False)
    transfer = stack_ctf([stack], plane.frequencies, options)
    factors = insertion_factors(optics, plane, options)
    lift = (factors.data if optics.premultiplied else transfer * factors.data).astype(real)
    turns = stack.rotations.transpose(2, 0, 1).reshape(-1, 3)  # (i, f): column i of each rotation, so A^T k
    indices, weights, sign = corners((turns @ plane.at).reshape(3, -1).astype(real), grid.half_width, SCRATCH)
    back = transposed(csr_rows(indices, weights, grid.size))
    cubes = np.empty((3, grid.size), np.result_type(real, np.complex64))
    for cube, version in zip(cubes, (blend_outside(images, mask), images), strict=False):
        along_x = (version @ plane.along_x).view(cubes.dtype)
        samples = (plane.along_y @ along_x)[:, plane.rows, plane.columns] * lift
        cube.real = back @ samples.real.ravel()
        cube.imag = back @ (samples.imag.ravel() * sign)
    cubes[2] = back @ (transfer**2 * factors.weight).astype(real).ravel()
    masked, unmasked, weight = _read_back(cubes, grid, half_ball(options.radius))
    # w may ring below zero beside a slice; it is kept: Σ w |A|² is right only as a whole
    return _finish([masked, unmasked], weight.real, options)


@lru_cache(maxsize=8)
def insertion_grid(box: int, dtype: str) -> PaddedGrid:
    """The padded grid into which the tilts of a stack are inserted."""
    return PaddedGrid(box, box / 2 - 1, np.dtype(dtype))


def _read_back(cubes: np.ndarray, grid: PaddedGrid, ball: HalfBall) -> list[np.ndarray]:
    transforms = scipy.fft.rfftn(np.fft.ifftshift(grid.to_map(cubes), axes=(1, 2, 3)), axes=(1, 2, 3))
    return [gather_half_ball(transform, ball) / grid.dtype.type(grid.box**3) for transform in transforms]


# 3D pseudo-subtomograms ---------------------------------------------------------------------------------------------


def _from_volume(volume: Volume, options: ImagingOptions) -> HalfBallParticle:
    """`b` is the transform of `_data.mrc`, `w` the CTF² block; voxels that were not measured drop out."""
    optics = volume.optics
    box, pixel = optics.box, optics.pixel_size
    ball = half_ball(options.radius)
    mask = soft_sphere(box, options.mask_diameter / (2 * pixel), 3)
    data = volume.data.astype(options.dtype, copy=False)
    ratio = (box * pixel) / (options.box * options.pixel_size)
    same = box == options.box and abs(ratio - 1) < 1e-6
    ctf2 = np.array(volume.ctf2, np.float64)
    if volume.multiplicity is not None:
        ctf2[volume.multiplicity <= MULTIPLICITY_FLOOR] = 0
    if not options.correct_ctf or optics.ctf_corrected:
        measured = ctf2 > 0
        ctf2 = np.where(measured, np.ones_like(ctf2) if volume.multiplicity is None else volume.multiplicity, 0)
    w = gather_half_ball(ctf2, ball) if same else _resample_weight(ctf2, ball, ratio)
    versions = (blend_outside(data, mask), data)
    if ratio > 1:  # what lies outside the model's box would be folded into it
        inside = np.abs(np.arange(box) - box // 2) <= box / ratio / 2
        versions = (versions[0], data * (inside[:, None, None] & inside[:, None] & inside))
    if same:
        b = [gather_half_ball(scipy.fft.rfftn(np.fft.ifftshift(v)) / v.size, ball) for v in versions]
    else:
        b = [_sample_transform(v, ball, ratio) for v in versions]
    scale = ratio**-3  # a transform over its box volume: the same density in a larger box has smaller values
    beyond = np.sqrt((ball.k.astype(np.float64) ** 2).sum(1)) * ratio >= box // 2
    w = np.where(beyond, 0, w * scale**2)
    w = np.where(w > WEIGHT_FLOOR * ball.shell_means(w)[ball.shell], w, 0)
    return _finish([np.where(w > 0, v * scale, 0) for v in b], w, options)


def _sample_transform(volume: np.ndarray, ball: HalfBall, ratio: float) -> np.ndarray:
    """Fourier transform of `volume` at the model's frequencies ``k * ratio`` (in the volume's own voxels), exactly."""
    box = volume.shape[0]
    x = np.arange(box) - box // 2
    k = np.arange(-ball.radius + 1, ball.radius)
    kernel = np.exp(-2j * np.pi / box * ratio * np.outer(k, x))
    out = volume.astype(np.complex128)
    for _ in range(3):  # z, y, x in turn; each product moves the new axis last
        out = np.tensordot(out, kernel, axes=(0, 1))
    at = ball.k + ball.radius - 1
    return out[at[:, 2], at[:, 1], at[:, 0]] / volume.size


def _resample_weight(ctf2: np.ndarray, ball: HalfBall, ratio: float) -> np.ndarray:
    """CTF² at the model's frequencies by trilinear interpolation in the volume's own half grid."""
    from scipy.ndimage import map_coordinates

    box = ctf2.shape[0]
    k = ball.k * ratio
    k = np.where(k[:, :1] < 0, -k, k)
    centred = np.fft.fftshift(ctf2, axes=(0, 1))
    at = [k[:, 2] + box // 2, k[:, 1] + box // 2, k[:, 0]]
    return map_coordinates(centred, at, order=1, mode="constant")
