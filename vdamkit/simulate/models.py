"""Known particles: analytic density models as sums of Gaussians, and any MRC map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from vdamkit.errors import InputError
from vdamkit.io.mrc import read_map

MODELS = ("hexamer", "asymmetric")


def gaussian_density(
    centres: np.ndarray, sigmas: np.ndarray, weights: np.ndarray, *, box: int, pixel_size: float
) -> np.ndarray:
    """Density of a sum of isotropic Gaussians on a cubic grid, scaled to a maximum of 1.

    Parameters
    ----------
    centres: `(n, 3)` float, xyz in Å from the particle centre, which lies at index ``box // 2``.
    sigmas: `(n,)` float, standard deviations in Å. weights: `(n,)` float, heights.
    box: px. pixel_size: Å.

    Returns
    -------
    `(box, box, box)` float32, zyx.
    """
    axis = (np.arange(box) - box // 2) * pixel_size
    blurred = np.sqrt(sigmas**2 + pixel_size**2 / 12)  # a voxel holds the mean over its own width
    weights, sigmas = weights * (sigmas / blurred) ** 3, blurred
    # Each Gaussian is the outer product of three one-dimensional ones, so the sum is one einsum.
    along = [np.exp(-0.5 * ((axis - centres[:, i, None]) / sigmas[:, None]) ** 2) for i in range(3)]
    along_x, along_y, along_z = along
    density = np.einsum("nz,nyx->zyx", weights[:, None] * along_z, along_y[:, :, None] * along_x[:, None, :])
    return (density / density.max()).astype(np.float32)


def _comma_subunit() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One comma of the hexamer: Gaussians in cylinder coordinates (radius Å, azimuth degrees, height Å)."""
    beads = np.array(
        [
            # radius, azimuth, height, sigma, weight
            [38.0, 0.0, 20.0, 9.0, 0.90],  # the head, on the outer side of the lattice (+z)
            [50.0, 2.0, 12.0, 8.0, 0.90],
            [61.0, 10.0, 4.0, 8.0, 0.95],  # the tail sweeps counter-clockwise seen from +z and sinks
            [69.0, 21.0, -2.0, 8.0, 1.00],
            [72.0, 33.0, -8.0, 8.0, 1.00],
            [29.0, -14.0, -6.0, 7.0, 0.50],  # a stalk leads from the head down to the inner ring
            [24.0, -30.0, -24.0, 8.0, 0.60],
        ]
    )
    radius, azimuth, height, sigma, weight = beads.T
    angle = np.radians(azimuth)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], -1), sigma, weight


def hexamer(box: int, pixel_size: float) -> np.ndarray:
    """A C6 hexamer of comma-shaped subunits around a hole: chiral, with different top and bottom.

    Six heads lie above (+z), six tails sweep outwards and down, a narrow ring closes the bottom;
    outer radius about 80 Å. The six-fold axis is z and passes through index ``box // 2``.

    Parameters
    ----------
    box: px. pixel_size: Å.

    Returns
    -------
    `(box, box, box)` float32, zyx, maximum 1.
    """
    centres, sigmas, weights = _comma_subunit()
    turns = np.radians(60.0 * np.arange(6))
    c, s, zero, one = np.cos(turns), np.sin(turns), np.zeros(6), np.ones(6)
    rotations = np.stack([c, -s, zero, s, c, zero, zero, zero, one], -1).reshape(6, 3, 3)
    copies = np.einsum("rij,nj->rni", rotations, centres).reshape(-1, 3)
    return gaussian_density(copies, np.tile(sigmas, 6), np.tile(weights, 6), box=box, pixel_size=pixel_size)


