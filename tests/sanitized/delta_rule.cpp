#include "cpu/delta_rule.h"

#include "driver.h"

namespace driver {
namespace {

using pyrepr::cpu::DeltaRuleGradients;
using pyrepr::cpu::DeltaRuleProblem;
using pyrepr::cpu::DeltaRuleStates;
using pyrepr::cpu::Tokens;

// [B, T, H, D] in one of three layouts, D dense.
Buffer tokens(Random& random, Tokens& view, int64_t batch, int64_t total, int64_t heads, int64_t width, DType dtype, double scale, bool wild) {
  int64_t head = width, token = heads * width, step = total * token, span = batch * step;
  if (random.chance(25)) head = width * total, token = width, step = heads * head;  // [B, H, T, D]
  if (random.chance(15)) head = width + 1, token = heads * head, step = total * token;
  const bool empty = batch * total * heads * width == 0;
  span = empty ? 0 : 1 + (batch - 1) * step + (total - 1) * token + (heads - 1) * head + width - 1;
  Buffer buffer(random, span, dtype);
  buffer.fill(random, dtype, scale, wild);
  view = {buffer.at(), step, token, head};
  return buffer;
}

}  // namespace

void delta_rule(const pyrepr::cpu::Level& level, Random& random) {
  const pyrepr::cpu::DeltaRuleFunctions functions = level.delta_rule();
  const bool packed = random.chance(30), wild = random.chance(10);
  DeltaRuleProblem p{};
  p.batch = packed ? 1 : 1 + random.below(3);
  p.total = random.chance(25) ? 1 : random.size(130);
  p.heads = 1 + random.below(3);
  p.value_heads = p.heads * (1 + random.below(2));
  p.width = 1 + random.below(random.chance(80) ? 40 : 140);
  p.value_width = 1 + random.below(random.chance(80) ? 40 : 140);
  p.dtype = random.pick({DType::f32, DType::bf16, DType::f16});
  const int gate = static_cast<int>(random.below(3));
  const bool per_key = gate == 2;
  p.gate = static_cast<pyrepr::Gate>(gate);
  p.l2norm = random.chance(50);
  p.scale = 0.5f;
  std::vector<int64_t> bounds{0};
  if (packed) {
    while (bounds.back() < p.total && random.chance(70)) bounds.push_back(bounds.back() + random.below(p.total - bounds.back() + 1));
    bounds.push_back(p.total);
    bounds.shrink_to_fit();
    p.bounds = bounds.data();
  }
  p.sequences = packed ? static_cast<int64_t>(bounds.size()) - 1 : p.batch;
  const Buffer q = tokens(random, p.q, p.batch, p.total, p.heads, p.width, p.dtype, 0.5, wild);
  const Buffer k = tokens(random, p.k, p.batch, p.total, p.heads, p.width, p.dtype, 0.5, wild);
  const Buffer v = tokens(random, p.v, p.batch, p.total, p.value_heads, p.value_width, p.dtype, 1.0, wild);
  const int64_t gates = p.batch * p.total * p.value_heads, keys = gates * p.width, values = gates * p.value_width;
  const int64_t one_state = p.value_heads * p.width * p.value_width, all_states = p.sequences * one_state;
  Buffer g(random, per_key ? keys : gates, DType::f32), beta(random, gates, DType::f32), initial(random, all_states, DType::f32);
  g.fill(random, DType::f32, 0.1, wild);
  beta.fill(random, DType::f32, 1.0, wild);
  initial.fill(random, DType::f32, 1.0, wild);
  p.g = gate ? g.as<float>() : nullptr;
  p.beta = random.chance(75) ? beta.as<float>() : nullptr;  // null: nothing is erased
  p.initial = random.chance(50) ? initial.as<float>() : nullptr;

  const int64_t segment = 1 + random.below(3);
  int64_t slots = 0;
  for (int64_t i = 0; i < p.sequences; i++) {
    const int64_t length = packed ? bounds[static_cast<size_t>(i) + 1] - bounds[static_cast<size_t>(i)] : p.total;
    const int64_t chunks = (length + pyrepr::cpu::kDeltaChunk - 1) / pyrepr::cpu::kDeltaChunk;
    slots += (chunks + segment - 1) / segment;
  }
  const auto results = [&](bool kept) {
    std::vector<Buffer> out;
    out.emplace_back(random, values, p.dtype);
    out.emplace_back(random, all_states, DType::f32);
    if (kept) out.emplace_back(random, slots * one_state, DType::f32);
    return out;
  };
  const auto forward = [&](int threads, std::vector<Buffer>& out) {
    p.threads = threads;
    const bool kept = out.size() > 2;
    return functions.forward(p, out[0].at(), out[1].as<float>(), {kept ? out[2].as<float>() : nullptr, kept ? slots : 0, segment});
  };
  same_bits(random, "delta_rule forward", [&] { return results(false); }, forward);
  std::vector<Buffer> kept = results(true);
  if (forward(2, kept) != Status::ok) die("delta_rule forward", "out of memory");

  Buffer grad_o(random, values, DType::f32), grad_state(random, all_states, DType::f32);
  grad_o.fill(random, DType::f32, 1.0, wild);
  grad_state.fill(random, DType::f32, 1.0, wild);
  same_bits(
      random, "delta_rule backward",
      [&] {
        std::vector<Buffer> out;
        for (int64_t size : {keys, keys, values, per_key ? keys : gates, gates, all_states}) out.emplace_back(random, size, DType::f32);
        std::memcpy(out[5].at(), grad_state.at(), static_cast<size_t>(grad_state.bytes()));
        if (!gate) std::memset(out[3].at(), 0, static_cast<size_t>(out[3].bytes()));
        if (!p.beta) std::memset(out[4].at(), 0, static_cast<size_t>(out[4].bytes()));
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        const DeltaRuleGradients grads{grad_o.as<float>(), out[0].as<float>(), out[1].as<float>(), out[2].as<float>(),
                                       out[3].as<float>(), out[4].as<float>(), out[5].as<float>()};
        return functions.backward(p, {kept[2].as<float>(), slots, segment}, grads);
      });
}

}  // namespace driver
