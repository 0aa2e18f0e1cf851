"""A session on disc: RELION's files every few mini-batches, a checkpoint after each."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from vdamkit.errors import InputError, OutputError
from vdamkit.history import Node
from vdamkit.io.checkpoint import load_checkpoint, mark_of, save_checkpoint
from vdamkit.io.optimisation_set import COLUMNS
from vdamkit.io.particles import ParticleSet, open_particles
from vdamkit.io.relion_output import write_relion_files
from vdamkit.io.star_tables import as_list, read_star, working_folder
from vdamkit.settings import COMPUTING, Settings
from vdamkit.state import State, StepReport

CHECKPOINT = "checkpoint.npz"
RUN_FILES = re.compile(
    rf"{re.escape(CHECKPOINT)}|run_it\d{{3,}}_((data|model|sampling|optimiser|optimisation_set)\.star|(class|[12]moment)\d{{3,}}\.mrc)"
    r"|initial_model(\.mrc|_data\.star)|run_optimisation_set\.star"
)
"""Names of all files that a run writes; RELION's jobs have most of them too."""


def folder_of(name: str | Path) -> Path:
    """An output folder by its name. Raises OutputError where it is empty, which would be the current folder by mistake."""
    if not str(name).strip():
        raise OutputError("the output folder (--o) has no name; give one, such as InitialModel/job010")
    return Path(name)


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
            f"cannot write to {folder} ({problem.strerror or problem}); choose another output folder or ask for the permission"
        ) from None


def other_run(folder: Path) -> str:
    """What a folder holds of a run, in words for an error such as "already holds a run (mini-batch 4)"; empty if nothing."""
    found = _run_files(folder)
    if not found:
        return ""
    if folder / CHECKPOINT not in found:
        return f"already holds files of another job, such as {found[0].name}"
    iteration = saved_iteration(folder)
    return "already holds a run" + ("" if iteration is None else f" (mini-batch {iteration})")


def saved_iteration(folder: Path) -> int | None:
    """Mini-batch of the checkpoint in a folder; None where there is none that can be read."""
    try:
        return load_checkpoint(folder / CHECKPOINT)[0].iteration
    except InputError:
        return None


def owns(session, folder: Path) -> bool:
    """Whether what a folder holds of a run was written by the session, or the session was resumed from it."""
    return folder.resolve() in session._folders


def refuse_other_run(session, folder: Path) -> None:
    """Raises OutputError where a folder holds a run that is not the session's own."""
    found = "" if owns(session, folder) else other_run(folder)
    if found:
        resume = f"go on with it by Session.resume({str(folder)!r}), " if (folder / CHECKPOINT).exists() else ""
        raise OutputError(f"{folder} {found}; {resume}choose another folder, or give overwrite=True to replace what is there")


def free_folder(session, name: str) -> str:
    """`name`, or with a number behind it where a folder of that name holds another run."""
    for candidate in (name, *(f"{name}_{number}" for number in range(2, 100))):
        with suppress(OutputError):  # somebody else's folder, which cannot be read
            if owns(session, Path(candidate)) or not _run_files(Path(candidate)):
                return candidate
    return name


def _claim(session, folder: Path, *, overwrite: bool = False) -> None:
    """Before the first write of a session to a folder: another run is refused or makes room, so that the two never mix."""
    prepare_folder(folder)
    overwrite = overwrite or folder == session._replaces
    if owns(session, folder):
        if not overwrite:
            _refuse_second_writer(session, folder)
        return
    if not overwrite:
        refuse_other_run(session, folder)
    old, paths = _run_files(folder), session.particles.paths
    read = {Path(name).resolve() for name in (paths.particles_file, paths.optimisation_set) if name}
    if used := [path for path in old if path.resolve() in read]:
        raise OutputError(f"{used[0]} is an input of this run and would be removed; choose another folder")
    for path in old:
        try:
            path.unlink()
        except OSError as problem:
            raise OutputError(f"cannot remove {path} ({problem.strerror or problem}); choose another folder") from None
    session._folders[folder.resolve()] = ""
    if folder == session._replaces:
        session._replaces = None  # once, not whatever another session writes there later


