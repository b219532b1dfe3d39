// The backward of the delta rule for one sequence of one value head; formulas and names are those of delta_rule.h.
// Included by level units only (see simd.h).
#pragma once

#include "cpu/delta_rule_chunk.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// Sum over a row of the elementwise product of x and y, both [C, columns].
inline float row_product(const Panels& x, const Panels& y, int64_t t, int64_t columns) {
  V sum{};
  for (int64_t c = 0; c < columns; c += W) sum += load<float>(x.at(t, c)) * load<float>(y.at(t, c));
  return static_cast<float>(lane_sum<float>(sum));
}

// The same for all C rows.
inline void row_products(const Panels& x, const Panels& y, int64_t columns, float* out) {
  for (int64_t t = 0; t < C; t += W) {
    V each[W];
    for (int64_t i = 0; i < W; i++) {
      V low{}, high{};
      for (int64_t c = 0; c < columns; c += NR) {
        low += load<float>(x.at(t + i, c)) * load<float>(y.at(t + i, c));
        high += load<float>(x.at(t + i, c + W)) * load<float>(y.at(t + i, c + W));
      }
      each[i] = low + high;
    }
    store<float>(out + t, sum_each(each));
  }
}

// sum[c] += over the rows t of x_tc y_tc, for columns [0, columns) of panels [rows, ...].
inline void add_column_products(const Panels& x, const Panels& y, int64_t rows, int64_t columns, double* sum) {
  for (int64_t c = 0; c < columns; c += W) {
    V products{};
    for (int64_t t = 0; t < rows; t++) products += load<float>(x.at(t, c)) * load<float>(y.at(t, c));
    for (int i = 0; i < W; i++) sum[c + i] += static_cast<double>(products[i]);
  }
}

// What `decayed_products` means backwards, for weights w_ts [C, C] given transposed (row s, column t):
//   out_t += sum over s <= t of w_ts x_s e^{g_{s+1} + ... + g_t}, by Horner's rule in the steps.
inline void add_decayed_terms(const Panels& w, const Panels& x, const Panels& step, int64_t columns,
                              const Panels& out) {
  for (int64_t c = 0; c < columns; c += NR)
    for (int64_t t = 0; t < C; t++) {
      V low{}, high{};
      const float *row = x.at(0, c), *decay = step.at(0, c);
      for (int64_t s = 0; s <= t; s++, row += NR, decay += NR) {
        const float weight = *w.at(s, t);
        low = low * load<float>(decay) + weight * load<float>(row);
        high = high * load<float>(decay + W) + weight * load<float>(row + W);
      }
      store<float>(out.at(t, c), load<float>(out.at(t, c)) + low);
      store<float>(out.at(t, c + W), load<float>(out.at(t, c + W)) + high);
    }
}
// For weights wx and wy with row t and column s:
//   out_s += sum over t >= s of (wx_ts x_t + wy_ts y_t) e^{g_{s+1} + ... + g_t}.
inline void add_decayed_terms_of_later(const Panels& wx, const Panels& x, const Panels& wy, const Panels& y,
                                       const Panels& step, int64_t columns, const Panels& out) {
  for (int64_t c = 0; c < columns; c += NR)
    for (int64_t s = 0; s < C; s++) {
      V low{}, high{};
      for (int64_t t = C - 1; t >= s; t--) {
        const float a = *wx.at(t, s), b = *wy.at(t, s);
        low += a * load<float>(x.at(t, c)) + b * load<float>(y.at(t, c));
        high += a * load<float>(x.at(t, c + W)) + b * load<float>(y.at(t, c + W));
        if (t > s) {
          low *= load<float>(step.at(t, c));
          high *= load<float>(step.at(t, c + W));
        }
      }
      store<float>(out.at(s, c), load<float>(out.at(s, c)) + low);
      store<float>(out.at(s, c + W), load<float>(out.at(s, c + W)) + high);
    }
}

