"""The harness itself: kernels on the CPU behave as on a device, and the stand-in for CuPy refuses what CuPy refuses."""

import sys
import threading

import cuda_on_cpu
import numpy as np
import pytest
from stub_cupy import installed

needs_compiler = pytest.mark.skipif(cuda_on_cpu.available() is not None, reason=cuda_on_cpu.available() or "")

KERNELS = r"""
#define THREADS 64

extern "C" __global__ void __launch_bounds__(THREADS)
    total(const REAL* __restrict__ x /* rows, a block each */, int n, REAL* __restrict__ out) {
  __shared__ REAL part[THREADS];
  int t = threadIdx.x;
  REAL sum = 0;
  for (int i = t; i < n; i += THREADS) sum += x[(long long)blockIdx.x * n + i];
  part[t] = sum;
  __syncthreads();
  for (int step = THREADS / 2; step > 0; step /= 2) {
    if (t < step) part[t] += part[t + step];
    __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = part[0];
}

extern "C" __global__ void turned(REAL* out) {
  __shared__ REAL part[THREADS];
  part[threadIdx.x] = threadIdx.x;
#ifndef FORGOTTEN
  __syncthreads();
#endif
  out[threadIdx.x] = part[(threadIdx.x + 1) % THREADS];
  __syncthreads();
}

extern "C" __global__ void parted() {
  if (threadIdx.x) __syncthreads();
  else
    __syncthreads();
}

extern "C" __global__ void count(const COMPLEX* x, unsigned long long* sum, int* most, long long by) {
  int i = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  atomicAdd(sum, (unsigned long long)(by * llrintf(x[i].x - x[i].y)));
  atomicMax(most, i);
}
"""
FLOAT = ("-DREAL=float", "-DCOMPLEX=float2", "--use_fast_math")
DOUBLE = ("-DREAL=double", "-DCOMPLEX=double2", "-std=c++17")


# kernels on the CPU ------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(("options", "dtype"), [(FLOAT, np.float32), (DOUBLE, np.float64)])
def test_a_block_reduction_with_barriers_is_right(options, dtype):
    x, out = np.arange(3 * 1000, dtype=dtype).reshape(3, 1000), np.zeros(3, dtype)
    cuda_on_cpu.compile_module(KERNELS, options).get_function("total")((3,), (64,), (x, np.int32(1000), out))
    assert np.array_equal(out, x.sum(1))


@needs_compiler
def test_a_forgotten_barrier_shows():
    out = np.zeros(64, np.float32)
    cuda_on_cpu.compile_module(KERNELS, FLOAT).get_function("turned")((1,), (64,), (out,))
    assert np.array_equal(out, np.roll(np.arange(64), -1))
    cuda_on_cpu.compile_module(KERNELS, (*FLOAT, "-DFORGOTTEN")).get_function("turned")((1,), (64,), (out,))
    assert np.isnan(out).any()


@needs_compiler
def test_threads_that_part_at_barriers_are_reported_and_the_next_launch_works():
    module = cuda_on_cpu.compile_module(KERNELS, FLOAT)
    with pytest.raises(RuntimeError, match=r"parted: threads of block \(0, 0, 0\) wait at different barriers"):
        module.get_function("parted")((1,), (32,), ())
    out = np.zeros(64, np.float32)
    module.get_function("turned")((1,), (64,), (out,))
    assert np.array_equal(out, np.roll(np.arange(64), -1))


@needs_compiler
def test_64_bit_atomics_add_signed_numbers():
    x = (np.arange(12) - 20).astype(np.complex64)
    total, most = np.zeros(1, np.uint64), np.full(1, -1, np.int32)
    count = cuda_on_cpu.compile_module(KERNELS, FLOAT).get_function("count")
    count((3, 2), (2,), (x, total, most, np.int64(10**12)))
    assert total.view(np.int64)[0] == 10**12 * (np.arange(12) - 20).sum()
    assert most[0] == 11


