// Scores of pairs, and a database of rows as top-k screens it: see pairs_topk.h. Included by level units only.
#pragma once

#include "cpu/gemm.h"
#include "cpu/pairs_functions.h"
#include "cpu/tiles.h"

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

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
inline const char* address_of_row(const View& x, int64_t r, DType dtype) {
  return static_cast<const char*>(x.data) + r * x.row_stride * bytes_of(dtype);
}
template <class S>
const typename S::Memory* row_at(const View& x, int64_t r) {
  return static_cast<const typename S::Memory*>(x.data) + r * x.row_stride;
}

// Sums over the elements of two rows in double: term(x, y) of 16 lanes, whatever the vectors' width.
template <class S, class Term>
__attribute__((noinline)) double sum_in_lanes(const typename S::Memory* x, const typename S::Memory* y, int64_t d,
                                              Term term) {
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
double squared_distance_of(const typename S::Memory* x, const typename S::Memory* y, int64_t d) {
  return sum_in_lanes<S>(x, y, d, [](Vec<float> a, Vec<float> b) {
    // high^2 and high low are exact too; low^2 is lost, 2^-48 of the sum.
    const WideFloats difference = widen(a) - widen(b), high = widen(__builtin_convertvector(difference, Vec<float>));
    const WideFloats low = widen(__builtin_convertvector(difference - high, Vec<float>));
    return high * high + (2 * high) * low;
  });
}

// The same of row i of x and row j of y.
inline double dot(const View& x, int64_t i, const View& y, int64_t j, DType dtype) {
  double sum = 0;
  by_storage(dtype, [&](auto s) {
    using S = decltype(s);
    sum = dot<S>(row_at<S>(x, i), row_at<S>(y, j), x.cols);
  });
  return sum;
}
inline double squared_distance(const View& x, int64_t i, const View& y, int64_t j, DType dtype) {
  double sum = 0;
  by_storage(dtype, [&](auto s) {
    using S = decltype(s);
    sum = squared_distance_of<S>(row_at<S>(x, i), row_at<S>(y, j), x.cols);
  });
  return sum;
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

// out [d rounded up to 16] = factor * row r of x - c, zero behind it; c may be null. Returns |out|^2 and the largest
// |out_k|.
struct Shifted {
  double squares;
  float largest;
};
template <class S>
Shifted shift_row_of(const typename S::Memory* row, int64_t d, float factor, const float* centre, float* out) {
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
inline Shifted shift_row(const View& x, int64_t r, DType dtype, float factor, const float* centre, float* out) {
  Shifted result;
  by_storage(dtype, [&](auto s) {
    using S = decltype(s);
    result = shift_row_of<S>(row_at<S>(x, r), x.cols, factor, centre, out);
  });
  return result;
}

// A chunk of y as screening sees it, in groups of kGroup columns. Rows that are no number are never found; those with
// infinite elements are scored for every row of x.
class Columns {
 public:
  Columns(const TopkProblem& p, int64_t first, int64_t count)
      : centre(round_up(p.x.cols, 16)),
        norm(count),
        unit(round_up(count, kGroup)),
        bias(round_up(count, kGroup)),
        valid(ceil_div(count, kGroup)),
        shifted(ceil_div(count, kGroup)),
        lost(ceil_div(count, kGroup)),
        whole(ceil_div(count, kGroup)),
        special(count),
        p_(p),
        y_{address_of_row(p.y, first, p.dtype), count, p.y.cols, p.y.row_stride, 1},
        first_(first),
        count_(count) {
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (int64_t j = 0; j < count; j++) norm[j] = __builtin_sqrt(dot(y(), j, y(), j, p.dtype));
    for (int64_t j = 0; j < count; j++) {
      if (norm[j] > longest && norm[j] < kInfinity) longest = norm[j];
      // Rows that are no number make the sum of exponentials none either.
      if (!seen(j) && (norm[j] == norm[j] || p.logsumexp)) special[specials++] = j;
    }
    // A power of two, so that y is as it was. Only lengths matter to a cosine.
    if (p.metric != Metric::cosine) factor = power_of_two(longest);
    find_centre();
  }

  const View& y() const { return y_; }  // whose row j is column j
  bool finite(int64_t j) const { return norm[j] < kInfinity; }
  // Whether an engine sees the column; the others are scored without one.
  bool seen(int64_t j) const {
    return finite(j) && (p_.metric != Metric::cosine || norm[j] == 0 || norm[j] >= kSmallest);
  }
  double factor_of(int64_t j) const { return p_.metric != Metric::cosine ? factor : norm[j] > 0 ? 1 / norm[j] : 0; }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t groups() const { return shifted.size(); }
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
    valid[j / kGroup] |= uint32_t(1) << j % kGroup;
    bias[j] = p_.metric == Metric::sqeuclidean ? static_cast<float>(-squares / 2) : 0;
    const auto raise = [&](const Array<float>& of, double to) {
      float& most = of[j / kGroup];
      most = larger(most, static_cast<float>(to) * kMore);
    };
    raise(shifted, length);
    raise(lost, (loss + rounded(size)) * kMore);
    raise(whole, p_.metric == Metric::ip       ? size
                 : p_.metric == Metric::cosine ? 1
                                               : length * (length + size + centre_norm));
  }

  Array<float> centre;  // c
  double centre_norm = 0;
  bool centred = false;
  double factor = 1, longest = 0;     // longest: the largest finite |y|
  Array<double> norm;                 // |y|
  Array<float> unit;                  // what an engine's sums are multiplied with
  Array<float> bias;                  // -|y'|^2 / 2 of a distance, or 0
  Array<uint32_t> valid;              // [groups] bit w: there is something to find in column w
  Array<float> shifted, lost, whole;  // [groups] the largest |y'|, lost_y and what the score's rounding grows with
  Array<int64_t> special;             // [specials] columns that no engine sees
  int64_t specials = 0;

 private:
  // The mean of up to 1024 rows: any c is right, one near the mean makes |y'| small.
  void find_centre() {
    const int64_t d = p_.x.cols, rows = smaller<int64_t>(count_, 1024);
    const Array<double> sum(centre.size());
    const Array<float> x(centre.size());
    int64_t used = 0;
    for (int64_t t = 0; t < rows; t++) {
      const int64_t j = t * count_ / rows;
      if (!seen(j)) continue;
      shift_row(y(), j, p_.dtype, static_cast<float>(factor_of(j)), nullptr, x.data());
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
  const View y_;
  const int64_t first_, count_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
