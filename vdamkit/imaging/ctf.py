"""Contrast transfer function and dose envelope of one tilt image, as RELION computes them.

Arrays may be a device's (CuPy's): NumPy's functions then hand them on.
"""

from __future__ import annotations

import numpy as np


def electron_wavelength(voltage_kv: float) -> float:
    """Relativistic electron wavelength in Å. Source: RELION ctf.cpp:initialise."""
    volts = voltage_kv * 1e3
    return 12.2643247 / np.sqrt(volts * (1 + volts * 0.978466e-6))


def ctf(
    fx: np.ndarray,
    fy: np.ndarray,
    *,
    defocus_u: float | np.ndarray,
    defocus_v: float | np.ndarray,
    defocus_angle: float | np.ndarray,
    voltage_kv: float,
    cs_mm: float,
    amplitude_contrast: float,
    phase_shift: float | np.ndarray = 0.0,
    scale: float | np.ndarray = 1.0,
    intact_first_peak: bool = False,
) -> np.ndarray:
    """CTF at spatial frequencies (fx, fy), without the dose envelope.

    Parameters
    ----------
    fx, fy: `(...)` float, spatial frequencies in 1/Å along the image's x and y.
    defocus_u, defocus_v: Å, positive for underfocus. defocus_angle, phase_shift: degrees.
    scale: `rlnCtfScalefactor`. Each of these a number or an array that broadcasts against `fx`, such as `(tilts, 1)`.
    intact_first_peak: 1 (times the sign) up to the first extremum (RELION `--ctf_intact_first_peak`).

    Returns
    -------
    float64 array of the broadcast shape: ``-sin(gamma) * scale``, which starts at +amplitude_contrast for underfocus.
    A dark protein's image is ``-ctf * projection``; premultiplied images carry ``+ctf²``. Magnitudes below 1e-8 are raised
    to 1e-8.

    Source: RELION ctf.cpp:initialise, ctf.h:getCTF.
    """
    lam = electron_wavelength(voltage_kv)
    k2 = fx * fx + fy * fy
    azimuth = np.radians(defocus_angle)
    c, s = np.cos(azimuth), np.sin(azimuth)
    along, across = (fx * c + fy * s) ** 2, (fy * c - fx * s) ** 2
    gamma = (
        -np.pi * lam * (defocus_u * along + defocus_v * across)
        + 0.5 * np.pi * cs_mm * 1e7 * lam**3 * k2 * k2
        - np.radians(phase_shift)
        - np.arctan2(amplitude_contrast, np.sqrt(1 - amplitude_contrast**2))
    )
    value = -np.sin(gamma)
    if intact_first_peak:
        value = np.where(np.abs(gamma) < np.pi / 2, np.sign(value), value)
    value = np.where(np.abs(value) < 1e-8, np.where(value < 0, -1e-8, 1e-8), value)
    return value * scale


def dose_envelope(frequency: np.ndarray, dose: float | np.ndarray, *, b_factor_per_dose: float = 0.0) -> np.ndarray:
    """Amplitude left after `dose` e/Å² at `frequency` (1/Å); the two broadcast against each other.

    ``exp(-dose / 2 / (0.245 k^-1.665 + 2.81))`` (Grant & Grigorieff 2015), or
    ``exp(-B dose k² / 4)`` where `rlnCtfBfactorPerElectronDose` B is positive.
    Source: RELION jaz/optics/damage.cpp:weightImage, ctf.h:getCTF.
    """
    if b_factor_per_dose > 0:
        return np.exp(-0.25 * b_factor_per_dose * dose * frequency**2)
    with np.errstate(divide="ignore"):
        critical = 0.245 * np.power(frequency, -1.665) + 2.81
    return np.exp(-0.5 * dose / critical)
