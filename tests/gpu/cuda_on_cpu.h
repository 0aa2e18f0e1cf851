// What CUDA C++ has and C++ lacks, for kernels that g++ compiles (see cuda_on_cpu.py). One kernel runs at a time, on one
// thread of the machine, block after block. The threads of a block are fibers: each runs until __syncthreads(), then the next.
// Kernel text is put into a nameless namespace below this header.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// One copy for all blocks, in a section of its own so that it can be filled with NaN before each; `used` keeps the optimiser
// from reasoning that nobody else writes to it between two reads.
#define __shared__ static __attribute__((section("cuda_shared"), used))
#define __syncthreads() cuda_on_cpu::barrier(__LINE__)

struct uint3 { unsigned x, y, z; };
using dim3 = uint3;
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(16) double2 { double x, y; };
struct __align__(8) int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

// atomics: exactly the overloads that a device has, so that e.g. a sum of `long long` is refused here too -------------------

#define CUDA_ATOMIC(name, T, expression)      \
  static inline T name(T* address, T value) { \
    T old = *address;                         \
    *address = (expression);                  \
    return old;                               \
  }
#define CUDA_ATOMICS(T)                                                    \
  CUDA_ATOMIC(atomicMax, T, old > value ? old : value)                     \
  CUDA_ATOMIC(atomicMin, T, old < value ? old : value)                     \
  static inline T atomicCAS(T* address, T compare, T value) {              \
    T old = *address;                                                      \
    if (old == compare) *address = value;                                  \
    return old;                                                            \
  }
CUDA_ATOMICS(int)
CUDA_ATOMICS(unsigned)
CUDA_ATOMICS(unsigned long long)
CUDA_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)value))
CUDA_ATOMIC(atomicAdd, unsigned, old + value)
CUDA_ATOMIC(atomicAdd, unsigned long long, old + value)
CUDA_ATOMIC(atomicAdd, float, old + value)
CUDA_ATOMIC(atomicAdd, double, old + value)

// mathematics ---------------------------------------------------------------------------------------------------------------

template <class A, class B>
static inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T)b < (T)a ? (T)b : (T)a;
}
template <class A, class B>
static inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T)a < (T)b ? (T)b : (T)a;
}
static inline double sinpi(double x) {  // exact at halves, as a device's
  double r = x - 2 * rint(x / 2);
  return sin(M_PI * (fabs(r) > 0.5 ? copysign(1, r) - r : r));
}
static inline double cospi(double x) { return sin(M_PI * (0.5 - fabs(x - 2 * rint(x / 2)))); }
static inline float sinpi(float x) { return (float)sinpi((double)x); }
static inline float cospi(float x) { return (float)cospi((double)x); }
static inline float sinpif(float x) { return sinpi(x); }
static inline float cospif(float x) { return cospi(x); }
static inline void sincospi(double x, double* s, double* c) { *s = sinpi(x), *c = cospi(x); }
static inline void sincospi(float x, float* s, float* c) { *s = sinpi(x), *c = cospi(x); }
static inline void sincospif(float x, float* s, float* c) { *s = sinpi(x), *c = cospi(x); }
static inline void sincos(float x, float* s, float* c) { sincosf(x, s, c); }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline double rsqrt(double x) { return 1 / sqrt(x); }
static inline float rsqrt(float x) { return 1 / sqrtf(x); }
// macros, as glibc has declared these names for itself
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)
static inline float __fdividef(float x, float y) { return x / y; }
static inline int __float2int_rn(float x) { return (int)lrintf(x); }
static inline int __double2int_rn(double x) { return (int)lrint(x); }
static inline long long __float2ll_rn(float x) { return llrintf(x); }
static inline long long __double2ll_rn(double x) { return llrint(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
static inline T __ldg(const T* address) { return *address; }

// launching -----------------------------------------------------------------------------------------------------------------

extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));  // by the linker
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_on_cpu {

static void body();

struct Fiber {  // kept from launch to launch: making one costs far more than a switch
  static constexpr size_t STACK = 1 << 18, GUARD = 1 << 16;
  jmp_buf at;
  ucontext_t start;
  uint3 index;
  int line = 0;  // of the barrier that it waits at; 0 once its thread has returned
  bool begun = false;
  char* memory;

  Fiber() {
    memory = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, GUARD, PROT_NONE);
    getcontext(&start);
    start.uc_stack.ss_sp = memory + GUARD;
    start.uc_stack.ss_size = STACK - GUARD;
    start.uc_link = nullptr;
    makecontext(&start, body, 0);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(memory, STACK); }
};

static std::vector<std::unique_ptr<Fiber>> fibers;
static Fiber* running;
static jmp_buf scheduler;
static void (*kernel)(void**);
static void** arguments;

// _setjmp and _longjmp do no system call, which swapcontext does.
static __attribute__((noinline)) void leave(int line) {
  running->line = line;
  if (!_setjmp(running->at)) _longjmp(scheduler, 1);
}

static __attribute__((noinline)) void enter(Fiber* fiber) {
  running = fiber;
  threadIdx = fiber->index;
  if (_setjmp(scheduler)) return;
  if (fiber->begun) _longjmp(fiber->at, 1);
  fiber->begun = true;
  setcontext(&fiber->start);
}

static void body() {
  for (;;) {
    kernel(arguments);
    leave(0);
  }
}

static inline __attribute__((always_inline)) void barrier(int line) {
  asm volatile("" ::: "memory");
  leave(line);
  asm volatile("" ::: "memory");
}

static uint3 position(unsigned i, dim3 of) { return {i % of.x, i / of.x % of.y, i / of.x / of.y}; }

// Every thread up to its next barrier, again and again until all have returned. Odd passes go backwards, so that a value read
// without a barrier after its writing is wrong for some thread whichever of the two comes first.
static bool run_block(unsigned threads, unsigned block, int lines[2]) {
  unsigned left = threads;
  for (unsigned pass = 0; left; pass++) {
    lines[0] = 0;
    left = 0;
    for (unsigned j = 0; j < threads; j++) {
      Fiber* fiber = fibers[(pass + block) % 2 ? threads - 1 - j : j].get();
      if (pass && !fiber->line) continue;
      enter(fiber);
      if (!fiber->line) continue;
      left++;
      lines[1] = fiber->line;
      if (!lines[0]) lines[0] = lines[1];
      if (lines[0] != lines[1]) return false;
    }
  }
  return true;
}

// null, or what went wrong. `size`: grid x, y, z and block x, y, z.
static const char* launch(const unsigned* size, void (*function)(void**), void** values, bool barriers) {
  static char message[160];
  gridDim = {size[0], size[1], size[2]};
  blockDim = {size[3], size[4], size[5]};
  kernel = function;
  arguments = values;
  unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  if (barriers) {
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < threads; i++) fibers[i]->index = position(i, blockDim);
  }
  unsigned block = 0;
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++, block++) {
        if (__start_cuda_shared) memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);
        if (!barriers) {
          for (threadIdx.z = 0; threadIdx.z < blockDim.z; threadIdx.z++)
            for (threadIdx.y = 0; threadIdx.y < blockDim.y; threadIdx.y++)
              for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) function(values);
          continue;
        }
        int lines[2];
        if (run_block(threads, block, lines)) continue;
        fibers.clear();  // they are stuck within the kernel
        snprintf(message, sizeof message, "threads of block (%u, %u, %u) wait at different barriers, in lines %d and %d",
                 blockIdx.x, blockIdx.y, blockIdx.z, lines[0], lines[1]);
        return message;
      }
  return nullptr;
}

}  // namespace cuda_on_cpu
