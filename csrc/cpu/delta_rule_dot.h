// The forward of the delta rule for bf16 inputs on 16-bit dot products: two multiply-adds a lane instead of one.
// Included by the level unit of avx512_bf16 only (see simd.h); names are those of delta_rule.h.
//
// Every product with the state, K S, Q S and K^T V', and the products of keys and queries are taken between vectors of
// 16-bit integers, which are summed exactly in 32 bits. A factor's vectors along the sum are scaled, keys and queries
// by powers of two to a length of at most kKeyLength, S and V' to what is left: no sum can overflow, because
// |<x, y>| <= |x| |y|, and elements are as large as they may be. The scales come back as one factor per row and per
// column of the result. The state itself, the substitution and P V' stay in float.
//
// Why not the bf16 dot product, which is as fast: rounding S and V' to the 8 bits of bf16 costs 15 to 30 times the
// error (B=1 T=2048 K=V=128, worst relative to the largest output: 1.5e-3 gated, 3e-3 plain, 1e-1 for repeated keys
// with beta = 2, against 1.0e-4, 1.5e-4 and 4e-3), where rounding the output to bf16 alone costs 2e-3.
#pragma once

#include <immintrin.h>

#include "cpu/delta_rule_chunk.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// Pairs of 16-bit integers that neighbour each other along the sum, in panels like those of `Panels`: element (r, c)
// holds terms 2 r (low half) and 2 r + 1 of column c.
struct Pairs {
  int32_t* data;
  int64_t rows;

  int32_t* at(int64_t r, int64_t c) const { return data + (c / NR) * rows * NR + r * NR + c % NR; }
  static int64_t size(int64_t terms, int64_t cols) { return terms / 2 * round_up(cols, NR); }
};

using Integers = Lanes<float>::I;

constexpr float kLargest = 32767;       // an element
constexpr float kKeyLength = kLargest;  // so that no element can be larger; shorter ones show with repeated keys
constexpr float kSum = 2e9f;            // a product of lengths: below 2^31 by more than rounding to integers adds

// What takes the elements of vectors to integers, and what takes those back. A length that is no number, or infinite,
// makes everything it touches NaN.
struct Scales {
  V to, back;
};
// For keys and queries of squared lengths `squares`. Powers of two leave all but the smallest bf16 numbers as they are.
inline Scales key_scales(V squares) {
  const V length = square_root<float>(squares);
  const V to = length > 0 ? kKeyLength / length : V{};
  const V power = reinterpret_cast<V>(reinterpret_cast<Integers>(to) & 0x7f800000);
  return {power, power > 0 ? 1 / power : length};
}
// For vectors of squared lengths `squares` and largest elements `largest`, against others of length `other`. What is so
// small that its squares vanish counts as zero.
inline Scales value_scales(V squares, V largest, float other) {
  const V whole = square_root<float>(squares) * (other / kSum), part = largest * (1 / kLargest);
  const V back = part > whole ? part : whole;
  return {squares > 1e-36f ? 1 / back : V{}, back};
}

// x times `to`, rounded to whole numbers: the low half of each lane, in two's complement.
inline __m512i whole(V x, V to) {
  constexpr float rounder = 12582912;  // 1.5 * 2^23
  const V sum = x * to + rounder;
  return reinterpret_cast<__m512i>(sum);
}
inline __m512i pair(__m512i first, __m512i second) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16));
}

