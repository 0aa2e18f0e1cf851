"""Tilt stacks to half-balls on a device: what `convert` does with one particle, for several in a handful of launches.

A file holds 41 images where a half-ball has a tenth of their pixels' worth of numbers, and on a processor the insertion of a
stack takes as long as its search on a device. So the images go to the device as they were read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vdamkit.backend.device import Device
from vdamkit.imaging.convert import (
    HalfBallParticle,
    ImagingOptions,
    insertion_factors,
    insertion_grid,
    sample_plane,
    stack_ctf,
)
from vdamkit.imaging.device_projector import whole_number_scale
from vdamkit.imaging.halfball import half_ball, places
from vdamkit.imaging.masks import blend_outside, soft_sphere
from vdamkit.io.particle import TiltStack

AT_ONCE = 16  # particles whose insertion cubes exist at the same time
SHARE = 1 / 16  # of a device's room that these may take


def stacks_to_half_balls(stacks: Sequence[TiltStack], options: ImagingOptions, device: Device) -> tuple[Any, Any, Any]:
    """Half-balls of some particles, on the device: masked and unmasked b `(p, n)` complex, w `(p, n)` real.

    As :func:`vdamkit.imaging.convert.to_half_ball` makes them, to rounding.
    """
    xp, real, n = device.xp, np.dtype(options.dtype), len(half_ball(options.radius))
    kind = np.result_type(real, np.complex64)
    masked, unmasked = (xp.empty((len(stacks), n), kind) for _ in range(2))
    weight = xp.empty((len(stacks), n), real)
    most = _at_once(options, device)  # asked once: what is free changes
    for some in _alike(stacks, most):
        at = device.put(np.array(some))
        masked[at], unmasked[at], weight[at] = _convert([stacks[i] for i in some], options, device, most)
    return masked, unmasked, weight


def upload_half_balls(particles: Sequence[HalfBallParticle], radius: int, device: Device) -> tuple[Any, Any, Any]:
    """Half-balls made elsewhere, cropped to `radius` and brought to a device; the same three arrays."""
    n = len(half_ball(radius))
    kinds = [a.dtype for a in (particles[0].masked, particles[0].weight)] if particles else [np.complex64, np.float32]
    arrays = [np.empty((len(particles), n), kind) for kind in (kinds[0], *kinds)]
    for i, particle in enumerate(particles):
        for array, name in zip(arrays, ("masked", "unmasked", "weight"), strict=True):
            array[i] = getattr(particle, name)[:n]
    masked, unmasked, weight = map(device.upload, arrays)
    return masked, unmasked, weight


def _at_once(options: ImagingOptions, device: Device) -> int:
    """Particles that have room: whole numbers of two halves, three complex cubes, and what turns one into the other."""
    each = insertion_grid(options.box, options.dtype).size * (6 * 8 + 6 * np.dtype(options.dtype).itemsize + 3 * 16)
    return int(np.clip(SHARE * device.room // each, 1, AT_ONCE))


def _alike(stacks: Sequence[TiltStack], most: int) -> list[list[int]]:
    """Numbers of stacks that can be converted together, at most so many."""
    groups: dict[tuple, list[int]] = {}
    for i, stack in enumerate(stacks):
        o = stack.optics
        groups.setdefault((o.box, o.pixel_size, o.premultiplied, o.ctf_corrected, stack.b_factor_per_dose), []).append(i)
    return [group[first : first + most] for group in groups.values() for first in range(0, len(group), most)]


def _convert(stacks: Sequence[TiltStack], options: ImagingOptions, device: Device, most: int) -> tuple[Any, Any, Any]:
    """Of stacks that are alike, at most `most`: samples of their planes, inserted side by side, read back."""
    xp, real, optics = device.xp, np.dtype(options.dtype), stacks[0].optics
    kind = np.result_type(real, np.complex64)
    grid = insertion_grid(options.box, options.dtype)
    plane = sample_plane(optics.box, optics.pixel_size, options.box, options.pixel_size, options.dtype)
    factors = insertion_factors(optics, plane, options)
    transfer = stack_ctf(stacks, plane.frequencies, options, device)
    lift = device.put(factors.data)
    lift = (xp.broadcast_to(lift, transfer.shape) if optics.premultiplied else transfer * lift).astype(real)
    samples = xp.empty((2, *transfer.shape), kind)  # the kernel's two halves: masked, unmasked
    weights = xp.zeros((2, *transfer.shape), real)  # the same for both, so inserted with the first
    weights[0] = transfer**2 * device.put(factors.weight)
    images = device.upload(np.concatenate([stack.images for stack in stacks]).astype(real, copy=False))
    mask = device.put(soft_sphere(optics.box, options.mask_diameter / (2 * optics.pixel_size), 2))
    rows, columns, along_y, along_x = (device.put(a) for a in (plane.rows, plane.columns, plane.along_y, plane.along_x))
    for out, version in zip(samples, (blend_outside(images, mask), images), strict=True):
        transform = along_y @ (version @ along_x).view(kind)
        out[:] = transform[:, rows, columns] * lift
    tilts = [len(stack.images) for stack in stacks]
    scales = tuple(whole_number_scale(float(abs(a).max()), 8 * max(tilts) * len(plane.rows)) for a in (samples, weights))
    turns = device.put(np.concatenate([stack.rotations for stack in stacks]).astype(real))
    owner = device.put(np.repeat(np.arange(len(stacks), dtype=np.int32), tilts))
    source, source_at = device.put(plane.at.astype(real)), device.put(np.arange(len(plane.rows), dtype=np.int32))
    sums = xp.zeros((len(stacks), 2, 3, grid.size), np.int64)
    device.kernels.tilt_adjoint(samples, weights, turns, owner, source, source_at, grid.half_width, scales, sums)
    cubes = xp.empty((len(stacks), 3, grid.size), kind)
    for half in (0, 1):
        cubes[:, half] = (sums[:, half, 0] + 1j * sums[:, half, 1]) / scales[0]
    cubes[:, 2] = sums[:, 0, 2] / scales[1]
    maps = xp.zeros((most, 3, *3 * [options.box]), real)  # of always the same size: see _read_back
    maps[: len(stacks)] = grid.to_map(cubes, device)
    masked, unmasked, weight = _read_back(maps, options, device)[: len(stacks)].swapaxes(0, 1)
    grey = real.type(options.grey_scale)
    return masked * grey, unmasked * grey, weight.real


def _read_back(maps: Any, options: ImagingOptions, device: Device) -> Any:
    """Transforms of maps `(p, 3, box, box, box)` on the half-ball, `(p, 3, n)` complex.

    A device plans its transforms anew for each number of maps.
    """
    xp, axes = device.xp, (2, 3, 4)
    transform = xp.fft.rfftn(xp.fft.ifftshift(maps, axes), axes=axes).reshape(*maps.shape[:2], -1)
    at, flip = places(options.box, options.radius)
    mate = np.zeros(len(at), bool)
    mate[flip] = True
    values = transform[:, :, device.put(at)]
    values = xp.where(device.put(mate), values.conj(), values)
    return values / np.dtype(options.dtype).type(options.box**3)
