// What stands on all pairs of rows: layers prepared for products, the kernel functions, and the one walk over the tiles
// of a product. What a family does with a tile is its epilogue. Included by level units only.
//
// Determinism: tasks are cut from the sizes alone, and what several tasks add to is added in task order
// (`in_task_order`), so results have the same bits for any number of threads.
#pragma once

#include "cpu/gemm.h"
#include "cpu/gram.h"
#include "cpu/tiles.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// The layers with their mean rows: what every function starts from.
template <class S>
class Prepared {
  using T = typename S::T;
  using Stored = typename S::Memory;

 public:
  // With `centre`, means are of the problem's rows; with `shared`, layer 1 is shifted by the mean of layer 0 too.
  Prepared(const GramProblem& p, bool centre, bool shared = false)
      : p_(p), centre_(centre), shared_(shared), memory_(2 * total(p) * int64_t(sizeof(T))) {
    if (!ok() || !centre) return;
    const int64_t layers = shared ? 1 : p.count;
    int64_t offset = 0;
    for (int64_t l = 0; l < layers; l++) {
      mean_rows(l, memory_.template as<T>() + offset, memory_.template as<T>() + total(p) + offset);
      offset += p.layers[l].cols;
    }
  }
  bool ok() const { return memory_.ok(); }

  // Rows of the source are samples, the sum runs over features.
  Source<S> samples(int64_t l) const {
    Source<S> s;
    s.data = static_cast<const Stored*>(p_.layers[l].data);
    s.r_stride = p_.layers[l].row_stride;
    s.k_stride = p_.layers[l].col_stride;
    s.r_index = p_.index;
    if (centre_) {
      s.mean_high = memory_.template as<T>() + offset(l);
      s.mean_low = s.mean_high + total(p_);
    }
    return s;
  }
  // Rows of the source are features, the sum runs over samples.
  Source<S> features(int64_t l) const {
    Source<S> s = samples(l);
    const int64_t stride = s.r_stride;
    s.r_stride = s.k_stride;
    s.k_stride = stride;
    s.k_index = s.r_index;
    s.r_index = nullptr;
    s.mean_along_k = false;
    return s;
  }

  // q [rows] = squared norms of the centred rows, in double.
  void norms(int64_t l, double* q) const {
    const Source<S> s = samples(l);
    const int64_t rows = p_.index ? p_.n : p_.layers[l].rows, d = p_.layers[l].cols;
#pragma omp parallel for schedule(static) num_threads(p_.threads)
    for (int64_t i = 0; i < rows; i++) q[i] = row_product(s, i, i, d);
  }
  void norms(double* q) const {
    for (int64_t l = 0; l < p_.count; l++) norms(l, q + l * p_.n);
  }

  // <x_i, x_j> of centred rows, in double.
  static double row_product(const Source<S>& s, int64_t i, int64_t j, int64_t d) {
    constexpr int W = Lanes<T>::W;
    constexpr int64_t chunk = 256;
    alignas(64) T x[chunk], y[chunk];
    using Wide = typename Lanes<T>::Wide;
    Wide sum{};
    for (int64_t k0 = 0; k0 < d; k0 += chunk) {
      const int64_t kc = smaller(chunk, d - k0);
      if (kc < chunk) {
        zero(x, chunk);
        zero(y, chunk);
      }
      if (s.k_stride == 1) {
        read_along_k(s, i, 1, k0, kc, x, chunk);
        if (j != i) read_along_k(s, j, 1, k0, kc, y, chunk);
      } else {
        for (int64_t k = 0; k < kc; k++) {
          x[k] = s.at(i, k0 + k);
          y[k] = s.at(j, k0 + k);
        }
      }
      const T* const other = j == i ? x : y;
      for (int64_t k = 0; k < kc; k += W)
        sum += __builtin_convertvector(load<T>(x + k), Wide) * __builtin_convertvector(load<T>(other + k), Wide);
    }
    double total = 0;
    for (int w = 0; w < W; w++) total += sum[w];
    return total;
  }

 private:
  static int64_t total(const GramProblem& p) {
    int64_t sum = 0;
    for (int64_t l = 0; l < p.count; l++) sum += p.layers[l].cols;
    return sum;
  }
  int64_t offset(int64_t l) const {
    int64_t sum = 0;
    if (!shared_)
      for (int64_t i = 0; i < l; i++) sum += p_.layers[i].cols;
    return sum;
  }

