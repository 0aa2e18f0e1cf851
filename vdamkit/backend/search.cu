// Phases, scores and posteriors of the batched engine (vdamkit/vdam/batched); see projector.cu, whose text precedes this one.

#define SIDE 16   // of a block of `score`: threads
#define DEPTH 16  // voxels that it holds in shared memory at a time
#define FEW 8     // rotations, and shifts, of a block of `score_8`
#ifdef SINGLE
#define FEW_AT_ONCE 2  // such blocks on a multiprocessor: what its registers hold
#else
#define FEW_AT_ONCE 1
#endif

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

// Images moved by all shifts, as sums and differences of the two voxels of each pair; one that is not there (-1) is 0.
extern "C" __global__ void moved_pairs(const COMPLEX* __restrict__ images, int width, const COMPLEX* __restrict__ shift_phases,
                                       int n_shifts, int n_voxels, const int* __restrict__ pairs, int n_pairs,
                                       COMPLEX* __restrict__ even, COMPLEX* __restrict__ odd) {
  int v = blockIdx.y * blockDim.x + threadIdx.x;
  if (v >= n_pairs) return;
  const COMPLEX* image = images + (long long)(blockIdx.x / n_shifts) * width;
  const COMPLEX* phase = shift_phases + (long long)(blockIdx.x % n_shifts) * n_voxels;
  COMPLEX moved[2];
  for (int j = 0; j < 2; j++) {
    int at = pairs[j * n_pairs + v];
    moved[j] = at < 0 ? complex_of(0, 0) : times(image[at], phase[at]);
  }
  long long to = (long long)blockIdx.x * n_pairs + v;
  even[to] = complex_of(moved[0].x + moved[1].x, moved[0].y + moved[1].y);
  odd[to] = complex_of(moved[0].x - moved[1].x, moved[0].y - moved[1].y);
}

struct ScoreInput {
  const COMPLEX *rows, *data, *shift_phases;
  const REAL *weight, *entry_prior, *shift_prior;
  const int4* blocks;  // of each: particle, its first entry and its first shift, counted from the particle's own first
  const int *entry_start, *entry_row, *shift_start, *shift;
  const long long* entry_out;
  int n_voxels, data_width;
};

