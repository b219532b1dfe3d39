// The gradient of log-sum-exps of scaled inner products, without the matrix. Included by level units only.
//
// Work: 2 n m d flops for the logits unless they were kept, 4 n m d for dX = D Y and dY = D^T X. Tiles are taken in
// rounds of a Latin square: no two tiles of a round share rows or columns, so every block of dX and dY has one writer
// at a time and its contributions in a fixed order, whatever the number of threads.
#pragma once

#include "cpu/pairs_sums.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

template <class Words>
class LogSumExpGradient {
 public:
  static void run(const PairsProblem& p, const LogSumExpGradients& g) {
    const Segments<Words> segments(p.prefixes, p.prefix_count);
    std::optional<ByFeature<Words>> y;
    if (!g.kept) y.emplace(p.y, p.dtype, segments, p.threads);
    const LogSumExpGradient all(p, g, segments, y);
    with_scratch<Scratch>(p.threads, [&](const Scratch& own) { all.rounds(own); }, segments, all.grid_, p.prefix_count);
    if (p.labels && g.positive_weights) all.sums_.add_positives(g.positive_weights);
    all.sums_.finish(g.x, g.y, g.scale);
  }

 private:
  using Word = typename Words::Word;
  using Tile = LogitTile;
  static constexpr int W = Lanes<float>::W, MR = Words::MR, NR = Words::NR;

  // One thread's memory.
  struct Scratch {
    RowBlock<Words> x;
    Array<float> tiles;    // [P, rows, kPanelStride] inner products, then [rows, kPanelStride] coefficients
    Array<Word> words;     // coefficients as words along the columns, then along the rows
    Array<Word> panel;     // features of the tile's rows of x or y
    Array<float> columns;  // sums of a tile's columns
    Scratch(const Segments<Words>& segments, const Grid& grid, int64_t prefixes)
        : x(segments, grid.rows),
          tiles((prefixes + 1) * grid.rows * kPanelStride),
          words((grid.rows + (Words::by_columns ? grid.rows : round_up(grid.cols, MR))) * kPanelStride),
          panel(kPanelStride * NR),
          columns(kPanelStride) {}
  };

