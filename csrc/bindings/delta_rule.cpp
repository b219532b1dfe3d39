// Bindings of family `delta_rule`.
#include <array>
#include <cmath>
#include <cstring>

#include "bindings/common.h"
#include "bindings/delta_rule_decode.h"
#include "bindings/tensor.h"
#ifdef PYREPR_CUDA
#include "cuda/delta_rule.h"
#endif

namespace pyrepr {
namespace {

Gate gate_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("gate code " + std::to_string(code) + " is unknown");
  return static_cast<Gate>(code);
}

// What both ways to a problem say alike. sizes: B, T, H, K, HV, V.
void set_sizes(cpu::DeltaRuleProblem& p, const std::array<int64_t, 6>& sizes, DType dtype, Gate gate, double scale,
               bool l2norm, int threads) {
  p.batch = p.sequences = sizes[0];
  p.total = sizes[1];
  p.heads = sizes[2];
  p.width = sizes[3];
  p.value_heads = sizes[4];
  p.value_width = sizes[5];
  p.bounds = nullptr;
  p.dtype = dtype;
  p.gate = gate;
  p.l2norm = l2norm;
  p.scale = static_cast<float>(scale);
  p.threads = threads;
}

// What every function of the family takes, with its lifetime.
struct DeltaRuleArguments {
  std::vector<int64_t> bounds;
  cpu::DeltaRuleProblem problem;

  // addresses: q, k, v, g, beta, initial state, and what the erase reads along or 0; sizes: B, T, H, K, HV, V; strides:
  // all of q, k, v and the latter. Beside that: its heads, and whether it reads the state before its decay.
  DeltaRuleArguments(const std::array<uintptr_t, 7>& addresses, const std::array<int64_t, 6>& sizes,
                     const std::array<int64_t, 16>& strides, int64_t erase_heads, bool undecayed, int dtype, int gate,
                     std::vector<int64_t> bounds_, double scale, bool l2norm, int threads)
      : bounds(std::move(bounds_)) {
    for (int64_t size : sizes)
      if (size < 0) throw std::invalid_argument("a size is negative");
    const int64_t batch = sizes[0], total = sizes[1], heads = sizes[2], value_heads = sizes[4];
    if (heads < 1 || value_heads % heads) throw std::invalid_argument("HV must be a multiple of H");
    if (dtype_of(dtype) == DType::f64) throw std::invalid_argument("float64 is for DeltaRuleWide");
    if (threads < 1) throw std::invalid_argument("threads must be positive");
    if (!bounds.empty()) {
      if (batch != 1 || bounds.front() != 0 || bounds.back() != total)
        throw std::invalid_argument("cu_seqlens must go from 0 to T with B = 1");
      for (size_t i = 1; i < bounds.size(); i++)
        if (bounds[i] < bounds[i - 1]) throw std::invalid_argument("cu_seqlens must not decrease");
    }
    const bool no_keys = batch * total * sizes[3] == 0, no_values = batch * total * value_heads * sizes[5] == 0;
    const bool no_gates = batch * total * value_heads == 0;
    const auto tokens = [&](size_t i, const char* name, bool empty) {
      return cpu::Tokens{pointer<const void>(addresses[i], name, empty), strides[4 * i], strides[4 * i + 1],
                         strides[4 * i + 2]};
    };
    problem.q = tokens(0, "q", no_keys);
    problem.k = tokens(1, "k", no_keys);
    problem.v = tokens(2, "v", no_values);
    problem.erase = cpu::Tokens{pointer<const void>(addresses[6], "the erase's vector", true), strides[12], strides[13],
                                strides[14]};
    problem.erase_per_value = erase_heads == value_heads;
    problem.undecayed = undecayed;
    if (problem.apart() && erase_heads != heads && erase_heads != value_heads)
      throw std::invalid_argument("the erase's vectors must be of H or HV heads");
    problem.beta = pointer<const float>(addresses[4], "beta", !problem.apart());
    problem.initial = pointer<const float>(addresses[5], "initial_state", true);
    set_sizes(problem, sizes, dtype_of(dtype), gate_of(gate), scale, l2norm, threads);
    if (undecayed && ((!problem.apart() && !no_keys) || problem.gate != Gate::per_head))
      throw std::invalid_argument("an erase before the decay has a vector of its own and a gate per head");
    problem.g = pointer<const float>(addresses[3], "g", no_gates || problem.gate == Gate::none);
    if (bounds.empty()) return;
    problem.bounds = bounds.data();
    problem.sequences = static_cast<int64_t>(bounds.size()) - 1;
  }

