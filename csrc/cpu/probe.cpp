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

// Calls work(thread) on all threads until `seconds` have passed; returns calls per second of one thread.
template <class Work>
double rate(int threads, double seconds, Work work) {
  double spent = 0, calls = 0;
  for (; spent < seconds; calls++) {
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
    spent += omp_get_wtime() - start;
  }
  return calls / spent;
}

double fma_peak(int threads, double seconds) {
  constexpr int64_t rounds = 1000000;
  volatile float sink = 0;
  const double calls = rate(threads, seconds, [&](int) {
    const float result = multiply_adds(rounds);
#pragma omp critical
    sink = sink + result;
  });
  return calls * 2 * 12 * Lanes<float>::W * rounds * threads;
}

double micro_kernel(int threads, double seconds) {
  using B = Block<float>;
  constexpr int64_t blocks = 16, repeats = 64;  // 16 blocks of rows, as a tile of gram.cpp has, against one panel
  const int64_t a_size = blocks * B::MR * kPanelStride, b_size = kDepth * B::NR, c_size = blocks * B::MR * B::NR;
  const int64_t size = round_up(a_size + b_size + c_size, 64);
  const Memory memory(threads * size * static_cast<int64_t>(sizeof(float)));
  if (!memory.ok()) return 0;
  for (int64_t i = 0; i < threads * size; i++) memory.as<float>()[i] = static_cast<float>(i % 7) - 3.f;
  const double calls = rate(threads, seconds, [&](int thread) {
    float* const a = memory.as<float>() + thread * size;
    for (int64_t repeat = 0; repeat < repeats; repeat++)
      for (int64_t i = 0; i < blocks; i++)
        multiply_block<float>(kDepth, a + i * B::MR * kPanelStride, a + a_size, a + a_size + b_size + i * B::MR * B::NR,
                              B::NR, false);
  });
  return calls * 2 * repeats * blocks * B::MR * B::NR * kDepth * threads;
}

constexpr int64_t kLeastRead = int64_t(64) << 20;  // less is read several times, or waking threads would count

double read_bandwidth(int threads, int64_t bytes) {
  const Memory memory(bytes);
  if (!memory.ok()) return 0;
  const int64_t count = bytes / static_cast<int64_t>(sizeof(float)) / 64 * 64;
  float* const data = memory.as<float>();
  const int64_t passes = larger<int64_t>(1, kLeastRead / bytes);
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
        for (int64_t pass = 0; pass < passes; pass++)
          for (int64_t i = from; i + 4 * Lanes<float>::W <= to; i += 4 * Lanes<float>::W)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[j] += load<float>(data + i + j * Lanes<float>::W);
      }
#pragma omp critical
      sink = sink + static_cast<float>(lane_sum<float>((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
    const auto read = static_cast<double>(passes * count) * sizeof(float);
    if (repeat) best = larger(best, read / (omp_get_wtime() - start));
  }
  return best;
}

}  // namespace

ProbeFunctions probe_functions() { return {fma_peak, micro_kernel, read_bandwidth}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
