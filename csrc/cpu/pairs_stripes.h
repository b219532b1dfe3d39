// InfoNCE over rows with its gradient in one go, without the matrix. Included by level units only.
//
// A row's softmax needs that row alone, so the gradient can follow the logits while they are at hand: 6 n m d flops
// where a forward and a backward that computes them again take 8. Rows are taken in stripes; of one, the logits of all
// columns are held, [P][column blocks][rows of the stripe][kPanelStride] floats, which become the coefficients of dX =
// C Y and dY = C^T X. Every block of dX and dY has one writer at a time, and stripes come one after the other, so the
// bits are the same for any number of threads.
#pragma once

#include "cpu/pairs_sums.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

class RowLoss {
 public:
  static void run(const PairsProblem& p, const RowLossResult& out) {
    const Segments<FloatWords> segments(p.prefixes, p.prefix_count);
    const ByFeature<FloatWords> y(p.y, p.dtype, segments, p.threads);
    const RowLoss all(p, out, segments, y);
    const auto work = [&](const Scratch& own) {
      for (int64_t r0 = 0; r0 < p.x.rows; r0 += all.stripe_) all.stripe(r0, smaller(all.stripe_, p.x.rows - r0), own);
    };
    with_scratch<Scratch>(p.threads, work, segments);
    all.sums_.add_positives(all.positive_weights_.data());
    all.sums_.finish(out.x, out.y, out.scale);
    *out.loss = static_cast<float>(all.loss());
  }

 private:
  static constexpr int W = Lanes<float>::W, MR = FloatWords::MR, NR = FloatWords::NR;
  static constexpr int64_t kBlockRows = 168, kDeepRows = 336, kRowsTogether = 42, kPanelsTogether = 4;
  static constexpr int64_t kStripeBytes = int64_t(24) << 20, kMostBlocks = 4;

  // One thread's memory.
  struct Scratch {
    RowBlock<FloatWords> x;
    Array<float> panel;  // features of rows of y
    explicit Scratch(const Segments<FloatWords>& segments)
        : x(segments, kBlockRows), panel(kPanelStride * NR, kUnset) {}
  };
  struct Panel {
    int64_t prefix, first, count;  // features [first, first + count), which the prefixes from `prefix` on have
  };

