"""Masks, Fourier shell correlation and filters."""

import numpy as np
import pytest
from helpers_vdamkit import Blobs

from vdamkit.imaging.fsc import crop_or_pad, crossing, fsc, low_pass, resolution_at
from vdamkit.imaging.halfball import fourier_grid, map_to_fourier
from vdamkit.imaging.masks import blend_outside, mask_power, soft_sphere, soften_corners

BOX = 24


@pytest.mark.parametrize("ndim", [2, 3])
def test_mask_is_one_then_falls_then_zero(ndim):
    mask = soft_sphere(BOX, 6, ndim)
    r = np.sqrt((np.stack(np.indices(mask.shape) - BOX // 2) ** 2).sum(0))
    assert (mask[r <= 6] == 1).all()
    assert (mask[r >= 11] == 0).all()
    edge = (r > 6) & (r < 11)
    np.testing.assert_allclose(mask[edge], 0.5 + 0.5 * np.cos(np.pi * (r[edge] - 6) / 5), atol=1e-6)
    np.testing.assert_array_equal(mask, np.swapaxes(mask, 0, 1))


@pytest.mark.parametrize("ndim", [2, 3])
def test_outside_becomes_its_own_mean(ndim):
    mask = soft_sphere(BOX, 6, ndim)
    images = np.random.default_rng(0).normal(3, 1, (4, *mask.shape)).astype(np.float32)
    out = blend_outside(images, mask)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[:, mask == 1], images[:, mask == 1])
    for before, after in zip(images, out, strict=True):
        mean = np.average(before, weights=1 - mask)
        np.testing.assert_allclose(after[mask == 0], mean, rtol=1e-5)
    # a constant image stays as it is, whatever its level
    np.testing.assert_allclose(blend_outside(np.full(mask.shape, 7.0), mask), 7, rtol=1e-6)


@pytest.mark.parametrize("ndim", [2, 3])
def test_energy_that_white_noise_keeps(ndim):
    power = mask_power(BOX, 5, ndim)
    noise = np.random.default_rng(1).normal(size=(200 if ndim == 2 else 20,) + (BOX,) * ndim)
    masked = noise * soft_sphere(BOX, 5, ndim)
    assert (masked**2).mean() == pytest.approx(power, rel=0.03)
    ball = {2: np.pi * 5**2, 3: 4 / 3 * np.pi * 5**3}[ndim] / BOX**ndim
    wide = {2: np.pi * 10**2, 3: 4 / 3 * np.pi * 10**3}[ndim] / BOX**ndim
    assert ball < power < wide
    assert mask_power(BOX, 100, ndim) == 1


def test_corners_are_softened_inside_nothing_changes():
    volume = np.random.default_rng(2).normal(size=(BOX,) * 3)
    out = soften_corners(volume)
    r = np.sqrt((np.stack(np.indices(volume.shape) - BOX // 2) ** 2).sum(0))
    np.testing.assert_allclose(out[r <= BOX // 2 - 3], volume[r <= BOX // 2 - 3])
    assert out[r >= BOX // 2].std() < 1e-6
    assert abs(out[r >= BOX // 2].mean()) < 0.1


def test_fsc_with_itself_is_one():
    volume = Blobs.random(8, 5, 1.0).map(BOX)
    curve = fsc(volume, volume)
    assert curve.shape == (BOX // 2 + 1,)
    np.testing.assert_allclose(curve, 1, atol=1e-9)
    np.testing.assert_allclose(fsc(volume, -2 * volume), -1, atol=1e-9)
    np.testing.assert_allclose(fsc(volume, 5 * volume, soft_sphere(BOX, 6)), 1, atol=1e-9)


def test_fsc_of_noise_is_near_zero_and_bounded():
    rng = np.random.default_rng(3)
    curves = np.array([fsc(*rng.normal(size=(2, BOX, BOX, BOX))) for _ in range(10)])
    assert (np.abs(curves) <= 1 + 1e-12).all()
    pairs = fourier_grid(BOX).shell[..., 1:-1]  # independent coefficients of a shell, about
    counts = np.bincount(pairs.ravel(), minlength=20)[3:11]
    assert (np.abs(curves[:, 3:11]).max(0) < 4.5 / np.sqrt(counts)).all()
    assert (curves[:, 3:11].std(0) > 0.3 / np.sqrt(2 * counts)).all()


def test_fsc_of_signal_and_noise():
    """Two copies with independent noise of the signal's power correlate to one half in every shell."""
    rng = np.random.default_rng(4)
    signal, n1, n2 = rng.normal(size=(3, BOX, BOX, BOX))
    assert fsc(signal + n1, signal + n2)[4:].mean() == pytest.approx(0.5, abs=0.03)


def test_fsc_of_an_empty_shell_is_zero_and_shapes_must_match():
    assert (fsc(np.zeros((8,) * 3), np.ones((8,) * 3)) == 0).all()
    with pytest.raises(ValueError, match="same shape"):
        fsc(np.zeros((8,) * 3), np.zeros((10,) * 3))


def test_resolution_is_where_the_curve_first_crosses():
    curve = np.array([0.0, 1, 0.9, 0.6, 0.4, 0.9, 0.1, 0, 0])
    assert resolution_at(curve, 0.5, 16, 2.0) == pytest.approx(16 * 2 / 3.5)
    assert resolution_at(np.ones(9), 0.5, 16, 2.0) == 4.0
    assert crossing(np.ones(9), 0.5, 16, 2.0) == "4.0 Å or finer"
    falls_at_the_end = np.array([1.0, 1, 1, 1, 1, 1, 1, 0.9, 0.1])
    assert 4.0 < resolution_at(falls_at_the_end, 0.5, 16, 2.0) < 16 * 2 / 7
    assert resolution_at(np.zeros(9), 0.5, 16, 2.0) == 16 * 2


def test_low_pass_halves_at_the_shell():
    volume = np.random.default_rng(5).normal(size=(BOX,) * 3)
    before, after = map_to_fourier(volume), map_to_fourier(low_pass(volume, 6))
    k = np.sqrt(fourier_grid(BOX).k2)
    gain = np.abs(after) / np.abs(before)
    np.testing.assert_allclose(gain[k <= 5], 1, atol=1e-9)
    np.testing.assert_allclose(gain[k >= 7], 0, atol=1e-9)
    np.testing.assert_allclose(gain[k == 6], 0.5, atol=1e-9)


@pytest.mark.parametrize("other", [16, 32])
def test_crop_or_pad_keeps_the_centre(other):
    blob = Blobs(np.ones(1), np.array([[1.0, -2.0, 2.0]]), np.array([1.2]))
    np.testing.assert_allclose(crop_or_pad(blob.map(BOX), other), blob.map(other), atol=1e-4)