// Tokens [t0, t0 + rows) of q or k: out [C, padded] 16-bit integers; factor [C] takes them back to q or k, normalised
// under l2norm, times `scale`.
template <class S>
void load_whole_keys(const Sequence& s, const Tokens& x, int64_t t0, int64_t rows, const DeltaRuleProblem& p,
                     float scale, int16_t* out, float* factor) {
  const int64_t padded = round_up(p.width, NR);
  const auto part = [&](int64_t t, int64_t c) {
    return load_some<S>(s.token<S>(x, t0 + t, s.head) + c, larger<int64_t>(0, p.width - c));
  };
  for (int64_t first = 0; first < C; first += W) {
    V squares[W] = {};
    for (int64_t i = 0; i < smaller<int64_t>(W, rows - first); i++) {
      V low{}, high{};
      for (int64_t c = 0; c < padded; c += NR) {
        const V x0 = part(first + i, c), x1 = part(first + i, c + W);
        low += x0 * x0;
        high += x1 * x1;
      }
      squares[i] = low + high;
    }
    V sums = sum_each(squares), shrink = splat<float>(1);
    for (int64_t i = 0; i < W && _mm512_cmp_ps_mask(reinterpret_cast<__m512>(sums), _mm512_set1_ps(__builtin_inff()), 0); i++) {
      if (!(sums[i] > 3e38f)) continue;  // squares of more than 1e38: again, of numbers that are 2^64 times smaller
      V smaller_squares{};
      for (int64_t c = 0; c < padded; c += W) {
        const V x = part(first + i, c) * 0x1p-64f;
        smaller_squares += x * x;
      }
      sums[i] = static_cast<float>(lane_sum<float>(smaller_squares));
      shrink[i] = 0x1p-64f;
    }
    Scales scales = key_scales(sums);
    const V unit = p.l2norm ? 1 / square_root<float>(sums + 1e-6f) : 1 / shrink;
    store<float>(factor + first, scales.back * unit * scale);
    scales.to *= shrink;
    for (int64_t i = 0; i < W; i++)
      for (int64_t c = 0; c < padded; c += W) {
        const bool given = first + i < rows;
        const __m512i e = whole(given ? part(first + i, c) : V{}, splat<float>(given ? scales.to[i] : 0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (first + i) * padded + c), _mm512_cvtepi32_epi16(e));
      }
  }
}

// in [C, padded] as pairs along the columns: out [padded / 2, C].
inline void pair_columns(const int16_t* in, int64_t padded, const Pairs& out) {
  for (int64_t c = 0; c < padded / 2; c += W)
    for (int64_t t = 0; t < C; t += W) {
      V v[W];
      for (int64_t i = 0; i < W; i++) {
        const __m512i row = _mm512_loadu_si512(in + (t + i) * padded + 2 * c);
        v[i] = reinterpret_cast<V>(row);
      }
      transpose_registers<float>(v);
      for (int64_t i = 0; i < W; i++) _mm512_storeu_si512(out.at(c + i, t), reinterpret_cast<__m512i>(v[i]));
    }
}
// in [C, padded] as pairs along the rows: out [C / 2, padded]. Returns the length of the longest column.
inline float pair_rows(const int16_t* in, int64_t padded, const Pairs& out) {
  const auto part = [&](int64_t t, int64_t c) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + t * padded + c)));
  };
  V longest{};
  for (int64_t c = 0; c < padded; c += W) {
    V squares{};
    for (int64_t t = 0; t < C; t += 2) {
      const __m512i both = pair(part(t, c), part(t + 1, c));
      squares += __builtin_convertvector(reinterpret_cast<Integers>(_mm512_madd_epi16(both, both)), V);
      _mm512_storeu_si512(out.at(t / 2, c), both);
    }
    longest = squares > longest ? squares : longest;
  }
  return __builtin_sqrtf(_mm512_reduce_max_ps(reinterpret_cast<__m512>(longest)));
}

