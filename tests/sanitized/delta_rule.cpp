#include "cpu/delta_rule.h"

#include "driver.h"

namespace driver {
namespace {

using pyrepr::cpu::DeltaRuleGradients;
using pyrepr::cpu::DeltaRuleProblem;
using pyrepr::cpu::DeltaRuleStates;
using pyrepr::cpu::Tokens;

// [B, T, H, D] in one of three layouts, D dense.
Buffer tokens(Random& random, Tokens& view, int64_t batch, int64_t total, int64_t heads, int64_t width, DType dtype,
              double scale, bool wild) {
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

namespace {

// float64, [B, T, HV, D] dense; sequences of any length, 0 included.
void wide(const pyrepr::cpu::DeltaRuleFunctions& functions, Random& random) {
  const bool wild = random.chance(10);
  const int64_t heads = 1 + random.below(3), width = 1 + random.below(40), value_width = 1 + random.below(40);
  std::vector<int64_t> bounds{0};
  for (int64_t n = 1 + random.below(3); n > 0; n--) bounds.push_back(bounds.back() + random.below(70));
  bounds.shrink_to_fit();
  const int64_t sequences = static_cast<int64_t>(bounds.size()) - 1, rows = bounds.back() * heads;
  const int64_t keys = rows * width, values = rows * value_width, states = sequences * heads * width * value_width;
  const pyrepr::Gate gate = static_cast<pyrepr::Gate>(random.below(3));
  const int64_t gates = gate == pyrepr::Gate::per_key ? keys : gate == pyrepr::Gate::none ? 0 : rows;
  const auto filled = [&](int64_t size, double scale) {
    Buffer buffer(random, size, DType::f64);
    buffer.fill(random, DType::f64, scale, wild);
    return buffer;
  };
  const Buffer q = filled(keys, 0.5), k = filled(keys, 0.5), v = filled(values, 1.0), g = filled(gates, 0.1);
  const Buffer beta = filled(rows, 1.0), initial = filled(states, 1.0), grad_o = filled(values, 1.0),
               grad_state = filled(states, 1.0);
  pyrepr::cpu::DeltaRuleWide p{q.as<double>(),
                               k.as<double>(),
                               v.as<double>(),
                               gate == pyrepr::Gate::none ? nullptr : g.as<double>(),
                               random.chance(70) ? beta.as<double>() : nullptr,
                               random.chance(50) ? initial.as<double>() : nullptr,
                               heads,
                               width,
                               value_width,
                               bounds.data(),
                               sequences,
                               gate,
                               1,
                               nullptr,
                               false};
  const Buffer erase = filled(keys, 0.5);
  if (p.beta && random.chance(30)) {
    p.erase = erase.as<double>();
    p.undecayed = gate == pyrepr::Gate::per_head && random.chance(50);
  }
  const auto outputs = [&](std::initializer_list<int64_t> sizes) {
    std::vector<Buffer> out;
    for (int64_t size : sizes) out.emplace_back(random, size, DType::f64);
    return out;
  };
  same_bits(
      random, "delta_rule forward_wide", [&] { return outputs({values, states}); },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        return functions.forward_wide(p, out[0].as<double>(), out[1].as<double>());
      });
  same_bits(
      random, "delta_rule backward_wide",
      [&] {
        std::vector<Buffer> out = outputs({keys, keys, values, gates, p.beta ? rows : 0, states, p.erase ? keys : 0});
        std::memcpy(out[5].at(), grad_state.at(), static_cast<size_t>(grad_state.bytes()));
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        return functions.backward_wide(
            p, {grad_o.as<double>(), out[0].as<double>(), out[1].as<double>(), out[2].as<double>(), out[3].as<double>(),
                out[4].as<double>(), out[5].as<double>(), out[6].as<double>()});
      });
}

void activations(const pyrepr::cpu::DeltaRuleFunctions& functions, Random& random) {
  const bool wild = random.chance(20), with_g = random.chance(80), with_beta = !with_g || random.chance(60),
             bias = random.chance(50);
  const int64_t tokens = random.size(130), heads = 1 + random.below(4),
                width = random.chance(50) ? 1 : 1 + random.below(70);
  const DType g_dtype = random.pick({DType::f32, DType::bf16, DType::f16}),
              beta_dtype = random.pick({DType::f32, DType::bf16, DType::f16});
  Buffer g(random, tokens * heads * width, g_dtype), beta(random, tokens * heads, beta_dtype);
  Buffer rates(random, heads, DType::f32), dt_bias(random, heads * width, DType::f32);
  g.fill(random, g_dtype, 3.0, wild);
  beta.fill(random, beta_dtype, 3.0, wild);
  rates.fill(random, DType::f32, 1.0, false);
  dt_bias.fill(random, DType::f32, 1.0, false);
  pyrepr::cpu::DeltaRuleGates p{with_g ? g.at() : nullptr,
                                with_beta ? beta.at() : nullptr,
                                g_dtype,
                                beta_dtype,
                                rates.as<float>(),
                                bias ? dt_bias.as<float>() : nullptr,
                                -5.0f,
                                1.0f,
                                random.chance(30),
                                tokens,
                                heads,
                                width,
                                1};
  same_bits(
      random, "delta_rule activate",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, with_g ? tokens * heads * width : 0, DType::f32);
        out.emplace_back(random, with_beta ? tokens * heads : 0, DType::f32);
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        return functions.activate(p, with_g ? out[0].as<float>() : nullptr, with_beta ? out[1].as<float>() : nullptr);
      });
  const int64_t rows = tokens * heads;
  const DType dtype = random.pick({DType::f32, DType::bf16, DType::f16});
  Buffer x(random, rows * width, dtype), gate(random, rows * width, g_dtype), weight(random, width, DType::f32);
  x.fill(random, dtype, 1.0, wild);
  gate.fill(random, g_dtype, 3.0, wild);
  weight.fill(random, DType::f32, 1.0, false);
  pyrepr::cpu::GatedNorm norm{x.at(),
                              random.chance(80) ? gate.at() : nullptr,
                              dtype,
                              g_dtype,
                              random.chance(80) ? weight.as<float>() : nullptr,
                              rows,
                              width,
                              1e-6f,
                              random.chance(50),
                              1};
  same_bits(
      random, "delta_rule gated_norm",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, rows * width, dtype);
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        norm.threads = threads;
        return functions.gated_norm(norm, out[0].at());
      });
}

