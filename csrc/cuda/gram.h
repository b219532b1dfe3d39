// Family `gram` in CUDA C++. No CUDA header here, so that the bindings need none.
#pragma once

#include <cstdint>

namespace pyrepr::cuda {

// Edge of the sample tiles: gram_pair_stats writes one row of partial sums per tile (I, J) with I <= J.
constexpr int64_t kTile = 128;

// For centred x [n, p] and y [n, q] (contiguous float32): partial [tiles, 3] double, for every tile the sums over its
// entries i < j of K_ij K_ij, K_ij L_ij, L_ij L_ij, where K = x x^T and L = y y^T. tiles = t (t + 1) / 2, t = ceil(n /
// 128). Launches on `stream` and does not wait. Returns null, or what CUDA says went wrong.
const char* gram_pair_stats(const float* x, const float* y, int64_t n, int64_t p, int64_t q, double* partial,
                            int64_t tiles, void* stream);

}  // namespace pyrepr::cuda
