// The delta rule token by token, with the state of some value columns in L1. Included by level units only.
//
// Work per token, head and element of the state: three multiply-adds, four with a gate per key; no triangular matrices
// and no products that are thrown away, so it is ahead of the chunk form as long as its columns stay in L1. One pass
// over them writes token t and reads for token t + 1: with S before token t, e = v - S'^T k and delta = beta e,
//
//   S_t = e^{g_t} S + k_t delta_t^T,    then of the same registers    S_t^T (e^{g} k)_{t+1}  and  S_t^T (e^{g} q)_{t+1}
//
// so every element is loaded and stored once. Without the erase delta = v, and a multiply-add less. A gate per head
// multiplies no element either: the state is kept as S / D, D the product of the decays since, and multiplied out where
// D leaves [2^-8, 2^8].
#pragma once

#include "cpu/delta_rule_chunk.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// One token, for value columns of a state whose rows are `stride` apart: o = S'^T q without a second pass over S',
// since S'^T q = (e^g S)^T q + <k, q> delta.
struct Token {
  // [K] k and, where that is another, what the erase reads along; under a gate per key e^g, e^g k and e^g q, else
  // nothing, k and q: the fewer, the more tokens fit into L1.
  float *k, *decay, *decayed_k, *decayed_q;
  float beta, kq;
  float e;       // e^g of a gate per head, else 1
  float before;  // the same, or 1 where the erase reads the state before its decay

  static int64_t size(const DeltaRuleProblem& p) {
    return (p.gate == Gate::per_key ? 4 : p.apart() ? 3 : 2) * round_up(p.width, NR);
  }
  Token(const DeltaRuleProblem& p, float* memory) {
    const bool per_key = p.gate == Gate::per_key;
    k = memory;
    decayed_q = k + round_up(p.width, NR);
    decay = per_key ? decayed_q + round_up(p.width, NR) : nullptr;
    decayed_k = per_key ? decay + round_up(p.width, NR) : p.apart() ? decayed_q + round_up(p.width, NR) : k;
  }

  void load(const DeltaRuleProblem& p, const Sequence& s, int64_t t) {
    const int64_t padded = round_up(p.width, NR), row = s.row(p, t);
    by_storage(p.dtype, [&](auto storage) {
      using S = decltype(storage);
      load_key<S>(s.token<S>(p.k, t, s.head), p.width, padded, p.l2norm, 1, k, NR);
      load_key<S>(s.token<S>(p.q, t, s.head), p.width, padded, p.l2norm, p.scale, decayed_q, NR);
      if (p.apart()) load_key<S>(s.token<S>(p.erase, t, s.erase_head(p)), p.width, padded, p.l2norm, 1, decayed_k, NR);
    });
    beta = p.beta ? p.beta[row] : 1;
    e = p.gate == Gate::per_head ? exponential(splat<float>(p.g[row]))[0] : 1;
    before = p.undecayed ? 1 : e;
    V products{};
    for (int64_t c = 0; c < padded; c += W) {
      const V key = pyrepr::load<float>(k + c), query = pyrepr::load<float>(decayed_q + c);
      products += key * query;
      if (p.gate != Gate::per_key) continue;
      const V own = exponential(load_some<StoreF32>(p.g + row * p.width + c, larger<int64_t>(0, p.width - c)));
      store<float>(decay + c, own);
      store<float>(decayed_k + c, (p.apart() ? pyrepr::load<float>(decayed_k + c) : key) * own);
      store<float>(decayed_q + c, query * own);
    }
    kq = static_cast<float>(lane_sum<float>(products));
  }

