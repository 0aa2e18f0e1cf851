"""A session and several threads: pause and stop from outside, one start, one mini-batch at a time, branches side by side."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers_vdamkit import hold, same

from vdamkit import history
from vdamkit import session as session_module
from vdamkit.errors import SettingsError
from vdamkit.vdam.start import initial_state
from vdamkit.vdam.visit import Cancelled


def test_pause_keeps_what_is_done_and_changes_nothing(job):
    """The mini-batch waits within half a second, stands still, and ends as if it had never waited."""
    whole = job.branch()
    whole.step()
    asked, seen = threading.Event(), []
    job.listeners.append(lambda stage, fraction: seen.append(fraction))
    held = hold(job, until=asked.is_set)
    thread = threading.Thread(target=job.step)
    thread.start()
    held.wait(10)
    began = time.perf_counter()
    job.pause()
    asked.set()
    while not job.paused and time.perf_counter() < began + 5:
        time.sleep(0.005)
    assert job.paused and time.perf_counter() - began < 0.5
    ticks = len(seen)
    time.sleep(0.3)
    assert len(seen) == ticks and thread.is_alive() and job.iteration == 0
    job.unpause()
    thread.join(30)
    assert not thread.is_alive() and not job.paused
    assert same(job.state, whole.state)


def test_a_paused_mini_batch_can_be_stopped(job):
    errors, asked = [], threading.Event()
    held = hold(job, until=asked.is_set)

    def step():
        try:
            job.step()
        except Cancelled as stop:
            errors.append(stop)

    thread = threading.Thread(target=step)
    thread.start()
    held.wait(10)
    job.pause()
    asked.set()
    while not job.paused:
        time.sleep(0.005)
    job.cancel()
    thread.join(10)
    assert len(errors) == 1 and job.iteration == 0
    assert job.step().iteration == 1, "the brake is off for the next one"


def test_a_run_can_be_stopped_before_its_first_mini_batch_and_between_two(job, held_start):
    begun, go_on = held_start
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(job.step)
        assert begun.wait(20)
        job.cancel()
        go_on.set()
        with pytest.raises(Cancelled):
            first.result(20)
    assert job.iteration == 0 and len(job._history) == 1, "the start is kept"
    job.followers.append(job.cancel)
    with pytest.raises(Cancelled):
        job.run(3)
    job.followers.clear()
    job.cancel()
    assert job.iteration == 1 and job.step().iteration == 2, "nothing is at work, so nothing is stopped"


@pytest.fixture
def held_start(monkeypatch):
    """A start that waits: the event that says so, and the one that lets it go on."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go_on.wait(20)
        return initial_state(*arguments)

    monkeypatch.setattr(session_module, "initial_state", slow)
    return begun, go_on


def test_a_start_that_another_thread_prepares_is_waited_for(job, held_start):
    """As a panel does it: a mini-batch asked for meanwhile follows it, and the number of classes cannot change any more."""
    begun, go_on = held_start
    with ThreadPoolExecutor(3) as pool:
        start = pool.submit(lambda: job.state)
        assert begun.wait(20)
        step, change = pool.submit(job.step), pool.submit(job.change, classes=3)
        job.change(T=2.0)
        time.sleep(0.1)
        assert not (step.done() or change.done())
        go_on.set()
        with pytest.raises(SettingsError, match="classes is 3 but this run has 1"):
            change.result(20)
        assert step.result(20).iteration == 1 and start.result().iteration == 0
    assert len(job._history) == 2 and job.settings.classes == len(job.state.maps) == 1
    assert [node.settings.T for node in job._history.line()] == [4, 2], "the start bears what it was computed with"


def test_nothing_slips_in_while_a_mini_batch_runs(job):
    """Moves, edits and a second mini-batch are refused; options, branches and saving are not, and act at the next."""
    job.run(2)
    done = threading.Event()
    held = hold(job, until=done.is_set)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(job.step)
        assert held.wait(20)
        acts = (job.step, job.undo, job.redo, lambda: job.go_to(0), job.split_class, lambda: job.drop_class(1),
                lambda: job.merge_classes(1, 2), job.score_all, job.apply_symmetry)  # fmt: skip
        for act in acts:
            with pytest.raises(SettingsError, match="at work in another thread"):
                act()
        job.change(T=2.0)
        branch = job.branch()
        assert branch.undo() == 1 and branch.split_class() == 2
        done.set()
        assert step.result(20).iteration == 3
    assert job.line() == [0, 1, 2, 3] and [report.iteration for report in job.reports()] == [1, 2, 3]
    assert job.settings.T == 2 and job.undo() == 2 and job.split_class() == 2


def test_followers_may_move_on_when_a_mini_batch_has_landed(job):
    job.followers.append(lambda: job.iteration == 1 and len(job.state.maps) == 1 and job.split_class())
    job.step()
    assert len(job.state.maps) == 2 and job.step().iteration == 2


def test_sessions_side_by_side_put_their_states_away_under_different_names(job, monkeypatch):
    """A session and its branch share the folder; here both write at the same moment."""
    job.state  # noqa: B018 - the start
    branch, both, save = job.branch(), threading.Barrier(2, timeout=20), history.save_checkpoint
    monkeypatch.setattr(history, "KEPT_STATES", 1)
    monkeypatch.setattr(history, "save_checkpoint", lambda *a, **k: (both.wait(), save(*a, **k)))
    states = [job.state.replace(iteration=number) for number in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        for session, state in ((job, states[0]), (branch, states[1])):
            pool.submit(session._history.append, state, session.settings, None)
    with ThreadPoolExecutor(2) as pool:
        for session in (job, branch):
            pool.submit(session._history.append, job.state, session.settings, None)
    for session, state in ((job, states[0]), (branch, states[1])):
        node = session._history.nodes[1]
        assert node.held is None and same(node.state, state)
