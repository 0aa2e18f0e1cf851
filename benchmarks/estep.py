"""E-step (shifted copies, scores, softmax) against the sgemm rate of the same process, by radius and number of rotations.

    python benchmarks/estep.py [--threads 1]

FLOPs counted: 2 real multiply-adds per complex voxel, rotation and shift (4 operations), as one product of everything with
everything takes; rotations share products with their half turns, so that more than 100 % can be reached.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from threadpoolctl import threadpool_limits

from vdamkit.backend import get_backend
from vdamkit.imaging.halfball import half_ball
from vdamkit.sampling.shifts import shift_grid
from vdamkit.vdam.dense import ByHalfTurns

BOX, PARTICLES = 64, 8


def median_time(work, repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def sgemm_rate(backend, m: int, n: int, k: int) -> float:
    """FLOP/s of plain float32 products of this shape, one per worker at a time."""
    a, b = np.random.default_rng(0).random((m, k), np.float32), np.random.default_rng(1).random((n, k), np.float32)
    jobs = range(2 * backend.threads)
    return len(jobs) * 2 * m * n * k / median_time(lambda: backend.map(lambda _: a @ b.T, jobs), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    backend = get_backend("cpu", parser.parse_args().threads)
    rng = np.random.default_rng(0)
    shifts = shift_grid(6, 2)
    with threadpool_limits(1, user_api="blas"):
        peak = sgemm_rate(backend, 1024, 1024, 8192)
        print(
            f"threads {backend.threads}, sgemm {peak / 1e9:.0f} GFLOP/s, {len(shifts)} shifts, {PARTICLES} particles a worker"
        )
        print("radius  rotations     GFLOP   ms/particle   GFLOP/s   share of sgemm")
        for radius in (8, 12, 16):
            for rotations in (100, 500, 1000):
                ball = half_ball(radius)
                n = len(ball)
                rows = (rng.normal(size=(rotations, n)) + 1j * rng.normal(size=(rotations, n))).astype(np.complex64)
                b = (rng.normal(size=(PARTICLES, n)) + 0j).astype(np.complex64) * np.float32(1e-3)
                w = rng.random((PARTICLES, n), np.float32) * np.float32(1e-3)
                parts = ByHalfTurns.parts_of(rows[: rotations // 2], radius)
                scorer = ByHalfTurns(parts, rotations // 2, radius, ball.phases(shifts, BOX))

                def one(_, scorer=scorer, b=b, w=w) -> None:
                    scores = scorer.scores(b, w)
                    for i in range(PARTICLES):
                        block = scores[:, i]
                        np.subtract(block, block.max(), out=block)
                        np.exp(block, out=block)
                        block /= block.sum(dtype=np.float64)

                jobs = range(2 * backend.threads)
                seconds = median_time(lambda one=one, jobs=jobs: backend.map(one, jobs), 3) / len(jobs)
                flop = 4 * n * rotations * len(shifts) * PARTICLES
                rate = flop / seconds
                print(f"{radius:6d} {rotations:10d} {flop / 1e9:9.1f} {1e3 * seconds / PARTICLES:13.2f} {rate / 1e9:9.0f} "
                      f"{100 * rate / peak:13.0f} %")  # fmt: skip


if __name__ == "__main__":
    main()
