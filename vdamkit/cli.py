"""The command line: ``vdamkit run``, ``resume``, ``check``, ``align-symmetry``, ``symmetry-scores``, ``simulate``,
``demo``, ``tutorial``.

Only the list of commands lives here; a command's own module is loaded when it is asked for, so that
``vdamkit --help`` answers at once. Every mistake of the user ends in one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from vdamkit.errors import VdamkitError

BAD_INPUT, INTERRUPTED = 2, 130

COMMANDS = {
    "run": ("vdamkit.cli_jobs", "Make an initial model from an optimisation set or a particle file."),
    "resume": ("vdamkit.cli_jobs", "Go on with a run that was stopped or killed."),
    "check": ("vdamkit.cli_jobs", "Read headers only: what was found, memory, time, every problem at once."),
    "align-symmetry": ("vdamkit.cli_symmetry", "Find the axes of a point group in a map made in C1, and turn it onto them."),
    "symmetry-scores": ("vdamkit.cli_symmetry", "Which point groups a map made in C1 supports."),
    "simulate": ("vdamkit.cli_data", "Make virtual tilt series with known poses and extract the particles."),
    "demo": ("vdamkit.cli_data", "The whole job on the data that comes with vdamkit, with a picture at the end."),
    "tutorial": ("vdamkit.cli_data", "Copy the tutorial notebooks to a folder and open JupyterLab on the first."),
}
"""Module and one-line help of each command, in the order of ``--help``."""


class Interrupted(VdamkitError):
    """The user pressed Ctrl-C; the text says what is kept and how to go on."""


class Commands(click.Group):
    """A group whose commands are loaded at first use and whose errors are sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(COMMANDS[cmd_name][0]), cmd_name.replace("-", "_"))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run a command and leave with its exit code: 0, 2 for bad input, 130 for Ctrl-C."""
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
        except Interrupted as stop:
            code = _say(str(stop), INTERRUPTED)
        except click.exceptions.Abort:
            code = _say("Interrupted; nothing was changed.", INTERRUPTED)
        except getattr(click.exceptions, "NoArgsIsHelpError", ()) as asked:  # no arguments at all
            click.echo(asked.format_message(), err=True)
            code = BAD_INPUT
        except click.UsageError as mistake:
            where = mistake.ctx.command_path if mistake.ctx else "vdamkit"
            code = _say(f"{mistake.format_message().rstrip('.')} ('{where} --help' lists what there is).", BAD_INPUT)
        except click.ClickException as mistake:
            code = _say(mistake.format_message(), BAD_INPUT)
        except VdamkitError as mistake:
            code = _say(str(mistake), BAD_INPUT)
        except MemoryError:
            code = _say(
                "Out of memory; a smaller --pool, --memory-budget, box or --K needs less ('vdamkit check' estimates it).",
                BAD_INPUT,
            )
        sys.exit(code if isinstance(code, int) else 0)


def _say(sentence: str, code: int) -> int:
    click.echo(f"vdamkit: {' '.join(sentence.split())}", err=True)
    return code


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),  # RELION's own spelling works too
        "max_content_width": 110,
    },
)
@click.version_option(package_name="vdamkit", message="vdamkit %(version)s")
def cli() -> None:
    """De novo 3D initial models for subtomogram averaging, one VDAM mini-batch at a time.

    'vdamkit demo' shows the whole job in a minute. Options have the names of RELION's 'relion_refine', with dashes or
    underscores.
    """


def main() -> NoReturn:
    """The console script."""
    cli.main(prog_name="vdamkit")
