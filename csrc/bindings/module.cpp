// pyrepr._C: the instruction set in use, and the functions of every family.
#include <cstdlib>

#include "bindings/build.h"
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
  m.attr("build") = py::dict(py::arg("version") = kBuild.version, py::arg("interface") = kBuild.interface,
                             py::arg("sources") = kBuild.sources, py::arg("compiler") = kBuild.compiler,
                             py::arg("flags") = kBuild.flags, py::arg("left_out") = kBuild.left_out,
                             py::arg("architectures") = kBuild.architectures);
  m.attr("has_cuda") = *kBuild.architectures != 0;
  m.def("simd_level", [] { return current_level().name; });  // an impossible PYREPR_SIMD fails here
  m.def(
      "simd_levels",
      [](bool supported) {  // by this machine, or all that were built
        std::vector<std::string> names;
        for (const cpu::Level& level : cpu::levels())
          if (level.supported || !supported) names.emplace_back(level.name);
        return names;
      },
      py::arg("supported") = true);
  m.def("learn_torch", &learn_torch);
#define PYREPR_FAMILY(family, Functions, bf16, tiles) bind_##family(m);
#include "families.h"
}
