// The delta rule by chunks whose products are of tiles (amx.h): the forward of bfloat16 without a gate per key. Names
// are those of delta_rule.h. Included by the level unit of amx only (see simd.h).
//
// k and q enter products as they are, 1 / |k| and 1 / |q| stand with the decays; everything that is computed enters as
// high + low, two bf16, 2^-17 off. The state and V' are floats. V' is found by substitution, block by block, never
// through an inverse:
//
//   V'_i = (I + A_ii)^-1 (R_i - sum_{j < i} A_ij V'_j)        of blocks of 16 tokens
//
// Tiles take subnormal numbers as zero, and the low part of x is one from x = 2^-109 on: a sequence whose values are so
// small in a column is left to the recurrence.
//
// Where the time goes (gated, T = 2048, H = 8, K = V = 128, one thread of a Xeon with AMX, 7.4 ms where the
// recurrence takes 17): products with the state 18 %, what is done to them row by row 11 %, V' 17 %, A and P 15 %, the
// next state 12 % and its parts 6 %, q and k brought in 10 % and transposed 4 %, outputs added up 5 % and stored 7 %.
// The 1100 products of a chunk alone are 17 k cycles, a fifth of it; half as much again waits for tiles to come from
// L2.
#pragma once

#include "cpu/amx.h"
#include "cpu/delta_rule_recurrence.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// Value columns of a sequence through all its tokens.
template <bool erases>
class TiledRule {
  static constexpr int64_t N = 64;            // tokens of a chunk
  static constexpr int64_t B = kTile;         // of a block
  static constexpr int64_t J = kTileColumns;  // value columns that are worked on together
  static_assert(W == B && NR == J && N % C == 0);

 public:
  static bool fits(const DeltaRuleProblem& p) {
    return p.dtype == DType::bf16 && p.gate != Gate::per_key && !p.apart() && !p.undecayed && p.width % J == 0 &&
           p.value_width % J == 0;
  }
  static int64_t size(const DeltaRuleProblem& p, int64_t columns) {
    return 2 * N * p.width + 4 * N * N + N * B + 4 * N * J + 2 * p.width * columns + columns;
  }

  TiledRule(const Columns& at, float* memory) : at_(at), p_(at.p), width_(at.p.width), pairs_(at.p.width / 2) {
    const auto floats = [&](int64_t count) { return (memory += count) - count; };
    const auto dwords = [&](int64_t count) { return reinterpret_cast<uint32_t*>(floats(count)); };
    for (uint32_t** of_keys : {&k_, &q_, &k_pairs_, &k_columns_}) *of_keys = dwords(N * pairs_);
    kk_ = floats(N * N);
    qk_ = floats(N * N);
    diagonal_ = floats(N * B);
    r_ = floats(N * J);
    o_ = floats(N * J);
    state_ = floats(width_ * at.columns);
    largest_ = floats(at.columns);
    for (int i = 0; i < 2; i++) {
      a_[i] = dwords(N * N / 2);
      p_t_[i] = dwords(N * N / 2);
      values_[i] = dwords(N / 2 * J);
      tails_[i] = dwords(N / 2 * J);
      state_parts_[i] = dwords(pairs_ * at.columns);
    }
  }

  // False if numbers were too small: then the final state was not written, and the rest is not to be used.
  bool run(const DeltaRuleStates& states) {
    const Tiles tiles(kTile);
    for (uint32_t* part : values_) std::memset(part, 0, N / 2 * J * 4);  // what stands beside zeros has to be finite
    next_.load(*this, states, 0);
    load_state();
    const Array<float> initial(at_.columns, kUnset);
    std::memcpy(initial.data(), largest_, static_cast<size_t>(at_.columns) * 4);
    zero(largest_, at_.columns);
    for (int64_t j = 0; j < at_.columns; j += J) finish_state(states, j);
    while (next_.rows > 0) {
      now_ = next_;
      largest_k_ = load_rows(p_.k, at_.s.head, 1, k_, k_factor_, largest_k_);
      largest_q_ = load_rows(p_.q, at_.s.head, p_.scale, q_, q_factor_, largest_q_);
      transpose_keys();
      triangles();
      next_.load(*this, states, now_.t0 + now_.rows);
      for (int64_t j = 0; j < at_.columns; j += J) {
        products_of_state(j);
        add_values(new_values());
        keep_values(states, j);
        store_out(j);
        next_state(j);
        finish_state(states, j);
      }
    }
    for (int64_t c = 0; c < at_.columns; c++) {
      const double state = larger<double>(initial[c], largest_k_ * largest_[c]);
      if (faint(state) || faint(state * largest_q_)) return false;
    }
    for (int64_t j = 0; j < at_.columns; j += J) store_columns(state(j), at_.final + j);
    return true;
  }