  bool no_tokens() const { return problem.batch * problem.total * problem.value_heads * problem.value_width == 0; }
  bool no_states() const { return problem.sequences * problem.value_heads * problem.width * problem.value_width == 0; }

  // How many states the forward keeps, as delta_rule.h lays them out.
  int64_t states_needed(int64_t segment) const {
    int64_t needed = 0;
    for (int64_t i = 0; i < problem.sequences; i++) {
      const int64_t length = bounds.empty() ? problem.total : bounds[i + 1] - bounds[i];
      const int64_t chunks = (length + cpu::kDeltaChunk - 1) / cpu::kDeltaChunk;
      needed += (chunks + segment - 1) / segment;
    }
    return needed;
  }

  // `values`: the slot of a row of the batch at which V' starts, or -1.
  cpu::DeltaRuleStates states(uintptr_t data, int64_t slots, int64_t segment, int64_t values) const {
    if (segment < 1) throw std::invalid_argument("segment must be positive");
    const int64_t rows = problem.batch ? problem.batch : 1, row = slots / rows, needed = states_needed(segment);
    const bool packed = !bounds.empty();
    if (slots && slots < needed) throw std::invalid_argument("too few slots for the states to keep");
    if (slots && !packed && slots % rows) throw std::invalid_argument("every row of the batch must have as many slots");
    if (values >= 0 && (values < needed / rows || (row - values) * problem.width < problem.total))
      throw std::invalid_argument("too few slots for the values to keep");
    return {slots ? pointer<float>(data, "checkpoints", no_states()) : nullptr, slots, segment, row, values};
  }
};

void delta_rule_forward(DeltaRuleArguments& a, uintptr_t o, uintptr_t final, uintptr_t kept, int64_t slots,
                        int64_t segment, int64_t values) {
  const cpu::DeltaRuleStates states = a.states(kept, slots, segment, values);
  void* const out = pointer<void>(o, "o", a.no_tokens());
  float* const state = pointer<float>(final, "final_state", a.no_states());
  py::gil_scoped_release release;
  check(current_level().delta_rule().forward(a.problem, out, state, states));
}

void delta_rule_backward(DeltaRuleArguments& a, uintptr_t kept, int64_t slots, int64_t segment, int64_t values,
                         const std::array<uintptr_t, 8>& grads) {
  const cpu::DeltaRuleStates states = a.states(kept, slots, segment, values);
  if (!slots && a.states_needed(segment)) throw std::invalid_argument("the forward kept no states");
  const bool no_values = a.no_tokens(), no_gates = a.problem.batch * a.problem.total * a.problem.value_heads == 0;
  const bool no_keys = no_gates || a.problem.width == 0;
  const cpu::DeltaRuleGradients out{
      pointer<const float>(grads[0], "grad_o", no_values),
      pointer<float>(grads[1], "dq", no_keys),
      pointer<float>(grads[2], "dk", no_keys),
      pointer<float>(grads[3], "dv", no_values),
      pointer<float>(grads[4], "dg", a.problem.gate == Gate::per_key ? no_keys : no_gates),
      pointer<float>(grads[5], "dbeta", no_gates || !a.problem.beta),
      pointer<float>(grads[6], "dstate", a.no_states()),
      pointer<float>(grads[7], "derase", no_keys || !a.problem.apart())};
  py::gil_scoped_release release;
  check(current_level().delta_rule().backward(a.problem, states, out));
}

// The float64 rule: addresses of q, k, v, g, beta, the initial state and what the erase reads along, of o and the final
// state for the forward, and of the eight gradients in the order of the struct for the backward; sizes: HV, K, V.
struct DeltaRuleWideArguments {
  std::vector<int64_t> bounds;
  cpu::DeltaRuleWide problem;

