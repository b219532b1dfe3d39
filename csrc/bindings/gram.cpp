// Bindings of family `gram`.
#include "bindings/gram.h"
#ifdef PYREPR_CUDA
#include "cuda/gram.h"
#endif

namespace pyrepr {
namespace {

void gram_stats(GramArguments& g, uintptr_t s, uintptr_t r, uintptr_t d, uintptr_t shift, uintptr_t norms,
                uintptr_t dots, uintptr_t p) {
  const cpu::GramStats out = stats_from(g, s, r, d, shift, norms, dots, p);
  py::gil_scoped_release release;
  check(current_level().gram().stats(g.problem, out));
}

void gram_matrix(GramArguments& g, bool centre, uintptr_t out) {
  const bool empty = g.layers.front().rows == 0 || g.layers.back().rows == 0;
  void* const data = pointer<void>(out, "out", empty);
  py::gil_scoped_release release;
  if (!empty) check(current_level().gram().matrix(g.problem, centre, data));
}

void gram_median(GramArguments& g, uintptr_t out, uintptr_t norms) {
  double* const data = pointer<double>(out, "out");
  double* const q = pointer<double>(norms, "norms");
  if (g.problem.n < 2) throw std::invalid_argument("the median distance needs at least 2 rows");
  py::gil_scoped_release release;
  check(current_level().gram().median(g.problem, data, q));
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
      .def(py::init<const std::vector<MatrixTuple>&, int, uintptr_t, int64_t, int, std::vector<std::vector<double>>,
                    int, bool, int>())
      .def("stats", &gram_stats)
      .def("matrix", &gram_matrix)
      .def("median", &gram_median)
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
