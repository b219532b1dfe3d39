#include "cpu/causal_conv1d.h"

#include "driver.h"

namespace driver {
namespace {

using pyrepr::cpu::CausalConvGradients;
using pyrepr::cpu::CausalConvProblem;
using pyrepr::cpu::CausalConvStep;

}  // namespace

void causal_conv1d(const pyrepr::cpu::Level& level, Random& random) {
  const pyrepr::cpu::CausalConvFunctions functions = level.causal_conv1d();
  const bool wild = random.chance(20), packed = random.chance(40);
  const int64_t batch = 1 + random.below(3), total = 1 + random.below(random.chance(90) ? 70 : 400),
                channels = 1 + random.below(random.chance(90) ? 70 : 300);
  CausalConvProblem p{};
  p.dtype = random.pick({DType::f32, DType::bf16, DType::f16});
  p.filter = random.chance(50) ? p.dtype : DType::f32;
  p.total = total;
  p.channels = channels;
  p.taps = 1 + random.below(random.chance(80) ? 5 : 12);
  p.silu = random.chance(50);
  const int layout = static_cast<int>(random.below(3));
  p.batch = total * channels, p.token = channels, p.channel = 1;
  if (layout == 1) p.token = 1, p.channel = total;
  if (layout == 2) p.token = channels + 1, p.batch = total * p.token;
  Buffer x(random, 1 + (batch - 1) * p.batch + (total - 1) * p.token + (channels - 1) * p.channel, p.dtype);
  x.fill(random, p.dtype, 1.0, wild);
  p.x = x.at();
  Buffer weight(random, channels * p.taps, p.filter), bias(random, channels, p.filter);
  p.weight = weight.fill(random, p.filter, 1.0, false).at();
  p.bias = bias.fill(random, p.filter, 1.0, false).at();
  if (random.chance(50)) p.bias = nullptr;
  std::vector<int64_t> bounds{0};
  for (int64_t row = 0; row < batch; row++) {
    const int64_t end = (row + 1) * total;
    while (packed && random.chance(60)) bounds.push_back(bounds.back() + random.below(end - bounds.back() + 1));
    bounds.push_back(end);
  }
  bounds.shrink_to_fit();
  p.bounds = bounds.data();
  p.sequences = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t kept = p.taps - 1;
  Buffer initial(random, p.sequences * channels * kept, p.dtype);
  initial.fill(random, p.dtype, 1.0, wild);
  const bool states = random.chance(50);
  p.initial = states ? initial.at() : nullptr;

  same_bits(
      random, "causal_conv1d forward",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, batch * total * channels, p.dtype);
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        return functions.forward(p, out[0].at());
      });
  Buffer grad(random, batch * total * channels, p.dtype);
  grad.fill(random, p.dtype, 1.0, wild);
  same_bits(
      random, "causal_conv1d backward",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, batch * total * channels, p.dtype);
        for (int64_t size : {channels * p.taps, channels, p.sequences * channels * kept}) {
          out.emplace_back(random, size, DType::f32);
          if (out.size() == 4) std::memset(out[3].at(), 0, static_cast<size_t>(out[3].bytes()));
        }
        if (!p.bias) std::memset(out[2].at(), 0, static_cast<size_t>(out[2].bytes()));
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        const CausalConvGradients grads{grad.at(), out[0].at(), out[1].as<float>(),
                                        p.bias ? out[2].as<float>() : nullptr, states ? out[3].as<float>() : nullptr};
        return functions.backward(p, grads);
      });

  CausalConvProblem step = p;
  std::vector<int64_t> rows;
  for (int64_t row = 0; row <= batch; row++) rows.push_back(row * total);
  rows.shrink_to_fit();
  step.bounds = rows.data();
  step.sequences = batch;
  step.initial = nullptr;
  const int64_t length = kept + random.below(3);
  Buffer start(random, batch * channels * length, p.dtype);
  start.fill(random, p.dtype, 1.0, wild);
  const bool token_first = random.chance(50);
  same_bits(
      random, "causal_conv1d update",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, batch * total * channels, p.dtype);
        out.emplace_back(random, batch * channels * length, p.dtype);
        std::memcpy(out[1].at(), start.at(), static_cast<size_t>(start.bytes()));
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        step.threads = threads;
        const CausalConvStep state{length ? out[1].at() : nullptr, channels * length, token_first ? 1 : length,
                                   token_first ? channels : 1, length};
        return functions.update(step, state, out[0].at());
      });
}

}  // namespace driver
