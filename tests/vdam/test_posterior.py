"""The E-step against its definition, planted poses, and Bayes' rule itself."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_vdamkit import (
    Blobs,
    Pose,
    brute_log_posterior,
    dense_posterior,
    grid_rows,
    make_search,
    plant,
    random_rotations,
)

from vdamkit.sampling.euler import euler_to_matrix, rotation_angle
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.priors import OrientationPrior
from vdamkit.sampling.shifts import child_offsets, shift_grid
from vdamkit.settings import Settings
from vdamkit.vdam.posterior import _by_group, directions_per_group, run_search
from vdamkit.vdam.search import Candidates, Level, coarse_radius, is_local, plan_levels

BOX, RADIUS = 16, 7
OBJECT = Blobs.random(7, reach=4.0, sigma=1.2, seed=2)
OTHER = Blobs.random(7, reach=4.0, sigma=1.2, seed=9)
MAP, SECOND = OBJECT.map(BOX), OTHER.map(BOX)
POWER = float((MAP**2).sum()) / BOX**6


def tick(_):
    pass


def search_of(order=1, radius=RADIUS, shifts=None, fine=False, volumes=(MAP,), **changes):
    shifts = shift_grid(2, 1) if shifts is None else shifts
    return make_search(volumes, [Level(orientation_grid(order), radius, fine)], shifts, **changes)


def grid_poses(search, n: int, seed: int, classes: int = 1) -> tuple[list[Pose], np.ndarray]:
    rng = np.random.default_rng(seed)
    level = search.levels[-1]
    rotations, shifts = level.grid.rotations(search.perturbation), search.shifts(level.fine_shifts)
    where = np.stack(
        [
            rng.integers(classes, size=n),
            rng.integers(len(rotations), size=n),
            rng.integers(len(shifts), size=n),
        ],
        1,
    )
    return [Pose(rotations[r], shifts[s], int(c)) for c, r, s in where], where


def softmax(log: np.ndarray) -> np.ndarray:
    p = np.exp(log - log.max())
    return p / p.sum()


@pytest.mark.parametrize("case", ["plain", "perturbed", "two classes", "offset prior"])
def test_posterior_is_bayes_rule(case):
    """All weights, the evidence and the best pose, from the definition."""
    changes = {
        "plain": {}, "perturbed": {"perturbation": 11.3},
        "two classes": {"volumes": (MAP, SECOND), "log_class": np.log([0.3, 0.7])}, "offset prior": {"sigma_offset": 0.8},
    }[case]  # fmt: skip
    search = search_of(0, **changes)
    poses, _ = grid_poses(search, 4, 3)
    batch, _ = plant(search, poses, 30 * POWER, 4)
    offsets = np.random.default_rng(5).uniform(-1, 1, (2, 4, 3))
    batch = replace(batch, offsets=offsets[0], offset_priors=offsets[1])
    rows = grid_rows(search)
    for i, posterior in enumerate(run_search(search, batch, None, tick)):
        log = brute_log_posterior(search, batch, i, rows)
        wanted, found = softmax(log), dense_posterior(search, posterior)
        np.testing.assert_allclose(found, wanted, atol=1e-9)
        assert posterior.log_evidence == pytest.approx(np.log(np.exp(log - log.max()).sum()) + log.max(), rel=1e-9)
        k, r, s = np.unravel_index(wanted.argmax(), wanted.shape)
        assert posterior.best[:2] == (k, r)
        assert posterior.shifts[posterior.best[2]] == s
        assert posterior.pmax == pytest.approx(wanted.max(), rel=1e-9)


def test_planted_poses_are_found():
    """Exhaustive search over 576 rotations and 33 shifts, pose on the grid."""
    search = search_of()
    poses, where = grid_poses(search, 12, 6)
    batch, _ = plant(search, poses, 0.5 * POWER, 7)
    for posterior, (_, r, s) in zip(run_search(search, batch, None, tick), where, strict=True):
        assert posterior.best[1] == r
        assert posterior.shifts[posterior.best[2]] == s
        assert posterior.pmax > 0.9


def test_poses_off_the_grid_are_found_by_levels():
    """Three levels down to 7.5 degrees and half a pixel; data from closed form, not from the projector."""
    levels = plan_levels(2, "C1", box=BOX, pixel_size=8, mask_diameter=90, radius=RADIUS, adaptive=True)
    search = make_search([MAP], levels, shift_grid(2, 1) + 0.3, child_offsets=child_offsets(1.0), perturbation=3.0,
                         max_significant=100, adaptive_fraction=0.999)  # fmt: skip
    rng = np.random.default_rng(8)
    poses = [Pose(r, rng.uniform(-1, 1, 3)) for r in random_rotations(5, 9)]
    batch, _ = plant(search, poses, 0.5 * POWER, 1, model=lambda p, k: OBJECT.turned(p.rotation).transform(k, BOX))
    for pose, posterior in zip(poses, run_search(search, batch, None, tick), strict=True):
        found = search.levels[-1].grid.rotations(3.0, np.array([posterior.best[1]]))[0]
        assert rotation_angle(found, pose.rotation) < 12  # nearest of the grid: up to 5
        assert np.abs(search.shifts(True)[posterior.shifts[posterior.best[2]]] - pose.shift).max() < 0.5


def test_poses_are_right_as_often_as_their_posterior_says():
    """Truth drawn from the prior: the mean posterior of the truth equals the mean of sum p². A wrong variance or Friedel
    weight breaks this."""
    search = search_of(shifts=shift_grid(1, 1))
    poses, where = grid_poses(search, 120, 10)
    for sigma2 in (25 * POWER, 60 * POWER):
        batch, _ = plant(search, poses, sigma2, 11)
        truth, square = [], []
        for posterior, at in zip(run_search(search, batch, None, tick), where, strict=True):
            p = dense_posterior(search, posterior)
            truth.append(p[tuple(at)])
            square.append((p**2).sum())
        gap = np.subtract(truth, square)
        assert 0.1 < np.mean(square) < 0.95
        assert abs(gap.mean()) < 3.5 * gap.std() / np.sqrt(len(gap))


def test_levels_agree_with_exhaustive_scores():
    """The same poses scored by level or all at once: log posterior to 1e-3 wherever both kept it."""
    grid, shifts = orientation_grid(1), shift_grid(2, 2)
    options = {"child_offsets": child_offsets(2.0), "perturbation": -7.0, "sigma_offset": 2.0}
    by_level = make_search([MAP], [Level(grid, 5, False), Level(grid.children, RADIUS, True)], shifts,
                           adaptive_fraction=0.999, max_significant=100, **options)  # fmt: skip
    at_once = make_search([MAP], [Level(grid.children, RADIUS, True)], shifts, **options)
    poses = [Pose(r, np.array([0.4, -0.7, 0.2])) for r in random_rotations(2, 12)]
    batch, _ = plant(by_level, poses, 30 * POWER, 13)
    for a, b in zip(run_search(by_level, batch, None, tick), run_search(at_once, batch, None, tick), strict=True):
        p, q = dense_posterior(by_level, a), dense_posterior(at_once, b)
        both = (p > 1e-12) & (q > 1e-12)
        assert both.sum() > 20
        difference = np.log(p[both]) - np.log(q[both])
        assert np.ptp(difference) < 1e-3  # what the levels never scored is missing from their total alone
        assert q[p > 0].sum() > 0.9
        assert np.unravel_index(p.argmax(), p.shape) == np.unravel_index(q.argmax(), q.shape)


def test_single_precision_posterior():
    """Log posterior to 0.05 where p > 1e-3, at scores of some thousands."""
    double, single = search_of(), search_of(dtype="float32")
    poses, _ = grid_poses(double, 6, 14)
    for sigma2 in (60 * POWER, 10 * POWER, 0.05 * POWER):
        a, _ = plant(double, poses, sigma2, 15)
        b, _ = plant(single, poses, sigma2, 15)
        for p, q in zip(run_search(double, a, None, tick), run_search(single, b, None, tick), strict=True):
            p, q = dense_posterior(double, p), dense_posterior(single, q)
            used = p > 1e-3
            assert np.abs(np.log(p[used]) - np.log(np.maximum(q[used], 1e-30))).max() < 0.05


def test_order_of_the_batch_does_not_matter():
    search = search_of(adaptive_fraction=0.999)
    poses, _ = grid_poses(search, 20, 16)
    batch, _ = plant(search, poses, 3 * POWER, 17)
    order = np.random.default_rng(0).permutation(20)
    shuffled = replace(batch, **{n: getattr(batch, n)[order] for n in batch.__dataclass_fields__})
    a, b = run_search(search, batch, None, tick), run_search(search, shuffled, None, tick)
    for j, i in enumerate(order):
        np.testing.assert_allclose(dense_posterior(search, b[j]), dense_posterior(search, a[i]), atol=1e-10)


def test_adaptive_fraction_keeps_the_largest():
    full, cut = search_of(0), search_of(0, adaptive_fraction=0.9)
    poses, _ = grid_poses(full, 3, 18)
    batch, _ = plant(full, poses, 30 * POWER, 19)
    for p, q in zip(run_search(full, batch, None, tick), run_search(cut, batch, None, tick), strict=True):
        p, kept = dense_posterior(full, p), dense_posterior(cut, q)
        np.testing.assert_allclose(kept[kept > 0], p[kept > 0], rtol=1e-9)
        assert 0.9 <= kept.sum() < 0.9 + kept[kept > 0].min() + 1e-9
        assert kept[kept > 0].min() >= p[kept == 0].max()
        assert q.n_significant == (kept > 0).sum()


def test_orientation_prior_weighs_and_cuts():
    """A tilt prior multiplies the posterior by its Gaussian at the pose scored, and removes what is beyond 3 widths."""
    centre, width = 70.0, 12.0
    free = search_of(perturbation=5.0)
    bound = search_of(perturbation=5.0, prior=OrientationPrior(tilt=width), centres=np.array([[0, centre, 0]]))
    poses, _ = grid_poses(free, 2, 20)
    batch, _ = plant(free, poses, 200 * POWER, 21)
    grid = free.levels[0].grid
    scored = np.degrees(np.arccos(grid.rotations(5.0)[:, 2, 2]))
    coarse = np.repeat(grid.directions[:, 1], grid.n_psi)
    weight = np.exp(-0.5 * ((scored - centre) / width) ** 2) * (np.abs(coarse - centre) < 3 * width)
    for p, q in zip(run_search(free, batch, None, tick), run_search(bound, batch, None, tick), strict=True):
        wanted = dense_posterior(free, p) * weight[:, None]
        np.testing.assert_allclose(dense_posterior(bound, q), wanted / wanted.sum(), atol=1e-9)


def test_each_particle_has_its_own_prior_centre():
    centres = np.array([[0, 10.0, 0], [0, 90.0, 0]])
    search = search_of(prior=OrientationPrior(tilt=5), centres=centres)
    poses, _ = grid_poses(search, 2, 22)
    batch, _ = plant(search, poses, 100 * POWER, 23)
    found = run_search(search, replace(batch, centre=np.array([1, 0])), None, tick)
    tilt = np.repeat(search.levels[0].grid.directions[:, 1], 12)
    for posterior, (_, centre, _) in zip(found, centres[[1, 0]], strict=True):
        assert np.abs(tilt[dense_posterior(search, posterior)[0].any(1)] - centre).max() < 15


@pytest.mark.parametrize("order", [1, 2, 3])
def test_planned_levels(order):
    options = {"box": 40, "pixel_size": 8.1, "mask_diameter": 230, "radius": 18}
    levels = plan_levels(order, "C6", adaptive=True, **options)
    assert levels[-1].grid.order == order + 1
    assert levels[-1].radius == 18
    assert [level.fine_shifts for level in levels] == [False] * (len(levels) - 1) + [True]
    assert all(a.radius <= b.radius for a, b in pairwise(levels))
    (only,) = plan_levels(order, "C6", adaptive=False, **options)
    assert (only.grid.order, only.radius, only.fine_shifts) == (order + 1, 18, True)


@pytest.mark.parametrize(("shifts", "cpu", "gpu"), [(1, False, False), (2, True, False), (3, True, True)])
def test_costly_passes_are_local_unless_told_otherwise(shifts, cpu, gpu):
    """In C1 at 15 degrees a half-ball of radius 17 with 7, 33 or 123 shifts: some 1.3, 6.3 and 23 GFLOP per particle."""
    for on_device, wanted in ((False, cpu), (True, gpu)):
        search = search_of(2, 17, shift_grid(shifts, 1), backend=SimpleNamespace(on_device=on_device))
        assert [is_local(Settings(), search, n) for n in (1, 4, 5, 6)] == [wanted, wanted, False, wanted]
        assert not is_local(Settings(global_search_every=1), search, 1)
        assert is_local(Settings(global_search_every=2), search, 1)


def test_coarse_radius_is_relions():
    """30 degrees, 200 Å, box 64 of 6.8 Å: an image of 20 px across."""
    assert coarse_radius(64, 6.8, 200, 30, 32) == 10
    assert coarse_radius(64, 6.8, 200, 3, 32) == 32


def test_euler_angles_of_the_best_pose_rebuild_it():
    search = search_of(perturbation=9.0)
    from vdamkit.sampling.euler import matrix_to_euler

    rotations = search.levels[0].grid.rotations(9.0)
    np.testing.assert_allclose(euler_to_matrix(matrix_to_euler(rotations)), rotations, atol=1e-9)


@pytest.mark.parametrize("order", [1, 3])
def test_candidates_by_class_and_group_of_directions(order):
    """Every candidate once, in its class and group, particles and orientations ascending."""
    grid, rng = orientation_grid(order), np.random.default_rng(order)
    per_group = directions_per_group(grid) * grid.n_psi
    candidates = []
    for n in (1, 40, 300, 7):
        both = rng.choice(2 * len(grid), n, replace=False)
        candidates.append(Candidates(both // len(grid), both % len(grid), np.array([0])))
    found = _by_group(grid, candidates)
    seen = {
        (i, k, int(r)) for (k, group), members in found.items() for i, mine in members for r in mine if r // per_group == group
    }
    assert seen == {
        (i, int(k), int(r)) for i, mine in enumerate(candidates) for k, r in zip(mine.classes, mine.orientations, strict=True)
    }
    assert sum(len(mine) for members in found.values() for _, mine in members) == len(seen) == 348
    for members in found.values():
        numbers = [i for i, _ in members]
        assert numbers == sorted(set(numbers)) and all((np.diff(mine) > 0).all() for _, mine in members)
