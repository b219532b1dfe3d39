// Family `gram` on the CPU, compiled once per instruction set (PYREPR_LEVEL). The maths is in gram.h.
//
// Work, at best: stats n^2 D + n^2 M^2 / 2 flops on n D elements read (n / 224 + n / 896) / 2 times (from L3 or
// memory); stats_by_features n D^2; matrix 2 n m d; apply 2 n m d. All of it runs in gemm.h's micro-kernel.
//
// Determinism: tasks are cut from the sizes alone, and what several tasks add to is added in task order
// (`in_task_order`), so results have the same bits for any number of threads.
#include "cpu/gram.h"

#include <omp.h>

#include "cpu/gemm.h"
#include "cpu/tiles.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kWaveMemory = int64_t(16) << 20;  // bytes of results that may wait for their turn to be added up

template <class S>
class Gram {
 public:
  using T = typename S::T;
  using Memory_ = typename S::Memory;
  static constexpr int W = Lanes<T>::W;
  static constexpr int MR = Block<T>::MR;
  static constexpr int NR = Block<T>::NR;

  static Status stats(const GramProblem& p, const GramStats& out) {
    const Prepared prepared(p, shift_invariant(p.kernel));
    if (!prepared.ok()) return Status::out_of_memory;
    const bool linear = p.kernel == GramKernel::linear;
    prepared.norms(out.d);
    for (int64_t l = 0; l < p.count; l++) out.shift[l] = linear ? 0 : prepared.mean_kernel(l, out.d + l * p.n);

    const TileShape shape(p.n, p.n, MR, NR, p.count, sizeof(T));
    const int64_t tile_size = round_up(shape.rows, MR) * shape.cols;
    const int64_t bytes = round_up((TileBuffers<T>::size(shape.rows) + p.count * tile_size) * sizeof(T), 64);
    // A task's results: inner products [M, M], then row sums [M, rows] and column sums [M, cols] of its tiles.
    const int64_t slot_size = p.count * p.count + (linear ? 0 : p.count * (shape.rows + shape.cols));
    const int64_t slots = larger<int64_t>(16, smaller<int64_t>(1024, kWaveMemory / (slot_size * 8)));
    const Memory memory(bytes * p.threads), results(slots * slot_size * 8);
    if (!memory.ok() || !results.ok()) return Status::out_of_memory;

    for (int64_t i = 0; i < p.count * p.count; i++) out.s[i] = 0;
    if (!linear)
      for (int64_t i = 0; i < p.count * p.n; i++) out.r[i] = 0;

    const auto work = [&](int64_t task, int64_t slot) {
      const Span at(shape, task, p.n, p.n);
      if (at.below_diagonal()) return;
      T* const tiles = memory.as<T>(bytes * thread_number());
      const TileBuffers<T> buffers(tiles + p.count * tile_size, shape.rows);
      double* const inner = results.as<double>() + slot * slot_size;
      double* const row_sums = inner + p.count * p.count;
      double* const col_sums = row_sums + p.count * shape.rows;
      for (int64_t l = 0; l < p.count; l++) {
        T* const tile = tiles + l * tile_size;
        const Source<S> x = prepared.samples(l);
        tile_product(x, at.r0, at.rows, x, at.c0, at.cols, p.layers[l].cols, true, buffers, tile, shape.cols);
        if (out.dots) keep(tile, shape.cols, at, p.n, static_cast<T*>(out.dots) + l * p.n * p.n);
        if (!linear) {
          const double* const q = out.d + l * p.n;
          apply_kernel(p, l, tile, shape.cols, at.rows, at.cols, q + at.r0, q + at.c0, static_cast<T>(out.shift[l]));
        }
        drop_uncounted(tile, shape.cols, at, true);
        if (!linear) row_and_column_sums(tile, shape.cols, at, row_sums + l * shape.rows, col_sums + l * shape.cols);
      }
      inner_products(tiles, p.count, tile_size, at.rows * shape.cols, inner);
    };
    const auto commit = [&](int64_t task, int64_t slot) {
      const Span at(shape, task, p.n, p.n);
      if (at.below_diagonal()) return;
      const double* const inner = results.as<double>() + slot * slot_size;
      const double* const row_sums = inner + p.count * p.count;
      const double* const col_sums = row_sums + p.count * shape.rows;
      for (int64_t i = 0; i < p.count * p.count; i++) out.s[i] += 2 * inner[i];
      if (linear) return;
      for (int64_t l = 0; l < p.count; l++) {
        for (int64_t i = 0; i < at.rows; i++) out.r[l * p.n + at.r0 + i] += row_sums[l * shape.rows + i];
        for (int64_t j = 0; j < at.cols; j++) out.r[l * p.n + at.c0 + j] += col_sums[l * shape.cols + j];
      }
    };
    in_task_order(shape.row_blocks * shape.col_blocks, slots, p.threads, work, commit);
    finish(p, out);
    return Status::ok;
  }

