"""Particles on demand: read, converted to half-balls, kept within a memory budget."""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import numpy as np

from vdamkit.backend import Backend
from vdamkit.errors import ParticleError
from vdamkit.imaging.convert import HalfBallParticle, ImagingOptions, to_half_ball
from vdamkit.imaging.halfball import half_ball
from vdamkit.io.particles import ParticleSet


class ParticleSource:
    """The particles of a job as the algorithm wants them (`vdam.start.Particles`).

    A particle is read once and kept, least recently used first out, within `settings.memory_budget`. If the whole set
    fits it is kept at full resolution, otherwise cropped to the resolution in use when it was read.
    """

    def __init__(self, particles: ParticleSet, settings, backend: Backend):
        self.particles, self.settings, self.backend = particles, settings, backend
        self.box, self.pixel_size = particles.box, particles.pixel_size
        self.mask_ndim = 2 if particles.is_stack2d else 3
        self.optics = np.asarray(particles.optics_index)
        self.n_optics = len(particles.optics)
        self.angles, self.offsets = particles.angles, particles.origins
        self.angle_priors, self.offset_priors = particles.angle_priors, particles.origin_priors
        self._kept: OrderedDict[int, HalfBallParticle] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.particles)

    @property
    def identity(self) -> Hashable:
        """Changes when what :meth:`fetch` returns does."""
        return id(self.particles), replace_key(self.settings)

    def options(self, radius: int) -> ImagingOptions:
        s = self.settings
        return ImagingOptions(
            self.box, self.pixel_size, radius, s.mask_diameter, correct_ctf=s.correct_ctf,
            intact_first_peak=s.ctf_intact_first_peak, dtype=s.real,
        )  # fmt: skip

    def with_settings(self, settings, backend: Backend) -> ParticleSource:
        """The same particles for other settings; what is kept stays where it is still right."""
        same = replace_key(settings) == replace_key(self.settings)
        other = ParticleSource(self.particles, settings, backend)
        if same:
            other._kept, other._bytes, other._lock = self._kept, self._bytes, self._lock
        return other

    def fetch(self, index: np.ndarray, radius: int) -> tuple[list[HalfBallParticle], np.ndarray, list[str]]:
        """Half-balls of particles `index`, on exactly `radius`.

        Returns the particles that could be read, their positions in `index`, and a sentence for each of the others.
        """
        with self.backend.limits():  # also where a thread fetches ahead while nothing computes
            results = self.backend.map(lambda i: self._get(int(i), radius), index)
        at = np.array([j for j, item in enumerate(results) if not isinstance(item, str)], int)
        n = len(half_ball(radius))
        found = [replace(results[j].crop(n), radius=radius) for j in at]
        return found, at, [item for item in results if isinstance(item, str)]

    def _get(self, i: int, radius: int) -> HalfBallParticle | str:
        with self._lock:
            kept = self._kept.get(i)
            if kept is not None and kept.radius >= radius:
                self._kept.move_to_end(i)
                return kept
        try:
            particle = to_half_ball(self._load(i), self.options(self._radius_to_keep(radius)))
            if not particle.weight.any():
                raise ParticleError(f"particle {i + 1} has no measured Fourier voxel; leave it out", index=i)
        except ParticleError as problem:
            return str(problem)
        self._keep(i, particle)
        return particle

    def _load(self, i: int):
        if self.settings.scratch_dir is None:
            return self.particles.load(i)
        return self.particles.load(i, locate=self._on_scratch)

    def _on_scratch(self, path: Path) -> Path:
        """A local copy of a particle file, made at the first visit (RELION --scratch_dir)."""
        copy = Path(self.settings.scratch_dir) / "vdamkit_scratch" / str(path.resolve()).lstrip("/\\").replace(":", "")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary = copy.with_name(f".{copy.name}.{threading.get_ident()}")
            shutil.copyfile(path, temporary)
            temporary.replace(copy)
        return copy

    def _radius_to_keep(self, radius: int) -> int:
        full = self.box // 2
        fits = len(self) * self.bytes_per_particle(full) <= self.settings.memory_budget * 2**30
        return full if fits else radius

    def bytes_per_particle(self, radius: int) -> int:
        """Memory of one particle on a half-ball: two complex arrays and a real one."""
        return len(half_ball(radius)) * 5 * np.dtype(self.settings.real).itemsize

    def _keep(self, i: int, particle: HalfBallParticle) -> None:
        budget = self.settings.memory_budget * 2**30
        with self._lock:
            old = self._kept.pop(i, None)
            self._bytes += particle.nbytes - (old.nbytes if old else 0)
            self._kept[i] = particle
            while self._bytes > budget and self._kept:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.nbytes

    def forget(self) -> None:
        """Give back the memory of all kept particles."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0


def replace_key(settings) -> tuple:
    """The settings on which a converted particle depends."""
    return settings.mask_diameter, settings.correct_ctf, settings.ctf_intact_first_peak, settings.precision
