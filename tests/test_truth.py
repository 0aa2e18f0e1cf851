"""Against the truth: RELION's own data with true poses, calibrated posteriors, and poses found on `data/`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_vdamkit import reconstruct
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

import vdamkit as vk
from vdamkit.backend import get_backend
from vdamkit.imaging.fsc import crop_or_pad, fsc
from vdamkit.imaging.halfball import half_ball
from vdamkit.imaging.masks import mask_power, soft_sphere
from vdamkit.imaging.projector import get_projector
from vdamkit.io.mrc import read_map
from vdamkit.io.star_tables import as_table, read_star
from vdamkit.pose_errors import pose_errors
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.simulate import simulate
from vdamkit.symmetry import symmetrised

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "relion_reference"
DATA = Path(__file__).resolve().parents[1] / "data"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="RELION reference data not there")
CPU = get_backend("cpu", 1)


def truth_of(folder: Path, particles) -> tuple[np.ndarray, np.ndarray]:
    """True angles and offsets in the order of `particles`."""
    blocks = read_star(folder / "particles_true_poses.star")
    table = as_table(next(iter(blocks.values())))
    where = table[[f"rlnCenteredCoordinate{a}Angst" for a in "XYZ"]].to_numpy(float)
    rows = [int(np.abs(where - c).sum(1).argmin()) for c in particles.coordinates]
    angles = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float)[rows]
    return angles, table[[f"rlnOrigin{a}Angst" for a in "XYZ"]].to_numpy(float)[rows]


@needs_reference
@pytest.mark.parametrize("kind", ["stacks2d", "volumes3d"])
def test_true_poses_reconstruct_what_relion_reconstructs(kind):
    star = REFERENCE / kind / "optimisation_set.star"
    angles, offsets = truth_of(REFERENCE, vk.open_particles(star))
    target, pixel = read_map(REFERENCE / "true_poses_reconstruction_c6.mrc")
    target = crop_or_pad(target, 40)
    sphere = soft_sphere(40, 100 / pixel, 3)
    right = fsc(reconstruct(star, angles, offsets, "C6"), target, sphere)[1:17]
    wrong = fsc(reconstruct(star, angles, -offsets, "C6"), target, sphere)[1:17]
    assert right.mean() > 0.9
    assert right.mean() > wrong.mean() + 0.15, "offsets of the other sign must be worse"


@needs_reference
def test_our_extraction_agrees_with_relions(tmp_path):
    """The reference's particles made again from its single hexamer: the same true poses must reconstruct the same core."""
    simulate(tmp_path, model=str(REFERENCE / "hexamer_model.mrc"), poses=str(REFERENCE / "particles_true_poses.star"),
             particles=100, volumes=20, box=40, pixel_size=8.1)  # fmt: skip
    target, pixel = read_map(REFERENCE / "true_poses_reconstruction_c6.mrc")
    target = crop_or_pad(target, 40)
    sphere = soft_sphere(40, 25 / pixel, 3)
    for kind in ("stacks2d", "volumes3d"):
        star = tmp_path / kind / "optimisation_set.star"
        angles, offsets = truth_of(tmp_path, vk.open_particles(star))
        curve = fsc(reconstruct(star, angles, offsets, "C6"), target, sphere)
        assert curve[1:14].mean() > 0.8, kind


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Single asymmetric particles in random orientations, both kinds."""
    out = tmp_path_factory.mktemp("planted")
    simulate(out, model="asymmetric", particles=40, volumes=40, box=40, pixel_size=8.0, tilts=31, variance_ratio=0.07,
             poses="random", seed=2)  # fmt: skip
    return out


@pytest.mark.parametrize("kind", ["stacks2d", "volumes3d"])
def test_posteriors_are_calibrated(planted, kind):
    """The 90 % credible set holds the truth in 80-97 % of the particles.

    For a posterior that is Gaussian in its six dimensions, 2 (log L at the best pose - log L at the truth) is chi-square
    with 6 degrees of freedom: the truth lies in the 90 % set where that is below 10.64. The model that was put in is the
    reference, its grey value fitted by shell; the noise comes from the residuals, as in a mini-batch.
    """
    job = vk.Session(planted / kind / "optimisation_set.star", vk.Settings(threads=1))
    angles, offsets = truth_of(planted, job.particles)
    model, px = read_map(planted / "model.mrc")
    box, radius = job.particles.box, job.particles.box // 2
    ball, projector = half_ball(radius), get_projector(box, radius, "float32")
    items = job._source.fetch(np.arange(len(job.particles)), radius)[0]
    reference = projector.prepare(model.astype(float))
    moved = [ball.phases(o / px, box)[0] for o in offsets]
    rows = [projector.rotate(reference, euler_to_matrix(a)) for a in angles]
    overlaps = [(a.conj() * p.unmasked * m).real for a, p, m in zip(rows, items, moved, strict=True)]
    top = sum(ball.shell_sums(overlap * ball.weight) for overlap in overlaps)
    bottom = sum(ball.shell_sums(p.weight * np.abs(a) ** 2 * ball.weight) for a, p in zip(rows, items, strict=True))
    scale = (top / bottom)[ball.shell]
    kept = mask_power(box, 115 / px, job._source.mask_ndim)
    power = sum(ball.shell_sums(np.abs(p.masked * m - p.weight * a * scale) ** 2 * ball.weight)
                for a, p, m in zip(rows, items, moved, strict=True))  # fmt: skip
    sigma2 = power / sum(ball.shell_sums(p.weight * ball.weight) for p in items) / 2 / kept
    inverse = ball.weight / sigma2[ball.shell]
    inverse[0] = 0
    drop = []
    for i, item in enumerate(items):
        start = euler_to_matrix(angles[i])

        def cost(x, item=item, start=start, i=i):
            turned = Rotation.from_rotvec(np.radians(x[:3])).as_matrix() @ start
            a = projector.rotate(reference, turned) * scale
            b = item.masked * ball.phases(offsets[i] / px + x[3:], box)[0]
            return -float(((a.conj() * b).real * inverse).sum() - 0.5 * (item.weight * np.abs(a) ** 2 * inverse).sum())

        best = minimize(cost, np.zeros(6), method="Powell", bounds=[(-20, 20)] * 3 + [(-2, 2)] * 3,
                        options={"maxiter": 3, "xtol": 0.03, "ftol": 1e-5})  # fmt: skip
        drop.append(2 * (cost(np.zeros(6)) - best.fun))
    held = np.mean(np.array(drop) < 10.64)
    assert 0.8 <= held <= 0.97, (held, np.mean(drop))
    assert 3 < np.mean(drop) < 10, "the mean of a chi-square with 6 degrees of freedom is 6"


def test_poses_and_symmetry_on_the_tutorial_data():
    """Median error of angles ≤ 4° modulo C6 and of offsets ≤ 0.5 px, after the one motion common to all particles; and a map
    made in C6 is its own mean over C6."""
    settings = vk.Settings(mini_batches=24, symmetry="C6", tilt_prior_width=10)
    job = vk.Session(DATA / "stacks2d" / "optimisation_set.star", settings)
    job.run()
    found = job.score_all()
    angles, offsets = truth_of(DATA, job.particles)
    errors = pose_errors(
        found[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(),
        found[[f"rlnOrigin{a}Angst" for a in "XYZ"]].to_numpy(), angles, offsets, symmetry="C6",
    )  # fmt: skip
    assert np.median(errors.angles) <= 4
    assert np.median(errors.offsets) <= 0.5 * job.pixel_size
    assert np.linalg.norm(symmetrised(job.map, "C6") - job.map) <= 0.01 * np.linalg.norm(job.map)