class DeltaRuleBackward {
 public:
  // Floats one thread needs: the states, V' and X^T of a segment, the gradient of the state, and one chunk's matrices.
  static int64_t size(const DeltaRuleProblem& p, int64_t segment) {
    const int64_t k = round_up(p.width, NR), v = round_up(p.value_width, NR);
    return segment * (k * v + C * v + C * C) + 2 * k * v + Chunk::size(p) + C * (6 * v + 3 * k) + 4 * C * C + 3 * k;
  }

  DeltaRuleBackward(const DeltaRuleProblem& p, const Sequence& s, const DeltaRuleStates& states,
                    const DeltaRuleGradients& grads, float* memory)
      : p(p),
        s(s),
        states(states),
        grads(grads),
        kp(round_up(p.width, NR)),
        vp(round_up(p.value_width, NR)),
        chunk(p, memory) {
    float* next = memory + Chunk::size(p);
    const auto take = [&next](int64_t rows, int64_t cols) {
      const Panels matrix{next, rows};
      next += rows * cols;
      return matrix;
    };
    segment_states = take(kp, vp * states.segment);
    segment_values = take(C, vp * states.segment);
    segment_inverses = take(C, C * states.segment);
    dstate = take(kp, vp);
    turned_state = take(vp, kp);
    d_o = take(C, vp);
    d_r = take(C, vp);
    d_values = take(C, vp);
    d_o_t = take(vp, C);
    d_r_t = take(vp, C);
    values_t = take(vp, C);
    dq = take(C, kp);
    z = take(C, kp);
    rest = take(C, kp);
    d = take(C, C);
    dt = take(C, C);
    m = take(C, C);
    turned = take(C, C);
    last = reinterpret_cast<double*>(next);
    own_rest = next + 2 * kp;
  }

  void run() {
    float* const given = grads.state + s.state_offset(p);
    load_matrix<StoreF32>(given, p.value_width, p.width, kp, p.value_width, dstate);
    const int64_t slot = s.first_slot(p, states);
    for (int64_t i = ceil_div(s.chunks(), states.segment) - 1; i >= 0; i--) {
      const int64_t first = i * states.segment, last = smaller(first + states.segment, s.chunks());
      recompute((slot + i) * p.value_heads + s.value_head, first, last);
      for (int64_t number = last - 1; number >= first; number--) step(number * C, number - first);
    }
    store_matrix<StoreF32>(dstate, p.width, p.value_width, given, p.value_width);
  }

 private:
  const DeltaRuleProblem& p;
  const Sequence& s;
  const DeltaRuleStates& states;
  const DeltaRuleGradients& grads;
  const int64_t kp, vp;
  Chunk chunk;
  Panels segment_states, segment_values, segment_inverses;  // [K, V], [C, V] V' and [C, C] X^T of every chunk
  Panels dstate, turned_state;                              // dS' [K, V]; S^T, then dS'^T [V, K]
  Panels d_o, d_r, d_values;                                // scale dO, dR, dV' [C, V]
  Panels d_o_t, d_r_t, values_t;                            // transposed [V, C]
  Panels dq, z, rest;                                       // dQ, Z and the bracket of dK [C, K]
  Panels d, dt, m, turned;                                  // D^T, D, M^T; whatever has to be transposed [C, C]
  Requests requests;
  double* last;  // [K] what dG of the last token gets besides its own, under a gate per key
  // No decay stands between a token and itself, nor between the last one and the state after it. What these two give to
  // dQ and dK would enter dG with both signs, and leave its rounding there, which a fast decay makes the largest part.
  // So they are kept apart until dG is known: the diagonal of D, and the last token's row of diag(e^{G_C - G}) V'
  // dS'^T.
  float own[C];
  float* own_rest;  // [K]

  Panels state_of(int64_t i) const { return {segment_states.data + i * kp * vp, kp}; }
  Panels values_of(int64_t i) const { return {segment_values.data + i * C * vp, C}; }
  Panels inverse_of(int64_t i) const { return {segment_inverses.data + i * C * C, C}; }

