"""Moves in the history and interruptions: what was computed, and what was asked for, stays."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from helpers_vdamkit import OPTIONS

import vdamkit as vk
from vdamkit.errors import InputError
from vdamkit.history import KEPT_STATES
from vdamkit.vdam.visit import Cancelled


def test_a_mini_batch_that_is_stopped_leaves_the_map_as_it_was(folder):
    """Also the first one in another symmetry, for which the maps are turned."""
    coarse = {"healpix_order": 0, "offset_range": 2.0, "batch_initial": 8, "tilt_prior_width": None, "symmetry": "C1"}
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | coarse))
    job.run(2)
    before, stop = job.state, lambda stage, fraction: job.cancel()
    job.change(symmetry="C6")
    job.listeners.append(stop)
    with pytest.raises(Cancelled):
        job.step()
    job.listeners.remove(stop)
    assert job.state is before and len(job._history) == 3 and "axes" not in job._history.node.note
    job.step()
    assert "axes" in job._history.nodes[2].note
    assert job.undo() == 2 and job.state is before, "one step back is the map in the other symmetry"


def test_a_move_that_leads_nowhere_keeps_what_was_asked_for(folder):
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    job.run(1)
    job.change(T=1.5)
    job.redo()
    job.undo(0)
    job.go_to(1)
    assert job.settings.T == 1.5
    job.undo()
    assert job.settings.T == vk.Settings().T and job.iteration == 0
    job.change(T=2.5)
    job.undo()
    assert job.settings.T == 2.5, "at the start already"


def test_a_state_whose_file_is_gone_leaves_the_session_where_it_is(folder):
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    job.run(1)
    for _ in range(KEPT_STATES):
        job._history.append(job.state, job.settings, job.report)
    shutil.rmtree(job._history._shelf._folder)
    before = job.state
    for move in (lambda: job.go_to(0), lambda: job.undo(KEPT_STATES + 1)):
        with pytest.raises(InputError, match="mini-batch 0 was put away"):
            move()
        assert job.state is before and job.iteration == 1 and not job._history.can_redo
    job.step()


def test_scores_count_in_the_symmetry_that_the_maps_have(folder):
    """Not in one that is still to be taken up, whose poses would be a part of the sphere."""
    job = vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS | {"symmetry": "C1"}))
    job.run(2)
    other = job.branch(symmetry="O")
    np.testing.assert_array_equal(job.posterior(0).angles, other.posterior(0).angles)
    np.testing.assert_array_equal(job.score_all(), other.score_all())
    assert other.settings.symmetry == "O" and other._history.node.in_force.symmetry == "C1"
