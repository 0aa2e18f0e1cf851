"""Shared by all tests: helpers in this folder can be imported, property tests are reproducible, and workers share the cores."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("vdamkit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("vdamkit")

LONGEST = ("test_notebooks.py", "test_click_through.py")  # minutes each; they go first, or a worker is left alone with one


def is_worker(config):
    """Whether this is one of pytest-xdist's workers (``pytest -n 2``)."""
    return hasattr(config, "workerinput")


def pytest_configure(config):
    """A module stays with one worker, as its fixtures take long; and a worker with its share of the cores, as two that both
    use all get in each other's way."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist, config.option.loadscopereorder = "loadscope", False
    if is_worker(config) and hasattr(os, "sched_setaffinity"):
        cores, workers = sorted(os.sched_getaffinity(0)), config.workerinput["workercount"]
        mine = cores[int(config.workerinput["workerid"].removeprefix("gw")) :: workers]
        os.sched_setaffinity(0, mine or cores)


def pytest_collection_modifyitems(config, items):
    if is_worker(config):
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small set of simulated hexamers, for tests of the session; not to be changed."""
    from helpers_vdamkit import hexamers

    return hexamers(tmp_path_factory.mktemp("hexamers"))


@pytest.fixture
def job(folder):
    """A session on the stacks of `folder`, nothing computed yet."""
    from helpers_vdamkit import OPTIONS

    import vdamkit as vk

    return vk.Session(folder / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