def _refuse_second_writer(session, folder: Path) -> None:
    """Raises OutputError where another session, such as one resumed meanwhile, wrote to the session's own folder after it."""
    found = mark_of(folder / CHECKPOINT)
    if found and found != session._folders[folder.resolve()]:
        raise OutputError(
            f"another session has written to {folder} meanwhile (mini-batch {saved_iteration(folder)}); save this one to "
            "another folder, or with overwrite=True to replace what is there"
        )


def _run_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if RUN_FILES.fullmatch(path.name)) if folder.is_dir() else []
    except OSError as problem:
        raise OutputError(f"cannot look into {folder} ({problem.strerror or problem}); choose another output folder") from None


def output_of(session) -> Path | None:
    """The session's output folder; one of a relative name lies where the session was made, wherever the process is by now."""
    folder, began = session.output, session._started_in
    return folder if folder is None or folder.is_absolute() or Path(working_folder()) == began else began / folder


def after_step(session) -> None:
    """Checkpoint after every mini-batch; RELION's files at 0, every `write_every`-th and at the last."""
    folder, node = output_of(session), session._history.node
    try:
        with session._writing:
            _claim(session, folder)
            settings = session.settings
            checkpoint(session, node, folder)
            if node.iteration % settings.write_every == 0 or node.iteration == settings.mini_batches:
                _write_files(session, node, folder, final=node.iteration >= settings.mini_batches)
    except OutputError as problem:
        problem.add_note(f"Mini-batch {node.iteration} itself is done and in memory; save() writes it.")
        raise


def finish(session) -> None:
    """At the end of the schedule: the final model, where it is not there yet, as after an interruption between mini-batches."""
    folder, node = output_of(session), session._history.node
    if node.iteration < session.settings.mini_batches or not owns(session, folder):
        return
    last, final = folder / f"run_it{node.iteration:03d}_optimisation_set.star", folder / "run_optimisation_set.star"
    if not (last.exists() and final.exists()) or final.stat().st_mtime_ns < last.stat().st_mtime_ns:
        save(session, folder)


def save(session, folder: Path, *, final: bool = True, overwrite: bool = False) -> list[Path]:
    """RELION's files (with `initial_model.mrc` and `run_optimisation_set.star` if `final`) and the checkpoint."""
    with session._writing:  # by turns with a mini-batch that writes meanwhile
        _claim(session, folder, overwrite=overwrite)
        node = session._history.node  # one node throughout: a mini-batch may land meanwhile
        written = _write_files(session, node, folder, final=final)
        checkpoint(session, node, folder)
    return [*written, folder / CHECKPOINT]


def _write_files(session, node: Node, folder: Path, *, final: bool) -> list[Path]:
    """RELION's files of a node, which name the settings that its state was made with."""
    from vdamkit.symmetry.apply import moved_state
    from vdamkit.symmetry.of_session import final_matches

    state = node.state
    matches = final_matches(session, state) if final else []
    model = moved_state(state, matches, session.pixel_size) if matches else None
    written = write_relion_files(
        folder, state, node.in_force, session.particles, command=command_line(), final=final, model=model
    )  # fmt: skip
    session._final_matches = (node.number, matches)
    return written


def checkpoint(session, node: Node, folder: Path) -> None:
    """Write the array checkpoint: a node's state, settings to come and in force, log of its line, inputs."""
    log = session.previous_log + [_log_row(each) for each in session._history.line(node.number)]
    paths = session.particles.paths
    inputs = {name: getattr(paths, name) for name in ("optimisation_set", "particles", "tomograms", "trajectories")}
    inputs = {name: None if value is None else str(value) for name, value in inputs.items()}
    session._digest = session._digest or _digest(session.particles)  # takes a moment where there are many
    inputs |= {"n_particles": len(session.particles), "digest": session._digest, "in_force": node.in_force.as_dict()}
    mark = os.urandom(16).hex()  # says who wrote last; no part of the computation
    save_checkpoint(folder / CHECKPOINT, node.state, session.settings, log, inputs | {"mark": mark})
    session._folders[folder.resolve()] = mark


def _log_row(node: Node) -> dict[str, Any]:
    """A node as a line of the log: what the history shows of it, and the populations of its classes."""
    return node.row() | ({} if node.report is None else {"class_populations": list(node.report.class_populations)})


