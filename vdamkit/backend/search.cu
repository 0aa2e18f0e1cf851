// Kernels of the batched engine (vdamkit/vdam/batched); see projector.cu, whose text precedes this one.

#define BLOCK 32  // rotations and shifts of one block of `score`
#define DEPTH 16  // voxels that it holds in shared memory at a time

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
  __shared__ COMPLEX a[BLOCK][DEPTH + 1], b[BLOCK][DEPTH + 1];
  __shared__ REAL energy[BLOCK][DEPTH + 1];
  long long i = blockIdx.x;
  int first_entry = entry_start[i] + BLOCK * blockIdx.y, last_entry = entry_start[i + 1];
  int first_shift = shift_start[i] + BLOCK * blockIdx.z, last_shift = shift_start[i + 1];
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
