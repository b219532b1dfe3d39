// One chunk of the delta rule: its rows brought in, its decays, its triangular matrices. Names are those of
// delta_rule.h. Included by level units only (see simd.h).
#pragma once

#include "cpu/delta_rule.h"
#include "cpu/gemm.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t C = kDeltaChunk;
constexpr int W = Panels::W;
constexpr int NR = Panels::NR;
static_assert(C % NR == 0 && C % Panels::MR == 0, "a chunk must fill panels");

using V = Vec<float>;
using Wide = Lanes<float>::Wide;

// e^x for any x: growth (x > 0) is right too, up to the overflow to infinity.
inline V exponential(V x) {
  constexpr float highest = 88.37f;
  const V inside = exp_nonpositive<float>(x > highest ? splat<float>(highest) : x);
  return x > highest ? splat<float>(__builtin_inff()) : inside;
}
// W sums in double minus one, rounded after the subtraction.
inline V difference(const double* sums, double minus) {
  Wide x;
  std::memcpy(&x, sums, sizeof x);
  return __builtin_convertvector(x - minus, V);
}

// Of q, k, v and o. Everything else is in float.
inline int64_t bytes_of_element(const DeltaRuleProblem& p) { return p.dtype == DType::f32 ? 4 : 2; }

// One sequence of one head: where its tokens start and how many they are.
struct Sequence {
  int64_t batch, start, length, head, value_head, number;

  Sequence(const DeltaRuleProblem& p, int64_t task) {
    number = task / p.value_heads;
    value_head = task % p.value_heads;
    head = value_head / (p.value_heads / p.heads);
    batch = p.bounds ? 0 : number;
    start = p.bounds ? p.bounds[number] : 0;
    length = p.bounds ? p.bounds[number + 1] - start : p.total;
  }
  int64_t chunks() const { return ceil_div(length, C); }
  int64_t erase_head(const DeltaRuleProblem& p) const { return p.erase_per_value ? value_head : head; }
  // The row of token t in a dense [B, T, HV, ...] tensor.
  int64_t row(const DeltaRuleProblem& p, int64_t t) const {
    return (batch * p.total + start + t) * p.value_heads + value_head;
  }
  int64_t element(const Tokens& x, int64_t t, int64_t h) const {
    return batch * x.batch + (start + t) * x.token + h * x.head;
  }
  template <class S>
  const typename S::Memory* token(const Tokens& x, int64_t t, int64_t h) const {
    return static_cast<const typename S::Memory*>(x.data) + element(x, t, h);
  }
  const char* address(const DeltaRuleProblem& p, const Tokens& x, int64_t t, int64_t h) const {
    return static_cast<const char*>(x.data) + element(x, t, h) * bytes_of_element(p);
  }
  int64_t state_offset(const DeltaRuleProblem& p) const {
    return (number * p.value_heads + value_head) * p.width * p.value_width;
  }
  // The slot of this sequence's first kept state, of states of all heads.
  int64_t first_slot(const DeltaRuleProblem& p, const DeltaRuleStates& states) const {
    if (!p.bounds) return batch * states.row;
    int64_t slot = 0;
    for (int64_t i = 0; i < number; i++) slot += ceil_div(ceil_div(p.bounds[i + 1] - p.bounds[i], C), states.segment);
    return slot;
  }
  // V' of token t as it is kept, V floats before that of the next one; null without.
  float* kept_values(const DeltaRuleProblem& p, const DeltaRuleStates& states, int64_t t) const {
    if (!states.data || states.values < 0) return nullptr;
    const int64_t slot = batch * states.row + states.values;
    const int64_t row = slot * p.value_heads * p.width + value_head * p.total + start + t;
    return states.data + row * p.value_width;
  }
};

// Requests tokens [t0, t1) of a [B, T, H, D] tensor: their rows are too short for the hardware prefetcher, and far
// apart.
inline void request(Requests& requests, const DeltaRuleProblem& p, const Sequence& s, const Tokens& x, int64_t t0,
                    int64_t t1, int64_t head, int64_t width) {
  const int64_t item = bytes_of_element(p);
  requests.add(s.address(p, x, t0, head), smaller(t1, s.length) - t0, x.token * item, width * item);
}

