"""The files of a simulated data set: MRC in half precision, STAR tables as RELION 5 writes them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import mrcfile
import numpy as np
import pandas as pd
from mrcfile.dtypes import HEADER_DTYPE

from vdamkit.io.star_tables import replacing, write_star
from vdamkit.sampling.euler import matrix_to_euler
from vdamkit.simulate.scene import ANGLES, COORDINATES, ORIGINS, SUBTOMOGRAM_ANGLES, Scene
from vdamkit.simulate.settings import SimulationSettings


def write_map(path: Path, array: np.ndarray, pixel_size: float, *, stack: bool = False, half: bool = False) -> None:
    """An MRC file without a date in its header, so that the same data give the same bytes.

    Parameters
    ----------
    array: `(nz, ny, nx)`. pixel_size: Å. stack: images rather than a volume.
    half: float16 (MRC mode 12) instead of float32.
    """
    values = np.ascontiguousarray(array, "<f2" if half else "<f4")
    header = np.frombuffer(_header(values.shape, half, float(pixel_size), stack), HEADER_DTYPE.newbyteorder("<")).copy()
    if values.size:
        header["dmin"], header["dmax"] = values.min(), values.max()
        header["dmean"], header["rms"] = values.mean(dtype=np.float32), values.std(dtype=np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(values.data)


@lru_cache(maxsize=256)
def _header(shape: tuple[int, ...], half: bool, pixel_size: float, stack: bool) -> bytes:
    """What mrcfile puts before such data, with our label.

    Thousands of particles share a few shapes; to have mrcfile make each one's header takes longer than all else that is done
    with a particle, and keeps other threads from working.
    """
    with TemporaryDirectory() as folder, mrcfile.new(Path(folder) / "header.mrc") as mrc:
        mrc.set_data(np.zeros(shape, np.float16 if half else np.float32))
        if stack:
            mrc.set_image_stack()
        elif len(shape) == 3:
            mrc.set_volume()
        mrc.voxel_size = pixel_size
        mrc.header.label[0] = "vdamkit simulate"
        return mrc.header.astype(HEADER_DTYPE.newbyteorder("<")).tobytes()


def write_tilt_series(folder: Path, scenes: list[Scene]) -> Path:
    """`tomograms.star` and `tilt_series/NAME.star`; returns the path of the former."""
    (folder / "tilt_series").mkdir(parents=True, exist_ok=True)
    rows = []
    for scene in scenes:
        series = scene.series
        write_star(folder / "tilt_series" / f"{series.name}.star", {series.name: series.table})
        rows.append(
            {
                "rlnTomoName": series.name,
                "rlnVoltage": series.voltage_kv,
                "rlnSphericalAberration": series.cs_mm,
                "rlnAmplitudeContrast": series.amplitude_contrast,
                "rlnMicrographOriginalPixelSize": series.pixel_size,
                "rlnTomoHand": series.hand,
                "rlnOpticsGroupName": f"optics{series.optics_group}",
                "rlnTomoTiltSeriesPixelSize": series.pixel_size,
                "rlnTomoTiltSeriesStarFile": f"tilt_series/{series.name}.star",
                **dict(zip(("rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ"), series.size, strict=True)),
            }
        )
    write_star(folder / "tomograms.star", {"global": pd.DataFrame(rows)})
    return folder / "tomograms.star"


def optics_table(scenes: list[Scene], settings: SimulationSettings, dimensions: int) -> pd.DataFrame:
    """`data_optics`: one group per tomogram. Source: RELION subtomo.cpp:writeParticleSet."""
    return pd.DataFrame(
        {
            "rlnVoltage": scene.series.voltage_kv,
            "rlnSphericalAberration": scene.series.cs_mm,
            "rlnAmplitudeContrast": scene.series.amplitude_contrast,
            "rlnTomoTiltSeriesPixelSize": scene.series.pixel_size,
            "rlnOpticsGroup": scene.series.optics_group,
            "rlnOpticsGroupName": f"optics{scene.series.optics_group}",
            "rlnCtfDataAreCtfPremultiplied": 1,
            "rlnImageDimensionality": dimensions,
            "rlnTomoSubtomogramBinning": 1.0,
            "rlnImagePixelSize": scene.series.pixel_size,
            "rlnImageSize": settings.box,
        }
        for scene in scenes
    )


def _table(scene: Scene, angles: np.ndarray, origins: np.ndarray) -> pd.DataFrame:
    """The columns that picked and true particles share."""
    columns = {"rlnTomoName": scene.series.name}
    columns |= dict(zip(COORDINATES, scene.coordinates.T, strict=True))
    columns |= dict(zip(SUBTOMOGRAM_ANGLES, matrix_to_euler(scene.frames).T, strict=True))
    columns |= dict(zip(ANGLES, angles.T, strict=True))
    if scene.priors:
        columns |= {"rlnAngleTiltPrior": 90.0, "rlnAnglePsiPrior": 0.0}
    return pd.DataFrame(columns | dict(zip(ORIGINS, origins.T, strict=True)))


def true_table(scene: Scene, fold: int) -> pd.DataFrame:
    """Rows of `particles_true_poses.star`: picked coordinates with true angles and offsets."""
    table = _table(scene, *scene.true_poses(fold))
    return table if scene.sites.kinds is None else table.assign(rlnClassNumber=scene.kinds)


def picked_table(scene: Scene, visible: np.ndarray) -> pd.DataFrame:
    """Rows of `data_particles` as the picker and the extraction leave them, without image names.

    Parameters
    ----------
    visible: `(n_picked, n_tilts)` bool.
    """
    nothing = np.zeros((len(scene.picked), 3))
    start = np.tile([0.0, 90.0, 0.0], (len(nothing), 1)) if scene.priors else nothing
    table = _table(scene, start, nothing)
    table["rlnOpticsGroup"] = scene.series.optics_group
    table["rlnTomoParticleName"] = [f"{scene.series.name}/{i + 1}" for i in range(len(table))]
    table["rlnTomoVisibleFrames"] = ["[" + ",".join(map(str, row.astype(int))) + "]" for row in visible]
    return table


def write_particle_set(folder: Path, kind: str, optics: pd.DataFrame, particles: pd.DataFrame) -> Path:
    """`KIND/particles.star` and `KIND/optimisation_set.star`, paths from `folder`; returns the latter."""
    (folder / kind).mkdir(parents=True, exist_ok=True)
    general = {"rlnTomoSubTomosAre2DStacks": int(kind == "stacks2d")}
    write_star(folder / kind / "particles.star", {"general": general, "optics": optics, "particles": particles})
    files = {"rlnTomoParticlesFile": f"{kind}/particles.star", "rlnTomoTomogramsFile": "tomograms.star"}
    write_star(folder / kind / "optimisation_set.star", {"optimisation_set": files})
    return folder / kind / "optimisation_set.star"
