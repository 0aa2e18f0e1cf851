"""What a 3D view shows, as plain layer data: maps, particles, orientation vectors, the lattice map. No display, no Qt.

A layer is a tuple ``(data, options, kind)`` as napari's readers return it; kinds are image, points, vectors and surface.
All coordinates are in Å. Arrays are zyx, as napari wants them; everything computed here is xyz until :func:`zyx` turns it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from vdamkit.imaging.masks import soft_sphere
from vdamkit.io.particles import ParticleSet
from vdamkit.notebook.figures import CLASS_COLOURS
from vdamkit.sampling.euler import euler_to_matrix, rotation_angle
from vdamkit.sampling.point_groups import operators
from vdamkit.state import Poses, State


class Placed(Protocol):
    """Where particles lie, as far as a picture asks; :class:`vdamkit.io.particles.ParticleSet` is one."""

    coordinates: np.ndarray  # (n, 3) xyz, Å from the tomogram's centre
    subtomogram_rotations: np.ndarray  # (n, 3, 3)
    angle_priors: np.ndarray  # (n, 3) degrees, nan where there is none
    tomogram_names: np.ndarray  # (n,)


LayerData = tuple[Any, dict[str, Any], str]
COLOURS = ("class", "pmax", "change")
SMOOTH = 64  # px, of maps whose surface is sought on a grid twice as fine, so that triangles are small
PASTED_BOX = 24  # px, of the map that is pasted back: its surface is drawn once per particle
VECTOR_LENGTH = 100.0  # Å
LIGHT = np.array([0.35, 0.45, 0.82])  # xyz, unit vector towards the lamp: from above, a little right


def zyx(points: np.ndarray) -> np.ndarray:
    """xyz coordinates `(..., 3)` as zyx, or back: the one place where the order of axes changes."""
    return np.asarray(points)[..., ::-1]


def map_layers(
    maps: np.ndarray, pixel_size: float, *, sigma: float = 3.0, populations: np.ndarray | None = None
) -> list[LayerData]:
    """An isosurface image layer per class.

    Parameters
    ----------
    maps: `(K, N, N, N)` zyx. pixel_size: Å. sigma: threshold in standard deviations above the mean.
    populations: `(K,)`; the fullest class is visible, the others can be switched on.

    The box centre (index N//2) lies at the origin.
    """
    n = maps.shape[-1]
    main = 0 if populations is None else int(np.argmax(populations))
    out: list[LayerData] = []
    for k, volume in enumerate(maps):
        share = "" if populations is None or len(maps) == 1 else f" ({100 * populations[k]:.0f} %)"
        options = {
            "name": f"map{share}" if len(maps) == 1 else f"class {k + 1}{share}",
            "scale": (pixel_size,) * 3,
            "translate": (-(n // 2) * pixel_size,) * 3,
            "rendering": "iso",
            "blending": "translucent",  # the nearer surface hides the farther one; napari's default draws in layer order
            "iso_threshold": float(volume.mean() + sigma * volume.std()),
            "colormap": "gray" if len(maps) == 1 else _single_colour(k),
            "contrast_limits": _limits(volume),
            "visible": k == main,
        }
        out.append((np.asarray(volume, np.float32), options, "image"))
    return out


def _limits(volume: np.ndarray) -> tuple[float, float]:
    low, high = float(volume.min()), float(volume.max())
    return (low, high) if high > low else (low, low + 1)


def _single_colour(k: int) -> dict[str, Any]:
    return {"colors": ["black", CLASS_COLOURS[k % len(CLASS_COLOURS)]], "name": f"class {k + 1}"}


# particles ----------------------------------------------------------------------------------------------------------


def positions_of(particles: Placed, offsets: np.ndarray) -> np.ndarray:
    """Centres of particles in their tomogram, `(n, 3)` xyz in Å from the tomogram's centre.

    ``x = coordinate − A_sub origin`` (RELION jaz/tomography/particle_set.cpp:getPosition). `offsets`: rlnOrigin, Å.
    """
    return particles.coordinates - np.einsum("nij,nj->ni", particles.subtomogram_rotations, offsets)


def rotations_of(particles: Placed, angles: np.ndarray) -> np.ndarray:
    """Rotations `(n, 3, 3)` of particles in their tomogram: ``x_tomogram = R @ x_reference``; angles in degrees."""
    return particles.subtomogram_rotations @ euler_to_matrix(angles)


def prior_directions(particles: Placed) -> np.ndarray:
    """The z axis each prior points to, `(n, 3)` xyz unit vectors in the tomogram; nan where there is no tilt prior."""
    priors = particles.angle_priors
    known = ~np.isnan(priors[:, 1])
    filled = np.where(np.isnan(priors), 0.0, priors)
    directions = rotations_of(particles, filled)[:, :, 2]
    return np.where(known[:, None], directions, np.nan)


def colour_values(poses: Poses, by: str, *, previous: Poses | None = None, symmetry: str = "C1") -> np.ndarray:
    """What colours the particles, `(n,)`: class number, Pmax, or the turn in degrees since the `previous` poses."""
    if by == "class":
        return poses.class_number.astype(float)
    if by == "pmax":
        return poses.pmax.astype(float)
    if by != "change":
        raise ValueError(f"particles are coloured by one of {', '.join(COLOURS)}, not {by!r}")
    if previous is None:
        return np.zeros(len(poses.angles))
    now, before = euler_to_matrix(poses.angles), euler_to_matrix(previous.angles)
    return np.min([rotation_angle(now, before @ operator) for operator in operators(symmetry)], axis=0)


def particle_layers(
    particles: Placed, poses: Poses, tomogram: str, *, colour: str = "class", previous: Poses | None = None,
    symmetry: str = "C1", length: float = VECTOR_LENGTH,
) -> list[LayerData]:  # fmt: skip
    """Points and orientation vectors of one tomogram's particles, and the directions of their priors.

    The vector is the particle's z axis. `colour`: "class", "pmax" or "change".
    """
    mine = np.flatnonzero(particles.tomogram_names == tomogram)
    centres = positions_of(particles, poses.offsets)[mine]
    found = rotations_of(particles, poses.angles)[mine][:, :, 2]
    values = colour_values(poses, colour, previous=previous, symmetry=symmetry)[mine]
    pmax = poses.pmax[mine].astype(float)
    features = {"particle": mine, "class": poses.class_number[mine], "pmax": pmax, "value": values}
    colours = _colours(values, colour)
    out: list[LayerData] = [
        (zyx(centres), {"name": f"particles of {tomogram}", "size": length / 3, "face_color": colours, "border_width": 0,
                        "features": features, "metadata": {"tomogram": tomogram}}, "points"),
        (_arrows(centres, found, length), {"name": f"orientations by {colour}", "edge_color": colours,
                                           "edge_width": length / 8, "vector_style": "arrow", "features": features}, "vectors"),
    ]  # fmt: skip
    wanted = prior_directions(particles)[mine]
    known = ~np.isnan(wanted[:, 0])
    if known.any():
        arrows = _arrows(centres[known], wanted[known], 1.3 * length)
        options = {"name": "prior directions", "edge_color": "#8c8c8c", "edge_width": length / 16, "vector_style": "line",
                   "opacity": 0.6}  # fmt: skip
        out.append((arrows, options, "vectors"))
    return out


def _arrows(centres: np.ndarray, directions: np.ndarray, length: float) -> np.ndarray:
    """napari's vectors `(n, 2, 3)` zyx: start and displacement."""
    return np.stack([zyx(centres), zyx(directions * length)], axis=1)


def _colours(values: np.ndarray, by: str) -> np.ndarray:
    """RGBA `(n, 4)`: class colours, or a perceptually even scale; particles never visited (class 0) are grey."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    if by == "class":
        palette = np.array([to_rgba("#b0b0b0"), *(to_rgba(c) for c in CLASS_COLOURS)])
        index = np.where(values > 0, (values.astype(int) - 1) % len(CLASS_COLOURS) + 1, 0)
        return palette[index]
    top = 1.0 if by == "pmax" else max(float(np.max(values, initial=0.0)), 1e-6)
    return colormaps["viridis" if by == "pmax" else "magma"](np.clip(values / top, 0, 1))


# the map pasted back ------------------------------------------------------------------------------------------------


def lattice_layers(
    particles: Placed, poses: Poses, volume: np.ndarray, pixel_size: float, tomogram: str, *, count: int = 60,
    sigma: float = 3.0, mask_diameter: float,
) -> list[LayerData]:  # fmt: skip
    """The map's surface at the poses of `count` particles of a tomogram, the most certain ones first.

    `volume` `(N, N, N)` zyx. Neighbours in the map are cut off at half the distance between particles.
    """
    mine = np.flatnonzero(particles.tomogram_names == tomogram)
    mine = mine[poses.class_number[mine] > 0]
    mine = np.sort(mine[np.argsort(-poses.pmax[mine], kind="stable")][:count])
    if not len(mine):
        return []
    centres = positions_of(particles, poses.offsets)
    vertices, faces, normals = surface_of(volume, pixel_size, sigma=sigma, radius=_own_radius(centres[mine], mask_diameter))
    if not len(faces):
        return []
    rotations = rotations_of(particles, poses.angles)[mine]
    placed = np.einsum("pij,vj->pvi", rotations, vertices) + centres[mine][:, None]
    facing = np.einsum("pij,vj->pvi", rotations, normals) @ LIGHT
    triangles = faces + (np.arange(len(mine)) * len(vertices))[:, None, None]
    # brightness by vertex instead of a viewer's lamps, which differ and may shine from behind
    brightness = (0.5 + 0.4 * facing).astype(np.float32).ravel()
    data = (zyx(placed.reshape(-1, 3)).astype(np.float32), triangles.reshape(-1, 3), brightness)
    options = {"name": f"map at {len(mine)} particles", "shading": "none", "colormap": "gray", "contrast_limits": (0.0, 1.0)}
    return [(data, options, "surface")]


def _own_radius(centres: np.ndarray, mask_diameter: float) -> float:
    """Radius in Å of what belongs to one particle: the mask, or rather less where neighbours are nearer."""
    if len(centres) < 2:
        return mask_diameter / 2
    away = np.linalg.norm(centres[:, None] - centres, axis=-1)
    np.fill_diagonal(away, np.inf)
    return float(min(mask_diameter / 2, 0.6 * np.median(away.min(1))))


def surface_of(volume: np.ndarray, pixel_size: float, *, sigma: float, radius: float) -> tuple[np.ndarray, ...]:
    """Vertices `(v, 3)` xyz in Å from the box centre, triangles `(t, 3)` and outward normals `(v, 3)` xyz of the surface at
    mean + sigma × sd.

    Coarsened to PASTED_BOX px and cut off at `radius` Å.
    """
    from vdamkit.compare import resample

    n = volume.shape[0]
    level = float(volume.mean() + sigma * volume.std())
    box = min(n, PASTED_BOX)
    spacing = pixel_size * n / box
    inside = soft_sphere(box, radius / spacing, 3, 1.5)
    above = (resample(volume, pixel_size, spacing, box) - level) * inside - abs(level) * (1 - inside)
    vertices, faces, normals = isosurface(above)
    return (vertices - box // 2) * spacing, faces, normals


def isosurface(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a cube of values `(n, n, n)` zyx crosses 0: vertices `(v, 3)` xyz in px, triangles `(t, 3)`, normals that point
    to lower values `(v, 3)` xyz. Empty where it does not."""
    from scipy.ndimage import map_coordinates
    from skimage.measure import marching_cubes

    if not values.min() < 0 < values.max():
        return np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3))
    vertices, faces, _, _ = marching_cubes(values, 0.0)
    slope = np.stack([map_coordinates(g, vertices.T, order=1) for g in np.gradient(values)], -1)
    normals = -slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)
    return zyx(vertices), faces, zyx(normals)