  // S, V' and X^T of chunks [first, last), from the kept state before `first`, and V' where it was kept.
  void recompute(int64_t kept, int64_t first, int64_t last) {
    const float* const start = states.data + kept * p.width * p.value_width;
    load_matrix<StoreF32>(start, p.value_width, p.width, kp, p.value_width, state_of(0));
    const Panels scratch = d_r, used = d_values;
    for (int64_t i = 0; first + i < last; i++) {
      const int64_t t0 = (first + i) * C;
      chunk.load_k(p, s, t0);
      Requests requests;
      request(requests, p, s, p.k, t0 + C, t0 + 2 * C, s.head, p.width);
      if (p.apart()) request(requests, p, s, p.erase, t0 + C, t0 + 2 * C, s.erase_head(p), p.width);
      const float* const kept_values = s.kept_values(p, states, t0);
      const int64_t stride = p.value_width;
      if (kept_values)
        requests.add(kept_values + C * stride, smaller(C, s.length - t0 - C), stride * 4, stride * 4);
      else
        request(requests, p, s, p.v, t0 + C, t0 + 2 * C, s.value_head, p.value_width);
      request_gates(requests, p, s, t0 + C, t0 + 2 * C);
      requests.spread(vp / NR * (C + p.width) / Panels::MR);
      chunk.solve(p);
      if (p.beta) copy_panels(chunk.xt, C, C, inverse_of(i));
      const int64_t rows = smaller(C, s.length - t0);
      if (kept_values) {
        load_matrix<StoreF32>(kept_values, stride, rows, C, p.value_width, values_of(i));
        if (p.gate == Gate::per_key) multiply_each(chunk.k, chunk.key_gates.tail, C, p.width, chunk.scaled);
      } else {
        chunk.gate(p, false);
        load_values(p, s, t0, rows, scratch);
        new_values(p, chunk, state_of(i), vp, scratch, values_of(i), &requests);
      }
      if (first + i + 1 == last) break;
      copy_panels(values_of(i), C, vp, used);
      copy_panels(state_of(i), kp, vp, state_of(i + 1));
      next_state(p, chunk, used, vp, state_of(i + 1), &requests);
    }
  }

  // The gradients of the chunk at t0, the i-th of its segment; dS' becomes dS.
  void step(int64_t t0, int64_t i) {
    const int64_t rows = smaller(C, s.length - t0);
    const Panels state = state_of(i), values = values_of(i);
    chunk.load_k(p, s, t0);
    chunk.load_q(p, s, t0, 1);
    load_matrix<StoreF32>(grads.o + s.row(p, t0) * p.value_width, p.value_heads * p.value_width, rows, C, p.value_width,
                          d_o);
    for (int64_t at = 0; at < C * vp; at += W) store<float>(d_o.data + at, load<float>(d_o.data + at) * p.scale);

    requests = step_requests(t0, rows);
    value_gradients(inverse_of(i));
    transpose_panels(values, C, vp, values_t);
    transpose_panels(d_o, C, vp, d_o_t);
    transpose_panels(d_r, C, vp, d_r_t);
    pair_gradients();
    key_gradients(state);
    if (p.gate == Gate::per_key) {
      pair_key_gradients(state, rows - 1);
      write(t0, rows, 0);
    } else {
      double end = 0;  // what dG of the last token gets besides its own
      alignas(64) float products[C];
      set_apart(rows - 1);
      row_products(rest, chunk.k, kp, products);
      for (int64_t t = 0; t < rows; t++) end += static_cast<double>(products[t]);
      if (chunk.gates.gated) end += state_product(state);
      multiply_panels<Part::terms_upto, false>(d, C, chunk.k, kp, C, dq);
      multiply_panels<Part::terms_from, false>(dt, C, chunk.q, kp, C, rest);
      if (p.beta) {
        multiply_panels<Part::terms_upto, false>(m, C, chunk.k, kp, C, z);
        multiply_panels<Part::terms_from, false>(turned, C, chunk.e, kp, C, rest);
      }
      write(t0, rows, end);
    }
    state_gradient();
  }

