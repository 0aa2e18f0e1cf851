"""From images and volumes to half-balls: b and w are the sufficient statistics of an object inside the mask.

For volumes ``b / w`` is the object's transform voxel by voxel. For stacks it is not: both are cropped to the box in real
space, which mixes neighbouring voxels, so b must be compared with w x truth inside the mask, or in products with objects.
"""

from dataclasses import replace

import numpy as np
import pytest
from helpers_vdamkit import Blobs, random_rotations, relative_error

from vdamkit.imaging.convert import ImagingOptions, to_half_ball
from vdamkit.imaging.ctf import ctf, dose_envelope
from vdamkit.imaging.halfball import fourier_to_map, gather_half_ball, half_ball, map_to_fourier
from vdamkit.imaging.masks import blend_outside, soft_sphere
from vdamkit.io.particle import Optics, TiltStack, Volume
from vdamkit.sampling.euler import euler_to_matrix

BOX, PIXEL, RADIUS = 24, 8.0, 10
BALL = half_ball(RADIUS)
OBJECT = Blobs.random(8, reach=45.0, sigma=13.0, seed=1)  # Å
TRUTH = OBJECT.transform(BALL.k, BOX, PIXEL)
OPTICS = Optics(1, "one", 300.0, 2.7, 0.07, PIXEL, BOX, premultiplied=False)
FRAME = euler_to_matrix([30.0, 70.0, -20.0])  # of the subtomogram in its tomogram
OPTIONS = ImagingOptions(BOX, PIXEL, RADIUS, mask_diameter=170.0, dtype="float64")
PLAIN = replace(OPTIONS, correct_ctf=False)


def tilt_rotations(angles) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("y", np.asarray(angles, float)[:, None], degrees=True).as_matrix() @ FRAME


def tilt_stack(
    angles, *, optics: Optics = OPTICS, with_ctf: bool = False, noise: float = 0.0, seed: int = 0, obj=OBJECT
) -> TiltStack:
    """Noisy projections of an object, times the CTF (twice where premultiplied)."""
    rotations = tilt_rotations(angles)
    n, box, pixel = len(rotations), optics.box, optics.pixel_size
    rng = np.random.default_rng(seed)
    u, v, azimuth = rng.uniform(1.5e4, 2.5e4, n), rng.uniform(1.5e4, 2.5e4, n), rng.uniform(-90, 90, n)
    dose = np.arange(n) * 2.0
    images = np.stack([obj.turned(r).projection(box, pixel, PIXEL) for r in rotations])
    fy, fx = np.meshgrid(np.fft.fftfreq(box, pixel), np.fft.rfftfreq(box, pixel), indexing="ij")
    for f in range(n):
        transfer = np.ones_like(fx)
        if with_ctf:
            transfer = ctf(
                fx, fy, defocus_u=u[f], defocus_v=v[f], defocus_angle=azimuth[f], voltage_kv=optics.voltage_kv,
                cs_mm=optics.cs_mm, amplitude_contrast=optics.amplitude_contrast,
            ) * dose_envelope(np.hypot(fx, fy), dose[f])  # fmt: skip
        image = np.fft.irfft2(np.fft.rfft2(images[f]) * transfer, s=(box, box)) + noise * rng.normal(size=(box, box))
        images[f] = np.fft.irfft2(np.fft.rfft2(image) * transfer, s=(box, box)) if optics.premultiplied else image
    return TiltStack(images, rotations, u, v, azimuth, np.zeros(n), np.ones(n), dose, 0.0, optics)


FULL = np.arange(-90, 90, 4.0)
WEDGE = np.arange(-60, 61, 3.0)


def in_box(values: np.ndarray) -> np.ndarray:
    """Real space of half-ball values."""
    full = np.zeros((BOX,) * 3, complex)
    for k, v in ((BALL.k, values), (-BALL.k, np.conj(values))):
        full[k[:, 2], k[:, 1], k[:, 0]] = v
    return np.fft.fftshift(np.fft.ifftn(full).real)


