"""CUDA C++ kernels compiled by g++ and run on the CPU, so that the same text is tested where there is no device.

`compile_module` stands in for `cupy.RawModule`. Blocks run one after another and threads by turns, so results repeat and no
race shows that depends on chance; but shared memory starts each block as NaN, and the threads' order alternates from barrier
to barrier, so that a forgotten `__syncthreads()` gives a wrong result. A device takes a kernel's arguments as bytes, and a
float32 array passed for `const double*` is read as rubbish; here every argument is held against the kernel's declaration.

Not supported: dynamic shared memory, warp shuffles and votes, textures, `#include`.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).with_suffix(".h")
COMPILER = ("g++", "-std=c++17", "-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC")

SCALARS = {
    "bool": np.bool_,
    "char": np.int8,
    "signed char": np.int8,
    "unsigned char": np.uint8,
    "short": np.int16,
    "unsigned short": np.uint16,
    "int": np.int32,
    "unsigned": np.uint32,
    "unsigned int": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
    "float2": np.complex64,
    "double2": np.complex128,
}
VECTORS = {"float4": np.float32, "int2": np.int32, "int4": np.int32}  # arrays of whole vectors, aligned as a device wants it
DEVICE_LIMITS = ((2**31 - 1, 65535, 65535), (1024, 1024, 64))  # of a grid and of a block, x y z
THREADS_PER_BLOCK = 1024

_KERNEL = re.compile(
    r"__global__\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(([^()]*)\)\s*\{"
)
_modules: dict[str, Module] = {}
_compiling = threading.Lock()


class CompileError(RuntimeError):
    """g++ refuses the kernel text; what it says is the message."""


def available() -> str | None:
    """None where kernels can be compiled, else the reason why a test that needs them is skipped."""
    return None if shutil.which("g++") else "kernels are compiled for the CPU by g++, which is not installed"


def compile_module(code: str, options: Sequence[str] = ()) -> Module:
    """The kernels of a text, compiled once per process for the same text and options.

    Options that g++ does not know (``--use_fast_math``) are left out.
    """
    known = tuple(o for o in options if o.startswith(("-D", "-U", "-std=", "--std=")))
    key = hashlib.sha256(repr((code, known)).encode()).hexdigest()
    with _compiling:
        if key not in _modules:
            _modules[key] = Module(code, known)
        return _modules[key]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel as declared."""

    name: str
    type: str  # without const and __restrict__
    pointer: bool

    @classmethod
    def parse(cls, text: str) -> Parameter:
        words = re.sub(r"\b(const|__restrict__)\b", " ", text).replace("*", " * ").split()
        *kind, name = words
        pointer = kind[-1:] == ["*"]
        parameter = cls(name, " ".join(kind[:-1] if pointer else kind), pointer)
        if parameter.type not in (SCALARS | VECTORS if pointer else SCALARS):
            raise CompileError(f"what NumPy type is the kernel parameter `{text.strip()}`?")
        return parameter

    def __str__(self) -> str:
        return f"{self.type}{'*' * self.pointer} {self.name}"

    def marshal(self, value: Any) -> np.ndarray:
        """The bytes that a launch passes for this parameter, as an array without dimensions."""
        if not self.pointer:
            if not isinstance(value, np.generic):  # CuPy makes long long of an int and double of a float, whatever is declared
                raise TypeError(f"wants a NumPy scalar, not {_describe(value)}")
            if value.dtype != SCALARS[self.type]:
                raise TypeError(f"wants {np.dtype(SCALARS[self.type])}, not {_describe(value)}")
            return np.array(value)
        if value is None:
            return np.array(0, np.uintp)
        if not isinstance(value, np.ndarray):
            raise TypeError(f"wants an array, not {_describe(value)}")
        kind = np.dtype(VECTORS.get(self.type) or SCALARS[self.type])
        if value.dtype != kind:
            raise TypeError(f"wants an array of {kind}, not {_describe(value)}")
        if not value.flags.c_contiguous:
            raise TypeError(f"wants a C-contiguous array, not {_describe(value)} with strides {value.strides}")
        address = value.__array_interface__["data"][0]
        if self.type in VECTORS:
            lanes = int(self.type[-1])
            if value.size % lanes or address % (lanes * kind.itemsize):
                raise TypeError(f"wants whole vectors, aligned; {_describe(value)} at {address:#x} is not")
        return np.array(address, np.uintp)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}, shape {value.shape}"
    return f"{type(value).__name__} {value!r}"