  DeltaRuleWideArguments(const std::array<uintptr_t, 7>& addresses, const std::array<int64_t, 3>& sizes,
                         std::vector<int64_t> bounds_, int gate, bool undecayed, int threads)
      : bounds(std::move(bounds_)) {
    for (int64_t size : sizes)
      if (size < 0) throw std::invalid_argument("a size is negative");
    if (bounds.empty() || bounds.front() != 0) throw std::invalid_argument("the sequences must start at 0");
    for (size_t i = 1; i < bounds.size(); i++)
      if (bounds[i] < bounds[i - 1]) throw std::invalid_argument("the sequences must not decrease");
    if (threads < 1) throw std::invalid_argument("threads must be positive");
    const int64_t gates = bounds.back() * sizes[0];
    const auto data = [&](size_t i, const char* name, bool may_be_null) {
      return pointer<const double>(addresses[i], name, may_be_null);
    };
    problem = {data(0, "q", gates * sizes[1] == 0),
               data(1, "k", gates * sizes[1] == 0),
               data(2, "v", gates * sizes[2] == 0),
               data(3, "g", gates == 0 || gate_of(gate) == Gate::none),
               data(4, "beta", true),
               data(5, "initial_state", true),
               sizes[0],
               sizes[1],
               sizes[2],
               bounds.data(),
               static_cast<int64_t>(bounds.size()) - 1,
               gate_of(gate),
               threads,
               data(6, "the erase's vector", true),
               undecayed};
    if (problem.erase && gates > 0 && !problem.beta) throw std::invalid_argument("an erase takes beta");
    if (undecayed && !problem.erase && gates * sizes[1] > 0)
      throw std::invalid_argument("an erase before the decay has a vector of its own");
  }
  bool empty() const { return problem.heads * problem.width * problem.value_width * problem.sequences == 0; }

  void forward(uintptr_t o, uintptr_t final) {
    double* const out = pointer<double>(o, "o", empty() || bounds.back() == 0);
    double* const state = pointer<double>(final, "final_state", empty());
    py::gil_scoped_release release;
    if (!empty()) check(current_level().delta_rule().forward_wide(problem, out, state));
  }
  void backward(const std::array<uintptr_t, 8>& grads) {
    const auto data = [&](size_t i) { return reinterpret_cast<double*>(grads[i]); };
    const cpu::DeltaRuleWideGradients out{data(0), data(1), data(2), data(3), data(4), data(5), data(6), data(7)};
    if (!empty() && bounds.back() > 0)
      for (size_t i = 0; i < grads.size(); i++)
        if (!grads[i] && (i != 4 || problem.g) && (i != 5 || problem.beta) && (i != 7 || problem.erase))
          throw std::invalid_argument("a gradient has no memory");
    py::gil_scoped_release release;
    if (!empty()) check(current_level().delta_rule().backward_wide(problem, out));
  }
};

// How gates and step sizes come about that are given before their activation: None, or (A_log, dt_bias, bound,
// use_gate, use_sigmoid, allow_neg_eigval), of which the first three may be None.
struct Activations {
  Tensor A_log{}, dt_bias{};
  std::vector<float> rates, wide_bias, g, beta;
  bool gate = false, sigmoid = false, twice = false, bounded = false;
  double bound = 0;

  bool read(py::handle given, Reader& reader) {
    if (given.is_none()) return true;
    const auto parts = py::reinterpret_borrow<py::tuple>(given);
    bounded = !parts[2].is_none();
    if (bounded) bound = parts[2].cast<double>();
    gate = parts[3].cast<bool>();
    sigmoid = parts[4].cast<bool>();
    twice = parts[5].cast<bool>();
    return (parts[0].is_none() || reader.read(parts[0], A_log)) &&
           (parts[1].is_none() || reader.read(parts[1], dt_bias));
  }

