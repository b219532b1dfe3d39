// The k best rows of y for every row of x. Included by level units only.
//
// The score of a pair is the sum of its products (of squared differences) in double, in 16 lanes that every instruction
// set adds up alike (the product of two floats is exact in double), rounded once to float. Few scores are computed so:
// all pairs are screened by a fast product whose error is bounded, and a pair is a candidate for its row as long as its
// upper bound reaches T, the k-th largest lower bound of the row so far.
//
// No winner is lost. For the score s of a pair, low <= s <= up. At any time k pairs of the row have s >= low >= T. A
// pair with up < T has s <= up < T, so k pairs have larger scores: it is not among the k best, whatever the order of
// equals. A pair whose score equals the k-th stays, because up >= s >= T.
//
// The bounds. Scores are shifted and scaled row by row, which changes no order. With c near the mean of y,
//   ip      t = <x, y - c>             = <x, y> - <x, c>                    x' = x      y' = y - c
//   cosine  t = <x, y/|y| - c>         = |x| cos - <x, c>                   x' = x      y' = y/|y| - c
//   sq.     t = <x', y'> - |y'|^2 / 2  = (|x'|^2 - |x - y|^2) / 2           x' = x - c  y' = y - c
// The engine multiplies X and Y near x' and y', with lost_x >= |x' - X| and lost_y >= |y' - Y| measured while packing:
//   |<x', y'> - <X, Y>| = |<x' - X, y'> + <X, y' - Y>| <= lost_x |y'| + (|x'| + lost_x) lost_y     (Cauchy-Schwarz)
// To this come roundings, all below a multiple of |x'| |y'|: of <X, Y> (none in whole numbers; d half units for sums in
// float, counted as lost), and of its way to float, T and the bounds (2^-20 covers eight). The score itself is rounded
// by half a unit of |x| |y| at most (of |x - y|^2 <= 2 |x'|^2 + 2 |y'|^2), 2^-23 of it covers that, or by 2^-150 where
// it is denormal; a T beyond the largest float is taken as that, since larger scores are all equal. Norms and losses
// are taken 2^-10 too large, which covers their own roundings.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/pairs.h"
#include "cpu/pairs_functions.h"
#if defined(PYREPR_LEVEL_avx512_bf16)
#include "cpu/dots.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kGroup = 32;                      // columns that share a bound
constexpr int64_t kQueries = 168;                   // rows of x that are searched together: packed they stay in L2
constexpr int64_t kChunkBytes = int64_t(16) << 20;  // of packed y
constexpr float kMore = 1 + 0x1p-10f, kBitMore = 1 + 0x1p-20f;
constexpr float kInfinity = __builtin_inff();
constexpr double kSmallest = 0x1p-100;  // of lengths that are divided by in float

// What takes a length to between 1 and 2, or as near to that as a float can.
inline double power_of_two(double length) {
  return length > 0 ? __builtin_ldexp(1, smaller(100, -__builtin_ilogb(length))) : 1;
}

// Sums over the elements of two rows in double: term(x, y) of 16 lanes, whatever the vectors' width.
template <class S, class Term>
double sum_in_lanes(const typename S::Memory* x, const typename S::Memory* y, int64_t d, Term term) {
  using Wide = Lanes<float>::Wide;
  constexpr int W = Lanes<float>::W, parts = 16 / W;
  Wide sum[parts] = {};
  int64_t k = 0;
  for (; k + 16 <= d; k += 16)
    for (int part = 0; part < parts; part++)
      sum[part] += term(load_as<S>(x + k + part * W), load_as<S>(y + k + part * W));
  for (int part = 0; part < parts && k < d; part++, k += W)
    sum[part] += term(load_some<S>(x + k, d - k), load_some<S>(y + k, d - k));
  double total = 0;
  for (int part = 0; part < parts; part++)
    for (int w = 0; w < W; w++) total += sum[part][w];
  return total;
}
using WideFloats = Lanes<float>::Wide;
inline WideFloats widen(Vec<float> x) { return __builtin_convertvector(x, WideFloats); }
template <class S>
double dot(const typename S::Memory* x, const typename S::Memory* y, int64_t d) {
  return sum_in_lanes<S>(x, y, d, [](Vec<float> a, Vec<float> b) { return widen(a) * widen(b); });
}
template <class S>
double squared_distance(const typename S::Memory* x, const typename S::Memory* y, int64_t d) {
  return sum_in_lanes<S>(x, y, d, [](Vec<float> a, Vec<float> b) {
    // high^2 and high low are exact too; low^2 is lost, 2^-48 of the sum.
    const WideFloats difference = widen(a) - widen(b), high = widen(__builtin_convertvector(difference, Vec<float>));
    const WideFloats low = widen(__builtin_convertvector(difference - high, Vec<float>));
    return high * high + (2 * high) * low;
  });
}

