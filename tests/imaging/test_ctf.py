"""CTF against a formula written another way, and the dose envelope's limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdamkit.imaging.ctf import ctf, dose_envelope, electron_wavelength

OPTICS = {"voltage_kv": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.07}


@pytest.mark.parametrize("kv", [80, 200, 300])
def test_wavelength_from_first_principles(kv):
    h, m, e, c = 6.62607015e-34, 9.1093837015e-31, 1.602176634e-19, 299792458.0
    energy = e * kv * 1e3
    wanted = h / np.sqrt(2 * m * energy * (1 + energy / (2 * m * c * c))) * 1e10
    assert electron_wavelength(kv) == pytest.approx(wanted, rel=1e-5)


@given(
    st.floats(5e3, 6e4), st.floats(-2e3, 2e3), st.floats(-180, 180), st.floats(0, 150),
    st.sampled_from([(300.0, 2.7, 0.07), (200.0, 2.0, 0.1), (300.0, 0.01, 0.0)]),
)  # fmt: skip
def test_agrees_with_the_defocus_form(mean, astigmatism, azimuth, phase, optics):
    """sin(chi), chi = pi lambda z k² - pi/2 Cs lambda³ k⁴ + phase + asin(Q), z = mean + astigmatism cos 2(alpha - azimuth)."""
    kv, cs, q = optics
    rng = np.random.default_rng(0)
    fx, fy = rng.uniform(-0.1, 0.1, (2, 50))
    lam = electron_wavelength(kv)
    k, alpha = np.hypot(fx, fy), np.arctan2(fy, fx)
    z = mean + astigmatism * np.cos(2 * (alpha - np.radians(azimuth)))
    chi = np.pi * lam * z * k**2 - np.pi / 2 * cs * 1e7 * lam**3 * k**4 + np.radians(phase) + np.arcsin(q)
    found = ctf(
        fx, fy, defocus_u=mean + astigmatism, defocus_v=mean - astigmatism, defocus_angle=azimuth, voltage_kv=kv, cs_mm=cs,
        amplitude_contrast=q, phase_shift=phase, scale=0.8,
    )  # fmt: skip
    np.testing.assert_allclose(found, 0.8 * np.sin(chi), atol=2e-8)


def test_at_zero_frequency_only_amplitude_contrast_is_left():
    value = ctf(np.zeros(1), np.zeros(1), defocus_u=2e4, defocus_v=2e4, defocus_angle=0, **OPTICS)
    assert value == pytest.approx(0.07)


def test_never_exactly_zero():
    value = ctf(np.zeros(1), np.zeros(1), defocus_u=2e4, defocus_v=2e4, defocus_angle=0, voltage_kv=300.0, cs_mm=2.7,
                amplitude_contrast=0.0)  # fmt: skip
    assert np.abs(value) == pytest.approx(1e-8)


def test_intact_first_peak():
    k = np.linspace(0, 0.08, 400)
    args = {"defocus_u": 2e4, "defocus_v": 2e4, "defocus_angle": 0.0, **OPTICS}
    plain, intact = (ctf(k, 0 * k, intact_first_peak=flag, **args) for flag in (False, True))
    peak = int(np.flatnonzero(np.diff(plain) < 0)[0])  # the first extremum
    assert plain[peak] > 0.999
    np.testing.assert_allclose(intact[: peak - 1], 1)
    np.testing.assert_array_equal(intact[peak + 2 :], plain[peak + 2 :])
    assert (plain[peak + 2 :] < -0.9).any()  # further oscillations are still there


def test_dose_envelope_limits():
    k = np.linspace(0, 0.2, 101)
    np.testing.assert_array_equal(dose_envelope(k, 0.0), 1)
    assert dose_envelope(k, 50.0)[0] == 1  # no dose blurs the mean
    assert dose_envelope(k, 1e5)[-1] < 1e-12
    curves = np.array([dose_envelope(k, d) for d in (5, 20, 80)])
    assert (np.diff(curves, axis=1) < 0).all()
    assert (np.diff(curves[:, 1:], axis=0) < 0).all()
    # multiplicative in dose
    np.testing.assert_allclose(dose_envelope(k, 30.0), dose_envelope(k, 10.0) ** 3)


def test_dose_envelope_value():
    """At 1/10 Å the critical dose is 0.245 · 10^1.665 + 2.81 = 14.14 e/Å²."""
    critical = 0.245 * 10**1.665 + 2.81
    assert dose_envelope(np.array([0.1]), 2 * critical) == pytest.approx(np.exp(-1))


def test_b_factor_envelope():
    k = np.linspace(0, 0.2, 11)
    np.testing.assert_allclose(dose_envelope(k, 10.0, b_factor_per_dose=4.0), np.exp(-10 * k**2))
