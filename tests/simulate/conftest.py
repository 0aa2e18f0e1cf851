"""Small simulated data sets shared by the tests of this folder."""

import pytest

from vdamkit.simulate import simulate


@pytest.fixture(scope="session")
def hexamers(tmp_path_factory):
    """60 hexamers on spheres; folder and paths."""
    folder = tmp_path_factory.mktemp("hexamers")
    return folder, simulate(folder, particles=60, volumes=4, tilts=15, variance_ratio=0.4, seed=3)


@pytest.fixture(scope="session")
def free_particles(tmp_path_factory):
    """50 asymmetric particles with random orientations; folder and paths."""
    folder = tmp_path_factory.mktemp("free")
    options = {"model": "asymmetric", "poses": "random", "variance_ratio": 0.4}
    return folder, simulate(folder, particles=50, volumes=0, tilts=15, **options)
