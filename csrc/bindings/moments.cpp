// Bindings of products of features: methods of the class that holds layers.
#include "bindings/gram.h"

namespace pyrepr {
namespace {

void stats_by_features(GramArguments& g, int64_t split, uintptr_t s, uintptr_t r, uintptr_t d, uintptr_t shift,
                       uintptr_t norms, uintptr_t p, uintptr_t moved, uintptr_t cross) {
  const cpu::GramStats out = stats_from(g, s, r, d, shift, norms, 0, p, moved, cross);
  py::gil_scoped_release release;
  check(current_level().moments().stats(g.problem, split, out));
}

void moments(GramArguments& g, const std::vector<int64_t>& pairs, const std::vector<uintptr_t>& blocks) {
  if (pairs.size() != 2 * blocks.size()) throw std::invalid_argument("pairs must hold two layer numbers per block");
  for (int64_t layer : pairs)
    if (layer < 0 || layer >= g.problem.count) throw std::invalid_argument("pairs names a layer that is not there");
  std::vector<double*> data;
  for (size_t i = 0; i < blocks.size(); i++) {
    const auto width = [&](size_t side) { return g.layers[static_cast<size_t>(pairs[2 * i + side])].cols; };
    data.push_back(pointer<double>(blocks[i], "a block", width(0) * width(1) == 0));
  }
  py::gil_scoped_release release;
  check(current_level().moments().moments(g.problem, pairs.data(), static_cast<int64_t>(data.size()), data.data()));
}

}  // namespace

void bind_moments(py::module_& m) {
  py::reinterpret_borrow<py::class_<GramArguments>>(m.attr("Gram"))
      .def("stats_by_features", &stats_by_features)
      .def("moments", &moments);
}

}  // namespace pyrepr