  void rounds(const Scratch& own) const {
    const int64_t longer = larger(grid_.row_blocks, grid_.col_blocks);
    const int64_t shorter = smaller(grid_.row_blocks, grid_.col_blocks);
    for (int64_t round = 0; round < longer; round++) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < shorter; i++) {
        const int64_t other = (i + round) % longer;
        if (grid_.row_blocks <= grid_.col_blocks)
          tile(i, other, own);
        else
          tile(other, i, own);
      }
    }
  }

  void tile(int64_t row_block, int64_t col_block, const Scratch& scratch) const {
    const int64_t n = p_.x.rows, m = p_.y.rows, P = p_.prefix_count, size = grid_.rows * kPanelStride;
    const int64_t r0 = row_block * grid_.rows, rows = smaller(grid_.rows, n - r0);
    const int64_t c0 = col_block * grid_.cols, cols = smaller(grid_.cols, m - c0);
    float* const tiles = scratch.tiles.data();
    if (!g_.kept) dots(Tile{tiles, r0, rows, c0, cols}, scratch);
    const Tile sum{tiles + P * size, r0, rows, c0, cols};
    for (int64_t q = P; q-- > 0;) {
      const Tile logits{tiles + q * size, r0, rows, c0, cols};
      float most;
      if (g_.kept)
        most = read_kept(logits, q);
      else
        most = to_logits(logits, logits, sums_.factors.row.data() + q * n, sums_.factors.column.data() + q * m,
                         static_cast<float>(p_.scale), 0);
      differentiate(logits, q, most, scratch.columns.data());
      add_coefficients(logits, q, sum, q + 1 == P);
      multiply(sum, segments_.list[q], scratch);
    }
  }

  // The inner products of every prefix: [P] tiles.
  void dots(const Tile& t, const Scratch& scratch) const {
    scratch.x.pack(p_.x, p_.dtype, t.r0, t.rows);
    const int64_t size = grid_.rows * kPanelStride;
    int64_t first = 0;
    for (int64_t q = 0; q < p_.prefix_count; q++) {
      const Segment& s = segments_.list[q];
      float* const to = t.data + q * size;
      if (q > 0) std::memcpy(to, to - size, static_cast<size_t>(t.rows * kPanelStride) * 4);
      scratch.x.multiply(t.rows, *y_, t.c0, t.cols, s, first, to);
      first += ceil_div(s.words, kDepth);
    }
  }

  float read_kept(const Tile& t, int64_t q) const {
    Vec<float> most{};
    for (int64_t i = 0; i < t.rows; i++) {
      const float* const from = g_.kept + (q * p_.x.rows + t.r0 + i) * p_.y.rows + t.c0;
      for (int64_t j = 0; j < t.cols; j += W) {
        const Vec<float> s = load_some<StoreF32>(from + j, t.cols - j), size = s < 0 ? -s : s;
        most = size <= most ? most : size;
        store<float>(t.row(i) + j, s);
      }
    }
    float largest = 0;
    for (int w = 0; w < W; w++) largest = most[w] <= largest ? largest : most[w];
    return largest;
  }

  // Logits become dS, and the sums of dS s of the tile's rows and columns are added up. One exponential an element
  // where that stays in range, as in the forward.
  void differentiate(const Tile& t, int64_t q, float most, float* column_sums) const {
    const int64_t n = p_.x.rows, m = p_.y.rows;
    const float* const r = g_.r ? g_.r + q * n + t.r0 : nullptr;
    const float* const c = g_.c ? g_.c + q * m + t.c0 : nullptr;
    alignas(64) float shift[kPanelStride] = {}, weight[kPanelStride] = {};
    bool mild = most <= kMild;
    for (int64_t i = 0; r && i < t.rows; i++) mild = mild && std::fabs(r[i]) <= kMild + 20;
    for (int64_t j = 0; c && j < t.cols; j++) mild = mild && std::fabs(c[j]) <= kMild + 20;
    for (int64_t j = 0; c && j < t.cols; j++) {
      shift[j] = c[j];
      weight[j] = g_.column_weights[q * m + t.c0 + j] * (mild ? std::exp(-c[j]) : 1);
    }
    zero(column_sums, kPanelStride);
    for (int64_t i = 0; i < t.rows; i++) {
      const float r_i = r ? r[i] : 0;
      const float weight_i = r ? g_.row_weights[q * n + t.r0 + i] * (mild ? std::exp(-r_i) : 1) : 0;
      const int64_t at = p_.labels && g_.positive_weights ? p_.labels[t.r0 + i] - t.c0 : -1;
      const bool here = at >= 0 && at < t.cols;
      const float positive = here ? t.row(i)[at] : 0;
      if (here) t.row(i)[at] = kNone;
      float* const s = t.row(i);
      const Vec<float> row = mild ? mild_row(s, t.cols, weight_i, weight, column_sums)
                                  : row_of(s, t.cols, r_i, weight_i, shift, weight, c, column_sums);
      double sum = lane_sum<float>(row);
      if (here) {
        const float own = g_.positive_weights[q * n + t.r0 + i];
        sum += double(own) * positive;
        column_sums[at] += own * positive;
      }
      sums_.row_sums[q * n + t.r0 + i] += sum;
    }
    for (int64_t j = 0; p_.normalize && j < t.cols; j++) sums_.column_sums[q * m + t.c0 + j] += column_sums[j];
  }
  // s [cols] -> dS; returns dS s. A positive, taken out as -inf, has neither: its part is added last.
  static Vec<float> product(Vec<float> d, Vec<float> s) { return s > kNone ? d * s : Vec<float>{}; }
  __attribute__((noinline)) static Vec<float> mild_row(float* s, int64_t cols, float weight_i, const float* weight,
                                                       float* column_sums) {
    Vec<float> sum{};
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<float> logit = load<float>(s + j);
      const Vec<float> d = exp_nonpositive<float>(logit) * (weight_i + load<float>(weight + j)), ds = product(d, logit);
      store<float>(s + j, d);
      sum += ds;
      store<float>(column_sums + j, load<float>(column_sums + j) + ds);
    }
    return sum;
  }
  __attribute__((noinline)) static Vec<float> row_of(float* s, int64_t cols, float r_i, float weight_i,
                                                     const float* shift, const float* weight, bool columns,
                                                     float* column_sums) {
    Vec<float> sum{};
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<float> logit = load<float>(s + j);
      Vec<float> d{};
      if (weight_i != 0) d = exp_nonpositive<float>(logit - r_i) * weight_i;
      if (columns) d += exp_nonpositive<float>(logit - load<float>(shift + j)) * load<float>(weight + j);
      const Vec<float> ds = product(d, logit);
      store<float>(s + j, d);
      sum += ds;
      store<float>(column_sums + j, load<float>(column_sums + j) + ds);
    }
    return sum;
  }

  // sum [rows, cols] = or += dS times what stands before the inner products of prefix q; zero behind the last column.
  void add_coefficients(const Tile& ds, int64_t q, const Tile& sum, bool fresh) const {
    const float* const column = sums_.factors.column.data() + q * p_.y.rows + ds.c0;
    for (int64_t i = 0; i < ds.rows; i++) {
      const float row = static_cast<float>(p_.scale) * sums_.factors.row[q * p_.x.rows + ds.r0 + i];
      for (int64_t j = 0; j < round_up(ds.cols, 16); j += W) {
        const Vec<float> c = load<float>(ds.row(i) + j) * row * load_some<StoreF32>(column + j, ds.cols - j);
        const Vec<float> kept = ds.cols - j >= W ? c : some(c, ds.cols - j);
        store<float>(sum.row(i) + j, fresh ? kept : kept + load<float>(sum.row(i) + j));
      }
    }
  }
  static Vec<float> some(Vec<float> v, int64_t count) {
    for (int64_t w = 0; w < W; w++)
      if (w >= count) v[w] = 0;
    return v;
  }

  // dX += D Y and dY += D^T X over the features of a segment.
  void multiply(const Tile& d, const Segment& s, const Scratch& scratch) const {
    const typename Words::Products products;
    const Word *along_columns, *along_rows;
    if constexpr (Words::step == 1) {
      along_columns = along_rows = d.data;
    } else {
      to_pairs(d, scratch.words.data(), scratch.words.data() + grid_.rows * kPanelStride);
      along_columns = scratch.words.data();
      along_rows = along_columns + grid_.rows * kPanelStride;
    }
    for (int64_t panel = 0; panel < s.panels; panel++) {
      const int64_t f = s.first + panel * NR, count = smaller<int64_t>(NR, s.first + s.count - f);
      Word* const samples = scratch.panel.data();
      pack_samples<Words>(p_.y, p_.dtype, d.c0, d.cols, f, count, samples);
      for (int64_t i = 0; i < d.rows; i += MR)
        sums_.template add_block<Words, false>(ceil_div(d.cols, Words::step), along_columns + i * kPanelStride, samples,
                                               sums_.x, d.r0 + i, smaller<int64_t>(MR, d.rows - i), f, count);
      pack_samples<Words>(p_.x, p_.dtype, d.r0, d.rows, f, count, samples);
      for (int64_t j = 0; j < d.cols; j += MR)
        sums_.template add_block<Words, Words::by_columns>(
            ceil_div(d.rows, Words::step), along_rows + j * (Words::by_columns ? 1 : kPanelStride), samples, sums_.y,
            d.c0 + j, smaller<int64_t>(MR, d.cols - j), f, count);
    }
  }
