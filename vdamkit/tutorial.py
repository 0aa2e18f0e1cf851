"""The tutorial notebooks: where they are, and a copy of them to work in."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from vdamkit.errors import InputError, OutputError

FIRST = "01_first_model.ipynb"


def tutorial_notebooks() -> list[Path]:
    """The notebooks that come with vdamkit: of the checkout, else those installed with it.

    Raises
    ------
    InputError: there are none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "notebooks", package / "notebooks"):
        found = sorted(folder.glob("[0-9]*.ipynb"))
        if found:
            return found
    raise InputError(f"no notebooks in {package.parent / 'notebooks'}; install vdamkit anew")


def copy_notebooks(folder: str | Path, *, say: Callable[[str], None] = print) -> list[Path]:
    """Copy the notebooks to `folder`. A notebook that is there and differs is kept as it is, whoever changed it.

    Raises
    ------
    OutputError: the folder cannot be written.
    """
    folder, out = Path(folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in tutorial_notebooks():
            target = folder / source.name
            if target.exists() and target.read_bytes() != source.read_bytes():
                say(f"kept your {target}")
            elif not target.exists():
                shutil.copyfile(source, target)
            out.append(target)
    except OSError as problem:
        raise OutputError(f"cannot write to {folder} ({problem.strerror or problem}); choose another folder") from None
    return out


def lab_command(folder: Path, *, browser: bool, ip: str | None = None, port: int | None = None) -> list[str]:
    """The command that opens JupyterLab on the first notebook in `folder`."""
    command = [sys.executable, "-m", "jupyter", "lab", str(folder / FIRST)]
    command += [] if browser else ["--no-browser"]
    command += [f"--ServerApp.ip={ip}"] if ip else []
    return command + ([f"--ServerApp.port={port}"] if port else [])
