#include "cpu/pairs_functions.h"
#include "driver.h"

namespace driver {

using pyrepr::cpu::LogSumExpGradients;
using pyrepr::cpu::LogSumExpResult;
using pyrepr::cpu::Metric;
using pyrepr::cpu::PairsProblem;
using pyrepr::cpu::TopkProblem;

void pairs(const pyrepr::cpu::Level& level, Random& random) {
  const pyrepr::cpu::PairsFunctions functions = level.pairs();
  const bool wild = random.chance(15);
  const DType dtype = random.pick({DType::f32, DType::bf16, DType::f16});
  const int64_t n = 1 + random.below(140), m = 1 + random.below(200), d = 1 + random.below(90);
  const Matrix x = Matrix::random(random, n, d, dtype, true, 1.0, wild),
               y = Matrix::random(random, m, d, dtype, true, 1.0, wild);
  TopkProblem top{};
  top.x = x.view;
  top.y = y.view;
  top.dtype = dtype;
  top.k = 1 + random.below(20);
  top.metric = static_cast<Metric>(random.below(3));
  top.exclude_self = random.chance(40);
  const bool sums = random.chance(50);
  same_bits(
      random, "pairs topk",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, n * top.k, DType::f32);
        out.emplace_back(random, n * top.k, DType::f64);  // 64-bit integers
        out.emplace_back(random, sums ? n : 0, DType::f32);
        for (int64_t i = 0; i < n * top.k; i++) {
          out[0].as<float>()[i] = -__builtin_inff();
          const int64_t none = -1;
          std::memcpy(out[1].at() + 8 * i, &none, 8);
        }
        for (int64_t i = 0; sums && i < n; i++) out[2].as<float>()[i] = -__builtin_inff();
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        top.threads = threads;
        top.values = out[0].as<float>();
        top.indices = out[1].as<int64_t>();
        top.logsumexp = sums ? out[2].as<float>() : nullptr;
        return functions.topk(top);
      });

  std::vector<int64_t> prefixes, labels;
  for (int64_t end = 1 + random.below(d); prefixes.size() < 3; end += 1 + random.below(d)) {
    prefixes.push_back(end < d ? end : d);
    if (end >= d) break;
  }
  for (int64_t i = 0; i < n; i++) labels.push_back(random.below(m));
  prefixes.shrink_to_fit();
  labels.shrink_to_fit();
  const int64_t count = static_cast<int64_t>(prefixes.size());
  const bool rows = random.chance(80), columns = !rows || random.chance(50), labelled = random.chance(60),
             keep = random.chance(50);
  PairsProblem p{
      x.view, y.view, dtype, prefixes.data(), count, labelled ? labels.data() : nullptr, 2.0, random.chance(50), 1};
  const auto made = [&] {
    std::vector<Buffer> out;
    for (int64_t size : {rows ? count * n : 0, columns ? count * m : 0, rows && labelled ? count * n : 0,
                         columns && labelled ? count * n : 0, keep ? count * n * m : 0})
      out.emplace_back(random, size, DType::f32);
    return out;
  };
  const auto forward = [&](int threads, std::vector<Buffer>& out) {
    p.threads = threads;
    const auto part = [&](size_t i) { return out[i].bytes() ? out[i].as<float>() : nullptr; };
    return functions.logsumexp(p, LogSumExpResult{part(0), part(1), part(2), part(3), part(4)});
  };
  same_bits(random, "pairs logsumexp", made, forward);
  std::vector<Buffer> kept = made();
  if (forward(2, kept) != Status::ok) die("pairs logsumexp", "out of memory");
  Buffer row_weights(random, count * n, DType::f32), column_weights(random, count * m, DType::f32),
      positive(random, count * n, DType::f32);
  row_weights.fill(random, DType::f32, 1.0, false);
  column_weights.fill(random, DType::f32, 1.0, false);
  positive.fill(random, DType::f32, 1.0, false);
  same_bits(
      random, "pairs logsumexp_backward",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, n * d, dtype);
        out.emplace_back(random, m * d, dtype);
        out.emplace_back(random, 1, DType::f32);
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        const LogSumExpGradients grads{rows ? kept[0].as<float>() : nullptr,
                                       columns ? kept[1].as<float>() : nullptr,
                                       keep ? kept[4].as<float>() : nullptr,
                                       rows ? row_weights.as<float>() : nullptr,
                                       columns ? column_weights.as<float>() : nullptr,
                                       labelled ? positive.as<float>() : nullptr,
                                       out[0].at(),
                                       out[1].at(),
                                       out[2].as<float>()};
        return functions.logsumexp_backward(p, grads);
      });

  // More rows than a stripe has, at times.
  const int64_t many = 1 + random.below(900);
  const Matrix tall = Matrix::random(random, many, d, dtype, true, 1.0, wild);
  std::vector<int64_t> positives;
  for (int64_t i = 0; i < many; i++) positives.push_back(random.below(m));
  positives.shrink_to_fit();
  const std::vector<double> weights(prefixes.size(), 0.5);
  p.x = tall.view;
  p.labels = positives.data();
  same_bits(
      random, "pairs row_loss",
      [&] {
        std::vector<Buffer> out;
        for (int64_t size : {int64_t(1), many * d, m * d, int64_t(1)}) out.emplace_back(random, size, DType::f32);
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        return functions.row_loss(p, pyrepr::cpu::RowLossResult{weights.data(), out[0].as<float>(), out[1].as<float>(),
                                                                out[2].as<float>(), out[3].as<float>()});
      });
}

}  // namespace driver
