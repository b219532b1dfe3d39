// What this machine can do at best, measured: the bounds that benchmarks quote beside their numbers.
#pragma once

#include <cstdint>

namespace pyrepr::cpu {

struct ProbeFunctions {
  // Multiply-adds in float on all threads for about `seconds`: flops per second (two for each multiply-add).
  double (*fma_peak)(int threads, double seconds);
  // The same for the micro-kernel of gemm.h on packed blocks: what any product here can reach.
  double (*micro_kernel)(int threads, double seconds);
  // Bytes per second at which `threads` threads read `bytes` of memory, or of a cache that holds them.
  double (*read_bandwidth)(int threads, int64_t bytes);
};

}  // namespace pyrepr::cpu
