"""STAR files: a thin layer over `starfile` that keeps names as text and says clearly what is wrong."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import starfile

from vdamkit.errors import InputError, OutputError

TEXT_COLUMNS = (
    "rlnTomoName",
    "rlnTomoParticleName",
    "rlnTomoVisibleFrames",
    "rlnTomoTiltSeriesName",
    "rlnTomoTiltSeriesStarFile",
    "rlnTomoParticlesFile",
    "rlnTomoTomogramsFile",
    "rlnTomoTrajectoriesFile",
    "rlnOpticsGroupName",
    "rlnGroupName",
    "rlnImageName",
    "rlnCtfImage",
    "rlnMicrographName",
    "rlnMicrographMovieName",
    "rlnReferenceImage",
    "rlnTomoReconstructedTomogram",
    "rlnTomoProjX",
    "rlnTomoProjY",
    "rlnTomoProjZ",
    "rlnTomoProjW",
)
"""Columns never turned into numbers, so that '01' stays '01'."""

MARKS = {"'": "\ue000", "#": "\ue001"}  # and characters of no script that stand in for them
MARK_INSIDE = re.compile(r"['#](?<=\S['#])(?=\S)")  # in this order: the first is looked for fast in a long text

Block = pd.DataFrame | dict


def read_star(path: str | os.PathLike) -> dict[str, Block]:
    """Read every block of a STAR file.

    Parameters
    ----------
    path: the file; UTF-8, Unix or DOS line ends.

    Returns
    -------
    Blocks by name without ``data_`` (an unnamed block is ""): a DataFrame for a table (``loop_``), a dict
    for a list. Columns in `TEXT_COLUMNS` are text, others are numbers where all values are.

    Raises
    ------
    InputError: the file is missing, empty, or not a STAR file, or a table has a column twice.
    """
    path = Path(path)
    content = _checked_text(path)
    marked = MARK_INSIDE.search(content) is not None
    linecache.clearcache()  # starfile reads through it and leaves it stale when a file could not be parsed
    try:
        with _without_marks(content) if marked else contextlib.nullcontext(path) as readable:
            blocks = starfile.read(readable, always_dict=True, parse_as_string=list(TEXT_COLUMNS))
    except pd.errors.EmptyDataError:
        raise InputError(
            f"{path}: one of its tables has column names but no rows; write it again or remove the table."
        ) from None
    except Exception as error:  # starfile lets whatever its parser stumbles over through
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as a STAR file ({reason}); check that every row has as many values as "
            f"there are columns, or write the file again."
        ) from None
    if marked:
        blocks = {name: _with_marks(block) for name, block in blocks.items()}
    if not blocks:
        raise InputError(f"{path}: holds no data_ block with content; give a STAR file written by RELION.")
    for name, block in blocks.items():
        if isinstance(block, pd.DataFrame) and not block.columns.is_unique:
            twice = block.columns[block.columns.duplicated()][0]
            raise InputError(f"{path}: data_{name} has the column {twice} more than once; remove all but one of them.")
    return blocks


@contextlib.contextmanager
def _without_marks(content: str) -> Iterator[Path]:
    """A file for starfile, which takes an apostrophe or # within a word, as in a folder's name, for a quote or a comment."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.star"
        copy.write_text(MARK_INSIDE.sub(lambda mark: MARKS[mark[0]], content), encoding="utf-8")
        yield copy


def _with_marks(block: Block) -> Block:
    """A block with the marks that :func:`_without_marks` took away."""
    back = str.maketrans({stand_in: mark for mark, stand_in in MARKS.items()})

    def restored(value: object) -> object:
        return value.translate(back) if isinstance(value, str) else value

    return block.map(restored) if isinstance(block, pd.DataFrame) else {key: restored(value) for key, value in block.items()}


