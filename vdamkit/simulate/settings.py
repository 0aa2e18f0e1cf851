"""Every choice behind a simulated data set, checked before anything is computed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vdamkit.errors import SettingsError
from vdamkit.simulate.models import MODELS


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SimulationSettings:
    """What :func:`vdamkit.simulate.simulate` makes. Å, degrees and e/Å² throughout."""

    model: str = "hexamer"  # "hexamer", "asymmetric" or the path of an MRC map
    particles: int = 110  # picked in all tomograms together (with `poses` a STAR file: at most)
    volumes: int | None = None  # of these, also written as 3D pseudo-subtomograms, None: 24, or all if fewer
    tomograms: int = 2  # each an optics group with its own defocus; with a STAR file those in it
    box: int = 32  # px
    pixel_size: float = 10.6  # with a STAR file that of its tilt series
    tilts: int = 31  # from -60 to +60 degrees
    variance_ratio: float | None = 0.1  # signal / noise near particles, first exposure; None: no noise
    picking_error: float = 6.0  # standard deviation per axis, of the picked centres
    orientation_error: float = 6.0  # standard deviation per axis, of the particles about the sphere's normal
    seed: int = 0
    poses: str = "sphere"  # "sphere", "random" or a STAR file with coordinates and true poses
    symmetry: str | None = None  # Cn of the model, None: C6 for the hexamer, else C1
    lattice_spacing: float | None = None  # between neighbours, None: 150 for the hexamer, else 240
    occupancy: float = 0.9  # part of the lattice sites that hold a particle
    defocus: tuple[float, float] = (25000.0, 40000.0)  # of the first and the last tomogram
    dose_per_tilt: float = 3.0
    second_model: str | None = None  # a second particle, as `model`, where there are two kinds; it has no symmetry
    second_share: float = 0.4  # of the particles, which are of that kind
    junk: float = 0.0  # part of the picked places where there is no particle (only noise and what stands around)
    write_tilt_images: bool = False  # also write images/*.mrc, which only RELION itself would want

    def __post_init__(self):
        object.__setattr__(self, "model", str(self.model))
        object.__setattr__(self, "poses", str(self.poses))
        if self.second_model is not None:
            object.__setattr__(self, "second_model", str(self.second_model))
        object.__setattr__(self, "defocus", tuple(np.atleast_1d(self.defocus).tolist()))
        hexamer = self.model == "hexamer"
        if self.volumes is None and _is_number(self.particles, int):
            object.__setattr__(self, "volumes", min(24, self.particles))
        if self.symmetry is None:
            object.__setattr__(self, "symmetry", "C6" if hexamer else "C1")
        if self.lattice_spacing is None:
            object.__setattr__(self, "lattice_spacing", 150.0 if hexamer else 240.0)
        self._check()

    def _check(self):
        def require(good: bool, name: str, allowed: str):
            if not good:
                raise SettingsError(f"simulate: {name} is {getattr(self, name)!r}; give {allowed}.")

        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "int | None"):
                require(_is_number(value, int) and value >= 0, field.name, "a whole number, not below 0")
            elif field.type == "float" or (field.type == "float | None" and value is not None):
                require(_is_number(value, int | float), field.name, "a number")
        require(self.model in MODELS or Path(self.model).is_file(), "model", f"one of {MODELS} or an MRC map")
        good = self.second_model is None or self.second_model in MODELS or Path(self.second_model).is_file()
        require(good, "second_model", f"None, one of {MODELS} or an MRC map")
        require(0 < self.second_share < 1, "second_share", "a part between 0 and 1")
        require(0 <= self.junk < 1, "junk", "a part from 0 to below 1")
        known = self.poses in ("sphere", "random") or Path(self.poses).is_file()
        require(known, "poses", "'sphere', 'random' or an existing STAR file")
        require(self.tomograms >= 1, "tomograms", "at least 1")
        require(self.particles >= self.tomograms, "particles", f"at least {self.tomograms}, one per tomogram")
        require(self.volumes <= self.particles, "volumes", f"at most {self.particles}, the number of particles")
        require(self.box >= 16 and self.box % 2 == 0, "box", "an even number of pixels, 16 or more")
        require(self.pixel_size > 0, "pixel_size", "Å per pixel, above 0")
        require(self.tilts >= 3, "tilts", "at least 3")
        good = self.variance_ratio is None or self.variance_ratio > 0
        require(good, "variance_ratio", "a number above 0 or None")
        require(self.picking_error >= 0, "picking_error", "Å, not below 0")
        require(0 <= self.orientation_error <= 45, "orientation_error", "degrees between 0 and 45")
        require(bool(re.fullmatch(r"C[1-9]\d?", str(self.symmetry))), "symmetry", "C1, C2, … C99")
        require(self.lattice_spacing > 0, "lattice_spacing", "Å, above 0")
        require(0.1 <= self.occupancy <= 1, "occupancy", "a part between 0.1 and 1")
        good = len(self.defocus) == 2 and all(_is_number(d, int | float) and d >= 0 for d in self.defocus)
        require(good, "defocus", "two values in Å, not below 0")
        require(self.dose_per_tilt >= 0, "dose_per_tilt", "e/Å², not below 0")

    @property
    def fold(self) -> int:
        """n of Cn."""
        return int(self.symmetry[1:])
