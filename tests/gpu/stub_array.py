"""The device arrays of the stand-in for CuPy (stub_cupy.py), and the machine that they lie on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

PAGE = 512  # CuPy allocates whole multiples
JOINING = frozenset("concatenate stack vstack hstack dstack column_stack".split())  # of a sequence of device arrays
TAKES_SEQUENCE = JOINING | frozenset("zeros ones empty full indices ravel_multi_index".split())
ABOUT = frozenset("can_cast finfo iinfo isscalar iscomplexobj isrealobj issubdtype ndim promote_types result_type".split())
ABOUT |= frozenset("shape size next_fast_len".split())  # their results stay on the host
ATOMIC = frozenset("iILfdFD")  # the types that `add.at` takes; of the 64-bit integers only the unsigned one
ATOMIC_UFUNCS = ("add", "subtract", "maximum", "minimum")
METHODS = """all any argmax argmin argpartition argsort astype clip conj conjugate cumprod cumsum diagonal dot fill flatten max
    mean min nonzero partition prod put repeat round searchsorted sort std sum take trace var""".split()
VIEW_METHODS = "ravel reshape squeeze swapaxes transpose view".split()  # they launch nothing, so any device may be current
OPERATORS = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide, "floordiv": np.floor_divide},
    **{"mod": np.remainder, "pow": np.power, "matmul": np.matmul, "and": np.bitwise_and, "or": np.bitwise_or},
    **{"xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift, "divmod": np.divmod},
}
COMPARISONS = {"lt": "less", "le": "less_equal", "eq": "equal", "ne": "not_equal", "gt": "greater", "ge": "greater_equal"}
UNARY = {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}


class CUDARuntimeError(RuntimeError):
    """What CuPy raises when the driver reports an error."""


class OutOfMemoryError(MemoryError):
    """What CuPy raises when a device's memory is full."""


