"""MRC files: headers, memory maps, maps in and out."""

from __future__ import annotations

import os
from pathlib import Path

import mrcfile
import numpy as np
from mrcfile.dtypes import HEADER_DTYPE

from vdamkit.errors import InputError
from vdamkit.io.star_tables import replacing

HEADER_BYTES = 1024
DTYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
"""Grey-value types by MRC mode; complex (3, 4) and packed (101) data are refused."""


def mrc_header(path: str | os.PathLike) -> tuple[tuple[int, int, int], np.dtype, float]:
    """Shape, type and voxel size of an MRC file, from its header and length alone.

    Parameters
    ----------
    path: the file.

    Returns
    -------
    shape: `(nz, ny, nx)`. dtype: of the grey values, in the file's byte order. voxel_size: Å along x, 0 where
    the header has none.

    Raises
    ------
    InputError: missing, not an MRC file, of a type that cannot be used, or shorter than its header says.
    """
    shape, dtype, voxel_size, _ = _read_header(Path(path))
    return shape, dtype, voxel_size


def open_mrc(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Memory-map an MRC file, read-only.

    Returns
    -------
    data: `(nz, ny, nx)` array in the file's own type (float16, float32, int16, …), nothing read yet.
    voxel_size: Å along x, 0 where the header has none.

    Raises
    ------
    InputError: as :func:`mrc_header`.
    """
    path = Path(path)
    shape, dtype, voxel_size, offset = _read_header(path)
    return np.memmap(os.fspath(path), dtype, mode="r", offset=offset, shape=shape), voxel_size


def read_map(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Read a whole MRC file.

    Returns
    -------
    data: `(nz, ny, nx)` float32 in native byte order. voxel_size: Å along x, 0 where the header has none.

    Raises
    ------
    InputError: as :func:`mrc_header`, or grey values that are not finite.
    """
    data, voxel_size = open_mrc(path)
    data = np.array(data, np.float32)
    if not np.isfinite(data).all():
        raise InputError(f"{path}: holds values that are not finite (NaN or infinite); give an intact map.")
    return data, voxel_size


def write_mrc(path: str | os.PathLike, array: np.ndarray, pixel_size: float, *, stack: bool = False) -> None:
    """Write an MRC file as float32; readers see the old file or the new one, never half of it.

    Parameters
    ----------
    path: the file; written under a temporary name in the same folder, then renamed.
    array: `(nz, ny, nx)` or `(ny, nx)` real. pixel_size: Å, the same along all axes.
    stack: mark the file as a stack of images rather than a volume.

    Raises
    ------
    OutputError: no permission, no such folder, or the disc is full; an older file is unchanged.
    """
    array = np.ascontiguousarray(array, np.float32)
    with replacing(path) as temporary, mrcfile.new(temporary, overwrite=True) as mrc:
        mrc.set_data(array)
        if array.ndim == 3:
            (mrc.set_image_stack if stack else mrc.set_volume)()
        mrc.voxel_size = float(pixel_size)


def _read_header(path: Path) -> tuple[tuple[int, int, int], np.dtype, float, int]:
    """Shape, type, voxel size and offset of the data, once everything in the header holds together."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
            found = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise InputError(f"{path}: file not found; check the path and the folder you started in.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None
    if len(raw) < HEADER_BYTES:
        raise InputError(
            f"{path}: truncated, an MRC file has a header of {HEADER_BYTES} bytes and {found} were found; "
            f"copy or extract it again."
        )
    header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(_byte_order(raw)))[0]
    shape = tuple(int(header[name]) for name in ("nz", "ny", "nx"))
    mode, extended = int(header["mode"]), int(header["nsymbt"])
    if min(shape) < 1 or max(shape) > 1 << 20 or extended < 0 or not 0 <= mode <= 200:
        raise InputError(
            f"{path}: not an MRC file (its header would mean {shape[2]} x {shape[1]} x {shape[0]} voxels of "
            f"mode {mode}); give an MRC file, or extract it again."
        )
    if mode not in DTYPES:
        raise InputError(
            f"{path}: MRC mode {mode} cannot be used (expected {', '.join(map(str, DTYPES))}); convert it to float32 (mode 2)."
        )
    axes = tuple(int(header[name]) for name in ("mapc", "mapr", "maps"))
    if axes != (1, 2, 3) and sorted(axes) == [1, 2, 3]:
        raise InputError(f"{path}: axes are stored in the order {axes}; rewrite it in the order (1, 2, 3).")
    dtype = np.dtype(_byte_order(raw) + DTYPES[mode])
    offset = HEADER_BYTES + extended
    expected = offset + shape[0] * shape[1] * shape[2] * dtype.itemsize
    if found < expected:
        raise InputError(
            f"{path}: truncated, {shape[2]} x {shape[1]} x {shape[0]} voxels of {dtype.name} need {expected} "
            f"bytes and {found} were found; copy or extract it again."
        )
    cell, samples = float(header["cella"]["x"]), int(header["mx"])
    voxel_size = cell / samples if samples > 0 and np.isfinite(cell) and cell > 0 else 0.0
    return shape, dtype, voxel_size, offset


def _byte_order(raw: bytes) -> str:
    """Byte order of an MRC header: from the machine stamp, else whichever makes the mode a small number."""
    stamp = raw[212]
    if stamp in (0x44, 0x11):
        return "<" if stamp == 0x44 else ">"
    return "<" if int.from_bytes(raw[12:16], "little") <= 200 else ">"