@needs_compiler
def test_a_device_has_no_signed_64_bit_sum():
    code = 'extern "C" __global__ void wrong(long long* sum) { atomicAdd(sum, 1LL); }'
    with pytest.raises(cuda_on_cpu.CompileError, match="atomicAdd"):
        cuda_on_cpu.compile_module(code, ())


@needs_compiler
@pytest.mark.parametrize(
    ("number", "value", "told"),
    [
        (0, np.zeros(4), "argument 0 `float* x`: wants an array of float32, not an array of float64"),
        (0, np.zeros((4, 4), np.float32)[:, ::2], "wants a C-contiguous array"),
        (0, np.float32(1), "wants an array, not float32"),
        (1, 4, "argument 1 `int n`: wants a NumPy scalar, not int 4"),
        (1, np.int64(4), "wants int32, not int64"),
        (1, np.zeros(1, np.int32), "wants a NumPy scalar, not an array"),
    ],
)
def test_an_argument_of_another_type_is_refused(number, value, told):
    args = [np.zeros(4, np.float32), np.int32(4), np.zeros(1, np.float32)]
    args[number] = value
    with pytest.raises(TypeError, match="total") as problem:
        cuda_on_cpu.compile_module(KERNELS, FLOAT).get_function("total")((1,), (64,), tuple(args))
    assert told in str(problem.value)


@needs_compiler
def test_a_launch_that_no_device_takes_is_refused():
    parted = cuda_on_cpu.compile_module(KERNELS, FLOAT).get_function("parted")
    for grid, block in (((0,), (32,)), ((1, 70000), (32,)), ((1,), (32, 64)), ((1,), (1, 1, 128))):
        with pytest.raises(ValueError):
            parted(grid, block, ())
    with pytest.raises(TypeError, match="takes 0 arguments, 1 were passed"):
        parted((1,), (32,), (np.int32(1),))


# the stand-in for CuPy ---------------------------------------------------------------------------------------------------


def test_cupy_is_found_only_within_the_block():
    before = {name for name in sys.modules if name.startswith("cupy")}
    with installed() as stub:
        import cupy
        import cupyx.scipy.fft
        import cupyx.scipy.sparse

        assert cupy is stub and cupyx.scipy.fft.next_fast_len(13) == 14
        matrix = cupyx.scipy.sparse.csr_matrix(tuple(cupy.asarray(a) for a in ([2.0, 3.0], [1, 0], [0, 1, 2])), shape=(2, 2))
        assert (matrix @ cupy.asarray([1.0, 10.0])).get().tolist() == [20, 3]
    assert {name for name in sys.modules if name.startswith("cupy")} == before


def test_arrays_of_the_host_are_refused():
    with installed() as xp:
        x, host = xp.arange(3), np.arange(3)
        refused = (
            lambda: x + host,
            lambda: host * x,
            lambda: xp.exp(host),
            lambda: np.maximum(host, x),
            lambda: xp.concatenate([x, host]),
            lambda: x[host],
            lambda: x.__setitem__(0, host[:1]),
            lambda: x.take(host),
            lambda: xp.where(x > 1, host, x),
        )
        for number, act in enumerate(refused):
            with pytest.raises(TypeError, match=r"Unsupported type|Only cupy arrays"):
                act()
                pytest.fail(f"number {number} was not refused")
        with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
            np.asarray(x)
        with pytest.raises(AttributeError):
            _ = xp.memmap