// A block scores PER × SIDE rotations × as many shifts of one particle, a thread PER × PER of them. `a` and `b` hold DEPTH voxels
// of the rotations and of the moved particle, `energy` the rotations' power; all lines have an element to spare.
template <int PER>
__device__ __forceinline__ void score_block(const ScoreInput& in, COMPLEX* a, COMPLEX* b, REAL* energy, REAL* scores) {
  const int tile = PER * SIDE, line = tile + 1;
  int4 block = in.blocks[blockIdx.x];
  long long i = block.x;
  int first_entry = in.entry_start[i] + block.y, last_entry = in.entry_start[i + 1];
  int first_shift = in.shift_start[i] + block.z, last_shift = in.shift_start[i + 1];
  int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
  long long from[PER], phase[PER];  // where this thread reads: some rotations, some shifts
  for (int j = 0; j < PER; j++) {
    int e = first_entry + y + SIDE * j, s = first_shift + y + SIDE * j;
    from[j] = e < last_entry ? (long long)in.entry_row[e] * in.n_voxels : -1;
    phase[j] = s < last_shift ? (long long)in.shift[s] * in.n_voxels : -1;
  }
  REAL sum[PER][PER] = {}, own[PER] = {};
  for (int begin = 0; begin < in.n_voxels; begin += DEPTH) {
    int v = begin + x;
    COMPLEX zero = complex_of(0, 0);
    COMPLEX d = v < in.n_voxels ? in.data[i * in.data_width + v] : zero;
    REAL w = v < in.n_voxels ? in.weight[i * in.data_width + v] : REAL(0);
#pragma unroll
    for (int j = 0; j < PER; j++) {
      COMPLEX r = v < in.n_voxels && from[j] >= 0 ? in.rows[from[j] + v] : zero;
      a[x * line + y + SIDE * j] = r;
      own[j] += w * (r.x * r.x + r.y * r.y);
      b[x * line + y + SIDE * j] = v < in.n_voxels && phase[j] >= 0 ? times(in.shift_phases[phase[j] + v], d) : zero;
    }
    __syncthreads();
#pragma unroll 4
    for (int u = 0; u < DEPTH; u++) {
      COMPLEX rotation[PER], moved[PER];
#pragma unroll
      for (int j = 0; j < PER; j++) {
        rotation[j] = a[u * line + y + SIDE * j];
        moved[j] = b[u * line + x + SIDE * j];
      }
#pragma unroll
      for (int j = 0; j < PER; j++)
#pragma unroll
        for (int l = 0; l < PER; l++) add_overlap(sum[j][l], rotation[j], moved[l]);
    }
    __syncthreads();
  }
  for (int j = 0; j < PER; j++) energy[(y + SIDE * j) * (SIDE + 1) + x] = own[j];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < PER; j++) {
    int e = first_entry + y + SIDE * j;
    if (e >= last_entry) continue;
    REAL total = 0;
    for (int u = 0; u < SIDE; u++) total += energy[(y + SIDE * j) * (SIDE + 1) + u];
#pragma unroll
    for (int l = 0; l < PER; l++) {
      int s = first_shift + x + SIDE * l;
      if (s >= last_shift) continue;
      scores[in.entry_out[e] + s - in.shift_start[i]] = sum[j][l] - total / 2 + in.entry_prior[e] + in.shift_prior[s];
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 5)
    score_32(const COMPLEX* __restrict__ rows, const COMPLEX* __restrict__ data, const REAL* __restrict__ weight,
             const COMPLEX* __restrict__ shift_phases, int n_voxels, int data_width, const int4* __restrict__ blocks,
             const int* __restrict__ entry_start, const int* __restrict__ entry_row, const long long* __restrict__ entry_out,
             const REAL* __restrict__ entry_prior, const int* __restrict__ shift_start, const int* __restrict__ shift,
             const REAL* __restrict__ shift_prior, REAL* __restrict__ scores) {
  __shared__ COMPLEX a[DEPTH * (2 * SIDE + 1)], b[DEPTH * (2 * SIDE + 1)];
  __shared__ REAL energy[2 * SIDE * (SIDE + 1)];
  score_block<2>({rows, data, shift_phases, weight, entry_prior, shift_prior, blocks, entry_start, entry_row, shift_start, shift,
                  entry_out, n_voxels, data_width}, a, b, energy, scores);
}

// For particles with many rotations and many shifts.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    score_64(const COMPLEX* __restrict__ rows, const COMPLEX* __restrict__ data, const REAL* __restrict__ weight,
             const COMPLEX* __restrict__ shift_phases, int n_voxels, int data_width, const int4* __restrict__ blocks,
             const int* __restrict__ entry_start, const int* __restrict__ entry_row, const long long* __restrict__ entry_out,
             const REAL* __restrict__ entry_prior, const int* __restrict__ shift_start, const int* __restrict__ shift,
             const REAL* __restrict__ shift_prior, REAL* __restrict__ scores) {
  __shared__ COMPLEX a[DEPTH * (4 * SIDE + 1)], b[DEPTH * (4 * SIDE + 1)];
  __shared__ REAL energy[4 * SIDE * (SIDE + 1)];
  score_block<4>({rows, data, shift_phases, weight, entry_prior, shift_prior, blocks, entry_start, entry_row, shift_start, shift,
                  entry_out, n_voxels, data_width}, a, b, energy, scores);
}

