// Runs every family of kernels for the CPU, at every level that this build and machine have, and compares with plain
// loops in double. Needs neither Python nor PyTorch: it is how code for another processor is checked in an emulator.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"

namespace {

using namespace pyrepr;
using namespace pyrepr::cpu;
using Doubles = std::vector<double>;

int failures = 0;

// Reproducible, about normal.
struct Random {
  uint64_t state = 88172645463325252u;
  double next() {
    double sum = -6;
    for (int i = 0; i < 12; i++) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      sum += static_cast<double>(state >> 11) * 0x1p-53;
    }
    return sum;
  }
};

template <class T>
std::vector<T> random(Random& random, size_t count, double scale = 1) {
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(scale * random.next());
  return values;
}

template <class T>
Doubles wide(const std::vector<T>& values) {
  return Doubles(values.begin(), values.end());
}

// The largest error, relative to the largest value, must be below `allowed`: two to five times the largest seen.
template <class T>
void compare(const char* level, const char* what, const std::vector<T>& found, const Doubles& truth, double allowed) {
  double error = found.size() == truth.size() ? 0 : HUGE_VAL, size = 0;
  for (size_t i = 0; i < truth.size() && error < HUGE_VAL; i++) {
    const double difference = std::fabs(static_cast<double>(found[i]) - truth[i]);
    error = difference >= 0 ? std::fmax(error, difference) : HUGE_VAL;  // NaN is no number that is close
    size = std::fmax(size, std::fabs(truth[i]));
  }
  const bool passed = error <= allowed * size;
  failures += !passed;
  std::printf("%-12s %-28s %8.1e %s\n", level, what, error / size, passed ? "" : "FAILED");
}

// The derivative of `loss` at a few of the values, by central differences.
Doubles slopes(Doubles& values, const std::vector<size_t>& at, const std::function<double()>& loss) {
  Doubles found;
  for (size_t i : at) {
    const double value = values[i], step = 1e-5;
    values[i] = value + step;
    const double above = loss();
    values[i] = value - step;
    found.push_back((above - loss()) / (2 * step));
    values[i] = value;
  }
  return found;
}

std::vector<size_t> some(size_t count) {
  std::vector<size_t> at;
  for (size_t i = 0; i < 9; i++) at.push_back(i * (count - 1) / 8);
  return at;
}

template <class T>
Doubles picked(const std::vector<T>& values, const std::vector<size_t>& at) {
  Doubles found;
  for (size_t i : at) found.push_back(static_cast<double>(values[i]));
  return found;
}

template <class T>
void check_gram(const Level& level, DType dtype, double allowed) {
  constexpr int64_t n = 83, m = 61, d = 401;  // no size is a multiple of a block's
  Random source;
  const std::vector<T> x = random<T>(source, n * d), y = random<T>(source, m * d);
  const double sigma = 20;
  Doubles linear, rbf, sums(n, 0.0), total(1, 0.0);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++) {
      double dot = 0, distance = 0;
      for (int64_t k = 0; k < d; k++) {
        const double a = x[i * d + k], b = y[j * d + k];
        dot += a * b, distance += (a - b) * (a - b);
      }
      linear.push_back(dot), rbf.push_back(std::exp(-distance / (2 * sigma * sigma)));
    }
  const View layers[2] = {{x.data(), n, d, d, 1}, {y.data(), m, d, d, 1}};
  const double scales[2] = {sigma, sigma}, zeros[2] = {0, 0};
  GramProblem problem{};
  problem.layers = layers, problem.count = 2, problem.dtype = dtype, problem.n = n, problem.threads = 2;
  problem.kernel = GramKernel::linear, problem.scale = scales, problem.offset = zeros, problem.base = zeros;
  problem.centre = true;
  std::vector<T> out(n * m);
  level.gram().matrix(problem, false, out.data());
  compare(level.name, "gram linear", out, linear, allowed);
  problem.kernel = GramKernel::rbf;
  level.gram().matrix(problem, false, out.data());
  compare(level.name, "gram rbf", out, rbf, allowed);

  problem.count = 1;  // S, the sum of squares off the diagonal, and the row sums, of the kernel minus `shift`
  Doubles s(1), r(n), diagonal(n), shift(1), norms(n);
  level.gram().stats(problem, {s.data(), r.data(), diagonal.data(), shift.data(), norms.data(), nullptr});
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) {
      double distance = 0;
      for (int64_t k = 0; k < d; k++) {
        const double difference = static_cast<double>(x[i * d + k]) - static_cast<double>(x[j * d + k]);
        distance += difference * difference;
      }
      const double value = std::exp(-distance / (2 * sigma * sigma)) - shift[0];
      if (i != j) total[0] += value * value, sums[i] += value;
    }
  compare(level.name, "gram statistics S", s, total, allowed);
  compare(level.name, "gram statistics R", r, sums, allowed);
}

