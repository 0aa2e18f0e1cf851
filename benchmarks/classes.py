"""Do classes tell particles apart? Two kinds of particle mixed, and particles among junk.

    python benchmarks/classes.py [--seeds 3] [--only mixed|junk] [--mini-batches 60]

Prints one line per run: the shares in the right class, populations, and how well each class's map fits its model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import vdamkit as vk
from vdamkit.compare import align
from vdamkit.io.mrc import read_map
from vdamkit.io.star_tables import as_table, find_block, read_star

MIXED = {"model": "asymmetric", "second_model": "hexamer", "second_share": 0.4, "particles": 200, "poses": "random",
         "box": 32, "pixel_size": 10.0, "lattice_spacing": 240.0}  # fmt: skip
JUNK = {"model": "hexamer", "junk": 0.3, "particles": 200}


def truth_of(folder: Path) -> np.ndarray:
    """What each particle is: 1, 2, or 0 for junk."""
    path = folder / "particles_true_poses.star"
    return as_table(find_block(read_star(path), "particles", path))["rlnClassNumber"].to_numpy(int)


def run(kind: str, seed: int, mini_batches: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = MIXED if kind == "mixed" else JUNK
        vk.simulate(folder, **recipe, volumes=0, variance_ratio=0.1, seed=seed)
        options = {} if kind == "mixed" else {"symmetry": "C6", "tilt_prior_width": 10}
        job = vk.Session(
            folder / "stacks2d" / "optimisation_set.star",
            vk.Settings(classes=2, seed=seed, mini_batches=mini_batches, mask_diameter=230, **options),
        )
        began = time.perf_counter()
        job.run()
        seconds = time.perf_counter() - began
        job.score_all()
        truth, found = truth_of(folder), job.state.poses.class_number
        a, b = (1, 2) if kind == "mixed" else (1, 0)
        table = np.array([[np.mean(found[truth == t] == k) for k in (1, 2)] for t in (a, b)])
        if np.trace(table) < np.trace(table[:, ::-1]):
            table = table[:, ::-1]
        names = ("asymmetric", "hexamer") if kind == "mixed" else ("good", "junk")
        line = ", ".join(f"{100 * table[i, i]:.0f} % of the {name} in its class" for i, name in enumerate(names))
        right = np.mean([table[i, i] * np.mean(truth == t) for i, t in enumerate((a, b))]) * 2
        fits = []
        for model in ("model.mrc", "second_model.mrc"):
            if (folder / model).exists():
                reference = read_map(folder / model)[0]
                fits.append(max(align(m, reference, job.pixel_size, radius=100).mean_fsc for m in job.maps))
        print(
            f"{kind} seed {seed}: {line}; {100 * right:.0f} % in all; populations "
            f"{np.round(job.state.class_probability, 2).tolist()}, mean FSC with the models {np.round(fits, 2).tolist()}, "
            f"{seconds:.0f} s, Pmax {job.report.pmax:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["mixed", "junk"])
    parser.add_argument("--mini-batches", type=int, default=60)
    options = parser.parse_args()
    for kind in options.only:
        for seed in range(options.seeds):
            run(kind, seed, options.mini_batches)


if __name__ == "__main__":
    main()
