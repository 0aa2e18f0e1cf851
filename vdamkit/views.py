"""What a session found, as arrays, tables, words and pictures; nothing here changes its state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vdamkit.backend import get_backend
from vdamkit.state import StepReport

if TYPE_CHECKING:
    from vdamkit.notebook import Picture
    from vdamkit.notebook.panel import Panel
    from vdamkit.notebook.viewer import View
    from vdamkit.scoring import ParticlePosterior
    from vdamkit.session import Session
    from vdamkit.verdict import Verdict


class Views:
    """Methods of :class:`vdamkit.Session`."""

    @property
    def maps(self: Any) -> np.ndarray:
        """Maps of all classes in the grey values of the data, `(K, N, N, N)` float32 zyx."""
        state = self.state
        return (state.maps / state.grey_scale).astype(np.float32)

    @property
    def map(self: Any) -> np.ndarray:
        """Map of the most populated class, `(N, N, N)` float32 zyx."""
        return self.maps[int(np.argmax(self.state.class_probability))]

    @property
    def poses(self: Any) -> pd.DataFrame:
        """Every particle's pose under RELION's column names; `rlnClassNumber` 0 marks one never visited."""
        from vdamkit.io.relion_output import pose_columns

        return pd.DataFrame(pose_columns(self.state))

    @property
    def history(self: Any) -> pd.DataFrame:
        """One row per node of the history tree, the current line's nodes marked in `on_line`."""
        self._ensure_start()
        line = set(self.line())
        rows = [node.row() | {"on_line": node.number in line} for node in self._history.nodes]
        return pd.DataFrame(rows).set_index("node")

    def reports(self: Any) -> list[StepReport]:
        """Reports of the current line, oldest first; after a resume also those of before (without timings)."""
        line = [node.report for node in self._history.line() if node.report is not None]
        # a node without a mini-batch of its own, such as symmetry applied, bears the report before it
        return self._earlier + [report for i, report in enumerate(line) if i == 0 or report is not line[i - 1]]

    def posterior(self: Any, particle: int) -> ParticlePosterior:
        """One particle's posterior against the current map: see :func:`vdamkit.scoring.particle_posterior`."""
        from vdamkit.scoring import particle_posterior

        state, settings = self.state, self._in_group(self._pending)
        return particle_posterior(state, settings, self._source, get_backend("cpu", settings.threads), particle)

    def verdict(self: Any, other: Session | None = None) -> Verdict:
        """Whether the run converged and the map is more than a blob, in plain words; `other`: a run with another seed."""
        from vdamkit.verdict import judge

        return judge(self, other)

    # to see and touch -----------------------------------------------------------------------------------------------

    def panel(self: Any, *, truth: str | Path | np.ndarray | None = None) -> Panel:
        """The control panel, for a notebook: knobs, buttons, and pictures that follow the run.

        truth: a map to compare with, where it is known. An earlier panel of this session is closed. Needs vdamkit[notebook].
        """
        from vdamkit.notebook import open_panel

        return open_panel(self, truth)

    def picture(self: Any, what: str = "map", **options: Any) -> Picture:
        """A picture of the current state: "map", "resolution", "orientations", "convergence" or "symmetry"; it can be saved.

        Options: see :func:`vdamkit.notebook.picture_of`.
        """
        from vdamkit.notebook import picture_of

        return picture_of(self, what, **options)

    def show(self: Any, view: str = "map", **options: Any) -> View:
        """The maps (`view="map"`) or a tomogram's particles (`"tomogram"`) in napari or an inline 3D view; follows the run.

        Options: see :class:`vdamkit.notebook.viewer.View`. `close()` takes it away. Needs vdamkit[viewer] for napari.
        """
        from vdamkit.notebook import open_view

        return open_view(self, view, options)