// The same for a gate per key.
inline void request_gates(Requests& requests, const DeltaRuleProblem& p, const Sequence& s, int64_t t0, int64_t t1) {
  constexpr int64_t item = sizeof(float);
  if (p.gate == Gate::per_key)
    requests.add(p.g + s.row(p, t0) * p.width, smaller(t1, s.length) - t0, p.value_heads * p.width * item,
                 p.width * item);
}

// 1 / |x| of a row of q or k, given its squares' sums.
template <class S>
inline float inverse_norm(const typename S::Memory* in, int64_t width, V squares) {
  const float inverse = 1 / __builtin_sqrtf(static_cast<float>(lane_sum<float>(squares)) + 1e-6f);
  if (inverse != 0) return inverse;
  V smaller{};  // squares of more than 1e38: again, of numbers that are 2^64 times smaller
  for (int64_t c = 0; c < width; c += W) {
    const V x = load_some<S>(in + c, width - c) * 0x1p-64f;
    smaller += x * x;
  }
  return 0x1p-64f / __builtin_sqrtf(static_cast<float>(lane_sum<float>(smaller)));
}

// One row of q or k in float times `scale`, zeros up to `padded`; normalised under `l2norm`. Returns what that
// multiplied it with.
template <class S>
inline float load_key(const typename S::Memory* in, int64_t width, int64_t padded, bool l2norm, float scale, float* out,
                      int64_t panel_stride) {
  V squares{};
  for (int64_t c = 0; c < padded; c += W) {
    const V x = load_some<S>(in + c, larger<int64_t>(0, width - c));
    squares += x * x;
    store<float>(out + c / NR * panel_stride + c % NR, x * scale);
  }
  if (!l2norm) return 1;
  const float inverse = inverse_norm<S>(in, width, squares);
  for (int64_t c = 0; c < padded; c += W) {
    float* const at = out + c / NR * panel_stride + c % NR;
    store<float>(at, load<float>(at) * inverse);
  }
  return inverse;
}

// Tokens [t0, t0 + rows) of q or k as [C, K]; rows past the end are zero.
__attribute__((noinline)) inline void load_keys(const DeltaRuleProblem& p, const Sequence& s, const Tokens& x,
                                                int64_t t0, int64_t rows, int64_t head, float scale, const Panels& out,
                                                float* inverses) {
  const int64_t padded = round_up(p.width, NR);
  by_storage(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t t = 0; t < rows; t++)
      inverses[t] = load_key<S>(s.token<S>(x, t0 + t, head), p.width, padded, p.l2norm, scale, out.at(t, 0), C * NR);
  });
  for (int64_t t = rows; t < C; t++)
    for (int64_t c = 0; c < padded; c += W) store<float>(out.at(t, c), V{});
}

// beta and the decays of a chunk of N tokens. Exponents are differences of sums in double: after a long decay the sum
// is large, and the difference of two neighbours is not.
template <int64_t N>
struct ChunkGates {
  alignas(64) float beta[N];
  alignas(64) float decay[N];        // e^{G_t}
  alignas(64) float tail[N];         // e^{G_N - G_t}
  alignas(64) float erase_decay[N];  // e^{G_t}, e^{G_{t-1}} where the erase reads the state before its decay
  float decayed_beta[N];             // beta_t times that
  double sum[N];                     // G_t
  double erase_sum[N];               // G_t or G_{t-1}
  float last;                        // e^{G_N}
  bool gated;

