// Binding of what a layer of the gated delta rule computes for one token between its projections.
#pragma once

#include <algorithm>
#include <cmath>

#include "bindings/tensor.h"

namespace pyrepr {
namespace {

// The tensors of such a call, read and found to be as the kernel takes them; see DeltaRuleDecode.
class DecodeCall {
 public:
  // x, states, weights and biases of the convolution: tuples of one tensor, or of three for q, k and v. The states and
  // the state are written to where `new_states` and `new_state` say, which may be None: where they stand.
  bool read(const py::tuple& x, const py::tuple& states, const py::tuple& weights, py::handle biases,
            py::handle new_states, py::handle state, py::handle new_state, bool grad) {
    parts_ = x.size();
    if ((parts_ != 1 && parts_ != 3) || states.size() != parts_ || weights.size() != parts_) return false;
    Reader reader(grad);
    const bool biased = !biases.is_none(), moves = !new_states.is_none();
    const auto tuple = [&](py::handle given) { return py::reinterpret_borrow<py::tuple>(given); };
    if ((biased && tuple(biases).size() != parts_) || (moves && tuple(new_states).size() != parts_)) return false;
    for (size_t i = 0; i < parts_; i++) {
      written_[i] = moves ? tuple(new_states)[i] : states[i];
      if (!reader.read(x[i], x_[i]) || !reader.read(states[i], from_[i]) || !reader.read(weights[i], weight_[i]) ||
          (biased && !reader.read(tuple(biases)[i], bias_[i])) || !reader.read(written_[i], to_[i]))
        return false;
    }
    written_[parts_] = new_state.is_none() ? state : new_state;
    return reader.read(state, initial_) && reader.read(written_[parts_], final_);
  }

  // a, b, A_log, dt_bias; the gate of the norm and its weight, which may be None.
  bool read_gates(py::handle a, py::handle b, py::handle A_log, py::handle dt_bias, py::handle gate, py::handle weight,
                  bool grad) {
    Reader reader(grad);
    return reader.read(a, a_) && reader.read(b, b_) && reader.read(A_log, A_log_) && reader.read(dt_bias, dt_bias_) &&
           (gate.is_none() || reader.read(gate, gate_)) && (weight.is_none() || reader.read(weight, norm_weight_));
  }

