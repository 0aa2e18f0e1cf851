// Kernels of the projector (vdamkit/imaging/device_projector.py), and what those of search.cu and sums.cu share with them: the
// files are compiled as one text. Each kernel has a NumPy twin of the same name in twins.py, whose docstring says what it
// computes; the tests hold the two together. REAL and COMPLEX are float and float2, or double and double2. No kernel adds in an order that
// chance decides: the one scatter adds whole numbers, so a run repeats bit for bit.

#define THREADS 256
#define PAD 2        // see imaging/projector.py
#define KZ_BITS 10   // of a voxel's cell, see twins.py
#define TILE 8       // patches along a side, see twins.py
#define AT_ONCE 16   // directions whose cells `tilt_back` holds in shared memory
#define COLUMNS 400  // of the half-ball, at most, that bear on a tile: lattice points in a square of side 2 TILE + 3
#ifdef SINGLE
#define KZ 8  // voxels of a column that a block takes, see twins.py: what the memory shared by its threads holds
#else
#define KZ 4
#endif
#define BLOCKS 3  // such blocks on a multiprocessor: what its registers hold

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

// Both add product by product, each of which is fused with its sum: two operations for Re conj(a) b, where the sum of the two
// products would be a third.
__device__ __forceinline__ void add_overlap(REAL& sum, COMPLEX a, COMPLEX b) {
  sum += a.x * b.x;
  sum += a.y * b.y;
}

