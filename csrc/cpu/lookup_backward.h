// The backward of family `lookup`. Included by level units only (see simd.h).
#pragma once

#include "cpu/lookup_rows.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// A gradient larger than this is written past the caches: it would leave them before anybody reads it, and a line that
// is written whole need not be read first.
constexpr int64_t kPastCaches = int64_t(32) << 20;

template <class T>
inline void store_past_caches(T* p, Vec<T> v) {
#if defined(PYREPR_LEVEL_avx512) || defined(PYREPR_LEVEL_avx512_bf16)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(PYREPR_LEVEL_avx2)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
  store<T>(p, v);
#endif
}
// Such stores are ordered with nothing; other threads may look at the memory after this.
inline void finish_past_caches() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// Both derivatives of the sum, table by table: the tokens are sorted by code (a stable counting sort), then a table's
// row, its gradient and the dot products of its tokens are finished together while the row stands in registers.
template <class S>
class Backward {
 public:
  using T = typename S::T;
  using M = typename S::Memory;
  static constexpr int W = Lanes<T>::W;
  static constexpr int V = 4;
  static constexpr int64_t C = V * W;

  Backward(const LookupTables& tables, const View& grad, const int64_t* first, T* segments, bool dots)
      : a_(tables),
        data_(static_cast<const M*>(tables.data)),
        grad_(grad),
        first_(first),
        segments_(segments),
        want_dots_(dots),
        tokens_(grad.rows),
        tiles_(ceil_div(tables.h, C)),
        tiled_(tiles_ * grad.rows * C * int64_t(sizeof(T))),
        codes_(tables.K * grad.rows * 4),
        weights_(tables.K * grad.rows * int64_t(sizeof(T))),
        past_caches_(!first && tables.h % C == 0 && tables.K * tables.n * tables.h * int64_t(sizeof(T)) > kPastCaches &&
                     reinterpret_cast<uintptr_t>(segments) % 64 == 0) {}

