// Bindings of family `causal_conv1d`.
#include <array>

#include "bindings/common.h"
#include "bindings/tensor.h"

namespace pyrepr {
namespace {

// What every function of the family takes, with its lifetime.
struct CausalConvArguments {
  std::vector<int64_t> bounds;
  cpu::CausalConvProblem problem;

  // addresses: x, weight, bias, initial states; strides: batch, token and channel of x; sizes: B, T, D, W; `filter`:
  // the dtype of weight and bias.
  CausalConvArguments(const std::array<uintptr_t, 4>& addresses, const std::array<int64_t, 3>& strides,
                      const std::array<int64_t, 4>& sizes, int dtype, int filter, std::vector<int64_t> bounds_,
                      bool silu, int threads)
      : bounds(std::move(bounds_)) {
    for (int64_t size : sizes)
      if (size < 0) throw std::invalid_argument("a size is negative");
    const int64_t tokens = sizes[0] * sizes[1];
    if (sizes[3] < 1) throw std::invalid_argument("W must be positive");
    if (dtype_of(dtype) == DType::f64) throw std::invalid_argument("float64 runs in the reference");
    if (dtype_of(filter) != DType::f32 && filter != dtype)
      throw std::invalid_argument("weight and bias must be float32 or of x's dtype");
    if (threads < 1) throw std::invalid_argument("threads must be positive");
    if (bounds.empty() || bounds.front() != 0 || bounds.back() != tokens)
      throw std::invalid_argument("the sequences must go from 0 to B T");
    for (size_t i = 1; i < bounds.size(); i++) {
      if (bounds[i] < bounds[i - 1]) throw std::invalid_argument("the sequences must not decrease");
      if (bounds[i] > bounds[i - 1] && bounds[i - 1] / sizes[1] != (bounds[i] - 1) / sizes[1])
        throw std::invalid_argument("a sequence spans two rows of the batch");
    }
    problem = {pointer<const void>(addresses[0], "x", tokens * sizes[2] == 0),
               strides[0],
               strides[1],
               strides[2],
               pointer<const void>(addresses[1], "weight", sizes[2] == 0),
               pointer<const void>(addresses[2], "bias", true),
               pointer<const void>(addresses[3], "initial_states", true),
               bounds.data(),
               static_cast<int64_t>(bounds.size()) - 1,
               sizes[1],
               sizes[2],
               sizes[3],
               dtype_of(dtype),
               dtype_of(filter),
               silu,
               threads};
  }

