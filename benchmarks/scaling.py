"""Cost of a mini-batch of 100 particles from a file with 100 and with 100,000 rows, and of opening the latter.

    python benchmarks/scaling.py

Rows repeat the image files of `data/`, so only book-keeping differs. Medians of warm mini-batches, interleaved.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

import vdamkit as vk
from vdamkit.io.star_tables import read_star, write_star

DATA = Path(__file__).resolve().parents[1] / "data"


def repeated(folder: Path, rows: int) -> Path:
    """An optimisation set with `rows` particles."""
    blocks = read_star(DATA / "stacks2d" / "particles.star")
    table = blocks["particles"]
    many = table.iloc[np.arange(rows) % 100].reset_index(drop=True)
    many["rlnTomoParticleName"] = [f"{t}/{i + 1}" for i, t in enumerate(many["rlnTomoName"])]
    many["rlnImageName"] = [str(DATA / name) for name in many["rlnImageName"]]
    star = folder / f"particles_{rows}.star"
    write_star(star, blocks | {"particles": many})
    return star


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        jobs = {}
        for rows in (100, 100_000):
            star = repeated(Path(name), rows)
            start = time.perf_counter()
            settings = vk.Settings(
                symmetry="C6", tilt_prior_width=10, batch_initial=100, batch_final=100, noise_particles=50, memory_budget=0.25
            )
            jobs[rows] = vk.Session(settings=settings, particles=star, tomograms=DATA / "tomograms.star")
            print(f"{rows} rows: opened in {time.perf_counter() - start:.2f} s")
        times = {rows: [] for rows in jobs}
        for job in jobs.values():
            job.run(2)
        for _ in range(7):
            for rows, job in jobs.items():
                # the same particles every time: what is measured is not reading but book-keeping
                job._source.fetch(np.arange(100), 16)
                start = time.perf_counter()
                job.branch().step()
                times[rows].append(time.perf_counter() - start)
        medians = {rows: float(np.median(t)) for rows, t in times.items()}
        for rows, t in medians.items():
            print(f"{rows} rows: mini-batch of 100 in {t:.3f} s (median of 7)")
        print(f"ratio {medians[100_000] / medians[100]:.3f}")


if __name__ == "__main__":
    main()
