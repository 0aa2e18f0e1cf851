"""A session on disc: RELION's files every few mini-batches, a checkpoint after each."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from vdamkit.errors import InputError, OutputError
from vdamkit.io.checkpoint import load_checkpoint, save_checkpoint
from vdamkit.io.relion_output import write_relion_files
from vdamkit.state import StepReport

CHECKPOINT = "checkpoint.npz"


def prepare_folder(folder: Path) -> None:
    """Make the output folder, or say why it can't be written to, before any heavy work.

    Raises
    ------
    OutputError
        naming the folder and the remedy.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".vdamkit_{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as problem:
        raise OutputError(
            f"cannot write to {folder} ({problem.strerror or problem}); choose another folder (--o) or ask for the permission"
        ) from None


def after_step(session) -> None:
    """Checkpoint after every mini-batch; RELION's files at 0, every `write_every`-th and at the last."""
    folder = session.output
    prepare_folder(folder)
    settings, iteration = session.settings, session.iteration
    checkpoint(session, folder)
    if iteration % settings.write_every == 0 or iteration == settings.mini_batches:
        _write_files(session, folder, final=iteration >= settings.mini_batches)


def save(session, folder: Path, *, final: bool = True) -> list[Path]:
    """RELION's files (with `initial_model.mrc` and `run_optimisation_set.star` if `final`) and the checkpoint."""
    prepare_folder(folder)
    written = _write_files(session, folder, final=final)
    checkpoint(session, folder)
    return [*written, folder / CHECKPOINT]


def _write_files(session, folder: Path, *, final: bool) -> list[Path]:
    from vdamkit.symmetry.of_session import final_state

    model = final_state(session) if final else None
    return write_relion_files(
        folder, session.state, session.settings, session.particles, command=command_line(), final=final, model=model
    )


def checkpoint(session, folder: Path) -> None:
    """Write the array checkpoint: state, settings, log of the current line, inputs."""
    log = session.previous_log + [node.row() for node in session._history.line()]
    paths = session.particles.paths
    inputs = {name: getattr(paths, name) for name in ("optimisation_set", "particles", "tomograms", "trajectories")}
    inputs = {name: None if value is None else str(value) for name, value in inputs.items()}
    inputs["n_particles"] = len(session.particles)
    save_checkpoint(folder / CHECKPOINT, session.state, session.settings, log, inputs)


def command_line() -> str:
    """The command that started this process, for the comment in optimiser.star."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "vdamkit"


def resume(kind: type, folder: Path, options: dict[str, Any]):
    """A session in the state of the checkpoint in `folder`, writing on to the same folder.

    Raises
    ------
    InputError
        where there is no usable checkpoint or the particles are not those of the run.
    """
    path = folder if folder.is_file() else folder / CHECKPOINT
    if not path.exists():
        raise InputError(f"there is no {CHECKPOINT} in {folder}; give the --o folder of a vdamkit run")
    state, settings, log, inputs = load_checkpoint(path)
    given = {name: inputs.get(name) for name in ("particles", "tomograms", "trajectories")}
    if inputs.get("optimisation_set"):
        session = kind(inputs["optimisation_set"], settings)
    else:
        session = kind(None, settings, **given)
    if len(session.particles) != inputs["n_particles"]:
        raise InputError(
            f"{path} is of a run with {inputs['n_particles']} particles but the particle file now has "
            f"{len(session.particles)}; put the old file back or start a new run"
        )
    session._history.append(state, settings, None, note=f"resumed after mini-batch {state.iteration}")
    session.previous_log = log
    session._earlier = [report for report in map(_report, log) if report is not None]
    session.output = path.parent
    if options:
        session.change(**options)
    return session


def _report(row: dict[str, Any]) -> StepReport | None:
    """The report of a line of the log, as far as the log keeps it."""
    names = {field.name for field in fields(StepReport)}
    if not names - {"bad", "timings", "class_populations", "notes"} <= set(row):
        return None
    kept = {name: row[name] for name in names & set(row)}
    return StepReport(**(kept | {"bad": (), "timings": {}, "class_populations": (1.0,), "notes": ()}))