// Bit w of the result: v[w] > cut.
inline uint32_t above(Vec<float> v, float cut) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, _mm512_set1_ps(cut), _CMP_GT_OQ);
#else
  const auto larger = v > cut;
  uint32_t bits = 0;
  for (int w = 0; w < Lanes<float>::W; w++) bits |= static_cast<uint32_t>(larger[w] & 1) << w;
  return bits;
#endif
}

// out [d rounded up to 16] = factor * row - c, zero behind it; c may be null. Returns |out|^2 and the largest |out_k|.
struct Shifted {
  double squares;
  float largest;
};
template <class S>
Shifted shift_row(const typename S::Memory* row, int64_t d, float factor, const float* centre, float* out) {
  constexpr int W = Lanes<float>::W;
  Vec<float> most{};
  WideFloats sum{};
  for (int64_t k = 0; k < round_up(d, 16); k += W) {
    Vec<float> x = load_some<S>(row + k, d - k) * factor;
    if (centre) x -= load<float>(centre + k);
    store<float>(out + k, x);
    const Vec<float> size = x < 0 ? -x : x;
    most = size > most ? size : most;
    sum += widen(x) * widen(x);
  }
  Shifted result{0, 0};
  for (int w = 0; w < W; w++) {
    result.squares += sum[w];
    result.largest = larger(result.largest, static_cast<float>(most[w]));
  }
  return result;
}

struct Candidate {
  float low, up;   // of the score, in the row's units
  int32_t column;  // of the chunk
  float score;     // NaN until it is computed
};
struct Found {
  float score;
  int64_t index;
  bool operator<(const Found& other) const {  // better ones first
    return score != other.score ? score > other.score : index < other.index;
  }
};

// A row of x while a chunk is searched. Its t and all bounds are multiplied with `a`.
struct Query {
  double norm = 0;  // |x|
  double to_t = 0;  // t a = (score - offset) to_t
  double offset = 0;
  float a = 1;
  float cut = kInfinity;                          // T; infinite where nothing is to be found
  float near = 0, far = 0, round = 0, least = 0;  // a bound is near |y'| + far lost_y + round |y|^r + least
  int64_t count = 0;                              // of candidates
  bool screened = false;
};

