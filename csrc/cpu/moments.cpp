// Products of features on the CPU, compiled once per instruction set (PYREPR_LEVEL): n D^2 multiply-adds, half of them
// by symmetry, in gemm.h's micro-kernel. Determinism: see pairs.h.
#include "cpu/moments.h"

#include "cpu/pairs.h"
#include "cpu/shares.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

template <class S>
class Moments {
 public:
  using T = typename S::T;

  static Status stats(const GramProblem& p, int64_t split, const GramStats& out) {
    constexpr int64_t slots = 1024;
    const Prepared<S> prepared(p, true);
    const Memory memory(p.count * p.count * 16), values(slots * 8);
    if (!prepared.ok() || !memory.ok() || !values.ok()) return Status::out_of_memory;
    prepared.norms(out.norms);
    std::memcpy(out.d, out.norms, static_cast<size_t>(p.count * p.n) * sizeof(double));
    int64_t* const pairs = memory.as<int64_t>();
    int64_t pair_count = 0;
    for (int64_t a = 0; a < p.count; a++)
      for (int64_t b = a; b < p.count; b++) {
        out.s[a * p.count + b] = out.s[b * p.count + a] = __builtin_nan("");
        if (split > 0 && a != b && !(a < split && b >= split)) continue;
        pairs[2 * pair_count] = a;
        pairs[2 * pair_count + 1] = b;
        pair_count++;
        out.s[a * p.count + b] = 0;
      }
    const Crosses<T> crosses(p, pairs, pair_count, out.cross);
    if (!crosses.ok()) return Status::out_of_memory;
    crosses.clear();
    const Status status = for_each_tile<T>(
        walk(p, pair_count, slots), p.threads,
        [&](int64_t pair, int64_t) { return product(p, prepared, pairs + 2 * pair); },
        [&](const Tile<T>& tile, int64_t pair, int64_t, int64_t slot) {
          crosses.keep(tile, pair);
          values.as<double>()[slot] = sum_of_squares(tile, pairs[2 * pair] == pairs[2 * pair + 1]);
        },
        [&](const Span&, int64_t pair, int64_t slot) {
          out.s[pairs[2 * pair] * p.count + pairs[2 * pair + 1]] += values.as<double>()[slot];
        });
    for (int64_t a = 0; a < p.count; a++)
      for (int64_t b = a; b < p.count; b++) {
        double qq = 0;
        for (int64_t i = 0; i < p.n; i++) qq += out.d[a * p.n + i] * out.d[b * p.n + i];
        out.s[b * p.count + a] = out.s[a * p.count + b] -= qq;
      }
    for (int64_t l = 0; l < p.count; l++) out.shift[l] = 0;
    for (int64_t i = 0; i < p.count * p.n; i++) out.r[i] = -out.d[i];  // centred rows add up to zero
    if (status != Status::ok || !out.p) return status;
    const Status moved = move_rows(p, prepared, out.norms, out.moved);
    if (moved != Status::ok) return moved;
    return share_by_features(p, prepared, pairs, pair_count, crosses, out.norms, out.p);
  }

  static Status moments(const GramProblem& p, const int64_t* pairs, int64_t pair_count, double* const* blocks) {
    const Prepared<S> prepared(p, false);
    if (!prepared.ok()) return Status::out_of_memory;
    return for_each_tile<T>(
        walk(p, pair_count, 0), p.threads,
        [&](int64_t pair, int64_t) { return product(p, prepared, pairs + 2 * pair); },
        [&](const Tile<T>& tile, int64_t pair, int64_t, int64_t) {
          const Span& at = tile.at;
          const bool same = pairs[2 * pair] == pairs[2 * pair + 1];
          const int64_t width = p.layers[pairs[2 * pair + 1]].cols;
          for (int64_t i = 0; i < at.rows; i++) {
            double* const row = blocks[pair] + (at.r0 + i) * width + at.c0;
            for (int64_t j = same ? larger<int64_t>(0, at.r0 + i - at.c0) : 0; j < at.cols; j++)
              row[j] += tile.row(i)[j];
          }
        });
  }

 private:
  // Without slots nothing is added up over tiles: no bit depends on their shape, so they are as large as threads allow.
  static Walk walk(const GramProblem& p, int64_t pair_count, int64_t slots) {
    constexpr int64_t kTilesPerThread = 4;
    int64_t widest = 1;
    for (int64_t l = 0; l < p.count; l++) widest = larger(widest, p.layers[l].cols);
    const int64_t fewer = slots ? 1 : larger<int64_t>(1, kMinTiles / (kTilesPerThread * p.threads));
    const TileShape shape(widest, widest, Block<T>::MR, Block<T>::NR, 1, sizeof(T), pair_count * fewer);
    return {shape, pair_count, 1, slots, p.n};
  }

  // X_a^T X_b for (a, b) = pair.
  static Product<S, S> product(const GramProblem& p, const Prepared<S>& prepared, const int64_t* pair) {
    const int64_t a = pair[0], b = pair[1];
    return {prepared.features(a), prepared.features(b), p.layers[a].cols, p.layers[b].cols, p.n, a == b};
  }

  // Of a product of a layer with itself only the entries on and above the diagonal are there; all are counted.
  static double sum_of_squares(const Tile<T>& tile, bool same) {
    const Span& at = tile.at;
    double diagonal = 0, inner = 0;
    for (int64_t i = larger(at.r0, at.c0); same && i < smaller(at.r0 + at.rows, at.c0 + at.cols); i++) {
      const double x = tile.row(i - at.r0)[i - at.c0];
      diagonal += x * x;
    }
    drop_uncounted(tile, same);
    inner_products(tile.data, 1, 0, at.rows * tile.ldc, &inner);
    return same ? diagonal + 2 * inner : inner;
  }
};

Status stats(const GramProblem& p, int64_t split, const GramStats& out) {
  return by_dtype(p.dtype, [&](auto s) { return Moments<decltype(s)>::stats(p, split, out); });
}
Status moments(const GramProblem& p, const int64_t* pairs, int64_t pair_count, double* const* blocks) {
  return by_dtype(p.dtype, [&](auto s) { return Moments<decltype(s)>::moments(p, pairs, pair_count, blocks); });
}

}  // namespace

MomentsFunctions moments_functions() { return {stats, moments}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
