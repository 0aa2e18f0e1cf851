"""Scores of the finer levels, as matrix products and compiled, against their definition."""

import numpy as np
import pytest

from vdamkit.vdam import finer


def case(dtype, n: int, at: list[list[int]], shifts: list[list[int]]) -> tuple:
    """Arguments of `finer.scores`, some particles of a mini-batch of seven, and what it should give."""
    rng = np.random.default_rng(n)
    kind = np.result_type(dtype, np.complex64)
    rows, phases, images = ((rng.normal(size=(m, n, 2)) @ [1, 1j]).astype(kind) for m in (40, 19, 7))
    weight = rng.uniform(0, 2, (7, n)).astype(dtype)
    particles = rng.permutation(7)[: len(at)].tolist()
    at, shifts = [np.array(mine) for mine in at], [np.array(mine) for mine in shifts]
    counted = np.arange(n) > 0  # k = 0 has no part in the energy
    wanted = [
        np.einsum("rk,sk,k->rs", rows[mine].conj(), phases[some], images[i]).real
        - 0.5 * (np.abs(rows[mine]) ** 2 @ (weight[i] * counted))[:, None]
        for mine, some, i in zip(at, shifts, particles, strict=True)
    ]
    return (rows, at, phases, shifts, images, weight, particles), wanted


CASES = {
    "one pair": ([[7]], [[2]]),
    "few": ([[3, 4, 30], [0], [20]], [[0, 8], list(range(9)), [1, 3]]),
    "many": ([list(range(40)), list(range(0, 40, 3))], [list(range(19)), [4, 5, 6, 7, 18]]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("waste", [0, 8, 1000])
def test_particles_are_scored_together_or_one_by_one(name, waste, monkeypatch):
    monkeypatch.setattr("vdamkit.vdam.finer.WASTE", waste)
    arguments, wanted = case(np.float64, 30, *CASES[name])
    for expected, found in zip(wanted, finer.scores(*arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [1, 5, 512, 513, 1543])
def test_compiled_scores_are_the_same(name, dtype, n):
    """Voxels that fill a block, and vectors, exactly or not."""
    pytest.importorskip("numba", reason="the extra [fast] is not installed")
    from vdamkit.vdam.finer_compiled import scores

    arguments, wanted = case(dtype, n, *CASES[name])
    for expected, found in zip(wanted, scores(*arguments), strict=True):
        assert found.dtype == dtype
        tolerance = (1e-13 if dtype == np.float64 else 2e-6) * n
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_compiled_scores_of_a_coarser_level_read_the_first_voxels_of_the_images():
    pytest.importorskip("numba", reason="the extra [fast] is not installed")
    from vdamkit.vdam.finer_compiled import scores

    (rows, at, phases, shifts, images, weight, particles), wanted = case(np.float32, 100, *CASES["few"])
    longer = [np.concatenate([values, values + 1], 1) for values in (images, weight)]
    for score in (finer.scores, scores):
        for expected, found in zip(wanted, score(rows, at, phases, shifts, *longer, particles), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("count", [1018, 1003, 10])
def test_compiled_sums_do_not_depend_on_where_arrays_lie(count):
    """Of a loop that writes where it might read LLVM makes two, which round differently. Which one runs is up to addresses: the
    slow one also where an array lies just behind another, as a negative place would be counted from the end."""
    pytest.importorskip("numba", reason="the extra [fast] is not installed")
    from vdamkit.vdam.finer_compiled import NUMBERS, TILE, _energies, _tile

    rng, places, seen = np.random.default_rng(count), np.arange(TILE) * NUMBERS, set()
    for behind in range(0, NUMBERS, 8):
        memory = rng.normal(size=12 * NUMBERS).astype(np.float32)
        rows, moved = (memory[first : first + TILE * NUMBERS] for first in (6 * NUMBERS, 0))
        rows[:], moved[:] = (np.random.default_rng(seed).normal(size=TILE * NUMBERS) for seed in (1, 2))
        sums = memory[TILE * NUMBERS + behind :][: TILE * TILE]
        _tile(rows, places, moved, count, sums)
        seen.add(sums.tobytes())
        _energies(rows, places, moved, count, sums)
        seen.add(sums[:TILE].tobytes())
    assert len(seen) == 2
