"""The projector's compiled loops, against those of SciPy and by themselves."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers_vdamkit import Blobs, random_rotations

import vdamkit as vk
from vdamkit.imaging.projector import Projector, get_projector
from vdamkit.imaging.turns import Turns
from vdamkit.sampling.euler import euler_to_matrix

pytest.importorskip("numba", reason="the extra [fast] is not installed")
from vdamkit.imaging.compiled import CompiledProjector

DATA = Path(__file__).parents[2] / "data" / "stacks2d" / "optimisation_set.star"
BOX, RADIUS = 24, 10
MAP = Blobs.random(12, reach=5.5, sigma=1.3, seed=4).map(BOX)
ROWS = 8
TOLERANCE = {np.float64: 1e-13, np.float32: 1e-6}


def some_turns(seed: int) -> Turns:
    """Rows of three directions everywhere on the sphere, among them the poles and a quarter turn, whose points lie on the
    lattice itself; some of the rows share an interpolation."""
    some = np.random.default_rng(seed).uniform([0, 0, 0], [360, 180, 0], (3, 3))
    some[0] = [(0, 0, 0), (90, 90, 0), (0, 180, 0)][seed % 3]
    direction, base, quarter = np.array(
        [(0, 0, 0), (1, 1, 0), (1, 1, 3), (1, 2, 1), (2, 1, 2), (2, 3, 0), (2, 3, 1), (2, 3, 2)]
    ).T
    return Turns(euler_to_matrix(some), direction, base, quarter, np.array([0.0, 15.0, 37.5, -80.0]))


def both(dtype) -> tuple[Projector, CompiledProjector]:
    return Projector(BOX, RADIUS, dtype), CompiledProjector(BOX, RADIUS, dtype)


def rows_of(projector: Projector, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(ROWS, len(projector.ball), 2)) @ [1, 1j]
    return data.astype(projector.complex), rng.uniform(0, 2, data.shape).astype(projector.dtype)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("seed", range(6))
def test_the_compiled_loops_give_scipys_numbers(dtype, seed):
    plain, quick = both(dtype)
    reference, turns = plain.prepare(MAP), some_turns(seed)
    assert gap(plain.rotate_rows(reference, turns), quick.rotate_rows(reference, turns)) < TOLERANCE[dtype]
    assert gap(plain.tilt(reference, turns.tilts), quick.tilt(reference, turns.tilts)) < TOLERANCE[dtype]
    cubes = np.zeros((2, 3, plain.grid.size), dtype)
    for projector, cube in zip((plain, quick), cubes, strict=True):
        projector.scatter_rows(cube, turns, *rows_of(plain, seed))
    assert gap(cubes[0, :2], cubes[1, :2]) < TOLERANCE[dtype]
    assert gap(cubes[0, 2], cubes[1, 2]) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [Projector, CompiledProjector])
def test_scattering_rows_is_the_adjoint_of_rotating_them(kind):
    projector = kind(BOX, RADIUS, np.float64)
    for seed in range(4):
        turns, (data, total) = some_turns(seed), rows_of(projector, seed)
        x = np.random.default_rng(seed).normal(size=(2, projector.grid.size))
        cube = np.zeros((3, projector.grid.size))
        rows = projector.rotate_rows(x, turns)
        projector.scatter_rows(cube, turns, data, total)
        assert (rows.conj() * data).real.sum() == pytest.approx((x * cube[:2]).sum(), rel=1e-11)
        assert cube[2].min() >= 0


def test_a_rotation_is_right_and_turns_the_right_way():
    blob = Blobs.random(5, reach=5.0, sigma=1.4, seed=8)
    projector = CompiledProjector(BOX, RADIUS, np.float32)
    reference = projector.prepare(blob.map(BOX))
    for rotation in random_rotations(5, 3):
        truth = blob.turned(rotation).transform(projector.ball.k, BOX)
        found = projector.rotate(reference, rotation)
        assert np.linalg.norm(found - truth) < 0.05 * np.linalg.norm(truth)


def test_scattering_adds_to_what_is_there_and_does_not_depend_on_what_a_thread_did_before():
    projector = CompiledProjector(BOX, RADIUS, np.float64)
    data, total = rows_of(projector, 1)
    once, twice = np.zeros((2, 3, projector.grid.size))
    projector.scatter_rows(once, some_turns(1), data, total)
    projector.rotate_rows(projector.prepare(MAP), some_turns(2))
    projector.scatter_rows(twice, some_turns(1), data, total)
    np.testing.assert_array_equal(once, twice)
    projector.scatter_rows(twice, some_turns(1), data, total)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-12, atol=1e-12)


def test_threads_do_not_disturb_each_other():
    projector = CompiledProjector(BOX, RADIUS, np.float32)
    reference = projector.prepare(MAP)

    def rotated(seed: int) -> np.ndarray:
        return projector.rotate_rows(reference, some_turns(seed))

    alone = [rotated(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone, pool.map(rotated, range(12)), strict=True):
            np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("wrong", [np.full((1, 3, 3), np.nan), 1.1 * np.eye(3)[None]])
def test_what_is_not_a_rotation_is_refused_before_anything_is_read(wrong):
    projector = CompiledProjector(BOX, RADIUS, np.float32)
    with pytest.raises(ValueError, match="not rotations"):
        projector.tilt(projector.prepare(MAP), wrong)
    with pytest.raises(ValueError, match="not rotations"):
        projector.rotate_rows(projector.prepare(MAP), Turns.single(wrong))


def test_the_compiled_projector_is_used_where_numba_is_and_scipys_where_it_is_not(monkeypatch):
    get_projector.cache_clear()
    assert type(get_projector(BOX, RADIUS, "float32")) is CompiledProjector
    get_projector.cache_clear()
    monkeypatch.setitem(sys.modules, "vdamkit.imaging.compiled", None)
    assert type(get_projector(BOX, RADIUS, "float32")) is Projector
    get_projector.cache_clear()


def test_a_mini_batch_without_numba_ends_with_the_same_map(monkeypatch):
    """Two mini-batches of the particles in `data/`, with the compiled loops and with SciPy's."""
    maps = []
    for without in (False, True):
        if without:
            monkeypatch.setitem(sys.modules, "vdamkit.imaging.compiled", None)
        get_projector.cache_clear()
        job = vk.Session(DATA, vk.Settings(mini_batches=12, symmetry="C6", tilt_prior_width=10, mask_diameter=230))
        job.run(2)
        maps.append(job.state.maps)
    get_projector.cache_clear()
    np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=1e-4 * np.abs(maps[0]).max())
