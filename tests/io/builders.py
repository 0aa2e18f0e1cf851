"""A tiny valid project: three particles, two tomograms, two optics groups; change it, then write it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd

from vdamkit.io.star_tables import write_star

BOX = 8
PIXEL = 4.0
TILTS = {"01": [-40.0, -20.0, 0.0, 20.0, 40.0], "TS_2": [-30.0, 0.0, 30.0, 60.0]}
VISIBLE = ["[1,1,1,1,1]", "[1,0,1,1,1]", "[0,1,1,1]"]
NAMES = ["01", "01", "TS_2"]


@dataclass
class Project:
    """Files to be written: STAR blocks and arrays (or raw bytes) by path below `folder`."""

    folder: Path
    kind: str
    stars: dict[str, dict] = field(default_factory=dict)
    images: dict[str, np.ndarray | bytes] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)  # overrides stars

    @property
    def particles(self) -> pd.DataFrame:
        return self.stars["particles.star"]["particles"]

    @property
    def optics(self) -> pd.DataFrame:
        return self.stars["particles.star"]["optics"]

    @property
    def tomograms(self) -> pd.DataFrame:
        return self.stars["tomograms.star"]["global"]

    def drop(self, star: str, block: str, *columns: str) -> None:
        """Remove columns of a block."""
        self.stars[star][block] = self.stars[star][block].drop(columns=list(columns))

    def set(self, star: str, block: str, row: int, column: str, value: object) -> None:
        """Change (or add) one cell."""
        table = self.stars[star][block]
        if column not in table.columns:
            table[column] = 0.0
        table[column] = table[column].astype(object)
        table.loc[row, column] = value

    def write(self) -> Path:
        """Write everything; returns the optimisation set's path."""
        for name, blocks in self.stars.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_star(self.folder / name, blocks)
        for name, content in {**self.images, **self.raw}.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                write_image(path, content)
        return self.folder / "optimisation_set.star"


def write_image(path: Path, array: np.ndarray) -> None:
    """Write an MRC file in the array's own type."""
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.zeros_like(array))
        mrc.data[...] = array  # mrcfile would warn of NaN if they were given at once
        mrc.voxel_size = PIXEL


def make_project(folder: Path, kind: str = "stack", *, dtype: str = "float32") -> Project:
    """A valid project of `kind` "stack" or "volume", not yet written."""
    rng = np.random.default_rng(5)
    project = Project(folder, kind)
    project.stars["optimisation_set.star"] = {
        "": {"rlnTomoParticlesFile": "particles.star", "rlnTomoTomogramsFile": "tomograms.star"}
    }
    project.stars["tomograms.star"] = {"global": _tomogram_table()}
    for name, angles in TILTS.items():
        project.stars[f"tilt_series/{name}.star"] = {name: _tilt_table(angles)}
    particles = _particle_table()
    for row in range(len(NAMES)):
        if kind == "stack":
            n_visible = VISIBLE[row].count("1")
            project.images[f"sub/{row}_stack2d.mrcs"] = rng.normal(size=(n_visible, BOX, BOX)).astype(dtype)
            continue
        half = (2 * BOX, BOX, BOX // 2 + 1)
        project.images[f"sub/{row}_data.mrc"] = rng.normal(size=(BOX,) * 3).astype(dtype)
        project.images[f"sub/{row}_weights.mrc"] = rng.uniform(0.5, 3, half).astype(dtype)
    if kind == "stack":
        particles["rlnTomoVisibleFrames"] = VISIBLE
        particles["rlnImageName"] = [f"sub/{row}_stack2d.mrcs" for row in range(3)]
    else:
        particles["rlnImageName"] = [f"sub/{row}_data.mrc" for row in range(3)]
        particles["rlnCtfImage"] = [f"sub/{row}_weights.mrc" for row in range(3)]
    project.stars["particles.star"] = {
        "general": {"rlnTomoSubTomosAre2DStacks": int(kind == "stack")},
        "optics": _optics_table(2 if kind == "stack" else 3),
        "particles": particles,
    }
    return project


def _tomogram_table() -> pd.DataFrame:
    names = list(TILTS)
    return pd.DataFrame(
        {
            "rlnTomoName": names,
            "rlnVoltage": [300.0, 200.0],
            "rlnSphericalAberration": 2.7,
            "rlnAmplitudeContrast": 0.1,
            "rlnTomoHand": [-1.0, 1.0],
            "rlnOpticsGroupName": ["optics1", "optics2"],
            "rlnTomoTiltSeriesPixelSize": 2.0,
            "rlnTomoTiltSeriesStarFile": [f"tilt_series/{name}.star" for name in names],
            "rlnTomoSizeX": 400,
            "rlnTomoSizeY": 300,
            "rlnTomoSizeZ": 101,
        }
    )


def _tilt_table(angles: list[float]) -> pd.DataFrame:
    order = np.arange(len(angles))
    return pd.DataFrame(
        {
            "rlnMicrographName": [f"images/{i}.mrc" for i in order],
            "rlnMicrographPreExposure": 3.0 * order,
            "rlnDefocusU": 30000.0 + 100 * order,
            "rlnDefocusV": 29000.0 + 100 * order,
            "rlnDefocusAngle": 10.0 * order,
            "rlnTomoXTilt": 1.0,
            "rlnTomoYTilt": angles,
            "rlnTomoZRot": 85.0,
            "rlnCtfScalefactor": np.cos(np.radians(angles)),
        }
    )


def _optics_table(dimensionality: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "rlnOpticsGroup": [1, 2],
            "rlnOpticsGroupName": ["optics1", "optics2"],
            "rlnVoltage": [300.0, 200.0],
            "rlnSphericalAberration": 2.7,
            "rlnAmplitudeContrast": 0.1,
            "rlnTomoTiltSeriesPixelSize": 2.0,
            "rlnCtfDataAreCtfPremultiplied": 1,
            "rlnImageDimensionality": dimensionality,
            "rlnTomoSubtomogramBinning": 2.0,
            "rlnImagePixelSize": PIXEL,
            "rlnImageSize": BOX,
        }
    )


def _particle_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "rlnTomoName": NAMES,
            "rlnTomoParticleName": ["01/1", "01/2", "TS_2/1"],
            "rlnCenteredCoordinateXAngst": [100.0, -50.0, 20.0],
            "rlnCenteredCoordinateYAngst": [10.0, 60.0, -70.0],
            "rlnCenteredCoordinateZAngst": [30.0, -20.0, 15.0],
            "rlnTomoSubtomogramRot": [0.0, 30.0, -60.0],
            "rlnTomoSubtomogramTilt": [0.0, 90.0, 45.0],
            "rlnTomoSubtomogramPsi": [0.0, 10.0, 120.0],
            "rlnAngleRot": [0.0, 5.0, 10.0],
            "rlnAngleTilt": 90.0,
            "rlnAnglePsi": 0.0,
            "rlnAngleTiltPrior": 90.0,
            "rlnAnglePsiPrior": 0.0,
            "rlnOriginXAngst": [0.0, 1.0, -4.0],
            "rlnOriginYAngst": [0.0, 2.0, 3.0],
            "rlnOriginZAngst": [0.0, 3.0, 5.0],
            "rlnOpticsGroup": [1, 1, 2],
            "rlnUnknownColumn": [7, 8, 9],
        }
    )
