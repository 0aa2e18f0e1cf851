// Kernels of the batched engine (vdamkit/vdam/batched). Each has a NumPy twin of the same name in twins.py, whose docstring
// says what it computes; the tests hold the two together. REAL and COMPLEX are float and float2, or double and double2.
// No kernel adds in an order that chance decides: the one scatter adds whole numbers, so a run repeats bit for bit.

#define TILE 32     // rotations and shifts of one block of `score`
#define DEPTH 16    // voxels that it holds in shared memory at a time
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

// phases and scores -------------------------------------------------------------------------------------------------------

extern "C" __global__ void phases(const double* __restrict__ turns, const int* __restrict__ k, int n_voxels,
                                  COMPLEX* __restrict__ out) {
  int v = blockIdx.y * blockDim.x + threadIdx.x;
  long long s = blockIdx.x;
  if (v >= n_voxels) return;
  double angle = turns[3 * s] * k[3 * v] + turns[3 * s + 1] * k[3 * v + 1] + turns[3 * s + 2] * k[3 * v + 2];
  REAL twice = (REAL)(2 * (angle - rint(angle)));  // half turns, in [-1, 1]
  REAL sine, cosine;
  sincospi(twice, &sine, &cosine);
  out[s * n_voxels + v] = complex_of(cosine, -sine);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    score(const COMPLEX* __restrict__ rows, const COMPLEX* __restrict__ data, const REAL* __restrict__ weight,
          const COMPLEX* __restrict__ shift_phases, int n_voxels, int data_width, const int* __restrict__ entry_start,
          const int* __restrict__ entry_row, const long long* __restrict__ entry_out,
          const REAL* __restrict__ entry_prior, const int* __restrict__ shift_start, const int* __restrict__ shift,
          const REAL* __restrict__ shift_prior, REAL* __restrict__ scores) {
  __shared__ COMPLEX a[TILE][DEPTH + 1], b[TILE][DEPTH + 1];
  __shared__ REAL energy[TILE][DEPTH + 1];
  long long i = blockIdx.x;
  int first_entry = entry_start[i] + TILE * blockIdx.y, last_entry = entry_start[i + 1];
  int first_shift = shift_start[i] + TILE * blockIdx.z, last_shift = shift_start[i + 1];
  if (first_entry >= last_entry || first_shift >= last_shift) return;  // the whole block together
  int x = threadIdx.x % DEPTH, y = threadIdx.x / DEPTH;
  long long from[2], phase[2];  // where this thread reads: two rotations, two shifts
  for (int j = 0; j < 2; j++) {
    int e = first_entry + y + DEPTH * j, s = first_shift + y + DEPTH * j;
    from[j] = e < last_entry ? (long long)entry_row[e] * n_voxels : -1;
    phase[j] = s < last_shift ? (long long)shift[s] * n_voxels : -1;
  }
  REAL sum[2][2] = {{0, 0}, {0, 0}}, own[2] = {0, 0};
  for (int begin = 0; begin < n_voxels; begin += DEPTH) {
    int v = begin + x;
    COMPLEX zero = complex_of(0, 0);
    COMPLEX d = v < n_voxels ? data[i * data_width + v] : zero;
    REAL w = v < n_voxels ? weight[i * data_width + v] : REAL(0);
    for (int j = 0; j < 2; j++) {
      COMPLEX r = v < n_voxels && from[j] >= 0 ? rows[from[j] + v] : zero;
      a[y + DEPTH * j][x] = r;
      own[j] += w * (r.x * r.x + r.y * r.y);
      b[y + DEPTH * j][x] = v < n_voxels && phase[j] >= 0 ? times(shift_phases[phase[j] + v], d) : zero;
    }
    __syncthreads();
    for (int u = 0; u < DEPTH; u++) {
      COMPLEX a0 = a[y][u], a1 = a[y + DEPTH][u], b0 = b[x][u], b1 = b[x + DEPTH][u];
      sum[0][0] += a0.x * b0.x + a0.y * b0.y;
      sum[0][1] += a0.x * b1.x + a0.y * b1.y;
      sum[1][0] += a1.x * b0.x + a1.y * b0.y;
      sum[1][1] += a1.x * b1.x + a1.y * b1.y;
    }
    __syncthreads();
  }
  energy[y][x] = own[0];
  energy[y + DEPTH][x] = own[1];
  __syncthreads();
  for (int j = 0; j < 2; j++) {
    int e = first_entry + y + DEPTH * j;
    if (e >= last_entry) continue;
    REAL total = 0;
    for (int u = 0; u < DEPTH; u++) total += energy[y + DEPTH * j][u];
    for (int l = 0; l < 2; l++) {
      int s = first_shift + x + DEPTH * l;
      if (s >= last_shift) continue;
      scores[entry_out[e] + s - shift_start[i]] = sum[j][l] - total / 2 + entry_prior[e] + shift_prior[s];
    }
  }
}

// posterior ---------------------------------------------------------------------------------------------------------------

extern "C" __global__ void normalise(REAL* __restrict__ scores, const long long* __restrict__ start,
                                     double* __restrict__ peak, double* __restrict__ total,
                                     long long* __restrict__ best) {
  __shared__ REAL top[THREADS];
  __shared__ long long where[THREADS];
  __shared__ double part[THREADS];
  int i = blockIdx.x, t = threadIdx.x;
  REAL most = scores[start[i]];
  long long at = start[i];
  for (long long j = start[i] + t; j < start[i + 1]; j += THREADS)
    if (scores[j] > most || (scores[j] == most && j < at)) {
      most = scores[j];
      at = j;
    }
  top[t] = most;
  where[t] = at;
  __syncthreads();
  for (int step = THREADS / 2; step > 0; step /= 2) {
    if (t < step && (top[t + step] > top[t] || (top[t + step] == top[t] && where[t + step] < where[t]))) {
      top[t] = top[t + step];
      where[t] = where[t + step];
    }
    __syncthreads();
  }
  most = top[0];
  double sum = 0;
  for (long long j = start[i] + t; j < start[i + 1]; j += THREADS) {
    REAL w = exp(scores[j] - most);
    scores[j] = w;
    sum += w;
  }
  part[t] = sum;
  __syncthreads();
  for (int step = THREADS / 2; step > 0; step /= 2) {
    if (t < step) part[t] += part[t + step];
    __syncthreads();
  }
  if (t == 0) {
    peak[i] = most;
    total[i] = part[0];
    best[i] = where[0];
  }
}

__device__ __forceinline__ REAL of_bits(unsigned long long bits) {  // floats above 0 are ordered as their bit patterns are
#ifdef SINGLE
  unsigned int word = (unsigned int)bits;
#else
  unsigned long long word = bits;
#endif
  REAL value;
  memcpy(&value, &word, sizeof(REAL));
  return value;
}

extern "C" __global__ void threshold(const REAL* __restrict__ weights, const long long* __restrict__ start,
                                     const double* __restrict__ target, int cap, REAL* __restrict__ out) {
  __shared__ double part[THREADS];
  __shared__ int count[THREADS];
  int i = blockIdx.x, t = threadIdx.x;
  REAL one = 1;
  unsigned long long low = 1, high = 0;  // largest bit pattern that takes in enough, by bisection
  memcpy(&high, &one, sizeof(REAL));
  high += 1;
  while (high - low > 1) {
    unsigned long long middle = low + (high - low) / 2;
    REAL limit = of_bits(middle);
    double sum = 0;
    int n = 0;
    for (long long j = start[i] + t; j < start[i + 1]; j += THREADS)
      if (weights[j] >= limit) {
        sum += weights[j];
        n++;
      }
    part[t] = sum;
    count[t] = n;
    __syncthreads();
    for (int step = THREADS / 2; step > 0; step /= 2) {
      if (t < step) {
        part[t] += part[t + step];
        count[t] += count[t + step];
      }
      __syncthreads();
    }
    if (part[0] >= target[i] || count[0] >= cap)
      low = middle;
    else
      high = middle;
    __syncthreads();  // all have read part[0] before it is written again
  }
  if (t == 0) out[i] = of_bits(low);
}

extern "C" __global__ void entry_sums(const REAL* __restrict__ weights, const long long* __restrict__ base, int stride,
                                      const int* __restrict__ particle, const int* __restrict__ shift_start,
                                      const REAL* __restrict__ shift_prior, const REAL* __restrict__ limit,
                                      const double* __restrict__ total, int n_entries, int* __restrict__ count,
                                      double* __restrict__ mass, double* __restrict__ moment) {
  int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= n_entries) return;
  int i = particle[e], width = shift_start[i + 1] - shift_start[i], n = 0;
  const REAL* prior = shift_prior + shift_start[i];
  double sum = 0, weighted = 0;
  for (int s = 0; s < width; s++) {
    REAL w = weights[base[e] + (long long)s * stride];
    if (w < limit[i]) continue;
    n++;
    sum += w;
    weighted += (double)w * prior[s];
  }
  count[e] = n;
  mass[e] = sum / total[i];
  moment[e] = weighted / total[i];
}