 private:
  // The tokens that are worked on together: up to N, and none beyond where a state is kept.
  struct Part {
    int64_t t0, rows, blocks;
    ChunkGates<N> gates;

    void load(const TiledRule& rule, const DeltaRuleStates& states, int64_t start) {
      const int64_t length = rule.at_.s.length, apart = states.data ? C * states.segment : length;
      t0 = start;
      rows = start < length ? smaller(smaller(N, apart - start % apart), length - start) : 0;
      blocks = ceil_div(rows, B);
      gates.load(rule.p_, rule.at_.s, t0, rows);
    }
  };

  static bool faint(double size) { return size > 0 && size < 0x1p-100; }
  static V absolute(V x) { return x < 0 ? -x : x; }
  static V larger_of(V a, V b) { return a > b ? a : b; }

  float* state(int64_t j) const { return state_ + j * width_; }  // [K, J]
  uint32_t* state_part(int part, int64_t j) const { return state_parts_[part] + j * pairs_; }

  void load_state() {
    const float* const from = at_.initial();
    zero(largest_, at_.columns);
    for (int64_t j = 0; j < at_.columns; j += J)
      for (int64_t i = 0; i < width_; i++)
        for (int64_t c = 0; c < J; c += W) {
          const V s = from ? load<float>(from + i * p_.value_width + j + c) : V{};
          store<float>(state(j) + i * J + c, s);
          store<float>(largest_ + j + c, larger_of(absolute(s), load<float>(largest_ + j + c)));
        }
  }
  void store_columns(const float* from, float* to) const {
    for (int64_t i = 0; i < width_; i++)
      for (int64_t c = 0; c < J; c += W) store<float>(to + i * p_.value_width + c, load<float>(from + i * J + c));
  }
  // What the next tokens take of a state: its parts, and itself after their decay.
  void finish_state(const DeltaRuleStates& states, int64_t j) const {
    if (next_.rows == 0) return;
    float* const all = state(j);
    if (states.data && next_.t0 % (C * states.segment) == 0) {
      const int64_t slot = at_.s.first_slot(p_, states) + next_.t0 / (C * states.segment);
      const int64_t head = slot * p_.value_heads + at_.s.value_head;
      store_columns(all, states.data + head * width_ * p_.value_width + at_.v0 + j);
    }
    uint32_t *const high = state_part(0, j), *const low = state_part(1, j);
    const float decay = next_.gates.last;
    for (int64_t i = 0; i < pairs_; i++)
#pragma GCC unroll 2
      for (int64_t c = 0; c < J; c += W) {
        float* const at = all + 2 * i * J + c;
        const V even = load<float>(at), odd = load<float>(at + J);
        store_pair_high(high + i * J + c, even, odd);
        store_pair_low(low + i * J + c, even, odd);
        store<float>(at, even * decay);
        store<float>(at + J, odd * decay);
      }
  }

  // Rows of q or k as they are, zeros beyond the last; what they still are to be multiplied by. Under l2norm a power of
  // two is in the rows, as the products of large ones would not be finite.
  // Returns the largest number there was, at least `most`; 1 is that of normalised ones.
  double load_rows(const Tokens& x, int64_t head, float scale, uint32_t* out, float* factors, double most) const {
    constexpr uint32_t exponent = 0x7f800000;
    V largest{};
    for (int64_t t = 0; t < N; t++) {
      auto* const row = reinterpret_cast<uint16_t*>(out + t * pairs_);
      factors[t] = scale;
      if (t >= now_.rows) {
        std::memset(row, 0, static_cast<size_t>(width_) * 2);
        continue;
      }
      const uint16_t* const in = at_.s.token<StoreBf16>(x, now_.t0 + t, head);
      if (!p_.l2norm) {
        std::memcpy(row, in, static_cast<size_t>(width_) * 2);
        for (int64_t c = 0; c < width_; c += W) largest = larger_of(absolute(load_as<StoreBf16>(in + c)), largest);
        continue;
      }
      V squares{};
      for (int64_t c = 0; c < width_; c += W) {
        const V some = load_as<StoreBf16>(in + c);
        squares += some * some;
      }
      const float inverse = inverse_norm<StoreBf16>(in, width_, squares);
      uint32_t bits;
      std::memcpy(&bits, &inverse, sizeof bits);
      bits &= exponent;
      float power;
      std::memcpy(&power, &bits, sizeof bits);
      power = larger(power, 0x1p-126f);
      for (int64_t c = 0; c < width_; c += W) store_as<StoreBf16>(row + c, load_as<StoreBf16>(in + c) * power);
      factors[t] = scale * (inverse / power);
    }
    if (p_.l2norm) return 1;
    for (int i = 0; i < W; i++) most = larger<double>(most, largest[i]);
    return most;
  }