class Machine(threading.local):
    """Devices, their memory, and what each thread has chosen: its current device and pool (the thread-local part)."""

    def __init__(self, shared: SimpleNamespace):  # runs once in each thread that comes by
        self.shared, self.device, self.pool = shared, 0, shared.pool
        self.before: list[int] = []  # current devices outside of `with Device(i)` blocks

    def check(self, device: int) -> None:
        if not self.shared.count:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        if not 0 <= device < self.shared.count:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        if device in self.shared.lost:
            raise CUDARuntimeError("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable")

    def unwrap(self, value: Any, *, sequences: bool = True) -> Any:
        """NumPy's version of an argument; an array of the host, or of another device than the current one, is refused."""
        if isinstance(value, ndarray):
            self.check(value._device)
            if value._device != self.device:
                where = f"array device = {value._device} while current = {self.device}"
                raise ValueError(f"Array device must be same as the current device: {where}")
            return value._host
        if (isinstance(value, np.ndarray) and value.ndim) or (isinstance(value, list | tuple) and not sequences):
            raise TypeError(f"Unsupported type {type(value)}")
        if isinstance(value, list | tuple):
            return type(value)(self.unwrap(v) for v in value)
        return value

    def wrap(self, result: Any, device: int | None = None) -> Any:
        if isinstance(result, list | tuple):
            return (list if isinstance(result, list) else tuple)(self.wrap(r, device) for r in result)
        if not isinstance(result, np.ndarray | np.generic | bool | int | float | complex):
            return result
        array = ndarray.__new__(ndarray)
        array._machine, array._device = self, self.device if device is None else device
        array._host = np.asarray(result)
        self.charge(array._host, array._device)
        return array

    def charge(self, host: np.ndarray, device: int) -> None:
        """Count the memory that an array or the base of a view holds, once, until it is collected."""
        while isinstance(host.base, np.ndarray):
            host = host.base
        shared, size, pool = self.shared, -(-host.nbytes // PAGE) * PAGE, self.pool
        with shared.lock:
            if id(host) in shared.charged:
                return
            if shared.used[device] + size > min(shared.memory, shared.hidden.get(device, shared.memory)):
                raise OutOfMemoryError(
                    f"Out of memory allocating {size:,} bytes (allocated so far: {shared.used[device]:,} bytes)."
                )
            shared.charged.add(id(host))
            shared.used[device] += size
            pool._used[device] = pool._used.get(device, 0) + size
        weakref.finalize(host, _release, shared, id(host), device, size, pool).atexit = False

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A NumPy function on what the device arrays hold."""
        self.check(self.device)
        name = function.__name__
        for key in {"initial", "where", "workers"} & kwargs.keys():
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")
        plain = not isinstance(function, np.ufunc)
        first = args[0] if args else None
        if isinstance(first, list | tuple) and name not in TAKES_SEQUENCE:
            raise TypeError(f"{name}: Unsupported type {type(first)}")
        if name in JOINING and not all(isinstance(a, ndarray) for a in first):
            raise TypeError("Only cupy arrays can be concatenated")
        if name == "repeat" and any(isinstance(v, ndarray) for v in (*args[1:], *kwargs.values())):
            raise ValueError("cupy.ndaray cannot be specified as `repeats` argument.")
        if name == "searchsorted" and not all(isinstance(a, ndarray) for a in args[:2]):
            raise NotImplementedError("Only int or ndarray are supported for v")
        result = function(
            *(self.unwrap(a, sequences=plain) for a in args),
            **{k: self.unwrap(v) for k, v in kwargs.items()},
        )
        if isinstance(kwargs.get("out"), ndarray):
            return kwargs["out"]
        result = self.wrap(result)
        if name in ("empty", "empty_like") and result.dtype != bool:
            result._host.ravel("K").view(np.uint8).fill(255)
        return result


def _release(shared: SimpleNamespace, key: int, device: int, size: int, pool: Any) -> None:
    with shared.lock:
        shared.charged.discard(key)
        shared.used[device] -= size
        pool._used[device] -= size


class ndarray:
    """A device array: a NumPy array and the number of its device, behind CuPy's interface."""

    __hash__ = None

    def __init__(self, shape: Any, dtype: Any = float, *args: Any, **kwargs: Any):
        raise NotImplementedError("the stub has no cupy.ndarray(shape); use cupy.empty")

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: self._view(self._host.T))
    real = property(lambda self: self._view(self._host.real))
    imag = property(lambda self: self._view(self._host.imag))
    device = property(lambda self: self._machine.shared.cupy.cuda.Device(self._device))

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self._host.__array_interface__["data"][0], device_id=self._device, device=self.device)

    def _view(self, host: np.ndarray) -> ndarray:
        self._machine.check(self._device)
        return self._machine.wrap(host, self._device)

    def get(self, stream: Any = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:
        self._machine.check(self._device)
        if out is None:
            return np.array(self._host, order=order)
        out[...] = self._host
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        self._machine.check(self._device)
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype:
            raise TypeError(f"{getattr(arr, 'dtype', type(arr))} array cannot be set to {self.dtype} array")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        self._host[...] = arr

    def copy(self, order: str = "C") -> ndarray:
        """On the current device, wherever the array lies: CuPy's way from device to device."""
        for device in (self._device, self._machine.device):
            self._machine.check(device)
        return self._machine.wrap(self._host.copy(order))

    def item(self, *index: int) -> Any:
        return self.get().item(*index)

    def tolist(self) -> Any:
        return self.get().tolist()

    def __getitem__(self, key: Any) -> ndarray:
        arrays = any(isinstance(k, ndarray) for k in (key if isinstance(key, tuple) else (key,)))
        host = self._machine.unwrap(self) if arrays else self._host
        key = self._machine.unwrap(key)
        found = host[key]
        if isinstance(found, np.generic):  # CuPy gives a view even of one element
            found = host[(*key, ...) if isinstance(key, tuple) else (key, ...)]
        return self._view(found)

    def __setitem__(self, key: Any, value: Any) -> None:
        machine = self._machine
        machine.unwrap(self)[machine.unwrap(key)] = machine.unwrap(value, sequences=False)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        function = getattr(self._machine.shared.cupy, ufunc.__name__)
        return function(*inputs, **kwargs) if method == "__call__" else getattr(function, method)(*inputs, **kwargs)

    def __array_function__(self, function: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        namespace = self._machine.shared.cupy
        for name in (*function.__module__.split(".")[1:], function.__name__):
            namespace = getattr(namespace, name)
        return namespace(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> ndarray:
        return self.copy()

    def __repr__(self) -> str:
        return repr(self.get())


def _add_methods() -> None:
    """The operators and methods of device arrays that are NumPy's, by name."""

    def method(name: str, *, view: bool) -> Callable:
        function = getattr(np.ndarray, name)
        if view:
            return lambda self, *args, **kwargs: self._view(function(self._host, *args, **kwargs))
        return lambda self, *args, **kwargs: self._machine.call(function, (self, *args), kwargs)

    for name in (*METHODS, *VIEW_METHODS):
        setattr(ndarray, name, method(name, view=name in VIEW_METHODS))

    def operators(name: str, ufunc: np.ufunc) -> None:
        def operator(self, other):
            return NotImplemented if hasattr(other, "nnz") else self._machine.call(ufunc, (self, other), {})

        setattr(ndarray, f"__{name}__", operator)
        setattr(ndarray, f"__r{name}__", lambda self, other: self._machine.call(ufunc, (other, self), {}))
        setattr(ndarray, f"__i{name}__", lambda self, other: self._machine.call(ufunc, (self, other), {"out": self}))

    for name, ufunc in OPERATORS.items():
        operators(name, ufunc)
    for name, ufunc in {**UNARY, **{k: getattr(np, v) for k, v in COMPARISONS.items()}}.items():
        setattr(ndarray, f"__{name}__", lambda self, *other, ufunc=ufunc: self._machine.call(ufunc, (self, *other), {}))
    for convert in (bool, float, int, complex):
        setattr(ndarray, f"__{convert.__name__}__", lambda self, convert=convert: convert(self.get()))
    ndarray.__index__ = lambda self: self.get().__index__()


_add_methods()


class Function:
    """A module function of CuPy: NumPy's of the same name, between device arrays."""

    def __init__(self, machine: Machine, function: Callable):
        self._machine, self._function, self.__name__ = machine, function, function.__name__
        if self.__name__ in ATOMIC_UFUNCS:
            self.at = self._at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.__name__ in ABOUT:  # asks about types and shapes, launches nothing
            return self._function(*(a._host if isinstance(a, ndarray) else a for a in args), **kwargs)
        return self._machine.call(self._function, args, kwargs)

    def _at(self, array: ndarray, *args: Any) -> None:
        if array.dtype.char not in ATOMIC:
            raise TypeError(f"{self.__name__}.at only supports int32, uint32, uint64, floats and complex, not {array.dtype}")
        self._machine.call(self._function.at, (array, *args), {})
