// Family `delta_rule` on the CPU, compiled once per instruction set (PYREPR_LEVEL). The maths is in delta_rule.h.
//
// Work, at best, per token and head with C = 32: forward 3 K V + C (2 K + V) multiply-adds, backward 8 K V + 7 C K or
// so; bytes: the inputs once, the outputs once. S, and what a chunk needs, stay in L1 and L2.
//
// A task is one sequence of one value head; the forward also cuts the value columns (they are independent given X and
// P) when there are fewer of those than threads. No task shares a sum with another, so the bits are the same for any
// number of threads.
#include "cpu/delta_rule.h"

#include <omp.h>

#include "cpu/delta_rule_around.h"
#include "cpu/delta_rule_backward.h"
#include "cpu/delta_rule_chunk.h"
#include "cpu/delta_rule_wide.h"
#if defined(PYREPR_LEVEL_avx512_bf16)
#include "cpu/delta_rule_dot.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kShort = 8;  // tokens up to which the recurrence itself is run, on the state where it stands
constexpr int64_t kSmall = int64_t(1) << 16;  // elements of all states times tokens below which threads do not pay

// One token, for value columns of a state whose rows are `stride` apart: o = S'^T q without a second pass over S',
// since S'^T q = (e^g S)^T q + <k, q> delta.
struct Token {
  float *k, *decay, *decayed_k, *decayed_q;  // [K] k, e^g, e^g k, e^g q
  float beta, kq;

  static int64_t size(int64_t width) { return 4 * round_up(width, NR); }
  Token(float* memory, int64_t width) {
    k = memory;
    decay = k + round_up(width, NR);
    decayed_k = decay + round_up(width, NR);
    decayed_q = decayed_k + round_up(width, NR);
  }

  template <class S>
  void load(const DeltaRuleProblem& p, const Sequence& s, int64_t t) {
    const int64_t padded = round_up(p.width, NR), row = s.row(p, t);
    load_key<S>(s.token<S>(p.k, t, s.head), p.width, padded, p.l2norm, 1, k, NR);
    load_key<S>(s.token<S>(p.q, t, s.head), p.width, padded, p.l2norm, p.scale, decayed_q, NR);
    beta = p.beta[row];
    const V same = p.gate == Gate::per_head ? exponential(splat<float>(p.g[row])) : splat<float>(1);
    V products{};
    for (int64_t c = 0; c < padded; c += W) {
      const V key = pyrepr::load<float>(k + c), query = pyrepr::load<float>(decayed_q + c);
      const V e = p.gate == Gate::per_key
                      ? exponential(load_some<StoreF32>(p.g + row * p.width + c, larger<int64_t>(0, p.width - c)))
                      : same;
      products += key * query;
      store<float>(decay + c, e);
      store<float>(decayed_k + c, key * e);
      store<float>(decayed_q + c, query * e);
    }
    kq = static_cast<float>(lane_sum<float>(products));
  }

  // The state [K, NV * W] at `from` forward by this token, to `to`, which may be the same; v, o [NV * W].
  template <int NV>
  void step(int64_t width, const float* from, float* to, int64_t stride, const float* v, float* o) const {
    // Eight rows are summed on their own first: short chains of additions round less, and do not wait for each other.
    constexpr int64_t rows = 8;
    V erased[NV] = {}, read[NV] = {}, delta[NV];
    int64_t i = 0;
    for (; i + rows <= width; i += rows)
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) {
        V e{}, r{};
#pragma GCC unroll 8
        for (int64_t row = i; row < i + rows; row++) {
          const V s = pyrepr::load<float>(from + row * stride + j * W);
          e += decayed_k[row] * s;
          r += decayed_q[row] * s;
        }
        erased[j] += e;
        read[j] += r;
      }
    for (; i < width; i++)
      for (int j = 0; j < NV; j++) {
        const V s = pyrepr::load<float>(from + i * stride + j * W);
        erased[j] += decayed_k[i] * s;
        read[j] += decayed_q[i] * s;
      }
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) {
      delta[j] = beta * (pyrepr::load<float>(v + j * W) - erased[j]);
      store<float>(o + j * W, read[j] + kq * delta[j]);
    }
    // Last row first: the rows just read are still in L1.
    for (i = width - 1; i >= 0; i--)
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) {
        const int64_t at = i * stride + j * W;
        store<float>(to + at, decay[i] * pyrepr::load<float>(from + at) + k[i] * delta[j]);
      }
  }
};

// What takes inputs of this storage through their chunks, where the gate is not per key.
template <class S>
struct ForwardOf {
  using Type = FloatForward;
};
#if defined(PYREPR_LEVEL_avx512_bf16)
template <>
struct ForwardOf<StoreBf16> {
  using Type = DotForward;
};
#endif

template <class S>
class DeltaRule {
 public:
  using Element = typename S::Memory;
  using Forward = typename ForwardOf<S>::Type;