  // The places that `write` will write to, and the tokens of the next step, C back.
  Requests step_requests(int64_t t0, int64_t rows) const {
    constexpr int64_t item = sizeof(float);
    const int64_t key = s.row(p, t0) * p.width, value = s.row(p, t0) * p.value_width;
    const int64_t key_stride = p.value_heads * p.width * item, value_stride = p.value_heads * p.value_width * item;
    Requests all;
    all.add(grads.q + key, rows, key_stride, p.width * item);
    all.add(grads.k + key, rows, key_stride, p.width * item);
    all.add(grads.v + value, rows, value_stride, p.value_width * item);
    if (p.apart()) all.add(grads.erase + key, rows, key_stride, p.width * item);
    if (p.gate == Gate::per_key) all.add(grads.g + key, rows, key_stride, p.width * item);
    if (t0 > 0) {
      const int64_t back = C * p.value_heads * p.value_width;
      request(all, p, s, p.q, t0 - C, t0, s.head, p.width);
      request(all, p, s, p.k, t0 - C, t0, s.head, p.width);
      if (p.apart()) request(all, p, s, p.erase, t0 - C, t0, s.erase_head(p), p.width);
      request(all, p, s, p.v, t0 - C, t0, s.value_head, p.value_width);
      all.add(grads.o + value - back, C, value_stride, p.value_width * item);
      request_gates(all, p, s, t0 - C, t0);
    }
    // Of dV', dQ, Z, their counterpart in dK, and the state's gradient.
    all.spread((4 * C * vp / NR + kp * vp / NR) / Panels::MR);
    return all;
  }

  // dV' and dR.
  void value_gradients(const Panels& inverse) {
    const Gates& gates = chunk.gates;
    if (p.gate == Gate::per_key) chunk.decay_keys(chunk.k, chunk.key_gates.tail, p.width, chunk.kt);
    if (gates.gated) scale_columns(chunk.kt, p.width, gates.tail);
    multiply_panels<Part::all, true>(chunk.kt, C, dstate, vp, p.width, d_values, 1, &requests);
    transpose_panels(chunk.pt, C, C, turned);
    multiply_panels<Part::terms_from, false>(turned, C, d_o, vp, C, d_values);
    if (!p.beta) return copy_panels(d_values, C, vp, d_r);
    transpose_panels(inverse, C, C, turned);
    multiply_panels<Part::terms_from, true>(turned, C, d_values, vp, C, d_r);
  }

  // D^T and M^T (row s, column t), D, and in `turned` diag(beta) M, which is zero without an erase.
  void pair_gradients() {
    multiply_panels<Part::upper, true>(values_t, C, d_o_t, C, p.value_width, d);
    mask_upper(chunk.gamma, d);
    for (int64_t t = 0; t < C; t++) {
      own[t] = *d.at(t, t);
      *d.at(t, t) = 0;
    }
    transpose_panels(d, C, C, dt);
    if (!p.beta) return zero(turned.data, C * C);
    multiply_panels<Part::upper, true>(values_t, C, d_r_t, C, p.value_width, m);
    mask_upper(chunk.erase_gamma, m);
    for (int64_t t = 0; t < C * C; t += W) store<float>(m.data + t, -load<float>(m.data + t));
    for (int64_t t = 0; t < C; t++) *m.at(t, t) = 0;
    transpose_panels(m, C, C, turned);
    scale_rows(turned, C, chunk.gates.beta);
  }

  // `rest` without its last row, which moves to `own_rest`.
  void set_apart(int64_t row) {
    for (int64_t c = 0; c < kp; c += W) {
      store<float>(own_rest + c, load<float>(rest.at(row, c)));
      store<float>(rest.at(row, c), V{});
    }
  }

