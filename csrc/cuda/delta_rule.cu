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

// Sums of k^2, q^2 and k q over all lanes of a warp, the same in every lane.
__device__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Fills `row` with token t; returns <k, q> of the normalised rows, the same in every thread. Every warp takes all the
// sums itself, which saves a barrier.
template <class E>
__device__ float load_row(const DeltaRuleStep& p, const E* q, const E* k, const float* g, Row& row) {
  const int lane = threadIdx.x % 32;
  float kk = 0, qq = 0, kq = 0;
  for (int i = lane; i < p.width; i += 32) {
    const float key = to_float(k[i]), query = to_float(q[i]);
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
  for (int i = threadIdx.x; i < p.width; i += kThreads) {
    const float key = to_float(k[i]) * k_scale;
    const float decay = g ? expf(g[p.gate_per_key ? i : 0]) : 1.f;
    row.k[i] = key;
    row.decay[i] = decay;
    row.decayed_k[i] = decay * key;
    row.decayed_q[i] = decay * (to_float(q[i]) * q_scale);
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
  const int64_t h = hv / (p.value_heads / p.heads);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, warp = threadIdx.x / 32;
  const int64_t c = blockIdx.x % blocks * kColumns + lane * 4;
  const int64_t batch = p.bounds ? 0 : sequence;
  const int64_t first = p.bounds ? max(p.bounds[sequence], int64_t(0)) : 0;
  const int64_t last = p.bounds ? min(p.bounds[sequence + 1], p.total) : p.total;

  const bool vector = p.value_width % 4 == 0;
  const int64_t offset = state * p.width * p.value_width;
  float4 s[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int64_t r = group + i * kRowGroups;
    s[i] = {0, 0, 0, 0};
    if (p.initial && r < p.width) s[i] = load_columns(p.initial + offset + r * p.value_width, c, p.value_width, vector);
  }
  for (int64_t t = first; t < last; t++) {
    Row& row = rows[(t - first) % 2];
    const int64_t token = (batch * p.total + t) * p.value_heads + hv;
    const E* const q = static_cast<const E*>(p.q.data) + batch * p.q.batch + t * p.q.token + h * p.q.head;
    const E* const k = static_cast<const E*>(p.k.data) + batch * p.k.batch + t * p.k.token + h * p.k.head;
    const E* const v = static_cast<const E*>(p.v.data) + batch * p.v.batch + t * p.v.token + hv * p.v.head;
    const float* const g = p.g ? p.g + (p.gate_per_key ? token * p.width : token) : nullptr;
    const float beta = p.beta[token];
    const float kq = load_row(p, q, k, g, row);
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
    const float value[4] = {c < p.value_width ? to_float(v[c]) : 0.f, c + 1 < p.value_width ? to_float(v[c + 1]) : 0.f,
                            c + 2 < p.value_width ? to_float(v[c + 2]) : 0.f,
                            c + 3 < p.value_width ? to_float(v[c + 3]) : 0.f};
    const float4 delta = {beta * (value[0] - erased.x), beta * (value[1] - erased.y), beta * (value[2] - erased.z),
                          beta * (value[3] - erased.w)};
    if (group == 0) {
      read = sum_of_warps(read_parts, lane);
      add_product(read, kq, delta);
      E* const o = static_cast<E*>(p.o) + token * p.value_width;
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