  static Status forward(const DeltaRuleProblem& p, void* o_, float* final, const DeltaRuleStates& states) {
    Element* const o = static_cast<Element*>(o_);
    const int64_t heads = p.sequences * p.value_heads, panels = ceil_div(p.value_width, NR);
    if (heads == 0 || panels == 0) return Status::ok;
    const int64_t work = heads * p.width * p.value_width * (p.bounds ? ceil_div(p.total, p.sequences) : p.total);
    const int threads = work < kSmall ? 1 : p.threads;
    const int64_t slices = heads >= threads ? 1 : smaller(panels, ceil_div(threads, heads));
    const int64_t slice = ceil_div(panels, slices) * NR;  // value columns per task
    const bool decoding = p.total <= kShort && !states.data;
    const int64_t bytes = round_up((decoding ? short_size(p) : forward_size(p, slice)) * 4, 64);
    const Memory memory(bytes * threads);
    if (!memory.ok()) return Status::out_of_memory;
    const auto run = [&](int64_t task) {
      float* const scratch = memory.as<float>(bytes * omp_get_thread_num());
      const Sequence s(p, task / slices);
      const int64_t v0 = task % slices * slice, columns = smaller(slice, p.value_width - v0);
      if (columns > 0) walk({p, s, v0, columns, o, final + s.state_offset(p) + v0}, states, scratch);
    };
    // Token after token, a thread gets the same heads, whose states its cache holds.
    if (decoding) {
#pragma omp parallel for schedule(static) num_threads(threads)
      for (int64_t task = 0; task < heads * slices; task++) run(task);
    } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
      for (int64_t task = 0; task < heads * slices; task++) run(task);
    }
    return Status::ok;
  }

  static Status backward(const DeltaRuleProblem& p, const DeltaRuleStates& states, const DeltaRuleGradients& grads) {
    const int64_t tasks = p.sequences * p.value_heads;
    if (tasks == 0 || p.value_width == 0) return Status::ok;
    const int64_t bytes = round_up(DeltaRuleBackward<S>::size(p, states.segment) * 4, 64);
    const Memory memory(bytes * p.threads);
    if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t task = 0; task < tasks; task++) {
      const Sequence s(p, task);
      DeltaRuleBackward<S>(p, s, states, grads, memory.as<float>(bytes * omp_get_thread_num())).run();
    }
    return Status::ok;
  }

 private:
  // What one task of the forward works on: value columns [v0, v0 + columns) of a sequence.
  struct Columns {
    const DeltaRuleProblem& p;
    const Sequence& s;
    int64_t v0, columns;
    Element* o;    // [B, T, HV, V]
    float* final;  // [K, columns], rows of V

    const float* initial() const { return p.initial ? p.initial + s.state_offset(p) + v0 : nullptr; }
    const Element* v(int64_t t, int64_t c) const { return s.token<S>(p.v, t, s.value_head) + v0 + c; }
    Element* out(int64_t t, int64_t c) const { return o + s.row(p, t) * p.value_width + v0 + c; }

    // What the panel at column c of the chunk at t0 should ask for: its places in o [rows, n], and its share of the
    // next chunk, when that is shared out evenly.
    Requests requests(int64_t t0, int64_t rows, int64_t c, int64_t n) const {
      constexpr int64_t item = sizeof(Element);
      Requests all;
      all.add(out(t0, c), rows, p.value_heads * p.value_width * item, n * item);
      const int64_t first = t0 + C + C * c / columns, last = t0 + C + C * smaller<int64_t>(c + NR, columns) / columns;
      request<S>(all, s, p.k, first, last, s.head, p.width);
      request<S>(all, s, p.q, first, last, s.head, p.width);
      request<S>(all, s, p.v, first, last, s.value_head, p.value_width);
      request_gates(all, p, s, first, last);
      return all;
    }

    void load_state(const Panels& state) const {
      const int64_t padded = round_up(p.width, NR);
      if (initial())
        load_matrix<StoreF32>(initial(), p.value_width, p.width, padded, columns, state);
      else
        zero(state.data, Panels::size(padded, columns));
    }
  };

  static int64_t short_size(const DeltaRuleProblem& p) { return Token::size(p.width) + Panels::size(p.width, NR); }
  static int64_t forward_size(const DeltaRuleProblem& p, int64_t slice) {
    const int64_t padded = round_up(p.width, NR);
    return larger(Forward::size(padded), FloatForward::size(padded)) + padded * slice + 3 * C * NR + Token::size(p.width);
  }

  static void walk(const Columns& at, const DeltaRuleStates& states, float* scratch) {
    if (at.s.length <= kShort && !states.data)
      walk_in_place(at, scratch);
    else if (at.p.gate == Gate::per_key)
      walk_chunks<FloatForward>(at, states, scratch);
    else
      walk_chunks<Forward>(at, states, scratch);
  }

  template <class Engine>
  static void walk_chunks(const Columns& at, const DeltaRuleStates& states, float* scratch) {
    const DeltaRuleProblem& p = at.p;
    const int64_t padded = round_up(p.width, NR);
    Engine engine(p, scratch);
    const Panels state{scratch + Engine::size(padded), padded};
    const Panels v{state.data + Panels::size(padded, at.columns), C}, values{v.data + C * NR, C},
        o{values.data + C * NR, C};
    at.load_state(state);
    const int64_t slot = states.data ? at.s.first_slot(p, states.segment) : 0;
    for (int64_t t0 = 0, number = 0; t0 < at.s.length; t0 += C, number++) {
      if (states.data && number % states.segment == 0) {
        const int64_t head = (slot + number / states.segment) * p.value_heads + at.s.value_head;
        store_matrix<StoreF32>(state, p.width, at.columns, states.data + head * p.width * p.value_width + at.v0,
                               p.value_width);
      }
      const int64_t rows = smaller(C, at.s.length - t0);
      engine.template load<S>(at.s, t0);
      for (int64_t c = 0; c < at.columns; c += NR) {
        const Panels slice = state.panel(c / NR);
        const int64_t n = smaller<int64_t>(NR, at.columns - c);
        Requests requests = at.requests(t0, rows, c, n);
        load_matrix<S>(at.v(t0, c), p.v.token, rows, C, n, v);
        if (engine.advance(n, v, values, o, slice, requests))
          store_matrix<S>(o, rows, n, at.out(t0, c), p.value_heads * p.value_width);
        else
          recur(at, t0, rows, c, slice.data, o.data + C * NR);
      }
    }
    store_matrix<StoreF32>(state, p.width, at.columns, at.final, p.value_width);
  }

  template <int NV>
  static void step_columns(const Columns& at, const Token& token, int64_t t, int64_t c, const float* from, float* to,
                           int64_t stride) {
    alignas(64) float v[NV * W], o[NV * W];
    for (int j = 0; j < NV; j++) store<float>(v + j * W, load_some<S>(at.v(t, c + j * W), at.columns - c - j * W));
    token.step<NV>(at.p.width, from, to, stride, v, o);
    for (int j = 0; j < NV; j++) store_some<S>(at.out(t, c + j * W), at.columns - c - j * W, load<float>(o + j * W));
  }

  // A chunk with numbers that are not finite, token by token: they reach no output before them. state: a panel [K, NR].
  static void recur(const Columns& at, int64_t t0, int64_t rows, int64_t c, float* state, float* scratch) {
    Token token(scratch, at.p.width);
    for (int64_t t = t0; t < t0 + rows; t++) {
      token.load<S>(at.p, at.s, t);
      step_columns<2>(at, token, t, c, state, state, NR);
    }
  }

  // A few tokens: every one is a pass over the state, the first from the initial to the final one, the others in place.
  static void walk_in_place(const Columns& at, float* scratch) {
    const DeltaRuleProblem& p = at.p;
    const int64_t stride = p.value_width;
    const float* from = at.initial();
    if (!from) {
      for (int64_t i = 0; i < p.width; i++) zero(at.final + i * stride, at.columns);
      from = at.final;
    } else if (from != at.final && at.s.length == 0) {
      for (int64_t i = 0; i < p.width; i++)
        std::memcpy(at.final + i * stride, from + i * stride, static_cast<size_t>(at.columns) * sizeof(float));
    }
    Token token(scratch, p.width);
    const Panels rest{scratch + Token::size(p.width), p.width};
    for (int64_t t = 0; t < at.s.length; t++, from = at.final) {
      token.load<S>(p, at.s, t);
      int64_t c = 0;
      for (; c + 8 * W <= at.columns; c += 8 * W) step_columns<8>(at, token, t, c, from + c, at.final + c, stride);
      for (; c + W <= at.columns; c += W) step_columns<1>(at, token, t, c, from + c, at.final + c, stride);
      if (c == at.columns) continue;
      load_matrix<StoreF32>(from + c, stride, p.width, p.width, at.columns - c, rest);
      step_columns<1>(at, token, t, c, rest.data, rest.data, NR);
      store_matrix<StoreF32>(rest, p.width, at.columns - c, at.final + c, stride);
    }
  }
};

Status forward(const DeltaRuleProblem& p, void* o, float* final, const DeltaRuleStates& states) {
  return by_narrow_dtype(p.dtype, [&](auto s) { return DeltaRule<decltype(s)>::forward(p, o, final, states); });
}
Status backward(const DeltaRuleProblem& p, const DeltaRuleStates& states, const DeltaRuleGradients& grads) {
  return by_narrow_dtype(p.dtype, [&](auto s) { return DeltaRule<decltype(s)>::backward(p, states, grads); });
}

}  // namespace

DeltaRuleFunctions delta_rule_functions() { 
  return {forward, backward, activate, gated_norm, WideRule::forward, WideRule::backward};
}

}  // namespace pyrepr::cpu::PYREPR_LEVEL
