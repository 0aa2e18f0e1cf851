"""Particles on demand: read, converted to half-balls, kept within a memory budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from vdamkit.backend import Backend
from vdamkit.backend.device import HOST, Device
from vdamkit.errors import ParticleError
from vdamkit.imaging.convert import HalfBallParticle, ImagingOptions, to_half_ball
from vdamkit.imaging.device_convert import stacks_to_half_balls, upload_half_balls
from vdamkit.imaging.halfball import half_ball
from vdamkit.io.particle import TiltStack, Volume
from vdamkit.io.particle_files import as_it_lies
from vdamkit.io.particles import ParticleSet
from vdamkit.io.scratch import Scratch

CONVERTED = 32  # particles that a device converts while it waits for no other
READERS = 3  # threads that read for a device; more of them only keep the one that launches its work from the interpreter


class ParticleSource:
    """The particles of a job as the algorithm wants them (`vdam.start.Particles`).

    A particle is read once and kept, least recently used first out, within `settings.memory_budget`. If the whole set
    fits it is kept at full resolution, otherwise cropped to the resolution in use when it was read. Stacks that a device
    converts are kept as they were read.
    """

    def __init__(self, particles: ParticleSet, settings, backend: Backend):
        self.particles, self.settings, self.backend = particles, settings, backend
        self.box, self.pixel_size = particles.box, particles.pixel_size
        self.mask_ndim = 2 if particles.is_stack2d else 3
        self.optics = np.asarray(particles.optics_index)
        self.n_optics = len(particles.optics)
        self.angles, self.offsets = particles.angles, particles.origins
        self.angle_priors, self.offset_priors = particles.angle_priors, particles.origin_priors
        self._kept = Kept(settings.memory_budget * 2**30)
        self._scratch = None if settings.scratch_dir is None else Scratch(settings.scratch_dir)

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
            unchanged = settings.memory_budget == self.settings.memory_budget
            other._kept = self._kept if unchanged else self._kept.within(settings.memory_budget * 2**30)
        if settings.scratch_dir == self.settings.scratch_dir:
            other._scratch = self._scratch
        return other

    def fetch(self, index: np.ndarray, radius: int) -> tuple[list[HalfBallParticle], np.ndarray, list[str]]:
        """Half-balls of particles `index`, on exactly `radius`.

        Returns the particles that could be read, their positions in `index`, and a sentence for each of the others.
        """
        with self.backend.limits():  # also where a thread fetches ahead while nothing computes
            results = self.backend.map(lambda i: self._get(int(i), radius), index)
        at = np.array([j for j, item in enumerate(results) if not isinstance(item, str)], int)
        found = [results[j].crop(radius) for j in at]
        return found, at, [item for item in results if isinstance(item, str)]

    def fetch_on(self, device: Device, index: np.ndarray, radius: int) -> tuple[tuple[Any, Any, Any], np.ndarray, list[str]]:
        """As :meth:`fetch`, on a device: masked and unmasked b, and w, `(p, n)` each; tilt stacks are converted there."""
        if device is HOST or self.mask_ndim == 3:
            items, at, complaints = self.fetch(index, radius)
            return upload_half_balls(items, radius, device), at, complaints
        readers = replace(self.backend, threads=min(self.backend.threads, READERS))
        with self.backend.limits():
            waiting = readers.begin(lambda i: self._read(int(i)), index)
            parts, results = [], []
            for first in range(0, max(len(index), 1), CONVERTED):  # while the next are read
                results += [future.result() for future in waiting[first : first + CONVERTED]]
                stacks = [item for item in results[first:] if not isinstance(item, str)]
                parts.append(stacks_to_half_balls(stacks, self.options(radius), device))
        at = [j for j, item in enumerate(results) if not isinstance(item, str)]
        arrays = tuple(device.xp.concatenate(part) for part in zip(*parts, strict=True))
        measured = device.get(arrays[2].any(1))
        for j, good in zip(at, measured, strict=True):
            results[j] = results[j] if good else str(_nothing_measured(index[j]))
        if not measured.all():
            arrays = tuple(array[device.put(np.flatnonzero(measured))] for array in arrays)
        return arrays, np.array(at, int)[measured], [item for item in results if isinstance(item, str)]

    def _get(self, i: int, radius: int) -> HalfBallParticle | str:
        kept = self._kept.get((i, "half-ball"))
        if kept is not None and kept.radius >= radius:
            return kept
        try:
            particle = to_half_ball(self._load(i), self.options(self._radius_to_keep(radius)))
            if not particle.weight.any():
                raise _nothing_measured(i)
        except ParticleError as problem:
            return str(problem)
        self._kept.put((i, "half-ball"), particle, particle.nbytes)
        return particle

    def _read(self, i: int) -> TiltStack | str:
        """A stack as it lies in its file, kept; or what is wrong with it."""
        try:
            stack = self._load(i)
        except ParticleError as problem:
            return str(problem)
        self._kept.put((i, "stack"), stack, stack.images.nbytes)
        return stack

    def _load(self, i: int) -> TiltStack | Volume:
        kept = self._kept.get((i, "stack"))
        if kept is not None:
            return kept
        return self.particles.load(i, locate=as_it_lies if self._scratch is None else self._scratch.locate)

    def _radius_to_keep(self, radius: int) -> int:
        full = self.box // 2
        fits = len(self) * self.bytes_per_particle(full) <= self.settings.memory_budget * 2**30
        return full if fits else radius

    def bytes_per_particle(self, radius: int) -> int:
        """Memory of one particle on a half-ball: two complex arrays and a real one."""
        return len(half_ball(radius)) * 5 * np.dtype(self.settings.real).itemsize

    def take_notes(self) -> tuple[str, ...]:
        """What a person should know of how reading went, told once."""
        return () if self._scratch is None else self._scratch.take_notes()

    def forget(self) -> None:
        """Give back the memory of all kept particles."""
        self._kept.clear()


class Kept:
    """What was read or made, least recently used first out beyond a budget in bytes; for several threads."""

    def __init__(self, budget: float):
        self.budget, self.bytes = budget, 0
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Hashable) -> Any:
        """The item, or None."""
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Hashable, item: Any, size: int) -> None:
        """Keep an item of so many bytes in place of what was kept under that key."""
        with self._lock:
            self.bytes += size - self._items.pop(key, (None, 0))[1]
            self._items[key] = item, size
            while self.bytes > self.budget and self._items:
                self.bytes -= self._items.popitem(last=False)[1][1]

    def within(self, budget: float) -> Kept:
        """The same items as far as another budget goes; a branch may have one of its own."""
        other = Kept(budget)
        with self._lock:
            items = list(self._items.items())
        for key, (item, size) in items:
            other.put(key, item, size)
        return other

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._items.clear()
            self.bytes = 0


def _nothing_measured(i: int) -> ParticleError:
    return ParticleError(f"particle {i + 1} has no measured Fourier voxel; leave it out", index=i)


def replace_key(settings) -> tuple:
    """The settings on which a converted particle depends."""
    return settings.mask_diameter, settings.correct_ctf, settings.ctf_intact_first_peak, settings.precision