  // k [N, K] as pairs of channels [K / 2, N] and, for what is summed over tokens, as [K, N].
  void transpose_keys() const {
    alignas(64) static constexpr auto of_channel = [] {
      struct {
        uint16_t lane[2][32];
      } x{};
      for (int i = 0; i < 32; i++)
        for (int odd = 0; odd < 2; odd++) x.lane[odd][i] = static_cast<uint16_t>(2 * i + odd);
      return x;
    }();
    const __m512i even = _mm512_load_si512(of_channel.lane[0]), odd = _mm512_load_si512(of_channel.lane[1]);
    for (int64_t r = 0; r < pairs_; r += W)
      for (int64_t t = 0; t < N; t += 2 * W) {
        V first[W], second[W];
        for (int i = 0; i < W; i++) {
          std::memcpy(&first[i], k_ + (t + i) * pairs_ + r, sizeof(V));
          std::memcpy(&second[i], k_ + (t + W + i) * pairs_ + r, sizeof(V));
        }
        transpose_registers<float>(first);
        transpose_registers<float>(second);
        for (int i = 0; i < W; i++) {
          std::memcpy(k_pairs_ + (r + i) * N + t, &first[i], sizeof(V));
          std::memcpy(k_pairs_ + (r + i) * N + t + W, &second[i], sizeof(V));
          const auto low = reinterpret_cast<__m512i>(first[i]), high = reinterpret_cast<__m512i>(second[i]);
          uint32_t* const to = k_columns_ + 2 * (r + i) * (N / 2) + t / 2;
          _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low, even, high));
          _mm512_storeu_si512(to + N / 2, _mm512_permutex2var_epi16(low, odd, high));
        }
      }
  }

  // -A below the blocks of its diagonal and P in parts, the blocks of -A's diagonal in float.
  void triangles() const {
    for (int64_t i = 0; i < now_.blocks; i++)
      for (int64_t j = 0; j <= i * B; j += J) {
        const TileSums<2> sums;
        sums.zero();
        sums.add(k_ + i * B * pairs_, q_ + i * B * pairs_, pairs_, k_pairs_ + j, N, pairs_);
        sums.store(kk_ + i * B * N + j, qk_ + i * B * N + j, N);
      }
    for (int64_t t = 0; t < now_.blocks * B; t++) {
      const float keep = -now_.gates.beta[t] * k_factor_[t];
      for (int64_t s = 0; s < round_up(t + 1, J); s += W) {
        V a{}, p{};
        if (s <= t) {
          V decay = load<float>(k_factor_ + s);
          if (now_.gates.gated) decay *= exponential(-difference(now_.gates.sum + s, now_.gates.sum[t]));
          p = before(s, t + 1) ? load<float>(qk_ + t * N + s) * (decay * q_factor_[t]) : V{};
          a = before(s, t) ? load<float>(kk_ + t * N + s) * (decay * keep) : V{};
        }
        const int64_t at = t * (N / 2) + s / 2;
        store_row_high(p_t_[0] + at, p);
        store_row_low(p_t_[1] + at, p);
        if (!erases) continue;
        if (t / B == s / B) {
          store<float>(diagonal_ + t * B, a);
          a = V{};
        }
        store_row_high(a_[0] + at, a);
        store_row_low(a_[1] + at, a);
      }
    }
  }
  // Which of the tokens from s on are before t.
  static Lanes<float>::I before(int64_t s, int64_t t) { return ~on_or_above(t, s); }

  // out [N, J] = x S. One after the other for k and q, so that the columns of S stay in L1.
  void multiply_state(const uint32_t* x, int64_t j, float* out) const {
    in_pairs([&](auto sums, int64_t i) {
      const uint32_t* const rows = x + i * B * pairs_;
      sums.zero();
      sums.add(rows, rows + B * pairs_, pairs_, state_part(0, j), state_part(1, j), J, pairs_);
      sums.store(out + i * B * J, out + (i + 1) * B * J, J);
    });
  }
  // f(sums, i) for blocks i and i + 1 at once, as long as there are two.
  template <class F>
  void in_pairs(const F& f) const {
    int64_t i = 0;
    for (; i + 1 < now_.blocks; i += 2) f(TileSums<2>(), i);
    if (i < now_.blocks) f(TileSums<1>(), i);
  }

  // R, and the outputs that the state alone gives.
  void products_of_state(int64_t j) const {
    if (erases) multiply_state(k_, j, r_);
    multiply_state(q_, j, o_);
    V most[J / W];
    for (int64_t c = 0; c < J; c += W) most[c / W] = load<float>(largest_ + j + c);
    for (int64_t t = 0; t < now_.blocks * B; t++) {
      const float decay = now_.gates.decay[t], beta = now_.gates.beta[t];
      const bool there = t < now_.rows;
#pragma GCC unroll 2
      for (int64_t c = 0; c < J; c += W) {
        float *const r = r_ + t * J + c, *const o = o_ + t * J + c;
        const V v = there ? load_as<StoreBf16>(at_.v<StoreBf16>(now_.t0 + t, j + c)) : V{};
        most[c / W] = larger_of(absolute(v), most[c / W]);
        store<float>(r, !there ? V{} : erases ? beta * (v - decay * k_factor_[t] * load<float>(r)) : v);
        store<float>(o, decay * q_factor_[t] * load<float>(o));
      }
    }
    for (int64_t c = 0; c < J; c += W) store<float>(largest_ + j + c, most[c / W]);
  }

  // V' for R, in `r_` and in parts; whether all of it is finite.
  bool new_values() const {
    V finite{};  // else not a number
    for (int64_t i = 0; i < now_.blocks; i++) {
      float* const r = r_ + i * B * J;
      if (erases && i > 0) {
        const int64_t pairs = round_up(i * B, J) / 2, row = i * B * (N / 2);
        const TileSums<1> sums;
        sums.load(r, nullptr, J);
        sums.add(a_[0] + row, nullptr, N / 2, values_[0], values_[1], J, pairs);
        sums.add(a_[1] + row, nullptr, N / 2, values_[0], J, pairs);
        sums.store(r, nullptr, J);
      }
      for (int64_t c = 0; c < J; c += W) substitute(i, c, finite);
    }
    for (int64_t i = now_.blocks * B / 2; i < round_up(now_.rows, J) / 2; i++)
      for (int part = 0; part < 2; part++) std::memset(tails_[part] + i * J, 0, J * 4);
    return lane_sum<float>(finite) == 0;
  }
  void substitute(int64_t i, int64_t c, V& finite) const {
    float* const r = r_ + i * B * J + c;
    const float* const a = diagonal_ + i * B * B;
    V x[B];
#pragma GCC unroll 16
    for (int t = 0; t < B; t++) x[t] = load<float>(r + t * J);
    if (erases) {
#pragma GCC unroll 16
      for (int s = 0; s < B; s++)
#pragma GCC unroll 16
        for (int t = s + 1; t < B; t++) x[t] += a[t * B + s] * x[s];
#pragma GCC unroll 16
      for (int t = 0; t < B; t++) store<float>(r + t * J, x[t]);
    }
    const float* const tail = now_.gates.tail + i * B;
    const float* const factor = k_factor_ + i * B;
#pragma GCC unroll 8
    for (int t = 0; t < B; t += 2) {
      const int64_t at = (i * B + t) / 2 * J + c;
      finite += (x[t] - x[t]) + (x[t + 1] - x[t + 1]);
      store_pair_high(values_[0] + at, x[t], x[t + 1]);
      store_pair_low(values_[1] + at, x[t], x[t + 1]);
      const V even = x[t] * (tail[t] * factor[t]), odd = x[t + 1] * (tail[t + 1] * factor[t + 1]);
      store_pair_high(tails_[0] + at, even, odd);
      store_pair_low(tails_[1] + at, even, odd);
    }
  }

  // O += P V'.
  void add_values(bool finite) const {
    if (!finite) hide();
    in_pairs([&](auto sums, int64_t i) {
      const int64_t pairs = (i + 2) * B / 2, next = B * (N / 2);
      const uint32_t *const high = p_t_[0] + i * next, *const low = p_t_[1] + i * next;
      float* const o = o_ + i * B * J;
      sums.load(o, o + B * J, J);
      sums.add(high, high + next, N / 2, values_[0], values_[1], J, pairs);
      sums.add(low, low + next, N / 2, values_[0], J, pairs);
      sums.store(o, o + B * J, J);
    });
  }
  // Values that are not finite would reach the tokens before them, where they stand beside a zero: they are left out of
  // the products, and added to the outputs from their own on.
  __attribute__((noinline)) void hide() const {
    for (int64_t s = 0; s < now_.blocks * B; s += 2)
      for (int64_t c = 0; c < J; c += W) {
        const V even = load<float>(r_ + s * J + c), odd = load<float>(r_ + (s + 1) * J + c);
        const int64_t at = s / 2 * J + c;
        store_pair_high(values_[0] + at, even - even == 0 ? even : V{}, odd - odd == 0 ? odd : V{});
        store_pair_low(values_[1] + at, even - even == 0 ? even : V{}, odd - odd == 0 ? odd : V{});
        for (int64_t t = s; t < now_.rows; t++) {
          float* const o = o_ + t * J + c;
          V sum = load<float>(o) + weight(t, s) * (even - even == 0 ? V{} : even);
          if (t > s) sum += weight(t, s + 1) * (odd - odd == 0 ? V{} : odd);
          store<float>(o, sum);
        }
      }
  }
  float weight(int64_t t, int64_t s) const {  // P_ts
    float sum = 0;
    for (int part = 0; part < 2; part++)
      sum += load_one<StoreBf16>(reinterpret_cast<const uint16_t*>(p_t_[part] + t * (N / 2)) + s);
    return sum;
  }

  void keep_values(const DeltaRuleStates& states, int64_t j) const {
    float* const to = erases ? at_.s.kept_values(p_, states, now_.t0) : nullptr;
    if (!to) return;
    for (int64_t t = 0; t < now_.rows; t++)
      for (int64_t c = 0; c < J; c += W)
        store<float>(to + t * p_.value_width + at_.v0 + j + c, load<float>(r_ + t * J + c));
  }
  void store_out(int64_t j) const {
    for (int64_t t = 0; t < now_.rows; t++)
      for (int64_t c = 0; c < J; c += W)
        store_as<StoreBf16>(at_.out<StoreBf16>(now_.t0 + t, j + c), load<float>(o_ + t * J + c));
  }
  void next_state(int64_t j) const {
    const int64_t pairs = round_up(now_.rows, J) / 2;
    for (int64_t i = 0; i < width_; i += 2 * B) {
      const TileSums<2> sums;
      float* const s = state(j) + i * J;
      const uint32_t* const k = k_columns_ + i * (N / 2);
      sums.load(s, s + B * J, J);
      sums.add(k, k + B * (N / 2), N / 2, tails_[0], tails_[1], J, pairs);
      sums.store(s, s + B * J, J);
    }
  }

  const Columns& at_;
  const DeltaRuleProblem& p_;
  const int64_t width_, pairs_;
  Part now_, next_;
  double largest_k_ = 0, largest_q_ = 0;  // so far
  float* largest_;                        // [V] of the values so far; of the initial state at first
  alignas(64) float k_factor_[N];
  float q_factor_[N];
  uint32_t *k_, *q_;          // [N, K / 2] pairs of channels
  uint32_t* k_pairs_;         // [K / 2, N]
  uint32_t* k_columns_;       // [K, N / 2] pairs of tokens
  float *kk_, *qk_;           // [N, N] K K^T, Q K^T
  float* diagonal_;           // [N, B] the blocks of -A's diagonal
  uint32_t *a_[2], *p_t_[2];  // [N, N / 2] high and low of -A and P
  float *r_, *o_;             // [N, J] R, then V'; O
  uint32_t* values_[2];       // [N / 2, J] high and low of V'
  uint32_t* tails_[2];        // the same of diag(e^{G_N - G} / |k|) V'
  float* state_;              // [V / J, K, J] the state times the next decay
  uint32_t* state_parts_[2];  // [V / J, K / 2, J] high and low of the state
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
