// Bindings of family `gram`.
#include "bindings/common.h"
#ifdef PYREPR_CUDA
#include "cuda/gram.h"
#endif

namespace pyrepr {
namespace {

std::vector<View> views(const std::vector<MatrixTuple>& layers) {
  std::vector<View> result;
  for (const auto& [data, rows, cols, row_stride, col_stride] : layers)
    result.push_back(
        {pointer<const void>(data, "a layer", rows == 0 || cols == 0), rows, cols, row_stride, col_stride});
  if (result.empty()) throw std::invalid_argument("layers must not be empty");
  return result;
}

// What every function of the family takes, with its lifetime.
struct GramArguments {
  std::vector<View> layers;
  std::vector<double> scale;
  cpu::GramProblem problem;

  GramArguments(const std::vector<MatrixTuple>& tuples, int dtype, uintptr_t index, int64_t n, int kernel,
                std::vector<double> scale_, int degree, double coef0, int threads)
      : layers(views(tuples)), scale(std::move(scale_)) {
    if (kernel < 0 || kernel > 4) throw std::invalid_argument("kernel code " + std::to_string(kernel) + " is unknown");
    if (scale.size() != layers.size()) throw std::invalid_argument("scale must have one number per layer");
    if (threads < 1) throw std::invalid_argument("threads must be positive");
    problem = {layers.data(),
               static_cast<int64_t>(layers.size()),
               dtype_of(dtype),
               pointer<const int64_t>(index, "index", true),
               n,
               static_cast<cpu::GramKernel>(kernel),
               scale.data(),
               degree,
               coef0,
               threads};
  }
};

void gram_stats(GramArguments& g, int64_t split, bool by_features, uintptr_t s, uintptr_t r, uintptr_t d,
                uintptr_t shift, uintptr_t dots) {
  const bool empty = g.problem.n == 0;
  const cpu::GramStats out{pointer<double>(s, "s"), pointer<double>(r, "r", empty), pointer<double>(d, "d", empty),
                           pointer<double>(shift, "shift"), pointer<void>(dots, "dots", true)};
  py::gil_scoped_release release;
  check(by_features ? current_level().gram().stats_by_features(g.problem, split, out)
                    : current_level().gram().stats(g.problem, out));
}

void gram_matrix(GramArguments& g, bool centre, uintptr_t out) {
  const bool empty = g.layers.front().rows == 0 || g.layers.back().rows == 0;
  void* const data = pointer<void>(out, "out", empty);
  py::gil_scoped_release release;
  if (!empty) check(current_level().gram().matrix(g.problem, centre, data));
}

void gram_median(GramArguments& g, uintptr_t out) {
  double* const data = pointer<double>(out, "out");
  if (g.problem.n < 2) throw std::invalid_argument("the median distance needs at least 2 rows");
  py::gil_scoped_release release;
  check(current_level().gram().median(g.problem, data));
}

void gram_moments(GramArguments& g, const std::vector<int64_t>& pairs, const std::vector<uintptr_t>& blocks) {
  if (pairs.size() != 2 * blocks.size()) throw std::invalid_argument("pairs must hold two layer numbers per block");
  for (int64_t layer : pairs)
    if (layer < 0 || layer >= g.problem.count) throw std::invalid_argument("pairs names a layer that is not there");
  std::vector<double*> data;
  for (size_t i = 0; i < blocks.size(); i++) {
    const auto width = [&](size_t side) { return g.layers[static_cast<size_t>(pairs[2 * i + side])].cols; };
    data.push_back(pointer<double>(blocks[i], "a block", width(0) * width(1) == 0));
  }
  py::gil_scoped_release release;
  check(current_level().gram().moments(g.problem, pairs.data(), static_cast<int64_t>(data.size()), data.data()));
}

void gram_apply(GramArguments& g, bool centre, uintptr_t weights, int64_t rows, uintptr_t out) {
  const bool empty = rows == 0 || g.layers.front().cols == 0;
  const void* const w = pointer<const void>(weights, "weights", empty || g.problem.n == 0);
  void* const data = pointer<void>(out, "out", empty);
  py::gil_scoped_release release;
  if (!empty) check(current_level().gram().apply(g.problem, centre, w, rows, data));
}

}  // namespace

void bind_gram(py::module_& m) {
  py::class_<GramArguments>(m, "Gram")
      .def(py::init<const std::vector<MatrixTuple>&, int, uintptr_t, int64_t, int, std::vector<double>, int, double,
                    int>())
      .def("stats", &gram_stats)
      .def("matrix", &gram_matrix)
      .def("median", &gram_median)
      .def("moments", &gram_moments)
      .def("apply", &gram_apply);

#ifdef PYREPR_CUDA
  m.def("cuda_pair_stats", [](uintptr_t x, uintptr_t y, int64_t n, int64_t p, int64_t q, uintptr_t partial,
                              int64_t tiles, uintptr_t stream) {
    const auto* const x_data = pointer<const float>(x, "x", n == 0 || p == 0);
    const auto* const y_data = pointer<const float>(y, "y", n == 0 || q == 0);
    auto* const sums = pointer<double>(partial, "partial", tiles == 0);
    const char* error;
    {
      py::gil_scoped_release release;
      error = cuda::gram_pair_stats(x_data, y_data, n, p, q, sums, tiles, reinterpret_cast<void*>(stream));
    }
    if (error) throw std::runtime_error(std::string("gram_pair_stats (CUDA): ") + error);
  });
#endif
}

}  // namespace pyrepr
