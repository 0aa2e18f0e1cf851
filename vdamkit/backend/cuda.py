"""An NVIDIA GPU by way of CuPy: arrays, our kernels compiled once, memory, errors. No other module knows CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vdamkit.backend.device import Device, DeviceLost, OutOfDeviceMemory
from vdamkit.backend.twins import KZ, TILE
from vdamkit.errors import SettingsError

THREADS = 256
FULL = ("OutOfMemoryError", "MemoryError")  # of CuPy's pool, of C++ code that it served; NumPy's own has another name
ALIGNED = 16  # bytes, what the kernels read at a time
FAILURES = ("CUDARuntimeError", "CUDADriverError", "CUBLASError", "CuFFTError")
NO_MEMORY = ("MemoryAllocation", "OUT_OF_MEMORY", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUFFT_INTERNAL_ERROR")
# the last two: where cuBLAS finds no room for a handle, or cuFFT for a plan


def _cupy(device: str) -> Any:
    """CuPy with at least one device that answers."""
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() == 0:
            raise RuntimeError("no device")
    except Exception as problem:  # no CuPy, no driver, no device: one answer for the user
        first_line = (str(problem).splitlines() or ["no device"])[0]
        raise SettingsError(
            f"device is {device!r} but no GPU answers ({first_line}); install vdamkit[cuda12] or vdamkit[cuda13] "
            "on a machine with an NVIDIA GPU, or use device='cpu'"
        ) from None
    return cupy


@lru_cache(maxsize=2)
def _source() -> str:
    names = ("projector.cu", "search.cu", "sums.cu")
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


class CudaDevice(Device):
    """One GPU. All work of a thread on it goes to the thread's current stream.

    Raises SettingsError where CuPy or the device does not answer.
    """

    def __init__(self, number: int, memory: int | None = None):
        super().__init__(memory)
        self.name = f"cuda:{number}"
        self.xp = _cupy(self.name)
        count = self.xp.cuda.runtime.getDeviceCount()
        if number >= count:
            raise SettingsError(f"device is {self.name!r} but this machine has {count} GPU(s); the last is 'cuda:{count - 1}'")
        self._device = self.xp.cuda.Device(number)
        self.kernels = CudaKernels(self.xp)

    @property
    def description(self) -> str:
        name = self.xp.cuda.runtime.getDeviceProperties(self._device.id)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    @property
    def ndimage(self) -> Any:
        from cupyx.scipy import ndimage

        return ndimage

    def put(self, array: np.ndarray) -> Any:
        return self.xp.asarray(np.ascontiguousarray(array))

    def put_all(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        *firsts, size = accumulate((-(-a.nbytes // ALIGNED) * ALIGNED for a in arrays), initial=0)
        places = [(slice(first, first + a.nbytes), a) for first, a in zip(firsts, arrays, strict=True)]
        packed = np.empty(size, np.uint8)
        for place, array in places:
            packed[place] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = self.xp.asarray(packed)
        return tuple(there[place].view(array.dtype).reshape(array.shape) for place, array in places)

    def upload(self, array: np.ndarray) -> Any:
        import cupyx

        pinned = cupyx.empty_pinned(array.shape, array.dtype)  # page-locked: copied by the device itself, at the bus's rate
        pinned[...] = array
        out = self.xp.empty(array.shape, array.dtype)
        out.set(pinned)
        self.xp.cuda.get_current_stream().synchronize()  # before the page-locked memory may be used again
        return out

    def get(self, array: Any) -> np.ndarray:
        return array.get()

    def matmul(self, a: Any, b: Any, *, tf32: bool = False) -> Any:
        if not tf32:
            return a @ b.T
        return self._tensor_product(a, b)

    def _tensor_product(self, a: Any, b: Any) -> Any:
        """``a @ b.T`` on tensor cores: cuBLAS with TF32 inputs and float32 sums, for this call alone."""
        cublas, runtime = self.xp.cuda.cublas, self.xp.cuda.runtime
        a, b = self.xp.ascontiguousarray(a, np.float32), self.xp.ascontiguousarray(b, np.float32)
        m, n, depth = len(a), len(b), a.shape[1]
        out = self.xp.empty((m, n), np.float32)
        one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        kind = runtime.CUDA_R_32F
        # cuBLAS counts by columns: row-major out (m, n) is its (n, m) = b a^T
        cublas.gemmEx(
            self._device.cublas_handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, n, m, depth, one.ctypes.data,
            b.data.ptr, kind, depth, a.data.ptr, kind, depth, zero.ctypes.data, out.data.ptr, kind, n,
            cublas.CUBLAS_COMPUTE_32F_FAST_TF32, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
        return out

    def free_bytes(self) -> int:
        """What the driver has free, and what CuPy's pool holds without using it."""
        with self.active():
            pool = self.xp.get_default_memory_pool()
            return int(self._device.mem_info[0] + pool.total_bytes() - pool.used_bytes())

    @contextmanager
    def active(self) -> Iterator[None]:
        """The device for this thread; errors of CuPy and its libraries in our words: a device without memory can go on, a lost
        one cannot."""
        try:
            with self._device:
                yield
        except (MemoryError, RuntimeError) as problem:
            kind, text = type(problem).__name__, str(problem)
            if kind in FULL or (kind in FAILURES and any(word in text for word in NO_MEMORY)):
                raise OutOfDeviceMemory(f"{self.name} has no memory left ({text})") from None
            if kind in FAILURES:
                raise DeviceLost(f"{self.name} does not answer any more ({text})") from None
            raise

    @cached_property
    def _upload_stream(self) -> Any:
        """The same for all uploads: CuPy's pool keeps memory apart by stream."""
        return self.xp.cuda.Stream(non_blocking=True)

    @contextmanager
    def uploading(self) -> Iterator[None]:
        with self.active(), self._upload_stream:
            yield

    def synchronize(self) -> None:
        with self.active():
            self.xp.cuda.get_current_stream().synchronize()

    def release(self) -> None:
        super().release()
        with self.active():
            self.xp.get_default_memory_pool().free_all_blocks()
            self.xp.get_default_pinned_memory_pool().free_all_blocks()


