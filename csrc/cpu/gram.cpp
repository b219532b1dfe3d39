// Family `gram` on the CPU, compiled once per instruction set (PYREPR_LEVEL). The maths is in gram.h.
//
// Work, at best: stats n^2 D + n^2 M^2 / 2 flops on n D elements read (n / 224 + n / 896) / 2 times (from L3 or
// memory); matrix 2 n m d; apply 2 n m d. All of it runs in gemm.h's micro-kernel. Determinism: see pairs.h.
#include "cpu/gram.h"

#include "cpu/pairs.h"
#include "cpu/shares.h"
#if defined(PYREPR_LEVEL_avx512_bf16)
#include "cpu/gram_pairs.h"
#endif

namespace pyrepr::cpu::avx512 {
GramFunctions gram_functions();
}

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kWaveMemory = int64_t(16) << 20;  // bytes of results that may wait for their turn to be added up

// Writes a tile to its place in out [n, m].
template <class T>
void copy_out(const Tile<T>& tile, int64_t m, T* out) {
  const Span& at = tile.at;
  for (int64_t i = 0; i < at.rows; i++)
    std::memcpy(out + (at.r0 + i) * m + at.c0, tile.row(i), static_cast<size_t>(at.cols) * sizeof(T));
}

// Writes the entries on and above the diagonal to out [n, n], and their mirror image.
template <class T>
void keep(const Tile<T>& tile, int64_t n, T* out) {
  const Span& at = tile.at;
  for (int64_t i = 0; i < at.rows; i++) {
    const int64_t from = smaller(at.cols, larger<int64_t>(0, at.r0 + i - at.c0));
    std::memcpy(out + (at.r0 + i) * n + at.c0 + from, tile.row(i) + from,
                static_cast<size_t>(at.cols - from) * sizeof(T));
  }
  constexpr int64_t strip = 16;  // columns at a time, so that the mirrored rows stay in L1
  for (int64_t j0 = 0; j0 < at.cols; j0 += strip)
    for (int64_t i = 0; i < at.rows; i++)
      for (int64_t j = larger(j0, at.r0 + i - at.c0); j < smaller(at.cols, j0 + strip); j++)
        out[(at.c0 + j) * n + at.r0 + i] = tile.row(i)[j];
}

template <class T>
void row_and_column_sums(const Tile<T>& tile, double* row_sums, double* col_sums) {
  constexpr int W = Lanes<T>::W;
  for (int64_t i = 0; i < tile.at.rows; i++) {
    Vec<T> sum{};
    for (int64_t j = 0; j < tile.ldc; j += W) sum += load<T>(tile.row(i) + j);
    row_sums[i] = lane_sum<T>(sum);
  }
  for (int64_t j = 0; j < tile.ldc; j += W) {
    Vec<T> sum{};
    for (int64_t i = 0; i < tile.at.rows; i++) sum += load<T>(tile.row(i) + j);
    for (int w = 0; w < W; w++) col_sums[j + w] = static_cast<double>(sum[w]);
  }
}

// Adds the same sums of the products of two layers' tiles: of a block of them, of `rows` rows and `vectors` vectors.
constexpr int64_t kBlockRows = 32, kBlockVectors = 16;
template <class T>
void row_and_column_products(const T* x, const T* y, int64_t ldc, int64_t rows, int64_t vectors, double* row_sums,
                             double* col_sums) {
  constexpr int W = Lanes<T>::W, strip = 4;  // vectors whose columns' sums stay in registers
  Vec<T> row[kBlockRows] = {};
  for (int64_t j = 0; j < vectors; j += strip) {
    const auto width = static_cast<int>(smaller<int64_t>(strip, vectors - j));
    Vec<T> sum[strip] = {};
    for (int64_t i = 0; i < rows; i++)
#pragma GCC unroll 4
      for (int v = 0; v < strip; v++) {
        if (v >= width) break;
        const Vec<T> left = load<T>(x + i * ldc + (j + v) * W), right = load<T>(y + i * ldc + (j + v) * W);
        sum[v] += left * right;
        row[i] += left * right;
      }
    for (int v = 0; v < width; v++)
      for (int w = 0; w < W; w++) col_sums[(j + v) * W + w] += static_cast<double>(sum[v][w]);
  }
  for (int64_t i = 0; i < rows; i += W) {
    Vec<T> lanes[W];
    for (int w = 0; w < W; w++) lanes[w] = row[i + w];
    transpose_registers<T>(lanes);
    for (int w = 1; w < W; w++) lanes[0] += lanes[w];
    for (int w = 0; w < W && i + w < rows; w++) row_sums[i + w] += static_cast<double>(lanes[0][w]);
  }
}

