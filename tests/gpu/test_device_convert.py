"""Tilt stacks converted on a device: the half-balls that the CPU makes of them, whatever goes together."""

from dataclasses import replace

import numpy as np
import pytest

import vdamkit as vk
from vdamkit.backend.cuda import CudaDevice
from vdamkit.errors import ParticleError
from vdamkit.imaging.convert import ImagingOptions, insertion_grid, to_half_ball
from vdamkit.imaging.device_convert import SHARE, stacks_to_half_balls, upload_half_balls
from vdamkit.io.particles import open_particles

OPTIONS = ImagingOptions(box=16, pixel_size=20.0, radius=7, mask_diameter=220.0)


@pytest.fixture
def stacks(few_particles):
    """Of two optics groups, with different numbers of tilts."""
    particles = open_particles(few_particles)
    found = [particles.load(i) for i in range(0, len(particles), 3)]
    found[1] = replace(found[1], **{name: getattr(found[1], name)[2:] for name in
                                    ("images", "rotations", "defocus_u", "defocus_v", "defocus_angle", "phase_shift",
                                     "ctf_scale", "dose")})  # fmt: skip
    return found


def mixed(stacks):
    """Some in other units, already corrected, with a dose envelope of another kind or of another microscope."""
    changes = [{"premultiplied": False}, {"pixel_size": 18.0}, {"ctf_corrected": True}, {"voltage_kv": 200.0}]
    out = [replace(stack, optics=replace(stack.optics, **change)) for stack, change in zip(stacks, changes, strict=False)]
    return [*out, replace(stacks[4], b_factor_per_dose=2.0), *stacks[5:]]


def compare(device, stacks, options, atol):
    with device.active():
        found = [device.get(array) for array in stacks_to_half_balls(stacks, options, device)]
    for i, stack in enumerate(stacks):
        wanted = to_half_ball(stack, options)
        for array, name in zip(found, ("masked", "unmasked", "weight"), strict=True):
            other = getattr(wanted, name)
            assert array.dtype == other.dtype
            np.testing.assert_allclose(array[i], other, rtol=0, atol=atol * np.abs(other).max(), err_msg=f"{name} of {i}")


@pytest.mark.parametrize("options", [{}, {"correct_ctf": False}, {"intact_first_peak": True, "grey_scale": 3.0}, {"radius": 4}])
def test_half_balls_are_the_cpus(cuda, stacks, options):
    compare(CudaDevice(0), stacks, replace(OPTIONS, **options), 3e-5)


def test_stacks_that_are_not_alike(cuda, stacks):
    compare(CudaDevice(0), mixed(stacks), OPTIONS, 3e-5)


def test_double_precision(cuda, stacks):
    compare(CudaDevice(0), stacks[:2], replace(OPTIONS, dtype="float64"), 1e-12)


def test_little_memory_converts_fewer_at_a_time(cuda, stacks):
    compare(CudaDevice(0, 1), stacks, OPTIONS, 3e-5)


def test_memory_that_fills_meanwhile(cuda, stacks):
    """Room for three at first, and for half as many at every later look."""

    class Filling(CudaDevice):
        looks = 0

        @property
        def room(self):
            self.looks += 1
            each = insertion_grid(OPTIONS.box, OPTIONS.dtype).size * (6 * 8 + 6 * 4 + 3 * 16)
            return int(3.5 * each / SHARE) >> (self.looks - 1)

    compare(Filling(0), stacks, OPTIONS, 3e-5)


def test_upload_crops_and_takes_none(cuda, stacks):
    device, half_balls = CudaDevice(0), [to_half_ball(stack, OPTIONS) for stack in stacks[:3]]
    with device.active():
        masked, unmasked, weight = (device.get(a) for a in upload_half_balls(half_balls, 4, device))
        assert [len(device.get(a)) for a in upload_half_balls([], 4, device)] == [0, 0, 0]
    small = half_balls[1].crop(4)
    for array, name in ((masked, "masked"), (unmasked, "unmasked"), (weight, "weight")):
        np.testing.assert_array_equal(array[1], getattr(small, name))


def test_unreadable_particles_are_told(cuda, few_particles, monkeypatch):
    """Those that cannot be read, and those of which nothing was measured, are left out, each with a sentence."""
    job = vk.Session(few_particles, vk.Settings(mask_diameter=220.0, device="cuda"))
    device, load = CudaDevice(0), type(job.particles).load

    def some(particles, i, **options):
        if i == 3:
            raise ParticleError("particle 4 is gone", index=i)
        stack = load(particles, i, **options)
        return replace(stack, ctf_scale=0 * stack.ctf_scale) if i == 5 else stack

    monkeypatch.setattr(type(job.particles), "load", some)
    with device.active():
        arrays, at, told = job._source.fetch_on(device, np.arange(2, 8), 5)
    assert at.tolist() == [0, 2, 4, 5]
    assert [len(array) for array in arrays] == [4, 4, 4]
    assert told[0] == "particle 4 is gone" and "particle 6 has no measured Fourier voxel" in told[1]