  // g and beta replaced by what they are after their activation; false where they are not as the kernel takes them.
  bool run(Tensor& raw_g, Tensor& raw_beta, int64_t heads, int64_t width, int threads) {
    if (!gate && !sigmoid) return true;
    const int64_t tokens = raw_beta.shape[0] * raw_beta.shape[1];
    cpu::DeltaRuleGates p{};
    p.bounded = bounded;
    p.bound = static_cast<float>(bound);
    p.largest = twice ? 2 : 1;
    p.tokens = tokens;
    p.heads = heads;
    p.width = width;
    p.threads = threads;
    if (gate) {
      if (!is_narrow(raw_g) || !raw_g.dense()) return false;
      rates.assign(static_cast<size_t>(heads), 1);
      if (A_log.data) {
        std::vector<float> wide;
        const float* const logs = A_log.elements() == heads ? widened(A_log, wide) : nullptr;
        if (!logs) return false;
        for (size_t h = 0; h < rates.size(); h++) rates[h] = std::exp(logs[h]);
      } else if (!bounded) {
        return false;
      }
      if (dt_bias.data && !(dt_bias.elements() == heads * width && (p.dt_bias = widened(dt_bias, wide_bias))))
        return false;
      g.resize(static_cast<size_t>(tokens * heads * width));
      p.g = raw_g.data;
      p.g_dtype = static_cast<DType>(raw_g.code());
      p.rates = rates.data();
    }
    if (sigmoid) {
      if (!is_narrow(raw_beta) || !raw_beta.dense()) return false;
      beta.resize(static_cast<size_t>(tokens * heads));
      p.beta = raw_beta.data;
      p.beta_dtype = static_cast<DType>(raw_beta.code());
    }
    py::gil_scoped_release release;
    check(current_level().delta_rule().activate(p, g.data(), beta.data()));
    return true;
  }
};

// The tensors of a step, read and found to be as the kernel takes them.
struct DeltaRuleStep {
  Tensor q, k, v, g{}, beta{}, initial, final;
  bool has_gate, has_beta, has_initial, has_final;
  const float *decay = nullptr, *step_sizes = nullptr;
  std::vector<float> wide_beta;
  Activations activations;
  Gate gate = Gate::none;
  cpu::DeltaRuleProblem problem;

  bool read(py::handle q_, py::handle k_, py::handle v_, py::handle g_, py::handle beta_, py::handle initial_,
            py::handle final_, py::handle activations_, bool grad) {
    Reader reader(grad);
    has_gate = !g_.is_none();
    has_beta = !beta_.is_none();
    has_initial = !initial_.is_none();
    has_final = !final_.is_none();
    return reader.read(q_, q) && reader.read(k_, k) && reader.read(v_, v) && (!has_beta || reader.read(beta_, beta)) &&
           (!has_gate || reader.read(g_, g)) && (!has_initial || reader.read(initial_, initial)) &&
           (!has_final || reader.read(final_, final)) && activations.read(activations_, reader);
  }

  bool fits(Gate wanted, int threads) {
    if (q.dims != 4 || v.dims != 4) return false;
    const int64_t B = q.shape[0], T = q.shape[1], H = q.shape[2], K = q.shape[3], HV = v.shape[2], V = v.shape[3];
    const int code = v.code();
    if (H < 1 || HV % H || K < 1 || V < 1 || q.code() != code || k.code() != code) return false;
    if (!is_narrow(v)) return false;
    if (!k.has_shape({B, T, H, K}) || v.shape[0] != B || v.shape[1] != T) return false;
    if (has_beta && !beta.has_shape({B, T, HV})) return false;
    if (!q.rows_dense() || !k.rows_dense() || !v.rows_dense() || has_gate != (wanted != Gate::none)) return false;
    if (has_gate && !(wanted == Gate::per_head ? g.has_shape({B, T, HV}) : g.has_shape({B, T, HV, K}))) return false;
    for (const Tensor* state : {has_initial ? &initial : nullptr, has_final ? &final : nullptr})
      if (state && !(state->has_shape({B, HV, K, V}) && state->is(DType::f32) && state->dense())) return false;
    if (has_final && !is_apart(final, {&q, &k, &v, &g, &beta})) return false;
    if (has_initial && has_final && initial.data != final.data && !is_apart(final, {&initial})) return false;
    gate = wanted;
    if (!has_beta && (activations.gate || activations.sigmoid)) return false;
    if (B * T * HV == 0 || !activations.run(g, beta, HV, wanted == Gate::per_key ? K : 1, threads)) return false;
    if (has_gate && !activations.gate && !(g.is(DType::f32) && g.dense())) return false;
    decay = activations.gate ? activations.g.data() : static_cast<const float*>(g.data);
    if (!has_beta) return true;
    step_sizes =
        activations.sigmoid ? activations.beta.data() : widened(beta, wide_beta);  // of bf16 models it is in bf16
    return step_sizes;
  }

