// Bindings of family `gram`.
#include "bindings/gram.h"

#include <array>

#include "cpu/hsic.h"

namespace pyrepr {
namespace {

void gram_stats(GramArguments& g, uintptr_t s, uintptr_t r, uintptr_t d, uintptr_t shift, uintptr_t norms,
                uintptr_t dots, uintptr_t p, uintptr_t moved) {
  const cpu::GramStats out = stats_from(g, s, r, d, shift, norms, dots, p, moved);
  py::gil_scoped_release release;
  check(current_level().gram().stats(g.problem, out));
}

// By the statistics of `moments` or of `gram`. values [M, M], float64 for such layers, else float32; states [M]; s
// [M, M] and norms [M, n], or null where they are not wanted; products as of either, or null.
void gram_hsic(GramArguments& g, bool by_features, int64_t split, bool biased, bool normalised,
               const std::array<double, 4>& limits, uintptr_t values, uintptr_t states, uintptr_t s, uintptr_t norms,
               uintptr_t products) {
  void* const out = pointer<void>(values, "values");
  auto* const state = pointer<int32_t>(states, "states");
  const cpu::GramProblem& p = g.problem;
  const auto rows = static_cast<size_t>(p.count * p.n), layers = static_cast<size_t>(p.count);
  py::gil_scoped_release release;
  std::vector<double> memory(2 * layers * layers + 3 * rows + layers);
  double *const table = memory.data(), *const own = table + layers * layers, *const shift = own + layers * layers,
                *const lines = shift + layers;
  const cpu::GramStats found{s ? pointer<double>(s, "s") : own,
                             lines,
                             lines + rows,
                             shift,
                             norms ? pointer<double>(norms, "norms") : lines + 2 * rows,
                             pointer<void>(by_features ? 0 : products, "products", true),
                             nullptr,
                             nullptr,
                             pointer<void>(by_features ? products : 0, "products", true)};
  check(by_features ? current_level().moments().stats(p, split, found) : current_level().gram().stats(p, found));
  cpu::hsic_of({p.count, p.n, biased, normalised}, {limits[0], limits[1], limits[2], limits[3]}, found.s, found.norms,
               table, state);
  for (size_t i = 0; i < layers * layers; i++) {
    if (p.dtype == DType::f64)
      static_cast<double*>(out)[i] = table[i];
    else
      static_cast<float*>(out)[i] = static_cast<float>(table[i]);
  }
}

void gram_hsic_slopes(int64_t layers, int64_t n, int64_t split, bool biased, bool normalised, uintptr_t s,
                      uintptr_t norms, uintptr_t grad, uintptr_t grad_s, uintptr_t grad_norms) {
  if (layers < 1 || n < 1) throw std::invalid_argument("layers and n must be positive");
  const auto *const sums = pointer<const double>(s, "s"), *const q = pointer<const double>(norms, "norms"),
                    *const pull = pointer<const double>(grad, "grad");
  double *const out_s = pointer<double>(grad_s, "grad_s"), *const out_q = pointer<double>(grad_norms, "grad_norms");
  py::gil_scoped_release release;
  cpu::hsic_slopes({layers, n, biased, normalised}, split, sums, q, pull, out_s, out_q);
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
      .def("hsic", &gram_hsic)
      .def("matrix", &gram_matrix)
      .def("median", &gram_median)
      .def("apply", &gram_apply);
  m.def("gram_hsic_slopes", &gram_hsic_slopes);
}

}  // namespace pyrepr