def test_what_comes_back_lies_on_the_device():
    with installed() as xp:
        x = xp.asarray(np.arange(6.0).reshape(2, 3))
        for result in (
            x.sum(),
            x[0, 1],
            np.float32(2) * x,
            np.sqrt(x),
            x.T @ x,
            1 - x,
            xp.fft.rfftn(x),
            x == 1,
            xp.allclose(x, x),
        ):
            assert isinstance(result, xp.ndarray)
        assert x.sum().shape == () and float(x.sum()) == 15 and int(x[1, 2]) == 5
        row = x[0]
        row += 1
        x[x > 4] = 0
        x[:, [0, 2]] *= 2
        assert x.get().tolist() == [[2, 2, 6], [6, 4, 0]] and xp.asnumpy(row).tolist() == [2, 2, 6]
        sums = xp.zeros(2, np.float32)
        xp.add.at(sums, xp.asarray([0, 0, 1]), xp.ones(3, np.float32))
        assert sums.tolist() == [2, 1]
        with pytest.raises(TypeError, match="int64"):
            xp.add.at(xp.zeros(2, np.int64), xp.asarray([0]), 1)
        assert np.isnan(xp.empty(3).get()).all()
        assert xp.random.default_rng(1).standard_normal((2, 3)).shape == (2, 3)


def test_memory_is_limited_and_given_back():
    with installed(memory_bytes=10_000) as xp:
        pool, device = xp.get_default_memory_pool(), xp.cuda.Device(0)
        x = xp.zeros(1000, np.float32)
        assert pool.used_bytes() == 4096 and device.mem_info == (10_000 - 4096, 10_000)
        view = x[10:].reshape(-1, 10)
        y = x + 1
        with pytest.raises(xp.cuda.memory.OutOfMemoryError):
            x + y
        del x, y
        assert pool.used_bytes() == 4096
        del view
        assert pool.used_bytes() == 0
        own = xp.cuda.MemoryPool()
        with xp.cuda.using_allocator(own.malloc):
            z = xp.zeros(10)
        assert z.size == 10 and (own.used_bytes(), pool.used_bytes()) == (512, 0) and device.mem_info[0] == 10_000 - 512


def test_two_devices_do_not_mix_and_each_thread_has_its_own():
    with installed(n_devices=2) as xp:
        x, seen = xp.ones(3), []
        with xp.cuda.Device(1):
            y = xp.ones(3)
            with pytest.raises(ValueError, match="array device = 0 while current = 1"):
                x + y
            assert x[1:].device.id == 0 and x.copy().device.id == 1 and y.get().sum() == 3
            thread = threading.Thread(target=lambda: seen.append(xp.cuda.Device().id))
            thread.start()
            thread.join()
        assert seen == [0] and xp.cuda.Device().id == 0
        with pytest.raises(ValueError, match="array device = 1 while current = 0"):
            y.sum()
        with pytest.raises(xp.cuda.runtime.CUDARuntimeError, match="invalid device"):
            xp.cuda.Device(2).use()


def test_a_lost_device_fails_in_everything():
    with installed(n_devices=2) as xp:
        x = xp.ones(3)
        stream = xp.cuda.Stream(non_blocking=True)
        xp.lose(0)
        for act in (lambda: x + 1, x.get, x.copy, lambda: x[0], lambda: xp.zeros(2), stream.synchronize, xp.cuda.Device(0).use):
            with pytest.raises(xp.cuda.runtime.CUDARuntimeError, match="cudaErrorDevicesUnavailable"):
                act()
        with xp.cuda.Device(1):
            assert float(xp.ones(3).sum()) == 3


def test_without_a_device_cupy_says_so():
    with installed(n_devices=0) as xp, pytest.raises(xp.cuda.runtime.CUDARuntimeError, match="cudaErrorNoDevice"):
        xp.cuda.runtime.getDeviceCount()


@needs_compiler
def test_kernels_take_device_arrays_only():
    with installed(n_devices=2) as xp:
        total = xp.RawModule(code=KERNELS, options=FLOAT).get_function("total")
        x, out = xp.ones((2, 100), np.float32), xp.empty(2, np.float32)
        with xp.cuda.Stream(non_blocking=True) as stream:
            total((2,), (64,), (x, np.int32(100), out))
            stream.record().synchronize()
        assert out.tolist() == [100, 100]
        with pytest.raises(TypeError, match="total, argument 0: an array of the host"):
            total((2,), (64,), (x.get(), np.int32(100), out))
        with pytest.raises(ValueError, match="same as the current device"), xp.cuda.Device(1):
            total((2,), (64,), (x, np.int32(100), out))