#if defined(PYREPR_LEVEL_avx512_bf16)
  // D in bf16: pairs of neighbours in a row [rows, kPanelStride], and of neighbours in a column, [rows / 2,
  // kPanelStride] or, for tiles, [cols, kPanelStride].
  static void to_pairs(const Tile& d, int32_t* in_rows, int32_t* in_columns) {
    for (int64_t i0 = 0; i0 < d.rows; i0 += 32)
      for (int64_t j = 0; j < d.cols; j += 16) {
        Vec<float> pairs[16] = {};
        const int64_t count = smaller<int64_t>(16, ceil_div(d.rows - i0, 2));
        for (int64_t k = 0; k < count; k++) {
          const int64_t i = i0 + 2 * k;
          const Vec<float> first = load<float>(d.row(i) + j),
                           second = i + 1 < d.rows ? load<float>(d.row(i + 1) + j) : Vec<float>{};
          const __m256i a = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first));
          const __m256i b = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(in_rows + i * kPanelStride + j / 2), a);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(in_rows + (i + 1) * kPanelStride + j / 2), b);
          const __m512i low = _mm512_cvtepu16_epi32(a), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
          pairs[k] = reinterpret_cast<Vec<float>>(_mm512_or_si512(low, high));
        }
        if (!Words::by_columns) transpose_registers<float>(pairs);
        int32_t* const to = in_columns + (Words::by_columns ? i0 / 2 * kPanelStride + j : j * kPanelStride + i0 / 2);
        for (int64_t k = 0; k < (Words::by_columns ? count : 16); k++)
          std::memcpy(to + k * kPanelStride, &pairs[k], sizeof pairs[k]);
      }
  }
#else
  static void to_pairs(const Tile&, Word*, Word*) {}
#endif

  LogSumExpGradient(const PairsProblem& p, const LogSumExpGradients& g, const Segments<Words>& segments,
                    const std::optional<ByFeature<Words>>& y)
      : p_(p),
        g_(g),
        segments_(segments),
        y_(y),
        grid_(p.x.rows, p.y.rows, Words::step * MR, Words::step * NR),
        sums_(p, p.dtype, g.x, g.y) {}

  const PairsProblem& p_;
  const LogSumExpGradients& g_;
  const Segments<Words>& segments_;
  const std::optional<ByFeature<Words>>& y_;  // of what is computed again
  const Grid grid_;
  const GradientSums sums_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
