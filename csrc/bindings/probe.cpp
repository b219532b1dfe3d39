// Bindings of the machine probes that benchmarks use.
#include "bindings/common.h"

namespace pyrepr {

void bind_probe(py::module_& m) {
  m.def(
      "fma_peak", [](int threads, double seconds) { return current_level().probe().fma_peak(threads, seconds); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "micro_kernel",
      [](int threads, double seconds) { return current_level().probe().micro_kernel(threads, seconds); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "read_bandwidth",
      [](int threads, int64_t bytes) { return current_level().probe().read_bandwidth(threads, bytes); },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace pyrepr