// A chunk of y as screening sees it, in groups of kGroup columns. Rows that are no number are never found; those with
// infinite elements are scored for every row of x.
template <class S>
class Columns {
 public:
  using Stored = typename S::Memory;
  Columns(const TopkProblem& p, int64_t first, int64_t count)
      : p_(p), first_(first), count_(count), groups_(ceil_div(count, kGroup)) {
    const size_t padded = static_cast<size_t>(groups_ * kGroup);
    centre.resize(static_cast<size_t>(round_up(p.x.cols, 16)));
    norm.resize(padded);
    unit.resize(padded);
    bias.assign(padded, -kInfinity);
    for (auto* each : {&shifted, &lost, &whole}) each->resize(static_cast<size_t>(groups_));
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t j = 0; j < count; j++) norm[j] = __builtin_sqrt(dot<S>(row(j), row(j), p.x.cols));
    for (int64_t j = 0; j < count; j++) {
      if (norm[j] > longest && norm[j] < kInfinity) longest = norm[j];
      if (norm[j] == norm[j] && !seen(j)) special.push_back(j);
    }
    // A power of two, so that y is as it was. Only lengths matter to a cosine.
    if (p.metric != Metric::cosine) factor = power_of_two(longest);
    find_centre();
  }

  const Stored* row(int64_t j) const { return static_cast<const Stored*>(p_.y.data) + (first_ + j) * p_.y.row_stride; }
  bool finite(int64_t j) const { return norm[j] < kInfinity; }
  // Whether an engine sees the column; the others are scored without one.
  bool seen(int64_t j) const {
    return finite(j) && (p_.metric != Metric::cosine || norm[j] == 0 || norm[j] >= kSmallest);
  }
  double factor_of(int64_t j) const { return p_.metric != Metric::cosine ? factor : norm[j] > 0 ? 1 / norm[j] : 0; }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t groups() const { return groups_; }
  const float* shift() const { return centred ? centre.data() : nullptr; }
  void drop_centre() {
    centred = false;
    centre_norm = 0;
  }

  // What shifting takes from a vector of this length (as multiplied with its factor), that is so long afterwards.
  double rounded(double size) const { return 0x1p-22 * (size + centre_norm); }

  // Takes over what an engine found out about column j: |y'|^2, what its own vector lost of y', and what its sums are
  // to be multiplied with.
  void describe(int64_t j, double squares, double loss, float scale) {
    if (!seen(j)) return;
    const double size = norm[j] * factor_of(j), length = __builtin_sqrt(squares) * kMore + rounded(size);
    unit[j] = scale;
    bias[j] = p_.metric == Metric::sqeuclidean ? static_cast<float>(-squares / 2) : 0;
    const auto raise = [&](std::vector<float>& of, double to) {
      float& most = of[j / kGroup];
      most = larger(most, static_cast<float>(to) * kMore);
    };
    raise(shifted, length);
    raise(lost, (loss + rounded(size)) * kMore);
    raise(whole, p_.metric == Metric::ip       ? size
                 : p_.metric == Metric::cosine ? 1
                                               : length * (length + size + centre_norm));
  }

  std::vector<float> centre;  // c
  double centre_norm = 0;
  bool centred = false;
  double factor = 1, longest = 0;  // longest: the largest finite |y|
  std::vector<double> norm;        // |y|
  std::vector<float> unit;         // what an engine's sums are multiplied with
  std::vector<float> bias;         // -|y'|^2 / 2 of a distance, or 0; -inf where there is nothing to find
  std::vector<float> shifted, lost,
      whole;  // [groups] the largest of |y'|, lost_y and what the score's rounding grows with
  std::vector<int64_t> special;

 private:
  // The mean of up to 1024 rows: any c is right, one near the mean makes |y'| small.
  void find_centre() {
    const int64_t d = p_.x.cols, rows = smaller<int64_t>(count_, 1024);
    std::vector<double> sum(centre.size());
    std::vector<float> x(centre.size());
    int64_t used = 0;
    for (int64_t t = 0; t < rows; t++) {
      const int64_t j = t * count_ / rows;
      if (!seen(j)) continue;
      shift_row<S>(row(j), d, static_cast<float>(factor_of(j)), nullptr, x.data());
      for (int64_t k = 0; k < d; k++) sum[k] += x[k];
      used++;
    }
    double squares = 0;
    for (int64_t k = 0; k < d; k++) {
      centre[k] = used ? static_cast<float>(sum[k] / static_cast<double>(used)) : 0;
      squares += double(centre[k]) * centre[k];
    }
    centre_norm = __builtin_sqrt(squares);
    centred = squares > 0 && squares < 1e30;
    if (!centred) drop_centre();
  }

  const TopkProblem& p_;
  const int64_t first_, count_, groups_;
};