extern "C" __global__ void samples(const REAL* __restrict__ weights, const long long* __restrict__ base, int stride,
                                   const int* __restrict__ particle, const int* __restrict__ shift_start,
                                   const int* __restrict__ shift, const REAL* __restrict__ limit,
                                   const double* __restrict__ total, const long long* __restrict__ sample_start,
                                   int n_entries, int* __restrict__ sample_shift, REAL* __restrict__ sample_weight) {
  int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= n_entries) return;
  int i = particle[e], width = shift_start[i + 1] - shift_start[i];
  long long to = sample_start[e];
  for (int s = 0; s < width; s++) {
    REAL w = weights[base[e] + (long long)s * stride];
    if (w < limit[i]) continue;
    sample_shift[to] = shift[shift_start[i] + s];
    sample_weight[to] = (REAL)(w / total[i]);
    to++;
  }
}

// M-step ------------------------------------------------------------------------------------------------------------------

extern "C" __global__ void row_sums(const COMPLEX* __restrict__ rows, const COMPLEX* __restrict__ shift_phases, int n_voxels,
                                    const int* __restrict__ row_start, const int* __restrict__ particle,
                                    const long long* __restrict__ sample_start, const int* __restrict__ sample_count,
                                    const REAL* __restrict__ mass, const int* __restrict__ sample_shift,
                                    const REAL* __restrict__ sample_weight, const COMPLEX* __restrict__ unmasked,
                                    const REAL* __restrict__ weight, const COMPLEX* __restrict__ raw,
                                    const REAL* __restrict__ raw_weight, const int* __restrict__ half, int n_rows,
                                    COMPLEX* __restrict__ gradient, REAL* __restrict__ total, REAL* __restrict__ noise) {
  int v = blockIdx.y * blockDim.x + threadIdx.x;
  long long r = blockIdx.x;
  if (v >= n_voxels || row_start[r] == row_start[r + 1]) return;
  COMPLEX a = rows[r * n_voxels + v];
  REAL energy = a.x * a.x + a.y * a.y, residual = 0;
  COMPLEX moved[2] = {complex_of(0, 0), complex_of(0, 0)};
  REAL sum[2] = {0, 0};
  for (int m = row_start[r]; m < row_start[r + 1]; m++) {
    COMPLEX wave = complex_of(0, 0);  // Σ_t p e^{-2πi k·t/N}
    for (long long s = sample_start[m]; s < sample_start[m] + sample_count[m]; s++) {
      COMPLEX phase = shift_phases[(long long)sample_shift[s] * n_voxels + v];
      wave.x += sample_weight[s] * phase.x;
      wave.y += sample_weight[s] * phase.y;
    }
    long long at = (long long)particle[m] * n_voxels + v;
    COMPLEX mine = times(wave, unmasked[at]);
    for (int h = 0; h < 2; h++) {  // both halves, one with nothing: keeps them in registers
      REAL one = half[particle[m]] == h ? REAL(1) : REAL(0);
      moved[h].x += one * mine.x;
      moved[h].y += one * mine.y;
      sum[h] += one * mass[m] * weight[at];
    }
    COMPLEX seen = times(wave, raw[at]);
    REAL w = raw_weight[at];
    residual += w * (w * mass[m] * energy - 2 * (a.x * seen.x + a.y * seen.y));
  }
  for (int h = 0; h < 2; h++) {
    long long to = ((long long)h * n_rows + r) * n_voxels + v;
    gradient[to] = complex_of(gradient[to].x + moved[h].x - sum[h] * a.x, gradient[to].y + moved[h].y - sum[h] * a.y);
    total[to] += sum[h];
  }
  noise[r * n_voxels + v] = residual;
}