  void load(const DeltaRuleProblem& p, const Sequence& s, int64_t t0, int64_t rows) {
    constexpr float vanishes = -200;  // e^-200 is 0 in float, and this one can be added and subtracted
    double total = 0;
    gated = p.gate == Gate::per_head;
    for (int64_t t = 0; t < N; t++) {
      beta[t] = p.beta && t < rows ? p.beta[s.row(p, t0 + t)] : 0;
      const float g = gated && t < rows ? p.g[s.row(p, t0 + t)] : 0;
      const double before = total;
      total += static_cast<double>(g < vanishes ? vanishes : g);
      sum[t] = total;
      erase_sum[t] = p.undecayed ? before : total;
    }
    for (int64_t t = 0; t < N; t += W) {
      store<float>(decay + t, gated ? exponential(difference(sum + t, 0)) : splat<float>(1));
      store<float>(tail + t, gated ? exponential(-difference(sum + t, total)) : splat<float>(1));
      store<float>(erase_decay + t,
                   p.undecayed ? exponential(difference(erase_sum + t, 0)) : pyrepr::load<float>(decay + t));
    }
    for (int64_t t = 0; t < N; t++) decayed_beta[t] = beta[t] * erase_decay[t];
    last = decay[N - 1];
  }
};
using Gates = ChunkGates<C>;

// Lane i becomes the sum of all lanes of v[i]; v is used up.
template <int Stride = 1>
inline V sum_each(V (&v)[W]) {
  if constexpr (Stride < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * Stride) {
      swap_quarters<float, Stride>(v[i], v[i + Stride], std::make_integer_sequence<int, W>{});
      v[i] += v[i + Stride];
    }
    return sum_each<Stride * 2>(v);
  } else {
    return v[0];
  }
}

// Which lanes of columns [t, t + W) are on or above the diagonal in row s.
inline Lanes<float>::I on_or_above(int64_t s, int64_t t) {
  Lanes<float>::I lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return lane + static_cast<int32_t>(t) >= static_cast<int32_t>(s);
}

// gamma [C, C]: row s, column t: e^{G_t - G_s} for t >= s, else 0. `sums`: the G_t, which may be those of one token
// earlier; then the diagonal, where that would grow, is 0 too.
inline void fill_gamma(const Gates& gates, const double* sums, const Panels& gamma) {
  for (int64_t s = 0; s < C; s++)
    for (int64_t t = 0; t < C; t += W) {
      V e{};
      if (t + W > s) {
        e = gates.gated ? exponential(difference(sums + t, gates.sum[s])) : splat<float>(1);
        e = on_or_above(sums == gates.sum ? s : s + 1, t) ? e : V{};
      }
      store<float>(gamma.at(s, t), e);
    }
}

// x [C, C] *= gamma on and above the diagonal; 0 below, whatever stood there.
inline void mask_upper(const Panels& gamma, const Panels& x) {
  for (int64_t s = 0; s < C; s++)
    for (int64_t t = 0; t < C; t += W) {
      V masked{};
      if (t + W > s) masked = on_or_above(s, t) ? load<float>(x.at(s, t)) * load<float>(gamma.at(s, t)) : V{};
      store<float>(x.at(s, t), masked);
    }
}

// out [C, C], row s, column t >= s: sum over the columns c of k_sc x_tc e^{g_{s+1,c} + ... + g_tc}, with step = e^g.
// The decay between two tokens is a product of the steps between them: no exponent is ever positive, and nothing
// overflows or is lost that the recurrence keeps. Below the diagonal stands rubbish.
inline void decayed_products(const Panels& k, const Panels& x, const Panels& step, int64_t columns, const Panels& out) {
  alignas(64) float sums[C * W];
  for (int64_t s = 0; s < C; s++) {
    for (int64_t c = 0; c < columns; c += NR) {
      V low = load<float>(k.at(s, c)), high = load<float>(k.at(s, c + W));
      const float *row = x.at(s, c), *decay = step.at(s, c);
      for (int64_t t = s; t < C; t++, row += NR, decay += NR) {
        if (t > s) {
          low *= load<float>(decay);
          high *= load<float>(decay + W);
        }
        const V own = low * load<float>(row) + high * load<float>(row + W);
        store<float>(sums + t * W, c ? load<float>(sums + t * W) + own : own);
      }
    }
    for (int64_t t = s / W * W; t < C; t += W) {
      V each[W];
      for (int i = 0; i < W; i++) each[i] = load<float>(sums + (t + i) * W);
      store<float>(out.at(s, t), sum_each(each));
    }
  }
}