// A layer's token: the states of the convolutions and of the rule are written elsewhere.
void decoding(const pyrepr::cpu::DeltaRuleFunctions& functions, Random& random) {
  const bool wild = random.chance(10), pool = random.chance(40), sigmoid = random.chance(50);
  pyrepr::cpu::DeltaRuleDecode p{};
  p.batch = 1 + random.below(3);
  p.heads = 1 + random.below(3);
  p.value_heads = p.heads * (1 + random.below(2));
  p.width = 1 + random.below(random.chance(80) ? 40 : 140);
  p.value_width = 1 + random.below(random.chance(80) ? 40 : 140);
  p.taps = 1 + random.below(5);
  p.kept = p.taps - 1 + random.below(3);
  p.dtype = random.pick({DType::f32, DType::bf16, DType::f16});
  p.filter = random.chance(50) ? DType::f32 : p.dtype;
  p.scale = 0.5f;
  const int64_t rows = p.batch + (pool ? random.below(3) : 0), gates = p.batch * p.value_heads;
  std::vector<int64_t> places;
  for (int64_t i = 0; i < p.batch; i++) places.push_back(random.chance(20) ? -1 : rows - 1 - i);
  places.shrink_to_fit();
  p.rows = pool ? places.data() : nullptr;

  const int64_t keys = p.heads * p.width, values = p.value_heads * p.value_width;
  std::vector<Buffer> given;
  given.reserve(16);
  const auto tensor = [&](int64_t size, DType dtype, double scale) {
    given.emplace_back(random, size, dtype).fill(random, dtype, scale, wild);
    return given.back().at();
  };
  const bool biased = random.chance(50);
  for (auto [part, channels] : {std::pair(&p.q, keys), std::pair(&p.k, keys), std::pair(&p.v, values)})
    *part = {tensor(p.batch * channels, p.dtype, 1.0),
             tensor(channels * p.taps, p.filter, 1.0),
             biased ? tensor(channels, p.filter, 1.0) : nullptr,
             tensor(rows * channels * p.kept, p.dtype, 1.0),
             nullptr,
             channels,
             channels * p.kept,
             channels * p.kept};
  const DType dtype = random.pick({DType::f32, p.dtype});
  const char *const g = tensor(gates, dtype, 3.0), *const beta = tensor(gates, dtype, 3.0);
  const char *const rates = tensor(p.value_heads, DType::f32, 1.0), *const bias =
                                                                        tensor(p.value_heads, DType::f32, 1.0);
  p.gates = {g,
             beta,
             dtype,
             dtype,
             reinterpret_cast<const float*>(rates),
             reinterpret_cast<const float*>(bias),
             0,
             1,
             false,
             p.batch,
             p.value_heads,
             1,
             1};
  const char *const gate = tensor(p.batch * values, p.dtype, 3.0), *const weight =
                                                                       tensor(p.value_width, DType::f32, 1.0);
  p.norm = {nullptr,
            random.chance(80) ? gate : nullptr,
            p.dtype,
            p.dtype,
            reinterpret_cast<const float*>(weight),
            gates,
            p.value_width,
            1e-6f,
            !sigmoid,
            1};
  const int64_t all_states = rows * p.value_heads * p.width * p.value_width;
  p.initial = reinterpret_cast<const float*>(tensor(all_states, DType::f32, 1.0));
  same_bits(
      random, "delta_rule decode",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, p.batch * values, p.dtype);
        out.emplace_back(random, all_states, DType::f32);
        for (int64_t channels : {keys, keys, values}) out.emplace_back(random, rows * channels * p.kept, p.dtype);
        for (Buffer& buffer : out)
          std::memset(buffer.at(), 0, static_cast<size_t>(buffer.bytes()));  // rows that nobody has
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = p.gates.threads = p.norm.threads = threads;
        p.final = out[1].as<float>();
        p.q.to = out[2].at();
        p.k.to = out[3].at();
        p.v.to = out[4].at();
        return functions.decode(p, out[0].at());
      });
}

}  // namespace

