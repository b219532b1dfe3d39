// Family `delta_rule` on the CPU: what csrc/bindings/delta_rule.cpp calls and delta_rule.cpp defines once per
// instruction set.
//
//   S <- e^{g_t} S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = scale S^T q_t          S [K, V]
//
// The forward does just that: see delta_rule_recurrence.h. The backward goes by chunks of kChunk tokens: with S the
// state before the chunk, q already scaled, G = cumsum(g) inside the chunk and Gamma_ts = e^{G_t - G_s} for t >= s:
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
// because every e^{G_t} stands beside a Q_t or a beta_t K_t, and every e^{-G_s} beside a K_s. What no decay stands in,
// the diagonal of D and the last row of diag(e^{G_C - G}) V' dS'^T, is left out of dG, where it would enter with both
// signs.
//
// Without the erase A = 0, V' = V and Z = 0, and beta is 1 where it stands beside a value.
//
// An erase that reads along a vector p_t of its own, S <- S + beta_t k_t (v_t - S^T p_t)^T, has P instead of K where K
// stands beside a beta: in A's rows, R, dS, dbeta, dG, and M^T diag(beta) P in dK; then diag(beta) Z is dP and no part
// of dK. If it reads the state before its decay, these places have G_{t-1} for G_t, and beta Z o P belongs to dG_{t-1}.
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
  Tokens erase{};        // [B, T, H, K], or HV heads with `erase_per_value`: what the erase reads along; no data: k
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
  bool erase_per_value = false;
  bool undecayed = false;  // the erase reads the state before its decay; no gate per key

  bool apart() const { return erase.data; }
};

// What the forward keeps for the backward. Of every row of the batch, which has `row` slots of the size of a state: the
// states before chunks 0, segment, 2 segment, ... of its sequences, one sequence after the other, and from slot
// `values` on V' of its tokens, [HV, T, V].
struct DeltaRuleStates {
  float* data;  // [slots, HV, K, V]; null: none are kept
  int64_t slots;
  int64_t segment;
  int64_t row;
  int64_t values;  // -1: V' is not kept
};

struct DeltaRuleGradients {
  const float* o;  // [B, T, HV, V] given
  float* q;        // [B, T, HV, K]
  float* k;        // [B, T, HV, K]
  float* v;        // [B, T, HV, V]
  float* g;        // [B, T, HV], with a gate per key [B, T, HV, K]
  float* beta;     // [B, T, HV]; not looked at without beta
  float* state;    // [N, HV, K, V] the gradient of the final state, replaced by that of the initial state
  float* erase;    // [B, T, HV, K]; null without
};

// The same in float64: everything dense, q scaled, q and k given for every value head.
struct DeltaRuleWide {
  const double *q, *k;                // [B, T, HV, K]
  const double* v;                    // [B, T, HV, V]
  const double* g;                    // [B, T, HV], [B, T, HV, K] per key; null: no decay
  const double* beta;                 // [B, T, HV]; null: nothing is erased
  const double* initial;              // [N, HV, K, V]; null: zero
  int64_t heads, width, value_width;  // HV, K, V
  const int64_t* bounds;              // [N + 1] where sequences start and end, counting tokens through the batch
  int64_t sequences;                  // N
  Gate gate;
  int threads;
  const double* erase;  // [B, T, HV, K] what the erase reads along; null: k
  bool undecayed;       // the erase reads the state before its decay
};

struct DeltaRuleWideGradients {
  const double* o;  // [B, T, HV, V] given
  double *q, *k;    // [B, T, HV, K]
  double* v;        // [B, T, HV, V]
  double* g;        // like g
  double* beta;     // [B, T, HV]
  double* state;    // [N, HV, K, V] the gradient of the final state, replaced by that of the initial state
  double* erase;    // [B, T, HV, K]; null without
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

// The channels of q, k or v in a layer that decodes: what the projection gives, filter, and the tokens before.
struct DecodedChannels {
  const void* x;       // [B, channels], x_row elements from one row to the next
  const void* weight;  // [channels, taps]
  const void* bias;    // [channels] or null
  const void* from;    // [rows, channels, kept], from_row elements from one row to the next
  void* to;            // [rows, channels, kept] the same with x; may be `from`
  int64_t x_row, from_row, to_row;
};

// All that a layer of the gated rule computes for one token between its projections:
//
//   q, k, v = silu(convolutions of what the projections give), q and k normalised;   g, beta as in DeltaRuleGates;
//   one token of the rule;   GatedNorm of what it gives
struct DeltaRuleDecode {
  DecodedChannels q, k;  // channels H K
  DecodedChannels v;     // channels HV V
  int64_t taps, kept;    // kept >= taps - 1
  DType dtype, filter;   // of x, states of convolutions and out; of weights and biases: f32, or the same
  DeltaRuleGates gates;  // both given, of B tokens, HV heads and width 1
  GatedNorm norm;        // x is left out
  const float* initial;  // [rows, HV, K, V]
  float* final;          // [rows, HV, K, V]; may be `initial`
  const int64_t* rows;   // [B] which row of the states is whose, -1: none, and 0 as output; null: each its own
  int64_t batch, heads, width, value_heads, value_width;
  float scale;
  int threads;

  int64_t shared() const { return value_heads / heads; }  // value heads of a query and key head
};

struct DeltaRuleFunctions {
  // o [B, T, HV, V] in the problem's dtype, final [N, HV, K, V]; `final` may be `initial`.
  Status (*forward)(const DeltaRuleProblem&, void* o, float* final, const DeltaRuleStates&);
  // `states` as the forward left them.
  Status (*backward)(const DeltaRuleProblem&, const DeltaRuleStates& states, const DeltaRuleGradients&);
  Status (*activate)(const DeltaRuleGates&, float* g, float* beta);
  Status (*gated_norm)(const GatedNorm&, void* out);                       // out [rows, width] in x's dtype
  Status (*decode)(const DeltaRuleDecode&, void* out);                     // out [B, HV, V] in x's dtype
  Status (*forward_wide)(const DeltaRuleWide&, double* o, double* final);  // `final` may be `initial`
  Status (*backward_wide)(const DeltaRuleWide&, const DeltaRuleWideGradients&);
};

}  // namespace pyrepr::cpu
