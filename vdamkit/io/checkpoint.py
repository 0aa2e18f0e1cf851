"""The checkpoint: all of a run's state in one array file, without pickles."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vdamkit.errors import InputError, SettingsError
from vdamkit.io.star_tables import replacing
from vdamkit.settings import Settings
from vdamkit.state import Plan, Poses, State

FORMAT = "vdamkit checkpoint"
VERSION = 2
_METADATA = "metadata"
_STORED = "(array)"  # stands for a field that is stored as an array
_PARTS = {"poses": Poses, "plan": Plan}  # fields of a state that are dataclasses themselves
_REMEDY = "give the checkpoint.npz of a vdamkit run"


def save_checkpoint(
    path: str | os.PathLike,
    state: State,
    settings: Settings,
    log: list[dict],
    inputs: dict,
    *,
    durable: bool = True,
) -> None:
    """Write a checkpoint; a killed process leaves the old file or the new one, never half of it.

    Parameters
    ----------
    path: the file (``.npz``, uncompressed); written under a temporary name in the same folder, flushed to
        disc, then renamed.
    state: every array and number of it is kept bit for bit. settings: likewise.
    log: one dict of plain values per mini-batch. inputs: what the run was started with, plain values.
    durable: wait until the disc has it, so that it outlives a power cut.

    Raises
    ------
    OutputError: no permission, no such folder, or the disc is full; an older checkpoint is unchanged.
    """
    arrays: dict[str, np.ndarray] = {}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "state": _taken_apart(state, "state", arrays),
        "settings": settings.as_dict(),
        "log": log,
        "inputs": inputs,
    }
    text = json.dumps(metadata, default=_plain)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **{_METADATA: np.array(text)}, **arrays)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def load_checkpoint(path: str | os.PathLike) -> tuple[State, Settings, list[dict], dict]:
    """Read what :func:`save_checkpoint` wrote: state, settings, log, inputs.

    Raises
    ------
    InputError: the file is missing, damaged, no checkpoint, or of another version of vdamkit.
    """
    path = Path(path)
    metadata, arrays = _read(path)
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{path}: is a checkpoint of version {metadata.get('version')!r} and this vdamkit reads version "
            f"{VERSION}; continue with the vdamkit that wrote it."
        )
    try:
        settings = Settings(**metadata["settings"])
        state = _put_together(State, metadata["state"], "state", arrays)
        return state, settings, metadata["log"], metadata["inputs"]
    except SettingsError as error:
        found = str(error)
    except (KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    raise InputError(f"{path}: its content does not fit this vdamkit ({found}); continue with the vdamkit that wrote it.")


def mark_of(path: str | os.PathLike) -> str:
    """The ``mark`` among the inputs of a checkpoint, which tells what was written last; empty where nothing can be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return str(json.loads(str(stored[_METADATA]))["inputs"].get("mark", ""))
    except Exception:  # whatever zipfile and NumPy stumble over: then there is nothing to keep either
        return ""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and arrays of a file whose checksums were all tested."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            if start != b"PK":
                what = f"starts with {start!r}, not as an array file" if start else "is empty"
                raise InputError(f"{path}: no checkpoint, it {what}; {_REMEDY}.")
            arrays = _read_arrays(file)
        if _METADATA not in arrays:
            some = ", ".join(list(arrays)[:5]) or "none"
            raise InputError(f"{path}: no checkpoint, it has no '{_METADATA}' (arrays: {some}); {_REMEDY}.")
        metadata = json.loads(str(arrays.pop(_METADATA)))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: file not found; check the path and the folder you started in.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give the checkpoint.npz inside it.") from None
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None
    except Exception as error:  # zipfile and NumPy let whatever they stumble over through
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: damaged or truncated ({path.stat().st_size} bytes found; {reason}); copy it again, or "
            f"start from an older checkpoint."
        ) from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"{path}: no checkpoint (its metadata do not say '{FORMAT}'); {_REMEDY}.")
    return metadata, arrays


def _read_arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    """All arrays of an open .npz; raises on the first whose checksum is wrong."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


# to and from plain values -----------------------------------------------------------------------------


def _taken_apart(value: State | Poses | Plan, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Plain fields as a dict; arrays go to `arrays` under ``prefix.field``."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        name = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(content):
            plain[field.name] = _taken_apart(content, name, arrays)
        elif isinstance(content, np.ndarray):
            arrays[name] = content
            plain[field.name] = _STORED
        else:
            plain[field.name] = content
    return plain


def _put_together(kind: type, plain: dict[str, Any], prefix: str, arrays: dict[str, np.ndarray]) -> Any:
    """Inverse of :func:`_taken_apart`."""
    values = {}
    for name, content in plain.items():
        full = f"{prefix}.{name}"
        if name in _PARTS:
            values[name] = _put_together(_PARTS[name], content, full, arrays)
        elif content == _STORED:
            values[name] = arrays[full]
        else:
            values[name] = tuple(content) if isinstance(content, list) else content
    return kind(**values)


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays, paths and the like as what JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
