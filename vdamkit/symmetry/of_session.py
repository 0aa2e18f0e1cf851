"""Symmetry of a session's current state: found, applied as a node of the history, or only for the final model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vdamkit.errors import SettingsError
from vdamkit.sampling.point_groups import operators, parse_symmetry
from vdamkit.state import State
from vdamkit.symmetry.apply import moved_state
from vdamkit.symmetry.fit import SymmetryMatch, find_symmetry
from vdamkit.symmetry.scores import SymmetryScores, symmetry_scores

if TYPE_CHECKING:
    from vdamkit.session import Session
    from vdamkit.settings import Settings

CLASH = 2.0  # widths of the tilt prior by which the z axis may turn
EMPTY = 1e-3  # share of the particles below which a class has no axes to find


def matches_of(session: Session, group: str | None, state: State | None = None) -> list[SymmetryMatch]:
    """One match per class of a state, by default the current one; `group` None: the session's own. An empty class stays where
    it is.

    Raises
    ------
    SettingsError: the group is unknown, or neither given nor set.
    """
    state, settings = session.state if state is None else state, session.settings
    group = parse_symmetry(group or settings.symmetry)
    if group == "C1":
        raise SettingsError("symmetry is C1, which has no axes; give a group, such as session.apply_symmetry('C6')")
    resolution = session.particles.box * session.pixel_size / state.resolution_shell
    out = []
    for volume, share in zip(state.maps, state.class_probability, strict=True):
        if share < EMPTY or not np.ptp(volume):
            nyquist = 2 * session.pixel_size
            out.append(SymmetryMatch(group, np.eye(3), np.zeros(3), np.zeros(len(volume) // 2 + 1), 0.0, nyquist))
            continue
        out.append(find_symmetry(
            volume, session.pixel_size, group, radius=settings.mask_diameter / 2, resolution=resolution,
            threads=settings.threads,
        ))  # fmt: skip
    return out


def apply(session: Session, group: str | None) -> list[SymmetryMatch]:
    """Move and symmetrise maps, moments and poses; a node of the history, and the group from the next mini-batch on."""
    matches = matches_of(session, group)
    state = moved_state(session.state, matches, session.pixel_size)
    main = matches[int(np.argmax(state.class_probability))]
    settings = session.settings.replace(symmetry=main.group, run_in_c1=False)
    has = session._history.node.in_force.replace(symmetry=main.group, run_in_c1=False)
    note = f"symmetry applied: {main}{_clash(settings, main)}"
    session._history.append(state, settings, session.report, note, has=has)
    session._arrive()
    return matches


def scores_of(session: Session, k: int | None, state: State | None) -> SymmetryScores:
    """See :meth:`vdamkit.Session.symmetry_scores`."""
    state = session.state if state is None else state
    number = int(np.argmax(state.class_probability)) if k is None else session._class(k) - 1
    if not np.ptp(state.maps[number]):
        raise SettingsError(f"class {number + 1} is empty; there is nothing to score")
    resolution = session.particles.box * session.pixel_size / state.resolution_shell
    radius = session.settings.mask_diameter / 2
    return symmetry_scores(
        state.maps[number], session.pixel_size, radius=radius, resolution=resolution, threads=session.settings.threads
    )  # fmt: skip


def taken_up(session: Session, settings: Settings) -> tuple[State, str]:
    """The current state for a mini-batch with these settings, and what was done to it: where that is to run in a group that the
    maps do not have yet, they are turned onto its axes and symmetrised.

    Where the maps show no such axes, as in the first mini-batches, those of the reference frame are taken. Nothing is to be
    done where the new group is part of the old one, as it is for C6 → C3 or C6 → C1.
    """
    node = session._history.node
    state, old, new = node.state, node.in_force.search_symmetry, settings.search_symmetry
    if old == new or node.iteration == 0 or _is_part(new, old):
        return state, ""
    matches = [_in_place(match) if match.warning else match for match in matches_of(session, new, state)]
    main = matches[int(np.argmax(state.class_probability))]
    note = f"{new} about the axes of the frame: {main.warning}" if main.warning else f"turned onto the axes of {main}"
    return moved_state(state, matches, session.pixel_size), note + _clash(settings, main)


def _clash(settings: Settings, match: SymmetryMatch) -> str:
    """What to say where the axes lie elsewhere than the prior on the tilt angle expects the particle's z axis."""
    away = float(np.degrees(np.arccos(min(1.0, abs(match.rotation[2, 2])))))
    width = settings.tilt_prior_width
    if width is None or away <= CLASH * width:
        return ""
    return (
        f"; but the z axis turned by {away:.0f}°, which the prior on tilt ({width:g}°) does not admit: switch it off "
        "(tilt_prior_width=None)"
    )


def _in_place(match: SymmetryMatch) -> SymmetryMatch:
    """A match that leaves the map where it is."""
    return replace(match, rotation=np.eye(3), shift=np.zeros(3))


def _is_part(small: str, large: str) -> bool:
    """Whether each operator of one group is one of another as they are set."""
    return all(np.abs(operators(large) - operator).max((1, 2)).min() < 1e-6 for operator in operators(small))


def final_matches(session: Session, state: State) -> list[SymmetryMatch]:
    """How the maps of a state are turned for the final model, one match per class, where that is another: of a run in C1 with
    symmetry for later. Otherwise none."""
    settings = session.settings
    return matches_of(session, None, state) if settings.run_in_c1 and settings.symmetry != "C1" else []