def _digest(particles: ParticleSet) -> str:
    """Tells sets of particles apart by what a state's poses and spectra refer to, in the order of the file."""
    name = next(column for column in ("rlnTomoParticleName", "rlnImageName") if column in particles.table)
    digest = hashlib.sha256("\n".join(map(str, particles.table[name].to_numpy(object))).encode())
    digest.update((particles.coordinates.round(1) + 0.0).tobytes())  # 0.0 makes one of the two zeros
    digest.update(particles.optics_index.tobytes())
    digest.update(f"{particles.box} {particles.pixel_size:.4f}".encode())
    return digest.hexdigest()


def command_line() -> str:
    """The command that started this process, for the comment in optimiser.star."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "vdamkit"


def resume(kind: type, folder: Path, options: dict[str, Any], files: dict[str, Any]):
    """A session in the state of the checkpoint in `folder`, writing on to the same folder.

    files: arguments of `open_particles`, None where nothing was given; if any was, in place of what the checkpoint names.

    Raises
    ------
    InputError
        where there is no usable checkpoint or the particles are not those of the run.
    """
    path = folder if folder.is_file() else folder / CHECKPOINT
    if not path.exists():
        raise InputError(f"there is no {CHECKPOINT} in {folder}; give the --o folder of a vdamkit run")
    state, settings, log, inputs = load_checkpoint(path)
    particles = open_particles(**files) if any(files.values()) else _particles(path, inputs)
    _refuse_other_particles(path, particles, state, inputs)
    computing = {name: options[name] for name in COMPUTING if name in options}  # the run's own device may be gone
    session = kind(settings=settings.replace(**computing), particle_set=particles)
    in_force = Settings(**inputs["in_force"]) if "in_force" in inputs else settings
    session._history.append(state, in_force, None, note=f"resumed after mini-batch {state.iteration}")
    session.previous_log = log
    # a line without a mini-batch of its own, such as symmetry applied, bears the report before it
    session._earlier = list({report.iteration: report for report in map(_report, log) if report is not None}.values())
    session.output = path.parent
    if path.name == CHECKPOINT:  # a copy under another name may lie beside a run that went further
        session._folders[path.parent.resolve()] = inputs.get("mark", "")
    session._pending = settings  # so that what changes is recorded
    session.change(**options)
    return session


def _particles(path: Path, inputs: dict[str, Any]) -> ParticleSet:
    """The particles of a run: a file that was given beside the optimisation set wins over the one named there again."""
    job = inputs.get("optimisation_set")
    try:
        entries = as_list(next(iter(read_star(job).values()))) if job else {}
        named = {name: str(entries.get(column, "")).strip() for name, column in COLUMNS.items()}
        return open_particles(
            job, **{name: inputs[name] for name in COLUMNS if inputs.get(name) and inputs[name] != named[name]}
        )
    except InputError as problem:
        raise InputError(
            f"the input that {path} names cannot be used: {str(problem).rstrip('.')}. If it lies elsewhere now, give "
            "optimisation_set=..., or particles=... with tomograms=..."
        ) from None


def _refuse_other_particles(path: Path, particles: ParticleSet, state: State, inputs: dict[str, Any]) -> None:
    """Poses must not come to lie on other particles."""
    n, box, file = inputs["n_particles"], state.maps.shape[-1], particles.paths.particles_file
    if len(particles) != n:
        found = f"of a run with {n} particles but {file} now has {len(particles)}"
    elif particles.box != box:
        found = f"of a run in a box of {box} px but the particles of {file} now have {particles.box} px"
    elif inputs.get("digest", "") not in ("", _digest(particles)):
        found = f"of a run on other particles than {file} now lists: names, coordinates, optics groups or pixel size differ"
    else:
        return
    raise InputError(f"{path} is {found}; put the old files back or start a new run")


def _report(row: dict[str, Any]) -> StepReport | None:
    """The report of a line of the log, as far as the log keeps it."""
    names = {field.name for field in fields(StepReport)}
    if not names - {"bad", "timings", "class_populations", "notes"} <= set(row):
        return None
    kept = {name: row[name] for name in names & set(row)}
    populations = tuple(row.get("class_populations", (1.0,)))
    return StepReport(**(kept | {"bad": (), "timings": {}, "class_populations": populations, "notes": ()}))