struct Delta {
  static constexpr int64_t T = 75, H = 2, K = 20, V = 36;
  Doubles q, k, v, g, beta, weights;
  Doubles erase = {};  // what is read to be erased, before the decay; empty: along k, after it

  Doubles forward() const {
    Doubles out(T * H * V), state(K * V);
    for (int64_t h = 0; h < H; h++) {
      state.assign(K * V, 0);
      for (int64_t t = 0; t < T; t++) {
        const int64_t row = t * H + h;
        const double decay = std::exp(g[row]), seen = erase.empty() ? decay : 1;
        const Doubles& along = erase.empty() ? k : erase;
        for (int64_t c = 0; c < V; c++) {
          double there = 0;
          for (int64_t i = 0; i < K; i++) there += seen * state[i * V + c] * along[row * K + i];
          const double change = beta[row] * (v[row * V + c] - there);
          double read = 0;
          for (int64_t i = 0; i < K; i++) {
            state[i * V + c] = decay * state[i * V + c] + k[row * K + i] * change;
            read += state[i * V + c] * q[row * K + i];
          }
          out[row * V + c] = read;
        }
      }
    }
    return out;
  }
  double loss() const {
    const Doubles out = forward();
    double sum = 0;
    for (size_t i = 0; i < out.size(); i++) sum += out[i] * weights[i];
    return sum;
  }
};

void check_delta_rule(const Level& level, bool apart) {
  constexpr int64_t T = Delta::T, H = Delta::H, K = Delta::K, V = Delta::V,
                    chunks = (T + kDeltaChunk - 1) / kDeltaChunk;
  Random source;
  std::vector<float> q = random<float>(source, T * H * K, 0.2), k = random<float>(source, T * H * K, 0.2);
  std::vector<float> v = random<float>(source, T * H * V), g = random<float>(source, T * H, 0.1);
  std::vector<float> beta = random<float>(source, T * H, 0.2), grad = random<float>(source, T * H * V);
  for (float& value : g) value = -std::fabs(value);
  for (float& value : beta) value = 0.5f + 0.5f * std::tanh(value);
  std::vector<float> erase = random<float>(source, apart ? T * H * K : 0, 0.2);
  Delta truth{wide(q), wide(k), wide(v), wide(g), wide(beta), wide(grad), wide(erase)};

  DeltaRuleProblem problem{};
  problem.q = {q.data(), T * H * K, H * K, K}, problem.k = {k.data(), T * H * K, H * K, K};
  problem.v = {v.data(), T * H * V, H * V, V};
  if (apart) problem.erase = {erase.data(), T * H * K, H * K, K}, problem.undecayed = true;
  problem.g = g.data(), problem.gate = Gate::per_head, problem.beta = beta.data();
  problem.batch = 1, problem.total = T, problem.heads = H, problem.width = K;
  problem.value_heads = H, problem.value_width = V, problem.sequences = 1;
  problem.dtype = DType::f32, problem.scale = 1, problem.threads = 2;
  std::vector<float> out(T * H * V), final(H * K * V), states(chunks * H * K * V), state(H * K * V);
  const DeltaRuleStates kept{states.data(), chunks, 1, chunks, -1};
  level.delta_rule().forward(problem, out.data(), final.data(), kept);
  compare(level.name, "delta rule", out, truth.forward(), 1e-6);

  std::vector<float> dq(q.size()), dk(k.size()), dv(v.size()), dg(g.size()), db(beta.size()), de(erase.size());
  level.delta_rule().backward(
      problem, kept, {grad.data(), dq.data(), dk.data(), dv.data(), dg.data(), db.data(), state.data(), de.data()});
  const auto check = [&](const char* what, Doubles& values, const std::vector<float>& found) {
    const std::vector<size_t> at = some(values.size());
    compare(level.name, what, picked(found, at), slopes(values, at, [&] { return truth.loss(); }), 2e-6);
  };
  check("delta rule, derivative of q", truth.q, dq);
  check("delta rule, of k", truth.k, dk);
  check("delta rule, of v", truth.v, dv);
  check("delta rule, of g", truth.g, dg);
  check("delta rule, of beta", truth.beta, db);
  if (apart) check("delta rule, of what the erase reads along", truth.erase, de);
}