void delta_rule(const pyrepr::cpu::Level& level, Random& random) {
  const pyrepr::cpu::DeltaRuleFunctions functions = level.delta_rule();
  wide(functions, random);
  activations(functions, random);
  decoding(functions, random);
  const bool packed = random.chance(30), wild = random.chance(10);
  DeltaRuleProblem p{};
  p.batch = packed ? 1 : 1 + random.below(3);
  p.total = random.chance(25) ? 1 : random.size(130);
  p.heads = 1 + random.below(3);
  p.value_heads = p.heads * (1 + random.below(2));
  p.width = 1 + random.below(random.chance(80) ? 40 : 140);
  p.value_width = 1 + random.below(random.chance(80) ? 40 : 140);
  p.dtype = random.pick({DType::f32, DType::bf16, DType::f16});
  if (random.chance(30)) {  // whole tiles
    p.width = 32 * (1 + random.below(4));
    p.value_width = 32 * (1 + random.below(3));
    p.dtype = DType::bf16;
  }
  const int gate = static_cast<int>(random.below(3));
  const bool per_key = gate == 2;
  p.gate = static_cast<pyrepr::Gate>(gate);
  p.l2norm = random.chance(50);
  p.scale = 0.5f;
  std::vector<int64_t> bounds{0};
  if (packed) {
    while (bounds.back() < p.total && random.chance(70))
      bounds.push_back(bounds.back() + random.below(p.total - bounds.back() + 1));
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
  Buffer g(random, per_key ? keys : gates, DType::f32), beta(random, gates, DType::f32),
      initial(random, all_states, DType::f32);
  g.fill(random, DType::f32, 0.1, wild);
  beta.fill(random, DType::f32, 1.0, wild);
  initial.fill(random, DType::f32, 1.0, wild);
  p.g = gate ? g.as<float>() : nullptr;
  p.beta = random.chance(75) ? beta.as<float>() : nullptr;  // null: nothing is erased
  p.initial = random.chance(50) ? initial.as<float>() : nullptr;
  p.erase_per_value = random.chance(50);
  Tokens apart{};
  const Buffer erase =
      tokens(random, apart, p.batch, p.total, p.erase_per_value ? p.value_heads : p.heads, p.width, p.dtype, 0.5, wild);
  if (p.beta && random.chance(30)) {
    p.erase = apart;
    p.undecayed = gate == 1 && random.chance(50);
  }

  const int64_t segment = 1 + random.below(3);
  int64_t slots = 0;
  for (int64_t i = 0; i < p.sequences; i++) {
    const int64_t length = packed ? bounds[static_cast<size_t>(i) + 1] - bounds[static_cast<size_t>(i)] : p.total;
    const int64_t chunks = (length + pyrepr::cpu::kDeltaChunk - 1) / pyrepr::cpu::kDeltaChunk;
    slots += (chunks + segment - 1) / segment;
  }
  // Behind the states of a row of the batch, at times, V' of its tokens.
  const bool solved = p.beta && random.chance(50);  // without an erase V' is V
  const int64_t states_of_row = slots / p.batch, row = states_of_row + (solved ? (p.total + p.width - 1) / p.width : 0);
  slots = p.batch * row;
  const auto states = [&](Buffer* kept) {
    return DeltaRuleStates{kept ? kept->as<float>() : nullptr, kept ? slots : 0, segment, row,
                           solved ? states_of_row : -1};
  };
  const auto results = [&](bool kept) {
    std::vector<Buffer> out;
    out.emplace_back(random, values, p.dtype);
    out.emplace_back(random, all_states, DType::f32);
    if (kept) out.emplace_back(random, slots * one_state, DType::f32);
    return out;
  };
  const auto forward = [&](int threads, std::vector<Buffer>& out) {
    p.threads = threads;
    return functions.forward(p, out[0].at(), out[1].as<float>(), states(out.size() > 2 ? &out[2] : nullptr));
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
        for (int64_t size : {keys, keys, values, per_key ? keys : gates, gates, all_states, p.apart() ? keys : 0})
          out.emplace_back(random, size, DType::f32);
        std::memcpy(out[5].at(), grad_state.at(), static_cast<size_t>(grad_state.bytes()));
        if (!gate) std::memset(out[3].at(), 0, static_cast<size_t>(out[3].bytes()));
        if (!p.beta) std::memset(out[4].at(), 0, static_cast<size_t>(out[4].bytes()));
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        const DeltaRuleGradients grads{grad_o.as<float>(), out[0].as<float>(), out[1].as<float>(), out[2].as<float>(),
                                       out[3].as<float>(), out[4].as<float>(), out[5].as<float>(), out[6].as<float>()};
        return functions.backward(p, states(&kept[2]), grads);
      });
}

}  // namespace driver