// A panel x [rows, NV * W], rows of NR, as pairs along the rows, to be multiplied with vectors no longer than `other`;
// `back` [NV * W] takes the integers back. Rows are a multiple of 2.
template <int NV>
void pair_panel(const float* x, int64_t rows, float other, const Pairs& out, float* back) {
  V even[NV] = {}, odd[NV] = {}, largest[NV] = {}, to[NV];
  for (int64_t r = 0; r < rows; r += 2)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) {
      const V first = load<float>(x + r * NR + j * W), second = load<float>(x + (r + 1) * NR + j * W);
      even[j] += first * first;
      odd[j] += second * second;
      largest[j] =
          reinterpret_cast<V>(_mm512_max_ps(largest[j], _mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second))));
    }
  for (int j = 0; j < NV; j++) {
    const Scales scales = value_scales(even[j] + odd[j], largest[j], other);
    to[j] = scales.to;
    store<float>(back + j * W, scales.back);
  }
  for (int64_t r = 0; r < rows; r += 2)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++)
      _mm512_storeu_si512(out.at(r / 2, j * W), pair(whole(load<float>(x + r * NR + j * W), to[j]),
                                                     whole(load<float>(x + (r + 1) * NR + j * W), to[j])));
}
// Of a panel of n columns; what stands beyond them in x was perhaps never written.
inline void pair_panel(const float* x, int64_t rows, int64_t n, float other, const Pairs& out, float* back) {
  if (n > W)
    pair_panel<2>(x, rows, other, out, back);
  else
    pair_panel<1>(x, rows, other, out, back);
}

// What becomes of a product, of row i and column j: row_i col_j times it, that added to c, or col_j times it added to
// keep * c.
enum class Into { fresh, add, decay };