void check_causal_conv1d(const Level& level) {
  constexpr int64_t T = 50, D = 39, W = 4;
  Random source;
  const std::vector<float> x = random<float>(source, T * D), weight = random<float>(source, D * W);
  const std::vector<float> bias = random<float>(source, D), grad = random<float>(source, T * D);
  Doubles wide_x = wide(x), wide_weight = wide(weight);
  const auto forward = [&] {
    Doubles out(T * D);
    for (int64_t t = 0; t < T; t++)
      for (int64_t d = 0; d < D; d++) {
        double y = bias[d];
        for (int64_t j = 0; j < W; j++)
          if (t - W + 1 + j >= 0) y += wide_weight[d * W + j] * wide_x[(t - W + 1 + j) * D + d];
        out[t * D + d] = y / (1 + std::exp(-y));
      }
    return out;
  };
  const auto loss = [&] {
    const Doubles out = forward();
    double sum = 0;
    for (size_t i = 0; i < out.size(); i++) sum += out[i] * grad[i];
    return sum;
  };
  const int64_t bounds[2] = {0, T};
  const CausalConvProblem problem{x.data(), T * D, D, 1, weight.data(), bias.data(), nullptr, bounds,
                                  1,        T,     D, W, DType::f32,    DType::f32,  true,    2};
  std::vector<float> out(T * D), dx(T * D), dweight(D * W), dbias(D);
  level.causal_conv1d().forward(problem, out.data());
  compare(level.name, "convolution", out, forward(), 1e-6);
  level.causal_conv1d().backward(problem, {grad.data(), dx.data(), dweight.data(), dbias.data(), nullptr});
  const std::vector<size_t> at = some(x.size()), taps = some(weight.size());
  compare(level.name, "convolution, derivative of x", picked(dx, at), slopes(wide_x, at, loss), 1e-6);
  compare(level.name, "convolution, of the weight", picked(dweight, taps), slopes(wide_weight, taps, loss), 1e-6);
}

void check_lookup(const Level& level) {
  constexpr int64_t T = 37, bits = 5, K = 6, d = bits * K, n = 1 << bits, h = 101;
  Random source;
  const std::vector<float> x = random<float>(source, T * d), table = random<float>(source, K * n * h);
  const std::vector<float> bias = random<float>(source, h), scales(K * n, 0.02f);
  std::vector<int8_t> bytes(table.size());
  for (size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<int8_t>(std::lround(20 * std::tanh(table[i])));
  Doubles sums(T * h), byte_sums(T * h);
  for (int64_t t = 0; t < T; t++)
    for (int64_t c = 0; c < h; c++) {
      sums[t * h + c] = byte_sums[t * h + c] = bias[c];
      for (int64_t k = 0; k < K; k++) {
        int64_t code = 0;
        double weight = 1;
        for (int64_t i = 0; i < bits; i++) {
          const double z = x[t * d + k * bits + i];
          code |= static_cast<int64_t>(z >= 0) << i;
          weight /= 1 + std::exp(-2 * std::fabs(z));
        }
        const int64_t at = (k * n + code) * h + c;
        sums[t * h + c] += weight * table[at];
        byte_sums[t * h + c] += weight * bytes[at] * scales[k * n + code];
      }
    }
  const LookupHash hash{{x.data(), T, d, d, 1}, DType::f32, bits, Weighting::probability, 1, 2};
  std::vector<float> out(T * h);
  for (const LookupRoute route : {LookupRoute::rows, LookupRoute::stream, LookupRoute::registers}) {
    const LookupTables floats{table.data(), TableType::f32, nullptr, K, n, h, false, 2};
    level.lookup().linear(floats, hash, {}, bias.data(), route, out.data());
    compare(level.name, "lookup", out, sums, 1e-6);
    const LookupTables quantised{bytes.data(), TableType::i8, scales.data(), K, n, h, false, 2};
    level.lookup().linear(quantised, hash, {}, bias.data(), route, out.data());
    compare(level.name, "lookup int8", out, byte_sums, 1e-5);
  }
}

// A name that is no level's, and levels that are not to be had here, are told apart.
void check_refusals() {
  const auto refused = [](const char* name) {
    try {
      choose_level(name);
    } catch (const std::invalid_argument&) {
      return 'u';
    } catch (const std::runtime_error& error) {
      return std::strstr(error.what(), "it must be one of baseline") ? 'l' : '?';
    }
    return '-';
  };
  for (const char* name : {"sse9", "baseline", "avx2", "avx512", "avx512_bf16", "amx"}) {
    char expected = std::strcmp(name, "sse9") ? 'l' : 'u';
    for (const Level& level : levels())
      if (level.supported && !std::strcmp(level.name, name)) expected = '-';
    const char found = refused(name);
    failures += found != expected;
    std::printf("%-12s as a choice: %c %s\n", name, found, found == expected ? "" : "FAILED");
  }
}

}  // namespace

int main() {
  check_refusals();
  for (const Level& level : levels()) {
    if (!level.supported) continue;
    check_gram<float>(level, DType::f32, 2e-6);
    check_gram<double>(level, DType::f64, 1e-14);
    check_delta_rule(level, false);
    check_delta_rule(level, true);
    check_causal_conv1d(level);
    check_lookup(level);
    if (!(level.probe().micro_kernel(2, 0.01) > 0)) failures++, std::printf("%s: no micro-kernel\n", level.name);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
