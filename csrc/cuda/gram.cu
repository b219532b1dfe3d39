// Tiles of X X^T and Y Y^T made and reduced in one kernel: nothing n x n is ever in memory. Every product and sum is
// float32's own (the Triton kernels split float32 into two float16 instead), and the inner products are double.
//
// One block of 256 threads makes one 128 x 128 tile of both Gram matrices, 8 x 8 entries a thread in registers. Strips
// of 8 columns pass through shared memory, in two places: while one is multiplied, the next is on its way in registers.
// Work: n^2 (p + q) flops by symmetry; bytes at best 4 n (p + q) ceil(n / 128) from L2, 32 flops a byte. Of 590
// instructions a thread issues for a strip 512 multiply, and 32 read 16 bytes of shared memory each. The three inner
// products are summed in a fixed order: the caller adds the partial sums up, so the result has the same bits every
// time.
#include <cuda_runtime.h>

#include "cuda/gram.h"

namespace pyrepr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStrip = 8;
constexpr int kEdge = kTile;
constexpr int kEntries = 8;  // entries a thread holds along each side: two groups of 4, half a tile apart
constexpr int kBand = 8;

// strip[k][i] = x[first + i][k0 + k], zero past the last column. + 4: what two neighbouring threads store, four columns
// of a row, lies 16 banks apart, and sixteen rows fill those.
using Strip = float[kStrip][kEdge + 4];
struct alignas(16) Strips {
  Strip sides[2][2];  // of rows and of columns, one in use and one to come
};

// Number of a block -> (I, J), I <= J. The tiles go in bands of kBand rows, down the columns of each: blocks that run
// at the same time share their rows in L2.
__device__ void find_tile(int64_t number, int64_t blocks, int64_t& row, int64_t& column) {
  int64_t top = 0, height = min(int64_t(kBand), blocks);
  for (;;) {
    const int64_t count = height * (height + 1) / 2 + (blocks - top - height) * height;
    if (number < count) break;
    number -= count;
    top += height;
    height = min(int64_t(kBand), blocks - top);
  }
  column = 0;
  for (; column < height && number > column; column++) number -= column + 1;
  if (column == height) {
    column += number / height;
    number %= height;
  }
  row = top + number;
  column += top;
}

// Four columns of a row that has `rest` more of them, zero past its end; `vector` where all groups of four are whole
// and stand at multiples of 16 bytes.
__device__ float4 load4(const float* x, int64_t rest, bool vector) {
  if (vector && rest > 0) return *reinterpret_cast<const float4*>(x);
  float4 some = {0, 0, 0, 0};
  if (vector || rest <= 0) return some;
  some.x = x[0];
  if (rest > 1) some.y = x[1];
  if (rest > 2) some.z = x[2];
  if (rest > 3) some.w = x[3];
  return some;
}

__device__ void store4(Strip strip, int k, int i, const float4& x) {
  strip[k][i] = x.x;
  strip[k + 1][i] = x.y;
  strip[k + 2][i] = x.z;
  strip[k + 3][i] = x.w;
}

__device__ void read_entries(float (&to)[kEntries], const float* from) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float4 x = *reinterpret_cast<const float4*>(from + half * kEdge / 2);
    to[4 * half] = x.x;
    to[4 * half + 1] = x.y;
    to[4 * half + 2] = x.z;
    to[4 * half + 3] = x.w;
  }
}

// Where a thread's entry i stands, counted from its first.
__device__ constexpr int place(int i) { return i % 4 + i / 4 * (kEdge / 2); }

// Adds a thread's entries of one strip of x_I x_J^T to `sum`.
__device__ void strip_product(float (&sum)[kEntries][kEntries], const Strip left, const Strip right, int row, int col) {
#pragma unroll
  for (int k = 0; k < kStrip; k++) {
    float a[kEntries], b[kEntries];
    read_entries(a, &left[k][row]);
    read_entries(b, &right[k][col]);
#pragma unroll
    for (int i = 0; i < kEntries; i++)
#pragma unroll
      for (int j = 0; j < kEntries; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
  }
}

// Adds a thread's entries of x_I x_J^T to `sum`; of a tile on the diagonal both sides are the same strips. Rows past n
// repeat the last one.
__device__ void tile_product(float (&sum)[kEntries][kEntries], Strips& strips, const float* x, int64_t n, int64_t width,
                             int64_t r0, int64_t c0, int row, int col) {
  const int i = threadIdx.x / 2, k = threadIdx.x % 2 * 4;  // what this thread loads: four columns of one row
  const bool vector = width % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0, both = r0 != c0;
  const float* left = x + min(r0 + i, n - 1) * width + k;
  const float* right = x + min(c0 + i, n - 1) * width + k;
  int64_t rest = width - k;
  store4(strips.sides[0][0], k, i, load4(left, rest, vector));
  if (both) store4(strips.sides[1][0], k, i, load4(right, rest, vector));
  __syncthreads();
  int64_t ahead = width;
  int now = 0;
  do {  // once even with no columns: a loop that may not run makes doubles of all sums before their time, and spills
    left += kStrip;
    right += kStrip;
    rest -= kStrip;
    ahead -= kStrip;
    const float4 next_left = load4(left, rest, vector), next_right = load4(right, both ? rest : 0, vector);
    strip_product(sum, strips.sides[0][now], strips.sides[both][now], row, col);
    store4(strips.sides[0][1 - now], k, i, next_left);
    if (both) store4(strips.sides[1][1 - now], k, i, next_right);
    now = 1 - now;
    __syncthreads();
  } while (ahead > 0);
}

__global__ void __launch_bounds__(kThreads) pair_stats_kernel(const float* x, const float* y, int64_t n, int64_t p,
                                                              int64_t q, int64_t blocks, double* partial) {
  __shared__ Strips strips;
  __shared__ double reduced[3][kThreads];

  int64_t tile_row, tile_column;
  find_tile(blockIdx.x, blocks, tile_row, tile_column);
  const int64_t r0 = tile_row * kEdge, c0 = tile_column * kEdge;
  // A warp takes 4 x 8 groups of 4 x 4 entries, so that it reads 64 and 128 different bytes at a time.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = (warp / 2 * 4 + lane / 8) * 4, col = (warp % 2 * 8 + lane % 8) * 4;

  float k[kEntries][kEntries] = {}, l[kEntries][kEntries] = {};
  tile_product(k, strips, x, n, p, r0, c0, row, col);
  tile_product(l, strips, y, n, q, r0, c0, row, col);

  double kk = 0, kl = 0, ll = 0;
  const int ahead = r0 == c0 ? col - row : kEdge;  // above the diagonal lie all entries of other tiles
  const int inside = static_cast<int>(min(n - c0, int64_t(kEdge))) - col;
#pragma unroll
  for (int i = 0; i < kEntries; i++)
#pragma unroll
    for (int j = 0; j < kEntries; j++)
      if (place(i) < ahead + place(j) && place(j) < inside) {
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
