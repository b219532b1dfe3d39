// What layers of the delta rule compute beside it: gates and step sizes of what projections give, and the norm of the
// output. Included by level units only (see simd.h).
#pragma once

#include <omp.h>

#include "cpu/delta_rule_chunk.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kFew = int64_t(1) << 14;  // elements below which threads do not pay

// log(1 + e^x): what is left of max(x, 0) is log(1 + e) with e = e^-|x|, which is 2 artanh(e / (2 + e)); the argument
// is at most 1/3, and the first power that is left out 3^-18.
inline V softplus(V x) {
  const V e = exp_nonpositive<float>(x < 0 ? x : -x), s = e / (2 + e), squared = s * s;
  V sum = splat<float>(1.0f / 17);
  for (int i = 15; i > 0; i -= 2) sum = sum * squared + 1.0f / static_cast<float>(i);
  return (x < 0 ? V{} : x) + 2 * s * sum;
}

// g and beta of all tokens as the rule takes them.
inline void activate_gates(const DeltaRuleGates& p, float* g) {
  const int64_t count = p.heads * p.width;
  const auto rate = [&](int64_t i) { return load_one<StoreF32>(p.rates + i); };
  by_narrow_dtype(p.g_dtype, [&](auto s) {
    using S = decltype(s);
#pragma omp parallel for num_threads(p.tokens* count < kFew ? 1 : p.threads)
    for (int64_t t = 0; t < p.tokens; t++) {
      const auto* const raw = static_cast<const typename S::Memory*>(p.g) + t * count;
      float* const to = g + t * count;
      const auto activate = [&](int64_t i, int64_t n, V rates) {
        V x = load_some<S>(raw + i, n);
        if (p.dt_bias) x += load_some<StoreF32>(p.dt_bias + i, n);
        store_some<StoreF32>(to + i, n, p.bounded ? p.bound * sigmoid(rates * x) : -rates * softplus(x));
      };
      if (p.width == 1)
        for (int64_t h = 0; h < count; h += W) activate(h, count - h, load_some<StoreF32>(p.rates + h, count - h));
      else
        for (int64_t h = 0; h < p.heads; h++)
          for (int64_t c = 0; c < p.width; c += W) activate(h * p.width + c, p.width - c, splat<float>(rate(h)));
    }
    return Status::ok;
  });
}

inline void activate_steps(const DeltaRuleGates& p, float* beta) {
  by_narrow_dtype(p.beta_dtype, [&](auto s) {
    using S = decltype(s);
    const auto* const raw = static_cast<const typename S::Memory*>(p.beta);
    const int64_t count = p.tokens * p.heads;
    for (int64_t i = 0; i < count; i += W)
      store_some<StoreF32>(beta + i, count - i, p.largest * sigmoid(load_some<S>(raw + i, count - i)));
    return Status::ok;
  });
}

inline Status activate(const DeltaRuleGates& p, float* g, float* beta) {
  if (p.g) activate_gates(p, g);
  if (p.beta) activate_steps(p, beta);
  return Status::ok;
}

template <class S, class G>
void gated_norm_row(const GatedNorm& p, int64_t row, typename S::Memory* out) {
  const auto* const x = static_cast<const typename S::Memory*>(p.x) + row * p.width;
  const auto* const gate = static_cast<const typename G::Memory*>(p.gate) + row * p.width;
  V squares{};
  for (int64_t c = 0; c < p.width; c += W) {
    const V v = load_some<S>(x + c, p.width - c);
    squares += v * v;
  }
  const float mean = static_cast<float>(lane_sum<float>(squares)) / static_cast<float>(p.width);
  const V factor = splat<float>(1 / __builtin_sqrtf(mean + p.eps));
  for (int64_t c = 0; c < p.width; c += W) {
    const int64_t n = p.width - c;
    V y = load_some<S>(x + c, n) * factor;
    if (p.weight) y *= load_some<StoreF32>(p.weight + c, n);
    if (p.gate) {
      const V g = load_some<G>(gate + c, n);
      y *= p.silu ? g * sigmoid(g) : sigmoid(g);
    }
    store_some<S>(out + row * p.width + c, n, y);
  }
}

inline Status gated_norm(const GatedNorm& p, void* out) {
  return by_narrow_dtype(p.dtype, [&](auto s) {
    return by_narrow_dtype(p.gate_dtype, [&](auto g) {
      using S = decltype(s);
#pragma omp parallel for num_threads(p.rows* p.width < kFew ? 1 : p.threads)
      for (int64_t row = 0; row < p.rows; row++)
        gated_norm_row<S, decltype(g)>(p, row, static_cast<typename S::Memory*>(out));
      return Status::ok;
    });
  });
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
