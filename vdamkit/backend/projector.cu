// Kernels of the projector (vdamkit/imaging/device_projector.py), and what those of search.cu share with them: both files are
// compiled as one text. Each kernel has a NumPy twin of the same name in twins.py, whose docstring says what it computes; the
// tests hold the two together. REAL and COMPLEX are float and float2, or double and double2. No kernel adds in an order that
// chance decides: the one scatter adds whole numbers, so a run repeats bit for bit.

#define THREADS 256
#define KZ_BITS 10  // of a voxel's cell, see twins.py

struct __align__(4 * sizeof(REAL)) Four {
  REAL of[4];
};
struct __align__(2 * sizeof(REAL)) Two {
  REAL of[2];
};

__device__ __forceinline__ COMPLEX complex_of(REAL re, REAL im) {
  COMPLEX z;
  z.x = re;
  z.y = im;
  return z;
}

__device__ __forceinline__ COMPLEX times(COMPLEX a, COMPLEX b) {
  return complex_of(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

// trilinear corners in the half cube kx >= 0 ------------------------------------------------------------------------------

struct Corners {
  long long base;
  REAL weight[8];
  int offset[8];
  REAL sign;
};

__device__ __forceinline__ Corners corners_of(const REAL* turn, REAL x, REAL y, REAL z, int half_width) {
  Corners c;
  REAL at_x = turn[0] * x + turn[3] * y + turn[6] * z;
  REAL at_y = turn[1] * x + turn[4] * y + turn[7] * z;
  REAL at_z = turn[2] * x + turn[5] * y + turn[8] * z;
  c.sign = at_x < 0 ? REAL(-1) : REAL(1);
  at_x *= c.sign;
  at_y *= c.sign;
  at_z *= c.sign;
  REAL floor_x = floor(at_x), floor_y = floor(at_y), floor_z = floor(at_z);
  int row = half_width + 2, plane = row * (2 * half_width + 1);
  c.base = (long long)((int)floor_z + half_width) * plane + ((int)floor_y + half_width) * row + (int)floor_x;
  REAL part[3][2] = {{1 - (at_x - floor_x), at_x - floor_x},
                     {1 - (at_y - floor_y), at_y - floor_y},
                     {1 - (at_z - floor_z), at_z - floor_z}};
  for (int j = 0; j < 8; j++) {
    c.weight[j] = part[2][j / 4] * part[1][j / 2 % 2] * part[0][j % 2];
    c.offset[j] = (j / 4) * plane + (j / 2 % 2) * row + j % 2;
  }
  return c;
}

extern "C" __global__ void tilt(const REAL* __restrict__ cube, const REAL* __restrict__ turns,
                                const REAL* __restrict__ source, const int* __restrict__ source_at, int n_source,
                                int half_width, int size, int slab_size, COMPLEX* __restrict__ slabs) {
  int i = blockIdx.y * blockDim.x + threadIdx.x;
  long long d = blockIdx.x;
  if (i >= n_source) return;
  Corners c = corners_of(turns + 9 * d, source[i], source[n_source + i], source[2 * n_source + i], half_width);
  REAL re = 0, im = 0;
  for (int j = 0; j < 8; j++) {
    re += c.weight[j] * cube[c.base + c.offset[j]];
    im += c.weight[j] * cube[size + c.base + c.offset[j]];
  }
  slabs[d * slab_size + source_at[i]] = complex_of(re, im * c.sign);
}

__device__ __forceinline__ void add_whole(long long* sum, double value) {
  atomicAdd((unsigned long long*)sum, (unsigned long long)llrint(value));  // wraps as two's complement: signs come out right
}

extern "C" __global__ void tilt_adjoint(const COMPLEX* __restrict__ slabs, const REAL* __restrict__ slab_weights,
                                        const REAL* __restrict__ turns, const int* __restrict__ owner,
                                        const REAL* __restrict__ source, const int* __restrict__ source_at, int n_source,
                                        int half_width, int size, int slab_size, int n_directions, double scale,
                                        double weight_scale, long long* __restrict__ sums) {
  int i = blockIdx.y * blockDim.x + threadIdx.x;
  long long d = blockIdx.x;
  int half = blockIdx.z;
  if (i >= n_source) return;
  long long at = (half * (long long)n_directions + d) * slab_size + source_at[i];
  COMPLEX value = slabs[at];
  REAL weight = slab_weights[at];
  if (value.x == 0 && value.y == 0 && weight == 0) return;
  Corners c = corners_of(turns + 9 * d, source[i], source[n_source + i], source[2 * n_source + i], half_width);
  long long* mine = sums + 3LL * (2 * owner[d] + half) * size;
  for (int j = 0; j < 8; j++) {
    long long to = c.base + c.offset[j];
    add_whole(mine + to, scale * c.weight[j] * value.x);
    add_whole(mine + size + to, scale * c.weight[j] * value.y * c.sign);
    if (weight != 0) add_whole(mine + 2LL * size + to, weight_scale * c.weight[j] * weight);
  }
}

// in-plane turns ----------------------------------------------------------------------------------------------------------

// Blocks are numbered rows (or directions) first to last, each with all of its voxels: what they share stays in the cache.
// Every thread takes two neighbouring kz of a column; columns begin at even numbers and have even lengths.

extern "C" __global__ void spin(const COMPLEX* __restrict__ slabs, const int* __restrict__ direction,
                                const int* __restrict__ psi, const int* __restrict__ first, const REAL* __restrict__ taps,
                                const unsigned* __restrict__ pair, int n_disc, int depth, int width, int n_pairs,
                                COMPLEX* __restrict__ rows) {
  int chunks = (n_pairs + blockDim.x - 1) / blockDim.x;
  int p = blockIdx.x % chunks * blockDim.x + threadIdx.x;
  long long r = blockIdx.x / chunks;
  if (p >= n_pairs) return;
  int disc = pair[p] >> KZ_BITS, kz = pair[p] & ((1u << KZ_BITS) - 1);
  long long turned = (long long)psi[r] * n_disc + disc;
  Four wx = ((const Four*)taps)[2 * turned], wy = ((const Four*)taps)[2 * turned + 1];
  const COMPLEX* from = slabs + (long long)direction[r] * width * width * depth + (long long)first[turned] * depth + kz;
  Four sum = {{0, 0, 0, 0}};
#pragma unroll
  for (int y = 0; y < 4; y++, from += width * depth)
#pragma unroll
    for (int x = 0; x < 4; x++) {
      Four two = *(const Four*)(from + x * depth);
      REAL w = wy.of[y] * wx.of[x];
      for (int j = 0; j < 4; j++) sum.of[j] += w * two.of[j];
    }
  ((Four*)rows)[r * n_pairs + p] = sum;
}

// One thread sums up 2 × 2 neighbouring columns of the cylinder, for both halves: what bears on one of them mostly bears on
// the others too, and is read once. A column that does not reach the thread's kz is read at its beginning, with no weight.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    spin_adjoint(const COMPLEX* __restrict__ values, const REAL* __restrict__ weights, const int* __restrict__ row_start,
                 const int* __restrict__ psi, const int* __restrict__ source_start, const int2* __restrict__ source,
                 const REAL* __restrict__ source_weight, REAL absolute_sum, int side, int depth, int width, int n_voxels,
                 int n_rows, int n_directions, COMPLEX* __restrict__ slabs, REAL* __restrict__ slab_weights) {
  int half_depth = depth / 2, patches = side * side, cells = patches * half_depth, chunks = (cells + blockDim.x - 1) / blockDim.x;
  int at = blockIdx.x % chunks * blockDim.x + threadIdx.x, d = blockIdx.x / chunks;
  if (at >= cells) return;
  int patch = at / half_depth, kz = at % half_depth * 2;
  long long other = (long long)n_rows * n_voxels;  // from one half to the other
  Four sum[2][4] = {};  // by half and column: two complex numbers
  Two total[2][4] = {};
  for (int r = row_start[d]; r < row_start[d + 1]; r++) {
    const int* range = source_start + (long long)psi[r] * (patches + 1) + patch;
    const COMPLEX* row = values + (long long)r * n_voxels;
    const REAL* row_weight = weights + (long long)r * n_voxels;
    int last = range[1];
    for (int e = range[0]; e < last; e++) {
      int2 column = source[e];  // its first voxel, and how many it has
      Four w = ((const Four*)source_weight)[e];
      bool inside = kz < column.y;
      int from = column.x + (inside ? kz : 0);
      for (int j = 0; j < 4; j++) w.of[j] = inside ? w.of[j] : REAL(0);
      for (int h = 0; h < 2; h++) {
        Four value = *(const Four*)(row + h * other + from);
        Two weight = *(const Two*)(row_weight + h * other + from);
        for (int j = 0; j < 4; j++) {
          for (int i = 0; i < 4; i++) sum[h][j].of[i] += w.of[j] * value.of[i];
          for (int i = 0; i < 2; i++) total[h][j].of[i] += fabs(w.of[j]) * weight.of[i];
        }
      }
    }
  }
  for (int j = 0; j < 4; j++) {
    int x = patch % side * 2 + j % 2, y = patch / side * 2 + j / 2;
    if (y >= width || x >= width) continue;
    for (int h = 0; h < 2; h++) {
      long long to = (((long long)h * n_directions + d) * width * width + y * width + x) * depth + kz;
      *(Four*)(slabs + to) = sum[h][j];
      for (int i = 0; i < 2; i++) slab_weights[to + i] = total[h][j].of[i] / absolute_sum;
    }
  }
}

// choosing from arrays ----------------------------------------------------------------------------------------------------

extern "C" __global__ void collect(const COMPLEX* __restrict__ values, int width, const int* __restrict__ rows,
                                   const int* __restrict__ order, int n, COMPLEX* __restrict__ out) {
  int v = blockIdx.y * blockDim.x + threadIdx.x;
  long long r = blockIdx.x;
  if (v < n) out[r * n + v] = order[v] < 0 ? complex_of(0, 0) : values[(long long)rows[r] * width + order[v]];
}

extern "C" __global__ void collect_real(const REAL* __restrict__ values, int width, const int* __restrict__ rows,
                                        const int* __restrict__ order, int n, REAL* __restrict__ out) {
  int v = blockIdx.y * blockDim.x + threadIdx.x;
  long long r = blockIdx.x;
  if (v < n) out[r * n + v] = order[v] < 0 ? REAL(0) : values[(long long)rows[r] * width + order[v]];
}