// X^T = (I + A^T)^-1 by substitution from the last row up, two rows at a time: one alone would wait for its own sums.
// a [C, C] holds A^T above the diagonal. The order of the terms matters: repeated keys make them alternate in sign, and
// sums of every other one would be large.
inline void invert(const Panels& a, const Panels& x) {
  for (int64_t s = C - 2; s >= 0; s -= 2) {
    V row[C / W] = {}, next[C / W] = {};
    for (int64_t t = C - 1; t > s + 1; t--)
#pragma GCC unroll 8
      for (int64_t c = 0; c < C / W; c++) {
        const V known = load<float>(x.at(t, c * W));
        next[c] -= *a.at(s + 1, t) * known;
        row[c] -= *a.at(s, t) * known;
      }
    for (int64_t c = 0; c < C / W; c++) store<float>(x.at(s + 1, c * W), next[c]);
    *x.at(s + 1, s + 1) = 1;
    for (int64_t c = 0; c < C / W; c++)
      store<float>(x.at(s, c * W), row[c] - *a.at(s, s + 1) * load<float>(x.at(s + 1, c * W)));
    *x.at(s, s) = 1;
  }
}

// x [rows, columns] to panels of as many rows.
inline void copy_panels(const Panels& x, int64_t rows, int64_t columns, const Panels& out) {
  std::memcpy(out.data, x.data, static_cast<size_t>(rows * columns) * sizeof(float));
}

// Columns of x [rows, C] times weights [C].
inline void scale_columns(const Panels& x, int64_t rows, const float* weights, float factor = 1) {
  for (int64_t t = 0; t < C; t += W) {
    const V w = load<float>(weights + t) * factor;
    for (int64_t r = 0; r < rows; r++) store<float>(x.at(r, t), load<float>(x.at(r, t)) * w);
  }
}
// Rows of x [C, columns] times weights [C].
inline void scale_rows(const Panels& x, int64_t columns, const float* weights) {
  for (int64_t c = 0; c < columns; c += W)
    for (int64_t t = 0; t < C; t++) store<float>(x.at(t, c), load<float>(x.at(t, c)) * weights[t]);
}

// out = x times y, element by element; all [rows, columns] in panels of as many rows.
inline void multiply_each(const Panels& x, const Panels& y, int64_t rows, int64_t columns, const Panels& out) {
  for (int64_t at = 0; at < rows * round_up(columns, NR); at += W)
    store<float>(out.data + at, load<float>(x.data + at) * load<float>(y.data + at));
}

// Columns [c0, c0 + width) of a dense matrix [rows, stride] into panels [padded rows, ...], zeros around them; and
// back.
template <class S>
void load_matrix(const typename S::Memory* in, int64_t stride, int64_t rows, int64_t padded, int64_t width,
                 const Panels& out) {
  for (int64_t c = 0; c < round_up(width, NR); c += W)
    for (int64_t r = 0; r < padded; r++)
      store<float>(out.at(r, c), r < rows && c < width ? load_some<S>(in + r * stride + c, width - c) : V{});
}
template <class S>
void store_matrix(const Panels& in, int64_t rows, int64_t width, typename S::Memory* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < width; c += W) store_some<S>(out + r * stride + c, width - c, load<float>(in.at(r, c)));
}
// Tokens [t0, t0 + rows) of v as [C, V].
__attribute__((noinline)) inline void load_values(const DeltaRuleProblem& p, const Sequence& s, int64_t t0,
                                                  int64_t rows, const Panels& out) {
  by_storage(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    load_matrix<S>(s.token<S>(p.v, t0, s.value_head), p.v.token, rows, C, p.value_width, out);
  });
}

// The decays of a chunk when every key channel has its own.
struct KeyGates {
  Panels step;   // [C, K] e^{g_t}
  Panels decay;  // [C, K] e^{G_t}
  Panels tail;   // [C, K] e^{G_C - G_t}

