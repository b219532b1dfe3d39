// Runs the kernels' C interface under a sanitizer: driver ROUNDS [SEED]. Every family, at every level of this machine.
#include "driver.h"

namespace driver {
namespace {

// A new family: one row here, one function in a file beside, one line in run.sh's list.
struct Family {
  const char* name;
  void (*run)(const pyrepr::cpu::Level&, Random&);
};
constexpr Family kFamilies[] = {{"gram", gram}, {"delta_rule", delta_rule}, {"lookup", lookup}, {"causal_conv1d", causal_conv1d}};

}  // namespace
}  // namespace driver

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 50;
  const uint64_t seed = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 0;
  for (const driver::Family& family : driver::kFamilies)
    for (const pyrepr::cpu::Level& level : pyrepr::cpu::levels()) {
      if (!level.supported) continue;
      for (int64_t round = 0; round < rounds; round++) {
        driver::Random random(seed * 1000003 + static_cast<uint64_t>(round) + 1);
        family.run(level, random);
      }
      std::printf("%s %s: %lld rounds\n", family.name, level.name, static_cast<long long>(rounds));
      std::fflush(stdout);
    }
}