  // The mean row, as first row + mean of the differences to it: exact for constant columns, however large.
  void mean_rows(int64_t l, T* high, T* low) const {
    constexpr int64_t chunk = 128;
    const View& v = p_.layers[l];
    const int64_t rows = p_.index ? p_.n : v.rows;
    Source<S> s = samples(l);
    s.mean_high = s.mean_low = nullptr;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p_.threads)
    for (int64_t k0 = 0; k0 < v.cols; k0 += chunk) {
      const int64_t kc = smaller(chunk, v.cols - k0);
      double first[chunk], sum[chunk] = {};
      alignas(64) T x[chunk] = {};
      for (int64_t i = 0; i < rows; i++) {
        if (s.k_stride == 1) {
          read_along_k(s, i, 1, k0, kc, x, chunk);
        } else {
          for (int64_t k = 0; k < kc; k++) x[k] = s.at(i, k0 + k);
        }
        if (i == 0)
          for (int64_t k = 0; k < chunk; k++) first[k] = x[k];
        for (int64_t k = 0; k < chunk; k++) sum[k] += static_cast<double>(x[k]) - first[k];
      }
      for (int64_t k = 0; k < kc; k++) {
        const double mean = rows ? first[k] + sum[k] / static_cast<double>(rows) : 0;
        high[k0 + k] = static_cast<T>(mean);
        low[k0 + k] = static_cast<T>(mean - static_cast<double>(high[k0 + k]));
      }
    }
  }

  const GramProblem& p_;
  bool centre_;
  bool shared_;
  Memory memory_;
};

// The kernels, as functions of an inner product and the squared norms of the two rows: the value for a row and a vector
// of columns, and the diagonal, in double. `norm` is what the value takes in place of a squared norm.
template <class T>
struct Linear {
  static double norm(double q) { return q; }
  Vec<T> operator()(Vec<T> dot, T, Vec<T>) const { return dot; }
  double diagonal(double q) const { return q; }
};

// e^x of x <= 0, or with `lifted` e^(x + offset) where that is not above 0, or with `near` e^offset (e^x - 1).
template <class T>
struct Decay {
  T offset = 0, times = 1;  // e^offset
  double diagonal = 1;      // at x = 0
  bool near = false;

  Decay() = default;
  Decay(double offset_, bool near_)
      : offset(static_cast<T>(offset_)),
        times(static_cast<T>(__builtin_exp(offset_))),
        diagonal(near_ ? 0 : __builtin_exp(smaller(offset_, 600.0))),
        near(near_) {}
  Vec<T> operator()(Vec<T> x) const {
    if (!near) return exp_nonpositive<T>(x + offset < T(0) ? x + offset : Vec<T>{});
    Vec<T> sum{};  // e^x - 1 = x (1 + x/2 (1 + x/3 (...)))
#pragma GCC unroll 16
    for (int i = 16; i > 1; i--) sum = (sum + T(1)) * x / T(i);
    const Vec<T> series = (sum + T(1)) * x;
    return (x < T(-0.5) ? exp_nonpositive<T>(x) - T(1) : series) * times;
  }
};
template <class T, bool lifted = false>
struct Rbf {
  T factor;  // -1 / (2 sigma^2)
  Decay<T> decay = {};
  static double norm(double q) { return q; }
  Vec<T> operator()(Vec<T> dot, T q_i, Vec<T> q_j) const {
    const Vec<T> exponent = squared_distance(dot, q_i, q_j) * factor;
    return lifted ? decay(exponent) : exp_nonpositive<T>(exponent);
  }
  static Vec<T> squared_distance(Vec<T> dot, T q_i, Vec<T> q_j) {
    const Vec<T> distance = (q_i + q_j) - T(2) * dot;
    return distance < T(0) ? Vec<T>{} : distance;
  }
  double diagonal(double q) const { return q == q ? decay.diagonal : q; }
};
template <class T, bool lifted = false>
struct Laplacian {
  T factor;  // -1 / sigma
  Decay<T> decay = {};
  static double norm(double q) { return q; }
  Vec<T> operator()(Vec<T> dot, T q_i, Vec<T> q_j) const {
    const Vec<T> exponent = square_root<T>(Rbf<T>::squared_distance(dot, q_i, q_j)) * factor;
    return lifted ? decay(exponent) : exp_nonpositive<T>(exponent);
  }
  double diagonal(double q) const { return q == q ? decay.diagonal : q; }
};
template <class T, bool lifted = false>
struct Polynomial {
  double gamma, coef0;
  int degree;
  static double norm(double q) { return q; }
  Vec<T> operator()(Vec<T> dot, T, Vec<T>) const { return power(dot * static_cast<T>(gamma), static_cast<T>(coef0)); }
  double diagonal(double q) const { return power(q * gamma, coef0); }

