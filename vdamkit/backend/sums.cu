// The M-step of the batched engine (vdamkit/vdam/batched); see projector.cu, whose text precedes this one.

extern "C" __global__ void column_sums(const REAL* __restrict__ values, int n_rows, long long n, double* __restrict__ sums) {
  long long v = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (v >= n) return;
  double sum = 0;
#pragma unroll 8
  for (int r = 0; r < n_rows; r++) sum += values[r * n + v];
  sums[v] += sum;
}

extern "C" __global__ void shell_sums(const double* __restrict__ values, const REAL* __restrict__ factor,
                                      const int* __restrict__ voxel, const int* __restrict__ start, int n_voxels,
                                      double* __restrict__ sums) {
  __shared__ double part[THREADS];
  const double* row = values + (long long)blockIdx.y * n_voxels;
  int t = threadIdx.x;
  double sum = 0;
  for (int j = start[blockIdx.x] + t; j < start[blockIdx.x + 1]; j += THREADS) sum += row[voxel[j]] * factor[voxel[j]];
  part[t] = sum;
  __syncthreads();
  for (int step = THREADS / 2; step > 0; step /= 2) {
    if (t < step) part[t] += part[t + step];
    __syncthreads();
  }
  if (t == 0) sums[(long long)blockIdx.y * gridDim.x + blockIdx.x] = part[0];
}

extern "C" __global__ void own_power(const COMPLEX* __restrict__ raw, const REAL* __restrict__ raw_weight,
                                     const int* __restrict__ particle, const int* __restrict__ run_start, int n_voxels,
                                     REAL* __restrict__ sums) {
  int v = blockIdx.y * blockDim.x + threadIdx.x;
  if (v >= n_voxels) return;
  REAL power = 0, weight = 0;
#pragma unroll 8
  for (int m = run_start[blockIdx.x]; m < run_start[blockIdx.x + 1]; m++) {
    long long at = (long long)particle[m] * n_voxels + v;
    power += raw[at].x * raw[at].x + raw[at].y * raw[at].y;
    weight += raw_weight[at];
  }
  sums[2LL * blockIdx.x * n_voxels + v] = power;
  sums[(2LL * blockIdx.x + 1) * n_voxels + v] = weight;
}

// Sums over x and y of the samples of a member, one plane for each z: for each column of the half-ball, as phases are products of
// one wave along each axis. Samples are sorted by z, then by y.
extern "C" __global__ void wave_planes(const COMPLEX* __restrict__ waves, int width, const int4* __restrict__ lines,
                                       const int2* __restrict__ disc, int n_disc, const long long* __restrict__ sample_start,
                                       const int* __restrict__ sample_count, const int* __restrict__ sample_shift,
                                       const REAL* __restrict__ sample_weight, const int* __restrict__ plane_start,
                                       int first_member, COMPLEX* __restrict__ planes, int* __restrict__ plane_z) {
  int c = blockIdx.y * blockDim.x + threadIdx.x, m = first_member + blockIdx.x;
  if (c >= n_disc) return;
  const COMPLEX* zero = waves + width / 2 - 1;  // where k = 0
  const COMPLEX *along_x = zero + disc[c].x, *along_y = zero + disc[c].y;
  int to = plane_start[m] - plane_start[first_member];
  long long s = sample_start[m], end = s + sample_count[m];
  int4 line = lines[sample_shift[s]];
  while (s < end) {
    int z = line.z;
    COMPLEX sum = complex_of(0, 0);
    while (s < end && line.z == z) {
      int y = line.y;
      COMPLEX row = complex_of(0, 0);
      while (s < end && line.z == z && line.y == y) {
        COMPLEX e = along_x[line.x * width];
        REAL share = sample_weight[s];
        row.x += share * e.x;
        row.y += share * e.y;
        if (++s < end) line = lines[sample_shift[s]];
      }
      row = times(row, along_y[y * width]);
      sum.x += row.x;
      sum.y += row.y;
    }
    planes[(long long)to * n_disc + c] = sum;
    if (c == 0) plane_z[to] = z;
    to++;
  }
}

