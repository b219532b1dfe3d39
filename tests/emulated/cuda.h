// Enough of CUDA to run a kernel's blocks, one after the other, on the CPU. The threads of a block are fibers that run
// one at a time, each as far as the next barrier or shuffle: in rising order, in falling order, or in a new random
// order every time. A kernel that lacks a barrier gives other bits in some of them. A thread that misses a barrier, or
// the shuffle of its warp, ends the run with a message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
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
struct alignas(16) float4 {
  float x, y, z, w;
};
inline dim3 blockIdx;
inline dim3 threadIdx;

enum class Order { rising, falling, random };
inline Order order = Order::rising;
inline int skipped_line = 0;  // a barrier that is left out, to see whether its lack is noticed
extern "C" void set_order(int number, int line) {
  order = static_cast<Order>(number);
  skipped_line = line;
}

enum class At { start, running, shuffle, barrier, end };
struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  At at;
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<float> lanes;
  std::function<void()> kernel;
  ucontext_t scheduler;
  std::mt19937 random{1};

  // Runs one thread until it has to wait for others.
  void resume(unsigned t) {
    threadIdx.x = t;
    fibers[t].at = At::running;
    swapcontext(&scheduler, &fibers[t].context);
  }
  void wait(At where) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.at = where;
    swapcontext(&fiber.context, &scheduler);
  }
  bool all(At where, size_t first, size_t count) const {
    return std::all_of(fibers.begin() + first, fibers.begin() + first + count,
                       [&](const Fiber& f) { return f.at == where; });
  }
  void run();
};
inline Block* block;

inline void fiber_main() {
  block->kernel();
  block->wait(At::end);
}

inline void Block::run() {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.at = At::start;
  }
  std::vector<unsigned> next(fibers.size());
  std::iota(next.begin(), next.end(), 0u);
  while (!next.empty()) {
    if (order == Order::falling) std::reverse(next.begin(), next.end());
    if (order == Order::random) std::shuffle(next.begin(), next.end(), random);
    for (unsigned t : next) resume(t);
    // Whoever waits and is not alone in waiting goes on.
    next.clear();
    const bool meet = all(At::barrier, 0, fibers.size());
    for (unsigned t = 0; t < fibers.size(); t++)
      if (meet || (fibers[t].at == At::shuffle && all(At::shuffle, t / 32 * 32, 32))) next.push_back(t);
  }
  if (!all(At::end, 0, fibers.size())) {
    std::fprintf(stderr, "a thread of block %u misses a barrier or a shuffle\n", blockIdx.x);
    std::abort();
  }
}

inline void synchronise(int line) {
  if (line != skipped_line) block->wait(At::barrier);
}
#define __syncthreads() synchronise(__LINE__)
inline float __shfl_xor_sync(unsigned, float x, unsigned offset) {
  const unsigned t = threadIdx.x;
  block->lanes[t] = x;
  block->wait(At::shuffle);
  const float other = block->lanes[t ^ offset];
  block->wait(At::shuffle);
  return other;
}
template <class Kernel, class... Arguments>
void launch_on_cpu(Kernel kernel, dim3 grid, unsigned threads, Arguments... arguments) {
  Block own;
  own.fibers = std::vector<Fiber>(threads);
  own.lanes.resize(threads);
  own.kernel = [&] { kernel(arguments...); };
  block = &own;
  for (unsigned number = 0; number < grid.x * grid.y * grid.z; number++) {
    blockIdx = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
    own.run();
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