  // (z + c)^degree, or with `lifted` its difference from c^degree, e, by (z + c)^m - c^m = (z + c) e + z c^(m-1).
  template <class V, class C>
  V power(V z, C c) const {
    const V base = z + c;
    V k = lifted ? z : base;
    C tail = c;
    for (int m = 1; m < degree; m++) {
      k = lifted ? k * base + z * tail : k * base;
      tail *= c;
    }
    return k;
  }
};
template <class T>
struct Cosine {
  // A zero row has no direction: its cosine with everything is 0, as in scikit-learn.
  static double norm(double q) { return q == 0 ? 0 : 1 / __builtin_sqrt(q); }
  Vec<T> operator()(Vec<T> dot, T norm_i, Vec<T> norm_j) const { return dot * norm_i * norm_j; }
  double diagonal(double q) const { return q == 0 ? 0 : q / q; }
};

inline bool shift_invariant(GramKernel k) { return k != GramKernel::polynomial && k != GramKernel::cosine; }

// Calls f(kernel) with the problem's kernel for a layer.
template <class T, class F>
void with_kernel(const GramProblem& p, int64_t layer, F f) {
  const double scale = p.scale[layer], offset = p.offset[layer];
  const bool base = p.base[layer] != 0;
  const Decay<T> decay(offset, base);
  const T gaussian = static_cast<T>(-1 / (2 * scale * scale)), exponential = static_cast<T>(-1 / scale);
  switch (p.kernel) {
    case GramKernel::linear:
      return f(Linear<T>{});
    case GramKernel::rbf:
      return base || offset != 0 ? f(Rbf<T, true>{gaussian, decay}) : f(Rbf<T>{gaussian});
    case GramKernel::laplacian:
      return base || offset != 0 ? f(Laplacian<T, true>{exponential, decay}) : f(Laplacian<T>{exponential});
    case GramKernel::polynomial:
      return base ? f(Polynomial<T, true>{scale, offset, p.degree}) : f(Polynomial<T>{scale, offset, p.degree});
    case GramKernel::cosine:
      return f(Cosine<T>{});
  }
}

// A tile of a product, rows of `ldc` elements, that stands at `at` of the whole.
template <class T>
struct Tile {
  T* data;
  int64_t ldc;
  Span at;
  T* row(int64_t i) const { return data + i * ldc; }
};

// x as it was rounded: keeps a product from being fused with the addition that follows. (Same bits, however a kernel is
// inlined.)
template <class T>
inline Vec<T> rounded(Vec<T> x) {
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  return __builtin_assoc_barrier(x);
#else
  return x;
#endif
}

// The kernel of a tile of inner products, in place, minus `shift`; q: squared norms of all rows and of all columns.
// Columns past the last hold rubbish afterwards.
template <class T, class Kernel>
void apply_kernel(const Kernel& kernel, const Tile<T>& tile, const double* q_rows, const double* q_cols, T shift) {
  constexpr int W = Lanes<T>::W;
  const Span& at = tile.at;
  alignas(64) T norms[kTileCols + Block<T>::NR] = {};
  for (int64_t j = 0; j < at.cols; j++) norms[j] = static_cast<T>(Kernel::norm(q_cols[at.c0 + j]));
  for (int64_t i = 0; i < at.rows; i++) {
    const T norm = static_cast<T>(Kernel::norm(q_rows[at.r0 + i]));
    for (int64_t j = 0; j < at.cols; j += W)
      store<T>(tile.row(i) + j, rounded<T>(kernel(load<T>(tile.row(i) + j), norm, load<T>(norms + j))) - shift);
  }
}

