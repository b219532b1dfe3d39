// The two products that screen for top-k: see pairs_topk.h. Included by level units only.
//
// An engine is made of a chunk of y, which it packs and describes to `Columns`. Its Block is one thread's: `prepare`
// takes the rows of x that are searched together, `search` hands on their sums with every group of columns.
#pragma once

#include "cpu/pairs_columns.h"
#if defined(PYREPR_LEVEL_avx512_bf16)
#include "cpu/pairs_whole.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kTogether = 14;  // rows that are handed on together, as many as a block of the 16-bit product has

// Screening by the float product of gemm.h.
class FloatEngine {
 public:
  static constexpr int64_t kPanel = 16 * kGroup;  // columns of a tile
  FloatEngine(const TopkProblem& p, Columns& columns) : p_(p), columns_(columns), mean_(2 * p.x.cols) {
    const int64_t d = p.x.cols;
    // Raw rows are multiplied, so the mean must be one of theirs; the product takes no factor per row.
    if (p.metric == Metric::cosine || !(columns.factor > 0x1p-60 && columns.factor < 0x1p60)) columns.drop_centre();
    for (int64_t k = 0; k < d; k++) mean_[k] = static_cast<float>(columns.centre[k] / columns.factor);
    const auto describe = [&](const Array<float>& shifted) {
#pragma omp for schedule(static)
      for (int64_t g = 0; g < columns.groups(); g++)
        for (int64_t j = g * kGroup; j < smaller(columns.count(), (g + 1) * kGroup); j++) {
          const double factor = columns.factor_of(j);
          const auto [squares, largest] =
              shift_row(columns.y(), j, p.dtype, static_cast<float>(factor), columns.shift(), shifted.data());
          const double scale = p.metric == Metric::sqeuclidean ? factor * factor : factor;
          columns.describe(j, squares, 0, static_cast<float>(scale));
        }
    };
    with_scratch<Array<float>>(p.threads, describe, round_up(d, 16));
    for (float unit : columns.unit) least_ = larger(least_, 0x1p-146 * static_cast<double>(d) * unit);
  }

  // Whether sums with a row of this length stay finite, as do the columns' units, which are squares for distances.
  bool takes(double norm) const {
    const bool units = p_.metric != Metric::sqeuclidean || columns_.factor < 0x1p62;
    return units && (norm + columns_.longest) * (norm + columns_.longest) < 1e37;
  }
  // What sums lose where products are too small for a float, in the columns' units.
  double least() const { return least_; }

  class Block {
   public:
    explicit Block(const FloatEngine& engine)
        : engine_(engine), memory_(TileBuffers<float>::size(kQueries) + kQueries * kPanel, kUnset) {}
    // x' of a query is factor * x - c, of which this much is lost, in sums of d terms; their unit is 1 / a.
    void prepare(int64_t, const float*, const Shifted& x, double factor, double* lost, float* a) {
      const TopkProblem& p = engine_.p_;
      *lost = 0x1p-24 * static_cast<double>(p.x.cols + 8) * __builtin_sqrt(x.squares) * kMore;
      *a = p.metric == Metric::sqeuclidean ? 1 : static_cast<float>(1 / factor);
    }
    // use(first query, their number, group, get): get(r, v) is the v-th vector of the sums of row first + r, times
    // their units.
    template <class Use>
    void search(int64_t first, int64_t rows, Use use) {
      const TopkProblem& p = engine_.p_;
      const Columns& columns = engine_.columns_;
      const TileBuffers<float> buffers(memory_.data(), kQueries);
      float* const tile = memory_.data() + TileBuffers<float>::size(kQueries);
      for (int64_t c0 = 0; c0 < columns.count(); c0 += kPanel) {
        const int64_t count = smaller(kPanel, columns.count() - c0);
        by_storage(p.dtype, [&](auto s) {
          using S = decltype(s);
          const Source<S> x = engine_.source<S>(p.x, first, p.metric == Metric::sqeuclidean);
          const Source<S> y = engine_.source<S>(p.y, columns.first(), true);
          tile_product(x, 0, rows, y, c0, count, p.x.cols, false, buffers, tile, kPanel);
        });
        for (int64_t g = c0; g < c0 + count; g += kGroup)
          for (int64_t i = 0; i < rows; i += kTogether)
            use(i, smaller(kTogether, rows - i), g / kGroup, [&](int64_t r, int64_t v) {
              const int64_t at = g + v * Lanes<float>::W;
              return load<float>(tile + (i + r) * kPanel + at - c0) * load<float>(columns.unit.data() + at);
            });
      }
    }

   private:
    const FloatEngine& engine_;
    const Array<float> memory_;
  };

 private:
  template <class S>
  Source<S> source(const View& rows, int64_t first, bool shifted) const {
    Source<S> s;
    s.data = row_at<S>(rows, first);
    s.r_stride = rows.row_stride;
    s.k_stride = 1;
    if (shifted && columns_.shift()) {
      s.mean_high = mean_.data();
      s.mean_low = mean_.data() + p_.x.cols;
    }
    return s;
  }

