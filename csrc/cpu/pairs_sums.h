// What the gradients of losses on logits are added up in. Included by level units only.
#pragma once

#include "cpu/pairs_logsumexp.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// Zeros to add a gradient up in: what the caller gave if that is float.
struct Sums {
  Array<float> own;
  float* at;
  Sums(int64_t size, DType dtype, void* out)
      : own(dtype == DType::f32 ? 0 : size, kUnset), at(dtype == DType::f32 ? static_cast<float*>(out) : own.data()) {
    zero(at, size);
  }
};

struct GradientSums {
  const PairsProblem& p;
  const Factors factors;
  const Sums x, y;                            // [n, d], [m, d]
  const Array<double> row_sums, column_sums;  // [P, n], [P, m] of dS s

  // `dtype`: of what the gradients are written to.
  GradientSums(const PairsProblem& p_, DType dtype, void* dx, void* dy)
      : p(p_),
        factors(p_),
        x(p_.x.rows * p_.x.cols, dtype, dx),
        y(p_.y.rows * p_.x.cols, dtype, dy),
        row_sums(p_.prefix_count * p_.x.rows),
        column_sums(p_.prefix_count * p_.y.rows) {}

  // Rows [r0, r0 + rows) of `to`, features [f, f + count) += A B, of which only what exists is written.
  template <class Words, bool transposed>
  void add_block(int64_t depth, const typename Words::Word* a, const typename Words::Word* b, const Sums& sums,
                 int64_t r0, int64_t rows, int64_t f, int64_t count) const {
    constexpr int W = Lanes<float>::W, MR = Words::MR, NR = Words::NR;
    alignas(64) float block[MR * NR];
    const int64_t d = p.x.cols;
    float* const to = sums.at + r0 * d + f;
    for (int64_t i = 0; i < rows; i++) __builtin_prefetch(to + i * d, 1);
    Words::template multiply<transposed>(depth, a, b, block, NR, false);
    for (int64_t i = 0; i < rows; i++) {
      float* const out = to + i * d;
      if (count == NR) {
#pragma GCC unroll 4
        for (int64_t k = 0; k < NR; k += W)
          store<float>(out + k, load<float>(out + k) + load<float>(block + i * NR + k));
      } else {
        for (int64_t k = 0; k < count; k++) out[k] += block[i * NR + k];
      }
    }
  }

  // What the pairs (i, labels[i]) add, dS = weights[q, i]. Last, and not with the products: their many small terms
  // would be rounded as this large one is.
  void add_positives(const float* weights) const {
    by_storage(p.dtype, [&](auto s) {
      using S = decltype(s);
#pragma omp parallel for schedule(static) num_threads(p.threads)
      for (int64_t i = 0; i < p.x.rows; i++) add_pair<S>(x, i, p.y, p.labels[i], i, 0, p.x.cols, weights);
      // Rows may share a positive: a thread takes all of them, in their order, for some of the features.
      constexpr int64_t together = 64;
#pragma omp parallel for schedule(static) num_threads(p.threads)
      for (int64_t f = 0; f < p.x.cols; f += together)
        for (int64_t i = 0; i < p.x.rows; i++) add_pair<S>(y, p.labels[i], p.x, i, i, f, f + together, weights);
    });
  }

  // A normalised row's gradient is orthogonal to it: the part along it is taken away, prefix by prefix.
  void finish(void* dx, void* dy, float* dscale) const {
    double scale = 0;
    for (int64_t i = 0; i < p.prefix_count * p.x.rows; i++) scale += row_sums[i];
    *dscale = static_cast<float>(scale / p.scale);
    write(p.x, factors.row, row_sums, x.at, dx);
    write(p.y, factors.column, column_sums, y.at, dy);
  }

 private:
  // Row `to` of the sums, features [f0, f1) += what pair i has of row `from` of the other side.
  template <class S>
  void add_pair(const Sums& sums, int64_t to, const View& other, int64_t from, int64_t i, int64_t f0, int64_t f1,
                const float* weights) const {
    constexpr int W = Lanes<float>::W;
    float* const out = sums.at + to * p.x.cols;
    for (int64_t q = 0; q < p.prefix_count; q++) {
      const float c = weights[q * p.x.rows + i] * static_cast<float>(p.scale) * factors.row[q * p.x.rows + i] *
                      factors.column[q * p.y.rows + p.labels[i]];
      const int64_t end = smaller(f1, p.prefixes[q]);
      for (int64_t k = f0; k < end; k += W)
        store_some<StoreF32>(
            out + k, end - k,
            load_some<StoreF32>(out + k, end - k) + c * load_some<S>(row_at<S>(other, from) + k, end - k));
    }
  }

  void write(const View& x, const Array<float>& inverse, const Array<double>& along, float* grad, void* out_) const {
    const int64_t d = x.cols;
    by_storage(p.dtype, [&](auto s) {
      using S = decltype(s);
      constexpr int W = Lanes<float>::W;
#pragma omp parallel for schedule(static) num_threads(p.threads)
      for (int64_t r = 0; r < x.rows; r++) {
        float* const row = grad + r * d;
        const auto* const own = row_at<S>(x, r);
        for (int64_t q = 0; p.normalize && q < p.prefix_count; q++) {
          const float length = inverse[q * x.rows + r];
          const float factor = static_cast<float>(along[q * x.rows + r] * length);
          for (int64_t k = 0; k < p.prefixes[q]; k += W) {
            const int64_t count = p.prefixes[q] - k;
            const Vec<float> unit = length * load_some<S>(own + k, count);  // length^2 may be out of range
            store_some<StoreF32>(row + k, count, load_some<StoreF32>(row + k, count) - factor * unit);
          }
        }
        if (static_cast<void*>(grad) == out_) continue;  // the sums stand where they belong
        auto* const to = static_cast<typename S::Memory*>(out_) + r * d;
        for (int64_t k = 0; k < d; k += W) store_some<S>(to + k, d - k, load_some<StoreF32>(row + k, d - k));
      }
    });
  }
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
