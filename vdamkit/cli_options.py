"""Command-line options made from the fields of the settings, under RELION's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Any

import click

from vdamkit.errors import SettingsError, VdamkitError
from vdamkit.settings import Settings

FLAGS: dict[str, tuple[str, ...]] = {
    "mini_batches": ("--iter",),
    "T": ("--tau2-fudge",),
    "classes": ("--K",),
    "mask_diameter": ("--particle-diameter",),
    "solvent": ("--flatten-solvent",),
    "symmetry": ("--sym",),
    "run_in_c1": ("--run-in-c1/--no-run-in-c1",),
    "tilt_prior_width": ("--sigma-tilt",),
    "psi_prior_width": ("--sigma-psi",),
    "rot_prior_width": ("--sigma-rot",),
    "correct_ctf": ("--ctf/--no-ctf",),
    "ctf_intact_first_peak": ("--ctf-intact-first-peak/--no-ctf-intact-first-peak",),
    "device": ("--device",),
    "device_memory": ("--device-memory",),
    "tf32": ("--tf32/--no-tf32",),
    "threads": ("--j",),
    "memory_budget": ("--memory-budget",),
    "chunk_particles": ("--pool",),
    "scratch_dir": ("--scratch-dir",),
    "precision": ("--precision",),
    "write_every": ("--grad-write-iter",),
    "seed": ("--random-seed", "--seed"),
    "healpix_order": ("--healpix-order",),
    "max_healpix_order": ("--max-healpix-order",),
    "auto_sampling": ("--auto-sampling/--no-auto-sampling",),
    "offset_range": ("--offset-range",),
    "offset_step": ("--offset-step",),
    "perturbation": ("--perturb",),
    "adaptive": ("--adaptive/--no-adaptive",),
    "adaptive_fraction": ("--adaptive-fraction",),
    "max_significant": ("--maxsig",),
    "global_search_every": ("--global-search-every",),
    "local_range": ("--local-range",),
    "ini_fraction": ("--grad-ini-frac",),
    "fin_fraction": ("--grad-fin-frac",),
    "batch_initial": ("--grad-ini-subset",),
    "batch_final": ("--grad-fin-subset",),
    "step_initial": ("--grad-stepsize-initial",),
    "step_final": ("--grad-stepsize",),
    "step_scheme": ("--grad-stepsize-scheme",),
    "T_scheme": ("--tau2-fudge-scheme",),
    "momentum": ("--momentum",),
    "second_momentum": ("--second-momentum",),
    "mu": ("--mu",),
    "sigma_offset": ("--offset",),
    "min_sigma_offset": ("--min-sigma-offset",),
    "min_resolution_shell": ("--min-resolution-shell",),
    "shell_increment": ("--incr-size",),
    "start_fraction": ("--start-fraction",),
    "noise_particles": ("--nr-parts-sigma2noise",),
    "start_particles": ("--start-particles",),
}
"""Flags of each field of :class:`vdamkit.settings.Settings`; where RELION has the option, RELION's name with dashes."""

MEANINGLESS = {
    "--grad": 0, "--denovo-3dref": 0, "--zero-mask": 0, "--skip-gridding": 0, "--dont-combine-weights-via-disc": 0,
    "--no-parallel-disc-io": 0, "--pad": 1, "--oversampling": 1, "--pipeline-control": 1,
}  # fmt: skip
"""What else the command line of RELION's job has, with the number of values: it changes nothing here."""

OTHERWISE = {
    "--ini-high": "--start-fraction", "--free-gpu-memory": "--device-memory", "--min-sigma2-offset": "--min-sigma-offset",
}  # fmt: skip
"""Options of RELION whose counterpart takes another quantity."""

FEW = 20  # particles scored together, of which a mini-batch takes much longer than of 100; RELION's job has 3

SECTIONS = {"input": "Input and output", "optimisation": "Optimisation", "ctf": "CTF", "compute": "Compute",
            "expert": "Expert"}  # fmt: skip
TYPES = {"int": click.INT, "float": click.FLOAT, "str": click.STRING}


class SectionOption(click.Option):
    """An option that knows its section of the help text."""

    def __init__(self, *args: Any, section: str = "input", **options: Any):
        super().__init__(*args, **options)
        self.section = section


class SectionCommand(click.Command):
    """A command whose help lists its options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        by_section: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                by_section.setdefault(getattr(parameter, "section", "input"), []).append(record)
        for section, title in SECTIONS.items():
            if section in by_section:
                with formatter.section(title):
                    formatter.write_dl(by_section[section])


class FlagCommand(SectionCommand):
    """A command whose errors name flags."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VdamkitError as problem:
            raise type(problem)(with_flags(str(problem))) from None