__device__ __forceinline__ void add_product(COMPLEX& sum, COMPLEX a, COMPLEX b) {
  sum.x += a.x * b.x;
  sum.x -= a.y * b.y;
  sum.y += a.x * b.y;
  sum.y += a.y * b.x;
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

extern "C" __global__ void tilt(const COMPLEX* __restrict__ cube, const REAL* __restrict__ turns,
                                const REAL* __restrict__ source, const int* __restrict__ source_at, int n_source,
                                int half_width, int slab_size, COMPLEX* __restrict__ slabs) {
  int chunks = (n_source + blockDim.x - 1) / blockDim.x;
  int i = blockIdx.x % chunks * blockDim.x + threadIdx.x;
  long long d = blockIdx.x / chunks;
  if (i >= n_source) return;
  Corners c = corners_of(turns + 9 * d, source[i], source[n_source + i], source[2 * n_source + i], half_width);
  REAL re = 0, im = 0;
  for (int j = 0; j < 8; j++) {
    COMPLEX value = cube[c.base + c.offset[j]];
    re += c.weight[j] * value.x;
    im += c.weight[j] * value.y;
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

// Both halves of a cylinder's cell, or, with sign -1, of its Friedel mate.
__device__ __forceinline__ void add_cell(REAL part[2][3], const Four* cell, REAL w, int sign) {
  for (int h = 0; h < 2; h++) {
    Four value = cell[h];
    part[h][0] += w * value.of[0];
    part[h][1] += sign * w * value.of[1];
    part[h][2] += w * value.of[2];
  }
}

// The adjoint of `tilt` for rows of a map: each point of the cube collects what the cylinders hold around it. A cylinder's point
// lies in the half cube itself or as its Friedel mate, as in corners_of, whose sign this takes from the same sum. Of the eight
// corners of the lattice's cell around a point few are near enough to count: the threads of a warp first find and then read them.
extern "C" __global__ void __launch_bounds__(THREADS)
    tilt_back(const REAL* __restrict__ slabs, const REAL* __restrict__ turns, int n_directions, const int* __restrict__ points,
              int n_points, int half_width, int depth, int width, int size, double* __restrict__ sums) {
  __shared__ REAL corners[AT_ONCE][8][3];  // of a cell, from its first one, for some directions
  int i = blockIdx.x * blockDim.x + threadIdx.x, mine = min(i, n_points - 1);  // beyond the last: the last once more
  int at[3] = {points[mine], points[n_points + mine], points[2 * n_points + mine]}, middle = width / 2 * (width + 1);
  double sum[2][3] = {};
  const Four* slab = (const Four*)slabs;
  for (int d = 0; d < n_directions; d++, slab += 2LL * width * width * depth) {
    if (d % AT_ONCE == 0) {
      __syncthreads();
      for (int k = threadIdx.x; k < 24 * min(AT_ONCE, n_directions - d); k += blockDim.x) {
        const REAL* t = turns + 9 * (d + k / 24) + k % 3;
        int e = k / 3 % 8;
        (&corners[0][0][0])[k] = (e & 1 ? t[0] : REAL(0)) + (e & 2 ? t[3] : REAL(0)) + (e & 4 ? t[6] : REAL(0));
      }
      __syncthreads();
    }
    const REAL(*corner)[3] = corners[d % AT_ONCE];
    const REAL *t = turns + 9 * d, scale = REAL(1) / (PAD * PAD);  // a turn times the padding
    REAL x = floor((t[0] * at[0] + t[1] * at[1] + t[2] * at[2]) * scale);  // in the cylinder's frame
    REAL y = floor((t[3] * at[0] + t[4] * at[1] + t[5] * at[2]) * scale);
    REAL z = floor((t[6] * at[0] + t[7] * at[1] + t[8] * at[2]) * scale);
    REAL away[3], part[2][3] = {};
    for (int j = 0; j < 3; j++) away[j] = at[j] - (t[j] * x + t[3 + j] * y + t[6 + j] * z);
    unsigned near = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      REAL far = 0;
      for (int j = 0; j < 3; j++) far = max(far, fabs(away[j] - corner[e][j]));
      near |= (far < 1) << e;
    }
    for (; near; near &= near - 1) {
      int e = __ffs(near) - 1;
      REAL w = 1;
      for (int j = 0; j < 3; j++) w *= 1 - fabs(away[j] - corner[e][j]);
      int u[3] = {(int)x + (e & 1), (int)y + (e >> 1 & 1), (int)z + (e >> 2)};
      REAL side = t[0] * u[0] + t[3] * u[1] + t[6] * u[2];
      if (side < 0 || 2 * abs(u[0]) >= width || 2 * abs(u[1]) >= width || abs(u[2]) >= depth) continue;
      int sign = u[2] < 0 ? -1 : 1, column = u[1] * width + u[0];
      add_cell(part, slab + 2 * ((middle + sign * column) * depth + sign * u[2]), w, sign);
      if (u[2] == 0 && side > 0) add_cell(part, slab + 2 * (middle - column) * depth, w, -1);  // its mate is in that plane too
    }
    for (int j = 0; j < 6; j++) sum[j / 3][j % 3] += part[j / 3][j % 3];
  }
  if (i >= n_points) return;
  long long to = ((long long)(at[2] + half_width) * (2 * half_width + 1) + at[1] + half_width) * (half_width + 2) + at[0];
  for (int j = 0; j < 6; j++) sums[j * (long long)size + to] += sum[j / 3][j % 3];
}

// in-plane turns ----------------------------------------------------------------------------------------------------------

// Blocks are numbered first to last, each spin (or direction) with all of its voxels: what they share stays in the cache.
// Every thread takes two neighbouring kz of a column; columns begin at even numbers and have even lengths. Spins are six
// numbers each: direction, angle, and the rows of its four quarter turns, or -1.

extern "C" __global__ void spin(const COMPLEX* __restrict__ slabs, const int* __restrict__ spins,
                                const int* __restrict__ first, const REAL* __restrict__ taps,
                                const unsigned* __restrict__ pair, const int* __restrict__ turned, int n_disc, int depth,
                                int width, int n_pairs, COMPLEX* __restrict__ rows) {
  int chunks = (n_pairs + blockDim.x - 1) / blockDim.x;
  int p = blockIdx.x % chunks * blockDim.x + threadIdx.x;
  if (p >= n_pairs) return;
  const int* mine = spins + 6LL * (blockIdx.x / chunks);
  int disc = pair[p] >> KZ_BITS, kz = pair[p] & ((1u << KZ_BITS) - 1);
  long long at = (long long)mine[1] * n_disc + disc;
  Four wx = ((const Four*)taps)[2 * at], wy = ((const Four*)taps)[2 * at + 1];
  const COMPLEX* from = slabs + (long long)mine[0] * width * width * depth + (long long)first[at] * depth + kz;
  Four sum = {{0, 0, 0, 0}};
#pragma unroll
  for (int y = 0; y < 4; y++, from += width * depth)
#pragma unroll
    for (int x = 0; x < 4; x++) {
      Four two = *(const Four*)(from + x * depth);
      REAL w = wy.of[y] * wx.of[x];
      for (int j = 0; j < 4; j++) sum.of[j] += w * two.of[j];
    }
#pragma unroll
  for (int q = 0; q < 4; q++)
    if (mine[2 + q] >= 0) ((Four*)rows)[(long long)mine[2 + q] * n_pairs + turned[(long long)q * n_pairs + p]] = sum;
}

// A block sums up a tile of TILE × TILE patches of the cylinder, KZ voxels deep, for one half: for each spin it first collects
// what bears on the tile there, quarter turns added up, and then each thread forms its 2 × 2 columns. A cell of `slabs` is, for
// each half, real part, imaginary part, weight and nothing.
extern "C" __global__ void __launch_bounds__(TILE * TILE * KZ, BLOCKS)
    spin_adjoint(const COMPLEX* __restrict__ values, const REAL* __restrict__ weights, const int* __restrict__ spin_start,
                 const int* __restrict__ spins, const int2* __restrict__ tile_range, const int4* __restrict__ source,
                 const int* __restrict__ source_count, const int2* __restrict__ patch_range, const int* __restrict__ entry,
                 const REAL* __restrict__ entry_weight, const unsigned char* __restrict__ needed, REAL absolute_sum, int side,
                 int depth, int width, int n_voxels, int n_rows, REAL* __restrict__ slabs) {
  __shared__ COMPLEX data[COLUMNS * KZ];
  __shared__ REAL heavy[COLUMNS * KZ];
  int across = side / TILE, tiles = across * across, layers = (depth + KZ - 1) / KZ;
  int layer = blockIdx.x % layers, tile = blockIdx.x / layers % tiles, d = blockIdx.x / layers / tiles, h = blockIdx.y;
  int z = threadIdx.x % KZ, within = threadIdx.x / KZ, low = layer * KZ, kz = low + z;
  REAL sum[4][3] = {};
  for (int s = spin_start[d]; s < spin_start[d + 1]; s++) {
    const int* mine = spins + 6LL * s;
    long long row[4];
    for (int q = 0; q < 4; q++) row[q] = mine[2 + q] < 0 ? -1 : ((long long)h * n_rows + mine[2 + q]) * n_voxels + low;
    long long place = ((long long)mine[1] * layers + layer) * tiles + tile;
    int2 range = tile_range[place], own = patch_range[place * TILE * TILE + within];
    int first = range.x, size = (range.y - first) * KZ;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      int4 column = source[first + i / KZ];
      int from[4] = {column.x, column.y, column.z, column.w}, at = i % KZ;
      bool inside = low + at < source_count[first + i / KZ];
      COMPLEX value[4];
      REAL weight[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {  // all reads are under way before the first is waited for
        bool there = inside && row[q] >= 0;
        value[q] = there ? values[row[q] + from[q] + at] : complex_of(0, 0);
        weight[q] = there ? weights[row[q] + from[q] + at] : REAL(0);
      }
      data[i] = complex_of(value[0].x + value[1].x + value[2].x + value[3].x, value[0].y + value[1].y + value[2].y + value[3].y);
      heavy[i] = weight[0] + weight[1] + weight[2] + weight[3];
    }
    __syncthreads();
    for (int e = own.x; e < own.y; e++) {
      int at = entry[e] * KZ + z;
      Four w = ((const Four*)entry_weight)[e];
      for (int j = 0; j < 4; j++) {
        sum[j][0] += w.of[j] * data[at].x;
        sum[j][1] += w.of[j] * data[at].y;
        sum[j][2] += fabs(w.of[j]) * heavy[at];
      }
    }
    __syncthreads();  // all have read before it is written again
  }
  int y = (tile / across * TILE + within / TILE) * 2, x = (tile % across * TILE + within % TILE) * 2;
  for (int j = 0; j < 4; j++) {
    if (kz >= depth || y + j / 2 >= width || x + j % 2 >= width) continue;
    int cell = ((y + j / 2) * width + x + j % 2) * depth + kz;
    REAL used = needed[cell];
    Four out = {{used * sum[j][0], used * sum[j][1], used * sum[j][2] / absolute_sum, 0}};
    ((Four*)slabs)[2 * ((long long)d * width * width * depth + cell) + h] = out;
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