// Screening by the float product of gemm.h.
template <class S>
class FloatEngine {
 public:
  using Stored = typename S::Memory;
  static constexpr int64_t kPanel = 16 * kGroup;  // columns of a tile
  FloatEngine(const TopkProblem& p, Columns<S>& columns) : p_(p), columns_(columns) {
    const int64_t d = p.x.cols;
    // Raw rows are multiplied, so the mean must be one of theirs; the product takes no factor per row.
    if (p.metric == Metric::cosine || !(columns.factor > 0x1p-60 && columns.factor < 0x1p60)) columns.drop_centre();
    mean_.assign(static_cast<size_t>(2 * d), 0);
    for (int64_t k = 0; k < d; k++) mean_[k] = static_cast<float>(columns.centre[k] / columns.factor);
#pragma omp parallel num_threads(p.threads)
    {
      std::vector<float> shifted(static_cast<size_t>(round_up(d, 16)));
#pragma omp for schedule(static)
      for (int64_t g = 0; g < columns.groups(); g++)
        for (int64_t j = g * kGroup; j < smaller(columns.count(), (g + 1) * kGroup); j++) {
          const double factor = columns.factor_of(j);
          const auto [squares, largest] =
              shift_row<S>(columns.row(j), d, static_cast<float>(factor), columns.shift(), shifted.data());
          const double scale = p.metric == Metric::sqeuclidean ? factor * factor : factor;
          columns.describe(j, squares, 0, static_cast<float>(scale));
        }
    }
  }

  // Whether sums with a row of this length stay finite.
  bool takes(double norm) const { return (norm + columns_.longest) * (norm + columns_.longest) < 1e37; }
  // What sums lose where products are too small for a float, in the columns' units.
  double least() const {
    const float unit = *std::max_element(columns_.unit.begin(), columns_.unit.end());
    return 0x1p-146 * static_cast<double>(p_.x.cols) * unit;
  }
  bool ok() const { return true; }

  class Block {
   public:
    explicit Block(const FloatEngine& engine)
        : engine_(engine), memory_((TileBuffers<float>::size(kQueries) + kQueries * kPanel) * 4) {}
    bool ok() const { return memory_.ok(); }
    // x' of a query is factor * x - c, of which this much is lost, in sums of d terms; their unit is 1 / a.
    void prepare(int64_t, const float*, const Shifted& x, double factor, double* lost, float* a) {
      const TopkProblem& p = engine_.p_;
      *lost = 0x1p-24 * static_cast<double>(p.x.cols + 8) * __builtin_sqrt(x.squares) * kMore;
      *a = p.metric == Metric::sqeuclidean ? 1 : static_cast<float>(1 / factor);
    }
    // use(query, group, get): get(v) is the v-th vector of the row's sums, times their units.
    template <class Use>
    void search(int64_t first, int64_t rows, Use use) {
      const TopkProblem& p = engine_.p_;
      const Columns<S>& columns = engine_.columns_;
      const TileBuffers<float> buffers(memory_.as<float>(), kQueries);
      float* const tile = memory_.as<float>() + TileBuffers<float>::size(kQueries);
      const Source<S> x = engine_.source(p.x, first, p.metric == Metric::sqeuclidean);
      const Source<S> y = engine_.source(p.y, columns.first(), true);
      for (int64_t c0 = 0; c0 < columns.count(); c0 += kPanel) {
        const int64_t count = smaller(kPanel, columns.count() - c0);
        tile_product(x, 0, rows, y, c0, count, p.x.cols, false, buffers, tile, kPanel);
        for (int64_t g = c0; g < c0 + count; g += kGroup)
          for (int64_t i = 0; i < rows; i++)
            use(i, g / kGroup, [&](int64_t v) {
              const int64_t at = g + v * Lanes<float>::W;
              return load<float>(tile + i * kPanel + at - c0) * load<float>(columns.unit.data() + at);
            });
      }
    }

   private:
    const FloatEngine& engine_;
    const Memory memory_;
  };

 private:
  Source<S> source(const View& rows, int64_t first, bool shifted) const {
    Source<S> s;
    s.data = static_cast<const Stored*>(rows.data) + first * rows.row_stride;
    s.r_stride = rows.row_stride;
    s.k_stride = 1;
    if (shifted && columns_.shift()) {
      s.mean_high = mean_.data();
      s.mean_low = mean_.data() + p_.x.cols;
    }
    return s;
  }

  const TopkProblem& p_;
  Columns<S>& columns_;
  std::vector<float> mean_;  // high, low
};

#if defined(PYREPR_LEVEL_avx512_bf16)
// Screening by products of 16-bit whole numbers, exact in 32 bits: each vector is scaled to a length of at most
// kLength, so that no sum overflows.
template <class S>
class WholeEngine {
 public:
  using Stored = typename S::Memory;
  static constexpr double kLength = 46340;  // its square is below 2^31

  WholeEngine(const TopkProblem& p, Columns<S>& columns)
      : p_(p), columns_(columns), width_(round_up(p.x.cols, kGroup)), panels_(columns.groups() * kGroup * width_ * 2) {
    if (!panels_.ok()) return;
#pragma omp parallel num_threads(p.threads)
    {
      std::vector<float> shifted(static_cast<size_t>(width_));
      std::vector<int16_t> whole(static_cast<size_t>(kGroup * width_));
#pragma omp for schedule(static)
      for (int64_t g = 0; g < columns.groups(); g++) {
        std::fill(whole.begin(), whole.end(), int16_t(0));
        for (int64_t j = g * kGroup; j < smaller(columns.count(), (g + 1) * kGroup); j++) {
          if (!columns.seen(j)) continue;
          const Shifted y = shift_row<S>(columns.row(j), p.x.cols, static_cast<float>(columns.factor_of(j)),
                                         columns.shift(), shifted.data());
          const auto [scale, lost] = to_whole(shifted.data(), y, whole.data() + (j - g * kGroup) * width_);
          columns.describe(j, y.squares, lost, scale > 0 ? 1 / scale : 0);
        }
        pack_pairs(reinterpret_cast<const int32_t*>(whole.data()), width_ / 2, width_ / 2, panel(g));
      }
    }
  }
  bool takes(double) const { return true; }
  double least() const { return 0; }
  bool ok() const { return panels_.ok(); }

  class Block {
   public:
    explicit Block(const WholeEngine& engine)
        : engine_(engine),
          depths_(ceil_div(engine.width_ / 2, kDepth)),
          whole_(static_cast<size_t>(engine.width_)),
          rows_(depths_ * kQueries * kPanelStride * 4) {}
    bool ok() const { return rows_.ok(); }
    void prepare(int64_t i, const float* shifted, const Shifted& x, double, double* lost, float* a) {
      const auto [scale, loss] = engine_.to_whole(shifted, x, whole_.data());
      *lost = loss;
      *a = scale > 0 ? scale : 1;
      const int64_t pairs = engine_.width_ / 2;
      for (int64_t k0 = 0; k0 < pairs; k0 += kDepth)
        std::memcpy(row(k0 / kDepth, i), whole_.data() + 2 * k0, static_cast<size_t>(smaller(kDepth, pairs - k0)) * 4);
    }
    template <class Use>
    void search(int64_t, int64_t rows, Use use) {
      const Columns<S>& columns = engine_.columns_;
      const int64_t pairs = engine_.width_ / 2;
      alignas(64) int32_t sums[kPairRows * kPairColumns];
      for (int64_t g = 0; g < columns.groups(); g++) {
        const float* const unit = columns.unit.data() + g * kGroup;
        for (int64_t i = 0; i < rows; i += kPairRows) {
          for (int64_t k0 = 0; k0 < pairs; k0 += kDepth)
            multiply_pairs<WholePairs>(smaller(kDepth, pairs - k0), row(k0 / kDepth, i),
                                       engine_.panel(g) + k0 * kPairColumns, sums, kPairColumns, k0 > 0);
          for (int64_t r = i; r < smaller(rows, i + kPairRows); r++)
            use(r, g, [&](int64_t v) {
              const __m512i sum = _mm512_load_si512(sums + (r - i) * kPairColumns + v * 16);
              return _mm512_cvtepi32_ps(sum) * load<float>(unit + v * 16);
            });
        }
      }
    }

   private:
    int32_t* row(int64_t depth, int64_t i) { return rows_.as<int32_t>() + (depth * kQueries + i) * kPanelStride; }

    const WholeEngine& engine_;
    const int64_t depths_;
    std::vector<int16_t> whole_;
    const Memory rows_;  // [depths, kQueries, kPanelStride] pairs
  };

 private:
  int32_t* panel(int64_t g) const { return panels_.as<int32_t>() + g * kGroup * width_ / 2; }

  struct Scaled {
    float scale;
    double lost;
  };
  // out [width] = whole numbers near scale * x.
  Scaled to_whole(const float* x, const Shifted& size, int16_t* out) const {
    // Rounding can make a vector longer by half a unit an element.
    const double most = kLength - __builtin_sqrt(static_cast<double>(width_)) / 2 - 1;
    const double scale = smaller(most / __builtin_sqrt(size.squares), 32767.0 / size.largest);
    if (!(scale < 0x1p100)) {  // nothing to scale
      std::fill(out, out + width_, int16_t(0));
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
  Columns<S>& columns_;
  const int64_t width_;
  const Memory panels_;  // [groups][width / 2][kGroup] pairs
};
#endif

// One thread's search of a chunk of y for blocks of rows of x.
template <class S, class Engine>
class Search {
 public:
  using Stored = typename S::Memory;
  Search(const TopkProblem& p, const Columns<S>& columns, const Engine& engine)
      : p_(p),
        columns_(columns),
        engine_(engine),
        block_(engine),
        limit_(3 * p.k + 64),
        shifted_(static_cast<size_t>(round_up(p.x.cols, kGroup))),
        queries_(static_cast<size_t>(kQueries)),
        candidates_(kQueries * (limit_ + kGroup) * int64_t(sizeof(Candidate))) {
    lows_.reserve(static_cast<size_t>(limit_ + kGroup));
  }
  bool ok() const { return block_.ok() && candidates_.ok(); }

  void run(int64_t first, int64_t rows) {
    first_ = first;
    for (int64_t i = 0; i < rows; i++) prepare(i);
    block_.search(first, rows, [&](int64_t i, int64_t g, auto get) { screen(i, g, get); });
    for (int64_t i = 0; i < rows; i++) finish(i);
  }

 private:
  static constexpr int W = Lanes<float>::W;

  const Stored* row(int64_t i) const { return static_cast<const Stored*>(p_.x.data) + (first_ + i) * p_.x.row_stride; }
  Candidate* candidates(int64_t i) const { return candidates_.as<Candidate>() + i * (limit_ + kGroup); }
  float* values(int64_t i) const { return p_.values + (first_ + i) * p_.k; }
  int64_t* indices(int64_t i) const { return p_.indices + (first_ + i) * p_.k; }

  void prepare(int64_t i) {
    const int64_t d = p_.x.cols;
    Query& q = queries_[i] = Query{};
    q.norm = __builtin_sqrt(dot<S>(row(i), row(i), d));
    const bool distance = p_.metric == Metric::sqeuclidean;
    // Rows that are no number find nothing. What the engine cannot take is scored pair by pair.
    q.screened = q.norm < kInfinity && engine_.takes(q.norm) && (distance || q.norm > 0);
    const double factor = distance ? columns_.factor : q.norm < kInfinity ? power_of_two(q.norm) : 0;
    q.screened = q.screened && q.norm * factor < 1e9;
    const Shifted x = shift_row<S>(row(i), d, q.screened ? static_cast<float>(factor) : 0,
                                   distance ? columns_.shift() : nullptr, shifted_.data());
    double lost = 0;
    block_.prepare(i, shifted_.data(), x, factor, &lost, &q.a);
    if (!q.screened) return;
    const double size = q.norm * factor, rounded = distance ? columns_.rounded(size) : 0;
    const double length = __builtin_sqrt(x.squares) * kMore + rounded, a = q.a;
    lost += rounded;
    double shift = 0;  // <x, c>
    if (!distance && columns_.shift())
      for (int64_t k = 0; k < d; k++) shift += double(load_one<S>(row(i) + k)) * columns_.centre[k];
    if (p_.metric == Metric::ip) {
      q.to_t = a * factor * columns_.factor;
      q.offset = shift / columns_.factor;
    } else if (p_.metric == Metric::cosine) {
      q.to_t = a * size;
      q.offset = shift / q.norm;
    } else {
      q.to_t = a * factor * factor / 2;
      q.offset = -x.squares / (factor * factor);
    }
    const double own = distance ? 0x1p-20 * length * (length + size + columns_.centre_norm)
                                : 0x1p-30 * size * (1 + columns_.centre_norm);
    q.near = static_cast<float>(a * (lost + 0x1p-20 * length)) * kBitMore;
    q.far = static_cast<float>(a * (length + lost)) * kBitMore;
    q.round = static_cast<float>(a * (distance ? 0x1p-20 : 0x1p-22 * size)) * kBitMore;
    q.least = static_cast<float>(a * own + q.to_t * 0x1p-148 + engine_.least() + 0x1p-100) * kBitMore;
    q.cut = -kInfinity;
    raise_cut(q, below(q, values(i)[p_.k - 1]));
  }

  // T is at most what the largest float becomes, since larger scores are equal.
  void raise_cut(Query& q, float to) const { q.cut = larger(q.cut, smaller(to, below(q, 0x1.fffffep127f))); }
  // Bounds of a score in a row's units.
  float below(const Query& q, float score) const {
    const double t = (double(score) - q.offset) * q.to_t;
    return static_cast<float>(t - slack(q, t)) - q.least;
  }
  float over(const Query& q, float score) const {
    const double t = (double(score) - q.offset) * q.to_t;
    return static_cast<float>(t + slack(q, t)) + q.least;
  }
  static double slack(const Query& q, double t) {
    return score_is_finite(t) ? 0x1p-20 * (t < 0 ? -t : t) + 0x1p-40 * (q.offset < 0 ? -q.offset : q.offset) * q.to_t
                              : 0;
  }
  static bool score_is_finite(double t) { return t - t == 0; }

  template <class Get>
  __attribute__((always_inline)) void screen(int64_t i, int64_t g, Get get) {
    Query& q = queries_[i];
    const float bound =
        (q.near * columns_.shifted[g] + q.far * columns_.lost[g] + q.round * columns_.whole[g] + q.least) * kBitMore;
    const float cut = q.cut - bound - (q.cut < 0 ? -q.cut : q.cut) * 0x1p-20f;
    Vec<float> f[kGroup / W];
    uint32_t found = 0;
#pragma GCC unroll 8
    for (int v = 0; v < kGroup / W; v++) {
      f[v] = get(v) + q.a * load<float>(columns_.bias.data() + g * kGroup + v * W);
      found |= above(f[v], cut) << (v * W);
    }
    if (__builtin_expect(found != 0, 0)) collect(i, g, f, found, bound);
  }

  __attribute__((noinline)) void collect(int64_t i, int64_t g, const Vec<float>* f, uint32_t found, float bound) {
    Query& q = queries_[i];
    Candidate* const list = candidates(i);
    for (; found; found &= found - 1) {
      const int at = __builtin_ctz(found);
      const int64_t j = g * kGroup + at;
      if (p_.exclude_self && first_ + i == p_.offset + columns_.first() + j) continue;
      const float t = f[at / W][at % W], around = bound + (t < 0 ? -t : t) * 0x1p-20f;
      list[q.count++] = {t - around, t + around, static_cast<int32_t>(j), __builtin_nanf("")};
    }
    if (q.count > limit_) thin(i);
  }

  // Drops what can no longer win. Where that is too little, scores take the place of bounds.
  void thin(int64_t i) {
    Query& q = queries_[i];
    Candidate* const list = candidates(i);
    drop(q, list);
    if (q.count <= (limit_ + p_.k) / 2) return;
    for (int64_t c = 0; c < q.count; c++) {
      score(i, list[c]);
      list[c].low = below(q, list[c].score);
      list[c].up = over(q, list[c].score);
    }
    q.count = std::remove_if(list, list + q.count, [](const Candidate& c) { return !(c.score > -kInfinity); }) - list;
    if (q.count > p_.k) {
      std::nth_element(list, list + p_.k - 1, list + q.count, [](const Candidate& a, const Candidate& b) {
        return a.score != b.score ? a.score > b.score : a.column < b.column;
      });
      q.count = p_.k;
    }
    drop(q, list);
  }
  void drop(Query& q, Candidate* list) {
    if (q.count < p_.k) return;
    lows_.clear();
    for (int64_t c = 0; c < q.count; c++) lows_.push_back(list[c].low);
    std::nth_element(lows_.begin(), lows_.begin() + p_.k - 1, lows_.end(), std::greater<float>());
    raise_cut(q, lows_[p_.k - 1]);
    int64_t kept = 0;
    for (int64_t c = 0; c < q.count; c++)
      if (list[c].up >= q.cut) list[kept++] = list[c];
    q.count = kept;
  }

  void score(int64_t i, Candidate& c) {
    if (c.score != c.score) c.score = exact(i, c.column);
  }
  float exact(int64_t i, int64_t j) const {
    const Stored *const x = row(i), *const y = columns_.row(j);
    const int64_t d = p_.x.cols;
    if (p_.metric == Metric::sqeuclidean) return static_cast<float>(-squared_distance<S>(x, y, d));
    const double norm = queries_[i].norm;
    if (norm == 0 && columns_.finite(j)) return 0;
    const double product = dot<S>(x, y, d);
    if (p_.metric == Metric::ip) return static_cast<float>(product);
    return columns_.norm[j] == 0 ? 0 : static_cast<float>(product / (norm * columns_.norm[j]));
  }

  void finish(int64_t i) {
    Query& q = queries_[i];
    found_.clear();
    const auto add = [&](int64_t j, float score) {
      if (score > -kInfinity) found_.push_back({score, p_.offset + columns_.first() + j});
    };
    const auto add_pair = [&](int64_t j) {
      if (!(p_.exclude_self && first_ + i == p_.offset + columns_.first() + j)) add(j, exact(i, j));
    };
    if (q.screened) {
      drop(q, candidates(i));
      for (int64_t c = 0; c < q.count; c++) {
        score(i, candidates(i)[c]);
        add(candidates(i)[c].column, candidates(i)[c].score);
      }
      for (int64_t j : columns_.special) add_pair(j);
    } else if (q.norm == q.norm) {
      for (int64_t j = 0; j < columns_.count(); j++) {
        add_pair(j);
        if (static_cast<int64_t>(found_.size()) > 4 * p_.k + 1024) keep_best();
      }
    }
    for (int64_t r = 0; r < p_.k; r++)
      if (indices(i)[r] >= 0) found_.push_back({values(i)[r], indices(i)[r]});
    keep_best();
    std::sort(found_.begin(), found_.end());
    for (int64_t r = 0; r < p_.k; r++) {
      const bool there = r < static_cast<int64_t>(found_.size());
      values(i)[r] = there ? found_[r].score : -kInfinity;
      indices(i)[r] = there ? found_[r].index : -1;
    }
  }
  void keep_best() {
    if (static_cast<int64_t>(found_.size()) <= p_.k) return;
    std::nth_element(found_.begin(), found_.begin() + p_.k - 1, found_.end());
    found_.resize(static_cast<size_t>(p_.k));
  }

  const TopkProblem& p_;
  const Columns<S>& columns_;
  const Engine& engine_;
  typename Engine::Block block_;
  const int64_t limit_;  // of a row's candidates
  std::vector<float> shifted_, lows_;
  std::vector<Query> queries_;
  std::vector<Found> found_;
  const Memory candidates_;
  int64_t first_ = 0;
};

template <class S, class Engine>
Status search_chunk(const TopkProblem& p, int64_t first, int64_t count) {
  Columns<S> columns(p, first, count);
  const Engine engine(p, columns);
  if (!engine.ok()) return Status::out_of_memory;
  bool ok = true;
#pragma omp parallel num_threads(p.threads)
  {
    Search<S, Engine> search(p, columns, engine);
    if (!search.ok()) {
#pragma omp atomic write
      ok = false;
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t block = 0; block < ceil_div(p.x.rows, kQueries); block++)
        search.run(block * kQueries, smaller(kQueries, p.x.rows - block * kQueries));
    }
  }
  return ok ? Status::ok : Status::out_of_memory;
}

template <class S>
Status topk_of(const TopkProblem& p) {
#if defined(PYREPR_LEVEL_avx512_bf16)
  using Engine = WholeEngine<S>;
#else
  using Engine = FloatEngine<S>;
#endif
  const int64_t bytes = 2 * round_up(larger<int64_t>(1, p.x.cols), kGroup);
  const int64_t rows = round_up(larger<int64_t>(8192, kChunkBytes / bytes), kGroup);
  for (int64_t first = 0; first < p.y.rows; first += rows) {
    const Status status = search_chunk<S, Engine>(p, first, smaller(rows, p.y.rows - first));
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
