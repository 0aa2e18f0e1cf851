"""A stand-in for CuPy on NumPy, as strict about host and device as CuPy, so that GPU code is tested where there is no GPU.

``with installed() as cupy:`` puts it into `sys.modules`. What it is strict about: host arrays are refused wherever CuPy wants
device arrays and the other way round; arrays are used on the device that they lie on, which is the thread's current one; only
functions that CuPy has are there; a result without dimensions is a device array; memory is limited; `empty` is full of NaN.
Streams do nothing, as everything is finished when a call returns, and pools keep nothing back.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.sparse
from stub_array import ABOUT, CUDARuntimeError, Function, Machine, OutOfMemoryError, ndarray

from vdamkit.backend.device import round_to_tf32

CONSTANTS = """bool_ int8 int16 int32 int64 intp uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 dtype
    integer floating complexfloating number generic pi e inf nan newaxis""".split()
FUNCTIONS = """abs absolute add all allclose amax amin angle any append arange arccos arccosh arcsin arcsinh arctan arctan2
    arctanh argmax argmin argpartition argsort argwhere around array_equal atleast_1d atleast_2d atleast_3d bincount bitwise_and
    bitwise_or bitwise_xor broadcast_arrays broadcast_to cbrt ceil clip column_stack concatenate conj conjugate convolve
    copysign copyto cos cosh count_nonzero cross cumprod cumsum deg2rad degrees diag diagonal diff digitize divide divmod dot
    dstack einsum empty empty_like equal exp exp2 expand_dims expm1 eye fabs flatnonzero flip floor floor_divide fmax fmin fmod
    full full_like gradient greater greater_equal histogram hstack hypot identity imag indices inner interp invert isclose
    isfinite isin isinf isnan ldexp left_shift less less_equal lexsort linspace log log10 log1p log2 logaddexp logical_and
    logical_not logical_or logical_xor logspace matmul max maximum mean median meshgrid min minimum mod moveaxis multiply
    nan_to_num nanmax nanmean nanmin nansum negative nonzero not_equal ones ones_like outer partition percentile positive power
    prod quantile rad2deg radians ravel ravel_multi_index real reciprocal remainder repeat reshape right_shift rint roll
    rollaxis rot90 round searchsorted setdiff1d sign signbit sin sinc sinh sort split sqrt square squeeze stack std subtract sum
    swapaxes take take_along_axis tan tanh tensordot tile trace transpose tri tril triu true_divide trunc unique unravel_index
    vander var vdot vstack where zeros zeros_like""".split()
LINALG = "cholesky det eigh eigvalsh inv lstsq matrix_power norm pinv qr solve svd".split()
FFT = """fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn hfft ihfft fftfreq rfftfreq fftshift
    ifftshift""".split()
RANDOM = frozenset("exponential integers normal permutation poisson random standard_normal uniform".split())
PINNED = {"empty_pinned": np.empty, "zeros_pinned": np.zeros, "empty_like_pinned": np.empty_like}


class _Bound:
    """Base of CuPy's classes below; each stub derives its own from them, which know its machine."""

    _machine: Machine

    @classmethod
    def to(cls, machine: Machine) -> type:
        return type(cls.__name__, (cls,), {"_machine": machine})


class Device(_Bound):
    cublas_handle = 1

    compute_capability = "90"

    def __init__(self, device: Any = None):
        self.id = self._machine.device if device is None else int(device)

    def use(self) -> None:
        self._machine.check(self.id)
        self._machine.device = self.id

    def __enter__(self) -> Device:
        self._machine.before.append(self._machine.device)
        try:
            self.use()
        except CUDARuntimeError:
            self._machine.before.pop()
            raise
        return self

    def __exit__(self, *problem: Any) -> None:
        self._machine.device = self._machine.before.pop()

    def synchronize(self) -> None:
        self._machine.check(self.id)

    @property
    def mem_info(self) -> tuple[int, int]:
        self._machine.check(self.id)
        total = self._machine.shared.memory
        return total - self._machine.shared.used[self.id], total

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)


