// Which instruction sets this build holds and this machine can run. Chosen once, at the first use.
#pragma once

#include <string>
#include <vector>

#include "cpu/causal_conv1d.h"
#include "cpu/delta_rule.h"
#include "cpu/gram.h"
#include "cpu/lookup.h"
#include "cpu/moments.h"
#include "cpu/pairs_functions.h"
#include "cpu/probe.h"

namespace pyrepr::cpu {

#define PYREPR_FAMILY(family, Functions, bf16, tiles) \
  namespace baseline {                                \
  Functions family##_functions();                     \
  }                                                   \
  namespace avx2 {                                    \
  Functions family##_functions();                     \
  }                                                   \
  namespace avx512 {                                  \
  Functions family##_functions();                     \
  }                                                   \
  namespace avx512_bf16 {                             \
  Functions family##_functions();                     \
  }                                                   \
  namespace amx {                                     \
  Functions family##_functions();                     \
  }
#include "families.h"

struct Level {
  const char* name;
  bool supported;  // by this machine's processor and operating system
#define PYREPR_FAMILY(family, Functions, bf16, tiles) Functions (*family)();
#include "families.h"
};

// Every level of this build, worst first; "baseline" runs anywhere the module loads.
const std::vector<Level>& levels();

// The level with this name, or the best supported one for an empty name. Throws std::invalid_argument that lists all
// names if there is no such level, std::runtime_error that lists what is possible if this build or machine lacks it.
const Level& choose_level(const std::string& name);

}  // namespace pyrepr::cpu
