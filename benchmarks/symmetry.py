"""How surely axes are found: maps of known symmetry, in noise, randomly turned and shifted.

    python benchmarks/symmetry.py [--draws 10] [--box 64] [--scores] [GROUP ...]

With --scores: which group `symmetry_scores` names in the same maps, and in maps without symmetry.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "symmetry"))

from planted import errors, planted

from vdamkit.sampling.point_groups import parse_symmetry
from vdamkit.symmetry import find_symmetry, symmetry_scores

GROUPS = ("C2", "C3", "C4", "C6", "C7", "C14", "D2", "D7", "T", "O", "I")


def score(groups: Sequence[str], draws: int, box: int) -> None:
    """Named right, undecided with the truth listed, undecided without it, named wrong."""
    totals = np.zeros(4, int)
    print("group  right  listed  not listed  wrong   contrast (least, largest)  seconds")
    for group in groups:
        counts, contrasts, seconds = np.zeros(4, int), [], []
        for draw in range(draws):
            volume, _, _ = planted(group, 1000 * draw + len(group), box=box)
            began = time.perf_counter()
            found = symmetry_scores(volume, 1.0)
            seconds.append(time.perf_counter() - began)
            true = parse_symmetry(group)
            outcome = (0 if found.named == true else 3) if found.named else 1 if true in found.possible else 2
            counts[outcome] += 1
            contrasts.append((found.groups[0].score - found.chance) / (1 - found.chance))
            if outcome:
                print(f"       draw {draw}: {found}", flush=True)
        totals += counts
        row = f"{group:5s} {counts[0]:5d} {counts[1]:7d} {counts[2]:11d} {counts[3]:6d}"
        print(f"{row}   {min(contrasts):.2f} {max(contrasts):.2f}                  {np.median(seconds):.1f}", flush=True)
    print(f"in all {totals[0]} right, {totals[1]} undecided with the true group, {totals[2]} without, {totals[3]} wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=GROUPS)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--scores", action="store_true")
    options = parser.parse_args()
    if options.scores:
        score(options.groups if options.groups != GROUPS else (*GROUPS, "C1"), options.draws, options.box)
        return
    print("group  found  largest error of axes (°) and centre (px)  seconds (median, largest)  doubted")
    good = total = 0
    for group in options.groups:
        angles, centres, seconds, doubts = [], [], [], 0
        for draw in range(options.draws):
            volume, rotation, shift = planted(group, 1000 * draw + len(group), box=options.box)
            began = time.perf_counter()
            match = find_symmetry(volume, 1.0, group)
            seconds.append(time.perf_counter() - began)
            doubts += bool(match.warning)
            angle, centre = errors(group, (match.rotation, match.shift), (rotation, shift))
            angles.append(angle)
            centres.append(centre)
        found = sum(a <= 1 and c <= 0.5 for a, c in zip(angles, centres, strict=True))
        good, total = good + found, total + options.draws
        print(
            f"{group:5s}  {found:2d} of {options.draws}  {max(angles):6.2f}  {max(centres):5.2f}"
            f"  {np.median(seconds):5.1f}  {max(seconds):5.1f}  {doubts:3d}",
            flush=True,
        )
    print(f"{good} of {total}")


if __name__ == "__main__":
    main()