// The sums of all pairs of layers, whose tiles are `size` elements apart: row sums [rows] and column sums [ldc] of one
// pair after the other, `lines` apart. Blocks of all layers stay in L2.
template <class T>
void products_of_pairs(const T* tiles, int64_t layers, int64_t size, const Tile<T>& tile, int64_t shape_rows,
                       int64_t lines, double* sums) {
  constexpr int W = Lanes<T>::W;
  zero(sums, layers * (layers + 1) / 2 * lines);
  for (int64_t i = 0; i < tile.at.rows; i += kBlockRows)
    for (int64_t j = 0; j < tile.ldc; j += kBlockVectors * W) {
      double* of = sums;
      for (int64_t a = 0; a < layers; a++)
        for (int64_t b = a; b < layers; b++, of += lines)
          row_and_column_products(tiles + a * size + i * tile.ldc + j, tiles + b * size + i * tile.ldc + j, tile.ldc,
                                  smaller(kBlockRows, tile.at.rows - i), smaller(kBlockVectors, (tile.ldc - j) / W),
                                  of + i, of + shape_rows + j);
    }
}

// What follows depends on how elements are computed with and not on how they are stored, and is made once for all
// dtypes that are stored: with seven kernels inlined, it is much code.
template <class T>
__attribute__((noinline)) void to_kernel(const GramProblem& p, int64_t l, const Tile<T>& tile, const double* q_rows,
                                         const double* q_cols, double shift) {
  with_kernel<T>(p, l, [&](auto k) { apply_kernel(k, tile, q_rows, q_cols, static_cast<T>(shift)); });
}

constexpr int64_t kMeanPairs = 1024;  // (i, i + n/2) whose mean stands for the mean over all, and is always the same
inline int64_t mean_pairs(const GramProblem& p) { return p.n < 2 ? 0 : smaller(p.n, kMeanPairs); }
inline int64_t pair_first(const GramProblem& p, int64_t t) { return t * p.n / mean_pairs(p); }
inline int64_t pair_second(const GramProblem& p, int64_t t) { return (pair_first(p, t) + p.n / 2) % p.n; }

// The mean of the kernel over those pairs, of their inner products.
template <class T>
__attribute__((noinline)) double mean_kernel(const GramProblem& p, int64_t l, const T* dots, const double* q) {
  double sum = 0;
  with_kernel<T>(p, l, [&](auto k) {
    for (int64_t t = 0; t < mean_pairs(p); t++) {
      const double q_i = k.norm(q[pair_first(p, t)]), q_j = k.norm(q[pair_second(p, t)]);
      sum += rounded<T>(k(splat<T>(dots[t]), static_cast<T>(q_i), splat<T>(static_cast<T>(q_j))))[0];
    }
  });
  return p.n < 2 ? 0 : sum / static_cast<double>(mean_pairs(p));
}

// Turns the squared norms in d into the kernel's diagonal, and gives a linear kernel its row sums: centred rows add
// up to zero, so the sum over j != i is minus the diagonal.
template <class T>
__attribute__((noinline)) void finish(const GramProblem& p, const GramStats& out) {
  for (int64_t l = 0; l < p.count; l++)
    with_kernel<T>(p, l, [&](auto k) {
      for (int64_t i = l * p.n; i < (l + 1) * p.n; i++) {
        if (p.kernel == GramKernel::linear) out.r[i] = -out.d[i] - out.shift[l] * static_cast<double>(p.n - 1);
        out.d[i] = k.diagonal(out.d[i]) - out.shift[l];
      }
    });
}

constexpr int64_t kBins = 65536;

template <class T>
double squared_distance(T dot, double q_i, double q_j) {
  const double d = q_i + q_j - 2 * static_cast<double>(dot);
  return d < 0 ? 0 : d;
}
template <class T>
double from_bits(uint64_t u) {
  T value;
  std::memcpy(&value, &u, sizeof value);
  return static_cast<double>(value);
}

