"""``vdamkit run``, ``resume`` and ``check``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from vdamkit.cli import Interrupted
from vdamkit.cli_options import (
    JobCommand,
    SectionOption,
    given_options,
    make_settings,
    settings_options,
    with_flags,
)
from vdamkit.errors import InputError, OutputError, VdamkitError

score_option = click.option(
    "--score-all", cls=SectionOption, is_flag=True, help="At the end give every particle a pose, also those never drawn."
)


def input_flags(command):
    """Decorator: the particles' files, each by its flag."""
    for flag, name, text in (
        ("--trajectories", "trajectories", "Motion of the particles (motion.star)."),
        ("--tomograms", "tomograms", "tomograms.star; needed for 2D stacks without an optimisation set."),
        ("--i", "particles", "particles.star, in place of the optimisation set or of the one it names."),
        ("--ios", "ios", "The optimisation set, as RELION's command line gives it."),
    ):
        command = click.option(flag, name, cls=SectionOption, metavar="FILE", default=None, help=text)(command)
    return command


def input_options(command):
    """Decorator: the same, or the optimisation set as an argument."""
    return click.argument("optimisation_set", required=False, metavar="[OPTIMISATION_SET]")(input_flags(command))


def input_files(values: dict[str, Any]) -> dict[str, Any]:
    """The files of the command line, by the arguments of `open_particles`; taken out of its values."""
    files = {name: values.pop(name, None) for name in ("optimisation_set", "particles", "tomograms", "trajectories")}
    ios = values.pop("ios")
    if ios is not None and files["optimisation_set"] is not None:
        raise InputError(
            f"two optimisation sets were given, {files['optimisation_set']} and --ios {ios}; leave one of them out"
        )
    return files | {"optimisation_set": files["optimisation_set"] or ios}


def open_input(values: dict[str, Any]):
    """The particle set of the command line."""
    from vdamkit.io.particles import open_particles

    files = input_files(values)
    if files["optimisation_set"] is None and files["particles"] is None:
        raise InputError("no input; give an optimisation_set.star, or --i particles.star with --tomograms tomograms.star")
    return open_particles(**files)


# run ----------------------------------------------------------------------------------------------------------------


@click.command(cls=JobCommand, short_help="Make an initial model.")
@input_options
@click.option("--o", "output", cls=SectionOption, required=True, metavar="FOLDER", help="Folder for the results.")
@click.option("--overwrite", cls=SectionOption, is_flag=True, help="Replace the run that is already in that folder.")
@score_option
@settings_options
def run(output: str, overwrite: bool, score_all: bool, **values: Any) -> None:
    """Make an initial model from OPTIMISATION_SET (or --i and --tomograms).

    A checkpoint is written after every mini-batch; 'vdamkit resume FOLDER' goes on from it.
    """
    from vdamkit.checks import setting_warnings
    from vdamkit.session import Session
    from vdamkit.storage import folder_of, prepare_folder

    settings = make_settings(values)
    particles = open_input(values)
    folder = folder_of(output)
    _refuse_folder(folder, overwrite)
    session = Session(settings=settings, particle_set=particles, output=folder, overwrite=overwrite)
    _refuse_bad_files(particles)
    prepare_folder(folder)
    for text in setting_warnings(particles, settings):
        click.echo(f"note: {with_flags(text)}", err=True)
    finish(session, score_all)


def _refuse_folder(folder: Path, overwrite: bool) -> None:
    from vdamkit.storage import CHECKPOINT, other_run

    found = "" if overwrite else other_run(folder)
    if found:
        resume = f"go on with 'vdamkit resume {folder}', " if (folder / CHECKPOINT).exists() else ""
        raise OutputError(f"{folder} {found}; {resume}choose another --o, or give --overwrite, which removes those files")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; choose a folder with --o")


def _refuse_bad_files(particles) -> None:
    """A few unusable particle files are left out by the run, with a note; many stop it before it begins."""
    from vdamkit.io.particles import problems
    from vdamkit.vdam.visit import MAX_BAD

    every = problems(particles, limit=len(particles) * 3)
    found = [text for text in every if not text.startswith("warning:")]
    if len(found) > MAX_BAD * len(particles):
        more = f" (and {len(found) - 1} more problems; 'vdamkit check' lists them)" if len(found) > 1 else ""
        raise InputError(f"{found[0]}{more}")
    for text in every:
        left_out = "" if text.startswith("warning:") else "left out: "
        click.echo(f"note: {left_out}{text.removeprefix('warning:').strip()}", err=True)


def finish(session, score_all: bool = False) -> None:
    """Run what is left of the schedule; then the verdict and the paths."""
    advance(session)
    if score_all:
        click.echo("Giving every particle a pose …", err=True)
        session.score_all()
        session.save()
    click.echo(str(session.report) if session.report is not None else f"mini-batch {session.iteration}")
    click.echo(str(session.verdict()))
    for name, text in (("initial_model.mrc", "map"), ("run_optimisation_set.star", "particles")):
        if (session.output / name).exists():
            click.echo(f"{text}: {session.output / name}")


def advance(session) -> None:
    """Run what is left, saying on Ctrl-C and on errors what is kept and how to go on."""
    session._history.forget_old_states()
    try:
        session.run(progress=True)
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {_kept(session)}") from None
    except VdamkitError as problem:
        raise type(problem)(f"{str(problem).rstrip('.')}. {_kept(session)}") from None


def _kept(session) -> str:
    """What is on disc, which a full one may have kept from being the last mini-batch."""
    from vdamkit.storage import owns, saved_iteration

    folder = session.output
    kept = saved_iteration(folder) if owns(session, folder) else None
    if kept is None:
        return "Nothing had been computed yet."
    return f"Mini-batches up to {kept} are kept in {folder}; go on with: vdamkit resume {folder}"


# resume -------------------------------------------------------------------------------------------------------------


@click.command(cls=JobCommand, short_help="Go on with a run.")
@click.argument("folder", metavar="FOLDER")
@input_flags
@score_option
@partial(settings_options, defaults=False)
def resume(folder: str, score_all: bool, **values: Any) -> None:
    """Go on with the run in FOLDER to its end, bit for bit as if it had never stopped.

    Options that are given replace those of the run from the next mini-batch on. Files need only be given if they were moved.
    """
    from vdamkit.session import Session

    files = input_files(values)
    session = Session.resume(folder, **files, **given_options(values))
    before, now = session._history.node.settings.as_dict(), session.settings.as_dict()
    for name in (name for name in now if now[name] != before[name]):
        click.echo(f"{name}: {before[name]} → {now[name]}")
    total = session.settings.mini_batches
    if session.iteration >= total:
        click.echo(f"All {total} mini-batches are done; --iter with a larger number goes on.")
    else:
        click.echo(f"Going on after mini-batch {session.iteration} of {total}.")
    finish(session, score_all)


# check --------------------------------------------------------------------------------------------------------------


@click.command(cls=JobCommand, short_help="What a run would do.")
@input_options
@settings_options
def check(**values: Any) -> int:
    """Say what 'vdamkit run' with the same options would do, from headers alone; exit code 2 if it cannot run."""
    from vdamkit.checks import check_job

    settings = make_settings(values)
    found = check_job(open_input(values), settings)
    found = replace(found, problems=tuple(with_flags(text) for text in found.problems))
    click.echo(with_flags(str(found)))
    return 0 if found.good else 2
