"""Memory that is lent again: to one at a time, and never while somebody may still write to it."""

import numpy as np
import pytest
from helpers_vdamkit import same

from vdamkit.backend import get_backend
from vdamkit.backend.kept import KEPT, Kept


def test_memory_is_lent_again_in_any_shape_that_fits():
    kept = Kept()
    with kept.empty("sums", (4, 5), np.float64) as first:
        first[:] = 7
    with kept.empty("sums", (3, 3), np.complex64) as second:
        assert second.shape == (3, 3) and second.dtype == np.complex64
        assert np.shares_memory(first, second)
    with kept.empty("sums", (50,), np.float64) as larger:
        assert not np.shares_memory(first, larger)
    with kept.empty("others", (4,), np.float64) as other, kept.empty("sums", (4,), np.float64) as again:
        assert np.shares_memory(larger, again) and not np.shares_memory(other, again)


def test_whoever_comes_meanwhile_gets_memory_of_their_own():
    kept = Kept()
    with kept.empty("sums", (8,), np.float32) as one, kept.empty("sums", (8,), np.float32) as two:
        assert not np.shares_memory(one, two)


def test_memory_is_not_lent_again_after_an_error():
    kept = Kept()
    with pytest.raises(KeyboardInterrupt), kept.empty("sums", (8,), np.float32) as lost:
        raise KeyboardInterrupt
    with kept.empty("sums", (8,), np.float32) as fresh:
        assert not np.shares_memory(lost, fresh)


def test_it_is_given_back_with_all_else_that_a_session_holds():
    with KEPT.empty("a test's", (8,), np.float32) as lent:
        pass
    get_backend("cpu").release()
    with KEPT.empty("a test's", (8,), np.float32) as fresh:
        assert not np.shares_memory(lent, fresh)


def test_a_branch_with_another_budget_keeps_its_own(job):
    job.step()
    branch = job.branch(memory_budget=0.0)
    assert len(branch._source._kept) == 0 and len(job._source._kept) == len(job.particles)
    assert same(branch.state, job.state) and branch.step().pmax == job.step().pmax