  // A large fresh result, [B, T, D] in x's dtype, costs more in page faults than in arithmetic.
  void* result(uintptr_t address, const char* what) const {
    void* const data = pointer<void>(address, what, empty());
    const int64_t bytes = problem.tokens() * problem.channels * (problem.dtype == DType::f32 ? 4 : 2);
    if (bytes > int64_t(4) << 20) huge_pages(address, bytes, false);
    return data;
  }
  bool empty() const { return problem.tokens() * problem.channels == 0; }
};

void causal_conv1d_forward(CausalConvArguments& a, uintptr_t out) {
  void* const data = a.result(out, "out");
  py::gil_scoped_release release;
  if (!a.empty()) check(current_level().causal_conv1d().forward(a.problem, data));
}

void causal_conv1d_backward(CausalConvArguments& a, uintptr_t grad, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
                            uintptr_t dinitial) {
  const cpu::CausalConvGradients out{pointer<const void>(grad, "grad", a.empty()), a.result(dx, "dx"),
                                     pointer<float>(dweight, "dweight", a.problem.channels == 0),
                                     pointer<float>(dbias, "dbias", true), pointer<float>(dinitial, "dinitial", true)};
  py::gil_scoped_release release;
  if (a.problem.channels) check(current_level().causal_conv1d().backward(a.problem, out));
}

// state: address, strides of batch, channel and token, S.
void causal_conv1d_update(CausalConvArguments& a, uintptr_t state, const std::array<int64_t, 4>& layout,
                          uintptr_t out) {
  if (layout[3] < a.problem.taps - 1) throw std::invalid_argument("the state must hold W - 1 tokens");
  if (a.problem.sequences * a.problem.total != a.problem.tokens())
    throw std::invalid_argument("update takes one sequence per row");
  const cpu::CausalConvStep step{pointer<void>(state, "conv_state", a.empty() || layout[3] == 0), layout[0], layout[1],
                                 layout[2], layout[3]};
  void* const data = pointer<void>(out, "out", a.empty());
  py::gil_scoped_release release;
  if (!a.empty()) check(current_level().causal_conv1d().update(a.problem, step, data));
}

// Some tokens of each row: x [B, D] or [B, D, T], conv_state [B, D, S], weight [D, W], bias [D] or None -> out like x,
// or None: see tensor.h.
py::object causal_conv1d_step(py::handle x_, py::handle state_, py::handle weight_, py::handle bias_, bool silu,
                              bool grad, int threads) {
  Reader reader(grad);
  Tensor x, state, weight, bias{}, to;
  if (!reader.read(x_, x) || !reader.read(state_, state) || !reader.read(weight_, weight) ||
      !(bias_.is_none() || reader.read(bias_, bias)) || !(x.dims == 2 || x.dims == 3))
    return py::none();
  const int64_t B = x.shape[0], D = x.shape[1], T = x.dims == 3 ? x.shape[2] : 1;
  if (!(x.is(DType::f32) || x.is(DType::bf16) || x.is(DType::f16)) || state.code() != x.code() || B * D * T == 0 ||
      state.dims != 3 || weight.dims != 2)
    return py::none();
  const int64_t S = state.shape[2], taps = weight.shape[1];
  if (!state.has_shape({B, D, S}) || taps < 1 || S < taps - 1 || !weight.has_shape({D, taps}) || !weight.dense() ||
      !(weight.is(DType::f32) || weight.code() == x.code()))
    return py::none();
  if (bias.data && !(bias.has_shape({D}) && bias.code() == weight.code() && bias.dense())) return py::none();
  if (!is_apart(state, {&x, &weight, &bias})) return py::none();
  const int64_t by_token[] = {B, T, D};
  const py::object out = T == 1 ? new_empty(x_, x.shape, x.dims) : new_empty(x_, by_token, 3);
  if (!Reader(false).read(out, to)) return py::none();
  std::vector<int64_t> bounds(static_cast<size_t>(B) + 1);
  for (int64_t i = 0; i <= B; i++) bounds[static_cast<size_t>(i)] = i * T;
  const cpu::CausalConvProblem problem{x.data,
                                       x.stride(0),
                                       T == 1 ? 0 : x.stride(2),
                                       x.stride(1),
                                       weight.data,
                                       bias.data,
                                       nullptr,
                                       bounds.data(),
                                       B,
                                       T,
                                       D,
                                       taps,
                                       static_cast<DType>(x.code()),
                                       static_cast<DType>(weight.code()),
                                       silu,
                                       threads};
  const cpu::CausalConvStep step{state.data, state.stride(0), state.stride(1), state.stride(2), S};
  tell_written(state_);
  {
    py::gil_scoped_release release;
    check(current_level().causal_conv1d().update(problem, step, to.data));
  }
  return T == 1 ? out : py::object(out.attr("mT"));
}

}  // namespace

void bind_causal_conv1d(py::module_& m) {
  py::class_<CausalConvArguments>(m, "CausalConv")
      .def(py::init<const std::array<uintptr_t, 4>&, const std::array<int64_t, 3>&, const std::array<int64_t, 4>&, int,
                    int, std::vector<int64_t>, bool, int>())
      .def("forward", &causal_conv1d_forward)
      .def("backward", &causal_conv1d_backward)
      .def("update", &causal_conv1d_update);
  m.def("causal_conv1d_step", &causal_conv1d_step);
}

}  // namespace pyrepr