// bins [2, kBins]: how many of the squared distances above the diagonal that begin with `prefix` go on with each 16
// bits; of two that are the same, only the first are counted.
template <class T>
__attribute__((noinline)) void count_distances(const Tile<T>& tile, const double* q, int shift, const uint64_t* prefix,
                                               int64_t* bins) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const Span& at = tile.at;
  const uint64_t first = prefix[0], second = prefix[1];
  T distances[kTileCols];
  for (int64_t i = 0; i < at.rows; i++) {
    const int64_t j0 = larger<int64_t>(0, at.r0 + i + 1 - at.c0);
    const T* const row = tile.row(i);
    for (int64_t j = j0; j < at.cols; j++)
      distances[j] = static_cast<T>(squared_distance(row[j], q[at.r0 + i], q[at.c0 + j]));
    for (int64_t j = j0; j < at.cols; j++) {
      Bits bits;
      std::memcpy(&bits, distances + j, sizeof bits);
      const uint64_t key = uint64_t(bits) >> shift;
      if (key >> 16 == first) bins[key & 0xffff]++;
      if (first != second && key >> 16 == second) bins[kBins + (key & 0xffff)]++;
    }
  }
}

template <class S>
class Gram {
 public:
  using T = typename S::T;
  static constexpr int MR = Block<T>::MR;
  static constexpr int NR = Block<T>::NR;

  static Status stats(const GramProblem& p, const GramStats& out) {
    const Prepared<S> prepared(p, p.centre && shift_invariant(p.kernel));
    if (!prepared.ok()) return Status::out_of_memory;
    const bool linear = p.kernel == GramKernel::linear;
    prepared.norms(out.norms);
    std::memcpy(out.d, out.norms, static_cast<size_t>(p.count * p.n) * sizeof(double));
    for (int64_t l = 0; l < p.count; l++)
      out.shift[l] =
          linear ? linear_shift(p, l, out.d + l * p.n) : mean_of_pairs(p, prepared.samples(l), l, out.d + l * p.n);

    Walk walk{TileShape(p.n, p.n, MR, NR, p.count, sizeof(T))};
    walk.deepest = deepest(p);
    const TileShape& shape = walk.shape;
    // A task's results: inner products [M, M], then row sums [M, rows] and column sums [M, cols] of its tiles, then
    // those of the products of pairs of layers.
    const int64_t lines = shape.rows + shape.cols, pairs = out.p ? p.count * (p.count + 1) / 2 : 0;
    const int64_t products_at = p.count * p.count + (linear ? 0 : p.count * lines);
    const int64_t slot_size = products_at + pairs * lines;
    walk.layers = p.count;
    walk.slots = larger<int64_t>(pairs ? p.threads : 16, smaller<int64_t>(1024, kWaveMemory / (slot_size * 8)));
    const Memory results(walk.slots * slot_size * 8);
    if (!results.ok()) return Status::out_of_memory;

    for (int64_t i = 0; i < p.count * p.count; i++) out.s[i] = 0;
    if (!linear)
      for (int64_t i = 0; i < p.count * p.n; i++) out.r[i] = 0;
    for (int64_t i = 0; i < pairs * p.n; i++) out.p[i] = 0;

    const auto epilogue = [&](const Tile<T>& tile, int64_t, int64_t l, int64_t slot) {
      double* const inner = results.as<double>() + slot * slot_size;
      double* const row_sums = inner + p.count * p.count;
      double* const col_sums = row_sums + p.count * shape.rows;
      if (out.dots) keep(tile, p.n, static_cast<T*>(out.dots) + l * p.n * p.n);
      if (!linear || out.shift[l] != 0) {
        const double* const q = out.d + l * p.n;
        to_kernel(p, l, tile, q, q, out.shift[l]);
      }
      drop_uncounted(tile, true);
      if (!linear) row_and_column_sums(tile, row_sums + l * shape.rows, col_sums + l * shape.cols);
      const int64_t size = tile_size<T>(walk);
      if (l < p.count - 1) return;
      const T* const tiles = tile.data - l * size;
      inner_products(tiles, p.count, size, tile.at.rows * shape.cols, inner);
      if (pairs) products_of_pairs(tiles, p.count, size, tile, shape.rows, lines, inner + products_at);
    };
    const auto commit = [&](const Span& at, int64_t, int64_t slot) {
      const double* const inner = results.as<double>() + slot * slot_size;
      const double* const row_sums = inner + p.count * p.count;
      const double* const col_sums = row_sums + p.count * shape.rows;
      for (int64_t i = 0; i < p.count * p.count; i++) out.s[i] += 2 * inner[i];
      const double* sums = inner + products_at;
      for (int64_t pair = 0; pair < pairs; pair++, sums += lines) {
        for (int64_t i = 0; i < at.rows; i++) out.p[pair * p.n + at.r0 + i] += sums[i];
        for (int64_t j = 0; j < at.cols; j++) out.p[pair * p.n + at.c0 + j] += sums[shape.rows + j];
      }
      if (linear) return;
      for (int64_t l = 0; l < p.count; l++) {
        for (int64_t i = 0; i < at.rows; i++) out.r[l * p.n + at.r0 + i] += row_sums[l * shape.rows + i];
        for (int64_t j = 0; j < at.cols; j++) out.r[l * p.n + at.c0 + j] += col_sums[l * shape.cols + j];
      }
    };
#if defined(PYREPR_LEVEL_avx512_bf16)
    const LayerPairs layers(p, prepared, out.norms);
    if (!layers.ok()) return Status::out_of_memory;
    const auto product = [&](int64_t, int64_t l) { return layers.of(l); };
#else
    const auto product = [&](int64_t, int64_t l) { return with_itself(p, prepared, l); };
#endif
    const Status status = for_each_tile<T>(walk, p.threads, product, epilogue, commit);
    finish<T>(p, out);
    return status == Status::ok && out.moved ? move_rows(p, prepared, out.norms, out.moved) : status;
  }

