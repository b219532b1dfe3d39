// What every function on layers takes, with its lifetime.
#pragma once

#include "bindings/common.h"

namespace pyrepr {

inline std::vector<View> views(const std::vector<MatrixTuple>& layers) {
  std::vector<View> result;
  for (const auto& [data, rows, cols, row_stride, col_stride] : layers)
    result.push_back(
        {pointer<const void>(data, "a layer", rows == 0 || cols == 0), rows, cols, row_stride, col_stride});
  if (result.empty()) throw std::invalid_argument("layers must not be empty");
  return result;
}

struct GramArguments {
  std::vector<View> layers;
  std::vector<std::vector<double>> constants;  // scale, offset and base, each one number per layer
  cpu::GramProblem problem;

  GramArguments(const std::vector<MatrixTuple>& tuples, int dtype, uintptr_t index, int64_t n, int kernel,
                std::vector<std::vector<double>> constants_, int degree, bool centre, int threads)
      : layers(views(tuples)), constants(std::move(constants_)) {
    if (kernel < 0 || kernel > 4) throw std::invalid_argument("kernel code " + std::to_string(kernel) + " is unknown");
    if (constants.size() != 3) throw std::invalid_argument("constants must be scale, offset and base");
    for (const auto& each : constants)
      if (each.size() != layers.size()) throw std::invalid_argument("constants must have one number per layer");
    if (threads < 1) throw std::invalid_argument("threads must be positive");
    // An empty tensor has no address, and none stands for all rows.
    static const int64_t no_row = 0;
    if (!index && n != layers.front().rows && n) throw std::invalid_argument("index is missing");
    problem = {layers.data(),
               static_cast<int64_t>(layers.size()),
               dtype_of(dtype),
               !index && n != layers.front().rows ? &no_row : pointer<const int64_t>(index, "index", true),
               n,
               static_cast<cpu::GramKernel>(kernel),
               constants[0].data(),
               constants[1].data(),
               constants[2].data(),
               degree,
               centre,
               threads};
  }
};

inline cpu::GramStats stats_from(const GramArguments& g, uintptr_t s, uintptr_t r, uintptr_t d, uintptr_t shift,
                                 uintptr_t norms, uintptr_t dots, uintptr_t p = 0, uintptr_t moved = 0,
                                 uintptr_t cross = 0) {
  const bool empty = g.problem.n == 0;
  return {pointer<double>(s, "s"),         pointer<double>(r, "r", empty),         pointer<double>(d, "d", empty),
          pointer<double>(shift, "shift"), pointer<double>(norms, "norms", empty), pointer<void>(dots, "dots", true),
          pointer<double>(p, "p", true),   pointer<double>(moved, "moved", !p),    pointer<void>(cross, "cross", true)};
}

}  // namespace pyrepr