  const TopkProblem& p_;
  Columns& columns_;
  const Array<float> mean_;  // high, low
  double least_ = 0;
};

#if defined(PYREPR_LEVEL_avx512_bf16)
// Screening by products of 16-bit whole numbers, exact in 32 bits: each vector is scaled to a length of at most
// kLength, so that no sum overflows.
class WholeEngine {
 public:
  static constexpr double kLength = 46340;  // its square is below 2^31

  WholeEngine(const TopkProblem& p, Columns& columns)
      : p_(p),
        columns_(columns),
        width_(round_up(p.x.cols, WholeProduct::kUnit)),
        product_(width_),
        panels_(columns.groups() * kGroup * width_ / 2, kUnset) {
    struct Scratch {
      Array<float> shifted;
      Array<int16_t> whole;
      explicit Scratch(int64_t width) : shifted(width), whole(kGroup * width) {}
    };
    const auto pack = [&](const Scratch& own) {
      const Array<float>& shifted = own.shifted;  // by names that OpenMP may share, as those of a binding it may not
      const Array<int16_t>& whole = own.whole;
#pragma omp for schedule(static)
      for (int64_t g = 0; g < columns.groups(); g++) {
        zero(whole.data(), whole.size());
        for (int64_t j = g * kGroup; j < smaller(columns.count(), (g + 1) * kGroup); j++) {
          if (!columns.seen(j)) continue;
          const Shifted y = shift_row(columns.y(), j, p.dtype, static_cast<float>(columns.factor_of(j)),
                                      columns.shift(), shifted.data());
          const auto [scale, lost] = to_whole(shifted.data(), y, whole.data() + (j - g * kGroup) * width_);
          columns.describe(j, y.squares, lost, scale > 0 ? 1 / scale : 0);
        }
        product_.pack(whole.data(), panel(g));
      }
    };
    with_scratch<Scratch>(p.threads, pack, width_);
  }
  bool takes(double) const { return true; }
  double least() const { return 0; }

  class Block {
   public:
    explicit Block(const WholeEngine& engine)
        : engine_(engine), whole_(engine.width_), rows_(engine.product_.words(kQueries), kUnset) {}
    void prepare(int64_t i, const float* shifted, const Shifted& x, double, double* lost, float* a) {
      const auto [scale, loss] = engine_.to_whole(shifted, x, whole_.data());
      *lost = loss;
      *a = scale > 0 ? scale : 1;
      engine_.product_.keep(whole_.data(), i, rows_.data());
    }
    template <class Use>
    void search(int64_t, int64_t rows, Use use) {
      const Columns& columns = engine_.columns_;
      const WholeProduct::Scope scope;
      alignas(64) int32_t sums[kPairRows * kPairColumns];
      for (int64_t g = 0; g < columns.groups(); g++) {
        const float* const unit = columns.unit.data() + g * kGroup;
        for (int64_t i = 0; i < rows; i += kPairRows) {
          engine_.product_.multiply(rows_.data(), i, engine_.panel(g), sums);
          use(i, smaller<int64_t>(kTogether, rows - i), g, [&](int64_t r, int64_t v) {
            const __m512i sum = _mm512_load_si512(sums + r * kPairColumns + v * 16);
            return _mm512_cvtepi32_ps(sum) * load<float>(unit + v * 16);
          });
        }
      }
    }

   private:
    const WholeEngine& engine_;
    const Array<int16_t> whole_;
    const Array<int32_t> rows_;
  };

 private:
  int32_t* panel(int64_t g) const { return panels_.data() + g * kGroup * width_ / 2; }

  struct Scaled {
    float scale;
    double lost;
  };
  // out [width] = whole numbers near scale * x.
  Scaled to_whole(const float* x, const Shifted& size, int16_t* out) const {
    // Rounding can make a vector longer by half a unit an element.
    const double most = kLength - __builtin_sqrt(static_cast<double>(width_)) / 2 - 1;
    const double scale = smaller(most / __builtin_sqrt(size.squares), WholeProduct::kLargest / size.largest);
    if (!(scale < 0x1p100)) {  // nothing to scale
      zero(out, width_);
      return {0, __builtin_sqrt(size.squares)};
    }
    const float to = static_cast<float>(scale * (1 - 0x1p-20));
    double squares = 0;
    for (int64_t k0 = 0; k0 < round_up(p_.x.cols, 16); k0 += 256) {
      Vec<float> sum{};
      for (int64_t k = k0; k < smaller<int64_t>(k0 + 256, round_up(p_.x.cols, 16)); k += 16) {
        const Vec<float> exact = load<float>(x + k) * to;
        const __m512i whole = _mm512_cvtps_epi32(exact);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), _mm512_cvtepi32_epi16(whole));
        const Vec<float> rest = exact - _mm512_cvtepi32_ps(whole);
        sum += rest * rest;
      }
      squares += lane_sum<float>(sum);
    }
    return {to, (__builtin_sqrt(squares) * kMore + 0x1p-22 * kLength) / to};
  }

  const TopkProblem& p_;
  Columns& columns_;
  const int64_t width_;
  const WholeProduct product_;
  const Array<int32_t> panels_;
};
#endif

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