class Event(_Bound):
    done = True

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False):
        self._machine.check(self._machine.device)
        self._device = self._machine.device

    def record(self, stream: Any = None) -> None:
        self._machine.check(self._device)

    def synchronize(self) -> None:
        self._machine.check(self._device)


class Stream(_Bound):
    done = True

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None):
        if not null:
            self._machine.check(self._machine.device)
        self.device_id = -1 if null else self._machine.device

    def __enter__(self) -> Stream:
        self.synchronize()
        return self

    def __exit__(self, *problem: Any) -> None:
        pass

    def use(self) -> Stream:
        return self.__enter__()

    def synchronize(self) -> None:
        self._machine.check(self._machine.device if self.device_id < 0 else self.device_id)

    def wait_event(self, event: Event) -> None:
        self.synchronize()

    def record(self, event: Event | None = None) -> Event:
        self.synchronize()
        return event or self._machine.shared.cupy.cuda.Event()


class MemoryPool(_Bound):
    """Counts what was allocated while it was the thread's pool, on the current device."""

    def __init__(self) -> None:
        self._used: dict[int, int] = {}

    def malloc(self, size: int) -> Any:
        raise NotImplementedError("in the stub a pool's malloc only tells using_allocator which pool is meant")

    def used_bytes(self) -> int:
        return self._used.get(self._machine.device, 0)

    total_bytes = used_bytes

    def free_bytes(self) -> int:
        return 0

    def free_all_blocks(self, stream: Any = None) -> None:
        self._machine.check(self._machine.device)


class RawKernel(_Bound):
    """Compiled when it is first called, as CuPy's; host arrays are refused (CuPy passes one of size 1 by value)."""

    def __init__(self, code: str, name: str, options: tuple = (), **backend: Any):
        if not isinstance(options, tuple):
            raise TypeError(f"Argument 'options' has incorrect type (expected tuple, got {type(options).__name__})")
        self.code, self.name, self.options = code, name, options

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int = 0) -> None:
        self._machine.check(self._machine.device)
        for number, value in enumerate(args):
            if isinstance(value, np.ndarray):
                raise TypeError(f"{self.name}, argument {number}: an array of the host is passed to a kernel")
        kernel = cuda_on_cpu.compile_module(self.code, self.options).get_function(self.name)
        kernel(grid, block, tuple(self._machine.unwrap(a) for a in args), shared_mem=shared_mem)


class RawModule(_Bound):
    def __init__(self, *, code: str, options: tuple = (), **backend: Any):
        self.code, self.options = code, options

    def get_function(self, name: str) -> RawKernel:
        return self._machine.shared.cupy.RawKernel(self.code, name, self.options)


class csr_matrix(_Bound):
    """As much of it as ``matrix @ dense`` needs."""

    def __init__(self, parts: tuple, shape: tuple[int, int] | None = None):
        self._host = scipy.sparse.csr_matrix(self._machine.unwrap(parts), shape=shape)
        self.data, self.indices, self.indptr = self._machine.wrap([self._host.data, self._host.indices, self._host.indptr])
        self.shape, self.dtype, self.nnz = self._host.shape, self._host.dtype, self._host.nnz

    def __matmul__(self, dense: ndarray) -> ndarray:
        for array in (self.data, dense):
            self._machine.unwrap(array, sequences=False)
        return self._machine.wrap(self._host @ dense._host)

    dot = __matmul__