// Zeroes what must not be counted: columns past the end, and with `upper` entries on or below the diagonal.
template <class T>
void drop_uncounted(const Tile<T>& tile, bool upper) {
  const Span& at = tile.at;
  const bool crosses = upper && at.r0 + at.rows - 1 >= at.c0;
  if (!crosses && at.cols == tile.ldc) return;
  for (int64_t i = 0; i < at.rows; i++) {
    if (crosses) zero(tile.row(i), smaller(tile.ldc, larger<int64_t>(0, at.r0 + i + 1 - at.c0)));
    zero(tile.row(i) + at.cols, tile.ldc - at.cols);
  }
}

// inner [layers, layers] = inner products of `layers` arrays of `size` elements, `stride` apart: 4 x 4 arrays at a
// time in registers, 2048 elements at a time in T, their sums in double. Only a <= b is computed; both are written.
template <class T>
void inner_products(const T* arrays, int64_t layers, int64_t stride, int64_t size, double* inner) {
  constexpr int W = Lanes<T>::W;
  constexpr int64_t chunk = 2048;
  for (int64_t i = 0; i < layers * layers; i++) inner[i] = 0;
  for (int64_t from = 0; from < size; from += chunk) {
    const int64_t count = smaller(chunk, size - from);  // a multiple of W: rows have NR-padded length
    for (int64_t a = 0; a < layers; a += 4)
      for (int64_t b = a; b < layers; b += 4) {
        const int64_t as = smaller<int64_t>(4, layers - a), bs = smaller<int64_t>(4, layers - b);
        const T* x[4];
        const T* y[4];
        for (int i = 0; i < 4; i++) {  // short blocks repeat their last array
          x[i] = arrays + (a + smaller<int64_t>(i, as - 1)) * stride + from;
          y[i] = arrays + (b + smaller<int64_t>(i, bs - 1)) * stride + from;
        }
        Vec<T> sum[4][4] = {};
        for (int64_t e = 0; e < count; e += W) {
          Vec<T> right[4];
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) right[j] = load<T>(y[j] + e);
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            const Vec<T> left = load<T>(x[i] + e);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] += left * right[j];
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++)
            if (i < as && j < bs) inner[(a + i) * layers + b + j] += lane_sum<T>(sum[i][j]);
      }
  }
  for (int64_t a = 0; a < layers; a++)
    for (int64_t b = 0; b < a; b++) inner[a * layers + b] = inner[b * layers + a];
}

// What is walked: `groups` grids of tiles, with `layers` products on each. The tiles of `shape` fit the largest grid.
struct Walk {
  TileShape shape;
  int64_t groups = 1, layers = 1;
  int64_t slots = 0;    // how many tasks may wait for their commit; 0: all
  int64_t deepest = 0;  // the longest sum of the products

  int64_t tasks(int64_t rows, int64_t cols) const { return ceil_div(rows, shape.rows) * ceil_div(cols, shape.cols); }
};

// A sum of more terms than this is cut into stretches, which are added up in double: the error of a sum of floats grows
// with its length.
constexpr int64_t kStretch = 32 * kDepth;

// tile += (or with `first` =) the columns [k0, k0 + count) of a tile in double.
template <class T>
void add_stretch(const T* tile, int64_t count, bool first, double* sum) {
  constexpr int W = Lanes<T>::W;
  using Wide = typename Lanes<T>::Wide;
  for (int64_t i = 0; i < count; i += W) {
    Wide so_far{};
    if (!first) std::memcpy(&so_far, sum + i, sizeof so_far);
    so_far += __builtin_convertvector(load<T>(tile + i), Wide);
    std::memcpy(sum + i, &so_far, sizeof so_far);
  }
}

// The columns of a source from k0 on.
template <class S>
Source<S> from_column(Source<S> s, int64_t k0) {
  if (s.k_index)
    s.k_index += k0;
  else
    s.data += k0 * s.k_stride;
  if (s.mean_high && s.mean_along_k) {
    s.mean_high += k0;
    s.mean_low += k0;
  }
  return s;
}

// Rows of a [rows, depth] times rows of b [cols, depth]. With `upper` a and b are the same and what lies below the
// diagonal is not wanted.
template <class SA, class SB>
struct Product {
  using T = typename SA::T;
  Source<SA> a;
  Source<SB> b;
  int64_t rows, cols, depth;
  bool upper;