INSIDE = np.sqrt((np.stack(np.indices((BOX,) * 3) - BOX // 2) ** 2).sum(0)) < 7


def residual(particle, truth=TRUTH) -> float:
    """b - w A inside a sphere that holds the object, relative to b: what a perfect reference leaves unexplained."""
    left, b = in_box(particle.unmasked - particle.weight * truth)[INSIDE], in_box(particle.unmasked)[INSIDE]
    return float(np.linalg.norm(left) / np.linalg.norm(b))


@pytest.mark.parametrize(("angles", "most"), [(FULL, 0.015), (WEDGE, 0.05)], ids=["full", "wedge"])
def test_stack_is_explained_by_its_object(angles, most):
    stack = tilt_stack(angles)
    assert residual(to_half_ball(stack, PLAIN)) < most
    # the geometry matters: the same images in transposed frames are no measurement of this object
    wrong = replace(stack, rotations=stack.rotations.transpose(0, 2, 1))
    assert residual(to_half_ball(wrong, PLAIN)) > 0.3


def slices(stack: TiltStack, options: ImagingOptions) -> tuple:
    """Half-planes of the images, where they lie, their Friedel weights, and the transfer functions, one tilt a row."""
    ky, kx = np.meshgrid(np.rint(np.fft.fftfreq(BOX) * BOX), np.arange(BOX // 2 + 1), indexing="ij")
    keep = (kx**2 + ky**2 < RADIUS**2) & ~((kx == 0) & (ky < 0))
    k = np.stack([kx[keep], ky[keep], 0 * kx[keep]], 1)
    images = np.fft.rfft2(np.fft.ifftshift(stack.images, axes=(1, 2)))[:, keep] / BOX**2
    fx, fy = k[:, 0] / (BOX * PIXEL), k[:, 1] / (BOX * PIXEL)
    transfer = np.ones(images.shape)
    if options.correct_ctf:
        for i in range(len(images)):
            transfer[i] = ctf(
                fx, fy, defocus_u=stack.defocus_u[i], defocus_v=stack.defocus_v[i],
                defocus_angle=stack.defocus_angle[i], voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.07,
            ) * dose_envelope(np.hypot(fx, fy), stack.dose[i])  # fmt: skip
    return images, k, np.where((k**2).sum(1) == 0, 0.5, 1.0), transfer


@pytest.mark.parametrize("options", [PLAIN, OPTIONS], ids=["plain", "ctf"])
@pytest.mark.parametrize("angles", [FULL, WEDGE], ids=["full", "wedge"])
def test_products_with_other_objects_are_those_of_the_slices(angles, options):
    """Re <A, b> and <A, w A> against sums over the slices of all tilts, for objects A that are not the particle."""
    stack = tilt_stack(angles, with_ctf=options.correct_ctf)
    particle = to_half_ball(stack, options)
    images, k, weight, transfer = slices(stack, options)
    for seed in range(20, 24):
        other = Blobs.random(6, reach=45.0, sigma=14.0, seed=seed)
        model = np.stack([BOX * other.turned(r).transform(k, BOX, PIXEL) for r in stack.rotations]) * transfer
        a = other.transform(BALL.k, BOX, PIXEL)
        linear = (BALL.weight * (a.conj() * particle.unmasked).real).sum()
        square = (BALL.weight * particle.weight * np.abs(a) ** 2).sum()
        assert linear == pytest.approx((weight * (model.conj() * images).real).sum(), rel=0.03)
        assert square == pytest.approx((weight * np.abs(model) ** 2).sum(), rel=0.03)


@pytest.mark.parametrize("premultiplied", [False, True])
def test_stack_with_ctf(premultiplied):
    optics = replace(OPTICS, premultiplied=premultiplied)
    particle = to_half_ball(tilt_stack(WEDGE, optics=optics, with_ctf=True), OPTIONS)
    assert residual(particle) < 0.05


def test_weight_is_the_number_of_tilts_that_cover_a_voxel():
    """Without a CTF, a tilt adds a slab one voxel thick: b / w scale drops out, Σ w counts every sample once."""
    few, many = (to_half_ball(tilt_stack(a), PLAIN).weight for a in (WEDGE[::2], WEDGE))
    total = [float((BALL.weight * w).sum()) for w in (few, many)]
    assert total[1] / total[0] == pytest.approx(len(WEDGE) / len(WEDGE[::2]), rel=0.02)
    # a plane holds pi r² samples; each carries (box)² since transforms of images are 1/box of those of volumes
    assert 2 * total[1] == pytest.approx(len(WEDGE) * np.pi * RADIUS**2 * BOX**2, rel=0.1)


def test_missing_wedge_has_no_weight():
    particle = to_half_ball(tilt_stack(WEDGE), PLAIN)
    in_tomogram = BALL.k @ FRAME.T  # frequency in the tomogram's frame; tilt axis y, beam z
    elevation = np.degrees(np.arctan2(np.abs(in_tomogram[:, 2]), np.abs(in_tomogram[:, 0])))
    away = np.hypot(in_tomogram[:, 0], in_tomogram[:, 2])
    inside = (elevation > 70) & (away > 6)
    covered = (elevation < 50) & (away > 6)
    assert inside.sum() > 20
    assert particle.weight[inside].mean() < 0.05 * particle.weight[covered].mean()


def test_tilts_add_up():
    """Two halves of the tilts sum to the whole (but for the floor below which a voxel is dropped)."""
    stack = tilt_stack(FULL, with_ctf=True)
    names = (
        "images",
        "rotations",
        "defocus_u",
        "defocus_v",
        "defocus_angle",
        "phase_shift",
        "ctf_scale",
        "dose",
    )
    parts = [to_half_ball(replace(stack, **{n: getattr(stack, n)[f::2] for n in names}), OPTIONS) for f in (0, 1)]
    whole = to_half_ball(stack, OPTIONS)
    for name in ("weight", "masked", "unmasked"):
        assert relative_error(sum(getattr(p, name) for p in parts), getattr(whole, name)) < 0.02


def test_particle_off_the_centre():
    """A particle that sits at +t has phases exp(-2 pi i k.t / N); so the search centres it at rlnOrigin = -t."""
    shift = np.array([16.0, -8.0, 12.0])
    particle = to_half_ball(tilt_stack(FULL, obj=OBJECT.moved(shift)), PLAIN)
    assert residual(particle, TRUTH * BALL.phases(shift / PIXEL, BOX, np.complex128)[0]) < 0.03


def test_images_of_another_box_and_pixel_size():
    optics = replace(OPTICS, box=36, pixel_size=6.0)
    particle = to_half_ball(tilt_stack(FULL, optics=optics), PLAIN)
    assert residual(particle) < 0.015


def test_grey_scale_and_linearity():
    stack = tilt_stack(WEDGE[::4], with_ctf=True, noise=0.5)
    base = to_half_ball(stack, OPTIONS)
    scaled = to_half_ball(stack, replace(OPTIONS, grey_scale=3.0))
    np.testing.assert_allclose(scaled.unmasked, 3 * base.unmasked)
    np.testing.assert_allclose(scaled.weight, base.weight)
    doubled = to_half_ball(replace(stack, images=2 * stack.images), OPTIONS)
    np.testing.assert_allclose(doubled.masked, 2 * base.masked, atol=1e-9 * np.abs(base.masked).max())


def test_masking_blends_the_outside():
    """The masked version is the unmasked one of blended images."""
    stack, small = tilt_stack(WEDGE[::4], noise=8.0), replace(PLAIN, mask_diameter=90.0)
    mask = soft_sphere(BOX, small.mask_diameter / (2 * PIXEL), 2)
    blended = to_half_ball(replace(stack, images=blend_outside(stack.images, mask)), small)
    particle = to_half_ball(stack, small)
    np.testing.assert_allclose(particle.masked, blended.unmasked, atol=1e-9 * np.abs(particle.masked).max())
    assert relative_error(particle.masked, particle.unmasked) > 0.1


@pytest.mark.parametrize("with_ctf", [False, True])
def test_single_precision(with_ctf):
    stack = tilt_stack(WEDGE, with_ctf=with_ctf, noise=0.5)
    double = to_half_ball(stack, OPTIONS)
    single = to_half_ball(replace(stack, images=stack.images.astype(np.float32)), replace(OPTIONS, dtype="float32"))
    assert single.unmasked.dtype == np.complex64
    assert single.weight.dtype == np.float32
    for name in ("masked", "unmasked", "weight"):
        assert relative_error(getattr(single, name), getattr(double, name)) < 1e-4


def test_friedel_mates_are_conjugates():
    particle = to_half_ball(tilt_stack(WEDGE, with_ctf=True, noise=1.0), OPTIONS)
    plane = np.flatnonzero(BALL.k[:, 2] == 0)
    where = {tuple(k): i for i, k in zip(plane, BALL.k[plane], strict=True)}
    mate = np.array([where[tuple(-BALL.k[i])] for i in plane])
    scale = np.abs(particle.unmasked).max()
    np.testing.assert_allclose(particle.unmasked[plane], particle.unmasked[mate].conj(), atol=1e-9 * scale)
    np.testing.assert_allclose(particle.weight[plane], particle.weight[mate], atol=1e-9 * particle.weight.max())


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_half_ball_likelihood_is_that_of_the_slices(seed):
    """Differences of log-likelihood between poses: half-ball against exact slices of every tilt, with CTF and noise.

    Noise is white in the images. Stated tolerance: 0.5 among poses whose log-likelihoods spread over some 30.
    """
    sigma = 4.0
    stack = tilt_stack(WEDGE, with_ctf=True, noise=sigma, seed=seed)
    particle = to_half_ball(stack, OPTIONS)
    variance = sigma**2 / (2 * BOX**2)  # per real component of an image's transform
    poses = [np.eye(3), *euler_to_matrix(np.random.default_rng(3).uniform(-12, 12, (14, 3)))]
    images, k, weight, transfer = slices(stack, OPTIONS)
    weight = np.where((k**2).sum(1) == 0, 0, weight)
    exact, ball = [], []
    for pose in poses:
        seen = OBJECT.turned(pose)
        model = np.stack([BOX * seen.turned(r).transform(k, BOX, PIXEL) for r in stack.rotations]) * transfer
        exact.append(-0.5 * (weight * np.abs(images - model) ** 2).sum() / variance)
        a = seen.transform(BALL.k, BOX, PIXEL)
        value = (a.conj() * particle.unmasked).real - 0.5 * particle.weight * np.abs(a) ** 2
        ball.append((BALL.weight * value)[1:].sum() / variance)
    exact, ball = np.array(exact) - exact[0], np.array(ball) - ball[0]
    assert np.ptp(exact) > 20
    assert np.abs(exact - ball).max() < 0.5


# volumes ------------------------------------------------------------------------------------------------------------


def volume_particle(box: int, pixel: float, *, wedge: bool = False) -> Volume:
    """CTF²-weighted density on its own grid, as pseudo-subtomograms are."""
    f = np.fft.fftfreq(box, pixel)
    fz, fy, fx = np.meshgrid(f, f, np.fft.rfftfreq(box, pixel), indexing="ij")
    r = np.sqrt(fx**2 + fy**2 + fz**2)
    ctf2 = (40 * (1.2 + np.cos(2 * np.pi * r * 18))).astype(np.float32)  # smooth on the grid
    multiplicity = np.where(np.abs(fz) > 2 * np.abs(fx), 0.0 if wedge else 5.0, 5.0).astype(np.float32)
    transform = map_to_fourier(OBJECT.map(box, pixel))
    data = fourier_to_map(transform * ctf2 * (multiplicity > 0))
    optics = replace(OPTICS, box=box, pixel_size=pixel, premultiplied=True)
    return Volume(data.astype(np.float32), ctf2, multiplicity, optics)


def test_volume_of_the_models_box():
    particle = to_half_ball(volume_particle(BOX, PIXEL), OPTIONS)
    assert (particle.weight > 0).all()
    assert relative_error(particle.unmasked / particle.weight, TRUTH) < 1e-3
    ctf2 = gather_half_ball(volume_particle(BOX, PIXEL).ctf2, BALL)
    np.testing.assert_allclose(particle.weight, ctf2, rtol=1e-6)


@pytest.mark.parametrize(("box", "pixel"), [(32, 6.0), (48, 8.0), (32, 8.0), (36, 6.0)])
def test_volume_of_another_box_or_pixel_size(box, pixel):
    particle = to_half_ball(volume_particle(box, pixel), OPTIONS)
    used = particle.weight > 0
    assert used.mean() > 0.95
    assert relative_error(particle.unmasked[used] / particle.weight[used], TRUTH[used]) < 0.04


def test_what_lies_outside_the_models_box_is_not_folded_into_it():
    far = Blobs(np.ones(1), np.array([[0.75 * BOX * PIXEL, 0, 0]]), np.array([2 * PIXEL]))
    volume = volume_particle(2 * BOX, PIXEL)
    outside = replace(volume, data=far.map(2 * BOX, PIXEL).astype(np.float32))
    power = [np.abs(to_half_ball(v, OPTIONS).unmasked).max() for v in (volume, outside)]
    assert power[1] < 1e-3 * power[0]


def test_volume_with_coarser_voxels_has_nothing_beyond_its_nyquist():
    particle = to_half_ball(volume_particle(16, 12.0), OPTIONS)  # Nyquist at shell 8 of the model
    k = np.linalg.norm(BALL.k, axis=1)
    assert (particle.weight[k >= 8] == 0).all()
    assert (particle.unmasked[k >= 8] == 0).all()
    used = k < 7
    assert relative_error(particle.unmasked[used] / particle.weight[used], TRUTH[used]) < 0.04


@pytest.mark.parametrize(("box", "pixel"), [(BOX, PIXEL), (32, 6.0)])
def test_what_multiplicity_says_was_not_measured_drops_out(box, pixel):
    volume = volume_particle(box, pixel, wedge=True)
    particle = to_half_ball(volume, OPTIONS)
    k = np.abs(BALL.k)
    wedge = k[:, 2] > 2 * k[:, 0] + 2
    assert wedge.sum() > 50
    for values in (particle.weight, particle.masked, particle.unmasked):
        assert (values[wedge] == 0).all()
    assert (particle.weight[k[:, 2] < 2 * k[:, 0] - 2] > 0).all()


def test_volume_without_correction_weighs_by_multiplicity():
    volume = volume_particle(BOX, PIXEL, wedge=True)
    particle = to_half_ball(volume, PLAIN)
    k = np.abs(BALL.k)
    expected = np.where(k[:, 2] > 2 * k[:, 0], 0, 5)
    np.testing.assert_allclose(particle.weight[1:], expected[1:])


def test_cropping_is_converting_to_a_smaller_ball():
    stack = tilt_stack(WEDGE[::4], with_ctf=True, noise=0.5)
    small = to_half_ball(stack, replace(OPTIONS, radius=6))
    cropped = to_half_ball(stack, OPTIONS).crop(6)
    scale = np.abs(small.unmasked).max()
    inside = BALL.shell[: len(cropped.weight)] < 6  # the outermost shell's mean, hence its floor, differs
    np.testing.assert_allclose(cropped.unmasked[inside], small.unmasked[inside], atol=1e-9 * scale)


def test_turned_frames_turn_the_object():
    """An object turned by A in frames M A^T gives the same images, so b / w is the turned transform."""
    turn = random_rotations(1, 3)[0]
    stack = tilt_stack(FULL)
    turned = replace(stack, rotations=stack.rotations @ turn.T)
    truth = OBJECT.turned(turn).transform(BALL.k, BOX, PIXEL)
    assert residual(to_half_ball(turned, PLAIN), truth) < 0.015
