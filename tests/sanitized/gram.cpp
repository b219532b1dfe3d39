#include "cpu/gram.h"

#include "cpu/hsic.h"
#include "driver.h"

namespace driver {
namespace {

using pyrepr::cpu::GramKernel;
using pyrepr::cpu::GramProblem;
using pyrepr::cpu::GramStats;

struct Layers {
  std::vector<Matrix> matrices;
  std::vector<View> views;
  std::vector<double> scale, offset, base;
  std::vector<int64_t> index;
  GramProblem problem;

  Layers(Random& random, int64_t count, int64_t rows, DType dtype, bool one_width, bool indexed) {
    const bool wild = random.chance(15);
    const int64_t width = random.size(150);
    for (int64_t i = 0; i < count; i++) {
      matrices.push_back(Matrix::random(random, rows, one_width ? width : random.size(150), dtype, false, 1.0, wild));
      views.push_back(matrices.back().view);
      scale.push_back(0.5 + static_cast<double>(random.below(4)));
      offset.push_back(static_cast<double>(random.below(3)));
      base.push_back(static_cast<double>(random.below(2)));
    }
    index.reserve(1);  // null would stand for all rows
    if (indexed)
      for (int64_t i = 0; i < rows; i++)
        if (random.chance(70)) index.push_back(i);
    problem = {views.data(),
               count,
               dtype,
               indexed ? index.data() : nullptr,
               indexed ? static_cast<int64_t>(index.size()) : rows,
               static_cast<GramKernel>(random.below(5)),
               scale.data(),
               offset.data(),
               base.data(),
               static_cast<int>(1 + random.below(4)),
               random.chance(70),
               1};
  }
};

DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace

void gram(const pyrepr::cpu::Level& level, Random& random) {
  const pyrepr::cpu::GramFunctions functions = level.gram();
  const pyrepr::cpu::MomentsFunctions moments = level.moments();
  const DType dtype = static_cast<DType>(random.below(4));
  Layers some(random, 1 + random.below(4), random.size(200), dtype, false, random.chance(20));
  GramProblem& p = some.problem;
  const bool by_features = random.chance(40), keep = !by_features && random.chance(30);
  if (by_features) p.kernel = GramKernel::linear;
  const bool shares = random.chance(40), crossed = by_features && (shares || random.chance(50)),
             moved = shares && p.kernel == GramKernel::linear;
  const int64_t split = by_features && p.count > 1 && random.chance(50) ? 1 : 0;
  int64_t products = 0;  // features of a times features of b of the pairs that are wanted
  for (int64_t a = 0; a < p.count; a++)
    for (int64_t b = a; b < p.count; b++)
      if (a == b || split == 0 || (a < split && b >= split)) products += p.layers[a].cols * p.layers[b].cols;
  same_bits(
      random, "gram stats",
      [&] {
        std::vector<Buffer> out;
        for (int64_t size : {p.count * p.count, p.count * p.n, p.count * p.n, p.count, p.count * p.n})
          out.emplace_back(random, size, DType::f64);
        if (keep) out.emplace_back(random, p.count * p.n * p.n, wide(dtype));
        if (shares) out.emplace_back(random, p.count * (p.count + 1) / 2 * p.n, DType::f64);
        if (moved) out.emplace_back(random, p.count * p.count * p.n, DType::f64);
        if (crossed) out.emplace_back(random, products, wide(dtype));
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        p.threads = threads;
        const GramStats stats{out[0].as<double>(),
                              out[1].as<double>(),
                              out[2].as<double>(),
                              out[3].as<double>(),
                              out[4].as<double>(),
                              keep ? out[5].at() : nullptr,
                              shares ? out[5 + keep].as<double>() : nullptr,
                              moved ? out[6 + keep].as<double>() : nullptr,
                              crossed ? out.back().at() : nullptr};
        return by_features ? moments.stats(p, split, stats) : functions.stats(p, stats);
      });

  // The values and their derivatives, of statistics of no problem in particular.
  const pyrepr::cpu::HsicRule rule{1 + random.below(4), 4 + random.size(100), random.chance(50), random.chance(50)};
  const int64_t table = rule.layers * rule.layers, lines = rule.layers * rule.n;
  Buffer s(random, table, DType::f64), norms(random, lines, DType::f64), grad(random, table, DType::f64);
  for (Buffer* each : {&s, &norms, &grad}) each->fill(random, DType::f64, 1.0, false);
  same_bits(
      random, "hsic",
      [&] {
        std::vector<Buffer> out;
        for (int64_t size : {table, table, lines}) out.emplace_back(random, size, DType::f64);
        out.emplace_back(random, rule.layers, DType::f32);
        return out;
      },
      [&](int, std::vector<Buffer>& out) {
        pyrepr::cpu::hsic_of(rule, {1e-7, 1e-5, 1e-10, 1e12}, s.as<double>(), norms.as<double>(), out[0].as<double>(),
                             out[3].as<int32_t>());
        pyrepr::cpu::hsic_slopes(rule, rule.layers / 2, s.as<double>(), norms.as<double>(), grad.as<double>(),
                                 out[1].as<double>(), out[2].as<double>());
        return Status::ok;
      });

  Layers pair(random, 1 + random.below(2), random.size(150), dtype, true, false);
  const Matrix other = Matrix::random(random, random.size(150), pair.views[0].cols, dtype, false, 1.0, false);
  if (pair.problem.count == 2) pair.views[1] = other.view;  // y may have another number of rows
  const int64_t rows = pair.views.front().rows, cols = pair.views.back().rows;
  const bool centre = random.chance(50);
  if (rows * cols)
    same_bits(
        random, "gram matrix",
        [&] {
          std::vector<Buffer> out;
          out.emplace_back(random, rows * cols, wide(dtype));
          return out;
        },
        [&](int threads, std::vector<Buffer>& out) {
          pair.problem.threads = threads;
          return functions.matrix(pair.problem, centre, out[0].at());
        });
  if (p.n >= 2)
    same_bits(
        random, "gram median",
        [&] {
          std::vector<Buffer> out;
          for (int64_t size : {p.count, p.count * p.n}) out.emplace_back(random, size, DType::f64);
          return out;
        },
        [&](int threads, std::vector<Buffer>& out) {
          p.threads = threads;
          return functions.median(p, out[0].as<double>(), out[1].as<double>());
        });

  const std::vector<int64_t> pairs{0, p.count - 1, 0, 0};
  Layers plain(random, p.count, random.size(100), dtype, false, false);
  same_bits(
      random, "gram moments",
      [&] {
        std::vector<Buffer> out;
        for (size_t i = 0; i < pairs.size(); i += 2) {
          out.emplace_back(
              random,
              plain.views[static_cast<size_t>(pairs[i])].cols * plain.views[static_cast<size_t>(pairs[i + 1])].cols,
              DType::f64);
          std::memset(out.back().at(), 0, static_cast<size_t>(out.back().bytes()));
        }
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        plain.problem.threads = threads;
        double* blocks[] = {out[0].as<double>(), out[1].as<double>()};
        return moments.moments(plain.problem, pairs.data(), 2, blocks);
      });

  Layers one(random, 1, random.size(100), dtype, false, false);
  const int64_t outputs = random.size(60);
  Buffer weights(random, outputs * one.problem.n, wide(dtype));
  weights.fill(random, wide(dtype), 1.0, false);
  same_bits(
      random, "gram apply",
      [&] {
        std::vector<Buffer> out;
        out.emplace_back(random, outputs * one.views[0].cols, wide(dtype));
        return out;
      },
      [&](int threads, std::vector<Buffer>& out) {
        one.problem.threads = threads;
        return functions.apply(one.problem, centre, weights.at(), outputs, out[0].at());
      });
}

}  // namespace driver