  // Everything as the kernel takes it, but for the states.
  void prepare(double scale, bool l2norm, int threads) {
    const auto tokens = [](const Tensor& x) { return cpu::Tokens{x.data, x.stride(0), x.stride(1), x.stride(2)}; };
    problem.q = tokens(q);
    problem.k = tokens(k);
    problem.v = tokens(v);
    problem.g = has_gate ? decay : nullptr;
    problem.beta = step_sizes;
    set_sizes(problem, {q.shape[0], q.shape[1], q.shape[2], q.shape[3], v.shape[2], v.shape[3]},
              static_cast<DType>(v.code()), gate, scale, l2norm, threads);
  }

  // All tokens.
  void run(void* o, float* state) {
    problem.initial = has_initial ? static_cast<const float*>(initial.data) : nullptr;
    py::gil_scoped_release release;
    check(current_level().delta_rule().forward(problem, o, state, {nullptr, 0, 1, 0, -1}));
  }

  // All tokens, with the states after the last `count` of them: [count, B, HV, K, V].
  void run(void* o, float* states, int64_t count) {
    py::gil_scoped_release release;
    const int64_t size = problem.value_heads * problem.width * problem.value_width;
    for (int64_t b = 0; b < problem.batch; b++) {
      const float* before = has_initial ? static_cast<const float*>(initial.data) + b * size : nullptr;
      if (problem.total > count) before = run(b, 0, problem.total - count, before, o, states + b * size);
      for (int64_t j = 0; j < count; j++)
        before = run(b, problem.total - count + j, 1, before, o, states + (j * problem.batch + b) * size);
    }
  }