  // The state [K, NV * W] at `from` forward by this token, to `to`, which may be the same; v, o [NV * W].
  template <int NV>
  void step(int64_t width, bool erases, const float* from, float* to, int64_t stride, const float* v, float* o) const {
    // Eight rows are summed on their own first: short chains of additions round less, and do not wait for each other.
    constexpr int64_t rows = 8;
    V erased[NV] = {}, read[NV] = {}, delta[NV];
    int64_t i = 0;
    for (; i + rows <= width; i += rows)
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) {
        V of_k{}, of_q{};
#pragma GCC unroll 8
        for (int64_t row = i; row < i + rows; row++) {
          const V s = pyrepr::load<float>(from + row * stride + j * W);
          of_k += decayed_k[row] * s;
          of_q += decayed_q[row] * s;
        }
        erased[j] += of_k;
        read[j] += of_q;
      }
    for (; i < width; i++)
      for (int j = 0; j < NV; j++) {
        const V s = pyrepr::load<float>(from + i * stride + j * W);
        erased[j] += decayed_k[i] * s;
        read[j] += decayed_q[i] * s;
      }
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) {
      const V value = pyrepr::load<float>(v + j * W);
      delta[j] = erases ? beta * (value - before * erased[j]) : value;
      store<float>(o + j * W, e * read[j] + kq * delta[j]);
    }
    // Last row first: the rows just read are still in L1.
    for (i = width - 1; i >= 0; i--) {
      const float keep = decay ? decay[i] : e;
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) {
        const int64_t at = i * stride + j * W;
        store<float>(to + at, keep * pyrepr::load<float>(from + at) + k[i] * delta[j]);
      }
    }
  }
};

// Tokens that are brought in together, while those after them are asked for. Tokens are four kilobytes apart as a rule,
// so that more of them would push each other out of the cache's sets.
constexpr int64_t kWindow = 16;
static_assert(C % kWindow == 0, "states are kept between chunks of the backward");

// What one task of the forward works on: value columns [v0, v0 + columns) of a sequence.
struct Columns {
  const DeltaRuleProblem& p;
  const Sequence& s;
  int64_t v0, columns;
  void* o;       // [B, T, HV, V]
  float* final;  // [K, columns], rows of V

  const float* initial() const { return p.initial ? p.initial + s.state_offset(p) + v0 : nullptr; }
  template <class S>
  const typename S::Memory* v(int64_t t, int64_t c) const {
    return s.token<S>(p.v, t, s.value_head) + v0 + c;
  }
  template <class S>
  typename S::Memory* out(int64_t t, int64_t c) const {
    return static_cast<typename S::Memory*>(o) + s.row(p, t) * p.value_width + v0 + c;
  }
};

// Value columns of a sequence through all its tokens.
template <bool erases>
class Recurrence {
 public:
  static int64_t size(const DeltaRuleProblem& p, int64_t columns) {
    return (kWindow + 1) * Token::size(p) + ceil_div(columns, NR) * (p.width + 2) * NR;
  }

  Recurrence(const Columns& at, float* memory) : at_(at), p_(at.p), tokens_(memory), blocks_(ceil_div(at.columns, NR)) {
    carry_ = tokens_ + (kWindow + 1) * Token::size(p_);
    state_ = carry_ + blocks_ * 2 * NR;
  }

  void run(const DeltaRuleStates& states) {
    load_state();
    const int64_t slot = states.data ? at_.s.first_slot(p_, states) : 0, length = at_.s.length;
    for (int64_t t0 = 0; t0 < length; t0 += kWindow) {
      if (states.data && t0 % (C * states.segment) == 0) {
        const int64_t head = (slot + t0 / (C * states.segment)) * p_.value_heads + at_.s.value_head;
        store_state(states.data + head * p_.width * p_.value_width + at_.v0);
      }
      const int64_t rows = smaller(kWindow, length - t0);
      load_tokens(t0, rows);
      float* const values = erases ? at_.s.kept_values(p_, states, t0) : nullptr;
      for (int64_t b = 0; b < blocks_; b++) walk(t0, rows, b, values);
    }
    store_state(at_.final);
  }

 private:
  static constexpr int NV = NR / W;
  static constexpr int64_t kChain = 16;  // rows that are summed on their own first: long chains of additions round more
  enum class Change { none, scaled, by_row };

  Token token(int64_t r) const { return Token(p_, tokens_ + r * Token::size(p_)); }
  float* block(int64_t b) const { return state_ + b * p_.width * NR; }
  int64_t count(int64_t b) const { return smaller<int64_t>(NR, at_.columns - b * NR); }