def _checked_text(path: Path) -> str:
    """The text of a file. Raises InputError unless it is readable text that holds at least one data_ block."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: file not found; check the path and the folder you started in.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give the STAR file inside it.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None
    if not content.strip():
        raise InputError(f"{path}: file is empty; write it again, perhaps the disc was full.")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a STAR file (byte {error.start} is no text); give a STAR file, saved as UTF-8."
        ) from None
    if b"\x00" in content:
        raise InputError(f"{path}: not a STAR file (it holds binary zeros); copy or write the file again.")
    if not content.startswith(b"data_") and b"\ndata_" not in content.replace(b"\r", b"\n"):
        raise InputError(f"{path}: not a STAR file (no line starts with data_); give a STAR file.")
    return text


def find_block(blocks: dict[str, Block], name: str, path: Path) -> Block:
    """The block called `name`, or InputError listing those that are there."""
    if name in blocks:
        return blocks[name]
    found = ", ".join(f"data_{key}" for key in blocks)
    raise InputError(f"{path}: no block data_{name} (found: {found}); give a file that has this block.")


def as_table(block: Block) -> pd.DataFrame:
    """The block as table: a list becomes a table of one row."""
    return block if isinstance(block, pd.DataFrame) else pd.DataFrame([block])


def as_list(block: Block) -> dict:
    """The block as list of values: of a table, the first row."""
    if isinstance(block, dict):
        return block
    return {column: block[column].iloc[0] for column in block.columns} if len(block) else {}


def require_columns(table: Block, names: Sequence[str], path: str | os.PathLike, block: str) -> None:
    """Raise InputError naming the columns of `names` that `table` lacks, the file and the block."""
    present = table.columns if isinstance(table, pd.DataFrame) else table.keys()
    missing = [name for name in names if name not in present]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise InputError(
            f"{path}: data_{block} lacks the column{plural} {', '.join(missing)}; give a file that has "
            f"{'them' if plural else 'it'} (is it the right kind of STAR file?)."
        )


def cell_error(
    path: str | os.PathLike, block: str, row: int, column: str, value: object, wrong: str, remedy: str
) -> InputError:
    """InputError about one cell; `row` counts from 0 here and from 1 in the text."""
    text = f"{value:.9g}" if isinstance(value, int | float | np.number) else f"'{value}'"
    text = text if len(text) <= 120 else text[:117] + "..."
    return InputError(f"{path}: data_{block} row {row + 1}, column {column}: value {text} {wrong}; {remedy}.")


def numeric_column(
    table: pd.DataFrame,
    column: str,
    path: str | os.PathLike,
    block: str,
    *,
    default: float | None = None,
    allow_nan: bool = False,
) -> np.ndarray:
    """A column as numbers.

    Parameters
    ----------
    default: value of every row where the column is missing; None makes the column compulsory.
    allow_nan: accept "nan" (never infinity, never text).

    Returns
    -------
    `(n_rows,)` float64.

    Raises
    ------
    InputError: the column is missing, or a value is not a finite number (file, row, column and value named).
    """
    if column not in table.columns and default is not None:
        return np.full(len(table), default, np.float64)
    require_columns(table, [column], path, block)
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any() and allow_nan:
        bad &= ~(np.isnan(values) & table[column].isna().to_numpy())
    if bad.any():
        row = int(np.argmax(bad))
        value, wrong = table[column].iloc[row], "is not a finite number"
        raise cell_error(path, block, row, column, value, wrong, "correct or remove this row")
    return values


def text_column(table: pd.DataFrame, column: str, path: str | os.PathLike, block: str) -> np.ndarray:
    """A compulsory column as `(n_rows,)` object array of non-empty str; InputError names an empty cell."""
    require_columns(table, [column], path, block)
    empty = (table[column].isna() | (table[column] == "")).to_numpy(bool)
    if empty.any():
        row = int(np.argmax(empty))
        raise cell_error(path, block, row, column, "", "is empty", "complete this row or remove it")
    return table[column].astype(str).to_numpy(object)


def vector_column(table: pd.DataFrame, column: str, path: str | os.PathLike, block: str, *, length: int) -> np.ndarray:
    """A column of vectors written ``[a,b,...]`` as `(n_rows, length)` float64."""
    result = np.empty((len(table), length))
    for row, text in enumerate(text_column(table, column, path, block)):
        vector = parse_vector(text)
        if vector is None or len(vector) != length or not np.isfinite(vector).all():
            wrong = f"is not a vector of {length} numbers"
            raise cell_error(path, block, row, column, text, wrong, "write it as [a,b,...]")
        result[row] = vector
    return result


def parse_vector(text: str) -> np.ndarray | None:
    """Numbers of ``[a,b,...]`` as `(n,)` float64; None where the text is no such vector."""
    text = text.strip()
    if len(text) < 3 or text[0] != "[" or text[-1] != "]":
        return None
    try:
        return np.array([float(item) for item in text[1:-1].split(",")])
    except ValueError:
        return None


def resolve_path(name: str | os.PathLike, star_path: str | os.PathLike) -> Path | None:
    """Find a file named inside a STAR file.

    RELION writes paths relative to its project folder, and is started there. They are tried from the STAR file's own folder
    and each folder above it, and from the current directory: first of all, if it is one of these, and else last of all, as
    another project's folder may hold files of the same names. None where the file is nowhere.
    """
    if os.path.isabs(name):
        return Path(name) if os.path.exists(name) else None
    here, folder = working_folder(), os.path.dirname(os.path.abspath(star_path))
    inside = folder == here or folder.startswith(os.path.join(here, ""))
    if inside and os.path.exists(name):
        return Path(name)
    while not os.path.exists(path := os.path.join(folder, name)):
        above = os.path.dirname(folder)
        if above == folder:
            return Path(name) if not inside and os.path.exists(name) else None
        folder = above
    return Path(path)


def working_folder() -> str:
    """The current folder's path; "/" where it was removed under the process, which then has nothing beside absolute names."""
    try:
        return os.getcwd()
    except OSError:
        return os.sep


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Name of a temporary file that replaces `path` if the block succeeds; else `path` keeps its content.

    Raises
    ------
    OutputError: no permission, no such folder, or the disc is full.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"{path}: could not be written ({error.strerror or error}); free space or choose a folder you "
            f"may write to (an older file of this name is unchanged)."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_star(path: str | os.PathLike, blocks: dict[str, Block], *, comments: Sequence[str] = ()) -> None:
    """Write a STAR file; readers see the old file or the new one, never half of it.

    Parameters
    ----------
    path: the file; written under a temporary name in the same folder, then renamed.
    blocks: by name without ``data_``; DataFrame → table, dict → list. Numbers get nine significant digits.
    comments: lines put first, each after ``# ``.

    Raises
    ------
    OutputError: no permission, no such folder, or the disc is full; an older file is unchanged.
    """
    rounded = {
        name: block if isinstance(block, pd.DataFrame) else {key: _short(value) for key, value in block.items()}
        for name, block in blocks.items()
    }
    text = starfile.to_string(rounded, float_format="%.9g", na_rep="nan")
    head = "".join(f"# {' '.join(line.split())}\n" for line in comments)
    with replacing(path) as temporary:
        temporary.write_text(head + text, encoding="utf-8")


def _short(value: object) -> object:
    """Floats of list blocks with nine significant digits, as in the tables."""
    return f"{value:.9g}" if isinstance(value, float | np.floating) else value
