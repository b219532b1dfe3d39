// The delta rule in float64, token by token: few use it for speed, and everybody to check the rest. Included by level
// units only.
//
// Per token and head 4 K V multiply-adds forward, 10 K V backward. A task is one value head of one sequence, and no
// task shares a sum with another, so the bits are the same for any number of threads. With S' the state after its
// decay, e = v - S'^T k and S = S' + beta k e^T, given do and dS:
//
//   dq = S do        dS += q do^T         du = dS^T k      dbeta = <du, e>      dv = beta du
//   dk = beta dS e - S' dv                dS' = dS - k dv^T
//   dg = <dS', S'>, for a gate per key row by row          dS before = e^g dS'
//
// An erase apart reads along p: e = v - S'^T p, dp = - S' dv, dk = beta dS e, dS' = dS - p dv^T. Before the decay it
// reads S_b = S before: e = v - S_b^T p, dp = - S_b dv, dg = <dS, S'>, dS before = e^g dS - p dv^T.
#pragma once

#include "cpu/delta_rule.h"
#include "cpu/gemm.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

class WideRule {
 public:
  static Status forward(const DeltaRuleWide& p, double* o, double* final) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t task = 0; task < p.sequences * p.heads; task++) {
      const WideRule head(p, task);
      double* const state = final + head.state_offset_;
      head.start(state);
      for (int64_t t = head.first_; t < head.last_; t++) {
        double* const out = o + head.row(t) * p.value_width;
        head.advance(t, state, out, nullptr);
        head.read(t, state, out);
      }
    }
    return Status::ok;
  }

  static Status backward(const DeltaRuleWide& p, const DeltaRuleWideGradients& grads) {
    int64_t longest = 0;
    for (int64_t n = 0; n < p.sequences; n++) longest = larger(longest, p.bounds[n + 1] - p.bounds[n]);
    const int64_t segment = segment_of(longest), states = ceil_div(longest, segment) + segment;
    const int64_t bytes = round_up((states * p.width + segment + 1) * p.value_width * 8, 64);
    const Memory memory(bytes * p.threads);
    if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t task = 0; task < p.sequences * p.heads; task++)
      WideRule(p, task).backward_head(grads, segment, memory.as<double>(bytes * omp_get_thread_num()));
    return Status::ok;
  }

 private:
  WideRule(const DeltaRuleWide& p, int64_t task)
      : p_(p),
        head_(task % p.heads),
        first_(p.bounds[task / p.heads]),
        last_(p.bounds[task / p.heads + 1]),
        size_(p.width * p.value_width),
        state_offset_(task * size_) {}

  static int64_t segment_of(int64_t length) {
    int64_t segment = 1;
    while (segment * segment < length) segment++;
    return segment;
  }
  int64_t row(int64_t t) const { return t * p_.heads + head_; }
  const double* key(int64_t t) const { return p_.k + row(t) * p_.width; }
  const double* erase(int64_t t) const { return p_.erase ? p_.erase + row(t) * p_.width : key(t); }
  double beta_of(int64_t t) const { return p_.beta ? p_.beta[row(t)] : 1; }
  double decay_of(int64_t t, int64_t i) const {
    return p_.g ? __builtin_exp(p_.gate == Gate::per_key ? p_.g[row(t) * p_.width + i] : p_.g[row(t)]) : 1;
  }

  static void add(int64_t n, double a, const double* x, double* y) {
    for (int64_t j = 0; j < n; j++) y[j] += a * x[j];
  }
  static double dot(int64_t n, const double* x, const double* y) {
    constexpr int W = Lanes<double>::W;
    Vec<double> sum{};
    int64_t j = 0;
    for (; j + W <= n; j += W) sum += load<double>(x + j) * load<double>(y + j);
    double total = 0;
    for (int w = 0; w < W; w++) total += sum[w];
    for (; j < n; j++) total += x[j] * y[j];
    return total;
  }
  void copy(const double* from, double* to) const {
    if (from != to) std::memcpy(to, from, static_cast<size_t>(size_) * 8);
  }

  void start(double* state) const {
    if (p_.initial)
      copy(p_.initial + state_offset_, state);
    else
      zero(state, size_);
  }
  void decay(int64_t t, double* state) const {
    if (!p_.g) return;
    for (int64_t i = 0; i < p_.width; i++) {
      const double e = decay_of(t, i);
      for (int64_t j = 0; j < p_.value_width; j++) state[i * p_.value_width + j] *= e;
    }
  }
  // The state forward by one token, its error, v alone where nothing is erased, and the state that the erase read.
  void advance(int64_t t, double* state, double* e, double* read) const {
    const int64_t V = p_.value_width;
    if (!p_.undecayed) decay(t, state);
    if (read) copy(state, read);
    std::memcpy(e, p_.v + row(t) * V, static_cast<size_t>(V) * 8);
    for (int64_t i = 0; i < p_.width && p_.beta; i++) add(V, -erase(t)[i], state + i * V, e);
    if (p_.undecayed) decay(t, state);
    for (int64_t i = 0; i < p_.width; i++) add(V, beta_of(t) * key(t)[i], e, state + i * V);
  }
  // out = S^T q
  void read(int64_t t, const double* state, double* out) const {
    zero(out, p_.value_width);
    for (int64_t i = 0; i < p_.width; i++)
      add(p_.value_width, p_.q[row(t) * p_.width + i], state + i * p_.value_width, out);
  }

  // scratch: the states before each segment, the states of a segment that the erase read, its errors, and a vector.
  void backward_head(const DeltaRuleWideGradients& grads, int64_t segment, double* scratch) const {
    const int64_t V = p_.value_width, segments = ceil_div(last_ - first_, segment);
    double *const starts = scratch, *const reads = starts + segments * size_, *const errors = reads + segment * size_,
                  *const dv = errors + segment * V;
    if (first_ == last_) return;
    start(starts);
    for (int64_t s = 1; s < segments; s++) {
      double* const state = starts + s * size_;
      copy(state - size_, state);
      for (int64_t t = first_ + (s - 1) * segment; t < first_ + s * segment; t++) advance(t, state, errors, nullptr);
    }
    for (int64_t s = segments; s-- > 0;) {
      const int64_t begin = first_ + s * segment, end = smaller(begin + segment, last_);
      double* const state = starts + s * size_;
      for (int64_t t = begin; t < end; t++) advance(t, state, errors + (t - begin) * V, reads + (t - begin) * size_);
      for (int64_t t = end; t-- > begin;)
        backward_token(grads, t, reads + (t - begin) * size_, errors + (t - begin) * V, dv);
    }
  }

  // `read`: the state that the erase read, S' or S before.
  void backward_token(const DeltaRuleWideGradients& grads, int64_t t, const double* read, const double* e,
                      double* dv) const {
    const int64_t V = p_.value_width, K = p_.width, at = row(t);
    const double *const q = p_.q + at * K, *const k = key(t), *const grad = grads.o + at * V;
    double *const dq = grads.q + at * K, *const dk = grads.k + at * K, *const ds = grads.state + state_offset_;
    const double beta = beta_of(t);
    const double along = dot(V, e, grad);  // S do = S' do + beta k <e, do>
    zero(dv, V);
    for (int64_t i = 0; i < K; i++) {
      dq[i] = (p_.undecayed ? decay_of(t, i) : 1) * dot(V, read + i * V, grad) + beta * k[i] * along;
      add(V, q[i], grad, ds + i * V);
      add(V, k[i], ds + i * V, dv);  // du
    }
    if (p_.beta) grads.beta[at] = dot(V, dv, e);
    for (int64_t j = 0; j < V; j++) grads.v[at * V + j] = dv[j] *= beta;
    double of_gate = 0;
    for (int64_t i = 0; i < K; i++) {
      double* const own = ds + i * V;
      const double* const from = read + i * V;
      const double decayed = decay_of(t, i);
      dk[i] = beta * dot(V, own, e);
      if (p_.beta) {
        const double of_erase = -dot(V, from, dv);
        if (p_.erase)
          grads.erase[at * K + i] = of_erase;
        else
          dk[i] += of_erase;
        if (!p_.undecayed) add(V, -erase(t)[i], dv, own);
      }
      if (p_.g) {
        const double here = dot(V, own, from) * (p_.undecayed ? decayed : 1);
        if (p_.gate == Gate::per_key)
          grads.g[at * K + i] = here;
        else
          of_gate += here;
        for (int64_t j = 0; j < V; j++) own[j] *= decayed;
      }
      if (p_.undecayed) add(V, -erase(t)[i], dv, own);
    }
    if (p_.gate == Gate::per_head) grads.g[at] = of_gate;
  }

  const DeltaRuleWide& p_;
  const int64_t head_, first_, last_, size_, state_offset_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