  // What the states give to dQ, Z, and in `rest` diag(e^{G_C - G}) V' dS'^T.
  void key_gradients(const Panels& state) {
    const Gates& gates = chunk.gates;
    transpose_panels(state, kp, vp, turned_state);
    scale_columns(d_r_t, p.value_width, gates.erase_decay, -1);
    if (gates.gated) {
      scale_columns(d_o_t, p.value_width, gates.decay);
      scale_columns(values_t, p.value_width, gates.tail);
    }
    multiply_panels<Part::all, true>(d_o_t, C, turned_state, kp, p.value_width, dq, 1, &requests);
    if (p.beta)
      multiply_panels<Part::all, true>(d_r_t, C, turned_state, kp, p.value_width, z, 1, &requests);
    else
      zero(z.data, C * kp);
    transpose_panels(dstate, kp, vp, turned_state);
    multiply_panels<Part::all, true>(values_t, C, turned_state, kp, p.value_width, rest, 1, &requests);
  }

  // Under a gate per key: the decays worked into dQ, Z and `rest`, what the pairs of tokens give to them, and `last`.
  void pair_key_gradients(const Panels& state, int64_t last_row) {
    const KeyGates& gates = chunk.key_gates;
    multiply_each(dq, gates.decay, C, kp, dq);
    multiply_each(z, gates.decay, C, kp, z);
    multiply_each(rest, gates.tail, C, kp, rest);
    for (int64_t c = 0; c < kp; c += W) {
      V own[W];
      for (int i = 0; i < W; i++) {
        own[i] = V{};
        for (int64_t j = 0; j < vp; j += W)
          own[i] += load<float>(state.at(c + i, j)) * load<float>(dstate.at(c + i, j));
      }
      const V sums = sum_each(own) * gates.last(c);
      for (int i = 0; i < W; i++) last[c + i] = static_cast<double>(sums[i]);
    }
    set_apart(last_row);
    add_column_products(rest, chunk.k, C, kp, last);
    add_decayed_terms(d, chunk.k, gates.step, kp, dq);
    if (p.beta) add_decayed_terms(m, chunk.k, gates.step, kp, z);
    add_decayed_terms_of_later(dt, chunk.q, turned, chunk.e, gates.step, kp, rest);
  }