  void stripe(int64_t r0, int64_t rows, const Scratch& own) const {
    const int64_t row_blocks = ceil_div(rows, kBlockRows), deep_blocks = ceil_div(rows, kDeepRows);
    const int64_t groups = ceil_div(panels_.size(), kPanelsTogether);
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < panels_.size(); panel++)
      pack_samples<FloatWords>(p_.x, p_.dtype, r0, rows, panels_[panel].first, panels_[panel].count, samples(panel));
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < row_blocks * col_blocks_; t++) logits(r0, rows, t / col_blocks_, t % col_blocks_, own);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += kRowsTogether) {
      float* const columns = p_.normalize ? columns_.data() + first / kRowsTogether * columns_of_block() : nullptr;
      if (columns) zero(columns, columns_of_block());
      for (int64_t i = first; i < smaller(rows, first + kRowsTogether); i++)
        for (int64_t q = p_.prefix_count; q-- > 0;) differentiate(r0 + i, i, q, columns);
    }
    if (p_.normalize) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < columns_of_block(); j++)
        for (int64_t block = 0; block < ceil_div(rows, kRowsTogether); block++)
          sums_.column_sums[j] += columns_[block * columns_of_block() + j];
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < (deep_blocks + col_blocks_) * groups; t++) {
      const int64_t from = t % groups * kPanelsTogether, to = smaller(panels_.size(), from + kPanelsTogether);
      if (t / groups < deep_blocks)
        multiply_x(r0, rows, t / groups, from, to, own.panel.data());
      else
        multiply_y(r0, rows, t / groups - deep_blocks, from, to);
    }
  }

  double loss() const {
    double sum = 0;
    for (int64_t i = 0; i < gaps_.size(); i++) sum += gaps_[i] * out_.weights[i / p_.x.rows];
    return sum;
  }

  int64_t columns_of_block() const { return p_.prefix_count * p_.y.rows; }
  int64_t width(int64_t block) const { return smaller(cols_, p_.y.rows - block * cols_); }
  // Row i of the stripe in a block of columns.
  float* at(int64_t q, int64_t block, int64_t i) const {
    return tiles_.data() + ((q * col_blocks_ + block) * stripe_ + i) * kPanelStride;
  }
  float* top(int64_t q, int64_t block) const { return tops_.data() + (q * col_blocks_ + block) * stripe_; }

  // A tile of logits, its rows' largest; positives are taken out.
  void logits(int64_t r0, int64_t stripe_rows, int64_t row_block, int64_t block, const Scratch& own) const {
    const int64_t i0 = row_block * kBlockRows, rows = smaller(kBlockRows, stripe_rows - i0), n = p_.x.rows;
    const int64_t c0 = block * cols_, cols = width(block), P = p_.prefix_count;
    own.x.pack(p_.x, p_.dtype, r0 + i0, rows);
    for (int64_t q = 0, first = 0; q < P; first += ceil_div(segments_.list[q++].words, kDepth)) {
      if (q > 0) std::memcpy(at(q, block, i0), at(q - 1, block, i0), static_cast<size_t>(rows * kPanelStride) * 4);
      own.x.multiply(rows, y_, c0, cols, segments_.list[q], first, at(q, block, i0));
    }
    for (int64_t q = 0; q < P; q++) {
      const LogitTile tile{at(q, block, i0), r0 + i0, rows, c0, cols};
      to_logits(tile, tile, sums_.factors.row.data() + q * n, sums_.factors.column.data() + q * p_.y.rows,
                static_cast<float>(p_.scale), kNone);
      for (int64_t i = 0; i < rows; i++) {
        const int64_t label = p_.labels[r0 + i0 + i] - c0;
        if (label >= 0 && label < cols) {
          positives_[q * n + r0 + i0 + i] = tile.row(i)[label];
          tile.row(i)[label] = kNone;
        }
        Vec<float> largest = splat<float>(kNone);
        for (int64_t j = 0; j < cols; j += W) {
          const Vec<float> s = load<float>(tile.row(i) + j);
          largest = s > largest ? s : largest;
        }
        float most = kNone;
        for (int w = 0; w < W; w++) most = larger(most, largest[w]);
        top(q, block)[i0 + i] = most;
      }
    }
  }

  // Row i of the stripe, row r of x: its gap, and its logits become coefficients of the products.
  void differentiate(int64_t r, int64_t i, int64_t q, float* columns) const {
    const int64_t n = p_.x.rows, m = p_.y.rows;
    float base = kNone;
    for (int64_t b = 0; b < col_blocks_; b++) base = larger(base, top(q, b)[i]);
    if (base == kNone) base = 0;
    double sum = 0;
    for (int64_t b = 0; b < col_blocks_; b++) sum += exponentials(at(q, b, i), width(b), base);
    const double own = positives_[q * n + r], others = sum == 0 ? kNone : base + std::log(sum);
    const double gap_r = gap(own, own, others), weight = out_.weights[q];
    gaps_[q * n + r] = gap_r;
    const float share = static_cast<float>(weight * std::exp(base - (own + gap_r)));
    const float of_positive = positive_weights_[q * n + r] = static_cast<float>(weight * std::expm1(-gap_r));
    const float factor = static_cast<float>(p_.scale) * sums_.factors.row[q * n + r];
    double along = double(of_positive) * own;
    for (int64_t b = 0; b < col_blocks_; b++) {
      const int64_t c0 = b * cols_, cols = width(b), label = p_.labels[r] - c0;
      const float* const others_factor = sums_.factors.column.data() + q * m + c0;
      float *const to = at(q, b, i), *const sums = columns ? columns + q * m + c0 : nullptr;
      along += coefficients(to, cols, base, share, factor, others_factor,
                            q + 1 < p_.prefix_count ? at(q + 1, b, i) : nullptr, sums);
      if (sums && label >= 0 && label < cols) sums[label] += of_positive * static_cast<float>(own);
    }
    sums_.row_sums[q * n + r] = along;
  }
  __attribute__((noinline)) static double exponentials(const float* s, int64_t cols, float base) {
    Vec<float> sum{};
    for (int64_t j = 0; j < cols; j += W) sum += exp_nonpositive<float>(load<float>(s + j) - base);
    return lane_sum<float>(sum);
  }
  // s [cols] -> the coefficients of this prefix and of those beyond it; returns the sum of dS s, and adds dS s to
  // `sums`.
  __attribute__((noinline)) static double coefficients(float* s, int64_t cols, float base, float share, float factor,
                                                       const float* column_factors, const float* beyond, float* sums) {
    Vec<float> along{};
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<float> logit = load<float>(s + j), d = exp_nonpositive<float>(logit - base) * share;
      const Vec<float> ds = logit > kNone ? d * logit : Vec<float>{};  // a positive, taken out, has neither
      along += ds;
      if (sums) store_some<StoreF32>(sums + j, cols - j, load_some<StoreF32>(sums + j, cols - j) + ds);
      const Vec<float> c = d * factor * load_some<StoreF32>(column_factors + j, cols - j);
      store<float>(s + j, beyond ? c + load<float>(beyond + j) : c);
    }
    return lane_sum<float>(along);
  }

  // dX += C Y of a block of rows, for panels [from, to) of features.
  void multiply_x(int64_t r0, int64_t stripe_rows, int64_t row_block, int64_t from, int64_t to, float* panel) const {
    const int64_t i0 = row_block * kDeepRows, rows = smaller(kDeepRows, stripe_rows - i0);
    for (int64_t b = 0; b < col_blocks_; b++)
      for (int64_t t = from; t < to; t++) {
        const auto [q, f, count] = panels_[t];
        pack_samples<FloatWords>(p_.y, p_.dtype, b * cols_, width(b), f, count, panel);
        for (int64_t i = 0; i < rows; i += MR)
          sums_.template add_block<FloatWords, false>(width(b), at(q, b, i0 + i), panel, sums_.x, r0 + i0 + i,
                                                      smaller<int64_t>(MR, rows - i), f, count);
      }
  }
  // dY += C^T X of a block of columns.
  void multiply_y(int64_t r0, int64_t rows, int64_t b, int64_t from, int64_t to) const {
    for (int64_t i = 0; i < rows; i += kDeepRows)
      for (int64_t t = from; t < to; t++) {
        const auto [q, f, count] = panels_[t];
        for (int64_t j = 0; j < width(b); j += MR)
          sums_.template add_block<FloatWords, true>(smaller(kDeepRows, rows - i), at(q, b, i) + j, samples(t) + i * NR,
                                                     sums_.y, b * cols_ + j, smaller<int64_t>(MR, width(b) - j), f,
                                                     count);
      }
  }
  float* samples(int64_t panel) const { return samples_.data() + panel * stripe_ * NR; }

  RowLoss(const PairsProblem& p, const RowLossResult& out, const Segments<FloatWords>& segments,
          const ByFeature<FloatWords>& y)
      : p_(p),
        out_(out),
        segments_(segments),
        y_(y),
        cols_(Grid(p.x.rows, p.y.rows, MR, NR).cols),
        col_blocks_(ceil_div(p.y.rows, cols_)),
        stripe_(rows_of_stripe(p.x.rows, p.prefix_count * col_blocks_)),
        sums_(p, DType::f32, out.x, out.y),
        panels_(segments.panels),
        samples_(segments.panels * stripe_ * NR, kUnset),
        tiles_(p.prefix_count * col_blocks_ * stripe_ * kPanelStride),
        tops_(p.prefix_count * col_blocks_ * stripe_, kUnset),
        positives_(p.prefix_count * p.x.rows, kNone),
        gaps_(p.prefix_count * p.x.rows),
        positive_weights_(p.prefix_count * p.x.rows),
        columns_(p.normalize ? ceil_div(stripe_, kRowsTogether) * columns_of_block() : 0, kUnset) {
    for (int64_t q = 0; q < p.prefix_count; q++) {
      const Segment& s = segments.list[q];
      for (int64_t panel = 0; panel < s.panels; panel++)
        panels_[s.panel + panel] = {q, s.first + panel * NR, smaller<int64_t>(NR, s.count - panel * NR)};
    }
  }
  // From the sizes alone, so that the order of sums is too.
  static int64_t rows_of_stripe(int64_t n, int64_t tiles) {
    const int64_t blocks = kStripeBytes / (tiles * kBlockRows * kPanelStride * int64_t(sizeof(float)));
    return kBlockRows * smaller(ceil_div(n, kBlockRows), larger<int64_t>(1, smaller(blocks, kMostBlocks)));
  }

  const PairsProblem& p_;
  const RowLossResult& out_;
  const Segments<FloatWords>& segments_;
  const ByFeature<FloatWords>& y_;
  const int64_t cols_, col_blocks_, stripe_;
  const GradientSums sums_;
  const Array<Panel> panels_;
  const Array<float> samples_;            // [panels][stripe][NR] of x, as the products of dY take it
  const Array<float> tiles_;              // zero behind what exists
  const Array<float> tops_;               // [P][column blocks][stripe] the largest logit of a row in a block
  const Array<double> positives_, gaps_;  // [P, n]
  const Array<float> positive_weights_;   // [P, n] their dS
  const Array<float> columns_;            // [blocks of a stripe's rows][P, m] sums of dS s
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
