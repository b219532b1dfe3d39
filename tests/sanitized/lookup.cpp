#include "cpu/lookup.h"

#include "driver.h"

namespace driver {
namespace {

using pyrepr::cpu::Hash;
using pyrepr::cpu::LookupHash;
using pyrepr::cpu::LookupLowRank;
using pyrepr::cpu::LookupRoute;
using pyrepr::cpu::LookupSigns;
using pyrepr::cpu::LookupTables;
using pyrepr::cpu::TableType;
using pyrepr::cpu::Weighting;

DType stored(TableType type) { return static_cast<DType>(type); }

}  // namespace

void lookup(const pyrepr::cpu::Level& level, Random& random) {
  const pyrepr::cpu::LookupFunctions functions = level.lookup();
  const bool wild = random.chance(20);
  const TableType type = static_cast<TableType>(random.below(5));
  const DType dtype = type == TableType::f64 ? DType::f64 : random.pick({DType::f32, DType::bf16, DType::f16});
  const DType wide = type == TableType::f64 ? DType::f64 : DType::f32;
  const bool two_bit = random.chance(25), standardised = random.chance(30);
  const int64_t bits = two_bit ? 2 * (1 + random.below(3)) : 1 + random.below(random.chance(85) ? 6 : 10);
  const int64_t K = 1 + random.below(7), n = int64_t(1) << bits, d = K * bits / (two_bit ? 2 : 1);
  const bool packed = random.chance(30);
  const int64_t h = packed ? 64 * (1 + random.below(2)) : 1 + random.below(150),
                T = random.chance(30) ? 1 : 1 + random.below(random.chance(90) ? 70 : 600);
  LookupTables tables{nullptr, type, nullptr, K, n, h, packed, 1};
  Buffer entries(random, type == TableType::i8 ? (K * n * h + 1) / 2 : K * n * h,
                 type == TableType::i8 ? DType::bf16 : stored(type));
  std::vector<int8_t> bytes;
  if (type == TableType::i8) {
    for (int64_t i = 0; i < K * n * h; i++) bytes.push_back(static_cast<int8_t>(random.below(255) - 127));
    bytes.shrink_to_fit();
    tables.data = bytes.data();
  } else {
    entries.fill(random, stored(type), 1.0, wild);
    tables.data = entries.at();
  }
  Buffer scales(random, K * n, DType::f32), bias(random, h, wide);
  scales.fill(random, DType::f32, 0.1, false);
  bias.fill(random, wide, 1.0, false);
  if (type == TableType::i8) tables.scales = scales.as<float>();
  const Matrix x = Matrix::random(random, T, d, dtype, true, 1.0, wild);
  Buffer centre(random, d, wide), scale(random, d, wide);
  centre.fill(random, wide, 1.0, wild);
  scale.fill(random, wide, 1.0, wild);
  LookupHash hash{x.view,
                  dtype,
                  bits,
                  static_cast<Weighting>(random.below(4)),
                  1.0,
                  1,
                  two_bit ? Hash::two_bit : Hash::one_bit,
                  standardised ? centre.at() : nullptr,
                  standardised ? scale.at() : nullptr};
  const int64_t rank = random.chance(30) ? 1 + random.below(9) : 0;
  Buffer down(random, rank * d, wide), up(random, rank * h, wide);
  down.fill(random, wide, 1.0, wild);
  up.fill(random, wide, 1.0, wild);
  const LookupLowRank low{rank, rank ? down.at() : nullptr, rank ? up.at() : nullptr};
  const LookupRoute route = static_cast<LookupRoute>(random.below(5));
  const bool with_bias = random.chance(50);

  const auto outputs = [&](std::initializer_list<std::pair<int64_t, DType>> sizes) {
    std::vector<Buffer> out;
    for (const auto& [size, kind] : sizes) out.emplace_back(random, size, kind);
    return out;
  };
  const auto on = [&](int threads) { hash.threads = tables.threads = threads; };
  same_bits(
      random, "lookup linear", [&] { return outputs({{T * h, wide}}); },
      [&](int threads, std::vector<Buffer>& out) {
        on(threads);
        return functions.linear(tables, hash, low, with_bias ? bias.at() : nullptr, route, out[0].at());
      });
  if (wide == DType::f32 && bits <= 8) {
    std::vector<int8_t> weight;
    for (int64_t i = 0; i < h * K * bits; i++) weight.push_back(static_cast<int8_t>(random.below(256) - 128));
    weight.shrink_to_fit();
    Buffer by(random, h, DType::f32);
    by.fill(random, DType::f32, 0.1, false);
    LookupHash plain = hash;
    plain.weighting = Weighting::none;
    same_bits(
        random, "sign linear", [&] { return outputs({{T * h, wide}}); },
        [&](int threads, std::vector<Buffer>& out) {
          plain.threads = threads;
          const LookupSigns signs{weight.data(), by.as<float>(), h, K * bits, threads};
          return functions.signs(signs, plain, low, with_bias ? bias.as<float>() : nullptr, out[0].as<float>());
        });
  }
  std::vector<Buffer> hashed = outputs({{T * K, DType::f32}, {T * K, wide}});
  if (functions.hash(hash, hashed[0].as<int32_t>(), hashed[1].at()) != Status::ok) die("lookup hash", "out of memory");
  const int32_t* const codes = hashed[0].as<int32_t>();
  for (int64_t i = 0; i < T * K; i++)
    if (codes[i] < 0 || codes[i] >= n) die("lookup hash", "a code is out of range");
  same_bits(
      random, "lookup sum", [&] { return outputs({{T * h, wide}}); },
      [&](int threads, std::vector<Buffer>& out) {
        on(threads);
        return functions.sum(tables, T, codes, hashed[1].at(), route, out[0].at());
      });
  Buffer slopes(random, T * K, wide);
  slopes.fill(random, wide, 1.0, wild);
  same_bits(
      random, "lookup hash_backward", [&] { return outputs({{T * d, wide}}); },
      [&](int threads, std::vector<Buffer>& out) {
        on(threads);
        return functions.hash_backward(hash, slopes.at(), out[0].at());
      });

  LookupTables plain = tables;
  if (packed) plain.packed = false;  // the backward takes plain tables; these hold as many entries
  const Matrix grad = Matrix::random(random, T, h, wide, true, 1.0, wild);
  std::vector<int64_t> first;
  const bool some_rows = random.chance(40), want_dots = random.chance(70);
  int64_t rows = K * n;
  if (some_rows) {  // where the rows of table k that occur begin
    rows = 0;
    for (int64_t k = 0; k < K; k++) {
      first.push_back(rows);
      std::vector<bool> seen(static_cast<size_t>(n), false);
      for (int64_t t = 0; t < T; t++) seen[static_cast<size_t>(codes[t * K + k])] = true;
      for (bool one : seen) rows += one;
    }
    first.push_back(rows);
    first.shrink_to_fit();
  }
  same_bits(
      random, "lookup backward", [&] { return outputs({{rows * h, wide}, {want_dots ? T * K : 0, wide}}); },
      [&](int threads, std::vector<Buffer>& out) {
        plain.threads = threads;
        return functions.backward(plain, grad.view, codes, hashed[1].at(), some_rows ? first.data() : nullptr,
                                  out[0].at(), want_dots ? out[1].at() : nullptr);
      });
}

}  // namespace driver