  Status run(const int32_t* codes, const T* weights, T* dots) const {
    if (a_.h == 0) {
      if (want_dots_) std::memset(dots, 0, static_cast<size_t>(tokens_ * a_.K) * sizeof(T));
      return Status::ok;
    }
    // Without dot products a table's columns can be shared out too.
    const int64_t shares = want_dots_ ? 1 : smaller(tiles_, ceil_div(4 * a_.threads, larger<int64_t>(a_.K, 1)));
    const int64_t tasks = a_.K * shares, per_share = ceil_div(tiles_, larger<int64_t>(shares, 1));
    const int threads =
        (tokens_ * a_.K * a_.h + a_.K * a_.n * a_.h) * int64_t(sizeof(T)) < kParallelBytes ? 1 : a_.threads;
    const int64_t bytes = Order::bytes(tokens_, a_.n);
    const Memory memory(bytes * threads);
    if (!tiled_.ok() || !codes_.ok() || !weights_.ok() || !memory.ok()) return Status::out_of_memory;
    T* const by_table = weights_.template as<T>();
    transpose(codes, codes_.template as<int32_t>(), tokens_, a_.K);
    transpose(weights, by_table, tokens_, a_.K);
    make_tiles();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t k = task / shares, tile = task % shares * per_share;
      Order order(memory.as<char>(bytes * thread_number()), tokens_, a_.n);
      order.sort(codes_.template as<int32_t>() + k * tokens_, by_table + k * tokens_);
      walk(k, tile, smaller(tile + per_share, tiles_), order);
      if (past_caches_) finish_past_caches();
      // The table's weights have been used up: its dot products take their place.
      if (want_dots_) order.unsort(a_.scales ? a_.scales + k * a_.n : nullptr, by_table + k * tokens_);
    }
    if (want_dots_) transpose(by_table, dots, a_.K, tokens_);
    return Status::ok;
  }

 private:
  // The tokens of one table in the order of their codes: bucket b holds tokens start[b] <= i < start[b + 1] of `token`.
  struct Order {
    int64_t tokens, n, buckets = 0;
    int32_t *token, *start, *code, *count;
    T *weight, *dot;

    static int64_t bytes(int64_t tokens, int64_t n) {
      const int64_t occupied = smaller(tokens, n);
      return round_up(2 * (tokens + W) * int64_t(sizeof(T)) + (tokens + 2 * occupied + n + 2) * 4, 64);
    }
    Order(char* memory, int64_t tokens_, int64_t n_) : tokens(tokens_), n(n_) {
      weight = reinterpret_cast<T*>(memory);
      dot = weight + tokens + W;
      token = reinterpret_cast<int32_t*>(dot + tokens + W);
      start = token + tokens;
      code = start + smaller(tokens, n) + 1;
      count = code + smaller(tokens, n);
    }

    void sort(const int32_t* codes, const T* weights) {
      std::memset(count, 0, static_cast<size_t>(n) * 4);
      for (int64_t t = 0; t < tokens; t++) count[codes[t]]++;
      int32_t sum = 0;
      for (int64_t c = 0; c < n; c++) {
        const int32_t here = count[c];
        count[c] = sum;
        if (here) {
          start[buckets] = sum;
          code[buckets++] = static_cast<int32_t>(c);
        }
        sum += here;
      }
      start[buckets] = sum;
      for (int64_t t = 0; t < tokens; t++) {
        const int32_t at = count[codes[t]]++;
        token[at] = static_cast<int32_t>(t);
        weight[at] = weights[t];
      }
    }
    void unsort(const float* scales, T* dots) const {
      for (int64_t b = 0; b < buckets; b++) {
        const T scale = scales ? static_cast<T>(scales[code[b]]) : T(1);
        for (int64_t i = start[b]; i < start[b + 1]; i++) dots[token[i]] = dot[i] * scale;
      }
    }
  };

  // out [cols, rows] = in [rows, cols], in blocks that stay in L1.
  template <class E>
  void transpose(const E* in, E* out, int64_t rows, int64_t cols) const {
    constexpr int64_t edge = 32;
    const int64_t across = ceil_div(cols, edge), blocks = ceil_div(rows, edge) * across;
#pragma omp parallel for schedule(static) num_threads(a_.threads) if (rows * cols * int64_t(sizeof(E)) > kParallelBytes)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t r0 = block / across * edge, c0 = block % across * edge;
      const int64_t r1 = smaller(r0 + edge, rows), c1 = smaller(c0 + edge, cols);
      for (int64_t c = c0; c < c1; c++)
        for (int64_t r = r0; r < r1; r++) out[c * rows + r] = in[r * cols + c];
    }
  }

  // The gradient as [tiles, tokens, C], the last tile padded with zeros.
  void make_tiles() const {
    T* const out = tiled_.template as<T>();
#pragma omp parallel for schedule(static) \
    num_threads(a_.threads) if (tokens_ * a_.h * int64_t(sizeof(T)) > kParallelBytes)
    for (int64_t t = 0; t < tokens_; t++) {
      const T* const row = static_cast<const T*>(grad_.data) + t * grad_.row_stride;
      for (int64_t tile = 0; tile < tiles_; tile++) {
        T* const to = out + (tile * tokens_ + t) * C;
        const int64_t cols = smaller(C, a_.h - tile * C);
        if (cols < C) std::memset(to, 0, C * sizeof(T));
        std::memcpy(to, row + tile * C, static_cast<size_t>(cols) * sizeof(T));
      }
    }
  }

  void walk(int64_t k, int64_t tile0, int64_t tile1, const Order& order) const {
    const bool few = order.buckets < a_.n / 2;
    T* const gradient = segments_ ? segments_ + (first_ ? first_[k] : k * a_.n) * a_.h : nullptr;
    const int64_t c0 = tile0 * C, c1 = smaller(tile1 * C, a_.h);
    if (segments_ && !first_ && few)
      for (int64_t r = 0; r < a_.n && c0 < c1; r++)
        std::memset(gradient + r * a_.h + c0, 0, static_cast<size_t>(c1 - c0) * sizeof(T));
    for (int64_t tile = tile0; tile < tile1; tile++) {
      if (segments_ && want_dots_) walk_tile<true, true>(k, tile, few, gradient, order);
      if (segments_ && !want_dots_) walk_tile<true, false>(k, tile, few, gradient, order);
      if (!segments_ && want_dots_) walk_tile<false, true>(k, tile, few, gradient, order);
    }
  }

  template <bool SEGMENTS, bool DOTS>
  void walk_tile(int64_t k, int64_t tile, bool zeroed, T* gradient, const Order& order) const {
    const T* const grad = tiled_.template as<T>() + tile * tokens_ * C;
    const int64_t cols = smaller(C, a_.h - tile * C), step = a_.h;
    const Vec<T> zero[V] = {};
    Products products(order.dot, tile > 0);
    int64_t written = 0;
    for (int64_t b = 0; b < order.buckets; b++) {
      const int64_t code = order.code[b];
      Vec<T> row[V] = {}, sum[V] = {};
      if constexpr (DOTS) {
        const M* const from = data_ + (k * a_.n + code) * a_.h + tile * C;
        const M* const later = data_ + (k * a_.n + order.code[smaller(b + 8, order.buckets - 1)]) * a_.h + tile * C;
        for (int64_t c = 0; c < cols; c += 64 / int64_t(sizeof(M))) __builtin_prefetch(later + c);
        load_row(from, cols, row);
      }
      for (int64_t i = order.start[b]; i < order.start[b + 1]; i++) {
        const T* const g = grad + int64_t(order.token[i]) * C;
        const Vec<T> w = splat<T>(order.weight[i]);
        Vec<T> product{};
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          const Vec<T> x = load<T>(g + v * W);
          if constexpr (SEGMENTS) sum[v] += w * x;
          if constexpr (DOTS) product += row[v] * x;
        }
        if constexpr (DOTS) products.put(i, product);
      }
      if constexpr (SEGMENTS) {
        if (!first_ && !zeroed)
          for (; written < code; written++) put_row(gradient + written * step + tile * C, cols, zero);
        put_row(gradient + (first_ ? b : code) * step + tile * C, cols, sum);
        written = code + 1;
      }
    }
    if constexpr (SEGMENTS)
      if (!first_ && !zeroed)
        for (; written < a_.n; written++) put_row(gradient + written * step + tile * C, cols, zero);
    if constexpr (DOTS) products.finish(tokens_);
  }

  static void load_row(const M* p, int64_t cols, Vec<T> (&row)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      if (cols == C)
        row[v] = load_as<S>(p + v * W);
      else
        row[v] = load_some<S>(p + v * W, cols - v * W);
    }
  }
  void put_row(T* p, int64_t cols, const Vec<T> (&row)[V]) const {
    if (past_caches_) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store_past_caches<T>(p + v * W, row[v]);
      return;
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      if (cols == C)
        store<T>(p + v * W, row[v]);
      else
        store_some<StoreOf<T>>(p + v * W, cols - v * W, row[v]);
    }
  }

  // Turns W vectors at a time into the W sums of their lanes: out[i] = or += sum of the lanes of vector i.
  class Products {
   public:
    Products(T* out, bool add) : out_(out), add_(add) {}
    void put(int64_t i, Vec<T> v) {
      store<T>(kept_ + i % W * W, v);
      if (i % W == W - 1) reduce(i + 1 - W);
    }
    void finish(int64_t count) {
      if (count % W) reduce(count / W * W);
    }

   private:
    void reduce(int64_t i) {
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) v[j] = load<T>(kept_ + j * W);
      transpose_registers<T>(v);
#pragma GCC unroll 16
      for (int j = 1; j < W; j++) v[0] += v[j];
      store<T>(out_ + i, add_ ? load<T>(out_ + i) + v[0] : v[0]);
    }
    alignas(64) T kept_[W * W] = {};
    T* const out_;
    const bool add_;
  };

  const LookupTables& a_;
  const M* const data_;
  const View& grad_;
  const int64_t* const first_;
  T* const segments_;
  const bool want_dots_;
  const int64_t tokens_, tiles_;
  const Memory tiled_, codes_, weights_;
  const bool past_caches_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
