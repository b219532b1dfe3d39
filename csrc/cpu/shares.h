// What single samples contribute to the statistics of a linear kernel, for the jackknife. Included by level units only.
#pragma once

#include "cpu/pairs.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

inline int64_t pair_number(int64_t layers, int64_t a, int64_t b) { return a * layers - a * (a - 1) / 2 + b - a; }

// Elements [k0, k0 + count) of a sample, zeros up to the next whole vector.
template <class S>
void read_sample(const Source<S>& s, int64_t i, int64_t k0, int64_t count, typename S::T* out) {
  for (int64_t k = count; k < round_up(count, Lanes<typename S::T>::W); k++) out[k] = 0;
  if (s.k_stride == 1) return read_along_k(s, i, 1, k0, count, out, count);
  for (int64_t k = 0; k < count; k++) out[k] = s.at(i, k0 + k);
}

// What a few samples add up to is added to sums in double at once, and what they are multiplied by is read once for
// all.
constexpr int64_t kFewSamples = 8;

// sums [M, stride] of one layer, features [k0, k0 + 128): sum_j q_aj x_j, for q [M, n].
template <class S>
void weigh_samples(const GramProblem& p, const Source<S>& s, int64_t k0, int64_t count, const double* q, double* sums,
                   int64_t stride) {
  using T = typename S::T;
  using Wide = typename Lanes<T>::Wide;
  constexpr int W = Lanes<T>::W;
  constexpr int64_t few = kFewSamples, chunk = 128;
  alignas(64) T x[few * chunk] = {};
  for (int64_t a = 0; a < p.count; a++) zero(sums + a * stride + k0, chunk);
  for (int64_t i = 0; i < p.n; i += few) {
    const int64_t rows = smaller(few, p.n - i);
    for (int64_t r = 0; r < rows; r++) read_sample(s, i + r, k0, count, x + r * chunk);
    for (int64_t a = 0; a < p.count; a++) {
      T weight[few];
      for (int64_t r = 0; r < few; r++) weight[r] = r < rows ? static_cast<T>(q[a * p.n + i + r]) : T(0);
      double* const to = sums + a * stride + k0;
      for (int64_t k = 0; k < count; k += W) {
        Vec<T> sum{};
#pragma GCC unroll 8
        for (int64_t r = 0; r < few; r++) sum += load<T>(x + r * chunk + k) * weight[r];
        Wide so_far;
        std::memcpy(&so_far, to + k, sizeof so_far);
        so_far += __builtin_convertvector(sum, Wide);
        std::memcpy(to + k, &so_far, sizeof so_far);
      }
    }
  }
}

// moved [M, M, n]: moved[b][a][i] = <x_bi, sum_j q_aj x_bj>, for q [M, n]. Reads every layer twice.
template <class S>
Status move_rows(const GramProblem& p, const Prepared<S>& prepared, const double* q, double* moved) {
  using T = typename S::T;
  constexpr int W = Lanes<T>::W;
  constexpr int64_t few = kFewSamples, chunk = 128;
  int64_t widest = 1;
  for (int64_t l = 0; l < p.count; l++) widest = larger(widest, p.layers[l].cols);
  const int64_t stride = round_up(widest, chunk);
  const Memory sums(p.count * stride * 8), rounded_sums(p.count * stride * int64_t(sizeof(T)));
  const Memory samples(p.threads * few * stride * int64_t(sizeof(T)));
  if (!sums.ok() || !rounded_sums.ok() || !samples.ok()) return Status::out_of_memory;
  T* const weights = rounded_sums.as<T>();
  for (int64_t b = 0; b < p.count; b++) {
    const Source<S> s = prepared.samples(b);
    const int64_t d = p.layers[b].cols;
    double* const out = moved + b * p.count * p.n;
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t k0 = 0; k0 < d; k0 += chunk) {
      weigh_samples(p, s, k0, smaller(chunk, d - k0), q, sums.as<double>(), stride);
      for (int64_t a = 0; a < p.count; a++)
        for (int64_t k = a * stride + k0; k < a * stride + k0 + chunk; k++)
          weights[k] = static_cast<T>(sums.as<double>()[k]);
    }
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t i = 0; i < p.n; i += few) {
      T* const x = samples.as<T>() + thread_number() * few * stride;
      const int64_t rows = smaller(few, p.n - i);
      for (int64_t r = 0; r < few; r++)
        if (r < rows)
          read_sample(s, i + r, 0, d, x + r * stride);
        else
          zero(x + r * stride, stride);
      for (int64_t a = 0; a < p.count; a++) {
        Vec<T> sum[few] = {};
        for (int64_t k = 0; k < d; k += W) {
          const Vec<T> weight = load<T>(weights + a * stride + k);
#pragma GCC unroll 8
          for (int64_t r = 0; r < few; r++) sum[r] += load<T>(x + r * stride + k) * weight;
        }
        for (int64_t r = 0; r < rows; r++) out[a * p.n + i + r] = static_cast<double>(lane_sum<T>(sum[r]));
      }
    }
  }
  return Status::ok;
}

// The products X_a^T X_b by which shares are weighed, one after the other in memory. Of X_a^T X_a the upper triangle
// with half of its diagonal, zeros below: x^T C x is twice that of it, for half of the multiply-adds.
template <class T>
class Crosses {
 public:
  // pairs [count, 2] layer numbers; memory null: nothing is kept.
  Crosses(const GramProblem& p, const int64_t* pairs, int64_t count, void* memory)
      : p_(p), pairs_(pairs), count_(count), data_(static_cast<T*>(memory)), offsets_(count * 8 + 8) {
    if (!offsets_.ok()) return;
    int64_t offset = 0;
    for (int64_t i = 0; i < count; i++) {
      offsets_.as<int64_t>()[i] = offset;
      offset += rows(i) * cols(i);
    }
  }
  bool ok() const { return offsets_.ok(); }
  int64_t rows(int64_t pair) const { return p_.layers[pairs_[2 * pair]].cols; }
  int64_t cols(int64_t pair) const { return p_.layers[pairs_[2 * pair + 1]].cols; }
  bool same(int64_t pair) const { return pairs_[2 * pair] == pairs_[2 * pair + 1]; }
  T* of(int64_t pair) const { return data_ + offsets_.template as<int64_t>()[pair]; }

