// One token of the delta rule, the state where it stands; and all that a layer computes around it while decoding.
// Included by level units only (see simd.h).
#pragma once

#include <omp.h>

#include "cpu/causal_conv1d_token.h"
#include "cpu/delta_rule_around.h"
#include "cpu/delta_rule_recurrence.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kSmall = int64_t(1) << 16;  // elements of all states times tokens below which threads do not pay

// Floats of scratch that step_in_place takes.
inline int64_t step_size(const DeltaRuleProblem& p) { return Token::size(p) + Panels::size(p.width, NR); }

template <int NV>
inline void step_columns(const Columns& at, const Token& token, int64_t c, const float* from, float* to,
                         int64_t stride) {
  alignas(64) float v[NV * W], o[NV * W];
  by_storage(at.p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int j = 0; j < NV; j++) store<float>(v + j * W, load_some<S>(at.v<S>(0, c + j * W), at.columns - c - j * W));
  });
  token.step<NV>(at.p.width, at.p.beta, from, to, stride, v, o);
  by_storage(at.p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int j = 0; j < NV; j++) store_some<S>(at.out<S>(0, c + j * W), at.columns - c - j * W, load<float>(o + j * W));
  });
}

// One token or none: one pass over the state where it stands, from the initial to the final one.
inline void step_in_place(const Columns& at, float* scratch) {
  const DeltaRuleProblem& p = at.p;
  const int64_t stride = p.value_width;
  const float* from = at.initial();
  if (!from) {
    for (int64_t i = 0; i < p.width; i++) zero(at.final + i * stride, at.columns);
    from = at.final;
  }
  if (at.s.length == 0) {
    for (int64_t i = 0; i < p.width && from != at.final; i++)
      std::memcpy(at.final + i * stride, from + i * stride, static_cast<size_t>(at.columns) * sizeof(float));
    return;
  }
  Token token(p, scratch);
  const Panels rest{scratch + Token::size(p), p.width};
  token.load(p, at.s, 0);
  int64_t c = 0;
  for (; c + 8 * W <= at.columns; c += 8 * W) step_columns<8>(at, token, c, from + c, at.final + c, stride);
  for (; c + W <= at.columns; c += W) step_columns<1>(at, token, c, from + c, at.final + c, stride);
  if (c == at.columns) return;
  load_matrix<StoreF32>(from + c, stride, p.width, p.width, at.columns - c, rest);
  step_columns<1>(at, token, c, rest.data, rest.data, NR);
  store_matrix<StoreF32>(rest, p.width, at.columns - c, at.final + c, stride);
}

// One query and key head of one row of the batch, with its value heads: nobody else's numbers are needed, so that a
// thread takes them from the convolution to the norm while they are in its cache.
template <class S, class F>
class DecodedHead {
  using Element = typename S::Memory;

 public:
  static int64_t size(const DeltaRuleDecode& p) {
    return round_up((2 * p.width + p.shared() * p.value_width) * static_cast<int64_t>(sizeof(Element)), 64) +
           step_size(problem(p)) * 4;
  }

  // g, beta: [B, HV]; out: [B, HV, V].
  static void run(const DeltaRuleDecode& p, int64_t b, int64_t head, const float* g, const float* beta, char* memory,
                  Element* out) {
    const int64_t row = p.rows ? p.rows[b] : b, first = head * p.shared(), of_values = p.shared() * p.value_width;
    Element* const o = out + (b * p.value_heads + first) * p.value_width;
    if (row < 0) {
      std::memset(o, 0, static_cast<size_t>(of_values) * sizeof(Element));
      return;
    }
    Element *const q = reinterpret_cast<Element*>(memory), *const k = q + p.width, *const v = k + p.width;
    DeltaRuleProblem token = problem(p);
    float* const scratch = reinterpret_cast<float*>(memory + size(p) - step_size(token) * 4);
    convolve(p, p.q, b, row, head * p.width, p.width, q);
    convolve(p, p.k, b, row, head * p.width, p.width, k);
    convolve(p, p.v, b, row, first * p.value_width, of_values, v);
    const int64_t state = (row * p.value_heads + first) * p.width * p.value_width;
    token.q = {q, 0, 0, p.width};
    token.k = {k, 0, 0, p.width};
    token.v = {v, 0, 0, p.value_width};
    token.g = g + b * p.value_heads + first;
    token.beta = beta + b * p.value_heads + first;
    token.initial = p.initial + state;
    GatedNorm norm = p.norm;
    norm.x = out;
    for (int64_t h = 0; h < p.shared(); h++) {
      const Sequence s(token, h);
      step_in_place({token, s, 0, p.value_width, o, p.final + state + s.state_offset(token)}, scratch);
      by_storage(p.norm.gate_dtype,
                 [&](auto gate) { gated_norm_row<S, decltype(gate)>(norm, b * p.value_heads + first + h, out); });
    }
  }

 private:
  // The rule for the value heads of one query and key head, but for the tensors.
  static DeltaRuleProblem problem(const DeltaRuleDecode& p) {
    DeltaRuleProblem token{};
    token.batch = token.sequences = token.total = token.heads = 1;
    token.width = p.width;
    token.value_heads = p.shared();
    token.value_width = p.value_width;
    token.dtype = p.dtype;
    token.gate = Gate::per_head;
    token.l2norm = true;
    token.scale = p.scale;
    return token;
  }
  // Channels [first, first + count) of q, k or v.
  static void convolve(const DeltaRuleDecode& p, const DecodedChannels& x, int64_t b, int64_t row, int64_t first,
                       int64_t count, Element* out) {
    const auto* const bias = static_cast<const typename F::Memory*>(x.bias);
    const TokenConvolution<S, F> token{static_cast<const Element*>(x.x) + b * x.x_row + first,
                                       static_cast<const typename F::Memory*>(x.weight) + first * p.taps,
                                       bias ? bias + first : nullptr,
                                       static_cast<const Element*>(x.from) + row * x.from_row + first * p.kept,
                                       static_cast<Element*>(x.to) + row * x.to_row + first * p.kept,
                                       p.taps,
                                       p.kept,
                                       true};
    token.run(count, out);
  }
};

inline Status decode(const DeltaRuleDecode& p, void* out) {
  return by_narrow_dtype(p.dtype, [&](auto s) {
    return by_narrow_dtype(p.filter, [&](auto f) {
      using S = decltype(s);
      using F = decltype(f);
      if constexpr (!std::is_same_v<F, S> && !std::is_same_v<F, StoreF32>) {
        return Status::ok;  // the binding refuses it
      } else {
        using Head = DecodedHead<S, F>;
        const int64_t gates = p.batch * p.value_heads, elements = gates * p.width * p.value_width;
        const int threads = elements < kSmall ? 1 : p.threads;
        const int64_t bytes = round_up(Head::size(p), 64);
        const Memory memory(bytes * threads + 2 * gates * 4);
        if (!memory.ok()) return Status::out_of_memory;
        float *const g = reinterpret_cast<float*>(memory.as<char>(bytes * threads)), *const beta = g + gates;
        activate(p.gates, g, beta);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t task = 0; task < p.batch * p.heads; task++)
          Head::run(p, task / p.heads, task % p.heads, g, beta, memory.as<char>(bytes * omp_get_thread_num()),
                    static_cast<typename S::Memory*>(out));
        return Status::ok;
      }
    });
  });
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
