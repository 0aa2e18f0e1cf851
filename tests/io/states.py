"""A random state over a tiny particle set."""

from __future__ import annotations

import numpy as np

from vdamkit.settings import Settings
from vdamkit.state import Poses, State

SETTINGS = Settings(symmetry="C2", classes=2, mask_diameter=30, tilt_prior_width=10, T=3, seed=5)


def make_state(n: int, box: int, *, classes: int = 2, iteration: int = 10, n_optics: int = 2) -> State:
    """Random arrays of the right shapes and types; every third particle (the first one too) never visited."""
    rng = np.random.default_rng(3)
    half = box // 2 + 1

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    visited = (np.arange(n) % 3 > 0) & (iteration > 0)
    poses = Poses(
        angles=rng.uniform(0, 180, (n, 3)),
        offsets=normal(n, 3) * 5,
        class_number=np.where(visited, 1 + np.arange(n) % classes, 0).astype(np.int32),
        pmax=np.where(visited, rng.uniform(0, 1, n), 0).astype(np.float32),
        log_likelihood=np.where(visited, normal(n) * 1e5, 0),
        n_significant=np.where(visited, 7, 0).astype(np.int32),
        last_visit=np.where(visited, iteration, 0).astype(np.int32),
        class_share=np.where(visited, rng.uniform(0.5, 1, n), 0).astype(np.float32),
    )
    shape = (classes, 2, box, box, half)
    return State(
        iteration=iteration,
        maps=normal(classes, box, box, box).astype(np.float32),
        moment1=(normal(*shape) + 1j * normal(*shape)).astype(np.complex64),
        moment2=rng.uniform(1, 5, (classes, box, box, half)).astype(np.float32),
        sigma2=rng.uniform(0.5, 2, (n_optics, half)),
        class_probability=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum(),
        sigma_offset=8.123456789012345,
        perturbation=0.1,
        resolution_shell=3,
        healpix_order=2,
        offset_range=12.0,
        offset_step=4.0,
        no_gain=1,
        offset_change2=18.0,
        poses=poses,
        data_vs_prior=np.tile(np.r_[50.0, 20, 5, 0.5, np.zeros(half - 4)], (classes, 1)),
        tau2=rng.uniform(1, 2, (classes, half)),
        wiener=rng.uniform(0, 1, (classes, half)),
        half_fsc=rng.uniform(0, 1, (classes, half)),
        accuracy_rotation=float("nan"),
        accuracy_offset=2.5,
        grey_scale=4.0,
        bad_particles=(1,),
    )
