"""What changes a session's state other than a mini-batch: poses scored, symmetry applied, classes split, merged, dropped.

Every edit is a node of the history, so undo takes it back. None can be made while a mini-batch runs in another thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vdamkit.control import alone
from vdamkit.errors import SettingsError
from vdamkit.state import State
from vdamkit.vdam.visit import no_tick

if TYPE_CHECKING:
    from vdamkit.symmetry import SymmetryMatch
    from vdamkit.symmetry.scores import SymmetryScores


class Edits:
    """Methods of :class:`vdamkit.Session`."""

    @alone
    def score_all(self: Any, tick: Callable[[str, float], None] = no_tick) -> pd.DataFrame:
        """Give every particle, also those never drawn, a pose against the current map; maps and moments stay.

        The new poses are a node of the history (undo takes them back) and are returned as :attr:`poses`. A symmetry that no
        mini-batch has taken up yet does not count.
        """
        from vdamkit.scoring import score_all

        before = self.state
        state, settings = self._computed(lambda settings, *means: score_all(before, self._in_group(settings), *means, tick))
        self._history.append(state, settings, self.report, "all particles scored", has=self._history.node.in_force)
        self._tell()
        return self.poses

    # symmetry ---------------------------------------------------------------------------------------------------------

    def align_symmetry(self, group: str | None = None) -> list[SymmetryMatch]:
        """Where a point group's axes (default: the settings') lie in the current maps, a match per class; changes nothing."""
        from vdamkit.symmetry.of_session import matches_of

        return matches_of(self, group)

    @alone
    def apply_symmetry(self, group: str | None = None) -> list[SymmetryMatch]:
        """Turn maps, moments and poses onto a point group's axes and symmetrise; the group is in force from then on.

        A node of the history: undo gives the unsymmetrised state back. See :func:`vdamkit.symmetry.find_symmetry`.
        """
        from vdamkit.symmetry.of_session import apply

        return apply(self, group)

    def symmetry_scores(self: Any, k: int | None = None, state: State | None = None) -> SymmetryScores:
        """Which point groups the map of a class (from 1; default the most populated) supports, now or in another state.

        Made for a map computed in C1; ``print`` the result, or see ``session.picture("symmetry")``.
        See :func:`vdamkit.symmetry.scores.symmetry_scores`. Changes nothing.
        """
        from vdamkit.symmetry.of_session import scores_of

        return scores_of(self, k, state)

    # classes ----------------------------------------------------------------------------------------------------------

    @alone
    def split_class(self: Any, k: int | None = None) -> int:
        """Let a class (from 1; default the largest) go on as two that differ as its pseudo-halves do.

        Returns the number of the new class. Raises SettingsError where there is no such class or it saw no mini-batch.
        """
        from vdamkit.classes import split

        state: State = self.state
        k = int(np.argmax(state.class_probability)) + 1 if k is None else self._class(k)
        radius = self._pending.mask_diameter / (2 * self.pixel_size)
        new = split(state, k - 1, solvent=self._pending.solvent, mask_radius=radius)
        self._edited(new, f"class {k} split; the other half is class {len(new.maps)}")
        return len(new.maps)

    @alone
    def merge_classes(self: Any, k: int, into: int) -> None:
        """Let the particles of class `k` join class `into` (numbers from 1), laid onto its map; later numbers move down.

        Raises SettingsError where there are no such two classes, or one of them is empty.
        """
        from vdamkit.classes import merge, within_group
        from vdamkit.compare import align

        if self._class(k) == self._class(into):
            raise SettingsError(f"class {k} cannot be merged into itself; give two classes")
        state, px = self.state, self.pixel_size
        for each in (k, into):
            if not np.ptp(state.maps[each - 1]):
                raise SettingsError(f"class {each} is empty, so there is nothing to lay on the other; use drop_class({each})")
        radius, threads = self._pending.mask_diameter / 2, self._pending.threads
        match = align(state.maps[k - 1], state.maps[into - 1], px, radius=radius, threads=threads)
        moved = within_group(match, self._pending.search_symmetry)
        self._edited(merge(state, k - 1, into - 1, moved), f"class {k} merged into class {into}")

    @alone
    def drop_class(self: Any, k: int) -> None:
        """Take class `k` (from 1) away; its particles count as never visited. Later numbers move down.

        Raises SettingsError where there is no such class or it is the only one.
        """
        from vdamkit.classes import drop

        if self._class(k) and len(self.state.maps) == 1:
            raise SettingsError("class 1 is the only one; it cannot be dropped")
        self._edited(drop(self.state, k - 1), f"class {k} dropped")

    def _class(self: Any, k: int) -> int:
        classes = len(self.state.maps)
        if not (isinstance(k, int | np.integer) and 1 <= k <= classes):
            raise SettingsError(f"there is no class {k}; classes are numbered 1 to {classes}")
        return int(k)

    def _edited(self: Any, state: State, note: str) -> None:
        settings = self._pending.replace(classes=len(state.maps))
        has = self._history.node.in_force.replace(classes=len(state.maps))
        self._history.append(state, settings, self.report, note, has=has)
        self._arrive()