// c [MR, NV * W] from A^T B for pairs A [count, MR] and B [count, NV * W].
template <int NV, Into into>
__attribute__((noinline)) void dot_block(int64_t count, const int32_t* __restrict a, const int32_t* __restrict b,
                                         const float* row, const float* col, float* c, float keep) {
  constexpr int MR = Panels::MR;
  __m512i sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) sum[i][j] = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k++) {
    __m512i right[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) right[j] = _mm512_loadu_si512(b + k * NR + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++)
        sum[i][j] = _mm512_dpwssd_epi32(sum[i][j], _mm512_set1_epi32(a[k * NR + i]), right[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) {
      float* const at = c + i * NR + j * W;
      const V x = __builtin_convertvector(reinterpret_cast<Integers>(sum[i][j]), V) * load<float>(col + j * W);
      if constexpr (into == Into::fresh) store<float>(at, x * row[i]);
      if constexpr (into == Into::add) store<float>(at, load<float>(at) + x * row[i]);
      if constexpr (into == Into::decay) store<float>(at, load<float>(at) * keep + x);
    }
}

// The same for a [count, m], b [count, n], row [m] and col [n]; `part` all or upper, as in multiply_panels.
template <Part part, Into into>
void dot_panels(const Pairs& a, int64_t m, const Pairs& b, int64_t n, const float* row, const float* col,
                const Panels& c, float keep = 1, Requests* requests = nullptr) {
  for (int64_t j = 0; j < n; j += NR)
    for (int64_t i = 0; i < m; i += Panels::MR) {
      const int64_t column = part == Part::upper ? larger(j, i / W * W) : j;
      if (column >= j + NR) continue;
      if (requests) requests->some();
      const float* const of_row = into == Into::decay ? nullptr : row + i;
      if (smaller(n, j + NR) - column > W)
        dot_block<2, into>(a.rows, a.at(0, i), b.at(0, column), of_row, col + column, c.at(i, column), keep);
      else
        dot_block<1, into>(a.rows, a.at(0, i), b.at(0, column), of_row, col + column, c.at(i, column), keep);
    }
}

// Takes a sequence chunk by chunk, as FloatForward does.
class DotForward {
 public:
  static int64_t size(int64_t padded) {
    return 3 * C * C + 2 * C * padded + Pairs::size(padded, NR) + Pairs::size(C, NR);
  }
  DotForward(const DeltaRuleProblem& p, float* memory) : p(p), padded(round_up(p.width, NR)) {
    gamma = {memory, C};
    xt = {gamma.data + C * C, C};
    pt = {xt.data + C * C, C};
    int32_t* next = reinterpret_cast<int32_t*>(pt.data + C * C);
    const auto take = [&next](int64_t terms, int64_t cols) {
      const Pairs matrix{next, terms / 2};
      next += Pairs::size(terms, cols);
      return matrix;
    };
    kt = take(padded, C);
    qt = take(padded, C);
    k = take(C, padded);
    state16 = take(padded, NR);
    values16 = take(C, NR);
    rows = reinterpret_cast<int16_t*>(next);
  }

  // What the value columns of the chunk at t0 share.
  template <class S>
  void load(const Sequence& s, int64_t t0) {
    const int64_t count = smaller(C, s.length - t0);
    gates.load(p, s, t0, count);
    fill_gamma(gates, gamma);
    load_whole_keys<S>(s, p.k, t0, count, p, 1, rows, k_back);
    pair_columns(rows, padded, kt);
    k_longest = pair_rows(rows, padded, k);
    load_whole_keys<S>(s, p.q, t0, count, p, p.scale, rows, q_back);
    pair_columns(rows, padded, qt);
    for (int64_t t = 0; t < C; t += W) {
      const V back = pyrepr::load<float>(k_back + t), beta = pyrepr::load<float>(gates.beta + t);
      const V decay = pyrepr::load<float>(gates.decay + t);
      store<float>(k_beta + t, back * beta);
      store<float>(k_reads + t, -back * beta * decay);
      store<float>(q_reads + t, pyrepr::load<float>(q_back + t) * decay);
      store<float>(writes + t, back * pyrepr::load<float>(gates.tail + t));
    }
    dot_panels<Part::upper, Into::fresh>(kt, C, kt, C, k_back, k_beta, pt);
    mask_upper(gamma, pt);
    invert(pt, xt);
    dot_panels<Part::upper, Into::fresh>(kt, C, qt, C, k_back, q_back, pt);
    mask_upper(gamma, pt);
  }

  // As FloatForward::advance.
  bool advance(int64_t n, const Panels& v, const Panels& values, const Panels& o, const Panels& state,
               Requests& requests) {
    requests.spread((2 * C + p.width) / Panels::MR);
    pair_panel(state.data, padded, n, kKeyLength, state16, state_back);
    scale_rows(v, n, gates.beta);
    dot_panels<Part::all, Into::add>(kt, C, state16, n, k_reads, state_back, v, 1, &requests);
    multiply_panels<Part::terms_upto, true>(xt, C, v, n, C, values);
    dot_panels<Part::all, Into::fresh>(qt, C, state16, n, q_reads, state_back, o, 1, &requests);
    multiply_panels<Part::terms_upto, false>(pt, C, values, n, C, o);
    if (!all_finite(o, n)) return false;
    scale_rows(values, n, writes);
    pair_panel(values.data, C, n, k_longest, values16, values_back);
    dot_panels<Part::all, Into::decay>(k, round_up(p.width, Panels::MR), values16, n, nullptr, values_back, state,
                                       gates.last, &requests);
    return true;
  }

 private:
  const DeltaRuleProblem& p;
  const int64_t padded;
  Gates gates;
  alignas(64) float k_back[C], q_back[C];   // integers to K and scale Q
  alignas(64) float k_beta[C], k_reads[C];  // integers to beta K and -beta e^G K
  alignas(64) float q_reads[C], writes[C];  // integers to scale e^G Q and e^{G_C - G} K
  alignas(64) float state_back[NR], values_back[NR];
  float k_longest;          // the length of the longest column of `k`
  Panels gamma, xt, pt;     // [C, C] as in `Chunk`
  Pairs kt, qt;             // [K / 2, C] pairs along K
  Pairs k;                  // [C / 2, K] pairs along the tokens
  Pairs state16, values16;  // [K / 2, NR], [C / 2, NR] a panel of S, and of V' times `writes`
  int16_t* rows;            // [C, K] scratch
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