  static Status stats_by_features(const GramProblem& p, int64_t split, const GramStats& out) {
    const Prepared prepared(p, true);
    const Memory pairs_memory(p.count * p.count * 16);
    if (!prepared.ok() || !pairs_memory.ok()) return Status::out_of_memory;
    prepared.norms(out.d);
    int64_t* const pairs = pairs_memory.template as<int64_t>();
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
    const Status status = feature_tiles(
        p, prepared, pairs, pair_count,
        [&](T* tile, int64_t ldc, int64_t, const Span& at, bool same) {
          double diagonal = 0, inner = 0;
          for (int64_t i = larger(at.r0, at.c0); same && i < smaller(at.r0 + at.rows, at.c0 + at.cols); i++) {
            const double x = tile[(i - at.r0) * ldc + i - at.c0];
            diagonal += x * x;
          }
          drop_uncounted(tile, ldc, at, same);
          inner_products(tile, 1, 0, at.rows * ldc, &inner);
          return same ? diagonal + 2 * inner : inner;
        },
        [&](double value, int64_t pair) { out.s[pairs[2 * pair] * p.count + pairs[2 * pair + 1]] += value; });
    for (int64_t a = 0; a < p.count; a++)
      for (int64_t b = a; b < p.count; b++) {
        double qq = 0;
        for (int64_t i = 0; i < p.n; i++) qq += out.d[a * p.n + i] * out.d[b * p.n + i];
        out.s[b * p.count + a] = out.s[a * p.count + b] -= qq;
      }
    for (int64_t l = 0; l < p.count; l++) out.shift[l] = 0;
    finish(p, out);
    return status;
  }

  static Status moments(const GramProblem& p, const int64_t* pairs, int64_t pair_count, double* const* blocks) {
    const Prepared prepared(p, false);
    if (!prepared.ok()) return Status::out_of_memory;
    return feature_tiles(
        p, prepared, pairs, pair_count,
        [&](const T* tile, int64_t ldc, int64_t pair, const Span& at, bool same) {
          const int64_t width = p.layers[pairs[2 * pair + 1]].cols;
          for (int64_t i = 0; i < at.rows; i++) {
            double* const row = blocks[pair] + (at.r0 + i) * width + at.c0;
            for (int64_t j = same ? larger<int64_t>(0, at.r0 + i - at.c0) : 0; j < at.cols; j++)
              row[j] += tile[i * ldc + j];
          }
          return 0.0;
        },
        [](double, int64_t) {});
  }