  bool fits(py::handle rows, double eps, bool silu, bool twice, int threads) {
    if (initial_.dims != 4 || x_[0].dims < 2 || !(same_shape(initial_, final_))) return false;
    p_.batch = x_[0].shape[0];
    p_.value_heads = initial_.shape[1];
    p_.width = initial_.shape[2];
    p_.value_width = initial_.shape[3];
    if (p_.batch * initial_.elements() == 0 || !find_rows(rows)) return false;
    for (const Tensor* state : {&initial_, &final_})
      if (!state->is(DType::f32) || !state->dense()) return false;
    p_.initial = static_cast<const float*>(initial_.data);
    p_.final = static_cast<float*>(final_.data);
    p_.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p_.width)));
    p_.threads = threads;
    return fits_convolutions() && fits_gates(twice) && fits_norm(eps, silu) && is_alone();
  }

  // out [B, HV V] in x's dtype.
  void run(const Tensor& out) {
    for (size_t i = 0; i <= parts_; i++) tell_written(written_[i]);
    py::gil_scoped_release release;
    check(current_level().delta_rule().decode(p_, out.data));
  }

  // The shape of x with HV V at its end.
  std::vector<int64_t> out_shape() const {
    std::vector<int64_t> shape(x_[0].shape, x_[0].shape + x_[0].dims);
    shape.back() = p_.value_heads * p_.value_width;
    return shape;
  }

 private:
  size_t parts_ = 0;
  Tensor x_[3], from_[3], to_[3], weight_[3], bias_[3]{}, initial_, final_;
  Tensor a_, b_, A_log_, dt_bias_, gate_{}, norm_weight_{};
  py::handle written_[4];
  std::vector<int64_t> rows_;
  std::vector<float> rates_, wide_bias_, wide_weight_;
  cpu::DeltaRuleDecode p_{};

  static bool same_shape(const Tensor& x, const Tensor& y) {
    return x.dims == y.dims && std::equal(x.shape, x.shape + x.dims, y.shape);
  }
  // [B, count] or [B, 1, count], the last axis dense.
  bool is_token(const Tensor& x, int64_t count) const {
    return x.rows_dense() && (x.has_shape({p_.batch, count}) || x.has_shape({p_.batch, 1, count}));
  }

  bool find_rows(py::handle given) {
    const int64_t pool = initial_.shape[0];
    if (given.is_none()) return pool == p_.batch;
    Tensor rows;
    if (!Reader(false).read(given, rows) || !rows.has_shape({p_.batch}) || !rows.dense()) return false;
    if (rows.kind != 0 || rows.lanes != 1 || (rows.bits != 32 && rows.bits != 64)) return false;
    for (int64_t i = 0; i < p_.batch; i++)
      rows_.push_back(rows.bits == 64 ? static_cast<const int64_t*>(rows.data)[i]
                                      : static_cast<const int32_t*>(rows.data)[i]);
    std::vector<int64_t> ordered = rows_;
    std::sort(ordered.begin(), ordered.end());
    for (size_t i = 0; i < ordered.size(); i++)
      if (ordered[i] < -1 || ordered[i] >= pool || (i && ordered[i] >= 0 && ordered[i] == ordered[i - 1])) return false;
    p_.rows = rows_.data();
    return true;
  }

  bool fits_convolutions() {
    int64_t channels = 0;
    for (size_t i = 0; i < parts_; i++) channels += x_[i].dims ? x_[i].shape[x_[i].dims - 1] : 0;
    const int64_t of_keys = channels - p_.value_heads * p_.value_width;
    if (of_keys <= 0 || of_keys % (2 * p_.width)) return false;
    p_.heads = of_keys / (2 * p_.width);
    if (p_.value_heads % p_.heads || from_[0].dims != 3 || !is_narrow(x_[0])) return false;
    p_.taps = weight_[0].dims ? weight_[0].shape[weight_[0].dims - 1] : 0;
    p_.kept = from_[0].shape[2];
    p_.dtype = static_cast<DType>(x_[0].code());
    p_.filter = static_cast<DType>(weight_[0].code());
    if (p_.taps < 1 || p_.kept < p_.taps - 1 || !(weight_[0].is(DType::f32) || p_.filter == p_.dtype)) return false;
    const int64_t keys = of_keys / 2, values = p_.value_heads * p_.value_width, parts[] = {keys, keys, values};
    cpu::DecodedChannels* const all[] = {&p_.q, &p_.k, &p_.v};
    int64_t first = 0;
    for (size_t i = 0; i < 3; i++) {
      const size_t part = parts_ == 1 ? 0 : i;
      const int64_t own = parts_ == 1 ? channels : parts[i];
      if (!fits_convolution(part, own)) return false;
      *all[i] = channels_of(part, first);
      if (parts_ == 1) first += parts[i];
    }
    return true;
  }
  bool fits_convolution(size_t i, int64_t channels) const {
    const int dtype = static_cast<int>(p_.dtype), filter = static_cast<int>(p_.filter);
    if (!is_token(x_[i], channels) || x_[i].dims != x_[0].dims || x_[i].code() != dtype) return false;
    for (const Tensor* state : {&from_[i], &to_[i]})
      if (!state->has_shape({initial_.shape[0], channels, p_.kept}) || state->code() != dtype || !state->dense())
        return false;
    const Tensor &w = weight_[i], &bias = bias_[i];
    if (!(w.has_shape({channels, p_.taps}) || w.has_shape({channels, 1, p_.taps})) || w.code() != filter || !w.dense())
      return false;
    return !bias.data || (bias.has_shape({channels}) && bias.code() == filter && bias.dense());
  }
  cpu::DecodedChannels channels_of(size_t i, int64_t first) const {
    const auto at = [](const Tensor& x, int64_t element) {
      return static_cast<char*>(x.data) + element * (x.bits / 8);
    };
    const int64_t row = from_[i].shape[1] * p_.kept;
    return {at(x_[i], first),
            at(weight_[i], first * p_.taps),
            bias_[i].data ? at(bias_[i], first) : nullptr,
            at(from_[i], first * p_.kept),
            at(to_[i], first * p_.kept),
            x_[i].stride(0),
            row,
            row};
  }

  bool fits_gates(bool twice) {
    const int64_t heads = p_.value_heads;
    for (const Tensor* x : {&a_, &b_})
      if (!is_token(*x, heads) || !is_narrow(*x) || !x->dense()) return false;
    std::vector<float> wide;
    const float* const logs = A_log_.has_shape({heads}) ? widened(A_log_, wide) : nullptr;
    const float* const bias = dt_bias_.has_shape({heads}) ? widened(dt_bias_, wide_bias_) : nullptr;
    if (!logs || !bias) return false;
    for (int64_t h = 0; h < heads; h++) rates_.push_back(std::exp(logs[h]));
    p_.gates.g = a_.data;
    p_.gates.beta = b_.data;
    p_.gates.g_dtype = static_cast<DType>(a_.code());
    p_.gates.beta_dtype = static_cast<DType>(b_.code());
    p_.gates.rates = rates_.data();
    p_.gates.dt_bias = bias;
    p_.gates.largest = twice ? 2 : 1;
    p_.gates.tokens = p_.batch;
    p_.gates.heads = heads;
    p_.gates.width = 1;
    p_.gates.threads = p_.threads;
    return true;
  }

  bool fits_norm(double eps, bool silu) {
    p_.norm.dtype = p_.dtype;
    p_.norm.rows = p_.batch * p_.value_heads;
    p_.norm.width = p_.value_width;
    p_.norm.eps = static_cast<float>(eps);
    p_.norm.silu = silu;
    p_.norm.threads = p_.threads;
    if (gate_.data) {
      const bool flat = is_token(gate_, p_.value_heads * p_.value_width);
      const bool heads = gate_.has_shape({p_.batch, p_.value_heads, p_.value_width}) ||
                         gate_.has_shape({p_.batch, 1, p_.value_heads, p_.value_width});
      if (!(flat || heads) || !is_narrow(gate_) || !gate_.dense()) return false;
      p_.norm.gate = gate_.data;
      p_.norm.gate_dtype = static_cast<DType>(gate_.code());
    }
    if (!norm_weight_.data) return true;
    return norm_weight_.has_shape({p_.value_width}) && (p_.norm.weight = widened(norm_weight_, wide_weight_));
  }

  // That what is written has a place of its own, or is where it was read from.
  bool is_alone() const {
    std::vector<const Tensor*> all{&a_, &b_, &A_log_, &dt_bias_, &gate_, &norm_weight_, &initial_, &final_};
    std::vector<std::pair<const Tensor*, const Tensor*>> written{{&final_, &initial_}};
    for (size_t i = 0; i < parts_; i++) {
      all.insert(all.end(), {&x_[i], &weight_[i], &bias_[i], &from_[i], &to_[i]});
      written.emplace_back(&to_[i], &from_[i]);
    }
    for (const auto& [to, from] : written)
      for (const Tensor* x : all)
        if (x != to && !(x == from && x->data == to->data) && x->data && Reach(*to).meets(Reach(*x))) return false;
    return true;
  }
};

// [B, HV V] or [B, 1, HV V], as x came; or None, and nothing written: see tensor.h.
py::object delta_rule_decode(const py::tuple& x, const py::tuple& states, const py::tuple& weights, py::handle biases,
                             py::handle a, py::handle b, py::handle A_log, py::handle dt_bias, py::handle state,
                             py::handle gate, py::handle norm_weight, py::handle new_states, py::handle new_state,
                             py::handle rows, double eps, bool silu, bool twice, bool grad, int threads) {
  DecodeCall call;
  if (!call.read(x, states, weights, biases, new_states, state, new_state, grad) ||
      !call.read_gates(a, b, A_log, dt_bias, gate, norm_weight, grad) || !call.fits(rows, eps, silu, twice, threads))
    return py::none();
  const std::vector<int64_t> shape = call.out_shape();
  const py::object out = new_empty(x[0], shape.data(), static_cast<int>(shape.size()));
  Tensor to;
  if (!Reader(false).read(out, to)) return py::none();
  call.run(to);
  return out;
}

}  // namespace
}  // namespace pyrepr
