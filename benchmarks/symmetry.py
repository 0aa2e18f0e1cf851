"""How surely axes are found: maps of known symmetry, in noise, randomly turned and shifted.

python benchmarks/symmetry.py [--draws 10] [--box 64] [GROUP ...]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "symmetry"))

from planted import errors, planted

from vdamkit.symmetry import find_symmetry

GROUPS = ("C2", "C3", "C4", "C6", "C7", "C14", "D2", "D7", "T", "O", "I")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=GROUPS)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--box", type=int, default=64)
    options = parser.parse_args()
    print("group  found  largest error of axes (°) and centre (px)  seconds (median, largest)")
    good = total = 0
    for group in options.groups:
        angles, centres, seconds = [], [], []
        for draw in range(options.draws):
            volume, rotation, shift = planted(group, 1000 * draw + len(group), box=options.box)
            began = time.perf_counter()
            match = find_symmetry(volume, 1.0, group)
            seconds.append(time.perf_counter() - began)
            angle, centre = errors(group, (match.rotation, match.shift), (rotation, shift))
            angles.append(angle)
            centres.append(centre)
        found = sum(a <= 1 and c <= 0.5 for a, c in zip(angles, centres, strict=True))
        good, total = good + found, total + options.draws
        print(
            f"{group:5s}  {found:2d} of {options.draws}  {max(angles):6.2f}  {max(centres):5.2f}"
            f"  {np.median(seconds):5.1f}  {max(seconds):5.1f}",
            flush=True,
        )
    print(f"{good} of {total}")


if __name__ == "__main__":
    main()