class _Generator:
    """What `cupy.random.default_rng` returns."""

    def __init__(self, machine: Machine, seed: Any = None):
        self._machine, self._host = machine, np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Any:
        if name not in RANDOM:
            raise AttributeError(name)
        self._machine.check(self._machine.device)
        return lambda *args, **kwargs: self._machine.wrap(getattr(self._host, name)(*args, **kwargs))


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def _conversions(machine: Machine) -> dict[str, Any]:
    """The functions that take arrays of either side."""

    def asarray(a: Any, dtype: Any = None, order: str | None = None, *, blocking: bool = False) -> ndarray:
        if isinstance(a, ndarray):
            return a if dtype in (None, a.dtype) else a.astype(dtype)
        machine.check(machine.device)
        host = np.array(machine.unwrap(a) if isinstance(a, list | tuple) else a, dtype=dtype, order=order or "K")
        if host.dtype.kind not in "biufc":
            raise ValueError(f"Unsupported dtype {host.dtype}")
        return machine.wrap(host)

    def array(a: Any, dtype: Any = None, copy: bool = True, order: str = "K", **options: Any) -> ndarray:
        if isinstance(a, ndarray) and copy:
            a = a.copy()
        return asarray(a, dtype, order)

    def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
        if isinstance(a, ndarray):
            return machine.call(np.ascontiguousarray, (a,), {"dtype": dtype})
        return asarray(a, dtype, "C")

    def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
        return a.get(order=order, out=out) if isinstance(a, ndarray) else np.asarray(a, order=order)

    return {"asarray": asarray, "array": array, "ascontiguousarray": ascontiguousarray, "asnumpy": asnumpy}


def _cuda(machine: Machine) -> ModuleType:
    shared, bound = machine.shared, {c.__name__: c.to(machine) for c in (Device, Event, Stream, MemoryPool)}
    bound["Stream"].null = bound["Stream"](null=True)

    def device_count() -> int:
        if not shared.count:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return shared.count

    def properties(device: int) -> dict[str, Any]:
        machine.check(device)
        return {"name": b"stub", "totalGlobalMem": shared.memory, "multiProcessorCount": 4, "major": 9, "minor": 0}

    @contextmanager
    def using_allocator(allocator: Any = None) -> Iterator[None]:
        before, machine.pool = machine.pool, allocator.__self__ if allocator else shared.pool
        try:
            yield
        finally:
            machine.pool = before

    runtime = _module(
        "cupy.cuda.runtime",
        CUDARuntimeError=CUDARuntimeError,
        CUDA_R_32F=0,
        getDeviceCount=device_count,
        getDevice=lambda: machine.device,
        setDevice=lambda device: bound["Device"](device).use(),
        getDeviceProperties=properties,
        deviceSynchronize=lambda: bound["Device"]().synchronize(),
        memGetInfo=lambda: bound["Device"]().mem_info,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
    )
    memory = _module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError, MemoryPool=bound["MemoryPool"])
    compiler = _module("cupy.cuda.compiler", CompileException=cuda_on_cpu.CompileError)
    here = {"runtime": runtime, "memory": memory, "compiler": compiler, "using_allocator": using_allocator, **bound}
    here |= {"is_available": lambda: shared.count > 0, "get_current_stream": lambda: bound["Stream"].null}
    here["cublas"] = _module("cupy.cuda.cublas", gemmEx=gemm_ex, **CUBLAS)
    here["get_elapsed_time"] = lambda start, end: 0.0
    return _module("cupy.cuda", **here)


def gemm_ex(handle, turn_a, turn_b, m, n, k, alpha, a, kind_a, lda, b, kind_b, ldb, beta, c, kind_c, ldc, compute, algorithm):
    """cuBLAS's general product by its definition: matrices lie in memory column by column; TF32 factors."""

    def matrix(pointer: int, rows: int, columns: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_float * (rows * columns)).from_address(pointer)).reshape(columns, rows).T

    if (kind_a, kind_b, kind_c, compute) != (0, 0, 0, CUBLAS["CUBLAS_COMPUTE_32F_FAST_TF32"]):
        raise ValueError("the stub knows float32 with TF32 factors alone")
    first, second = matrix(a, lda, m if turn_a else k), matrix(b, ldb, k if turn_b else n)
    first, second = (round_to_tf32(x) for x in (first.T if turn_a else first, second.T if turn_b else second))
    scale, old = (ctypes.c_float.from_address(pointer).value for pointer in (alpha, beta))
    out = matrix(c, ldc, n)
    out[:m] = scale * (first @ second) + (old * out[:m] if old else 0)


