// One token of the causal convolution, for channels that are neighbours in memory. Included by level units only (see
// simd.h).
#pragma once

#include "cpu/simd.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// Four neighbouring elements of each of W channels, one vector an element.
template <class S>
inline void load_four(const typename S::Memory* p, Vec<float> (&v)[4]) {
  constexpr int W = Lanes<float>::W;
#pragma GCC unroll 4  // or GCC moves the array through memory, in halves that no load can be forwarded from
  for (int64_t j = 0; j < 4; j++) v[j] = load_as<S>(p + j * W);
  unzip_four<float>(v);
}

// What one token of neighbouring channels needs. S: how x and states are kept, F: how weights and biases are.
template <class S, class F>
struct TokenConvolution {
  using V = Vec<float>;
  using Element = typename S::Memory;
  static constexpr int W = Lanes<float>::W;

  const Element* x;                  // [channels]
  const typename F::Memory* weight;  // [channels, taps]
  const typename F::Memory* bias;    // [channels] or null
  const Element* from;               // [channels, kept] the tokens before, the newest last
  Element* to;                       // [channels, kept] the same with x; may be `from`
  int64_t taps, kept;
  bool silu;

  void run(int64_t channels, Element* out) const {
    int64_t c = 0;
    if (taps == 4 && kept == 4)
      for (; c + W <= channels; c += W) in_registers<4>(c, out + c);
    if (taps == 4 && kept == 3)
      for (; c + W <= channels; c += W) in_registers<3>(c, out + c);
    for (; c < channels; c++) one(c, out + c);
  }

 private:
  // W channels, where weights, state and x go from memory to registers and back.
  template <int kept>
  void in_registers(int64_t c, Element* out) const {
    V w[4], seen[4];
    load_four<F>(weight + c * 4, w);
    if constexpr (kept == 4) {
      load_four<S>(from + c * 4, seen);
#pragma GCC unroll 4
      for (int64_t j = 0; j < 3; j++) seen[j] = seen[j + 1];
    } else {
      V three[3];
#pragma GCC unroll 4
      for (int64_t j = 0; j < 3; j++) three[j] = load_as<S>(from + c * 3 + j * W);
      unzip_three<float>(three);
#pragma GCC unroll 4
      for (int64_t j = 0; j < 3; j++) seen[j] = three[j];
    }
    seen[3] = load_as<S>(x + c);
    V y = bias ? load_as<F>(bias + c) : V{};
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; j++) y += w[j] * seen[j];
    if (silu) y *= sigmoid(y);
    store_as<S>(out, y);
    if constexpr (kept == 4) {
      zip_four<float>(seen);
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; j++) store_as<S>(to + c * 4 + j * W, seen[j]);
    } else {
      V three[3] = {seen[1], seen[2], seen[3]};
      zip_three<float>(three);
#pragma GCC unroll 4
      for (int64_t j = 0; j < 3; j++) store_as<S>(to + c * 3 + j * W, three[j]);
    }
  }

  void one(int64_t c, Element* out) const {
    const Element *const before = from + c * kept, token = x[c];
    Element* const after = to + c * kept;
    float y = bias ? load_one<F>(bias + c) : 0;
    for (int64_t j = 0; j < taps - 1; j++)
      y += load_one<F>(weight + c * taps + j) * load_one<S>(before + kept - taps + 1 + j);
    y += load_one<F>(weight + c * taps + taps - 1) * load_one<S>(&token);
    V all = splat<float>(y);
    if (silu) all *= sigmoid(all);
    store_some<S>(out, 1, all);
    for (int64_t j = 0; j + 1 < kept; j++) after[j] = before[j + 1];
    if (kept) after[kept - 1] = token;
  }
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
