"""Where the particles are and how they are turned: virus-like spheres, or free particles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from vdamkit.sampling.euler import euler_to_matrix

# A +90° rotation about y, between the frame of the normal (normal = z) and the subtomogram frame.
_NORMAL_TO_MINUS_X = euler_to_matrix([0.0, 90.0, 0.0]).T


@dataclass(frozen=True)
class Sites:
    """Particles in one tomogram. All arrays have the same first axis (n,)."""

    centres: np.ndarray  # (n, 3) Å, xyz from the tomogram centre: where the particles truly are
    rotations: np.ndarray  # (n, 3, 3) x_tomogram = R @ x_reference; column 2 is the particle's z axis
    normals: np.ndarray | None  # (n, 3) outward surface normals a picker knows; None without a surface
    kinds: np.ndarray | None = None  # (n,) 1: the model, 2: the second model, 0: nothing is there; None: all the model

    def of_kind(self, kind: int) -> np.ndarray:
        """Numbers of the sites where this kind of particle is."""
        return (
            np.flatnonzero(self.kinds == kind) if self.kinds is not None else np.arange(len(self.centres) if kind == 1 else 0)
        )


def icosahedron() -> tuple[np.ndarray, np.ndarray]:
    """Vertices `(12, 3)` of the unit icosahedron and its faces `(20, 3)` as vertex numbers."""
    golden = (1 + 5**0.5) / 2
    short = np.array([[0, a, b] for a in (-1, 1) for b in (-golden, golden)])
    vertices = np.concatenate([np.roll(short, i, axis=1) for i in range(3)]) / np.hypot(1, golden)
    near = cKDTree(vertices).query_pairs(1.1)
    edges = {frozenset(pair) for pair in near}
    faces = [
        (i, j, k)
        for i in range(12)
        for j in range(i + 1, 12)
        for k in range(j + 1, 12)
        if {frozenset((i, j)), frozenset((j, k)), frozenset((i, k))} <= edges
    ]
    return vertices, np.array(faces)


def hexagonal_sphere(subdivision: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of a geodesic sphere, hexagonal but for twelve five-fold points.

    Every face of an icosahedron is divided into ``subdivision ** 2`` triangles and blown up to the sphere.

    Parameters
    ----------
    subdivision: edges per icosahedron edge, at least 1; gives ``10 * subdivision ** 2 + 2`` points.

    Returns
    -------
    points: `(n, 3)` unit vectors (which are also the normals).
    six_fold: `(n,)` bool, False at the twelve five-fold points.
    """
    vertices, faces = icosahedron()
    steps = [(i, j, subdivision - i - j) for i in range(subdivision + 1) for j in range(subdivision + 1 - i)]
    barycentric = np.array(steps, float) / subdivision
    points = np.einsum("sb,fbx->fsx", barycentric, vertices[faces]).reshape(-1, 3)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    _, first = np.unique(np.round(points, 6) + 0.0, axis=0, return_index=True)
    points = points[np.sort(first)]
    return points, cKDTree(vertices).query(points)[0] > 1e-6


def lattice_radius(subdivision: int, spacing: float) -> float:
    """Radius in Å of the geodesic sphere whose mean neighbour distance is `spacing` Å."""
    area = (10 * subdivision**2 + 2) * spacing**2 * np.sqrt(3) / 2
    return float(np.sqrt(area / (4 * np.pi)))


def _coherent_rotations(points: np.ndarray) -> np.ndarray:
    """Rotations `(n, 3, 3)` with column 2 = normal and column 0 along the bond to a nearest neighbour."""
    _, order = cKDTree(points).query(points, k=2)
    bond = points[order[:, 1]] - points
    x_axis = bond - points * np.sum(bond * points, axis=1, keepdims=True)
    x_axis /= np.linalg.norm(x_axis, axis=1, keepdims=True)
    return np.stack([x_axis, np.cross(points, x_axis), points], -1)


def random_rotations(rng: np.random.Generator, count: int) -> np.ndarray:
    """`(count, 3, 3)` rotation matrices, uniformly distributed."""
    return Rotation.from_quat(rng.normal(size=(count, 4))).as_matrix()


def sphere_sites(
    rng: np.random.Generator,
    *,
    centre: np.ndarray,
    subdivision: int,
    spacing: float,
    occupancy: float = 1.0,
    orientation_error: float = 0.0,
    position_disorder: float = 0.0,
) -> Sites:
    """Hexamers on one virus-like sphere, every one turned as its nearest neighbours are.

    Parameters
    ----------
    centre: `(3,)` Å, of the sphere, from the tomogram centre.
    subdivision: see :func:`hexagonal_sphere`; the five-fold points stay empty.
    spacing: mean distance between neighbours in Å.
    occupancy: part of the sites that hold a particle.
    orientation_error: standard deviation in degrees, per axis, of the true orientation about the ideal one.
    position_disorder: standard deviation in Å, per axis, of the true position about the ideal one.

    Returns
    -------
    Sites; `normals` are those of the ideal sphere.
    """
    turn = random_rotations(rng, 1)[0]
    points, six_fold = hexagonal_sphere(subdivision)
    rotations = turn @ _coherent_rotations(points)
    keep = six_fold & (rng.random(len(points)) < occupancy)
    normals = rotations[keep, :, 2]
    wobble = Rotation.from_rotvec(rng.normal(0, orientation_error, (keep.sum(), 3)), degrees=True).as_matrix()
    positions = centre + lattice_radius(subdivision, spacing) * normals
    return Sites(
        centres=positions + rng.normal(0, position_disorder, positions.shape),
        rotations=rotations[keep] @ wobble,
        normals=normals,
    )


def free_sites(rng: np.random.Generator, *, count: int, half_size: np.ndarray, distance: float) -> Sites:
    """Particles with random orientations at random places, no closer to each other than `distance`.

    Parameters
    ----------
    count: number of particles. half_size: `(3,)` Å, half the extent of the region around the tomogram centre.
    distance: Å between centres; shrinks slowly when the region is too full.
    """
    centres = np.empty((0, 3))
    while len(centres) < count:
        point = rng.uniform(-1, 1, 3) * half_size
        if len(centres) == 0 or np.linalg.norm(centres - point, axis=1).min() > distance:
            centres = np.vstack([centres, point])
        distance *= 0.9998
    return Sites(centres=centres, rotations=random_rotations(rng, count), normals=None)


def picked_frames(rng: np.random.Generator, normals: np.ndarray) -> np.ndarray:
    """Subtomogram frames as RELION's sphere picker writes them: the normal is the frame's −x axis.

    The picker gives the frame of the normal (z along it, turned about it at random), composed with +90°
    about y; with (rot, tilt, psi) = (0, 90, 0) the reference's z axis then lies along the normal.
    Source: RELION tomography_python_programs/get_particle_poses/spheres.py.

    Parameters
    ----------
    normals: `(n, 3)` unit vectors, xyz.

    Returns
    -------
    `(n, 3, 3)` float64, A_subtomogram: x_tomogram = A_subtomogram @ x_subtomogram.
    """
    helper = np.where(np.abs(normals[:, [2]]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    x_axis = np.cross(helper, normals)
    x_axis /= np.linalg.norm(x_axis, axis=1, keepdims=True)
    frames = np.stack([x_axis, np.cross(normals, x_axis), normals], -1)
    spin = np.zeros((len(normals), 3))
    spin[:, 2] = rng.uniform(-180, 180, len(normals))
    return frames @ Rotation.from_rotvec(spin, degrees=True).as_matrix() @ _NORMAL_TO_MINUS_X