  static int64_t size(int64_t padded_width) { return 3 * C * padded_width; }
  KeyGates(float* memory, int64_t padded_width)
      : step{memory, C}, decay{memory + C * padded_width, C}, tail{memory + 2 * C * padded_width, C} {}

  void load(const DeltaRuleProblem& p, const Sequence& s, int64_t t0, int64_t rows) {
    for (int64_t c = 0; c < round_up(p.width, NR); c += W) {
      V product = splat<float>(1);
      for (int64_t t = 0; t < C; t++) {
        V e = splat<float>(1);
        if (t < rows && c < p.width)
          e = exponential(load_some<StoreF32>(p.g + s.row(p, t0 + t) * p.width + c, p.width - c));
        product *= e;
        store<float>(step.at(t, c), e);
        store<float>(decay.at(t, c), product);
      }
      product = splat<float>(1);
      for (int64_t t = C - 1; t >= 0; t--) {
        store<float>(tail.at(t, c), product);
        product *= pyrepr::load<float>(step.at(t, c));
      }
    }
  }
  // e^{G_C} of W channels from c on.
  V last(int64_t c) const { return pyrepr::load<float>(decay.at(C - 1, c)); }
  // Rows of x [K, columns] times e^{G_C}.
  void decay_rows(const Panels& x, int64_t rows, int64_t columns) const {
    for (int64_t c = 0; c < columns; c += W)
      for (int64_t r = 0; r < rows; r++)
        store<float>(x.at(r, c), pyrepr::load<float>(x.at(r, c)) * *decay.at(C - 1, r));
  }
};

// The parts of a chunk that all value columns share, without and with the gates worked in. Under a gate per key the
// decays are not in `gates` (which then says that there are none) but in `key_gates`.
struct Chunk {
  Gates gates;
  KeyGates key_gates;
  float k_inverse[C], q_inverse[C], e_inverse[C];  // 1 / |k|, 1 / |q|, 1 / |e| under l2norm
  Panels k, q;                                     // [C, K]
  Panels kt, qt;                                   // [K, C]
  Panels gamma, xt, pt;                            // [C, C] gamma, X^T, P^T: row s, column t, zero for t < s
  Panels scaled;                                   // [C, K] k or q with the decays of their channels
  Panels e, et;        // [C, K], [K, C] what the erase reads along: k and kt, or memory of its own
  Panels erase_gamma;  // [C, C] the decays in A: gamma, or e^{G_{t-1} - G_s}

  static int64_t size(const DeltaRuleProblem& p) {
    const int64_t padded_width = round_up(p.width, NR);
    return (p.apart() ? 7 : 5) * C * padded_width + (p.undecayed ? 4 : 3) * C * C + KeyGates::size(padded_width);
  }
  Chunk(const DeltaRuleProblem& p, float* memory) : key_gates(memory, round_up(p.width, NR)) {
    const int64_t padded_width = round_up(p.width, NR);
    k = {memory + KeyGates::size(padded_width), C};
    q = {k.data + C * padded_width, C};
    scaled = {q.data + C * padded_width, C};
    kt = {scaled.data + C * padded_width, padded_width};
    qt = {kt.data + C * padded_width, padded_width};
    gamma = {qt.data + C * padded_width, C};
    xt = {gamma.data + C * C, C};
    pt = {xt.data + C * C, C};
    float* const more = pt.data + C * C;
    e = p.apart() ? Panels{more, C} : k;
    et = p.apart() ? Panels{more + C * padded_width, padded_width} : kt;
    erase_gamma = p.undecayed ? Panels{more + (p.apart() ? 2 * C * padded_width : 0), C} : gamma;
  }

