// Inner products of bfloat16 rows by products of pairs (dots.h), twice as fast as those of floats. They take the
// elements as they are stored, so the rows are centred afterwards,
//
//   <x_i - m, x_j - m> = <x_i, x_j> - (<x_i, m> - <m, m> / 2) - (<x_j, m> - <m, m> / 2)
//
// which loses digits by as much as the mean row is longer than what sets rows apart: a layer of which that is too much,
// or that a product of pairs is not made for, goes by floats. Included by the level unit of avx512_bf16 only.
#pragma once

#include "cpu/dots.h"
#include "cpu/pairs.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

static_assert(kPairRows == Block<float>::MR && kPairColumns == Block<float>::NR, "tiles are cut alike");

// Rows of one layer with themselves, of which what lies below the diagonal is not wanted.
struct RowPairs {
  Product<StoreBf16, StoreBf16> floats;
  bool by_pairs = false;
  const float *high = nullptr, *low = nullptr;  // [n] what is subtracted of each row and column, as a sum of two
  int64_t rows, cols;
  bool upper = true;

  void multiply(const Span& at, const TileBuffers<float>& buffers, float* tile, int64_t ldc, double* sum) const {
    if (!by_pairs) return floats.multiply(at, buffers, tile, ldc, sum);
    const PairProducts products;
    const int64_t pairs = ceil_div(floats.depth, 2);
    auto* const a = reinterpret_cast<int32_t*>(buffers.a);
    auto* const b = reinterpret_cast<int32_t*>(buffers.b);
    for (int64_t k0 = 0; k0 < pairs; k0 += kDepth) {
      const int64_t count = smaller(kDepth, pairs - k0);
      for (int64_t r = 0; r < round_up(at.rows, kPairRows); r++)
        copy(r < at.rows ? at.r0 + r : -1, k0, count, a + r * kPanelStride);
      for (int64_t j = 0; j < at.cols; j += kPairColumns) {
        if (at.r0 > at.c0 + j + kPairColumns - 1) continue;
        pack(at.c0 + j, smaller<int64_t>(kPairColumns, at.cols - j), k0, count, b);
        for (int64_t i = 0; i < at.rows && at.r0 + i <= at.c0 + j + kPairColumns - 1; i += kPairRows)
          multiply_pairs<Bf16Pairs>(count, a + i * kPanelStride, b, tile + i * ldc + j, ldc, k0 > 0);
      }
    }
    if (high) centre(at, tile, ldc);
  }

 private:
  const uint16_t* row(int64_t r) const { return floats.a.data + floats.a.at_r(r) * floats.a.r_stride; }

  // out [count] = pairs [k0, k0 + count) of row r, zeros for r = -1; an odd element at the end is paired with zero.
  void copy(int64_t r, int64_t k0, int64_t count, int32_t* out) const {
    const int64_t elements = smaller(2 * count, floats.depth - 2 * k0);
    if (r < 0 || elements < 2 * count) zero(out, count);
    if (r >= 0) std::memcpy(out, row(r) + 2 * k0, static_cast<size_t>(elements) * sizeof(uint16_t));
  }
  // A panel of `rows` rows from r0 on, zeros behind them.
  void pack(int64_t r0, int64_t rows, int64_t k0, int64_t count, int32_t* out) const {
    for (int64_t k = 0; k < count; k += 16)
      for (int half = 0; half < 2; half++) {
        Vec<float> v[16];
        for (int64_t i = 0; i < 16; i++) {
          const int64_t r = 16 * half + i;
          alignas(64) int32_t some[16];
          if (r < rows && 2 * (k0 + k + 16) <= floats.depth) {
            std::memcpy(&v[i], row(r0 + r) + 2 * (k0 + k), sizeof v[i]);
          } else {
            copy(r < rows ? r0 + r : -1, k0 + k, 16, some);
            std::memcpy(&v[i], some, sizeof v[i]);
          }
        }
        transpose_registers<float>(v);
        for (int64_t i = 0; i < smaller<int64_t>(16, count - k); i++)
          std::memcpy(out + (k + i) * kPairColumns + 16 * half, &v[i], sizeof v[i]);
      }
  }
  void centre(const Span& at, float* tile, int64_t ldc) const {
    constexpr int W = Lanes<float>::W;
    using S = StoreF32;
    for (int64_t i = 0; i < at.rows; i++)
      for (int64_t j = 0; j < at.cols; j += W) {
        const Vec<float> columns = load_some<S>(high + at.c0 + j, at.cols - j);
        const Vec<float> rest = load_some<S>(low + at.c0 + j, at.cols - j) + low[at.r0 + i];
        float* const to = tile + i * ldc + j;
        store<float>(to, ((load<float>(to) - high[at.r0 + i]) - columns) - rest);
      }
  }
};

