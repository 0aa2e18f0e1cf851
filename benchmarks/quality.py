"""The quality bars: maps from real reference data and simulated sets, against the truth. Prints one line per run.

    python benchmarks/quality.py REFERENCE [--seeds 3] [--only stacks2d|volumes3d|c1|tutorial] [--out FOLDER]

REFERENCE is the folder `relion_reference`; it may be absent, then only simulated sets are run. Each line: kind, seed,
seconds, peak memory, mean FSC to the resolution named, FSC 0.5 crossing, the same for the mirror image.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

import vdamkit as vk
from vdamkit.compare import align, mirrored, resample
from vdamkit.io.mrc import read_map, write_mrc


def sgemm_rate() -> float:
    """GFLOP/s of one float32 matrix product, all threads."""
    a, b = (np.random.default_rng(i).random((2048, 2048), np.float32) for i in (0, 1))
    a @ b
    start = time.perf_counter()
    for _ in range(5):
        a @ b
    return 5 * 2 * 2048**3 / (time.perf_counter() - start) / 1e9


def mean_fsc(curve: np.ndarray, box: int, pixel: float, to: float) -> float:
    """Mean over shells from 1 to `to` Å, as a percentage of 1."""
    return float(curve[1 : round(box * pixel / to) + 1].mean())


def run(label: str, star: Path, truth: Path, settings: vk.Settings, radii: tuple, to: float, out: Path | None) -> None:
    """One job, judged inside each radius."""
    reference, pixel = read_map(truth)
    job = vk.Session(star, settings)
    began = time.perf_counter()
    job.run()
    seconds = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_mrc(out / f"{label}_{settings.seed}.mrc", job.map, job.pixel_size)
    volume = resample(job.map, job.pixel_size, pixel, len(reference))
    line = f"{label} seed {settings.seed}: {seconds:.0f} s, {memory:.2f} GiB"
    for radius in radii:
        same = align(volume, reference, pixel, radius=radius)
        other = align(mirrored(volume), reference, pixel, radius=radius)
        a, b = (mean_fsc(m.fsc, len(reference), pixel, to) for m in (same, other))
        line += f" | {radius:g} Å: {a:.3f} (mirror {b:.3f}), 0.5 at {same.resolution:.1f} Å"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="as in Settings: cpu, cuda, cuda:1, ...")
    parser.add_argument("reference", type=Path, nargs="?", default=Path("../shared/relion_reference"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["stacks2d", "volumes3d", "c1"])
    parser.add_argument("--solvent", default="mask")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(f"sgemm {sgemm_rate():.0f} GFLOP/s")
    for kind in ("stacks2d", "volumes3d"):
        if kind in options.only and (options.reference / kind).exists():
            for seed in range(options.seeds):
                settings = vk.Settings(
                    symmetry="C6", tilt_prior_width=10, seed=seed, solvent=options.solvent, device=options.device
                )
                truth = options.reference / "true_poses_reconstruction_c6.mrc"
                run(kind, options.reference / kind / "optimisation_set.star", truth, settings, (60, 100), 20, options.out)
    if "c1" in options.only:
        with tempfile.TemporaryDirectory() as folder:
            vk.simulate(folder, model="asymmetric", particles=120, volumes=120, box=40, pixel_size=8.0, tilts=41,
                        variance_ratio=0.1, poses="random", seed=1)  # fmt: skip
            for kind in ("stacks2d", "volumes3d"):
                for seed in range(options.seeds):
                    star, truth = Path(folder) / kind / "optimisation_set.star", Path(folder) / "model.mrc"
                    settings = vk.Settings(seed=seed, mini_batches=30, device=options.device)
                    run(f"c1 {kind}", star, truth, settings, (100, 110), 25, options.out)


if __name__ == "__main__":
    main()
