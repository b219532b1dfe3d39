// pyrepr._C: the instruction set in use, and the functions of every family.
#include <cstdlib>

#include "bindings/common.h"
#include "bindings/tensor.h"

namespace pyrepr {

const cpu::Level& current_level() {
  static const cpu::Level& level = []() -> const cpu::Level& {
    const char* wanted = std::getenv("PYREPR_SIMD");
    return cpu::choose_level(wanted ? wanted : "");
  }();
  return level;
}

}  // namespace pyrepr

PYBIND11_MODULE(_C, m) {
  using namespace pyrepr;
  m.doc() = "Native kernels of pyrepr. Not an interface: use the functions in pyrepr.";
  current_level();  // an impossible PYREPR_SIMD fails here, at import
  m.def("simd_level", [] { return current_level().name; });
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const cpu::Level& level : cpu::levels())
      if (level.supported) names.emplace_back(level.name);
    return names;
  });
#ifdef PYREPR_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("learn_torch", &learn_torch);
#define PYREPR_FAMILY(family, Functions, best) bind_##family(m);
#include "families.h"
}
