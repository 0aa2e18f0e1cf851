"""The thread that runs a session for a panel: what it does, and that nothing of it stays behind."""

import threading
import time

import numpy as np
import pytest
from helpers_vdamkit import LooksAway, hold

from vdamkit.errors import SettingsError
from vdamkit.notebook.controller import Controller
from vdamkit.notebook.loop import Loop


@pytest.fixture
def controller(job):
    told = []
    made = Controller(job, Loop(), told.append)
    made.told = told
    yield made
    made.close()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen in time")


def sessions_threads():
    return [thread for thread in threading.enumerate() if thread.name == "vdamkit session"]


def test_run_is_what_the_session_would_do(controller, job):
    wanted = job.branch()
    wanted.run(3)
    controller.run(3)
    assert controller.status == "running"
    until(lambda: controller.status == "idle" and not sessions_threads())
    assert job.iteration == 3
    np.testing.assert_array_equal(job.map, wanted.map)
    assert controller.told.count("step") == 3 and controller.told[-1] == "status"


def test_run_just_as_a_run_ends_is_not_lost(controller, job):
    controller._lock = LooksAway("vdamkit session")
    for done in (2, 4):
        controller.run(2)
        until(lambda done=done: job.iteration == done and controller.left == 0)
    until(lambda: controller.status == "idle" and not sessions_threads())
    assert job.iteration == 4 and not controller.error


def test_prepare_computes_the_start_and_nothing_else(controller, job):
    controller.prepare()
    until(lambda: controller.status == "idle")
    assert len(job._history) == 1 and job.iteration == 0
    controller.prepare()
    assert controller.status == "idle"


def test_a_cell_may_go_on_before_the_start_is_there(controller, job):
    controller.prepare()
    job.run(2)
    until(lambda: controller.status == "idle")
    assert job.line() == [0, 1, 2] and len(job._history) == 3 and not controller.error


def test_pause_acts_soon_and_going_on_changes_nothing(controller, job):
    wanted = job.branch()
    wanted.run(2)
    held = hold(job, until=lambda: controller.status == "pausing")
    controller.run(2)
    until(held.is_set)
    asked = time.monotonic()
    controller.pause()
    until(lambda: controller.status == "paused", 2.0)
    assert time.monotonic() - asked < 0.5
    before = job.iteration
    time.sleep(0.3)
    assert job.iteration == before and controller.status == "paused"
    controller.unpause()
    until(lambda: controller.status == "idle")
    np.testing.assert_array_equal(job.map, wanted.map)


def test_stop_discards_the_running_mini_batch(controller, job):
    job.step()
    before = job.state
    held = hold(job, until=lambda: controller._stop)
    controller.run(3)
    until(held.is_set)
    controller.stop()
    assert controller.status == "idle" and job.state is before and not sessions_threads()


def test_undo_while_paused_discards_and_goes_back(controller, job):
    job.run(2)
    held = hold(job, until=lambda: controller.status == "pausing")
    controller.run(1)
    until(held.is_set)
    controller.pause()
    until(lambda: controller.status == "paused")
    controller.undo()
    assert controller.status == "idle" and job.iteration == 1
    controller.redo()
    assert job.iteration == 2


def test_options_change_while_it_runs_and_act_at_the_next_mini_batch(controller, job):
    job.state  # noqa: B018 - the start
    held = hold(job, until=lambda: job.settings.T == 7)
    controller.run(3)
    until(held.is_set)
    controller.change(T=7.0, T_scheme="constant", symmetry="C3")
    until(lambda: controller.status == "idle")
    T = [report.T for report in job.reports()]
    assert T[0] != 7 and T[-1] == 7
    assert [node.settings.symmetry for node in job._history.line()] == ["C6", "C6", "C3", "C3"]
    with pytest.raises(SettingsError, match="T is -1"):
        controller.change(T=-1)
    assert job.settings.T == 7


def test_an_error_is_told_and_the_state_kept(controller, job, monkeypatch):
    job.step()
    monkeypatch.setattr(job, "step", lambda: (_ for _ in ()).throw(ZeroDivisionError("a bug")))
    controller.run(2)
    until(lambda: controller.status == "idle")
    assert "a bug" in controller.error and "last state is kept" in controller.error
    assert controller.told[-1] == "error" and job.iteration == 1


def test_time_left_counts_down(controller):
    assert np.isnan(controller.time_left()).all()
    controller.run(3)
    until(lambda: controller.done == 2)
    inside, whole = controller.time_left()
    assert 0 <= inside <= whole


def test_close_leaves_nothing_behind(job):
    controller = Controller(job, Loop(), lambda what: None)
    controller.run(1000)
    until(lambda: controller.inside > 0)
    controller.close()
    assert not sessions_threads() and job.listeners == []