def lit_surface(data: np.ndarray, options: dict[str, Any], lamp: np.ndarray = LIGHT) -> tuple[np.ndarray, ...]:
    """The isosurface of an image layer: vertices `(v, 3)` xyz in Å, triangles `(t, 3)`, and brightness `(v,)` 0.1 … 0.9 in
    the light of a `lamp` (xyz, unit vector towards it)."""
    from vdamkit.compare import resample

    n = len(data)
    finer = 2 if n <= SMOOTH else 1
    above = resample(data, finer, 1.0, finer * n) - options["iso_threshold"]
    vertices, faces, normals = isosurface(above)
    middle = np.array(options["translate"][::-1]) + options["scale"][0] * (n // 2)
    points = middle + (vertices - len(above) // 2) / finer * options["scale"][0]
    return points, faces, (0.5 + 0.4 * (normals @ lamp)).astype(np.float32)


def as_surfaces(layers: list[LayerData]) -> list[LayerData]:
    """The layers with maps as surfaces, for viewers without a GPU: to look for a surface behind every pixel of a picture, as
    napari does, takes them ten seconds, to draw one that is known a tenth of a second. Maps that have none are left out."""
    out: list[LayerData] = []
    for data, options, kind in layers:
        if kind != "image":
            out.append((data, options, kind))
            continue
        points, faces, brightness = lit_surface(data, options)
        if len(faces):
            kept = {key: options[key] for key in ("name", "colormap", "visible") if key in options}
            look = {"shading": "none", "contrast_limits": (0.0, 1.0)}
            out.append(((zyx(points).astype(np.float32), faces, brightness), kept | look, "surface"))
    return out


# all together -------------------------------------------------------------------------------------------------------


def layers_for(
    state: State, particles: ParticleSet, settings: Any, *, tomogram: str | None = None, colour: str = "class",
    sigma: float = 3.0, paste: int = 60, previous: State | None = None,
) -> dict[str, list[LayerData]]:  # fmt: skip
    """Everything a 3D view shows of a state: ``{"map": [...], "tomogram": [...]}``.

    Parameters
    ----------
    state, particles, settings: of a session. tomogram: name; default the one with most particles.
    colour: of particles, "class", "pmax" or "change" (since `previous`). sigma: threshold of the surfaces.
    paste: number of particles at which the map is pasted back; 0 for none.
    """
    px = particles.pixel_size
    maps = (state.maps / state.grey_scale).astype(np.float32)
    name = tomogram or fullest_tomogram(particles)
    if name not in set(particles.tomogram_names):
        raise ValueError(f"there is no tomogram {name!r}; there are {', '.join(sorted(set(particles.tomogram_names)))}")
    before = None if previous is None else previous.poses
    scene = particle_layers(particles, state.poses, name, colour=colour, previous=before, symmetry=settings.search_symmetry)
    if paste:
        volume = maps[int(np.argmax(state.class_probability))]
        scene += lattice_layers(
            particles, state.poses, volume, px, name, count=paste, sigma=sigma, mask_diameter=settings.mask_diameter
        )
    return {"map": map_layers(maps, px, sigma=sigma, populations=state.class_probability), "tomogram": scene}


def fullest_tomogram(particles: Placed) -> str:
    """Name of the tomogram with most particles."""
    names, counts = np.unique(particles.tomogram_names.astype(str), return_counts=True)
    return str(names[int(np.argmax(counts))])