class JobCommand(FlagCommand):
    """A command that also takes what else is in the command line of RELION's job."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args, meaningless = _without_relions(args, ctx)
        if meaningless:
            click.echo(f"note: without meaning here: {', '.join(meaningless)}", err=True)
        rest = super().parse_args(ctx, args)
        pool = ctx.params.get("chunk_particles")
        if pool is not None and 0 < pool < FEW:
            click.echo(
                f"note: --pool {pool} is slow here, where particles scored together share rotations; leave it out", err=True
            )
        return rest


def _without_relions(args: Sequence[str], ctx: click.Context) -> tuple[list[str], list[str]]:
    """Arguments without those that only RELION has, and the names of these."""
    kept, left, meaningless = [], iter(args), []
    for argument in left:
        name, equals, _ = argument.partition("=")
        flag = name.replace("_", "-")
        if flag in MEANINGLESS:
            meaningless.append(name)
            if MEANINGLESS[flag] and not equals:
                next(left, None)
        elif flag in OTHERWISE:
            raise click.UsageError(f"{name} is {OTHERWISE[flag]} here, which takes another quantity", ctx)
        elif flag == "--preread-images":
            kept += [flag_of("memory_budget"), "inf"]
        else:
            kept.append(argument)
    return kept, meaningless


def flag_of(name: str) -> str:
    """First spelling of the flag of a field."""
    return FLAGS[name][0].split("/")[0]


INPUTS = {"optimisation_set": "--ios", "particles": "--i", "tomograms": "--tomograms", "trajectories": "--trajectories"}
_FLAG = INPUTS | {name: flag_of(name) for name in FLAGS}
_GIVEN = re.compile(rf"(?<![\w./-])({'|'.join(_FLAG)})=('[^']*'|\.\.\.|[\w.]*\w)")
_BEGIN = re.compile(rf"^({'|'.join(FLAGS)})(?= (?:is|cannot) )")
_ALONE = re.compile(rf"(?<![\w./'-])({'|'.join(name for name in FLAGS if '_' in name)})(?![\w/'=]|\.\w)")


def with_flags(text: str) -> str:
    """A text for the library's users with flags in place of names: ``name=value``, a name at the beginning, and names of
    several words, which stand for nothing else."""
    text = _GIVEN.sub(lambda found: f"{_FLAG[found[1]]} {found[2].strip(chr(39)).replace('...', 'FILE')}", text)
    return _ALONE.sub(lambda found: _FLAG[found[1]], _BEGIN.sub(lambda found: _FLAG[found[1]], text))


def settings_options(command: Callable, *, defaults: bool = True) -> Callable:
    """Decorator: all options of the job, by the names of the fields; None where one was not given.

    defaults: the help shows them.
    """
    for field in reversed(fields(Settings)):
        command = _option(field, defaults)(command)
    gpu = click.option(
        "--gpu", "gpu", cls=SectionOption, section="compute", is_flag=False, flag_value="0", metavar="IDS", default=None,
        help="Compute on this GPU, or on several: 0,1 or RELION's 0:1. The same as --device cuda:0,cuda:1.",
    )  # fmt: skip
    return gpu(command)


def _option(field: Field, defaults: bool) -> Callable:
    kind = str(field.type).replace("| None", "").strip()
    text, shown = with_flags(field.metadata["doc"]), field.default
    if shown is None:
        shown = "none" if kind == "str" else "-1" if "None" in text else "-1: none"
        text = text.replace("None", "-1")
    shown = {True: "on", False: "off"}[shown] if kind == "bool" else f"{shown:.4g}" if isinstance(shown, float) else shown
    text += f"  [default: {shown}]" if defaults else ""
    common = {"cls": SectionOption, "section": field.metadata["group"], "default": None, "help": text}
    if kind == "bool":
        return click.option(*FLAGS[field.name], field.name, **common)
    if field.name == "solvent":
        common |= {"is_flag": False, "flag_value": "mask"}  # RELION's option has no value
    choices = field.metadata["choices"]
    return click.option(
        *FLAGS[field.name], field.name, type=TYPES[kind],
        metavar="|".join(choices) if choices else {"int": "N", "float": "X", "str": "TEXT"}[kind], **common,
    )  # fmt: skip


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as changes of :class:`Settings`; -1 means None where None is allowed."""
    gpu = values.pop("gpu", None)
    given = {name: value for name, value in values.items() if value is not None and name in FLAGS}
    if gpu is not None:
        given["device"] = _gpu_device(gpu, given.get("device"))
    for field in fields(Settings):
        if "None" in str(field.type) and given.get(field.name) == -1:
            given[field.name] = None
    return given


def _gpu_device(gpu: str, device: str | None) -> str:
    """The device of ``--gpu``: numbers, separated by commas or, as RELION does for several processes, by colons."""
    numbers = [part.strip() for part in (gpu or "0").replace(":", ",").split(",")]  # RELION's job writes --gpu ""
    if not all(number.isdigit() for number in numbers):
        raise SettingsError(f"--gpu is {gpu!r}; it must be the number of a GPU, such as 0, or several, such as 0,1")
    wanted = ",".join(f"cuda:{int(number)}" for number in numbers)
    if device not in (None, wanted, "cuda"):
        raise SettingsError(f"--gpu is {gpu} and --device is {device!r}; give only one of them")
    return wanted


def make_settings(values: dict[str, Any]) -> Settings:
    """Settings from the values of the command line.

    Raises
    ------
    SettingsError: naming the option, the value seen and what is allowed.
    """
    return Settings(**given_options(values))