  static Status matrix(const GramProblem& p, bool centre, void* out_) {
    T* const out = static_cast<T*>(out_);
    const bool symmetric = p.count == 1, linear = p.kernel == GramKernel::linear;
    const Prepared<S> prepared(p, centre, !symmetric);
    const int64_t n = p.layers[0].rows, m = p.layers[p.count - 1].rows;
    const Memory norms((n + m) * 8);
    if (!prepared.ok() || !norms.ok()) return Status::out_of_memory;
    double* const q_rows = norms.as<double>();
    double* const q_cols = symmetric ? q_rows : q_rows + n;
    if (!linear) {
      prepared.norms(0, q_rows);
      if (!symmetric) prepared.norms(1, q_cols);
    }
    const Product<S, S> product{prepared.samples(0), prepared.samples(p.count - 1), n, m, p.layers[0].cols, symmetric};
    Walk walk{TileShape(n, m, MR, NR, 1, sizeof(T))};
    walk.deepest = deepest(p);
    return for_each_tile<T>(
        walk, p.threads, [&](int64_t, int64_t) { return product; },
        [&](const Tile<T>& tile, int64_t, int64_t, int64_t) {
          const Span& at = tile.at;
          if (!linear) to_kernel(p, 0, tile, q_rows, q_cols, 0);
          if (!symmetric) return copy_out(tile, m, out);
          if (shift_invariant(p.kernel) && !linear)  // exactly 1, not 1 - rounding
            for (int64_t i = larger(at.r0, at.c0); i < smaller(at.r0 + at.rows, at.c0 + at.cols); i++)
              if (q_rows[i] == q_rows[i]) tile.row(i - at.r0)[i - at.c0] = 1;
          keep(tile, n, out);
        });
  }

  static Status median(const GramProblem& p, double* median, double* norms) {
    const Prepared<S> prepared(p, p.centre);
    Walk walk{TileShape(p.n, p.n, MR, NR, 1, sizeof(T))};
    walk.deepest = deepest(p);
    const Memory histograms(p.threads * 2 * kBins * 8);
    if (!prepared.ok() || !histograms.ok()) return Status::out_of_memory;
    const int64_t pair_count = p.n * (p.n - 1) / 2;
    for (int64_t l = 0; l < p.count; l++) {
      double* const q = norms + l * p.n;
      prepared.norms(l, q);
      // The two middle order statistics of the squared distances, 16 bits of their bit pattern at a time: a
      // non-negative float sorts like its bits.
      uint64_t prefix[2] = {0, 0};
      int64_t rank[2] = {(pair_count - 1) / 2, pair_count / 2};
      for (int shift = 8 * int(sizeof(T)) - 16; shift >= 0; shift -= 16) {
        zero(histograms.as<int64_t>(), p.threads * 2 * kBins);
        const Status status = for_each_tile<T>(
            walk, p.threads, [&](int64_t, int64_t) { return with_itself(p, prepared, l); },
            [&](const Tile<T>& tile, int64_t, int64_t, int64_t) {
              count_distances(tile, q, shift, prefix, histograms.as<int64_t>() + thread_number() * 2 * kBins);
            });
        if (status != Status::ok) return status;
        const bool same = prefix[0] == prefix[1];
        for (int which = 0; which < 2; which++) {
          int64_t bin = 0;
          for (;; bin++) {
            int64_t here = 0;
            for (int t = 0; t < p.threads; t++)
              here += histograms.as<int64_t>()[(2 * t + (same ? 0 : which)) * kBins + bin];
            if (rank[which] < here || bin == kBins - 1) break;
            rank[which] -= here;
          }
          prefix[which] = prefix[which] << 16 | static_cast<uint64_t>(bin);
        }
      }
      median[l] = (__builtin_sqrt(from_bits<T>(prefix[0])) + __builtin_sqrt(from_bits<T>(prefix[1]))) / 2;
    }
    return Status::ok;
  }