  // tile_product of gemm.h with `sum`, room for the tile in double, for long sums.
  void multiply(const Span& at, const TileBuffers<T>& buffers, T* tile, int64_t ldc, double* sum) const {
    if (depth <= kStretch || sizeof(T) == sizeof(double))
      return tile_product(a, at.r0, at.rows, b, at.c0, at.cols, depth, upper, buffers, tile, ldc);
    const int64_t size = round_up(at.rows, Block<T>::MR) * ldc;
    zero(tile, size);  // what lies below the diagonal stays untouched
    for (int64_t k0 = 0; k0 < depth; k0 += kStretch) {
      tile_product(from_column(a, k0), at.r0, at.rows, from_column(b, k0), at.c0, at.cols,
                   smaller(kStretch, depth - k0), upper, buffers, tile, ldc);
      add_stretch(tile, size, k0 == 0, sum);
    }
    for (int64_t i = 0; i < size; i++) tile[i] = static_cast<T>(sum[i]);
  }
};

// Calls epilogue(tile, group, layer, slot) with every tile of product(group, layer), the layers of a group one after
// the other by one thread: at the last one, their tiles stand `tile_size(walk)` elements apart, last at the end. Then
// commit(at, group, slot), one after the other in the order of tasks.
template <class T>
int64_t tile_size(const Walk& walk) {
  return round_up(walk.shape.rows, Block<T>::MR) * walk.shape.cols;
}
template <class T, class GetProduct, class Epilogue, class Commit>
Status for_each_tile(const Walk& walk, int threads, GetProduct product, Epilogue epilogue, Commit commit) {
  const int64_t size = tile_size<T>(walk);
  const int64_t narrow = round_up((TileBuffers<T>::size(walk.shape.rows) + walk.layers * size) * sizeof(T), 64);
  const int64_t bytes = narrow + (walk.deepest > kStretch ? round_up(size * int64_t(sizeof(double)), 64) : 0);
  const Memory memory(bytes * threads), numbers((walk.groups + 1) * 8);
  if (!memory.ok() || !numbers.ok()) return Status::out_of_memory;
  int64_t* const first = numbers.as<int64_t>();  // [groups + 1] number of a group's first task
  first[0] = 0;
  for (int64_t g = 0; g < walk.groups; g++) {
    const auto p = product(g, int64_t(0));
    first[g + 1] = first[g] + walk.tasks(p.rows, p.cols);
  }
  const int64_t tasks = first[walk.groups];
  // Calls use(span, group, whether only what lies above the diagonal is wanted), unless nothing is.
  const auto place = [&](int64_t task, auto use) {
    int64_t group = 0, beyond = walk.groups;  // bisection: first[group] <= task < first[beyond]
    while (beyond - group > 1) {
      const int64_t middle = (group + beyond) / 2;
      (first[middle] <= task ? group : beyond) = middle;
    }
    const auto p = product(group, int64_t(0));
    TileShape shape = walk.shape;
    shape.row_blocks = ceil_div(p.rows, shape.rows);
    shape.col_blocks = ceil_div(p.cols, shape.cols);
    const Span at(shape, task - first[group], p.rows, p.cols);
    if (!(p.upper && at.below_diagonal())) use(at, group);
  };
  const auto work = [&](int64_t task, int64_t slot) {
    place(task, [&](const Span& at, int64_t group) {
      T* const tiles = memory.as<T>(bytes * thread_number());
      const TileBuffers<T> buffers(tiles + walk.layers * size, walk.shape.rows);
      for (int64_t l = 0; l < walk.layers; l++) {
        const auto p = product(group, l);
        const Tile<T> tile{tiles + l * size, walk.shape.cols, at};
        p.multiply(at, buffers, tile.data, tile.ldc, memory.as<double>(bytes * thread_number() + narrow));
        epilogue(tile, group, l, slot);
      }
    });
  };
  in_task_order(tasks, walk.slots ? walk.slots : tasks, threads, work, [&](int64_t task, int64_t slot) {
    place(task, [&](const Span& at, int64_t group) { commit(at, group, slot); });
  });
  return Status::ok;
}
// The same where nothing has to be added up.
template <class T, class GetProduct, class Epilogue>
Status for_each_tile(const Walk& walk, int threads, GetProduct product, Epilogue epilogue) {
  return for_each_tile<T>(walk, threads, product, epilogue, [](const Span&, int64_t, int64_t) {});
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