  static Status matrix(const GramProblem& p, bool centre, void* out_) {
    T* const out = static_cast<T*>(out_);
    const bool symmetric = p.count == 1;
    const Prepared prepared(p, centre, !symmetric);
    const int64_t n = p.layers[0].rows, m = p.layers[p.count - 1].rows;
    const Memory norms((n + m) * 8);
    const TileShape shape(n, m, MR, NR, 1, sizeof(T));
    const int64_t tile_size = round_up(shape.rows, MR) * shape.cols;
    const int64_t bytes = round_up((TileBuffers<T>::size(shape.rows) + tile_size) * sizeof(T), 64);
    const Memory memory(bytes * p.threads);
    if (!prepared.ok() || !norms.ok() || !memory.ok()) return Status::out_of_memory;
    double* const q_rows = norms.as<double>();
    double* const q_cols = symmetric ? q_rows : q_rows + n;
    if (p.kernel != GramKernel::linear) {
      prepared.norms(0, q_rows);
      if (!symmetric) prepared.norms(1, q_cols);
    }
    const Source<S> x = prepared.samples(0), y = prepared.samples(p.count - 1);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t task = 0; task < shape.row_blocks * shape.col_blocks; task++) {
      const Span at(shape, task, n, m);
      if (symmetric && at.below_diagonal()) continue;
      T* const tile = memory.as<T>(bytes * thread_number());
      const TileBuffers<T> buffers(tile + tile_size, shape.rows);
      tile_product(x, at.r0, at.rows, y, at.c0, at.cols, p.layers[0].cols, symmetric, buffers, tile, shape.cols);
      if (p.kernel != GramKernel::linear)
        apply_kernel(p, 0, tile, shape.cols, at.rows, at.cols, q_rows + at.r0, q_cols + at.c0, T(0));
      if (symmetric) {
        if (shift_invariant(p.kernel) && p.kernel != GramKernel::linear)  // exactly 1, not 1 - rounding
          for (int64_t i = larger(at.r0, at.c0); i < smaller(at.r0 + at.rows, at.c0 + at.cols); i++)
            if (q_rows[i] == q_rows[i]) tile[(i - at.r0) * shape.cols + i - at.c0] = 1;
        keep(tile, shape.cols, at, n, out);
      } else {
        copy_out(tile, shape.cols, at, m, out);
      }
    }
    return Status::ok;
  }

  static Status median(const GramProblem& p, double* median) {
    const Prepared prepared(p, true);
    const TileShape shape(p.n, p.n, MR, NR, 1, sizeof(T));
    const int64_t tile_size = round_up(shape.rows, MR) * shape.cols;
    const int64_t tile_bytes = round_up((TileBuffers<T>::size(shape.rows) + tile_size) * sizeof(T), 64);
    const int64_t bytes = tile_bytes + 2 * kBins * 8;
    const Memory memory(bytes * p.threads), norms(p.n * 8);
    if (!prepared.ok() || !memory.ok() || !norms.ok()) return Status::out_of_memory;
    double* const q = norms.as<double>();
    const int64_t pair_count = p.n * (p.n - 1) / 2;
    for (int64_t l = 0; l < p.count; l++) {
      const Source<S> x = prepared.samples(l);
      prepared.norms(l, q);
      // The two middle order statistics of the squared distances, 16 bits of their bit pattern at a time: a
      // non-negative float sorts like its bits.
      uint64_t prefix[2] = {0, 0};
      int64_t rank[2] = {(pair_count - 1) / 2, pair_count / 2};
      for (int shift = 8 * int(sizeof(T)) - 16; shift >= 0; shift -= 16) {
        for (int t = 0; t < p.threads; t++) zero(memory.as<int64_t>(bytes * t + tile_bytes), 2 * kBins);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
        for (int64_t task = 0; task < shape.row_blocks * shape.col_blocks; task++) {
          const Span at(shape, task, p.n, p.n);
          if (at.below_diagonal()) continue;
          T* const tile = memory.as<T>(bytes * thread_number());
          int64_t* const bins = memory.as<int64_t>(bytes * thread_number() + tile_bytes);
          const TileBuffers<T> buffers(tile + tile_size, shape.rows);
          tile_product(x, at.r0, at.rows, x, at.c0, at.cols, p.layers[l].cols, true, buffers, tile, shape.cols);
          for (int64_t i = 0; i < at.rows; i++)
            for (int64_t j = larger<int64_t>(0, at.r0 + i + 1 - at.c0); j < at.cols; j++) {
              const uint64_t key = bits(squared_distance(tile[i * shape.cols + j], q[at.r0 + i], q[at.c0 + j]));
              for (int which = 0; which < 2; which++)
                if ((key >> shift >> 16) == prefix[which]) bins[which * kBins + (key >> shift & 0xffff)]++;
            }
        }
        for (int which = 0; which < 2; which++) {
          int64_t bin = 0;
          for (;; bin++) {
            int64_t here = 0;
            for (int t = 0; t < p.threads; t++) here += memory.as<int64_t>(bytes * t + tile_bytes)[which * kBins + bin];
            if (rank[which] < here || bin == kBins - 1) break;
            rank[which] -= here;
          }
          prefix[which] = prefix[which] << 16 | static_cast<uint64_t>(bin);
        }
      }
      median[l] = (__builtin_sqrt(from_bits(prefix[0])) + __builtin_sqrt(from_bits(prefix[1]))) / 2;
    }
    return Status::ok;
  }

  static Status apply(const GramProblem& p, bool centre, const void* weights, int64_t rows_total, void* out_) {
    T* const out = static_cast<T*>(out_);
    const Prepared prepared(p, centre);
    const int64_t d = p.layers[0].cols;
    const TileShape shape(rows_total, d, MR, NR, 1, sizeof(T));
    const int64_t tile_size = round_up(shape.rows, MR) * shape.cols;
    const int64_t bytes = round_up((TileBuffers<T>::size(shape.rows) + tile_size) * sizeof(T), 64);
    const Memory memory(bytes * p.threads);
    if (!prepared.ok() || !memory.ok()) return Status::out_of_memory;
    Source<StoreOf<T>> w;
    w.data = static_cast<const T*>(weights);
    w.r_stride = p.n;
    w.k_stride = 1;
    const Source<S> x = prepared.features(0);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t task = 0; task < shape.row_blocks * shape.col_blocks; task++) {
      const Span at(shape, task, rows_total, d);
      T* const tile = memory.as<T>(bytes * thread_number());
      const TileBuffers<T> buffers(tile + tile_size, shape.rows);
      tile_product(w, at.r0, at.rows, x, at.c0, at.cols, p.n, false, buffers, tile, shape.cols);
      copy_out(tile, shape.cols, at, d, out);
    }
    return Status::ok;
  }

 private:
  static constexpr int64_t kBins = 65536;

  static bool shift_invariant(GramKernel k) { return k != GramKernel::polynomial && k != GramKernel::cosine; }

  // The layers with their mean rows: what every function starts from.
  class Prepared {
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
      s.data = static_cast<const Memory_*>(p_.layers[l].data);
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

    // The mean of the kernel over up to 1024 pairs (i, i + n/2): close to the mean over all, and always the same.
    double mean_kernel(int64_t l, const double* q) const {
      const int64_t pairs = smaller<int64_t>(p_.n, 1024);
      if (p_.n < 2) return 0;
      const Source<S> s = samples(l);
      double sum = 0;
      for (int64_t t = 0; t < pairs; t++) {
        const int64_t i = t * p_.n / pairs, j = (i + p_.n / 2) % p_.n;
        alignas(64) T one[NR] = {static_cast<T>(row_product(s, i, j, p_.layers[l].cols))};
        apply_kernel(p_, l, one, NR, 1, 1, q + i, q + j, T(0));
        sum += one[0];
      }
      return sum / static_cast<double>(pairs);
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

    static double row_product(const Source<S>& s, int64_t i, int64_t j, int64_t d) {
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

  static double squared_distance(T dot, double q_i, double q_j) {
    const double d = q_i + q_j - 2 * static_cast<double>(dot);
    return d < 0 ? 0 : d;
  }
  static uint64_t bits(double x) {
    const T value = static_cast<T>(x);
    uint64_t u = 0;
    std::memcpy(&u, &value, sizeof value);
    return u;
  }
  static double from_bits(uint64_t u) {
    T value;
    std::memcpy(&value, &u, sizeof value);
    return static_cast<double>(value);
  }

  // The kernel of a tile of inner products, in place, minus `shift`. Columns past `cols` hold rubbish afterwards.
  static void apply_kernel(const GramProblem& p, int64_t layer, T* tile, int64_t ldc, int64_t rows, int64_t cols,
                           const double* q_rows, const double* q_cols, T shift) {
    const double scale = p.scale[layer];
    const T rbf = static_cast<T>(-1 / (2 * scale * scale)), laplacian = static_cast<T>(-1 / scale);
    alignas(64) T q[kTileCols + NR] = {};
    for (int64_t j = 0; j < cols; j++)
      q[j] = static_cast<T>(p.kernel == GramKernel::cosine ? inverse_norm(q_cols[j]) : q_cols[j]);
    for (int64_t i = 0; i < rows; i++) {
      const T q_i = static_cast<T>(p.kernel == GramKernel::cosine ? inverse_norm(q_rows[i]) : q_rows[i]);
      for (int64_t j = 0; j < cols; j += W) {
        T* const at = tile + i * ldc + j;
        const Vec<T> dot = load<T>(at);
        Vec<T> distance = (q_i + load<T>(q + j)) - T(2) * dot;
        distance = distance < T(0) ? Vec<T>{} : distance;
        Vec<T> k = dot;
        switch (p.kernel) {
          case GramKernel::linear:
            break;
          case GramKernel::rbf:
            k = exp_nonpositive<T>(distance * rbf);
            break;
          case GramKernel::laplacian:
            k = exp_nonpositive<T>(square_root<T>(distance) * laplacian);
            break;
          case GramKernel::polynomial: {
            const Vec<T> base = dot * static_cast<T>(scale) + static_cast<T>(p.coef0);
            k = base;
            for (int power = 1; power < p.degree; power++) k *= base;
            break;
          }
          case GramKernel::cosine:
            k = dot * q_i * load<T>(q + j);
            break;
        }
        store<T>(at, k - shift);
      }
    }
  }
  // A zero row has no direction: its cosine with everything is 0, as in scikit-learn.
  static double inverse_norm(double q) { return q == 0 ? 0 : 1 / __builtin_sqrt(q); }

  // Zeroes what must not be counted: columns past the end, and with `upper` entries on or below the diagonal.
  static void drop_uncounted(T* tile, int64_t ldc, const Span& at, bool upper) {
    const bool crosses = upper && at.r0 + at.rows - 1 >= at.c0;
    if (!crosses && at.cols == ldc) return;
    for (int64_t i = 0; i < at.rows; i++) {
      if (crosses) zero(tile + i * ldc, smaller(ldc, larger<int64_t>(0, at.r0 + i + 1 - at.c0)));
      zero(tile + i * ldc + at.cols, ldc - at.cols);
    }
  }

  static void copy_out(const T* tile, int64_t ldc, const Span& at, int64_t m, T* out) {
    for (int64_t i = 0; i < at.rows; i++)
      std::memcpy(out + (at.r0 + i) * m + at.c0, tile + i * ldc, static_cast<size_t>(at.cols) * sizeof(T));
  }

  // Writes the entries on and above the diagonal to out [n, n], and their mirror image.
  static void keep(const T* tile, int64_t ldc, const Span& at, int64_t n, T* out) {
    for (int64_t i = 0; i < at.rows; i++) {
      const int64_t from = smaller(at.cols, larger<int64_t>(0, at.r0 + i - at.c0));
      std::memcpy(out + (at.r0 + i) * n + at.c0 + from, tile + i * ldc + from,
                  static_cast<size_t>(at.cols - from) * sizeof(T));
    }
    constexpr int64_t strip = 16;  // columns at a time, so that the mirrored rows stay in L1
    for (int64_t j0 = 0; j0 < at.cols; j0 += strip)
      for (int64_t i = 0; i < at.rows; i++)
        for (int64_t j = larger(j0, at.r0 + i - at.c0); j < smaller(at.cols, j0 + strip); j++)
          out[(at.c0 + j) * n + at.r0 + i] = tile[i * ldc + j];
  }

  static void row_and_column_sums(const T* tile, int64_t ldc, const Span& at, double* row_sums, double* col_sums) {
    for (int64_t i = 0; i < at.rows; i++) {
      Vec<T> sum{};
      for (int64_t j = 0; j < ldc; j += W) sum += load<T>(tile + i * ldc + j);
      row_sums[i] = lane_sum<T>(sum);
    }
    for (int64_t j = 0; j < ldc; j += W) {
      Vec<T> sum{};
      for (int64_t i = 0; i < at.rows; i++) sum += load<T>(tile + i * ldc + j);
      for (int w = 0; w < W; w++) col_sums[j + w] = static_cast<double>(sum[w]);
    }
  }

  // inner [layers, layers] = inner products of `layers` arrays of `size` elements, `stride` apart: 4 x 4 arrays at a
  // time in registers, 2048 elements at a time in T, their sums in double. Only a <= b is computed; both are written.
  static void inner_products(const T* arrays, int64_t layers, int64_t stride, int64_t size, double* inner) {
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

  // Walks the tiles of X_a^T X_b for all pairs. use(tile, ldc, pair, span, same layer) runs in parallel and may change
  // its tile; commit(its value, pair) runs in task order.
  template <class Use, class Commit>
  static Status feature_tiles(const GramProblem& p, const Prepared& prepared, const int64_t* pairs, int64_t pair_count,
                              Use use, Commit commit) {
    constexpr int64_t slots = 1024;
    int64_t widest = 1;
    for (int64_t l = 0; l < p.count; l++) widest = larger(widest, p.layers[l].cols);
    const TileShape widest_shape(widest, widest, MR, NR, 1, sizeof(T), pair_count);
    const int64_t tile_size = round_up(widest_shape.rows, MR) * widest_shape.cols;
    const int64_t bytes = round_up((TileBuffers<T>::size(widest_shape.rows) + tile_size) * sizeof(T), 64);
    const Memory memory(bytes * p.threads), numbers((pair_count + 1 + 2 * slots) * 8);
    if (!memory.ok() || !numbers.ok()) return Status::out_of_memory;
    int64_t* const first = numbers.as<int64_t>();     // [pairs + 1] number of a pair's first task
    int64_t* const pair_of = first + pair_count + 1;  // [slots]
    double* const value_of = numbers.as<double>() + pair_count + 1 + slots;  // [slots]
    const auto shape_of = [&](int64_t pair) {
      TileShape shape = widest_shape;
      shape.row_blocks = ceil_div(p.layers[pairs[2 * pair]].cols, shape.rows);
      shape.col_blocks = ceil_div(p.layers[pairs[2 * pair + 1]].cols, shape.cols);
      return shape;
    };
    first[0] = 0;
    for (int64_t i = 0; i < pair_count; i++) {
      const TileShape shape = shape_of(i);
      first[i + 1] = first[i] + shape.row_blocks * shape.col_blocks;
    }
    const auto work = [&](int64_t task, int64_t slot) {
      int64_t pair = 0, beyond = pair_count;  // bisection: first[pair] <= task < first[beyond]
      while (beyond - pair > 1) {
        const int64_t middle = (pair + beyond) / 2;
        (first[middle] <= task ? pair : beyond) = middle;
      }
      const int64_t a = pairs[2 * pair], b = pairs[2 * pair + 1];
      const TileShape shape = shape_of(pair);
      const Span at(shape, task - first[pair], p.layers[a].cols, p.layers[b].cols);
      pair_of[slot] = pair;
      value_of[slot] = 0;
      if (a == b && at.below_diagonal()) return;
      T* const tile = memory.as<T>(bytes * thread_number());
      const TileBuffers<T> buffers(tile + tile_size, shape.rows);
      tile_product(prepared.features(a), at.r0, at.rows, prepared.features(b), at.c0, at.cols, p.n, a == b, buffers,
                   tile, shape.cols);
      value_of[slot] = use(tile, shape.cols, pair, at, a == b);
    };
    in_task_order(first[pair_count], slots, p.threads, work,
                  [&](int64_t, int64_t slot) { commit(value_of[slot], pair_of[slot]); });
    return Status::ok;
  }

  // Turns the squared norms in d into the kernel's diagonal, and gives a linear kernel its row sums: centred rows add
  // up to zero, so the sum over j != i is minus the diagonal.
  static void finish(const GramProblem& p, const GramStats& out) {
    for (int64_t l = 0; l < p.count; l++)
      for (int64_t i = 0; i < p.n; i++) {
        double& d = out.d[l * p.n + i];
        switch (p.kernel) {
          case GramKernel::linear:
            out.r[l * p.n + i] = -d;
            break;
          case GramKernel::rbf:
          case GramKernel::laplacian:
            d = d == d ? 1 - out.shift[l] : d;
            break;
          case GramKernel::polynomial: {
            const double base = d * p.scale[l] + p.coef0;
            d = base;
            for (int power = 1; power < p.degree; power++) d *= base;
            d -= out.shift[l];
            break;
          }
          case GramKernel::cosine:
            d = (d == 0 ? 0 : d / d) - out.shift[l];
            break;
        }
      }
  }

  static int64_t thread_number() { return omp_get_thread_num(); }
};

// Calls Gram<storage type>::function.
#define PYREPR_BY_DTYPE(p, call)    \
  switch ((p).dtype) {              \
    case DType::f64:                \
      return Gram<StoreF64>::call;  \
    case DType::bf16:               \
      return Gram<StoreBf16>::call; \
    case DType::f16:                \
      return Gram<StoreF16>::call;  \
    default:                        \
      return Gram<StoreF32>::call;  \
  }

Status stats(const GramProblem& p, const GramStats& out){PYREPR_BY_DTYPE(p, stats(p, out))} Status
    stats_by_features(const GramProblem& p, int64_t split,
                      const GramStats& out){PYREPR_BY_DTYPE(p, stats_by_features(p, split, out))} Status
    matrix(const GramProblem& p, bool centre, void* out){PYREPR_BY_DTYPE(p, matrix(p, centre, out))} Status
    median(const GramProblem& p, double* out){PYREPR_BY_DTYPE(p, median(p, out))} Status
    moments(const GramProblem& p, const int64_t* pairs, int64_t pair_count,
            double* const* blocks){PYREPR_BY_DTYPE(p, moments(p, pairs, pair_count, blocks))} Status
    apply(const GramProblem& p, bool centre, const void* weights, int64_t rows, void* out) {
  PYREPR_BY_DTYPE(p, apply(p, centre, weights, rows, out))
}
#undef PYREPR_BY_DTYPE

}  // namespace

GramFunctions gram_functions() { return {stats, stats_by_features, matrix, median, moments, apply}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
