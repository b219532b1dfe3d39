// Log-sum-exps of the rows and columns of scaled inner products, without the matrix. Included by level units only.
//
// Work: 2 n m d flops. A task is a block of rows: it keeps (max, sum) of its rows, and leaves (max, sum) of every
// column, which are merged in the order of blocks. Positives are taken out of the sums, so that gaps keep all their
// digits; they are read from the tile, so that a gap is never negative.
//
// A tile whose logits are all within kMild of 0 takes one exponential an element for rows and columns both: e^s itself
// is in range, and so is any sum of it. Other tiles take one for each, after the largest was subtracted.
#pragma once

#include <cmath>

#include "cpu/pairs_packed.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kPairTileRows = 168, kPairTileCols = 384;
constexpr float kMild = 60;
constexpr float kNone = -__builtin_inff();

// How n x m is cut: from the sizes alone, so that small problems still have tasks for all threads.
struct Grid {
  int64_t rows, cols, row_blocks, col_blocks;
  Grid(int64_t n, int64_t m, int64_t unit_rows, int64_t unit_cols) {
    const auto cut = [](int64_t size, int64_t parts, int64_t unit, int64_t most) {
      return smaller(most / unit * unit, round_up(larger<int64_t>(1, ceil_div(size, parts)), unit));
    };
    rows = cut(n, 16, unit_rows, kPairTileRows);
    cols = cut(m, 4, unit_cols, kPairTileCols);
    row_blocks = ceil_div(n, rows);
    col_blocks = ceil_div(m, cols);
  }
};

// A sum of exponentials as sum * e^most.
struct LogSum {
  double most = kNone, sum = 0;
  void add(double other_most, double other_sum) {
    if (other_sum == 0) return;
    if (other_most > most) {
      sum = sum * std::exp(most - other_most) + other_sum;
      most = other_most;
    } else {
      sum += other_sum * (other_most > kNone ? std::exp(other_most - most) : 0);  // 0, or NaN, of e^-inf
    }
  }
  double log() const { return sum == 0 ? kNone : most + std::log(sum); }
};

// log(e^a + e^b) - a, with all digits however small, given b or what stands besides e^a.
inline double gap(double own, double same, double others) {
  const double most = larger(same, others);
  if (most - own > 30) return (most - own) + std::log(std::exp(same - most) + std::exp(others - most));
  return std::log1p(std::expm1(same - own) + std::exp(others - own));
}

// What logits are besides inner products and the scale: 1 / |x| and 1 / |y| of every prefix, 0 of a row of zeros; 1
// where nothing is normalised.
struct Factors {
  Array<float> row, column;  // [P, n], [P, m]
  explicit Factors(const PairsProblem& p) : row(p.prefix_count * p.x.rows, 1), column(p.prefix_count * p.y.rows, 1) {
    if (!p.normalize) return;
    invert(p, p.x, row.data());
    invert(p, p.y, column.data());
  }

 private:
  static void invert(const PairsProblem& p, const View& x, float* out) {
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t r = 0; r < x.rows; r++) {
      double squares = 0;
      for (int64_t q = 0, from = 0; q < p.prefix_count; from = p.prefixes[q++]) {
        for (int64_t k = from; k < p.prefixes[q]; k += 16) {
          float part[16];
          by_storage(p.dtype, [&](auto s) {
            using S = decltype(s);
            for (int64_t e = 0; e < 16; e += Lanes<float>::W)
              store<float>(part + e, load_some<S>(row_at<S>(x, r) + k + e, p.prefixes[q] - k - e));
          });
          for (int64_t e = 0; e < 16; e++) squares += double(part[e]) * part[e];
        }
        out[q * x.rows + r] = squares == 0 ? 0 : static_cast<float>(1 / std::sqrt(squares));
      }
    }
  }
};

struct LogitTile {
  float* data;  // [rows, cols], rows of kPanelStride
  int64_t r0, rows, c0, cols;
  float* row(int64_t i) const { return data + i * kPanelStride; }
};

