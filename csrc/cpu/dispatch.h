// Which instruction sets this build holds and this machine can run. Chosen once, at the first use.
#pragma once

#include <string>
#include <vector>

#include "cpu/causal_conv1d.h"
#include "cpu/delta_rule.h"
#include "cpu/gram.h"
#include "cpu/lookup.h"
#include "cpu/probe.h"

namespace pyrepr::cpu {

struct Level {
  const char* name;
  bool supported;  // by this machine's processor and operating system
  GramFunctions (*gram)();
  DeltaRuleFunctions (*delta_rule)();
  LookupFunctions (*lookup)();
  CausalConvFunctions (*causal_conv1d)();
  ProbeFunctions (*probe)();
};

// Every level of this build, worst first; "baseline" runs anywhere the module loads.
const std::vector<Level>& levels();

// The level with this name, or the best supported one for an empty name. Throws std::invalid_argument that lists all
// names if there is no such level, std::runtime_error that lists what is possible if this build or machine lacks it.
const Level& choose_level(const std::string& name);

}  // namespace pyrepr::cpu
