"""Which symmetries a map supports: a mark per point group between a wrong one and the best, and the axes of the leading one."""

from __future__ import annotations

from typing import Any

import numpy as np

from vdamkit.notebook.figures import new_figure
from vdamkit.picture import BLUE, GREY, ORANGE, house_style
from vdamkit.symmetry.scores import REFUTED, SUPPORTED, GroupScore, SymmetryScores


@house_style()
def symmetry_figure(scores: SymmetryScores, *, heading: str | None = None) -> Any:
    """Scores of all groups by family, and the axes of the leading group in the map's frame.

    Blue groups fit as the best does, grey ones do not, orange ones are in doubt.
    """
    figure = new_figure(8.6, 4.4)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2.1, 1]})
    _groups(left, scores)
    leading = scores[scores.named] if scores.named not in (None, "C1") else scores.groups[0]
    _axes(right, leading, scores.named)
    figure.suptitle(f"{heading}\n{scores}" if heading else str(scores), fontsize=9)
    return figure


def _groups(axis: Any, scores: SymmetryScores) -> None:
    best = scores.groups[0].score
    refuted = scores.chance + REFUTED * (best - scores.chance)
    axis.axhspan(min(0, *(g.score for g in scores.groups)) - 0.03, refuted, color="0.94", lw=0)
    axis.text(29.7, refuted - 0.01, "does not fit", ha="right", va="top", fontsize=7.5, color=GREY)
    axis.axhline(scores.chance, color=GREY, lw=0.8, ls="--")
    axis.axhline(best, color=BLUE, lw=0.8)
    columns = {"C": 0.0, "D": 14.0, "P": 27.0}
    ticks, labels = [], []
    order = {group.group: group for group in scores.groups}
    places = {"C": 0, "D": 0, "P": 0}
    for name in sorted(order, key=_place):
        item = order[name]
        family = name[0] if name[0] in "CD" else "P"
        x = columns[family] + places[family]
        places[family] += 1
        colour = BLUE if item.relative >= SUPPORTED else ORANGE if item.relative > REFUTED else GREY
        axis.plot([x, x], [scores.chance, item.score], color=colour, lw=1.2)
        axis.plot(x, item.score, "o", color=colour, ms=5)
        ticks.append(x)
        labels.append(name[0] if name[0] in "TOI" else name)
    axis.set_xticks(ticks, labels, rotation=90, fontsize=7.5)
    axis.set_ylabel(f"mean FSC to {scores.resolution:.1f} Å with the copy\nthat fits least")
    axis.text(30.2, best, " best", va="center", fontsize=7.5, color=BLUE)
    axis.text(30.2, scores.chance, " typical\n wrong\n group", va="center", fontsize=7.5, color=GREY)
    axis.set_xlim(-1, 30)
    axis.set_ylim(min(0, *(g.score for g in scores.groups)) - 0.03, 1.02)


def _place(group: str) -> tuple[int, int]:
    if group[0] in "CD":
        return "CD".index(group[0]), int(group[1:])
    return 2, "TOI".index(group[0])


def _axes(axis: Any, score: GroupScore, named: str | None) -> None:
    """The upper hemisphere in stereographic projection along z, with a mark of n corners for every n-fold axis."""
    circle = np.linspace(0, 2 * np.pi, 181)
    axis.plot(np.cos(circle), np.sin(circle), color=GREY, lw=0.8)
    axis.plot([-1, 1], [0, 0], color="0.9", lw=0.6, zorder=0)
    axis.plot([0, 0], [-1, 1], color="0.9", lw=0.6, zorder=0)
    for fold, direction in score.axes:
        u = direction if direction[2] >= 0 else -direction
        x, y = u[:2] / (1 + u[2])
        marker = "d" if fold == 2 else (fold, 0, 0) if fold < 8 else "o"
        axis.plot(x, y, marker=marker, ms=11 if fold > 2 else 8, color=BLUE if named not in (None, "C1") else ORANGE, ls="none")
        axis.annotate(f"{fold}", (x, y), textcoords="offset points", xytext=(7, 5), fontsize=7.5)
    name = score.group[0] if score.group[0] in "TOI" else score.group
    axis.set_title(f"axes of {name}, seen along z", fontsize=8.5)
    axis.set_aspect("equal")
    axis.set_xlim(-1.12, 1.12)
    axis.set_ylim(-1.12, 1.12)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("x →", fontsize=8, color=GREY)
    axis.set_ylabel("y →", fontsize=8, color=GREY)
    for spine in axis.spines.values():
        spine.set_visible(False)
