"""The whole job in a minute: an initial model of the tutorial's data, compared with the truth, in one picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vdamkit.compare import Match, PoseErrors, align, pose_errors
from vdamkit.errors import InputError, OutputError
from vdamkit.io.checkpoint import load_checkpoint
from vdamkit.io.mrc import read_map, write_mrc
from vdamkit.io.star_tables import as_table, find_block, numeric_column, read_star
from vdamkit.picture import contact_sheet
from vdamkit.session import Session
from vdamkit.settings import Settings
from vdamkit.storage import CHECKPOINT, other_run
from vdamkit.verdict import Verdict

MINI_BATCHES = 24
RADIUS = 100.0  # Å, of the sphere in which the map is compared with the truth
TUTORIAL = {"T": 4.0, "symmetry": "C6", "tilt_prior_width": 10.0, "mask_diameter": 230.0}
"""Settings of RELION's subtomogram tutorial for this kind of particle."""

CHECKOUT_DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    map: Path  # the initial model, as RELION names it
    aligned_map: Path  # the same, laid onto the truth
    picture: Path
    match: Match
    errors: PoseErrors
    verdict: Verdict
    session: Session


def tutorial_data(folder: str | Path = "vdamkit_data", *, say: Callable[[str], None] = print) -> Path:
    """The folder with the tutorial's data: that of the checkout, or `folder`, where it is simulated if it is not there."""
    if (CHECKOUT_DATA / "stacks2d" / "optimisation_set.star").exists():
        return CHECKOUT_DATA
    folder = Path(folder)
    if not (folder / "true_map.mrc").exists():
        from vdamkit.simulate import simulate

        say(f"Simulating the tutorial's data in {folder} (ten seconds) …")
        simulate(folder, lattice_spacing=180.0, variance_ratio=0.2)
    return folder


def run_demo(
    output: str | Path = "vdamkit_demo",
    *,
    mini_batches: int = MINI_BATCHES,
    data: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Make an initial model of the tutorial's data and compare it with the truth.

    Parameters
    ----------
    output: folder for RELION's files, the map laid onto the truth, and `contact_sheet.png`.
    mini_batches, seed, device, threads: as in :class:`vdamkit.Settings`; the rest is the tutorial's (`TUTORIAL`).
    data: folder made by ``vdamkit simulate``; default that of the checkout, or one simulated for the purpose.
    progress: show a progress bar on stderr. say: where to print.

    Raises
    ------
    InputError, OutputError, SettingsError: one sentence each.
    """
    output = Path(output)
    folder = Path(data) if data is not None else tutorial_data(output / "data", say=say)
    settings = Settings(**TUTORIAL, mini_batches=mini_batches, seed=seed, device=device, threads=threads)
    star = folder / "stacks2d" / "optimisation_set.star"
    found = other_run(output)
    if found and not is_demo(output, star):
        raise OutputError(f"{output} {found}, which is no demo; choose another folder")
    session = Session(star, settings, output=output, overwrite=bool(found))
    say(
        f"{len(session.particles)} simulated particles of a C6 hexamer ({session.particles.box} px of "
        f"{session.pixel_size:g} Å), {mini_batches} mini-batches"
    )
    session.run(progress=progress)
    verdict = session.verdict()
    session.score_all()  # against the final map, on the finest grid
    session.save()
    truth, _ = read_map(folder / "true_map.mrc")
    match = align(session.map, truth, session.pixel_size, radius=RADIUS, threads=session.settings.threads)
    errors = _errors(session, folder / "particles_true_poses.star")
    aligned = output / "initial_model_on_truth.mrc"
    write_mrc(aligned, match.map, session.pixel_size)
    picture = contact_sheet(
        output / "contact_sheet.png", [match.map, truth], session.pixel_size,
        titles=[f"Initial model after {session.iteration} mini-batches, laid onto the truth", "True map"],
        fsc_curves={"map and truth": match.fsc}, reports=session.reports(), radius=RADIUS,
        heading=f"Initial model from {len(session.particles)} simulated particles (C6, T 4, tilt prior 10°)",
    )  # fmt: skip
    result = DemoResult(output / "initial_model.mrc", aligned, picture, match, errors, verdict, session)
    _tell(result, say)
    return result


def is_demo(output: Path, star: Path) -> bool:
    """Whether the run in `output` is an earlier demo, which may be replaced: one of the same optimisation set."""
    try:
        return load_checkpoint(output / CHECKPOINT)[3].get("optimisation_set") == str(star)
    except InputError:
        return False


def _errors(session: Session, path: Path) -> PoseErrors:
    """Errors of the poses that were found, against the file of true ones."""
    table = as_table(find_block(read_star(path), "particles", path))

    def columns(names: list[str]) -> np.ndarray:
        return np.stack([numeric_column(table, name, path, "particles") for name in names], -1)

    angles = columns([f"rlnAngle{a}" for a in ("Rot", "Tilt", "Psi")])
    offsets = columns([f"rlnOrigin{a}Angst" for a in "XYZ"])
    poses = session.state.poses
    seen = poses.class_number > 0
    return pose_errors(
        poses.angles[seen], poses.offsets[seen], angles[seen], offsets[seen],
        session.particles.subtomogram_rotations[seen], session.settings.symmetry,
    )  # fmt: skip


def _tell(result: DemoResult, say: Callable[[str], None]) -> None:
    report = result.session.report
    if report is not None:
        say(str(report))
    say(f"Against the truth, in a sphere of {RADIUS:g} Å: {result.match}")
    say(f"Against the true poses: {result.errors}")
    say(str(result.verdict))
    say(f"map:     {result.map}")
    say(f"aligned: {result.aligned_map}")
    say(f"picture: {result.picture}")