class Module:
    """A compiled kernel text. One launch at a time: the running thread's and block's numbers are global variables."""

    def __init__(self, code: str, options: tuple[str, ...]):
        # preprocessed on its own first: parameter lists then show types in place of macros, and no comments
        text = _run([*COMPILER[:2], *options, "-E", "-x", "c++", "-"], code)
        plain = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
        if re.search(r"\bextern\s+__shared__", plain):
            raise NotImplementedError("dynamic shared memory (extern __shared__) is not supported on the CPU")
        found = list(_KERNEL.finditer(plain))
        bodies = [_braced(plain, match.end() - 1) for match in found]
        elsewhere = plain
        for body in bodies:
            elsewhere = elsewhere.replace(body, "")
        self._parameters: dict[str, tuple[Parameter, ...]] = {}
        launchers = []
        for match, body in zip(found, bodies, strict=True):
            name, declared = match.groups()
            parameters = tuple(Parameter.parse(p) for p in declared.split(",") if p.strip() not in ("", "void"))
            self._parameters[name] = parameters
            values = ", ".join(f"*({p.type}{'*' * p.pointer}*)v[{i}]" for i, p in enumerate(parameters))
            barriers = "true" if "__syncthreads" in body + elsewhere else "false"
            launchers.append(
                f'extern "C" const char* launch_{name}(const unsigned* size, void** values) {{'
                f" return cuda_on_cpu::launch(size, [](void** v) {{ {name}({values}); }}, values, {barriers}); }}"
            )
        unit = "\n".join([f'#include "{HEADER}"', "namespace {", text, "}", *launchers])
        with tempfile.TemporaryDirectory(prefix="cuda_on_cpu_") as folder:
            library = Path(folder) / "kernels.so"  # stays loaded when its file is gone
            _run([*COMPILER, *options, "-w", "-x", "c++", "-", "-o", str(library)], unit)
            self._library = ctypes.CDLL(str(library))
        self._busy = threading.Lock()

    def get_function(self, name: str) -> Kernel:
        if name not in self._parameters:
            raise KeyError(f"no kernel {name!r} in this module; it has {sorted(self._parameters)}")
        launcher = self._library[f"launch_{name}"]
        launcher.restype = ctypes.c_char_p
        return Kernel(name, self._parameters[name], launcher, self._busy)


class Kernel:
    """A kernel to be called as CuPy's are: ``kernel(grid, block, args)``."""

    def __init__(self, name: str, parameters: tuple[Parameter, ...], launcher: Any, busy: threading.Lock):
        self.name, self.parameters = name, parameters
        self._launcher, self._busy = launcher, busy

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int = 0) -> None:
        if shared_mem:
            raise NotImplementedError(f"{self.name}: dynamic shared memory is not supported on the CPU")
        size = [n for shape, limit in zip((grid, block), DEVICE_LIMITS, strict=True) for n in self._size(shape, limit)]
        if prod(size[3:]) > THREADS_PER_BLOCK:
            raise ValueError(f"{self.name}: block {block} has more than {THREADS_PER_BLOCK} threads")
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, {len(args)} were passed")
        values = []
        for number, (parameter, value) in enumerate(zip(self.parameters, args, strict=True)):
            try:
                values.append(parameter.marshal(value))
            except TypeError as problem:
                raise TypeError(f"{self.name}, argument {number} `{parameter}`: {problem}") from None
        pointers = (ctypes.c_void_p * len(values))(*(v.__array_interface__["data"][0] for v in values))
        with self._busy:
            problem = self._launcher((ctypes.c_uint * 6)(*size), pointers)
        if problem:
            raise RuntimeError(f"{self.name}: {problem.decode()}")

    def _size(self, shape: tuple, limit: tuple[int, int, int]) -> tuple[int, ...]:
        if not isinstance(shape, tuple):
            raise TypeError(f"{self.name}: a grid or block is a tuple, not {shape!r}")
        full = tuple(index(n) for n in shape) + (1,) * (3 - len(shape))
        if len(full) != 3 or any(not 1 <= n <= most for n, most in zip(full, limit, strict=True)):
            raise ValueError(f"{self.name}: no device launches a grid or block of {shape}: from 1 up to {limit}")
        return full


def _braced(text: str, start: int) -> str:
    """From the brace at `start` to the one that closes it."""
    depth = 0
    for mark in re.compile("[{}]").finditer(text, start):
        depth += 1 if mark.group() == "{" else -1
        if not depth:
            return text[start : mark.end()]
    raise CompileError("a kernel's braces do not match")


def _run(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout
