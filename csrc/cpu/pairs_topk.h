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

#include "cpu/pairs_engines.h"
#include "cpu/pairs_logsumexp.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

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

// A row of x while a chunk is searched. Its t and all bounds are multiplied with a.
struct Query {
  double norm = 0;  // |x|
  double to_t = 0;  // t a = (score - offset) to_t
  double offset = 0;
  float cap = 0;      // the largest T
  int64_t count = 0;  // of candidates
  bool screened = false;
  LogSum sum;  // of the scores, where that is wanted
};

// One thread's search of a chunk of y for blocks of rows of x.
template <class Engine>
class Search {
 public:
  Search(const TopkProblem& p, const Columns& columns, const Engine& engine)
      : p_(p),
        columns_(columns),
        engine_(engine),
        block_(engine),
        limit_(2 * p.k + 64),
        shifted_(round_up(p.x.cols, kGroup)),
        queries_(kQueries),
        lows_(kQueries * p.k, kUnset),
        a_(kQueries + 16),
        cut_(kQueries + 16),
        near_(kQueries + 16),
        far_(kQueries + 16),
        round_(kQueries + 16),
        least_(kQueries + 16),
        found_(limit_ + kGroup + 4 * p.k + 1024),
        candidates_(kQueries * (limit_ + kGroup), kUnset) {}
  void run(int64_t first, int64_t rows) {
    first_ = first;
    for (int64_t i = 0; i < rows; i++) prepare(i);
    block_.search(first, rows, [&](int64_t i, int64_t count, int64_t g, auto get) { screen(i, count, g, get); });
    for (int64_t i = 0; i < rows; i++) finish(i);
  }

 private:
  static constexpr int W = Lanes<float>::W;

  Candidate* candidates(int64_t i) const { return candidates_.data() + i * (limit_ + kGroup); }
  float* values(int64_t i) const { return p_.values + (first_ + i) * p_.k; }
  float* lows(int64_t i) const { return lows_.data() + i * p_.k; }
  int64_t* indices(int64_t i) const { return p_.indices + (first_ + i) * p_.k; }

  __attribute__((noinline)) void prepare(int64_t i) {
    const int64_t d = p_.x.cols;
    Query& q = queries_[i] = Query{};
    q.norm = __builtin_sqrt(dot(p_.x, first_ + i, p_.x, first_ + i, p_.dtype));
    const bool distance = p_.metric == Metric::sqeuclidean;
    // Rows that are no number find nothing. What the engine cannot take is scored pair by pair.
    q.screened = q.norm < kInfinity && engine_.takes(q.norm) && (distance || q.norm > 0);
    const double factor = distance ? columns_.factor : q.norm < kInfinity ? power_of_two(q.norm) : 0;
    q.screened = q.screened && q.norm * factor < 1e9;
    const Shifted x = shift_row(p_.x, first_ + i, p_.dtype, q.screened ? static_cast<float>(factor) : 0,
                                distance ? columns_.shift() : nullptr, shifted_.data());
    double lost = 0;
    block_.prepare(i, shifted_.data(), x, factor, &lost, &a_[i]);
    cut_[i] = kInfinity;  // nothing is a candidate
    if (!q.screened) return;
    const double size = q.norm * factor, rounded = distance ? columns_.rounded(size) : 0;
    const double length = __builtin_sqrt(x.squares) * kMore + rounded, a = a_[i];
    lost += rounded;
    double shift = 0;  // <x, c>
    if (!distance && columns_.shift()) shift = dot<StoreF32>(shifted_.data(), columns_.centre.data(), d) / factor;
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
    near_[i] = static_cast<float>(a * (lost + 0x1p-20 * length)) * kBitMore;
    far_[i] = static_cast<float>(a * (length + lost)) * kBitMore;
    round_[i] = static_cast<float>(a * (distance ? 0x1p-20 : 0x1p-22 * size)) * kBitMore;
    least_[i] = static_cast<float>(a * own + q.to_t * 0x1p-148 + engine_.least() + 0x1p-100) * kBitMore;
    q.cap = below(i, 0x1.fffffep127f);  // larger scores are all equal
    for (int64_t r = 0; r < p_.k; r++) lows(i)[r] = -kInfinity;
    cut_[i] = smaller(q.cap, below(i, values(i)[p_.k - 1]));
  }

  // Bounds of a score in a row's units.
  float below(int64_t i, float score) const {
    const double t = (double(score) - queries_[i].offset) * queries_[i].to_t;
    return static_cast<float>(t - slack(queries_[i], t)) - least_[i];
  }
  float over(int64_t i, float score) const {
    const double t = (double(score) - queries_[i].offset) * queries_[i].to_t;
    return static_cast<float>(t + slack(queries_[i], t)) + least_[i];
  }
  static double slack(const Query& q, double t) {
    if (t - t != 0) return 0;  // infinite
    return 0x1p-20 * (t < 0 ? -t : t) + 0x1p-40 * (q.offset < 0 ? -q.offset : q.offset) * q.to_t;
  }

  template <class Get>
  __attribute__((always_inline)) void screen(int64_t i, int64_t rows, int64_t g, Get get) {
    alignas(64) float bounds[16], cuts[16];
    for (int64_t r = 0; r < rows; r += W) {
      const Vec<float> bound =
          (load<float>(&near_[i + r]) * columns_.shifted[g] + load<float>(&far_[i + r]) * columns_.lost[g] +
           load<float>(&round_[i + r]) * columns_.whole[g] + load<float>(&least_[i + r])) *
          kBitMore;
      const Vec<float> cut = load<float>(&cut_[i + r]);
      store<float>(bounds + r, bound);
      store<float>(cuts + r, cut - bound - (cut < 0 ? -cut : cut) * 0x1p-20f);
    }
    const uint32_t valid = columns_.valid[g];
    for (int64_t r = 0; r < rows; r++) {
      Vec<float> f[kGroup / W];
      uint32_t found = 0;
#pragma GCC unroll 8
      for (int v = 0; v < kGroup / W; v++) {
        f[v] = get(r, v) + a_[i + r] * load<float>(&columns_.bias[g * kGroup + v * W]);
        found |= above(f[v], cuts[r]) << (v * W);
      }
      if (__builtin_expect(found & valid, 0)) collect(i + r, g, f, found & valid, bounds[r]);
      if (p_.logsumexp && queries_[i + r].screened) add_up(i + r, g, f, bounds[r]);
    }
  }

  // The scores of a group into the row's sum of exponentials: those of the product, unless they may be off by more
  // than a thousandth, and count beside what is there.
  __attribute__((noinline)) void add_up(int64_t i, int64_t g, Vec<float>* f, float bound) {
    Query& q = queries_[i];
    const int64_t own = p_.exclude_self ? first_ + i - p_.offset - columns_.first() - g * kGroup : -1;
    const auto counts = [&](int64_t w) { return w != own && (columns_.valid[g] >> w & 1); };
    const float to_score = static_cast<float>(1 / q.to_t);
    float top = -kInfinity;
    for (int64_t w = 0; w < kGroup; w++) {
      float s = f[w / W][w % W] * to_score;
      if (!counts(w)) s = -kInfinity;
      f[w / W][w % W] = s;
      top = larger(top, s);
    }
    if (top == -kInfinity) return;
    const double score = top + q.offset, off = (bound + std::fabs(top / to_score) * 0x1p-20) * to_score;
    if (off > 0x1p-10 * larger(1.0, std::fabs(score)) && score + off > q.sum.most - 40) {
      for (int64_t w = 0; w < kGroup; w++)
        if (counts(w)) add_score(q, exact(i, g * kGroup + w));
      return;
    }
    Vec<float> sum{};
    for (int v = 0; v < kGroup / W; v++) sum += exp_nonpositive<float>(f[v] - top);
    q.sum.add(score, lane_sum<float>(sum));
  }
  static void add_score(Query& q, float s) { q.sum.add(s == s ? s : 0, s == s ? 1 : s); }

  __attribute__((noinline)) void collect(int64_t i, int64_t g, const Vec<float>* f, uint32_t found, float bound) {
    Query& q = queries_[i];
    Candidate* const list = candidates(i);
    for (; found; found &= found - 1) {
      const int at = __builtin_ctz(found);
      const int64_t j = g * kGroup + at;
      const float t = f[at / W][at % W], around = bound + (t < 0 ? -t : t) * 0x1p-20f;
      if (t + around < cut_[i]) continue;  // T has risen meanwhile
      if (p_.exclude_self && first_ + i == p_.offset + columns_.first() + j) continue;
      list[q.count++] = {t - around, t + around, static_cast<int32_t>(j), __builtin_nanf("")};
      raise(i, t - around);
    }
    if (q.count > limit_) thin(i);
  }

  // A pair's lower bound among the k largest, which are in order, and the last of them as T.
  void raise(int64_t i, float low) {
    float* const of = lows(i);
    int64_t r = p_.k - 1;
    if (!(low > of[r])) return;
    for (; r > 0 && of[r - 1] < low; r--) of[r] = of[r - 1];
    of[r] = low;
    cut_[i] = larger(cut_[i], smaller(queries_[i].cap, of[p_.k - 1]));
  }

  // Drops what can no longer win. Where that is too little, scores take the place of bounds.
  __attribute__((noinline)) void thin(int64_t i) {
    Query& q = queries_[i];
    Candidate* const list = candidates(i);
    drop(i);
    if (q.count <= (limit_ + p_.k) / 2) return;
    for (int64_t c = 0; c < q.count; c++) score(i, list[c]);
    q.count = std::remove_if(list, list + q.count, [](const Candidate& c) { return !(c.score > -kInfinity); }) - list;
    if (q.count > p_.k) {
      std::nth_element(list, list + p_.k - 1, list + q.count, [](const Candidate& a, const Candidate& b) {
        return a.score != b.score ? a.score > b.score : a.column < b.column;
      });
      q.count = p_.k;
    }
    for (int64_t r = 0; r < p_.k; r++) lows(i)[r] = -kInfinity;
    for (int64_t c = 0; c < q.count; c++) {
      list[c].low = below(i, list[c].score);
      list[c].up = over(i, list[c].score);
      raise(i, list[c].low);
    }
    drop(i);
  }
  void drop(int64_t i) {
    Candidate* const list = candidates(i);
    int64_t kept = 0;
    for (int64_t c = 0; c < queries_[i].count; c++)
      if (list[c].up >= cut_[i]) list[kept++] = list[c];
    queries_[i].count = kept;
  }

  __attribute__((always_inline)) void prefetch(int64_t column) const {
    const char* const row = address_of_row(columns_.y(), column, p_.dtype);
    const int64_t bytes = p_.x.cols * bytes_of(p_.dtype);
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(row + k);
  }
  void score(int64_t i, Candidate& c) {
    if (c.score != c.score) c.score = exact(i, c.column);
  }
  float exact(int64_t i, int64_t j) const {
    const View& y = columns_.y();
    if (p_.metric == Metric::sqeuclidean)
      return static_cast<float>(-squared_distance(p_.x, first_ + i, y, j, p_.dtype));
    const double norm = queries_[i].norm;
    if (norm == 0 && columns_.finite(j)) return 0;
    const double product = dot(p_.x, first_ + i, y, j, p_.dtype);
    if (p_.metric == Metric::ip) return static_cast<float>(product);
    // A row of zeros has cosine 0 with all that have a direction.
    return columns_.norm[j] == 0 && norm < kInfinity ? 0 : static_cast<float>(product / (norm * columns_.norm[j]));
  }

  __attribute__((noinline)) void finish(int64_t i) {
    Query& q = queries_[i];
    count_ = 0;
    const auto add_pair = [&](int64_t j) {
      if (p_.exclude_self && first_ + i == p_.offset + columns_.first() + j) return;
      const float s = exact(i, j);
      add(j, s);
      if (p_.logsumexp) add_score(q, s);
    };
    if (q.screened) {
      drop(i);
      for (int64_t c = 0; c < q.count; c++) {
        if (c + 1 < q.count) prefetch(candidates(i)[c + 1].column);
        score(i, candidates(i)[c]);
        add(candidates(i)[c].column, candidates(i)[c].score);
      }
      for (int64_t s = 0; s < columns_.specials; s++) add_pair(columns_.special[s]);
    } else if (q.norm == q.norm || p_.logsumexp) {
      for (int64_t j = 0; j < columns_.count(); j++) add_pair(j);
    }
    for (int64_t r = 0; r < p_.k; r++)
      if (indices(i)[r] >= 0) add_found({values(i)[r], indices(i)[r]});
    keep_best();
    std::sort(found_.data(), found_.data() + count_);
    for (int64_t r = 0; r < p_.k; r++) {
      values(i)[r] = r < count_ ? found_[r].score : -kInfinity;
      indices(i)[r] = r < count_ ? found_[r].index : -1;
    }
    if (p_.logsumexp) {
      float& sum = p_.logsumexp[first_ + i];
      q.sum.add(sum > -kInfinity ? sum : 0, sum > -kInfinity ? 1 : sum == sum ? 0 : sum);
      sum = static_cast<float>(q.sum.log());
    }
  }
  void add(int64_t j, float score) {
    if (score > -kInfinity) add_found({score, p_.offset + columns_.first() + j});
  }
  void add_found(Found found) {
    if (count_ == found_.size()) keep_best();
    found_[count_++] = found;
  }
  void keep_best() {
    if (count_ <= p_.k) return;
    std::nth_element(found_.data(), found_.data() + p_.k - 1, found_.data() + count_);
    count_ = p_.k;
  }

  const TopkProblem& p_;
  const Columns& columns_;
  const Engine& engine_;
  typename Engine::Block block_;
  const int64_t limit_;  // of a row's candidates
  const Array<float> shifted_;
  const Array<Query> queries_;
  const Array<float> lows_;  // [kQueries, k] the largest lower bounds, in order
  // Of each query: a, T, and its bound, which is near |y'| + far lost_y + round |y| + least (what `whole` holds for
  // |y|).
  const Array<float> a_, cut_, near_, far_, round_, least_;
  const Array<Found> found_;           // [count_] of a row at its end
  const Array<Candidate> candidates_;  // [kQueries, limit_ + kGroup]
  int64_t first_ = 0, count_ = 0;
};

template <class Engine>
void search_chunk(const TopkProblem& p, int64_t first, int64_t count) {
  Columns columns(p, first, count);
  const Engine engine(p, columns);
  const auto work = [&](Search<Engine>& search) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < ceil_div(p.x.rows, kQueries); block++)
      search.run(block * kQueries, smaller(kQueries, p.x.rows - block * kQueries));
  };
  with_scratch<Search<Engine>>(p.threads, work, p, columns, engine);
}

template <class Engine>
void search_all(const TopkProblem& p) {
  const int64_t bytes = 2 * round_up(larger<int64_t>(1, p.x.cols), kGroup);
  const int64_t rows = round_up(larger<int64_t>(8192, kChunkBytes / bytes), kGroup);
  for (int64_t first = 0; first < p.y.rows; first += rows)
    search_chunk<Engine>(p, first, smaller(rows, p.y.rows - first));
}

inline void topk_of(const TopkProblem& p) {
#if defined(PYREPR_LEVEL_avx512_bf16)
  search_all<WholeEngine>(p);  // whose sums are for bounds only
#else
  search_all<FloatEngine>(p);
#endif
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
