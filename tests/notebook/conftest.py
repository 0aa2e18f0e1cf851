"""A small job for everything a person sees."""

import pytest

import vdamkit as vk
from vdamkit.simulate import simulate

OPTIONS = {"mini_batches": 6, "mask_diameter": 230.0, "threads": 2, "seed": 3, "symmetry": "C6", "tilt_prior_width": 10.0}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """24 hexamers as stacks, in a small box."""
    out = tmp_path_factory.mktemp("small")
    simulate(out, particles=24, volumes=0, box=20, pixel_size=16.0, tilts=9, variance_ratio=1.0, seed=5)
    return out


@pytest.fixture
def job(small_data):
    return vk.Session(small_data / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))


@pytest.fixture(scope="session")
def two_steps(small_data):
    """A session after two mini-batches; not to be changed."""
    session = vk.Session(small_data / "stacks2d" / "optimisation_set.star", vk.Settings(**OPTIONS))
    session.run(2)
    return session
