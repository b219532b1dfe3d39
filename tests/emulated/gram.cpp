// csrc/cuda/gram.cu as C++ (see cuda.h), behind a function that ctypes can call.
#include "gram.inc"

extern "C" const char* pair_stats(const float* x, const float* y, int64_t n, int64_t p, int64_t q, double* partial,
                                  int64_t tiles) {
  return pyrepr::cuda::gram_pair_stats(x, y, n, p, q, partial, tiles, nullptr);
}
