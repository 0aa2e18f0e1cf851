"""One particle as it lies on disc, before anything is computed: the hand-over from `io` to `imaging`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Optics:
    """One optics group (a row of `data_optics`)."""

    number: int  # rlnOpticsGroup, 1-based as in the file
    name: str
    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float
    pixel_size: float  # Å, of the extracted images (rlnImagePixelSize)
    box: int  # px (rlnImageSize)
    premultiplied: bool  # rlnCtfDataAreCtfPremultiplied
    ctf_corrected: bool = False  # rlnCtfDataAreCtfCorrected: the CTF is then taken as 1


@dataclass(frozen=True)
class TiltStack:
    """A particle as 2D stack: the images of the tilts that are there, blank sections removed.

    Every per-tilt array has the same first axis (n_tilts,).
    """

    images: np.ndarray  # (n_tilts, box, box) float32, y then x; particle at index box//2
    rotations: np.ndarray  # (n_tilts, 3, 3) M_f = P_f[:3, :3] @ A_subtomogram: x_image = M_f @ x_subtomogram (xyz)
    defocus_u: np.ndarray  # Å, with the particle's depth already added
    defocus_v: np.ndarray
    defocus_angle: np.ndarray  # degrees
    phase_shift: np.ndarray  # degrees
    ctf_scale: np.ndarray
    dose: np.ndarray  # e/Å²
    b_factor_per_dose: float
    optics: Optics


@dataclass(frozen=True)
class Volume:
    """A particle as 3D pseudo-subtomogram."""

    data: np.ndarray  # (box, box, box) float32, zyx, real space, particle at index box//2
    ctf2: np.ndarray  # (box, box, box//2 + 1) float32, zyx, rfft layout: origin at index 0
    multiplicity: np.ndarray | None  # same layout; None where the file has none
    optics: Optics