  // Zeroes what no tile of a product with itself covers.
  void clear() const {
    for (int64_t pair = 0; data_ && pair < count_; pair++)
      if (same(pair)) zero(of(pair), rows(pair) * cols(pair));
  }

  // Takes a tile of a pair's product.
  void keep(const Tile<T>& tile, int64_t pair) const {
    if (!data_) return;
    const Span& at = tile.at;
    for (int64_t i = 0; i < at.rows; i++) {
      T* const out = of(pair) + (at.r0 + i) * cols(pair) + at.c0;
      const int64_t below = same(pair) ? smaller(at.cols, larger<int64_t>(0, at.r0 + i - at.c0)) : 0;
      zero(out, below);
      std::memcpy(out + below, tile.row(i) + below, static_cast<size_t>(at.cols - below) * sizeof(T));
      if (same(pair) && at.r0 + i >= at.c0 && below < at.cols) out[below] /= 2;
    }
  }

 private:
  const GramProblem& p_;
  const int64_t* const pairs_;
  const int64_t count_;
  T* const data_;
  const Memory offsets_;
};

// X C for C [depth, cols]; with `triangular` C has nothing below its diagonal.
template <class S>
struct Weighted {
  using T = typename S::T;
  Source<S> x;
  const T* c;
  int64_t rows, cols, depth;
  bool triangular;
  static constexpr bool upper = false;

  void multiply(const Span& at, const TileBuffers<T>& buffers, T* tile, int64_t ldc, double*) const {
    using B = Block<T>;
    Source<StoreOf<T>> columns;
    columns.data = c;
    columns.r_stride = 1;
    columns.k_stride = cols;
    for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
      const int64_t kc = smaller(kDepth, depth - k0);
      pack_a(x, at.r0, at.rows, k0, kc, buffers.a);
      for (int64_t j = 0; j < at.cols; j += B::NR) {
        const int64_t terms = triangular ? smaller(kc, at.c0 + j + B::NR - k0) : kc;
        if (terms <= 0) continue;
        pack_b(columns, at.c0 + j, smaller<int64_t>(B::NR, at.cols - j), k0, terms, buffers.b);
        for (int64_t i = 0; i < at.rows; i += B::MR)
          multiply_block<T>(terms, buffers.a + i * kPanelStride, buffers.b, tile + i * ldc + j, ldc, k0 > 0);
      }
    }
  }
};

// shares [M (M + 1) / 2, n] of the pairs: sum over j != i of k_a(i, j) k_b(i, j) = x_ai^T (X_a^T X_b) x_bi - q_ai q_bi.
template <class S>
Status share_by_features(const GramProblem& p, const Prepared<S>& prepared, const int64_t* pairs, int64_t pair_count,
                         const Crosses<typename S::T>& crosses, const double* q, double* shares) {
  using T = typename S::T;
  constexpr int W = Lanes<T>::W;
  int64_t widest = 1;
  for (int64_t l = 0; l < p.count; l++) widest = larger(widest, p.layers[l].cols);
  constexpr int64_t slots = 256;
  const TileShape shape(p.n, widest, Block<T>::MR, Block<T>::NR, 1, sizeof(T), pair_count);
  const Walk walk{shape, pair_count, 1, slots};
  const Memory values(slots * shape.rows * 8);
  if (!values.ok()) return Status::out_of_memory;
  for (int64_t i = 0; i < p.count * (p.count + 1) / 2 * p.n; i++) shares[i] = 0;
  const Status status = for_each_tile<T>(
      walk, p.threads,
      [&](int64_t pair, int64_t) {
        return Weighted<S>{prepared.samples(pairs[2 * pair]),
                           crosses.of(pair),
                           p.n,
                           crosses.cols(pair),
                           crosses.rows(pair),
                           crosses.same(pair)};
      },
      [&](const Tile<T>& tile, int64_t pair, int64_t, int64_t slot) {
        alignas(64) T row[kTileCols + Block<T>::NR];
        const Source<S> y = prepared.samples(pairs[2 * pair + 1]);
        for (int64_t i = 0; i < tile.at.rows; i++) {
          read_sample(y, tile.at.r0 + i, tile.at.c0, tile.at.cols, row);
          Vec<T> sum{};
          for (int64_t j = 0; j < tile.at.cols; j += W) sum += load<T>(tile.row(i) + j) * load<T>(row + j);
          values.as<double>()[slot * shape.rows + i] = (crosses.same(pair) ? 2 : 1) * double(lane_sum<T>(sum));
        }
      },
      [&](const Span& at, int64_t pair, int64_t slot) {
        double* const out = shares + pair_number(p.count, pairs[2 * pair], pairs[2 * pair + 1]) * p.n + at.r0;
        for (int64_t i = 0; i < at.rows; i++) out[i] += values.as<double>()[slot * shape.rows + i];
      });
  for (int64_t pair = 0; pair < pair_count; pair++) {
    const int64_t a = pairs[2 * pair], b = pairs[2 * pair + 1];
    double* const out = shares + pair_number(p.count, a, b) * p.n;
    for (int64_t i = 0; i < p.n; i++) out[i] -= q[a * p.n + i] * q[b * p.n + i];
  }
  return status;
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
