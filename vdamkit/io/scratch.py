"""Local copies of particle files, made when they are first read (RELION --scratch_dir)."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

from vdamkit.errors import OutputError
from vdamkit.io.star_tables import replacing


class Scratch:
    """Copies of files in a local folder; for several threads, and kept from run to run.

    folder: copies lie below ``vdamkit_scratch`` in it, under the whole path of their original.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder) / "vdamkit_scratch"
        self._lock = threading.Lock()
        self._notes: list[str] = []
        self._given_up = False

    def locate(self, path: Path) -> Path:
        """The copy of a file, made if there is none or the file has changed since; the file itself once that has failed."""
        copy = self.folder / str(path.resolve()).lstrip("/\\").replace(":", "")
        try:
            original = path.stat()
            if os.path.exists(copy) and _same(copy.stat(), original):
                return copy
            if self._given_up or not os.access(path, os.R_OK):  # whoever opens it says what is wrong
                return path
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as temporary:
                shutil.copyfile(path, temporary)
                os.utime(temporary, ns=(original.st_atime_ns, original.st_mtime_ns))
        except (OSError, OutputError) as problem:
            self._give_up(problem if isinstance(problem, OSError) else problem.__cause__)
            return path
        return copy

    def take_notes(self) -> tuple[str, ...]:
        """What a person should know, told once."""
        with self._lock:
            notes, self._notes = tuple(self._notes), []
        return notes

    def _give_up(self, problem: BaseException | None) -> None:
        with self._lock:
            if not self._given_up:
                self._notes.append(
                    f"nothing more can be copied to {self.folder} ({_reason(problem)}); the rest is read from where it lies"
                )
            self._given_up = True


def scratch_problem(folder: str | os.PathLike, wanted: int) -> str | None:
    """Why a folder will not take copies of `wanted` bytes in all; None where it will. It is not made."""
    folder = Path(folder)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as problem:
        return f"nothing can be written there ({_reason(problem)})"
    if free < wanted:
        return f"{free / 2**30:.2g} GiB are free and the particle files take about {wanted / 2**30:.2g} GiB"
    return None


def _same(copy: os.stat_result, original: os.stat_result) -> bool:
    return (copy.st_size, copy.st_mtime_ns) == (original.st_size, original.st_mtime_ns)


def _reason(problem: BaseException | None) -> str:
    return getattr(problem, "strerror", None) or str(problem)
