"""From a particle on disc to its half-ball: the one representation for 2D stacks and 3D pseudo-subtomograms.

Either kind becomes ``b`` (sum over tilts of CTF × image) and ``w`` (sum over tilts of CTF²): the sufficient statistics of
the Gaussian model, still to be divided by the noise variance of each shell. ``b`` exists masked (E-step, noise) and
unmasked (gradient), as in RELION (ml_optimiser.cpp:getFourierTransformsAndCtfs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft

from vdamkit.imaging.ctf import ctf, dose_envelope
from vdamkit.imaging.halfball import HalfBall, gather_half_ball, half_ball
from vdamkit.imaging.masks import blend_outside, soft_sphere
from vdamkit.imaging.projector import PAD, PaddedGrid, trilinear
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

    def crop(self, n_voxels: int) -> HalfBallParticle:
        """The same particle on a smaller half-ball (a view)."""
        return HalfBallParticle(self.radius, self.masked[:n_voxels], self.unmasked[:n_voxels], self.weight[:n_voxels])

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


def _sample_plane(box: int, pixel_size: float, model_extent: float, limit: float) -> tuple[np.ndarray, ...]:
    """Half-plane samples of a padded image, and where they lie in the model's padded grid.

    Returns row and column in the rfft2 array, frequencies (1/Å, `(n, 2)` xy), positions in the padded grid `(n, 3)`.
    """
    n = PAD * box
    ky, kx = np.meshgrid(np.rint(np.fft.fftfreq(n) * n), np.arange(n // 2 + 1), indexing="ij")
    k = np.stack([kx, ky], -1)
    position = k * (model_extent / (box * pixel_size))
    keep = ((position**2).sum(-1) < limit**2) & ((k**2).sum(-1) < (n // 2 - 1) ** 2)
    keep &= ~((kx == 0) & (ky < 0))  # the mate of a listed sample
    rows, columns = np.nonzero(keep)
    at = np.concatenate([position[keep], np.zeros((len(rows), 1))], 1)
    return rows, columns, k[keep] / (n * pixel_size), at


def stack_ctf(stack: TiltStack, frequencies: np.ndarray, options: ImagingOptions) -> np.ndarray:
    """CTF × dose envelope of every tilt at `frequencies` `(n, 2)` in 1/Å; `(n_tilts, n)`.

    All ones without CTF correction. Source: RELION ml_optimiser.cpp:getFourierTransformsAndCtfs, ctf.h:getCTF.
    """
    optics, n = stack.optics, len(stack.images)
    if not options.correct_ctf or optics.ctf_corrected:
        return np.ones((n, len(frequencies)))
    fx, fy = frequencies.T
    k = np.hypot(fx, fy)
    out = np.empty((n, len(frequencies)))
    for f in range(n):
        out[f] = ctf(
            fx, fy, defocus_u=stack.defocus_u[f], defocus_v=stack.defocus_v[f], defocus_angle=stack.defocus_angle[f],
            voltage_kv=optics.voltage_kv, cs_mm=optics.cs_mm, amplitude_contrast=optics.amplitude_contrast,
            phase_shift=stack.phase_shift[f], scale=stack.ctf_scale[f], intact_first_peak=options.intact_first_peak,
        ) * dose_envelope(k, stack.dose[f], b_factor_per_dose=stack.b_factor_per_dose)  # fmt: skip
    return out


def _padded_transform(images: np.ndarray) -> np.ndarray:
    n, box = images.shape[0], images.shape[-1]
    padded = np.zeros((n, PAD * box, PAD * box), images.dtype)
    start = PAD * box // 2 - box // 2
    padded[:, start : start + box, start : start + box] = images
    return scipy.fft.rfft2(np.fft.ifftshift(padded, axes=(1, 2))) / box**2


def _from_stack(stack: TiltStack, options: ImagingOptions) -> HalfBallParticle:
    """Insert every tilt's half-plane by the adjoint of trilinear interpolation, padding 2, then crop and de-apodise."""
    optics, real = stack.optics, np.dtype(options.dtype)
    box, pixel = optics.box, optics.pixel_size
    extent = options.box * options.pixel_size
    grid = _insertion_grid(options.box, options.dtype)
    rows, columns, frequencies, at = _sample_plane(box, pixel, extent, PAD * options.box / 2 - 1)
    mask = soft_sphere(box, options.mask_diameter / (2 * pixel), 2)
    images = stack.images.astype(real, copy=False)
    transfer = stack_ctf(stack, frequencies, options)
    # projected density keeps its grey value at any pixel size, so transforms scale with the area of the box
    scale = options.box * (extent / (box * pixel)) ** 2
    density = (extent / (box * pixel)) ** 2 / PAD**2
    half = np.where((rows == 0) & (columns == 0), 0.5, 1.0) * density
    values = np.empty((len(images), len(rows), 5), real)
    lift = half * scale if optics.premultiplied else transfer * half * scale
    for first, version in ((0, blend_outside(images, mask)), (2, images)):
        samples = _padded_transform(version)[:, rows, columns] * lift
        values[..., first], values[..., first + 1] = samples.real, samples.imag
    values[..., 4] = transfer**2 * half * scale**2
    sums = np.zeros((grid.size, 5), real)
    for f, rotation in enumerate(stack.rotations):
        indices, weights, sign = trilinear((at @ rotation).astype(real), grid.half_width)
        values[f][:, [1, 3]] *= sign[:, None]
        sums += _scatter(indices, weights, values[f], grid.size)
    ball = half_ball(options.radius)
    b = [_read_back(sums[:, j] + 1j * sums[:, j + 1], grid, ball) for j in (0, 2)]
    # w may ring below zero beside a slice; it is kept: Σ w |A|² is right only as a whole
    return _finish(b, _read_back(sums[:, 4].astype(complex), grid, ball).real, options)


_grids: dict[tuple[int, str], PaddedGrid] = {}


def _insertion_grid(box: int, dtype: str) -> PaddedGrid:
    key = (box, dtype)
    if key not in _grids:
        _grids[key] = PaddedGrid(box, box / 2 - 1, np.dtype(dtype))
    return _grids[key]


def _scatter(indices: np.ndarray, weights: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    import scipy.sparse

    pointer = np.arange(0, indices.size + 1, indices.shape[1], dtype=np.int32)
    operator = scipy.sparse.csr_matrix((weights.ravel(), indices.ravel(), pointer), shape=(len(indices), size))
    return operator.T @ values


def _read_back(cube: np.ndarray, grid: PaddedGrid, ball: HalfBall) -> np.ndarray:
    volume = grid.to_map(cube)
    return gather_half_ball(scipy.fft.rfftn(np.fft.ifftshift(volume)) / volume.size, ball)


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


def optics_key(optics: Optics) -> tuple:
    """What makes two optics groups need different conversion grids."""
    return optics.box, optics.pixel_size
