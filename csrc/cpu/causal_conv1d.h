// Family `causal_conv1d` on the CPU: what csrc/bindings/causal_conv1d.cpp calls and causal_conv1d.cpp defines once per
// instruction set.
//
//   y_t = bias + sum over j < W of w_j x_{t - W + 1 + j}      out_t = y_t, or with silu y_t sigmoid(y_t)
//
// per channel, where x before the start of a sequence is its initial state, or zero. Backward, with
// dy_t = grad_t sigmoid(y_t) (1 + y_t (1 - sigmoid(y_t))) and dy zero outside the sequence:
//
//   dx_t = sum over j of w_j dy_{t + W - 1 - j}     dw_j = sum over t of dy_t x_{t - W + 1 + j}     dbias = sum of dy_t
//
// and the gradient of the initial state is dx at the W - 1 tokens before the sequence.
#pragma once

#include "common.h"

namespace pyrepr::cpu {

struct CausalConvProblem {
  const void* x;                  // [B, T, D], element (b, t, d) at b * batch + t * token + d * channel
  int64_t batch, token, channel;  // strides
  const void* weight;             // [D, W]
  const void* bias;               // [D] or null
  const void* initial;            // [N, D, W - 1] in x's dtype or null: zero
  const int64_t* bounds;          // [N + 1] where sequences start and end, in tokens b * T + t; none spans two rows
  int64_t sequences, total;       // N, T
  int64_t channels, taps;         // D, W
  DType dtype;                    // of x; not f64
  DType filter;                   // of weight and bias: f32, or x's
  bool silu;
  int threads;

  int64_t tokens() const { return bounds[sequences]; }  // B T
};

struct CausalConvGradients {
  const void* out;  // [B, T, D] in x's dtype, given
  void* x;          // [B, T, D] in x's dtype
  float* weight;    // [D, W]
  float* bias;      // [D] or null
  float* initial;   // [N, D, W - 1] or null; left alone for sequences without tokens
};

// One call of causal_conv1d_update: `state` moves on by the new tokens.
struct CausalConvStep {
  void* state;                                      // [B, D, S] with S >= W - 1, in x's dtype
  int64_t state_batch, state_channel, state_token;  // strides
  int64_t state_length;                             // S
};

struct CausalConvFunctions {
  Status (*forward)(const CausalConvProblem&, void* out);  // out [B, T, D] in x's dtype
  Status (*backward)(const CausalConvProblem&, const CausalConvGradients&);
  Status (*update)(const CausalConvProblem&, const CausalConvStep&, void* out);  // one sequence per row; no `initial`
};

}  // namespace pyrepr::cpu
