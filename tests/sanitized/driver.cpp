// Runs the kernels' C interface under a sanitizer: driver ROUNDS [SEED]. Every family, at every level of this machine.
// driver plant KIND makes a mistake that the sanitizer of this kind has to find: one that sees nothing proves nothing.
#include "driver.h"

namespace driver {
namespace {

// A new family: one row here, one function in a file beside, one line in run.sh's list.
struct Family {
  const char* name;
  void (*run)(const pyrepr::cpu::Level&, Random&);
};
constexpr Family kFamilies[] = {
    {"gram", gram}, {"delta_rule", delta_rule}, {"lookup", lookup}, {"causal_conv1d", causal_conv1d}, {"pairs", pairs}};

void plant(const char* kind) {
  Random random(1);
  Buffer buffer(random, 16, DType::f32);
  volatile float* const data = buffer.as<float>();
  if (!std::strcmp(kind, "asan")) {
    volatile int64_t place = 16;  // one beyond the end
    data[place] = 1;
  } else if (!std::strcmp(kind, "msan")) {
    buffer.read();  // nothing was written
  } else {
    data[0] = 0;
#pragma omp parallel for schedule(static, 1) num_threads(4)
    for (int64_t i = 0; i < 100000; i++) data[0] = data[0] + 1;
  }
}

}  // namespace
}  // namespace driver

int main(int argc, char** argv) {
  if (argc > 2 && !std::strcmp(argv[1], "plant")) {
    driver::plant(argv[2]);
    return 0;
  }
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
