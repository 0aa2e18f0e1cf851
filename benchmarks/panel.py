"""What the panel costs: the same run without it, and with it while each of its tabs is looked at.

    python benchmarks/panel.py [--mini-batches 12]

Runs on an event loop as a notebook kernel has one. Each run with a panel follows one without; medians of
their ratios.
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
    names = ("Map", "Resolution", "Orientations", "Convergence", "Symmetry", "History", "Log")
    ratios: dict[str, list[float]] = {name: [] for name in names}
    bases = []
    for _ in range(rounds):
        for number, name in enumerate(names):
            base = await run(job, n, None)  # just before each, so that what else the machine does hits both alike
            bases.append(base)
            ratios[name].append(await run(job, n, number) / base)
    print(f"{n} mini-batches without a panel: {np.median(bases):.2f} s (medians of {rounds} rounds)")
    for name in names:
        some = np.array(ratios[name])
        low, middle, high = (100 * (value - 1) for value in (some.min(), np.median(some), some.max()))
        print(f"tab {name:13s} {middle:+5.1f} %   ({low:+.1f} to {high:+.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mini-batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    asyncio.run(measure(options.mini_batches, options.rounds))


if __name__ == "__main__":
    main()