  void load_k(const DeltaRuleProblem& p, const Sequence& s, int64_t t0) {
    const int64_t rows = smaller(C, s.length - t0);
    gates.load(p, s, t0, rows);
    fill_gamma(gates, gates.sum, gamma);
    if (p.undecayed) fill_gamma(gates, gates.erase_sum, erase_gamma);
    load_keys(p, s, p.k, t0, rows, s.head, 1, k, k_inverse);
    if (p.apart()) load_keys(p, s, p.erase, t0, rows, s.erase_head(p), 1, e, e_inverse);
    if (p.gate == Gate::per_key) return key_gates.load(p, s, t0, rows);
    transpose_panels(k, C, round_up(p.width, NR), kt);
    if (p.apart()) transpose_panels(e, C, round_up(p.width, NR), et);
  }
  // X^T; `pt` serves as scratch.
  void solve(const DeltaRuleProblem& p) {
    if (!p.beta) return;
    if (p.gate == Gate::per_key)
      decayed_products(k, e, key_gates.step, p.width, pt);
    else
      multiply_panels<Part::upper, true>(kt, C, et, C, p.width, pt);
    mask_upper(erase_gamma, pt);
    scale_columns(pt, C, gates.beta);
    invert(pt, xt);
  }
  // q and P^T, both with the factor `scale`.
  void load_q(const DeltaRuleProblem& p, const Sequence& s, int64_t t0, float scale) {
    load_keys(p, s, p.q, t0, smaller(C, s.length - t0), s.head, scale, q, q_inverse);
    if (p.gate == Gate::per_key) {
      decayed_products(k, q, key_gates.step, p.width, pt);
    } else {
      transpose_panels(q, C, round_up(p.width, NR), qt);
      multiply_panels<Part::upper, true>(kt, C, qt, C, p.width, pt);
    }
    mask_upper(gamma, pt);
  }
  // x [C, K] times e^{G_t} of every channel or, in `scaled`, e^{G_C - G_t}; transposed.
  void decay_keys(const Panels& x, const Panels& decays, int64_t width, const Panels& out) {
    multiply_each(x, decays, C, width, scaled);
    transpose_panels(scaled, C, round_up(width, NR), out);
  }
  // et becomes -(diag(beta e^G) E)^T, which gives V'; qt becomes (diag(e^G) Q)^T if `queries`; under a gate per key
  // `scaled` becomes diag(e^{G_C - G}) K.
  void gate(const DeltaRuleProblem& p, bool queries) {
    if (p.gate == Gate::per_key) {
      if (queries) decay_keys(q, key_gates.decay, p.width, qt);
      decay_keys(e, key_gates.decay, p.width, et);
      multiply_each(k, key_gates.tail, C, p.width, scaled);
    } else if (gates.gated) {
      if (queries) scale_columns(qt, p.width, gates.decay);
      return scale_columns(et, p.width, gates.decayed_beta, -1);
    }
    scale_columns(et, p.width, gates.beta, -1);
  }
};

// V' [C, n] for the columns that `state` [K, n] and `v` [C, n] hold; v is used up.
inline void new_values(const DeltaRuleProblem& p, const Chunk& chunk, const Panels& state, int64_t n, const Panels& v,
                       const Panels& out, Requests* requests) {
  if (!p.beta) return copy_panels(v, C, n, out);
  scale_rows(v, n, chunk.gates.beta);
  multiply_panels<Part::all, false>(chunk.et, C, state, n, p.width, v, 1, requests);
  multiply_panels<Part::terms_upto, true>(chunk.xt, C, v, n, C, out);
}
// state <- e^{G_C} state + K^T diag(e^{G_C - G}) V'; `values` is used up.
inline void next_state(const DeltaRuleProblem& p, const Chunk& chunk, const Panels& values, int64_t n,
                       const Panels& state, Requests* requests) {
  const int64_t rows = round_up(p.width, Panels::MR);
  if (p.gate == Gate::per_key) chunk.key_gates.decay_rows(state, rows, n);
  if (chunk.gates.gated) scale_rows(values, n, chunk.gates.tail);
  multiply_panels<Part::all, false>(p.gate == Gate::per_key ? chunk.scaled : chunk.k, rows, values, n, C, state,
                                    chunk.gates.last, requests);
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