 private:
  // Some tokens of a row from a state to the next; returns that.
  const float* run(int64_t b, int64_t first, int64_t tokens, const float* before, void* o, float* after) const {
    cpu::DeltaRuleProblem part = problem;
    const int64_t item = problem.dtype == DType::f32 ? 4 : 2, at = (b * problem.total + first) * problem.value_heads;
    for (cpu::Tokens* x : {&part.q, &part.k, &part.v})
      x->data = static_cast<const char*>(x->data) + (b * x->batch + first * x->token) * item;
    part.g = problem.g ? problem.g + at * (gate == Gate::per_key ? problem.width : 1) : nullptr;
    part.beta = problem.beta ? problem.beta + at : nullptr;
    part.initial = before;
    part.batch = part.sequences = 1;
    part.total = tokens;
    void* const out = static_cast<char*>(o) + at * problem.value_width * item;
    check(current_level().delta_rule().forward(part, out, after, {nullptr, 0, 1, 0, -1}));
    return after;
  }
};

// The factor on q; false where it is no number.
bool scale_of(py::handle scale, int64_t width, double& factor) {
  if (!scale.is_none() && !PyFloat_Check(scale.ptr())) return false;
  factor = scale.is_none() ? 1 / std::sqrt(static_cast<double>(width)) : PyFloat_AS_DOUBLE(scale.ptr());
  return true;
}

// (o, final state), the latter in `final` if that is given; or None, and nothing written: see tensor.h.
py::object delta_rule_step(py::handle q, py::handle k, py::handle v, py::handle g, py::handle beta, py::handle scale,
                           py::handle initial, py::handle final, py::handle activations, bool l2norm, int gate,
                           bool grad, int threads) {
  DeltaRuleStep step;
  double factor = 1;
  if (!step.read(q, k, v, g, beta, initial, final, activations, grad) || !step.fits(gate_of(gate), threads) ||
      !scale_of(scale, step.q.shape[3], factor))
    return py::none();
  Tensor to;
  const py::object o = new_empty(v, step.v.shape, 4);
  const int64_t sizes[] = {step.q.shape[0], step.v.shape[2], step.q.shape[3], step.v.shape[3]};
  const py::object state = final.is_none() ? new_empty(v, sizes, 4, true) : py::reinterpret_borrow<py::object>(final);
  if (!Reader(false).read(o, to) || !(step.has_final || Reader(false).read(state, step.final))) return py::none();
  if (step.has_final) tell_written(final);
  step.prepare(factor, l2norm, threads);
  step.run(to.data, static_cast<float*>(step.final.data));
  return py::make_tuple(o, state);
}

constexpr int64_t kMostStates = int64_t(1) << 31;  // bytes; `STATES_LIMIT` in pyrepr/functional/_delta_rule_states.py

// (o, the states after the last `count` tokens, or with −1 after every one: [count, B, HV, K, V]); or None.
py::object delta_rule_states(py::handle q, py::handle k, py::handle v, py::handle g, py::handle beta, py::handle scale,
                             py::handle initial, int64_t count, py::handle activations, bool l2norm, int gate,
                             bool grad, int threads) {
  DeltaRuleStep step;
  double factor = 1;
  if (!step.read(q, k, v, g, beta, initial, py::none(), activations, grad) || !step.fits(gate_of(gate), threads) ||
      !scale_of(scale, step.q.shape[3], factor))
    return py::none();
  if (count < 0) count = step.q.shape[1];
  const int64_t sizes[] = {count, step.q.shape[0], step.v.shape[2], step.q.shape[3], step.v.shape[3]};
  if (count < 1 || count > step.q.shape[1]) return py::none();
  double bytes = 4;
  for (int64_t size : sizes) bytes *= static_cast<double>(size);
  if (bytes > static_cast<double>(kMostStates)) return py::none();
  Tensor to, states_to;
  const py::object o = new_empty(v, step.v.shape, 4), states = new_empty(v, sizes, 5, true);
  if (!Reader(false).read(o, to) || !Reader(false).read(states, states_to)) return py::none();
  step.prepare(factor, l2norm, threads);
  step.run(to.data, static_cast<float*>(states_to.data), count);
  return py::make_tuple(o, states);
}

// x / sqrt(mean x^2 + eps) weight, times the activation of a gate like x; or None: see tensor.h.
py::object rms_norm_gated(py::handle x_, py::handle gate_, py::handle weight_, double eps, bool silu, bool grad,
                          int threads) {
  Reader reader(grad);
  Tensor x, gate{}, weight{}, to;
  if (!reader.read(x_, x) || !(gate_.is_none() || reader.read(gate_, gate)) ||
      !(weight_.is_none() || reader.read(weight_, weight)))
    return py::none();
  if (!is_narrow(x) || !x.dense() || x.dims < 1 || x.dims > kMostDims || x.elements() == 0) return py::none();
  const int64_t width = x.shape[x.dims - 1];
  std::vector<float> wide;
  cpu::GatedNorm p{};
  if (!gate_.is_none()) {
    if (!is_narrow(gate) || !gate.dense() || gate.dims != x.dims) return py::none();
    for (int32_t i = 0; i < x.dims; i++)
      if (gate.shape[i] != x.shape[i]) return py::none();
    p.gate = gate.data;
    p.gate_dtype = static_cast<DType>(gate.code());
  }
  if (!weight_.is_none() && !(weight.has_shape({width}) && (p.weight = widened(weight, wide)))) return py::none();
  const py::object out = new_empty(x_, x.shape, x.dims);
  if (!Reader(false).read(out, to)) return py::none();
  p.x = x.data;
  p.dtype = static_cast<DType>(x.code());
  p.rows = x.elements() / width;
  p.width = width;
  p.eps = static_cast<float>(eps);
  p.silu = silu;
  p.threads = threads;
  py::gil_scoped_release release;
  check(current_level().delta_rule().gated_norm(p, to.data));
  return out;
}

#ifdef PYREPR_CUDA
// addresses: q, k, v, g, beta, initial state, final state, o, cu_seqlens; strides and sizes as DeltaRule takes them.
void cuda_delta_rule_step(const std::array<uintptr_t, 9>& addresses, const std::array<int64_t, 9>& strides,
                          const std::array<int64_t, 6>& sizes, int64_t sequences, int dtype, int gate, double scale,
                          bool l2norm, uintptr_t stream) {
  for (int64_t size : sizes)
    if (size < 0) throw std::invalid_argument("a size is negative");
  const int64_t batch = sizes[0], total = sizes[1], heads = sizes[2], width = sizes[3], value_heads = sizes[4];
  if (heads < 1 || value_heads % heads) throw std::invalid_argument("HV must be a multiple of H");
  if (sequences < 0 || (addresses[8] ? batch != 1 : sequences != batch))
    throw std::invalid_argument("there must be one sequence per row of the batch, or B = 1 and cu_seqlens");
  const bool no_gates = batch * total * value_heads == 0, no_values = no_gates || sizes[5] == 0;
  const bool no_states = sequences * value_heads * width * sizes[5] == 0;
  const auto tokens = [&](size_t i, const char* name, bool empty) {
    return cuda::Tokens{pointer<const void>(addresses[i], name, empty), strides[3 * i], strides[3 * i + 1],
                        strides[3 * i + 2]};
  };
  cuda::DeltaRuleStep p;
  p.q = tokens(0, "q", no_gates);
  p.k = tokens(1, "k", no_gates);
  p.v = tokens(2, "v", no_values);
  p.g = pointer<const float>(addresses[3], "g", true);
  p.beta = pointer<const float>(addresses[4], "beta", no_gates);
  p.initial = pointer<const float>(addresses[5], "initial_state", true);
  p.final = pointer<float>(addresses[6], "final_state", no_states);
  p.o = pointer<void>(addresses[7], "o", no_values);
  p.bounds = pointer<const int64_t>(addresses[8], "cu_seqlens", true);
  p.total = total;
  p.heads = heads;
  p.width = width;
  p.value_heads = value_heads;
  p.value_width = sizes[5];
  p.sequences = sequences;
  p.dtype = dtype_of(dtype);
  p.gate = gate_of(gate);
  p.l2norm = l2norm;
  p.scale = static_cast<float>(scale);
  py::gil_scoped_release release;
  const char* const error = cuda::delta_rule_step(p, reinterpret_cast<void*>(stream));
  if (error) throw std::runtime_error(std::string("delta_rule_step (CUDA): ") + error);
}
#endif

}  // namespace

void bind_delta_rule(py::module_& m) {
  py::class_<DeltaRuleArguments>(m, "DeltaRule")
      .def(py::init<const std::array<uintptr_t, 7>&, const std::array<int64_t, 6>&, const std::array<int64_t, 16>&,
                    int64_t, bool, int, int, std::vector<int64_t>, double, bool, int>())
      .def("forward", &delta_rule_forward)
      .def("backward", &delta_rule_backward);
  py::class_<DeltaRuleWideArguments>(m, "DeltaRuleWide")
      .def(py::init<const std::array<uintptr_t, 7>&, const std::array<int64_t, 3>&, std::vector<int64_t>, int, bool,
                    int>())
      .def("forward", &DeltaRuleWideArguments::forward)
      .def("backward", &DeltaRuleWideArguments::backward);
  m.def("delta_rule_step", &delta_rule_step);
  m.def("delta_rule_states", &delta_rule_states);
  m.def("rms_norm_gated", &rms_norm_gated);
  m.def("delta_rule_decode", &delta_rule_decode);
#ifdef PYREPR_CUDA
  m.def("cuda_delta_rule_step", &cuda_delta_rule_step);
#endif
}

}  // namespace pyrepr