  void load_state() {
    const float* const from = at_.initial();
    for (int64_t b = 0; b < blocks_; b++)
      for (int64_t i = 0; i < p_.width; i++)
        for (int j = 0; j < NV; j++)
          store<float>(block(b) + i * NR + j * W,
                       from ? load_some<StoreF32>(from + i * p_.value_width + b * NR + j * W, count(b) - j * W) : V{});
  }
  void store_state(float* to) const {
    for (int64_t b = 0; b < blocks_; b++)
      for (int64_t i = 0; i < p_.width; i++)
        for (int j = 0; j < NV && j * W < count(b); j++)
          store_some<StoreF32>(to + i * p_.value_width + b * NR + j * W, count(b) - j * W,
                               load<float>(block(b) + i * NR + j * W) * scale_);
  }

  // The tokens of a window, and the one after it; what becomes of the scale.
  void load_tokens(int64_t t0, int64_t rows) {
    for (int64_t r = 0; r <= rows && t0 + r < at_.s.length; r++) {
      Token next = token(r);
      next.load(p_, at_.s, t0 + r);
      if (r == rows) break;
      beta_[r] = next.beta;
      kq_[r] = next.kq;
      before_[r] = factor_[r] = scale_ * next.e;
      erase_before_[r] = scale_ * next.before;
      change_[r] = p_.gate == Gate::per_key ? Change::by_row : Change::none;
      if (p_.gate == Gate::per_head) {
        const bool kept = factor_[r] >= 0x1p-8f && factor_[r] <= 0x1p8f;
        change_[r] = kept ? Change::none : Change::scaled;
        scale_ = kept ? factor_[r] : 1;
      }
      inverse_[r] = 1 / scale_;
    }
    if (t0 == 0)
      for (int64_t b = 0; b < blocks_; b++) look(token(0), b);
  }

  // What the first token reads.
  void look(const Token& first, int64_t b) {
    V erased[NV] = {}, read[NV] = {};
    for (int64_t i = 0; i < p_.width; i++)
      for (int j = 0; j < NV; j++) {
        const V s = load<float>(block(b) + i * NR + j * W);
        erased[j] += first.decayed_k[i] * s;
        read[j] += first.decayed_q[i] * s;
      }
    keep(b, erased, read);
  }
  void keep(int64_t b, const V (&erased)[NV], const V (&read)[NV]) {
    for (int j = 0; j < NV; j++) {
      store<float>(carry_ + b * 2 * NR + j * W, erased[j]);
      store<float>(carry_ + b * 2 * NR + NR + j * W, read[j]);
    }
  }

  // `values`: where V' of the first of the tokens is kept, or null.
  void walk(int64_t t0, int64_t rows, int64_t b, float* values) {
    V erased[NV], read[NV], delta[NV];
    for (int j = 0; j < NV; j++) {
      erased[j] = load<float>(carry_ + b * 2 * NR + j * W);
      read[j] = load<float>(carry_ + b * 2 * NR + NR + j * W);
    }
    // What is far apart in memory, four kilobytes often, would push itself out of L1 row by row.
    alignas(64) float v[kWindow * NR], o[kWindow * NR];
    const Panels columns{v, kWindow}, out{o, kWindow};
    by_storage(p_.dtype, [&](auto storage) {
      using S = decltype(storage);
      load_matrix<S>(at_.v<S>(t0, b * NR), p_.v.token, rows, kWindow, count(b), columns);
    });
    for (int64_t r = 0; r < rows; r++) {
      ask(t0 + kWindow + r, b);
      for (int j = 0; j < NV; j++) {
        const int64_t at = r * NR + j * W;
        const V value = load<float>(v + at);
        delta[j] = erases ? beta_[r] * (value - erase_before_[r] * erased[j]) : value;
        store<float>(o + at, before_[r] * read[j] + kq_[r] * delta[j]);
        store<float>(v + at, delta[j]);
        delta[j] *= inverse_[r];
      }
      const Token now = token(r), next = token(t0 + r + 1 < at_.s.length ? r + 1 : r);
      switch (change_[r]) {
        case Change::none:
          pass<Change::none>(now, next, 1, delta, block(b), erased, read);
          break;
        case Change::scaled:
          pass<Change::scaled>(now, next, factor_[r], delta, block(b), erased, read);
          break;
        case Change::by_row:
          pass<Change::by_row>(now, next, 1, delta, block(b), erased, read);
          break;
      }
    }
    const int64_t row = p_.value_heads * p_.value_width;
    if (values) store_matrix<StoreF32>(columns, rows, count(b), values + at_.v0 + b * NR, p_.value_width);
    by_storage(p_.dtype, [&](auto storage) {
      using S = decltype(storage);
      store_matrix<S>(out, rows, count(b), at_.out<S>(t0, b * NR), row);
    });
    keep(b, erased, read);
  }

