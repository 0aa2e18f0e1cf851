"""What the panel costs: the same run without it, and with it while each of its tabs is looked at.

    python benchmarks/panel.py [--mini-batches 12]

Runs on an event loop as a notebook kernel has one. Interleaved, medians of the mini-batches' times.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np

import vdamkit as vk

DATA = Path(__file__).resolve().parents[1] / "data"


async def run(job: vk.Session, n: int, tab: int | None) -> float:
    """Seconds for `n` mini-batches of a branch of `job`, with a panel on tab number `tab`, or none."""
    branch = job.branch()
    if tab is None:
        began = time.perf_counter()
        await asyncio.to_thread(branch.run, n)
        return time.perf_counter() - began
    panel = branch.panel(truth=DATA / "true_map.mrc")
    panel.face.tabs.selected_index = tab
    await asyncio.sleep(0.1)
    while panel.painter.busy:
        await asyncio.sleep(0.05)
    began = time.perf_counter()
    await panel.run(n)
    seconds = time.perf_counter() - began
    panel.close()
    return seconds


async def measure(n: int, rounds: int) -> None:
    job = vk.Session(DATA / "stacks2d" / "optimisation_set.star", vk.Settings(symmetry="C6", tilt_prior_width=10))
    job.run(12)
    names = ("no panel", "Map", "Resolution", "Orientations", "Convergence", "History", "Log")
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for number, name in enumerate(names):
            times[name].append(await run(job, n, None if number == 0 else number - 1))
    base = float(np.median(times["no panel"]))
    print(f"{n} mini-batches without a panel: {base:.2f} s (median of {rounds})")
    for name in names[1:]:
        seconds = float(np.median(times[name]))
        print(f"tab {name:13s} {seconds:6.2f} s  {100 * (seconds / base - 1):+5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mini-batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    asyncio.run(measure(options.mini_batches, options.rounds))


if __name__ == "__main__":
    main()
