"""How much a mini-batch slows down beside a second process that keeps all cores busy with BLAS.

python benchmarks/busy.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import vdamkit as vk

DATA = Path(__file__).resolve().parents[1] / "data"
LOAD = "import numpy as np\na = np.random.rand(1500, 1500)\nwhile True: a @ a"


def step_times(job: vk.Session, n: int) -> float:
    times = []
    for _ in range(n):
        start = time.perf_counter()
        job.branch().step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    job = vk.Session(DATA / "stacks2d" / "optimisation_set.star", vk.Settings(symmetry="C6", tilt_prior_width=10))
    job.run(12)
    quiet = step_times(job, 5)
    load = subprocess.Popen([sys.executable, "-c", LOAD])
    try:
        time.sleep(2)
        busy = step_times(job, 5)
    finally:
        load.kill()
        load.wait()
    print(f"quiet {quiet:.2f} s, beside a busy process {busy:.2f} s: {busy / quiet:.1f} times as long")


if __name__ == "__main__":
    main()
