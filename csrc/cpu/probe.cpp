// Measures the machine, once per instruction set (PYREPR_LEVEL).
#include "cpu/probe.h"

#include <omp.h>

#include "cpu/gemm.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// Twelve independent chains hide the latency of a multiply-add on every machine and fit 16 registers with their
// factors.
__attribute__((noinline)) float multiply_adds(int64_t rounds) {
  constexpr int chains = 12;
  Vec<float> sum[chains];
  for (int i = 0; i < chains; i++) sum[i] = splat<float>(1.f + static_cast<float>(i));
  Vec<float> factor = splat<float>(0.999999f), term = splat<float>(1e-6f);
  __asm__ volatile("" : "+m"(factor), "+m"(term));  // values the compiler cannot know
  const Vec<float> a = factor, b = term;
  for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
    for (int i = 0; i < chains; i++) sum[i] = sum[i] * a + b;
  float total = 0;
  for (int i = 0; i < chains; i++) total += static_cast<float>(lane_sum<float>(sum[i]));
  return total;
}

double fma_peak(int threads, double seconds) {
  constexpr int64_t rounds = 20000;
  double flops = 0, spent = 0;
  volatile float sink = 0;
  while (spent < seconds) {
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
      const float result = multiply_adds(rounds * 50);
#pragma omp critical
      sink = sink + result;
    }
    spent += omp_get_wtime() - start;
    flops += 2.0 * 12 * Lanes<float>::W * rounds * 50 * threads;
  }
  return flops / spent;
}

double read_bandwidth(int threads, int64_t bytes) {
  const Memory memory(bytes);
  if (!memory.ok()) return 0;
  const int64_t count = bytes / static_cast<int64_t>(sizeof(float)) / 64 * 64;
  float* const data = memory.as<float>();
  double best = 0;
  volatile float sink = 0;
  for (int repeat = 0; repeat < 4; repeat++) {  // the first one also fills the memory, on the threads that read it
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
      const int64_t from = count / 64 * omp_get_thread_num() / threads * 64;
      const int64_t to = count / 64 * (omp_get_thread_num() + 1) / threads * 64;
      Vec<float> sum[4] = {};
      if (repeat == 0) {
        for (int64_t i = from; i < to; i++) data[i] = 1.f;
      } else {
        for (int64_t i = from; i + 4 * Lanes<float>::W <= to; i += 4 * Lanes<float>::W)
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) sum[j] += load<float>(data + i + j * Lanes<float>::W);
      }
#pragma omp critical
      sink = sink + static_cast<float>(lane_sum<float>((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
    if (repeat) best = larger(best, static_cast<double>(count) * sizeof(float) / (omp_get_wtime() - start));
  }
  return best;
}

}  // namespace

ProbeFunctions probe_functions() { return {fma_peak, read_bandwidth}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