  // e^{G_C} <S, dS'>
  double state_product(const Panels& state) const {
    V sum[4] = {};
    for (int64_t at = 0; at < kp * vp; at += 4 * W)
      for (int64_t j = 0; j < 4; j++)
        sum[j] += load<float>(state.data + at + j * W) * load<float>(dstate.data + at + j * W);
    return static_cast<double>(chunk.gates.last) * lane_sum<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // One row of the gradient of q or k, through the normalisation x = raw * inverse.
  void write_key(const Panels& gradient, const Panels& x, float inverse, int64_t t, float* out) const {
    const float along = p.l2norm ? row_product(gradient, x, t, kp) : 0;
    for (int64_t c = 0; c < p.width; c += W) {
      const V row = load<float>(gradient.at(t, c));
      store_some<StoreF32>(out + c, p.width - c, p.l2norm ? (row - load<float>(x.at(t, c)) * along) * inverse : row);
    }
  }

  // dg of token t under a gate per key; `last` holds the sum of dG over the tokens after it.
  void write_key_gates(int64_t t, int64_t row) const {
    const float beta = chunk.gates.beta[t];
    for (int64_t c = 0; c < p.width; c += W) {
      const V k = load<float>(chunk.k.at(t, c));
      const Wide of_q = __builtin_convertvector(load<float>(dq.at(t, c)) * load<float>(chunk.q.at(t, c)), Wide);
      const Wide of_e = __builtin_convertvector(load<float>(z.at(t, c)) * load<float>(chunk.e.at(t, c)) * beta, Wide);
      Wide sum;
      std::memcpy(&sum, last + c, sizeof sum);
      sum += (of_q + of_e) - __builtin_convertvector(load<float>(rest.at(t, c)) * k, Wide);
      std::memcpy(last + c, &sum, sizeof sum);
      store_some<StoreF32>(grads.g + row * p.width + c, p.width - c, __builtin_convertvector(sum, V));
    }
  }

  // Everything of the chunk's tokens goes out; `z` becomes dK, or dP and `rest` dK, d_r becomes dV.
  void write(int64_t t0, int64_t rows, double end) {
    const Gates& gates = chunk.gates;
    const Panels& raw = d_values;
    load_values(p, s, t0, rows, raw);
    alignas(64) float of_values[C], of_z[C], of_q[C], of_rest[C];
    row_products(d_r, raw, vp, of_values);
    row_products(z, chunk.e, kp, of_z);
    row_products(dq, chunk.q, kp, of_q);
    row_products(rest, chunk.k, kp, of_rest);
    double sum = end;
    for (int64_t t = rows - 1; t >= 0; t--) {
      const int64_t row = s.row(p, t0 + t);
      const float beta = gates.beta[t];
      if (p.gate == Gate::per_key) {
        write_key_gates(t, row);
      } else {
        const double of_erase = static_cast<double>(beta) * static_cast<double>(of_z[t]);
        sum += static_cast<double>(of_q[t]) + (p.undecayed ? 0 : of_erase);
        sum -= static_cast<double>(of_rest[t]);
        grads.g[row] = static_cast<float>(sum);
        if (p.undecayed) sum += of_erase;
      }
      if (p.beta) grads.beta[row] = of_values[t] + of_z[t];
      for (int64_t c = 0; c < kp; c += W) {
        const V q = load<float>(chunk.q.at(t, c)), k = load<float>(chunk.k.at(t, c));
        const V of_erase = load<float>(z.at(t, c)) * beta;
        V dk = (p.apart() ? V{} : of_erase) + load<float>(rest.at(t, c)) + q * own[t];
        if (t == rows - 1) dk += load<float>(own_rest + c);
        store<float>((p.apart() ? rest : z).at(t, c), dk);
        if (p.apart()) store<float>(z.at(t, c), of_erase);
        store<float>(dq.at(t, c), load<float>(dq.at(t, c)) + k * own[t]);
      }
      write_key(dq, chunk.q, chunk.q_inverse[t], t, grads.q + row * p.width);
      write_key(p.apart() ? rest : z, chunk.k, chunk.k_inverse[t], t, grads.k + row * p.width);
      if (p.apart()) write_key(z, chunk.e, chunk.e_inverse[t], t, grads.erase + row * p.width);
    }
    if (p.beta) scale_rows(d_r, vp, gates.beta);
    store_matrix<StoreF32>(d_r, rows, p.value_width, grads.v + s.row(p, t0) * p.value_width,
                           p.value_heads * p.value_width);
  }

  // dS, from dR scaled to dV.
  void state_gradient() {
    const Gates& gates = chunk.gates;
    if (gates.gated) {
      scale_rows(d_o, vp, gates.decay);
      scale_rows(d_r, vp, gates.erase_decay);
    }
    for (int64_t at = 0; at < C * vp; at += W) store<float>(d_r.data + at, -load<float>(d_r.data + at));
    if (p.gate != Gate::per_key) {
      multiply_panels<Part::all, false>(chunk.q, kp, d_o, vp, C, dstate, gates.last, &requests);
      if (p.beta) multiply_panels<Part::all, false>(chunk.e, kp, d_r, vp, C, dstate);
      return;
    }
    const KeyGates& per_key = chunk.key_gates;
    per_key.decay_rows(dstate, kp, vp);
    multiply_each(chunk.q, per_key.decay, C, kp, chunk.scaled);
    multiply_panels<Part::all, false>(chunk.scaled, kp, d_o, vp, C, dstate, 1, &requests);
    if (!p.beta) return;
    multiply_each(chunk.e, per_key.decay, C, kp, chunk.scaled);
    multiply_panels<Part::all, false>(chunk.scaled, kp, d_r, vp, C, dstate);
  }
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