// A block takes some rows, one after the other, and a thread two neighbouring voxels of each; `noise` is added up over the rows of
// a block.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_sums(const COMPLEX* __restrict__ rows, const COMPLEX* __restrict__ waves, int width, const unsigned* __restrict__ pair,
             int n_pairs, int n_rows, int rows_at_once, const int* __restrict__ row_start, const int* __restrict__ particle,
             const int* __restrict__ group, const REAL* __restrict__ mass, const int* __restrict__ plane_start,
             const COMPLEX* __restrict__ planes, int n_disc, const int* __restrict__ plane_z,
             const COMPLEX* __restrict__ unmasked, const REAL* __restrict__ weight, const COMPLEX* __restrict__ raw,
             const REAL* __restrict__ raw_weight, const int* __restrict__ half, int n_groups, COMPLEX* __restrict__ gradient,
             REAL* __restrict__ total, REAL* __restrict__ noise) {
  int p = blockIdx.y * blockDim.x + threadIdx.x;
  if (p >= n_pairs) return;
  const COMPLEX* along_z = waves + width / 2 - 1 + (pair[p] & ((1u << KZ_BITS) - 1));
  const COMPLEX* column = planes + (pair[p] >> KZ_BITS);
  int first = blockIdx.x * rows_at_once, last = min(first + rows_at_once, n_rows), seen_group = -1;
  int first_plane = plane_start[row_start[0]];
  Two residual = {};  // of one optics group, as long as members have the same
  Two* residuals = (Two*)noise + (long long)blockIdx.x * n_groups * n_pairs + p;
  for (int r = first; r < last; r++) {
    Four a = ((const Four*)rows)[(long long)r * n_pairs + p], moved[2] = {};
    Two energy = {{a.of[0] * a.of[0] + a.of[1] * a.of[1], a.of[2] * a.of[2] + a.of[3] * a.of[3]}}, sum[2] = {};
    for (int m = row_start[r]; m < row_start[r + 1]; m++) {
      COMPLEX wave[2] = {};  // Σ_t p e^{-2πi k·t/N}
#pragma unroll 4
      for (int j = plane_start[m] - first_plane; j < plane_start[m + 1] - first_plane; j++) {
        COMPLEX plane = column[(long long)j * n_disc];
        Four e = *(const Four*)(along_z + plane_z[j] * width);
        for (int v = 0; v < 2; v++) add_product(wave[v], plane, complex_of(e.of[2 * v], e.of[2 * v + 1]));
      }
      int who = particle[m];
      long long at = (long long)who * n_pairs + p;
      Four image = ((const Four*)unmasked)[at], seen = ((const Four*)raw)[at];
      Two w = ((const Two*)weight)[at], own = ((const Two*)raw_weight)[at];
      if (group[m] != seen_group) {
        if (seen_group >= 0)
          for (int v = 0; v < 2; v++) residuals[(long long)seen_group * n_pairs].of[v] += residual.of[v];
        seen_group = group[m];
        residual = {};
      }
      REAL share = mass[m];
      for (int v = 0; v < 2; v++) {
        COMPLEX mine = times(wave[v], complex_of(image.of[2 * v], image.of[2 * v + 1]));
        for (int h = 0; h < 2; h++) {  // both halves, one with nothing: keeps them in registers
          REAL one = half[who] == h ? REAL(1) : REAL(0);
          moved[h].of[2 * v] += one * mine.x;
          moved[h].of[2 * v + 1] += one * mine.y;
          sum[h].of[v] += one * share * w.of[v];
        }
        COMPLEX there = times(wave[v], complex_of(seen.of[2 * v], seen.of[2 * v + 1]));
        REAL overlap = a.of[2 * v] * there.x + a.of[2 * v + 1] * there.y;
        residual.of[v] += own.of[v] * (own.of[v] * share * energy.of[v] - 2 * overlap);
      }
    }
    for (int h = 0; h < 2; h++) {
      long long to = ((long long)h * n_rows + r) * n_pairs + p;
      for (int i = 0; i < 4; i++) moved[h].of[i] -= sum[h].of[i / 2] * a.of[i];
      for (int v = 0; v < 2; v++) sum[h].of[v] = max(sum[h].of[v], REAL(0));
      ((Four*)gradient)[to] = moved[h];
      ((Two*)total)[to] = sum[h];
    }
  }
  if (seen_group >= 0)
    for (int v = 0; v < 2; v++) residuals[(long long)seen_group * n_pairs].of[v] += residual.of[v];
}
