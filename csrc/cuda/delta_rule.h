// Family `delta_rule` in CUDA C++: decoding. No CUDA header here, so that the bindings need none.
#pragma once

#include <cstdint>

#include "common.h"

namespace pyrepr::cuda {

constexpr int64_t kDeltaMaxWidth = 256;  // largest K of delta_rule_step

// Where element (b, t, h, 0) of a [B, T, H, D] tensor stands: data + b * batch + t * token + h * head; D is dense.
struct Tokens {
  const void* data;
  int64_t batch, token, head;
};

struct DeltaRuleStep {
  Tokens q, k;            // [B, T, H, K]
  Tokens v;               // [B, T, HV, V]
  const float* g;         // [B, T, HV], with a gate per key [B, T, HV, K]; null without a gate
  const float* beta;      // [B, T, HV]
  const float* initial;   // [N, HV, K, V]; null: zero
  float* final;           // [N, HV, K, V]; may be `initial`
  void* o;                // [B, T, HV, V] in the dtype of q, k, v
  const int64_t* bounds;  // [N + 1] on the device: where packed sequences start and end; null: one per row
  int64_t total, heads, width, value_heads, value_width, sequences;  // T, H, K, HV, V, N
  DType dtype;                                                       // not f64
  Gate gate;
  bool l2norm;
  float scale;
};

// The recurrence, token by token. Launches on `stream` and does not wait. Returns null, or what is wrong.
const char* delta_rule_step(const DeltaRuleStep& p, void* stream);

}  // namespace pyrepr::cuda
