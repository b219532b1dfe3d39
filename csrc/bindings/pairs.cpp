// Bindings of family `pairs`.
#include "bindings/common.h"

namespace pyrepr {
namespace {

View rows_of(const MatrixTuple& matrix, const char* what) {
  const auto& [data, rows, cols, row_stride, col_stride] = matrix;
  if (cols > 1 && col_stride != 1) throw std::invalid_argument(std::string(what) + " must have contiguous rows");
  return {pointer<const void>(data, what, rows == 0 || cols == 0), rows, cols, row_stride, 1};
}

DType narrow(int dtype) {
  if (dtype_of(dtype) == DType::f64) throw std::invalid_argument("float64 runs in the reference");
  return dtype_of(dtype);
}

void pairs_topk(const MatrixTuple& x, const MatrixTuple& y, int dtype, int64_t k, int metric, bool exclude_self,
                int64_t offset, uintptr_t values, uintptr_t indices, uintptr_t logsumexp, int threads) {
  if (metric < 0 || metric > 2) throw std::invalid_argument("metric code " + std::to_string(metric) + " is unknown");
  if (k < 0 || threads < 1) throw std::invalid_argument("k must not be negative, threads positive");
  const View rows = rows_of(x, "x"), others = rows_of(y, "y");
  if (rows.cols != others.cols) throw std::invalid_argument("x and y must have the same width");
  const bool empty = rows.rows * k == 0;
  const cpu::TopkProblem problem{rows,
                                 others,
                                 narrow(dtype),
                                 k,
                                 static_cast<cpu::Metric>(metric),
                                 exclude_self,
                                 offset,
                                 pointer<float>(values, "values", empty),
                                 pointer<int64_t>(indices, "indices", empty),
                                 pointer<float>(logsumexp, "logsumexp", true),
                                 threads};
  py::gil_scoped_release release;
  if (rows.rows) check(current_level().pairs().topk(problem));
}

// What all functions on logits take, with its lifetime.
struct PairsArguments {
  std::vector<int64_t> prefixes;
  cpu::PairsProblem problem;

  PairsArguments(const MatrixTuple& x, const MatrixTuple& y, int dtype, uintptr_t labels,
                 std::vector<int64_t> prefixes_, double scale, bool normalize, int threads)
      : prefixes(std::move(prefixes_)) {
    if (threads < 1) throw std::invalid_argument("threads must be positive");
    const View rows = rows_of(x, "x"), others = rows_of(y, "y");
    if (rows.cols != others.cols) throw std::invalid_argument("x and y must have the same width");
    if (prefixes.empty()) throw std::invalid_argument("prefixes must not be empty");
    int64_t last = 0;
    for (int64_t p : prefixes) {
      if (p < last || p > rows.cols) throw std::invalid_argument("prefixes must increase, up to the width of x");
      last = p;
    }
    const auto* const of = pointer<const int64_t>(labels, "labels", true);
    for (int64_t i = 0; of && i < rows.rows; i++)  // what is out of range must not become an address
      if (of[i] < 0 || of[i] >= others.rows)
        throw py::index_error("labels must be from 0 to m - 1 = " + std::to_string(others.rows - 1) + ", got " +
                              std::to_string(of[i]));
    problem = {rows, others, narrow(dtype), prefixes.data(), static_cast<int64_t>(prefixes.size()),
               of,   scale,  normalize,     threads};
  }
};

void pairs_logsumexp(PairsArguments& a, uintptr_t r, uintptr_t c, uintptr_t row_gaps, uintptr_t column_gaps,
                     uintptr_t kept) {
  const auto address = [](uintptr_t data) { return reinterpret_cast<float*>(data); };
  if (a.problem.labels && ((r && !row_gaps) || (c && !column_gaps)))
    throw std::invalid_argument("labels come with gaps of what is wanted");
  const cpu::LogSumExpResult out{address(r), address(c), address(row_gaps), address(column_gaps), address(kept)};
  py::gil_scoped_release release;
  check(current_level().pairs().logsumexp(a.problem, out));
}

void pairs_logsumexp_backward(PairsArguments& a, uintptr_t r, uintptr_t c, uintptr_t kept, uintptr_t row_weights,
                              uintptr_t column_weights, uintptr_t positive_weights, uintptr_t dx, uintptr_t dy,
                              uintptr_t dscale) {
  const auto given = [](uintptr_t data) { return reinterpret_cast<const float*>(data); };
  if ((r && !row_weights) || (c && !column_weights)) throw std::invalid_argument("r and c come with their weights");
  const bool no_x = a.problem.x.rows * a.problem.x.cols == 0, no_y = a.problem.y.rows * a.problem.x.cols == 0;
  const cpu::LogSumExpGradients out{given(r),
                                    given(c),
                                    given(kept),
                                    given(row_weights),
                                    given(column_weights),
                                    a.problem.labels ? given(positive_weights) : nullptr,
                                    pointer<void>(dx, "dx", no_x),
                                    pointer<void>(dy, "dy", no_y),
                                    pointer<float>(dscale, "dscale")};
  py::gil_scoped_release release;
  check(current_level().pairs().logsumexp_backward(a.problem, out));
}

void pairs_row_loss(PairsArguments& a, const std::vector<double>& weights, uintptr_t loss, uintptr_t dx, uintptr_t dy,
                    uintptr_t dscale) {
  const cpu::PairsProblem& p = a.problem;
  if (!p.labels) throw std::invalid_argument("a loss over rows needs labels");
  if (static_cast<int64_t>(weights.size()) != p.prefix_count) throw std::invalid_argument("weights: one a prefix");
  const cpu::RowLossResult out{weights.data(), pointer<float>(loss, "loss"),
                               pointer<float>(dx, "dx", p.x.rows * p.x.cols == 0),
                               pointer<float>(dy, "dy", p.y.rows * p.x.cols == 0), pointer<float>(dscale, "dscale")};
  py::gil_scoped_release release;
  check(current_level().pairs().row_loss(p, out));
}

}  // namespace

void bind_pairs(py::module_& m) {
  m.def("pairs_topk", &pairs_topk);
  py::class_<PairsArguments>(m, "Pairs")
      .def(py::init<const MatrixTuple&, const MatrixTuple&, int, uintptr_t, std::vector<int64_t>, double, bool, int>())
      .def("logsumexp", &pairs_logsumexp)
      .def("backward", &pairs_logsumexp_backward)
      .def("row_loss", &pairs_row_loss);
}

}  // namespace pyrepr
