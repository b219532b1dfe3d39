// The forward of few tokens in one kernel: hash, weight, gather, sum, bias.
//
// A block owns one token, Lanes 16-byte pieces of the rows, and all chunks (or a part of them): its threads first hash
// up to kChunks chunks, kEach each, into shared memory, then kThreads / Lanes rows are read at a time, kAhead of them
// in flight in every thread, and added up in float: by the thread over its rows, by shuffles over a warp, by warps
// through shared memory, always in the same order. Where that makes too few blocks, K is cut into parts whose sums a
// second kernel adds up, in their order.
//
// At best K h (bytes of an element) from memory for a token, each byte once; x is read again by every block (d bytes of
// 64 K with 16-bit x, 8 bits and the narrow blocks), from L2. A token of 4 MB (d = h = 4096, 16-bit) makes 128 blocks
// of 32 KB, all of which are asked for before the first row arrives.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/lookup.h"

namespace pyrepr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kEach = 2;  // chunks a thread hashes at a time, all of them read before the first is computed
constexpr int kChunks = kEach * kThreads;
constexpr int kMostBits = 16;
constexpr int kAhead = 8;              // rows a thread has asked for
constexpr int kNarrow = 4, kWide = 8;  // lanes a row: 64 bytes while blocks are few, else a line of 128
constexpr int kOdd = 32;               // where a lane takes but one element
constexpr int64_t kBlocks = 132;       // that a GPU should have to do

__device__ float number(float x) { return x; }
__device__ float number(int8_t x) { return static_cast<float>(x); }
__device__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float number(__half x) { return __half2float(x); }

// The elements of a piece of a row, as floats.
template <class T, int N>
struct Piece {
  static_assert(N == 1 || N * sizeof(T) == 16);
  using Memory = std::conditional_t<N == 1, T, uint4>;
  Memory memory;
  __device__ void read(const T* p) { memory = *reinterpret_cast<const Memory*>(p); }
  __device__ void add_to(float (&sum)[N], float weight) const {
    const T* const elements = reinterpret_cast<const T*>(&memory);
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] = fmaf(weight, number(elements[i]), sum[i]);
  }
};

__device__ float element(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  if (type == DType::bf16) return number(static_cast<const __nv_bfloat16*>(p)[i]);
  return number(static_cast<const __half*>(p)[i]);
}

__device__ void put(void* p, DType type, int64_t i, float value) {
  if (type == DType::f32)
    static_cast<float*>(p)[i] = value;
  else if (type == DType::bf16)
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(value);
  else
    static_cast<__half*>(p)[i] = __float2half(value);
}

// The elements of a chunk, all of them asked for before the first arrives; 0 from `bits` on.
template <class X>
__device__ void read_chunk(const X* p, int bits, float (&z)[kMostBits]) {
  constexpr int N = 16 / sizeof(X);
  if (bits % N == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
    for (int first = 0; first < kMostBits; first += N) {
      const uint4 piece = first < bits ? *reinterpret_cast<const uint4*>(p + first) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < N; i++) z[first + i] = number(reinterpret_cast<const X*>(&piece)[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kMostBits; i++) z[i] = i < bits ? number(p[i]) : 0.f;
  }
}

// Chunk k of token t.
__device__ void read_any(const LookupLinear& call, int64_t t, int64_t k, float (&z)[kMostBits]) {
  const int64_t first = t * call.x_stride + k * call.bits;
  if (call.x_type == DType::f32)
    read_chunk(static_cast<const float*>(call.x) + first, call.bits, z);
  else if (call.x_type == DType::bf16)
    read_chunk(static_cast<const __nv_bfloat16*>(call.x) + first, call.bits, z);
  else
    read_chunk(static_cast<const __half*>(call.x) + first, call.bits, z);
}

// Code and weight of the elements z of chunk k; the arithmetic of cpu/lookup_hash.h.
__device__ void hash(const LookupLinear& call, int64_t k, const float (&z)[kMostBits], int& code, float& weight) {
  float size = 0, inverse = 1;
  code = 0;
#pragma unroll
  for (int i = 0; i < kMostBits; i++) {
    if (i >= call.bits) break;
    code |= int(z[i] >= 0) << i;
    size += fabsf(z[i]);
    inverse *= 1 + expf(-fabsf(z[i]) * call.slope);
  }
  weight = size == size ? 1.f : size;
  if (call.weighting == 0) weight = 1 / inverse;
  if (call.weighting == 1) weight = size / inverse;
  if (call.weighting == 2) weight = size / call.bits;
  if (call.scales) weight *= call.scales[(k << call.bits) + code];
}

// Codes and weights of the `count` chunks of token t from `first` on, into shared memory.
__device__ void hash_chunks(const LookupLinear& call, int64_t t, int64_t first, int count, int* codes, float* weights) {
  float z[kEach][kMostBits];
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int j = threadIdx.x + i * kThreads;
    if (j < count) read_any(call, t, first + j, z[i]);
  }
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int j = threadIdx.x + i * kThreads;
    if (j < count) hash(call, first + j, z[i], codes[j], weights[j]);
  }
}

__device__ void finish(const LookupLinear& call, int64_t t, int64_t column, float sum) {
  if (call.bias) sum += element(call.bias, call.bias_type, column);
  put(call.out, call.x_type, t * call.h + column, sum);
}