class CudaKernels:
    """The kernels of the .cu files, called as their twins are; compiled at first use (CuPy keeps what it compiled on disc)."""

    def __init__(self, cupy: Any):
        self._cupy = cupy
        self._modules: dict[np.dtype, Any] = {}
        self._functions: dict[tuple[np.dtype, str], Any] = {}  # a module looks its own up anew each time

    def _run(self, name: str, real: np.dtype, grid: tuple[int, ...], *arguments: Any, threads: int = THREADS) -> None:
        if min(grid) == 0:
            return
        key = (real, name)
        if key not in self._functions:
            self._functions[key] = self._module(real).get_function(name)
        self._functions[key](grid, (threads,), arguments)

    def _module(self, real: np.dtype) -> Any:
        if real not in self._modules:
            kind = ("-DREAL=float", "-DCOMPLEX=float2", "-DSINGLE") if real == np.float32 else (
                "-DREAL=double", "-DCOMPLEX=double2")  # fmt: skip
            self._modules[real] = self._cupy.RawModule(code=_source(), options=("-std=c++17", *kind))
        return self._modules[real]

    def tilt(self, cube, turns, source, source_at, half_width, slabs) -> None:
        n = source.shape[1]
        self._run(
            "tilt", turns.dtype, (len(turns) * _blocks(n),), cube, turns, source, source_at, np.int32(n), np.int32(half_width),
            np.int32(slabs.shape[1]), slabs,
        )  # fmt: skip

    def tilt_adjoint(self, slabs, slab_weights, turns, owner, source, source_at, half_width, scales, sums) -> None:
        n = source.shape[1]
        self._run(
            "tilt_adjoint", turns.dtype, (len(turns), _blocks(n), 2), slabs, slab_weights, turns, owner, source, source_at,
            np.int32(n), np.int32(half_width), np.int32(sums.shape[-1]), np.int32(slabs.shape[2]), np.int32(len(turns)),
            np.float64(scales[0]), np.float64(scales[1]), sums,
        )  # fmt: skip

    def tilt_back(self, slabs, turns, points, half_width, depth, width, sums) -> None:
        n = points.shape[1]
        self._run(
            "tilt_back", turns.dtype, (_blocks(n),), slabs, turns, np.int32(len(turns)), points, np.int32(n),
            np.int32(half_width), np.int32(depth), np.int32(width), np.int32(sums.shape[-1]), sums,
        )  # fmt: skip

    def spin(self, slabs, spins, first, taps, pair, turned, depth, width, rows) -> None:
        n = len(pair)
        self._run(
            "spin", taps.dtype, (len(spins) * _blocks(n),), slabs, spins, first, taps, pair, turned, np.int32(taps.shape[1]),
            np.int32(depth), np.int32(width), np.int32(n), rows,
        )  # fmt: skip

    def spin_adjoint(
        self, values, weights, spin_start, spins, tile_range, source, source_count, patch_range, entry, entry_weight, needed,
        absolute_sum, depth, width, slabs,
    ) -> None:  # fmt: skip
        real, (_, layers, tiles, _) = entry_weight.dtype, tile_range.shape
        self._run(
            "spin_adjoint", real, (len(slabs) * tiles * layers, 2), values, weights, spin_start, spins, tile_range, source,
            source_count, patch_range, entry, entry_weight, needed, real.type(absolute_sum),
            np.int32(round(patch_range.shape[2] ** 0.5)), np.int32(depth), np.int32(width), np.int32(values.shape[2]),
            np.int32(values.shape[1]), slabs, threads=TILE**2 * KZ[real.itemsize],
        )  # fmt: skip

    def collect(self, values, rows, order, out) -> None:
        complex_kind = np.dtype(values.dtype).kind == "c"
        self._run(
            "collect" if complex_kind else "collect_real", out.real.dtype, (len(rows), _blocks(len(order))), values,
            np.int32(values.shape[1]), rows, order, np.int32(len(order)), out,
        )  # fmt: skip

    def phases(self, turns, k, out) -> None:
        self._run("phases", out.real.dtype, (len(turns), _blocks(len(k))), turns, k, np.int32(len(k)), out)

    def moved_pairs(self, images, shift_phases, pairs, even, odd) -> None:
        n = pairs.shape[1]
        self._run(
            "moved_pairs", even.real.dtype, (len(even), _blocks(n)), images, np.int32(images.shape[1]), shift_phases,
            np.int32(len(shift_phases)), np.int32(shift_phases.shape[1]), pairs, np.int32(n), even, odd,
        )  # fmt: skip

    def score(
        self, rows, data, weight, shift_phases, blocks, entry_start, entry_row, entry_out, entry_prior, shift_start, shift,
        shift_prior, scores, *, tile: int,
    ) -> None:  # fmt: skip
        self._run(
            f"score_{tile}", scores.dtype, (len(blocks),), rows, data, weight, shift_phases, np.int32(rows.shape[1]),
            np.int32(data.shape[1]), blocks, entry_start, entry_row, entry_out, entry_prior, shift_start, shift, shift_prior,
            scores,
        )  # fmt: skip

    def normalise(self, scores, start, peak, total, best) -> None:
        self._run("normalise", scores.dtype, (len(start) - 1,), scores, start, peak, total, best)

    def threshold(self, weights, start, target, cap, out) -> None:
        self._run("threshold", weights.dtype, (len(start) - 1,), weights, start, target, np.int32(min(cap, 2**31 - 1)), out)

    def entry_sums(
        self, weights, base, stride, particle, shift_start, shift_line, shift_prior, limit, total, count, lines, mass, moment
    ) -> None:  # fmt: skip
        self._run(
            "entry_sums", weights.dtype, (_blocks(len(base)),), weights, base, np.int32(stride), particle, shift_start,
            shift_line, shift_prior, limit, total, np.int32(len(base)), count, lines, mass, moment,
        )  # fmt: skip

    def samples(
        self, weights, base, stride, particle, shift_start, shift, limit, total, sample_start, sample_shift, sample_weight
    ) -> None:  # fmt: skip
        self._run(
            "samples", weights.dtype, (_blocks(len(base)),), weights, base, np.int32(stride), particle, shift_start, shift,
            limit, total, sample_start, np.int32(len(base)), sample_shift, sample_weight,
        )  # fmt: skip

    def column_sums(self, values, sums) -> None:
        self._run("column_sums", values.dtype, (_blocks(sums.size),), values, np.int32(len(values)), np.int64(sums.size), sums)

    def shell_sums(self, values, factor, voxel, start, sums) -> None:
        rows, shells = sums.shape
        self._run("shell_sums", factor.dtype, (shells, rows), values, factor, voxel, start, np.int32(values.shape[1]), sums)

    def own_power(self, raw, raw_weight, particle, run_start, sums) -> None:
        n = raw.shape[1]
        self._run(
            "own_power", raw_weight.dtype, (len(sums), _blocks(n)), raw, raw_weight, particle, run_start, np.int32(n), sums
        )

    def wave_planes(
        self, waves, lines, disc, sample_start, sample_count, sample_shift, sample_weight, plane_start, planes, plane_z, *,
        first: int, members: int,
    ) -> None:  # fmt: skip
        self._run(
            "wave_planes", sample_weight.dtype, (members, _blocks(len(disc))), waves, np.int32(waves.shape[1]), lines, disc,
            np.int32(len(disc)), sample_start, sample_count, sample_shift, sample_weight, plane_start, np.int32(first), planes,
            plane_z,
        )  # fmt: skip

    def row_sums(
        self, rows, waves, pair, row_start, particle, group, mass, plane_start, planes, plane_z, unmasked, weight, raw,
        raw_weight, half, gradient, total, noise, *, rows_at_once: int,
    ) -> None:  # fmt: skip
        n_rows, pairs = len(rows), rows.shape[1] // 2
        self._run(
            "row_sums", mass.dtype, (len(noise), _blocks(pairs)), rows, waves, np.int32(waves.shape[1]), pair, np.int32(pairs),
            np.int32(n_rows), np.int32(rows_at_once), row_start, particle, group, mass, plane_start, planes,
            np.int32(planes.shape[1]), plane_z, unmasked, weight, raw, raw_weight, half, np.int32(noise.shape[1]), gradient,
            total, noise,
        )  # fmt: skip


def _blocks(n: int) -> int:
    return -(-n // THREADS)
