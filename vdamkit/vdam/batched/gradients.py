"""From the sums of a mini-batch to the gradients of a map, on a device; see `vdam.moments` for what is computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from vdamkit.backend import Backend
from vdamkit.backend.device import Device, or_on_host
from vdamkit.imaging.projector import PAD, PaddedGrid, points_within
from vdamkit.sampling.point_groups import operators
from vdamkit.vdam import moments
from vdamkit.vdam.moments import HalfGradients, complete, padded_shells, weight_floor


def half_gradients(grid: PaddedGrid, cubes: Any, group: str, radius: int, backend: Backend) -> HalfGradients:
    """:func:`vdam.moments.half_gradients` of cubes `(2, 3, size)` on the back-end's first device; the result is the host's.

    Where the device has no memory for it, the machine computes it.
    """
    owner = backend.device

    def work(device: Device) -> HalfGradients:
        if device is owner:
            return _on_device(device, grid, cubes, group, radius)
        with owner.active():
            here = owner.get(cubes)
        return moments.half_gradients(grid, here, group, radius, backend)

    return or_on_host(owner, work)


def _on_device(device: Device, grid: PaddedGrid, cubes: Any, group: str, radius: int) -> HalfGradients:
    xp, kind = device.xp, np.result_type(grid.dtype, np.complex64)
    cubes = symmetrise(device, grid, complete(grid, cubes), group)
    shells = padded_shells(grid.half_width, radius, grid.box)
    inside, shell = _kept(device, "shells", (grid.half_width, radius, grid.box), shells.inside, shells.shell)
    means, d = np.zeros((2, grid.box // 2 + 1)), xp.zeros((2, grid.size), kind)
    for h in (0, 1):
        real, imaginary, w = cubes[h][:, inside]
        means[h], floor = weight_floor(shells, device.get(w))
        d[h, inside] = (real + 1j * imaginary) / xp.maximum(w, device.put(floor)[shell])
    d.reshape(2, *grid.shape)[..., 0] *= 0.5  # to_map lets every entry stand for its mate too; kx = 0 holds both
    maps = grid.to_map(d, device) / grid.dtype.type(PAD**3)
    axes = (1, 2, 3)
    transforms = xp.fft.rfftn(xp.fft.ifftshift(maps, axes), axes=axes) / grid.dtype.type(grid.box**3)
    return HalfGradients(device.get(transforms), means * PAD**3)


def symmetrise(device: Device, grid: PaddedGrid, cubes: Any, group: str) -> Any:
    """Sum completed half cubes `(2, 3, size)` over the operators of a point group; as :func:`vdam.moments.symmetrise`."""
    ops = operators(group)[1:]
    if not len(ops):
        return cubes
    kind, radius = np.result_type(grid.dtype, np.complex64), (grid.half_width - 1) / PAD
    points, flat = points_within(grid.half_width, radius)
    key = (grid.half_width, radius, grid.dtype)
    source, at = _kept(device, "points", key, points.astype(grid.dtype), flat.astype(np.int32))
    out = cubes.copy()
    slab = device.xp.zeros((1, grid.size), kind)  # what lies beyond the points stays 0
    turns = device.put(ops.transpose(0, 2, 1).astype(grid.dtype))
    for h in (0, 1):
        data = (cubes[h, 0] + 1j * cubes[h, 1]).astype(kind, copy=False)
        weight = cubes[h, 2].astype(kind)  # has no phase: as the real part of what is turned
        for turn in turns:
            for cube, rows in ((data, (0, 1)), (weight, (2,))):
                device.kernels.tilt(cube, turn[None], source, at, grid.half_width, slab)
                for row, part in zip(rows, (slab[0].real, slab[0].imag), strict=False):
                    out[h, row] += part
    return out


def _kept(device: Device, name: str, key: tuple, *arrays: np.ndarray) -> list[Any]:
    """Arrays that stay on the device from mini-batch to mini-batch."""
    found = device.tables.get((name, *key))  # looked up once: another thread may release the device meanwhile
    if found is None:
        found = device.tables[(name, *key)] = [device.put(array) for array in arrays]
    return found
