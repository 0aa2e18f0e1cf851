"""A run in C1 with symmetry applied at its end, against the truth and the direct run; and what its moved particles make.

    python benchmarks/apply_later.py [REFERENCE] [--sym C6] [--seed 0] [--mini-batches 100]

REFERENCE is the folder `relion_reference`. Prints mean FSC to 20 Å against the truth of both runs, and how well
reconstructions from the particles before and after agree with the maps before and after.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers_vdamkit import reconstruct

import vdamkit as vk
from vdamkit.compare import align, resample
from vdamkit.imaging.fsc import fsc
from vdamkit.imaging.masks import soft_sphere
from vdamkit.io.mrc import read_map


def against_truth(job: vk.Session, truth: Path, to: float = 20.0) -> str:
    """Mean FSC from shell 1 to `to` Å in spheres of 60 and 100 Å."""
    reference, pixel = read_map(truth)
    volume, last = resample(job.map, job.pixel_size, pixel, len(reference)), round(len(reference) * pixel / to)
    parts = []
    for radius in (60, 100):
        curve = align(volume, reference, pixel, radius=radius).fsc[1 : last + 1]
        parts.append(f"{radius} Å: {curve.mean():.3f}")
    return ", ".join(parts)


def agreement(job: vk.Session, star: Path, symmetry: str, to: float = 20.0) -> float:
    """Mean FSC of the session's map with a reconstruction from its poses."""
    box, pixel, poses = len(job.map), job.pixel_size, job.state.poses
    volume = reconstruct(star, poses.angles, poses.offsets, symmetry)
    return float(fsc(volume, job.map, soft_sphere(box, 100 / pixel, 3))[1 : round(box * pixel / to) + 1].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, nargs="?", default=Path("../shared/relion_reference"))
    parser.add_argument("--sym", default="C6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mini-batches", type=int, default=100)
    options = parser.parse_args()
    star = options.reference / "stacks2d" / "optimisation_set.star"
    truth = options.reference / "true_poses_reconstruction_c6.mrc"
    settings = vk.Settings(symmetry=options.sym, tilt_prior_width=10, seed=options.seed, mini_batches=options.mini_batches)
    for name, later in ((options.sym, False), ("C1", True)):
        job = vk.Session(star, settings.replace(run_in_c1=later))
        began = time.perf_counter()
        job.run()
        print(f"{name}: {time.perf_counter() - began:.0f} s | {against_truth(job, truth)}", flush=True)
    job.score_all()
    print(f"before: map and reconstruction from its particles agree to {agreement(job, star, 'C1'):.3f}")
    (match,) = job.apply_symmetry()
    print(f"{options.sym} applied, {match} | {against_truth(job, truth)}")
    print(f"after: map and reconstruction from its moved particles agree to {agreement(job, star, options.sym):.3f}")


if __name__ == "__main__":
    main()