// A block scores FEW rotations × as many shifts of one particle: each thread all of them at some of the voxels.
__device__ __forceinline__ void score_few(const ScoreInput& in, REAL* parts, REAL* sums, REAL* scores) {
  int4 block = in.blocks[blockIdx.x];
  long long i = block.x;
  int first_entry = in.entry_start[i] + block.y, last_entry = min(first_entry + FEW, in.entry_start[i + 1]);
  int first_shift = in.shift_start[i] + block.z, last_shift = min(first_shift + FEW, in.shift_start[i + 1]);
  const COMPLEX *rotation[FEW], *phase[FEW];  // beyond the last: the last once more
  for (int j = 0; j < FEW; j++) {
    rotation[j] = in.rows + (long long)in.entry_row[min(first_entry + j, last_entry - 1)] * in.n_voxels;
    phase[j] = in.shift_phases + (long long)in.shift[min(first_shift + j, last_shift - 1)] * in.n_voxels;
  }
  REAL sum[FEW][FEW] = {}, own[FEW] = {};
  for (int v = threadIdx.x; v < in.n_voxels; v += THREADS) {
    COMPLEX d = in.data[i * in.data_width + v], moved[FEW];
    REAL w = in.weight[i * in.data_width + v];
#pragma unroll
    for (int l = 0; l < FEW; l++) moved[l] = times(phase[l][v], d);
#pragma unroll
    for (int j = 0; j < FEW; j++) {
      COMPLEX r = rotation[j][v];
      own[j] += w * (r.x * r.x + r.y * r.y);
#pragma unroll
      for (int l = 0; l < FEW; l++) add_overlap(sum[j][l], r, moved[l]);
    }
  }
#pragma unroll
  for (int j = 0; j < FEW; j++) {  // of all threads, for one rotation at a time: each shift's sum, and the rotation's power
    for (int l = 0; l < FEW; l++) parts[l * THREADS + threadIdx.x] = sum[j][l];
    parts[FEW * THREADS + threadIdx.x] = own[j];
    __syncthreads();
    if (threadIdx.x < (FEW + 1) * SIDE) {
      REAL part = 0;
      for (int u = threadIdx.x % SIDE; u < THREADS; u += SIDE) part += parts[threadIdx.x / SIDE * THREADS + u];
      sums[threadIdx.x] = part;
    }
    __syncthreads();  // the next rotation's second one waits for those who still read `sums`
    int e = first_entry + j, s = first_shift + threadIdx.x;
    if (e >= last_entry || s >= last_shift) continue;
    REAL overlap = 0, energy = 0;
    for (int u = 0; u < SIDE; u++) {
      overlap += sums[threadIdx.x * SIDE + u];
      energy += sums[FEW * SIDE + u];
    }
    scores[in.entry_out[e] + s - in.shift_start[i]] = overlap - energy / 2 + in.entry_prior[e] + in.shift_prior[s];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, FEW_AT_ONCE)
    score_8(const COMPLEX* __restrict__ rows, const COMPLEX* __restrict__ data, const REAL* __restrict__ weight,
            const COMPLEX* __restrict__ shift_phases, int n_voxels, int data_width, const int4* __restrict__ blocks,
            const int* __restrict__ entry_start, const int* __restrict__ entry_row, const long long* __restrict__ entry_out,
            const REAL* __restrict__ entry_prior, const int* __restrict__ shift_start, const int* __restrict__ shift,
            const REAL* __restrict__ shift_prior, REAL* __restrict__ scores) {
  __shared__ REAL parts[(FEW + 1) * THREADS], sums[(FEW + 1) * SIDE];
  score_few({rows, data, shift_phases, weight, entry_prior, shift_prior, blocks, entry_start, entry_row, shift_start, shift,
             entry_out, n_voxels, data_width}, parts, sums, scores);
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
                                      const int* __restrict__ shift_line, const REAL* __restrict__ shift_prior,
                                      const REAL* __restrict__ limit, const double* __restrict__ total, int n_entries,
                                      int* __restrict__ count, int* __restrict__ lines, double* __restrict__ mass,
                                      double* __restrict__ moment) {
  int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= n_entries) return;
  int i = particle[e], width = shift_start[i + 1] - shift_start[i], n = 0, different = 0, last = -1;
  const REAL* prior = shift_prior + shift_start[i];
  const int* line = shift_line + shift_start[i];
  double sum = 0, weighted = 0;
  for (int s = 0; s < width; s++) {
    REAL w = weights[base[e] + (long long)s * stride];
    if (w < limit[i]) continue;
    n++;
    different += line[s] != last;
    last = line[s];
    sum += w;
    weighted += (double)w * prior[s];
  }
  count[e] = n;
  lines[e] = different;
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
