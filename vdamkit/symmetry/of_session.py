"""Symmetry of a session's current state: found, applied as a node of the history, or only for the final model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vdamkit.errors import SettingsError
from vdamkit.sampling.point_groups import parse_symmetry
from vdamkit.state import State
from vdamkit.symmetry.apply import moved_state
from vdamkit.symmetry.fit import SymmetryMatch, find_symmetry

if TYPE_CHECKING:
    from vdamkit.session import Session

EMPTY = 1e-3  # share of the particles below which a class has no axes to find


def matches_of(session: Session, group: str | None) -> list[SymmetryMatch]:
    """One match per class; `group` None: the session's own. An empty class stays where it is.

    Raises
    ------
    SettingsError: the group is unknown, or neither given nor set.
    """
    state, settings = session.state, session.settings
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
        out.append(find_symmetry(volume, session.pixel_size, group, radius=settings.mask_diameter / 2, resolution=resolution))
    return out


def apply(session: Session, group: str | None) -> list[SymmetryMatch]:
    """Move and symmetrise maps, moments and poses; a node of the history, and the group from the next mini-batch on."""
    matches = matches_of(session, group)
    state = moved_state(session.state, matches, session.pixel_size)
    main = matches[int(np.argmax(state.class_probability))]
    settings = session.settings.replace(symmetry=main.group, run_in_c1=False)
    session._history.append(state, settings, session.report, note=f"symmetry applied: {main}")
    session._arrive()
    return matches


def final_state(session: Session) -> State | None:
    """The state whose map becomes ``initial_model.mrc`` where that is another one: a run in C1 with symmetry for later."""
    settings = session.settings
    if not settings.run_in_c1 or settings.symmetry == "C1":
        return None
    return moved_state(session.state, matches_of(session, None), session.pixel_size)
