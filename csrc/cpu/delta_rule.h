// Family `delta_rule` on the CPU: what csrc/bindings/delta_rule.cpp calls and delta_rule.cpp defines once per
// instruction set.
//
//   S <- e^{g_t} S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = scale S^T q_t          S [K, V]
//
// The forward does just that: see delta_rule_recurrence.h. The backward goes by chunks of kChunk tokens: with S the state
// before the chunk, q already scaled, G = cumsum(g) inside the chunk and Gamma_ts = e^{G_t - G_s} for t >= s:
//
//   A = tril(diag(beta) (K K^T o Gamma), -1)      X = (I + A)^-1      P = tril(Q K^T o Gamma)
//   R = diag(beta) (V - diag(e^G) K S)            V' = X R            O = diag(e^G) Q S + P V'
//   S' = e^{G_C} S + K^T diag(e^{G_C - G}) V'
//
// Backward, chunks in reverse, given dO and dS' (o: elementwise product):
//
//   dV' = P^T dO + diag(e^{G_C - G}) K dS'        dR = X^T dV'        dV = diag(beta) dR
//   D = tril(dO V'^T) o Gamma                     M = -tril(dR V'^T, -1) o Gamma   (the derivative of A is dR V'^T)
//   dQ = diag(e^G) dO S^T + D K                   Z = M K - diag(e^G) dR S^T
//   dK = diag(beta) Z + [diag(e^{G_C - G}) V' dS'^T + D^T Q + M^T diag(beta) K]
//   dS = e^{G_C} dS' + Q^T diag(e^G) dO - K^T diag(beta e^G) dR
//   dbeta = rowsum(dR o V + Z o K)
//   dG = rowsum(dQ o Q + beta Z o K - [..] o K),  dG_last += e^{G_C} <S, dS'> + sum of diag(e^{G_C - G}) V' dS'^T o K
//   dg = reverse cumsum of dG
//
// because every e^{G_t} stands beside a Q_t or a beta_t K_t, and every e^{-G_s} beside a K_s. What no decay stands in, the
// diagonal of D and the last row of diag(e^{G_C - G}) V' dS'^T, is left out of dG, where it would enter with both signs.
//
// Without the erase A = 0, V' = V and Z = 0, and beta is 1 where it stands beside a value.
//
// With a gate per key channel (KDA) g_t, G_t and e^{G_t} are vectors over K. They then belong to the elements of K and
// Q instead of the rows, (K K^T o Gamma)_ts is sum_c K_tc K_sc e^{G_tc - G_sc}, e^{G_C} scales the rows of S, and what
// is summed over c in dG is not.
#pragma once

#include "common.h"

namespace pyrepr::cpu {

constexpr int64_t kDeltaChunk = 32;  // tokens; `CHUNK` in pyrepr/ops/delta_rule.py

// Where element (b, t, h, 0) of a [B, T, H, D] tensor stands: data + b * batch + t * token + h * head; D is dense.
struct Tokens {
  const void* data;
  int64_t batch, token, head;
};

struct DeltaRuleProblem {
  Tokens q, k;           // [B, T, H, K]
  Tokens v;              // [B, T, HV, V]
  const float* g;        // [B, T, HV], with a gate per key [B, T, HV, K]; null without a gate
  const float* beta;     // [B, T, HV]; null: nothing is erased, S <- e^{g_t} S + k_t v_t^T
  const float* initial;  // [N, HV, K, V]; null: zero
  int64_t batch, total, heads, width, value_heads, value_width;
  const int64_t* bounds;  // [N + 1] where the packed sequences start and end; null: one sequence per row of the batch
  int64_t sequences;      // N
  DType dtype;            // of q, k and v; not f64
  Gate gate;
  bool l2norm;
  float scale;
  int threads;
};

// The states before chunks 0, segment, 2 segment, ... of every sequence, one sequence after the other.
struct DeltaRuleStates {
  float* data;  // [slots, HV, K, V]; null: none are kept
  int64_t slots;
  int64_t segment;
};

struct DeltaRuleGradients {
  const float* o;  // [B, T, HV, V] given
  float* q;        // [B, T, HV, K]
  float* k;        // [B, T, HV, K]
  float* v;        // [B, T, HV, V]
  float* g;        // [B, T, HV], with a gate per key [B, T, HV, K]
  float* beta;     // [B, T, HV]; not looked at without beta
  float* state;    // [N, HV, K, V] the gradient of the final state, replaced by that of the initial state
};

// The same in float64: everything dense, q scaled, q and k given for every value head.
struct DeltaRuleWide {
  const double *q, *k;    // [B, T, HV, K]
  const double* v;        // [B, T, HV, V]
  const double* g;        // [B, T, HV], [B, T, HV, K] per key; null: no decay
  const double* beta;     // [B, T, HV]; null: nothing is erased
  const double* initial;  // [N, HV, K, V]; null: zero
  int64_t heads, width, value_width;  // HV, K, V
  const int64_t* bounds;              // [N + 1] where sequences start and end, counting tokens through the batch
  int64_t sequences;                  // N
  Gate gate;
  int threads;
};

struct DeltaRuleWideGradients {
  const double* o;  // [B, T, HV, V] given
  double *q, *k;    // [B, T, HV, K]
  double* v;        // [B, T, HV, V]
  double* g;        // like g
  double* beta;     // [B, T, HV]
  double* state;    // [N, HV, K, V] the gradient of the final state, replaced by that of the initial state
};

// Gates and step sizes before their activation. With x = g + dt_bias, per head or per key:
//
//   g <- -rate softplus(x), or with a bound  bound sigmoid(rate x);   beta <- largest sigmoid(beta)
struct DeltaRuleGates {
  const void *g, *beta;  // [tokens, heads, width], [tokens, heads], dense; null: that one is left alone
  DType g_dtype, beta_dtype;
  const float* rates;    // [heads] e^A
  const float* dt_bias;  // [heads, width] or null
  float bound, largest;
  bool bounded;
  int64_t tokens, heads, width;  // width 1: a gate per head
  int threads;
};

// x / sqrt(mean x^2 + eps) weight over rows, times silu(gate) or sigmoid(gate).
struct GatedNorm {
  const void *x, *gate;  // [rows, width] dense; gate may be null
  DType dtype, gate_dtype;
  const float* weight;  // [width] or null
  int64_t rows, width;
  float eps;
  bool silu;
  int threads;
};

struct DeltaRuleFunctions {
  // o [B, T, HV, V] in the problem's dtype, final [N, HV, K, V]; `final` may be `initial`.
  Status (*forward)(const DeltaRuleProblem&, void* o, float* final, const DeltaRuleStates&);
  // `states` as the forward left them.
  Status (*backward)(const DeltaRuleProblem&, const DeltaRuleStates& states, const DeltaRuleGradients&);
  Status (*activate)(const DeltaRuleGates&, float* g, float* beta);
  Status (*gated_norm)(const GatedNorm&, void* out);  // out [rows, width] in x's dtype
  Status (*forward_wide)(const DeltaRuleWide&, double* o, double* final);  // `final` may be `initial`
  Status (*backward_wide)(const DeltaRuleWide&, const DeltaRuleWideGradients&);
};

}  // namespace pyrepr::cpu