  // Asks memory for this block's share of a token: the hardware does not see it coming. Inlined by force, as GCC drops
  // calls of a function that only prefetches.
  __attribute__((always_inline)) void ask(int64_t t, int64_t b) const {
    if (t >= at_.s.length) return;
    const int64_t item = bytes_of_element(p_);
    const auto some = [&](const Tokens& x, int64_t head, int64_t from, int64_t to) __attribute__((always_inline)) {
      const char* const row = at_.s.address(p_, x, t, head);
      for (int64_t i = from * item; i < to * item; i += 64) __builtin_prefetch(row + i, 0, 2);
    };
    const int64_t first = p_.width * b / blocks_, last = p_.width * (b + 1) / blocks_;
    some(p_.k, at_.s.head, first, last);
    some(p_.q, at_.s.head, first, last);
    if (p_.apart()) some(p_.erase, at_.s.erase_head(p_), first, last);
    some(p_.v, at_.s.value_head, at_.v0 + b * NR, at_.v0 + b * NR + count(b));
    if (p_.gate == Gate::per_key)
      for (int64_t i = first; i < last; i += 16) __builtin_prefetch(p_.g + at_.s.row(p_, t) * p_.width + i, 0, 2);
  }

  template <Change change>
  void pass(const Token& now, const Token& next, float factor, const V (&delta)[NV], float* state, V (&erased)[NV],
            V (&read)[NV]) const {
    // Copies: what is stored could be any of these, for all that the compiler knows.
    const float *const k = now.k, *const decay = now.decay, *const keys = next.decayed_k,
                       *const queries = next.decayed_q;
    V d[NV], all_e[NV] = {}, all_r[NV] = {};
    for (int j = 0; j < NV; j++) d[j] = delta[j];
    const int64_t width = p_.width;
    for (int64_t i = 0; i < width;) {
      const int64_t end = smaller(i + kChain, width);
      V e[NV] = {}, r[NV] = {};
#pragma GCC unroll 4
      for (; i < end; i++) {
        const float write = k[i], keep = change == Change::by_row ? decay[i] : factor, key = keys[i],
                    query = queries[i];
#pragma GCC unroll 2
        for (int j = 0; j < NV; j++) {
          float* const at = state + i * NR + j * W;
          V s = load<float>(at);
          s = (change == Change::none ? s : keep * s) + write * d[j];
          store<float>(at, s);
          if (erases) e[j] += key * s;
          r[j] += query * s;
        }
      }
      for (int j = 0; j < NV; j++) {
        all_e[j] += e[j];
        all_r[j] += r[j];
      }
    }
    for (int j = 0; j < NV; j++) {
      erased[j] = all_e[j];
      read[j] = all_r[j];
    }
  }

  const Columns& at_;
  const DeltaRuleProblem& p_;
  float *tokens_, *carry_, *state_;
  const int64_t blocks_;
  float scale_ = 1;  // the state is what is kept times this
  float beta_[kWindow], kq_[kWindow], before_[kWindow], erase_before_[kWindow], inverse_[kWindow], factor_[kWindow];
  Change change_[kWindow];
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
