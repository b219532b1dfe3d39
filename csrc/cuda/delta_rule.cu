// The delta rule token by token, for decoding:
//
//   delta = beta (v - (e^g S)^T k);   o = scale ((e^g S)^T q + <k, q> delta);   S <- e^g S + k delta^T
//
// One block of 128 threads holds 32 value columns of one state in registers, four columns and every 16th row a thread,
// from the first token to the last: the state is read once and written once, 8 K V bytes a head and sequence, and a
// token costs one pass over the registers and one reduction. Sums are taken in a fixed order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/delta_rule.h"

namespace pyrepr::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 32;                   // value columns of a block
constexpr int kLanes = kColumns / 4;           // threads along the columns
constexpr int kRowGroups = kThreads / kLanes;  // threads along the rows
constexpr int kWarps = kThreads / 32;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ void from_float(float x, float* out) { *out = x; }
__device__ void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }
__device__ void from_float(float x, __half* out) { *out = __float2half(x); }

// A token's rows as every thread needs them. Two of them, so that one can be filled while the other is still read.
struct Row {
  float k[kDeltaMaxWidth], decay[kDeltaMaxWidth], decayed_k[kDeltaMaxWidth], decayed_q[kDeltaMaxWidth];
};

// What a thread needs of a token, as it stands in memory: every COUNT-th part of q and k, every fourth of those of g,
// and its columns of v. It is fetched a token ahead, so that nothing waits for memory but the first token.
template <class E, int COUNT>
struct Token {
  static constexpr int kOwn = (COUNT + kWarps - 1) / kWarps;
  E q[COUNT], k[COUNT], v[4];
  float g[kOwn], beta;
};

template <class E, int COUNT>
__device__ void fetch(const DeltaRuleStep& p, int64_t batch, int64_t t, int64_t hv, int64_t c, Token<E, COUNT>& to) {
  const int64_t h = hv / (p.value_heads / p.heads), token = (batch * p.total + t) * p.value_heads + hv;
  const E* const q = static_cast<const E*>(p.q.data) + batch * p.q.batch + t * p.q.token + h * p.q.head;
  const E* const k = static_cast<const E*>(p.k.data) + batch * p.k.batch + t * p.k.token + h * p.k.head;
  const E* const v = static_cast<const E*>(p.v.data) + batch * p.v.batch + t * p.v.token + hv * p.v.head;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const int i = threadIdx.x % 32 + 32 * j;
    from_float(0.f, &to.q[j]);
    from_float(0.f, &to.k[j]);
    if (i < p.width) {
      to.q[j] = q[i];
      to.k[j] = k[i];
    }
  }
#pragma unroll
  for (int m = 0; m < Token<E, COUNT>::kOwn; m++) {
    const int i = threadIdx.x + kThreads * m;
    to.g[m] = 0;
    if (p.gate != Gate::none && i < p.width) to.g[m] = p.gate == Gate::per_key ? p.g[token * p.width + i] : p.g[token];
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    from_float(0.f, &to.v[j]);
    if (c + j < p.value_width) to.v[j] = v[c + j];
  }
  to.beta = p.beta[token];
}

// Sums of k^2, q^2 and k q over all lanes of a warp, the same in every lane.
__device__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Fills `row` with a token; returns <k, q> of the normalised rows, the same in every thread. Every warp holds whole
// rows and takes all the sums itself, which saves a barrier; of the entries it writes every fourth 32.
template <class E, int COUNT>
__device__ float fill_row(const DeltaRuleStep& p, const Token<E, COUNT>& token, Row& row) {
  float kk = 0, qq = 0, kq = 0;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const float key = to_float(token.k[j]), query = to_float(token.q[j]);
    kk += key * key;
    qq += query * query;
    kq += key * query;
  }
  kq = warp_sum(kq);
  float k_scale = 1, q_scale = 1;
  if (p.l2norm) {
    k_scale = rsqrtf(warp_sum(kk) + 1e-6f);
    q_scale = rsqrtf(warp_sum(qq) + 1e-6f);
  }
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const int i = threadIdx.x % 32 + 32 * j;
    if (j % kWarps != threadIdx.x / 32 || i >= p.width) continue;
    const float key = to_float(token.k[j]) * k_scale, decay = expf(token.g[j / kWarps]);
    row.k[i] = key;
    row.decay[i] = decay;
    row.decayed_k[i] = decay * key;
    row.decayed_q[i] = decay * (to_float(token.q[j]) * q_scale);
  }
  return kq * k_scale * q_scale;
}

// Four neighbouring columns of a row of the state, from column `c` on; zero past `width`.
__device__ float4 load_columns(const float* row, int64_t c, int64_t width, bool vector) {
  if (vector && c + 4 <= width) return *reinterpret_cast<const float4*>(row + c);
  float4 x = {0, 0, 0, 0};
  if (c < width) x.x = row[c];
  if (c + 1 < width) x.y = row[c + 1];
  if (c + 2 < width) x.z = row[c + 2];
  if (c + 3 < width) x.w = row[c + 3];
  return x;
}
__device__ void store_columns(float* row, int64_t c, int64_t width, bool vector, float4 x) {
  if (vector && c + 4 <= width) {
    *reinterpret_cast<float4*>(row + c) = x;
    return;
  }
  if (c < width) row[c] = x.x;
  if (c + 1 < width) row[c + 1] = x.y;
  if (c + 2 < width) row[c + 2] = x.z;
  if (c + 3 < width) row[c + 3] = x.w;
}

