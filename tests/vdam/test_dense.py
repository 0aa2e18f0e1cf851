"""The matrix products of the E-step's first level, against the likelihood and against each other."""

import numpy as np
import pytest
from helpers_vdamkit import Blobs, make_search

from vdamkit.imaging.halfball import half_ball, half_turn_pairs
from vdamkit.imaging.turns import turns_of
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.shifts import shift_grid
from vdamkit.vdam.dense import ByHalfTurns, RowByRow, dense_scorer, interleaved
from vdamkit.vdam.search import Level

BOX, RADIUS = 16, 7
MAPS = [Blobs.random(7, reach=4.0, sigma=1.2, seed=seed).map(BOX) for seed in (2, 9)]


def scorer_of(orientations, order=1, symmetry="C1", classes=1, dtype="float64", perturbation=4.0):
    """The scorer of some orientations, all that it scores row by row, and the phases of some shifts."""
    grid, shifts = orientation_grid(order, symmetry), shift_grid(2, 1)
    search = make_search(MAPS[:classes], [Level(grid, RADIUS, False)], shifts, dtype=dtype)
    projector, references = search.projector(RADIUS), search.prepared(RADIUS)

    def rotate(some: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [projector.rotate_rows(reference, turns_of(grid, perturbation, some)) for reference in references]
        )

    phases = projector.ball.phases(shifts, BOX, projector.complex)
    scorer = dense_scorer(lambda some, parts_of: parts_of(rotate(some)), grid, orientations, RADIUS, phases)
    return scorer, rotate(orientations), phases


def particles(dtype="float64", n=3):
    rng = np.random.default_rng(5)
    images = rng.normal(size=(n, len(half_ball(RADIUS)), 2)) @ [1, 1j]
    images[:, 0] = 0  # as the E-step has them
    weight = rng.random(images.shape)
    return images.astype("complex64" if dtype == "float32" else complex), weight.astype(dtype)


def of_directions(grid, directions) -> np.ndarray:
    return (np.array(directions)[:, None] * grid.n_psi + np.arange(grid.n_psi)).ravel()


def test_scores_are_the_likelihood():
    """``Re <A, b e^{-i...}> - <A, w A> / 2``, term by term; k = 0 has no part in it."""
    orientations = of_directions(orientation_grid(1), [0, 7, 30])
    scorer, rows, phases = scorer_of(orientations)
    images, weight = particles()
    found = scorer.scores(images, weight)
    assert type(scorer) is ByHalfTurns and found.shape == (len(orientations), 3, len(phases))
    for r in (0, 5, 13, 35):
        for i in range(3):
            for s in (0, 16, 32):
                wanted = (rows[r].conj() * images[i] * phases[s]).real.sum() - 0.5 * weight[i, 1:] @ np.abs(rows[r, 1:]) ** 2
                assert found[r, i, s] == pytest.approx(wanted, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-6)])
@pytest.mark.parametrize("order, symmetry, classes", [(0, "C1", 1), (1, "C6", 2), (1, "D2", 1), (2, "O", 2)])
def test_half_turns_share_products_and_change_nothing(order, symmetry, classes, dtype, tolerance):
    grid = orientation_grid(order, symmetry)
    orientations = of_directions(grid, range(0, grid.n_directions, 2))
    scorer, rows, phases = scorer_of(orientations, order, symmetry, classes, dtype)
    assert type(scorer) is ByHalfTurns and scorer.n_rows == len(rows)
    wanted, found = (some.scores(*particles(dtype)) for some in (RowByRow(RowByRow.parts_of(rows), phases), scorer))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_where_a_prior_leaves_out_angles_every_row_is_scored_by_itself():
    grid = orientation_grid(1)
    orientations = np.delete(of_directions(grid, [3, 4]), [2, 20])
    scorer, _, _ = scorer_of(orientations)
    assert type(scorer) is RowByRow and scorer.n_rows == len(orientations)
    images, weight = particles()
    whole = scorer_of(of_directions(grid, [3, 4]))[0].scores(images, weight)
    np.testing.assert_allclose(scorer.scores(images, weight), np.delete(whole, [2, 20], axis=0), atol=1e-11)


@pytest.mark.parametrize("radius", [1, 2, 7])
def test_a_half_turn_exchanges_the_voxels_of_a_pair(radius):
    pairs, alone = half_turn_pairs(radius)
    k = half_ball(radius).k[pairs]
    np.testing.assert_array_equal(k[0] * [-1, -1, 1], k[1])
    np.testing.assert_array_equal(alone, pairs[0] == pairs[1])
    np.testing.assert_array_equal(np.sort(np.append(pairs[0], pairs[1, ~alone])), np.arange(len(half_ball(radius))))


def test_interleaving_gives_the_real_part_of_the_product():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(3, 5, 2)) @ [1, 1j] for _ in range(2))
    np.testing.assert_allclose(interleaved(a, np.float64) @ interleaved(b, np.float64).T, (a.conj() @ b.T).real)
