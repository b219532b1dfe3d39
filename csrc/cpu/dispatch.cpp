#include "cpu/dispatch.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#if defined(PYREPR_BUILT_avx2)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pyrepr::cpu {
namespace {

constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(PYREPR_BUILT_avx2)
// The processor must have the instructions and the operating system must save the registers (XCR0).
struct Processor {
  bool avx2 = false, avx512 = false, bf16 = false, amx = false;

  Processor() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c & bit_FMA, f16c = c & bit_F16C;
    if (!(c & bit_OSXSAVE)) return;
    unsigned low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = ymm && fma && f16c && (b & bit_AVX2);
    avx512 = avx2 && zmm && (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) && (b & bit_AVX512VL);
    constexpr unsigned amx_bits = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    const bool tiles = (low & 0x60000) == 0x60000 && (d & amx_bits) == amx_bits;
    const bool bytes = (c & bit_AVX512VNNI) && (c & bit_AVX512VBMI);
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) bf16 = avx512 && bytes && (a & (1u << 5));
    amx = bf16 && tiles && may_use_tiles();
  }

 private:
  // Linux saves the tiles, eight kilobytes, of processes that have asked for them.
  static bool may_use_tiles() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
  }
};
#endif

}  // namespace

const std::vector<Level>& levels() {
  static const std::vector<Level> all = [] {
    std::vector<Level> found;
#define PYREPR_FAMILY(family, Functions, bf16, tiles) baseline::family##_functions,
    found.push_back({
        "baseline",
        true,
#include "families.h"
    });
#if defined(PYREPR_BUILT_avx2)
    const Processor cpu;
#define PYREPR_FAMILY(family, Functions, bf16, tiles) avx2::family##_functions,
    found.push_back({
        "avx2",
        cpu.avx2,
#include "families.h"
    });
#endif
#if defined(PYREPR_BUILT_avx512)
#define PYREPR_FAMILY(family, Functions, bf16, tiles) avx512::family##_functions,
    found.push_back({
        "avx512",
        cpu.avx512,
#include "families.h"
    });
#endif
#if defined(PYREPR_BUILT_avx512_bf16)
    // 16-bit products are worth a level of their own in some families only; the rest is the code of the level below.
#define PYREPR_FAMILY(family, Functions, bf16, tiles) bf16::family##_functions,
    found.push_back({
        "avx512_bf16",
        cpu.bf16,
#include "families.h"
    });
#endif
#if defined(PYREPR_BUILT_amx)
#define PYREPR_FAMILY(family, Functions, bf16, tiles) tiles::family##_functions,
    found.push_back({
        "amx",
        cpu.amx,
#include "families.h"
    });
#endif
    return found;
  }();
  return all;
}

const Level& choose_level(const std::string& name) {
  std::string known, possible, built;
  for (const char* level : kLevelNames) known += (known.empty() ? "" : ", ") + std::string(level);
  const Level* best = nullptr;
  for (const Level& level : levels()) {
    if (level.name == name) built = name;
    if (!level.supported) continue;
    if (level.name == name) return level;
    possible += (possible.empty() ? "" : ", ") + std::string(level.name);
    best = &level;
  }
  if (name.empty()) return *best;
  if (std::find(std::begin(kLevelNames), std::end(kLevelNames), name) == std::end(kLevelNames))
    throw std::invalid_argument("PYREPR_SIMD must be one of " + known + ", got '" + name + "'");
  throw std::runtime_error("PYREPR_SIMD asks for " + name + ", which " +
                           (built.empty() ? "this build does not hold" : "this processor does not have") +
                           "; it must be one of " + possible + " here");
}

}  // namespace pyrepr::cpu