__device__ void add_product(float4& sum, float a, const float4& x) {
  sum.x = fmaf(a, x.x, sum.x);
  sum.y = fmaf(a, x.y, sum.y);
  sum.z = fmaf(a, x.z, sum.z);
  sum.w = fmaf(a, x.w, sum.w);
}
// Sum over the row groups that share a warp.
__device__ float4 sum_in_warp(float4 x) {
#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) {
    x.x += __shfl_xor_sync(~0u, x.x, offset);
    x.y += __shfl_xor_sync(~0u, x.y, offset);
    x.z += __shfl_xor_sync(~0u, x.z, offset);
    x.w += __shfl_xor_sync(~0u, x.w, offset);
  }
  return x;
}
__device__ float4 sum_of_warps(const float4 (*parts)[kLanes], int lane) {
  float4 sum = parts[0][lane];
#pragma unroll
  for (int w = 1; w < kWarps; w++) add_product(sum, 1.f, parts[w][lane]);
  return sum;
}

template <class E, int ROWS>
__global__ void __launch_bounds__(kThreads) delta_rule_step_kernel(const __grid_constant__ DeltaRuleStep p) {
  __shared__ Row rows[2];
  __shared__ float4 erased_parts[kWarps][kLanes], read_parts[kWarps][kLanes];
  const int64_t blocks = (p.value_width + kColumns - 1) / kColumns;
  const int64_t state = blockIdx.x / blocks, hv = state % p.value_heads, sequence = state / p.value_heads;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, warp = threadIdx.x / 32;
  const int64_t c = blockIdx.x % blocks * kColumns + lane * 4;
  const int64_t batch = p.bounds ? 0 : sequence;
  const int64_t first = p.bounds ? max(p.bounds[sequence], int64_t(0)) : 0;
  const int64_t last = p.bounds ? min(p.bounds[sequence + 1], p.total) : p.total;

  const bool vector = p.value_width % 4 == 0 &&
                      (reinterpret_cast<uintptr_t>(p.initial) | reinterpret_cast<uintptr_t>(p.final)) % 16 == 0;
  const int64_t offset = state * p.width * p.value_width;
  float4 s[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int64_t r = group + i * kRowGroups;
    s[i] = {0, 0, 0, 0};
    if (p.initial && r < p.width) s[i] = load_columns(p.initial + offset + r * p.value_width, c, p.value_width, vector);
  }
  Token<E, ROWS / 2> token;
  if (first < last) fetch(p, batch, first, hv, c, token);
  for (int64_t t = first; t < last; t++) {
    Row& row = rows[(t - first) % 2];
    const float kq = fill_row(p, token, row);
    const float value[4] = {to_float(token.v[0]), to_float(token.v[1]), to_float(token.v[2]), to_float(token.v[3])};
    const float beta = token.beta;
    if (t + 1 < last) fetch(p, batch, t + 1, hv, c, token);
    __syncthreads();
    float4 erased = {0, 0, 0, 0}, read = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int r = group + i * kRowGroups;
      if (r >= p.width) break;
      add_product(erased, row.decayed_k[r], s[i]);
      add_product(read, row.decayed_q[r], s[i]);
    }
    erased = sum_in_warp(erased);
    read = sum_in_warp(read);
    if (threadIdx.x % 32 < kLanes) {
      erased_parts[warp][lane] = erased;
      read_parts[warp][lane] = read;
    }
    __syncthreads();
    erased = sum_of_warps(erased_parts, lane);
    const float4 delta = {beta * (value[0] - erased.x), beta * (value[1] - erased.y), beta * (value[2] - erased.z),
                          beta * (value[3] - erased.w)};
    if (group == 0) {
      read = sum_of_warps(read_parts, lane);
      add_product(read, kq, delta);
      E* const o = static_cast<E*>(p.o) + ((batch * p.total + t) * p.value_heads + hv) * p.value_width;
      const float out[4] = {read.x, read.y, read.z, read.w};
      for (int j = 0; j < 4; j++)
        if (c + j < p.value_width) from_float(p.scale * out[j], o + c + j);
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int r = group + i * kRowGroups;
      if (r >= p.width) break;
      const float decay = row.decay[r];
      s[i] = {s[i].x * decay, s[i].y * decay, s[i].z * decay, s[i].w * decay};
      add_product(s[i], row.k[r], delta);
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int64_t r = group + i * kRowGroups;
    if (r < p.width) store_columns(p.final + offset + r * p.value_width, c, p.value_width, vector, s[i]);
  }
}

template <class E>
cudaError_t launch(const DeltaRuleStep& p, unsigned blocks, cudaStream_t stream) {
  if (p.width <= 64)
    delta_rule_step_kernel<E, 64 / kRowGroups><<<blocks, kThreads, 0, stream>>>(p);
  else if (p.width <= 128)
    delta_rule_step_kernel<E, 128 / kRowGroups><<<blocks, kThreads, 0, stream>>>(p);
  else
    delta_rule_step_kernel<E, kDeltaMaxWidth / kRowGroups><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

const char* delta_rule_step(const DeltaRuleStep& p, void* stream_) {
  const int64_t blocks = p.sequences * p.value_heads * ((p.value_width + kColumns - 1) / kColumns);
  if (p.width > kDeltaMaxWidth) return "K must be at most 256";
  if (blocks > INT32_MAX) return "there are too many states for one launch";
  if (blocks == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  cudaError_t error;
  switch (p.dtype) {
    case DType::f32:
      error = launch<float>(p, static_cast<unsigned>(blocks), stream);
      break;
    case DType::bf16:
      error = launch<__nv_bfloat16>(p, static_cast<unsigned>(blocks), stream);
      break;
    case DType::f16:
      error = launch<__half>(p, static_cast<unsigned>(blocks), stream);
      break;
    default:
      return "float64 runs in the reference";
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pyrepr::cuda