// Inner products become logits; columns behind the last are `rest`. Returns the largest |logit|.
inline float to_logits(const LogitTile& dots, const LogitTile& to, const float* row_factor, const float* column_factor,
                       float scale, float rest) {
  constexpr int W = Lanes<float>::W;
  Vec<float> most{};
  for (int64_t i = 0; i < dots.rows; i++) {
    const float factor = scale * row_factor[dots.r0 + i];
    float* const out = to.row(i);
    for (int64_t j = 0; j < dots.cols; j += W) {
      const Vec<float> s =
          load<float>(dots.row(i) + j) * factor * load_some<StoreF32>(column_factor + dots.c0 + j, dots.cols - j);
      const Vec<float> size = s < 0 ? -s : s;
      most = size <= most ? most : size;  // a NaN stays
      store<float>(out + j, s);
    }
    for (int64_t j = dots.cols; j < round_up(dots.cols, W); j++) out[j] = rest;
  }
  float largest = 0;
  for (int w = 0; w < W; w++) largest = most[w] <= largest ? largest : most[w];
  return largest;
}

template <class Words>
class LogSumExp {
 public:
  static void run(const PairsProblem& p, const LogSumExpResult& out) {
    const Segments<Words> segments(p.prefixes, p.prefix_count);
    const ByFeature<Words> y(p.y, p.dtype, segments, p.threads);
    const LogSumExp all(p, out, segments, y);
    struct Scratch {
      RowBlock<Words> x;
      Array<float> tiles;
      Scratch(const Segments<Words>& segments, const Grid& grid)
          : x(segments, grid.rows), tiles(2 * grid.rows * kPanelStride, kUnset) {}
    };
    const auto work = [&](const Scratch& own) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t block = 0; block < all.grid_.row_blocks; block++) all.block(block, own.x, own.tiles.data());
    };
    with_scratch<Scratch>(p.threads, work, segments, all.grid_);
    all.finish();
  }

 private:
  static constexpr int W = Lanes<float>::W;
  using Tile = LogitTile;

  void block(int64_t number, const RowBlock<Words>& x, float* tiles) const {
    const int64_t r0 = number * grid_.rows, rows = smaller(grid_.rows, p_.x.rows - r0), m = p_.y.rows;
    x.pack(p_.x, p_.dtype, r0, rows);
    for (int64_t c0 = 0; c0 < m; c0 += grid_.cols) {
      const int64_t cols = smaller(grid_.cols, m - c0);
      const Tile dots{tiles, r0, rows, c0, cols}, own{tiles + grid_.rows * kPanelStride, r0, rows, c0, cols};
      int64_t first = 0;
      for (int64_t q = 0; q < p_.prefix_count; q++) {
        const Segment& s = segments_.list[q];
        x.multiply(rows, y_, c0, cols, s, first, dots.data);
        first += ceil_div(s.words, kDepth);
        const Tile& logits = q + 1 < p_.prefix_count ? own : dots;
        const float most = to_logits(dots, logits, factors_.row.data() + q * p_.x.rows, factors_.column.data() + q * m,
                                     static_cast<float>(p_.scale), kNone);
        take(logits, q, number, most <= kMild);
      }
    }
  }

  // The epilogue: a tile of logits of prefix q into the sums.
  void take(const Tile& t, int64_t q, int64_t number, bool mild) const {
    const int64_t n = p_.x.rows, m = p_.y.rows;
    if (out_.kept)
      for (int64_t i = 0; i < t.rows; i++)
        std::memcpy(out_.kept + (q * n + t.r0 + i) * m + t.c0, t.row(i), static_cast<size_t>(t.cols) * 4);
    for (int64_t i = 0; p_.labels && i < t.rows; i++) {
      const int64_t at = p_.labels[t.r0 + i] - t.c0;
      if (at < 0 || at >= t.cols) continue;
      positives_[q * n + t.r0 + i] = t.row(i)[at];
      t.row(i)[at] = kNone;
    }
    float* const most = columns_.data() + (number * p_.prefix_count + q) * 2 * m + t.c0;
    if (mild)
      sum_mild(t, rows_.data() + q * n + t.r0, most, most + m);
    else
      sum_all(t, rows_.data() + q * n + t.r0, most, most + m);
  }

  void sum_mild(const Tile& t, LogSum* rows, float* most, float* sums) const {
    alignas(64) float columns[kPairTileCols] = {};
    for (int64_t i = 0; i < t.rows; i++) {
      Vec<float> row{};
      for (int64_t j = 0; j < t.cols; j += W) {
        const Vec<float> e = exp_nonpositive<float>(load<float>(t.row(i) + j));
        row += e;
        store<float>(columns + j, load<float>(columns + j) + e);
      }
      rows[i].add(0, lane_sum<float>(row));
    }
    for (int64_t j = 0; out_.c && j < t.cols; j++) {
      most[j] = 0;
      sums[j] = columns[j];
    }
  }

  void sum_all(const Tile& t, LogSum* rows, float* most, float* sums) const {
    for (int64_t i = 0; i < t.rows; i++) {
      Vec<float> largest = splat<float>(kNone), row{};
      for (int64_t j = 0; j < t.cols; j += W) {
        const Vec<float> s = load<float>(t.row(i) + j);
        largest = s > largest ? s : largest;
      }
      float top = kNone;
      for (int w = 0; w < W; w++) top = larger(top, static_cast<float>(largest[w]));
      const float base = top > kNone ? top : 0;
      for (int64_t j = 0; j < t.cols; j += W) row += exp_nonpositive<float>(load<float>(t.row(i) + j) - base);
      rows[i].add(base, lane_sum<float>(row));
    }
    for (int64_t j = 0; out_.c && j < t.cols; j += W) {
      Vec<float> largest = splat<float>(kNone), column{};
      for (int64_t i = 0; i < t.rows; i++) {
        const Vec<float> s = load<float>(t.row(i) + j);
        largest = s > largest ? s : largest;
      }
      const Vec<float> base = largest > kNone ? largest : Vec<float>{};
      for (int64_t i = 0; i < t.rows; i++) column += exp_nonpositive<float>(load<float>(t.row(i) + j) - base);
      store_some<StoreF32>(most + j, t.cols - j, base);
      store_some<StoreF32>(sums + j, t.cols - j, column);
    }
  }

  void finish() const {
    const int64_t n = p_.x.rows;
    const bool labels = p_.labels != nullptr;
    for (int64_t q = 0; q < p_.prefix_count; q++) {
      const double* const positive = positives_.data() + q * n;
      for (int64_t i = 0; out_.r && i < n; i++) {
        const double others = rows_[q * n + i].log(), own = positive[i];
        const double gap_i = labels ? gap(own, own, others) : 0;
        out_.r[q * n + i] = static_cast<float>(labels ? own + gap_i : others);
        if (labels) out_.row_gaps[q * n + i] = static_cast<float>(gap_i);
      }
      if (out_.c) finish_columns(q, positive);
    }
  }

  void finish_columns(int64_t q, const double* positive) const {
    const int64_t n = p_.x.rows, m = p_.y.rows;
    const Array<double> others(m);
    const Array<LogSum> own(p_.labels ? m : 0);
    for (int64_t i = 0; p_.labels && i < n; i++)
      own[p_.labels[i]].add(positive[i], positive[i] == positive[i] ? 1 : positive[i]);
#pragma omp parallel for schedule(static) num_threads(p_.threads)
    for (int64_t j = 0; j < m; j++) {
      LogSum sum;
      for (int64_t b = 0; b < grid_.row_blocks; b++) {
        const float* const most = columns_.data() + (b * p_.prefix_count + q) * 2 * m + j;
        sum.add(most[0], most[m]);
      }
      others[j] = sum.log();
      if (p_.labels) sum.add(own[j].most, own[j].sum);
      out_.c[q * m + j] = static_cast<float>(sum.log());
    }
    for (int64_t i = 0; p_.labels && i < n; i++) {
      const int64_t j = p_.labels[i];
      const double same = own[j].log();
      out_.column_gaps[q * n + i] = static_cast<float>(gap(positive[i], same, others[j]));
    }
  }

  LogSumExp(const PairsProblem& p, const LogSumExpResult& out, const Segments<Words>& segments,
            const ByFeature<Words>& y)
      : p_(p),
        out_(out),
        segments_(segments),
        y_(y),
        grid_(p.x.rows, p.y.rows, Words::MR, Words::NR),
        factors_(p),
        rows_(p.prefix_count * p.x.rows),
        positives_(p.prefix_count * p.x.rows, kNone),
        columns_(out.c ? grid_.row_blocks * p.prefix_count * 2 * p.y.rows : 0, kUnset) {}

  const PairsProblem& p_;
  const LogSumExpResult& out_;
  const Segments<Words>& segments_;
  const ByFeature<Words>& y_;
  const Grid grid_;
  const Factors factors_;
  const Array<LogSum> rows_;       // [P, n] without positives
  const Array<double> positives_;  // [P, n]
  const Array<float> columns_;     // [row blocks, P, 2, m] (most, sum) without positives
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
