"""``vdamkit simulate``, ``vdamkit demo`` and ``vdamkit tutorial``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from vdamkit.cli import Interrupted
from vdamkit.cli_options import FlagCommand, SectionCommand
from vdamkit.errors import SettingsError
from vdamkit.simulate.settings import SimulationSettings

HELP = {
    "model": "hexamer, asymmetric, or the path of an MRC map.",
    "particles": "Particles picked in all tomograms together.",
    "volumes": "Of these, also written as 3D pseudo-subtomograms; 24, or all if fewer.",
    "tomograms": "Tilt series, each an optics group with its own defocus.",
    "box": "Box of the particles, px.",
    "pixel_size": "Å.",
    "tilts": "Images from -60 to +60 degrees.",
    "variance_ratio": "Signal over noise (variances) near particles in the first exposure; none: no noise.",
    "picking_error": "Standard deviation per axis of the picked centres, Å.",
    "orientation_error": "Standard deviation per axis of the particles about the sphere's normal, degrees.",
    "seed": "Same seed, same data.",
    "poses": "sphere (with neighbours and priors), random, or a STAR file with true poses.",
    "symmetry": "Cn of the model.",
    "lattice_spacing": "Å between neighbours.",
    "occupancy": "Part of the lattice sites that hold a particle.",
    "defocus": "Å, of the first and of the last tomogram.",
    "dose_per_tilt": "e/Å².",
    "second_model": "Another kind of particle among them: hexamer, asymmetric, or an MRC map.",
    "second_share": "Part of the particles that are of that kind.",
    "junk": "Part of the picked places that hold no particle.",
    "write_tilt_images": "Also write the tilt images, which only RELION itself would want.",
}
"""Help of every field of :class:`vdamkit.simulate.SimulationSettings`."""


class _NumberOrNone(click.ParamType):
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A float, or None for the word "none"."""
        if isinstance(value, str) and value.lower() == "none":
            return "none"  # told apart from an option that was not given
        return click.FLOAT.convert(value, param, ctx)


def _option(field: Field) -> Callable:
    flag, text = "--" + field.name.replace("_", "-"), HELP[field.name]
    if field.type == "bool":
        return click.option(flag, field.name, is_flag=True, default=None, help=text)
    automatic = {"volumes": 24}.get(field.name, "by the model") if field.default is None else field.default
    if isinstance(automatic, tuple):
        automatic = " ".join(f"{value:g}" for value in automatic)
    kind = {"int": click.INT, "int | None": click.INT, "float": click.FLOAT, "float | None": _NumberOrNone()}.get(
        str(field.type), click.STRING
    )
    more = {"type": click.FLOAT, "nargs": 2} if field.name == "defocus" else {"type": kind}
    return click.option(flag, field.name, default=None, help=f"{text}  [default: {automatic}]", **more)


def _simulation_options(command: Callable) -> Callable:
    for field in reversed(fields(SimulationSettings)):
        command = _option(field)(command)
    return command


@click.command(cls=SectionCommand)
@click.argument("output", metavar="FOLDER")
@_simulation_options
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...: where the images are made.")
@click.option("--j", "threads", default=None, type=click.INT, help="Threads; all cores by default.")
def simulate(output: str, device: str, threads: int | None, **values: Any) -> None:
    """Make virtual tilt series of a known particle in FOLDER and extract the particles as RELION 5 does."""
    from vdamkit.simulate import simulate as make

    options = {name: None if value == "none" else value for name, value in values.items() if value is not None}
    try:
        paths = make(output, device=device, threads=threads, **options)
    except SettingsError as error:
        raise _in_flags(error) from None
    for name, path in paths.items():
        click.echo(f"{name}: {path}")


def _in_flags(error: SettingsError) -> SettingsError:
    """The error with the flag in place of the field's name."""
    text = str(error).removeprefix("simulate: ")
    name, _, rest = text.partition(" ")
    flag = {"threads": "--j", "device": "--device"}.get(name, "--" + name.replace("_", "-"))
    return SettingsError(f"{flag} {rest}") if name in HELP or name in ("threads", "device") else error


@click.command(cls=FlagCommand)
@click.option("--o", "output", default="vdamkit_demo", show_default=True, metavar="FOLDER", help="Folder for the results.")
@click.option("--iter", "mini_batches", default=None, type=click.INT, help="Number of mini-batches.")
@click.option("--random-seed", "--seed", "seed", default=0, show_default=True, help="Seed of all random numbers.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:0, ...")
@click.option("--j", "threads", default=None, type=click.INT, help="Threads; all cores by default.")
def demo(output: str, mini_batches: int | None, seed: int, device: str, threads: int | None) -> None:
    """Make an initial model of the data that comes with vdamkit, in about a minute.

    Writes RELION's files and a contact sheet with slices, projections and the FSC with the truth.
    """
    from vdamkit.demo import MINI_BATCHES, run_demo

    try:
        run_demo(
            Path(output), mini_batches=MINI_BATCHES if mini_batches is None else mini_batches, seed=seed, device=device,
            threads=threads, say=click.echo,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted; what was done is kept in {output}: vdamkit resume {output}") from None


@click.command(cls=SectionCommand)
@click.argument("folder", default="vdamkit_tutorial", metavar="[FOLDER]")
@click.argument("jupyter_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- JUPYTER_OPTIONS]")
@click.option("--no-browser", is_flag=True, help="Only start the server and print its address, as on a remote machine.")
@click.option("--copy-only", is_flag=True, help="Copy the notebooks and start nothing.")
@click.option("--ip", default=None, help="Address the server listens on; by default only this machine.")
@click.option("--port", default=None, type=click.INT, help="Port of the server.")
def tutorial(
    folder: str, jupyter_options: tuple[str, ...], no_browser: bool, copy_only: bool, ip: str | None, port: int | None
) -> int:
    """Copy the tutorial notebooks to FOLDER (vdamkit_tutorial by default) and open JupyterLab on the first.

    Notebooks that you have changed are kept. No desktop is needed: over a remote connection use --no-browser and open the
    printed address through a tunnel, e.g. ssh -L 8888:localhost:8888 HOST.
    """
    import subprocess
    from importlib.util import find_spec

    from vdamkit.tutorial import copy_notebooks, lab_command

    for path in copy_notebooks(folder, say=click.echo):
        click.echo(str(path))
    if copy_only:
        return 0
    if find_spec("jupyterlab") is None:
        raise SettingsError("JupyterLab is not installed; pip install 'vdamkit[notebook]'")
    try:
        command = [*lab_command(Path(folder), browser=not no_browser, ip=ip, port=port), *jupyter_options]
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 0