// The layers of a problem with themselves.
class LayerPairs {
 public:
  // norms [M, n]: of the rows that `prepared` has, centred if it centres.
  LayerPairs(const GramProblem& p, const Prepared<StoreBf16>& prepared, const double* norms)
      : p_(p),
        memory_(2 * p.count * p.n * int64_t(sizeof(float))),
        products_(p.count * int64_t(sizeof(RowPairs)) + 64) {
    if (!ok()) return;
    for (int64_t l = 0; l < p.count; l++) prepare(l, prepared.samples(l), norms + l * p.n);
  }
  bool ok() const { return memory_.ok() && products_.ok(); }
  const RowPairs& of(int64_t l) const { return products_.as<RowPairs>()[l]; }

 private:
  static constexpr double kMost = 8;       // |m|^2 over the mean squared distance to it
  static constexpr int64_t kFewest = 128;  // rows, fewer of which are no work, and have little to average errors over
  static constexpr double kFaint = 1e-30, kLoud = 1e30;  // of a mean square, so that nothing is denormal or infinite

  void prepare(int64_t l, const Source<StoreBf16>& x, const double* q) {
    const int64_t n = p_.n, d = p_.layers[l].cols;
    RowPairs& product =
        *new (products_.as<RowPairs>() + l) RowPairs{{x, x, n, n, d, true}, false, nullptr, nullptr, n, n};
    double squares = 0, of_mean = 0;
    for (int64_t i = 0; i < n; i++) squares += q[i];
    for (int64_t k = 0; x.mean_high && k < d; k++) {
      const double mean = double(x.mean_high[k]) + x.mean_low[k];
      of_mean += mean * mean;
    }
    const double each = squares / static_cast<double>(n * d);
    if (x.k_stride != 1 || d > kStretch || n < kFewest) return;
    if (!(each > kFaint && each < kLoud && of_mean * static_cast<double>(n) <= kMost * squares)) return;
    product.by_pairs = true;
    if (!x.mean_high) return;
    float* const high = memory_.as<float>() + 2 * l * n;
    float* const low = high + n;
    product.high = high;
    product.low = low;
#pragma omp parallel for schedule(static) num_threads(p_.threads)
    for (int64_t i = 0; i < n; i++) {
      const double value = along_mean(x, i, d) - of_mean / 2;
      high[i] = static_cast<float>(value);
      low[i] = static_cast<float>(value - high[i]);
    }
  }
  // <x_i, m>
  static double along_mean(const Source<StoreBf16>& x, int64_t i, int64_t d) {
    constexpr int W = Lanes<float>::W;
    using Wide = Lanes<float>::Wide;
    const uint16_t* const row = x.data + x.at_r(i) * x.r_stride;
    Wide sum{};
    for (int64_t k = 0; k < d; k += W) {
      const auto wide = [&](Vec<float> v) { return __builtin_convertvector(v, Wide); };
      sum += wide(load_some<StoreBf16>(row + k, d - k)) *
             (wide(load_some<StoreF32>(x.mean_high + k, d - k)) + wide(load_some<StoreF32>(x.mean_low + k, d - k)));
    }
    double total = 0;
    for (int w = 0; w < W; w++) total += sum[w];
    return total;
  }

  const GramProblem& p_;
  const Memory memory_, products_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