def _lobe(
    rng: np.random.Generator,
    *,
    centre: tuple[float, float, float],
    semi_axes: tuple[float, float, float],
    beads: int,
) -> np.ndarray:
    """`(beads, 3)` points in Å, uniform in an ellipsoid but kept apart, so that grooves and holes remain."""
    points: list[np.ndarray] = []
    spacing = 0.95 * (4 / 3 * np.pi * np.prod(semi_axes) / beads) ** (1 / 3)
    while len(points) < beads:
        unit = rng.uniform(-1, 1, 3)
        point = unit * semi_axes
        if unit @ unit <= 1 and all(np.linalg.norm(point - p) > spacing for p in points):
            points.append(point)
        spacing *= 0.9995  # always ends, however full the ellipsoid is
    return np.array(points) + centre


def asymmetric(box: int, pixel_size: float, *, seed: int = 0) -> np.ndarray:
    """A C1 particle of the shape of a ribosome: a large and a small subunit, a cleft, three stalks.

    Greatest radius about 110 Å; the positions of the beads follow from `seed`, the outline does not.

    Parameters
    ----------
    box: px. pixel_size: Å. seed: of the inner structure.

    Returns
    -------
    `(box, box, box)` float32, zyx, maximum 1.
    """
    rng = np.random.default_rng(seed)
    large = _lobe(rng, centre=(-22, 4, -8), semi_axes=(52, 66, 60), beads=34)
    small = _lobe(rng, centre=(54, -8, 10), semi_axes=(28, 68, 36), beads=18)
    large_stalk = np.array([[-30, 72, 26], [-36, 86, 34], [-44, 97, 44]], float)
    second_stalk = np.array([[-40, -60, 30], [-46, -72, 46], [-52, -80, 60]], float)
    beak = np.array([[62, 62, 30], [66, 74, 46], [58, 84, 60]], float)
    centres = np.concatenate([large, small, large_stalk, second_stalk, beak])
    sigmas = np.concatenate([rng.uniform(8, 14, len(large)), rng.uniform(8, 12, len(small)), np.full(9, 8.0)])
    weights = np.concatenate([rng.uniform(0.4, 1, len(large)), rng.uniform(0.4, 1, len(small)), np.full(9, 0.7)])
    centres -= np.average(centres, axis=0, weights=weights * sigmas**3)
    return gaussian_density(centres, sigmas, weights, box=box, pixel_size=pixel_size)


def load_model(path: str | Path, *, box: int, pixel_size: float) -> np.ndarray:
    """Any MRC map as the particle, resampled to `pixel_size` around its centre and scaled to a maximum of 1.

    Parameters
    ----------
    path: an MRC map with its pixel size in the header, particle at index N // 2, density positive.
    box: px, of the result; what lies outside the map is 0. pixel_size: Å, of the result.

    Returns
    -------
    `(box, box, box)` float32, zyx. A map sampled more finely is low-pass filtered first (sigma of a
    Gaussian 0.4 new pixels), so that nothing aliases.
    """
    try:
        density, source_pixel_size = read_map(path)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; or give one of {MODELS}.") from None
    if min(density.shape) < 2:
        raise InputError(f"{path}: the particle must be a 3D map; this file has shape {density.shape}.")
    if not source_pixel_size > 0:
        raise InputError(f"{path}: the header's pixel size is {source_pixel_size}; set it to Å per voxel.")
    if density.max() <= 0:
        raise InputError(f"{path}: no positive density; give a map with positive density.")
    zoom = pixel_size / source_pixel_size
    if zoom > 1.01:
        density = ndimage.gaussian_filter(density, 0.4 * zoom)
    axes = [(np.arange(box) - box // 2) * zoom + n // 2 for n in density.shape]
    resampled = ndimage.map_coordinates(density, np.meshgrid(*axes, indexing="ij"), order=3, mode="constant")
    return (resampled / resampled.max()).astype(np.float32)


def particle_model(model: str | Path, *, box: int, pixel_size: float) -> np.ndarray:
    """The density named by `model`: `"hexamer"`, `"asymmetric"` or the path of an MRC map."""
    if model == "hexamer":
        return hexamer(box, pixel_size)
    if model == "asymmetric":
        return asymmetric(box, pixel_size)
    return load_model(model, box=box, pixel_size=pixel_size)
