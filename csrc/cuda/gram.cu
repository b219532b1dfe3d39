// Tiles of X X^T and Y Y^T made and reduced in one kernel: nothing n x n is ever in memory.
//
// One block of 256 threads makes one 64 x 64 tile of both Gram matrices, 4 x 4 entries a thread, from 64 x 16 strips of
// the rows in shared memory, and reduces the three inner products in double in a fixed order: the caller adds the
// partial sums up, so the result has the same bits every time. Work: n^2 (p + q) flops by symmetry; bytes at best
// 4 n (p + q) ceil(n / 64) from L2.
#include <cuda_runtime.h>

#include "cuda/gram.h"

namespace pyrepr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStrip = 16;
constexpr int kEntries = 4;  // entries a thread holds along each side

using Strip = float[kStrip][kTile + 4];  // + 4: rows start in different banks

// strip[k][i] = x[first + i][k0 + k], zero outside.
__device__ void load_strip(Strip strip, const float* x, int64_t n, int64_t width, int64_t first, int64_t k0) {
  for (int e = threadIdx.x; e < kTile * kStrip; e += kThreads) {
    const int64_t i = first + e / kStrip, k = k0 + e % kStrip;
    strip[e % kStrip][e / kStrip] = i < n && k < width ? x[i * width + k] : 0.f;
  }
}

// Adds a thread's 4 x 4 entries of x_I x_J^T to `sum`.
__device__ void tile_product(float (&sum)[kEntries][kEntries], Strip left, Strip right, const float* x, int64_t n,
                             int64_t width, int64_t r0, int64_t c0, int row, int col) {
  for (int64_t k0 = 0; k0 < width; k0 += kStrip) {
    load_strip(left, x, n, width, r0, k0);
    load_strip(right, x, n, width, c0, k0);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStrip; k++) {
      float a[kEntries], b[kEntries];
#pragma unroll
      for (int i = 0; i < kEntries; i++) {
        a[i] = left[k][row + i];
        b[i] = right[k][col + i];
      }
#pragma unroll
      for (int i = 0; i < kEntries; i++)
#pragma unroll
        for (int j = 0; j < kEntries; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) pair_stats_kernel(const float* x, const float* y, int64_t n, int64_t p,
                                                              int64_t q, int64_t blocks, double* partial) {
  __shared__ Strip left, right;
  __shared__ double reduced[3][kThreads];

  // Tile number -> (I, J), I <= J, counting along the rows of the upper triangle.
  int64_t tile_row = 0, rest = blockIdx.x;
  for (; rest >= blocks - tile_row; tile_row++) rest -= blocks - tile_row;
  const int64_t r0 = tile_row * kTile, c0 = (tile_row + rest) * kTile;
  const int row = threadIdx.x / 16 * kEntries, col = threadIdx.x % 16 * kEntries;

  float k[kEntries][kEntries] = {}, l[kEntries][kEntries] = {};
  tile_product(k, left, right, x, n, p, r0, c0, row, col);
  tile_product(l, left, right, y, n, q, r0, c0, row, col);

  double kk = 0, kl = 0, ll = 0;
#pragma unroll
  for (int i = 0; i < kEntries; i++)
#pragma unroll
    for (int j = 0; j < kEntries; j++)
      if (r0 + row + i < c0 + col + j) {  // rows and columns past n are zero
        kk += double(k[i][j]) * k[i][j];
        kl += double(k[i][j]) * l[i][j];
        ll += double(l[i][j]) * l[i][j];
      }
  reduced[0][threadIdx.x] = kk;
  reduced[1][threadIdx.x] = kl;
  reduced[2][threadIdx.x] = ll;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      for (int s = 0; s < 3; s++) reduced[s][threadIdx.x] += reduced[s][threadIdx.x + half];
  }
  __syncthreads();
  if (threadIdx.x < 3) partial[int64_t(blockIdx.x) * 3 + threadIdx.x] = reduced[threadIdx.x][0];
}

}  // namespace

const char* gram_pair_stats(const float* x, const float* y, int64_t n, int64_t p, int64_t q, double* partial,
                            int64_t tiles, void* handle) {
  const int64_t blocks = (n + kTile - 1) / kTile;
  if (tiles != blocks * (blocks + 1) / 2) return "partial must have one row per tile on or above the diagonal";
  if (tiles > INT32_MAX) return "n is too large for one launch";
  if (tiles == 0) return nullptr;
  const auto grid = static_cast<unsigned>(tiles);
  const auto stream = static_cast<cudaStream_t>(handle);
  pair_stats_kernel<<<grid, kThreads, 0, stream>>>(x, y, n, p, q, blocks, partial);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pyrepr::cuda