  static Status apply(const GramProblem& p, bool centre, const void* weights, int64_t rows, void* out) {
    const Prepared<S> prepared(p, centre);
    if (!prepared.ok()) return Status::out_of_memory;
    const int64_t d = p.layers[0].cols;
    Source<StoreOf<T>> w;
    w.data = static_cast<const T*>(weights);
    w.r_stride = p.n;
    w.k_stride = 1;
    const Product<StoreOf<T>, S> product{w, prepared.features(0), rows, d, p.n, false};
    Walk walk{TileShape(rows, d, MR, NR, 1, sizeof(T))};
    walk.deepest = p.n;
    return for_each_tile<T>(
        walk, p.threads, [&](int64_t, int64_t) { return product; },
        [&](const Tile<T>& tile, int64_t, int64_t, int64_t) { copy_out(tile, d, static_cast<T*>(out)); });
  }

 private:
  static Product<S, S> with_itself(const GramProblem& p, const Prepared<S>& prepared, int64_t l) {
    const Source<S> x = prepared.samples(l);
    return {x, x, p.n, p.n, p.layers[l].cols, true};
  }

  static int64_t deepest(const GramProblem& p) {
    int64_t widest = 0;
    for (int64_t l = 0; l < p.count; l++) widest = larger(widest, p.layers[l].cols);
    return widest;
  }

  // Centred rows add up to zero, so the inner products of different rows have the mean -sum(q) / (n (n - 1)). Of a wide
  // layer with few rows that is most of them: with d = n^2 as much as what sets pairs apart.
  static double linear_shift(const GramProblem& p, int64_t l, const double* q) {
    if (p.n < 2 || p.layers[l].cols / 16 <= p.n * p.n) return 0;
    double sum = 0;
    for (int64_t i = 0; i < p.n; i++) sum += q[i];
    return static_cast<double>(static_cast<T>(-sum / static_cast<double>(p.n * (p.n - 1))));
  }
  static double mean_of_pairs(const GramProblem& p, const Source<S>& x, int64_t l, const double* q) {
    T dots[kMeanPairs];
    for (int64_t t = 0; t < mean_pairs(p); t++)
      dots[t] = static_cast<T>(Prepared<S>::row_product(x, pair_first(p, t), pair_second(p, t), p.layers[l].cols));
    return mean_kernel(p, l, dots, q);
  }
};

#if defined(PYREPR_LEVEL_avx512_bf16)  // adds products of bfloat16 rows

Status stats(const GramProblem& p, const GramStats& out) {
  if (p.dtype != DType::bf16 || p.kernel != GramKernel::linear) return avx512::gram_functions().stats(p, out);
  return Gram<StoreBf16>::stats(p, out);
}

}  // namespace

GramFunctions gram_functions() {
  GramFunctions functions = avx512::gram_functions();
  functions.stats = stats;
  return functions;
}

#else

Status stats(const GramProblem& p, const GramStats& out) {
  return by_dtype(p.dtype, [&](auto s) { return Gram<decltype(s)>::stats(p, out); });
}
Status matrix(const GramProblem& p, bool centre, void* out) {
  return by_dtype(p.dtype, [&](auto s) { return Gram<decltype(s)>::matrix(p, centre, out); });
}
Status median(const GramProblem& p, double* out, double* norms) {
  return by_dtype(p.dtype, [&](auto s) { return Gram<decltype(s)>::median(p, out, norms); });
}
Status apply(const GramProblem& p, bool centre, const void* weights, int64_t rows, void* out) {
  return by_dtype(p.dtype, [&](auto s) { return Gram<decltype(s)>::apply(p, centre, weights, rows, out); });
}

}  // namespace

GramFunctions gram_functions() { return {stats, matrix, median, apply}; }

#endif

}  // namespace pyrepr::cpu::PYREPR_LEVEL