// Adds to `sum` the rows of the `count` chunks from `first` on, whose codes and weights are in shared memory: this
// thread's are every (kThreads / Lanes)-th.
template <class T, int N, int Lanes>
__device__ void add_rows(const LookupLinear& call, const int* codes, const float* weights, int64_t first, int count,
                         int64_t column, float (&sum)[N]) {
  constexpr int kRows = kThreads / Lanes;
  const T* const tables = static_cast<const T*>(call.tables) + column;
  for (int start = threadIdx.x / Lanes; start < count; start += kRows * kAhead) {
    Piece<T, N> pieces[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int j = start + i * kRows;
      if (j < count) pieces[i].read(tables + (((first + j) << call.bits) + codes[j]) * call.h);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int j = start + i * kRows;
      if (j < count) pieces[i].add_to(sum, weights[j]);
    }
  }
}

template <class T, int N, int Lanes>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const LookupLinear call, int64_t part) {
  __shared__ int codes[kChunks];
  __shared__ float weights[kChunks];
  __shared__ float sums[kWarps][Lanes * N];

  const int64_t t = blockIdx.x, block_column = int64_t(blockIdx.y) * Lanes * N, s = blockIdx.z;
  const int64_t column = block_column + threadIdx.x % Lanes * N;
  const int64_t begin = s * part, end = min(begin + part, call.K);

  float sum[N] = {};
  for (int64_t first = begin; first < end; first += kChunks) {
    const int count = static_cast<int>(min(int64_t(kChunks), end - first));
    hash_chunks(call, t, first, count, codes, weights);
    __syncthreads();
    if (column < call.h) add_rows<T, N, Lanes>(call, codes, weights, first, count, column, sum);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int lane = Lanes; lane < 32; lane *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], lane);
    if (threadIdx.x % 32 < Lanes) sums[threadIdx.x / 32][threadIdx.x % 32 * N + i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x >= Lanes * N) return;
  float total = 0;
  for (int warp = 0; warp < kWarps; warp++) total += sums[warp][threadIdx.x];
  const int64_t own = block_column + threadIdx.x;
  if (own >= call.h) return;
  if (call.parts == 1)
    finish(call, t, own, total);
  else
    call.partial[(s * call.T + t) * call.h + own] = total;
}

__global__ void __launch_bounds__(kThreads) parts_kernel(const LookupLinear call) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= call.T * call.h) return;
  float total = 0;
  for (int64_t s = 0; s < call.parts; s++) total += call.partial[s * call.T * call.h + i];
  finish(call, i / call.h, i % call.h, total);
}

int size_of(int table_type) { return table_type == 4 ? 1 : table_type == static_cast<int>(DType::f32) ? 4 : 2; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool narrow(int64_t T, int64_t h, int table_type) {
  return T * ceil_div(h * size_of(table_type), 16 * kWide) < 2 * kBlocks;
}

template <class T, int N, int Lanes>
const char* launch(const LookupLinear& call, cudaStream_t stream) {
  const int64_t columns = ceil_div(call.h, Lanes * N);
  if (call.T > INT32_MAX || columns > 65535) return "T or h is too large for one launch";
  const dim3 grid(static_cast<unsigned>(call.T), static_cast<unsigned>(columns), static_cast<unsigned>(call.parts));
  rows_kernel<T, N, Lanes><<<grid, kThreads, 0, stream>>>(call, ceil_div(call.K, call.parts));
  return nullptr;
}

template <class T>
const char* launch_for(const LookupLinear& call, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  if (call.h % N || reinterpret_cast<uintptr_t>(call.tables) % 16) return launch<T, 1, kOdd>(call, stream);
  if (narrow(call.T, call.h, call.table_type)) return launch<T, N, kNarrow>(call, stream);
  return launch<T, N, kWide>(call, stream);
}

const char* launch_any(const LookupLinear& call, cudaStream_t stream) {
  switch (call.table_type) {
    case static_cast<int>(DType::f32):
      return launch_for<float>(call, stream);
    case static_cast<int>(DType::bf16):
      return launch_for<__nv_bfloat16>(call, stream);
    case static_cast<int>(DType::f16):
      return launch_for<__half>(call, stream);
    case 4:
      return launch_for<int8_t>(call, stream);
    default:
      return "tables of this dtype have no CUDA kernel";
  }
}

}  // namespace

int64_t lookup_linear_parts(int64_t T, int64_t K, int64_t h, int table_type) {
  const bool few = narrow(T, h, table_type);
  const int64_t lanes = few ? kNarrow : kWide;
  const int64_t blocks = T * ceil_div(h * size_of(table_type), 16 * lanes);
  const int64_t most = ceil_div(K, kThreads / lanes);  // a part should have a row for every thread
  const int64_t wanted = blocks ? kBlocks / blocks : 1;
  return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

const char* lookup_linear(const LookupLinear& call, void* handle) {
  if (call.T == 0 || call.h == 0) return nullptr;
  if (call.x_type == DType::f64) return "float64 has no CUDA kernel";
  if (call.parts < 1 || call.parts > kBlocks || (call.parts > 1 && !call.partial))
    return "the number of parts must be from lookup_linear_parts, with memory for their sums";
  const cudaStream_t stream = static_cast<cudaStream_t>(handle);
  if (const char* reason = launch_any(call, stream)) return reason;
  if (call.parts > 1) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(call.T * call.h, kThreads));
    parts_kernel<<<blocks, kThreads, 0, stream>>>(call);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pyrepr::cuda