CUBLAS = {"CUBLAS_OP_N": 0, "CUBLAS_OP_T": 1, "CUBLAS_COMPUTE_32F_FAST_TF32": 77, "CUBLAS_GEMM_DEFAULT": -1}


def make_stub(n_devices: int = 1, memory: int | None = None) -> ModuleType:
    """A module like `cupy`, of so many devices with so many bytes each.

    ``lose(device)`` on it makes a device fail for good; ``limit(device, bytes)`` bounds its memory without its saying so, as
    another program does that takes memory between a look and the allocation; None ends that.
    """
    shared = SimpleNamespace(count=n_devices, memory=memory or 80 * 2**30, used=[0] * n_devices, lost=set(), charged=set())
    shared.hidden = {}
    shared.lock, shared.pool = threading.RLock(), MemoryPool()
    machine = Machine(shared)
    machine.pool = shared.pool = MemoryPool.to(machine)()
    pinned = SimpleNamespace(free_all_blocks=lambda: None, n_free_blocks=lambda: 0)

    def functions(source: Any, names: Any) -> dict[str, Function]:
        return {name: Function(machine, getattr(source, name)) for name in names}

    random = _module("cupy.random", default_rng=lambda seed=None: _Generator(machine, seed))
    random.__getattr__ = lambda name: getattr(_Generator(machine), name)
    cupy = shared.cupy = _module(
        "cupy",
        **{name: getattr(np, name) for name in CONSTANTS},
        **functions(np, FUNCTIONS),
        **functions(np, ABOUT - {"next_fast_len"}),
        **_conversions(machine),
        ndarray=ndarray,
        linalg=_module("cupy.linalg", **functions(np.linalg, LINALG)),
        fft=_module("cupy.fft", **functions(np.fft, FFT)),
        random=random,
        cuda=_cuda(machine),
        RawKernel=RawKernel.to(machine),
        RawModule=RawModule.to(machine),
        get_default_memory_pool=lambda: shared.pool,
        get_default_pinned_memory_pool=lambda: pinned,
        get_array_module=lambda *args: shared.cupy if any(isinstance(a, ndarray) for a in args) else np,
        lose=shared.lost.add,
        limit=lambda device, size: shared.hidden.update({device: shared.memory if size is None else size}),
    )
    fft = _module("cupyx.scipy.fft", **functions(scipy.fft, [*FFT, "next_fast_len"]))
    sparse = _module("cupyx.scipy.sparse", csr_matrix=csr_matrix.to(machine))
    ndimage = _module("cupyx.scipy.ndimage", **functions(scipy.ndimage, ["map_coordinates"]))
    cupyx = _module("cupyx", scipy=_module("cupyx.scipy", fft=fft, sparse=sparse, ndimage=ndimage), **PINNED)
    cupyx.scatter_add = cupy.add.at
    shared.modules = [cupy, cupy.linalg, cupy.fft, cupy.random, cupy.cuda, cupy.cuda.runtime, cupy.cuda.memory]
    shared.modules += [cupy.cuda.compiler, cupyx, cupyx.scipy, fft, sparse, ndimage]
    cupy.stub_modules = {module.__name__: module for module in shared.modules}
    return cupy


@contextmanager
def installed(n_devices: int = 1, memory_bytes: int | None = None) -> Iterator[ModuleType]:
    """``import cupy`` finds a new stub within the block, and afterwards what it found before."""

    def ours(name: str) -> bool:
        return name.partition(".")[0] in ("cupy", "cupyx")

    before = {name: module for name, module in sys.modules.items() if ours(name)}
    stub = make_stub(n_devices, memory_bytes)
    for name in before:
        del sys.modules[name]
    sys.modules.update(stub.stub_modules)
    try:
        yield stub
    finally:
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
