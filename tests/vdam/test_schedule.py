"""Step size, T, batch size, drawing of particles, perturbation and resolution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdamkit.settings import Settings
from vdamkit.state import Plan
from vdamkit.vdam import schedule

TWO_HUNDRED = Settings(mini_batches=200)


def draw(iteration, n, settings):
    return schedule.draw_batch(iteration, schedule.batch_size(iteration, n, settings), n, settings)


def test_phases_of_two_hundred():
    assert schedule.phases(200, 0.3, 0.2) == (60, 100, 40)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1))
def test_phases_fill_the_run(total, ini, fin):
    parts = schedule.phases(total, ini, fin)
    assert sum(parts) == total
    assert min(parts) >= 0


def test_phases_are_scaled_down_where_they_leave_no_middle():
    assert schedule.phases(200, 0.6, 0.4) == (int(0.6 / 1.1 * 200), 200 - 109 - 72, int(0.4 / 1.1 * 200))


@pytest.mark.parametrize(("iteration", "eta"), [(1, 0.9), (60, 0.896), (85, 0.70), (110, 0.504), (200, 0.5)])
def test_step_size(iteration, eta):
    assert schedule.step_size(iteration, TWO_HUNDRED) == pytest.approx(eta, abs=5e-4)


@pytest.mark.parametrize(("iteration", "T"), [(1, 1.0), (50, 1.0), (72.5, 2.5), (85, 3.97), (150, 4.0)])
def test_t_is_annealed(iteration, T):
    assert schedule.tau2_fudge(iteration, TWO_HUNDRED) == pytest.approx(T, abs=0.02)


def test_t_below_one_is_never_raised():
    assert schedule.tau2_fudge(1, TWO_HUNDRED.replace(T=0.5)) == pytest.approx(0.5)


def test_constant_schemes_and_past_the_end():
    plain = TWO_HUNDRED.replace(T_scheme="constant", step_scheme="constant")
    assert [schedule.tau2_fudge(i, plain) for i in (1, 300)] == [4.0, 4.0]
    assert [schedule.step_size(i, plain) for i in (1, 300)] == [0.5, 0.5]
    assert schedule.tau2_fudge(5000, TWO_HUNDRED) == pytest.approx(4)
    assert schedule.step_size(5000, TWO_HUNDRED) == pytest.approx(0.5)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 10])
def test_short_runs_have_schedules_too(total):
    s = Settings(mini_batches=total)
    for iteration in range(1, total + 3):
        assert 0.5 <= schedule.step_size(iteration, s) <= 0.9
        assert 1 <= schedule.tau2_fudge(iteration, s) <= 4
        assert schedule.batch_size(iteration, 10**5, s) >= 200
    assert np.diff([schedule.step_size(i, s) for i in range(1, total + 3)]).max() <= 0


@pytest.mark.parametrize(
    ("particles", "initial", "final"),
    [(8, 8, 8), (24, 10, 24), (100, 25, 100), (500, 125, 500), (5000, 200, 1000), (20_000, 200, 2000), (100_000, 500, 10_000),
     (10**6, 5000, 50_000), (10**7, 5000, 50_000)],
)  # fmt: skip
def test_batch_sizes(particles, initial, final):
    sizes = [schedule.batch_size(i, particles, TWO_HUNDRED) for i in (1, 59, 60, 110, 160, 200)]
    assert sizes[0] == sizes[1] == sizes[2] == initial
    assert sizes[4] == sizes[5] == final
    classes = TWO_HUNDRED.replace(classes=2)
    assert schedule.batch_size(1, particles, classes) == min(particles, max(200, initial)), "to be told apart"
    if final > initial:
        assert sizes[3] == pytest.approx((initial + final) / 2, abs=1)


def test_batch_sizes_of_the_user_and_the_last_of_several_classes():
    s = TWO_HUNDRED.replace(batch_initial=30, batch_final=70)
    assert [schedule.batch_size(i, 1000, s) for i in (1, 110, 200)] == [30, 50, 70]
    assert schedule.batch_size(200, 1000, s.replace(classes=2), last=True) == 1000
    assert schedule.batch_size(200, 1000, s.replace(classes=2)) == 70, "one of those that were added to a finished run"
    assert schedule.batch_size(199, 1000, s.replace(classes=2)) == 70


def test_batches_are_drawn_without_replacement():
    s = TWO_HUNDRED.replace(batch_initial=50, seed=3)
    seen = np.zeros(400, int)
    for iteration in range(1, 41):
        batch = draw(iteration, 400, s)
        assert len(batch) == 50
        assert (np.diff(batch) > 0).all()
        np.testing.assert_array_equal(batch, draw(iteration, 400, s))
        seen[batch] += 1
    assert (seen > 0).sum() > 390  # 40 x 1/8: who is never drawn is unlucky
    assert seen.max() < 16
    np.testing.assert_array_equal(draw(1, 20, s), np.arange(20))  # all of them where there are no more


def test_batches_differ_between_mini_batches_and_seeds():
    s = TWO_HUNDRED.replace(batch_initial=50)
    batches = [
        draw(1, 400, s),
        draw(2, 400, s),
        draw(1, 400, s.replace(seed=1)),
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert len(np.intersect1d(batches[i], batches[j])) < 25


def test_streams_are_independent():
    """No two of (seed, mini-batch, purpose) share numbers, neighbours least of all."""
    streams = {
        (seed, i, p): schedule.generator(seed, i, p).random(64)
        for seed in (0, 1) for i in (0, 1, 2, 100) for p in range(4)
    }  # fmt: skip
    values = np.concatenate(list(streams.values()))
    assert len(np.unique(values)) == len(values)
    table = np.array(list(streams.values()))
    correlation = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlation).max() < 0.6
    np.testing.assert_array_equal(streams[(1, 2, 3)], schedule.generator(1, 2, 3).random(64))


def test_perturbation_moves_by_a_quarter_to_a_half_and_wraps():
    p, moves, values = 0.0, [], []
    for iteration in range(1, 200):
        new = schedule.next_perturbation(p, iteration, TWO_HUNDRED)
        assert new == schedule.next_perturbation(p, iteration, TWO_HUNDRED)
        moves.append((new - p) % 1)
        values.append(new)
        p = new
    assert -0.5 <= min(values) < -0.45
    assert 0.45 < max(values) <= 0.5
    assert 0.25 <= min(moves) < 0.27
    assert 0.48 < max(moves) <= 0.5


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.3])
def test_smaller_perturbation(factor):
    s, p = TWO_HUNDRED.replace(perturbation=factor), 0.0
    for iteration in range(1, 50):
        p = schedule.next_perturbation(p, iteration, s)
        assert -factor <= p <= factor


@pytest.mark.parametrize(
    ("curve", "shell"),
    [([9, 9, 9, 9, 9, 9, 9, 0.9, 5, 5], 6), ([0, 9, 9, 9, 9, 9, 9, 9, 0, 0], 7), ([9, 0.5, 9, 9, 9, 9, 9, 9, 9, 9], 5),
     ([9] * 10, 8), ([0] * 10, 5)],
)  # fmt: skip
def test_resolution_is_the_last_shell_before_the_first_below_one(curve, shell):
    """At least 5, at most 8 here; what rises again later does not count."""
    assert schedule.resolution_shell(np.array([curve], float), 5, 8) == shell


def test_the_best_class_counts():
    curves = np.array([[9, 9, 9, 9, 9, 9, 0, 0, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9, 0, 0]], float)
    assert schedule.resolution_shell(curves, 1, 9) == 7


def test_radius_in_use():
    assert schedule.current_radius(4, Settings(), 64) == 14
    assert schedule.current_radius(30, Settings(), 64) == 32


def test_plan_without_a_change_is_the_mini_batch_number():
    plan = Plan().changed(0, 100)
    assert [plan.position(i) for i in (0, 1, 57, 100, 120)] == [0, 1, 57, 100, 120]
    assert plan.changed(40, 100) is plan


@pytest.mark.parametrize("total", [70, 100, 160, 400])
def test_changing_the_number_of_mini_batches_keeps_what_is_done(total):
    """T in force does not jump, rises to the end, and the end is the end of the schedule."""
    before = Plan(200)
    plan = before.changed(60, total)
    part = [plan.position(i) / plan.total for i in range(60, total + 1)]
    assert part[0] == pytest.approx(0.3) and part[-1] == 1
    assert (np.diff(part) > 0).all()
    settings = TWO_HUNDRED.replace(mini_batches=total)
    T = [schedule.tau2_fudge(plan.position(i), settings) for i in range(60, total + 1)]
    assert T[0] == pytest.approx(schedule.tau2_fudge(60, TWO_HUNDRED), abs=0.1)
    assert T[-1] == pytest.approx(4, abs=0.01) and (np.diff(T) > -1e-9).all()
    again = plan.changed(65, 300)
    assert again.position(65) / 300 == pytest.approx(plan.position(65) / total)


def test_a_schedule_cut_below_what_is_done_ends_at_once():
    plan = Plan(100).changed(60, 40)
    assert [plan.position(i) for i in (61, 62)] == [41, 42]
    assert plan.changed(62, 100).position(70) >= 100, "what is done stays done"
