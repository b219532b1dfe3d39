// Enough of CUDA to run a kernel's blocks, one after the other, with a thread of the CPU for every thread of a block.
// Warp shuffles and barriers meet where the hardware's do: a thread that misses one hangs, and the test times out.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 0, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline dim3 blockIdx;
inline thread_local dim3 threadIdx;

struct Warp {
  std::barrier<> meet{32};
  float lanes[32];
};
struct Block {
  explicit Block(unsigned threads) : meet(threads), warps(new Warp[threads / 32]) {}
  std::barrier<> meet;
  std::unique_ptr<Warp[]> warps;
};
inline Block* block;

inline void __syncthreads() { block->meet.arrive_and_wait(); }
inline float __shfl_xor_sync(unsigned, float x, unsigned offset) {
  Warp& warp = block->warps[threadIdx.x / 32];
  warp.lanes[threadIdx.x % 32] = x;
  warp.meet.arrive_and_wait();
  const float other = warp.lanes[threadIdx.x % 32 ^ offset];
  warp.meet.arrive_and_wait();
  return other;
}
template <class Kernel, class... Arguments>
void launch_on_cpu(Kernel kernel, dim3 grid, unsigned threads, Arguments... arguments) {
  for (unsigned number = 0; number < grid.x * grid.y * grid.z; number++) {
    blockIdx = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
    Block own(threads);
    block = &own;
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; t++)
      running.emplace_back([=] {
        threadIdx.x = t;
        kernel(arguments...);
      });
    for (std::thread& thread : running) thread.join();
  }
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
