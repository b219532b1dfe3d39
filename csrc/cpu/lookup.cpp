// Family `lookup` on the CPU, compiled once per instruction set (PYREPR_LEVEL). The maths is in lookup.h.
//
// Bytes at best, s bytes a table entry: rows T K h s (a decoder's single token: memory-bound); stream K n h s once per
// kTokens tokens, then T K h multiply-adds out of L2; backward reads and writes every table once and does 2 T K h
// multiply-adds out of L2.
//
// Determinism: an element of `out` is summed by one thread in the order of k, one of `segments` in the order of tokens,
// one of `dots` in the order of columns, whatever the shares of the threads are.
#include "cpu/lookup.h"

#include <omp.h>

#include "cpu/lookup_hash.h"

namespace pyrepr {
inline namespace PYREPR_LEVEL {
namespace {

struct StoreI8 {
  using T = float;
  using Memory = int8_t;
};
template <>
inline Vec<float> load_as<StoreI8>(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
  typedef int16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  // By way of 16 bits: compilers know the instructions that widen to twice the size.
  const Halves wide = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Halves);
  return __builtin_convertvector(__builtin_convertvector(wide, Lanes<float>::I), Vec<float>);
}

}  // namespace
}  // namespace PYREPR_LEVEL

namespace cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kGroup = 8;                       // tables whose codes and weights stand together
constexpr int64_t kTokens = 8192;                   // tokens hashed at a time
constexpr int64_t kTileBytes = int64_t(512) << 10;  // of tables, in half an L2 cache
constexpr int64_t kWidestTile = int64_t(1) << 20;   // larger than this a tile cannot be kept in L2

// Codes and weights of a block of tokens in the order the forward kernels read them: [K / kGroup, tokens, kGroup]. The
// row scales of 8-bit tables are folded into the weights.
template <class T>
class Plan {
 public:
  Plan(const LookupTables& tables, int64_t capacity)
      : tables_(tables),
        size_(ceil_div(tables.K, kGroup) * kGroup * capacity),
        memory_(size_ * int64_t(4 + sizeof(T)) + 64) {}
  bool ok() const { return memory_.ok(); }
  const int32_t* codes(int64_t group, int64_t t) const {
    return memory_.template as<int32_t>() + at(group * kGroup, t);
  }
  const T* weights(int64_t group, int64_t t) const { return weights_begin() + at(group * kGroup, t); }
  int64_t tokens() const { return tokens_; }

  template <class X>
  Status hash(const LookupHash& p, int64_t t0, int64_t t1) {
    tokens_ = t1 - t0;
    return for_each_token<X>(p, t0, t1, [&](const Chunks<X>& chunks, int64_t t) {
      for (int64_t k = 0; k < tables_.K; k++) put(k, t - t0, chunks.code(k), chunks.weight(k));
    });
  }

  void copy(const int32_t* codes, const T* weights, int64_t t0, int64_t t1) {
    tokens_ = t1 - t0;
#pragma omp parallel for schedule(static) num_threads(tables_.threads) if (tokens_ * tables_.K > kParallelWork)
    for (int64_t t = t0; t < t1; t++)
      for (int64_t k = 0; k < tables_.K; k++) put(k, t - t0, codes[t * tables_.K + k], weights[t * tables_.K + k]);
  }

 private:
  int64_t at(int64_t k, int64_t t) const { return (k / kGroup * tokens_ + t) * kGroup + k % kGroup; }
  T* weights_begin() const { return memory_.template as<T>(round_up(size_ * 4, 64)); }
  void put(int64_t k, int64_t t, int32_t code, T weight) const {
    if (tables_.scales) weight *= static_cast<T>(tables_.scales[k * tables_.n + code]);
    memory_.template as<int32_t>()[at(k, t)] = code;
    weights_begin()[at(k, t)] = weight;
  }

  const LookupTables& tables_;
  const int64_t size_;
  const Memory memory_;
  int64_t tokens_ = 0;
};

// How a tile of a table is kept in L2, row by row of 4 vectors: as it is computed with, or, where 16 bits hold every
// value exactly, as pairs of bfloat16 that one shift or mask widens.
template <class S>
struct Wide {
  using T = typename S::T;
  using E = T;
  static void put(E* out, const Vec<T> (&row)[4]) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) store<T>(out + v * Lanes<T>::W, row[v]);
  }
  static void get(const E* in, Vec<T> (&row)[4]) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) row[v] = load<T>(in + v * Lanes<T>::W);
  }
};
struct Pairs {
  using E = uint16_t;
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  static void put(E* out, const Vec<float> (&row)[4]) {
#pragma GCC unroll 2
    for (int v = 0; v < 4; v += 2) {
      U32 low, high;
      std::memcpy(&low, &row[v], sizeof low);
      std::memcpy(&high, &row[v + 1], sizeof high);
      *reinterpret_cast<Words*>(out + v * Lanes<float>::W) = (low >> 16) | (high & 0xffff0000u);
    }
  }
  static void get(const E* in, Vec<float> (&row)[4]) {
#pragma GCC unroll 2
    for (int v = 0; v < 4; v += 2) {
      const U32 words = *reinterpret_cast<const Words*>(in + v * Lanes<float>::W);
      row[v] = bits_to_float(words << 16);
      row[v + 1] = bits_to_float(words & 0xffff0000u);
    }
  }
};
template <class S>
struct TileOf {
  using Kind = Wide<S>;
};
template <>
struct TileOf<StoreBf16> {
  using Kind = Pairs;
};
template <>
struct TileOf<StoreI8> {
  using Kind = Pairs;
};

// The forward of a block of tokens: `out` points to the block's first row.
template <class S>
class Forward {
 public:
  using T = typename S::T;
  using M = typename S::Memory;
  using Tile = typename TileOf<S>::Kind;
  using E = typename Tile::E;
  static constexpr int W = Lanes<T>::W;
  static constexpr int V = 4;          // vectors of a column tile
  static constexpr int64_t C = V * W;  // its columns

  Forward(const LookupTables& tables, const Plan<T>& plan, const T* bias, T* out)
      : a_(tables), data_(static_cast<const M*>(tables.data)), plan_(plan), bias_(bias), out_(out) {}

  // Measured on a 2-core Zen 4, 256 rows a table: level at 4 tokens a row, ahead from there on.
  static bool streams(const LookupTables& a, int64_t tokens, LookupRoute route) {
    if (a.n * C * int64_t(sizeof(E)) > kWidestTile) return false;
    return route == LookupRoute::stream || (route == LookupRoute::by_size && tokens >= 4 * a.n);
  }

  Status run(bool stream) const {
    if (stream) return by_tables();
    by_rows();
    return Status::ok;
  }

 private:
  static constexpr int64_t kRows = 4;   // rows added at a time
  static constexpr int64_t kAhead = 8;  // rows between the one being added and the one being fetched
  static constexpr int64_t kBlock =
      32;  // tables a token visits in one go: several tokens meet in a row while it is in L3
  static constexpr int64_t kPiece = 1024;   // bytes of a row to read at a time: fewer cost memory bandwidth
  static constexpr int64_t kCopyAhead = 8;  // rows between the one being copied and the one being fetched
  static constexpr int64_t kLine = 64 / int64_t(sizeof(M));  // elements of a cache line

  // Threads share the columns first (they then read different parts of the same rows), then the tokens.
  void by_rows() const {
    const int64_t work = plan_.tokens() * a_.K * a_.h;
    const int64_t wanted = work < kParallelWork ? 1 : a_.threads;
    const int64_t across = smaller(wanted, larger<int64_t>(1, a_.h / (2 * kLine)));
    const int64_t down = smaller(ceil_div(wanted, across), plan_.tokens());
    const int64_t cols = round_up(ceil_div(a_.h, across), kLine);
    const int64_t tokens = ceil_div(plan_.tokens(), down);
    const int threads = static_cast<int>(smaller<int64_t>(wanted, across * down));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < across * down; part++) {
      const int64_t c0 = part % across * cols, t0 = part / across * tokens;
      const int64_t c1 = smaller(c0 + cols, a_.h), t1 = smaller(t0 + tokens, plan_.tokens());
      if (c0 < c1 && t0 < t1) gather(t0, t1, c0, c1 - c0);
    }
  }

  void gather(int64_t t0, int64_t t1, int64_t c0, int64_t cols) const {
    const M* rows[kBlock + kAhead];
    T weights[kBlock];
    for (int64_t t = t0; t < t1; t++)
      for (int64_t j = 0; j < cols; j++) out_[t * a_.h + c0 + j] = bias_ ? bias_[c0 + j] : T(0);
    for (int64_t k0 = 0; k0 < a_.K; k0 += kBlock)
      for (int64_t t = t0; t < t1; t++) {
        const int64_t count = smaller(kBlock, a_.K - k0);
        for (int64_t i = 0; i < count; i++) {
          const int64_t k = k0 + i;
          rows[i] = row(k, t) + c0;
          weights[i] = plan_.weights(k / kGroup, t)[k % kGroup];
        }
        // What comes after this token's share of the block: the next token's, or the first token's of the next block.
        const bool last = t + 1 == t1;
        const int64_t k1 = last ? k0 + kBlock : k0, next = last ? t0 : t + 1;
        for (int64_t i = 0; i < kAhead; i++) rows[count + i] = k1 + i < a_.K ? row(k1 + i, next) + c0 : rows[0];
        int64_t i = 0;
        for (; i + kRows <= count; i += kRows) add_rows<kRows>(rows + i, weights + i, cols, out_ + t * a_.h + c0);
        for (; i < count; i++) add_rows<1>(rows + i, weights + i, cols, out_ + t * a_.h + c0);
      }
  }

  const M* row(int64_t k, int64_t t) const {
    return data_ + (k * a_.n + plan_.codes(k / kGroup, t)[k % kGroup]) * a_.h;
  }

  template <int R>
  static void add_rows(const M* const* rows, const T* weights, int64_t cols, T* out) {
    Vec<T> w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) w[r] = splat<T>(weights[r]);
    int64_t j = 0;
    for (; j + kLine <= cols; j += kLine) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) __builtin_prefetch(rows[r + kAhead] + j);
#pragma GCC unroll 16
      for (int64_t v = 0; v < kLine; v += W) {
        Vec<T> sum = load<T>(out + j + v);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum += w[r] * load_as<S>(rows[r] + j + v);
        store<T>(out + j + v, sum);
      }
    }
    for (; j < cols; j += W) {
      const int64_t count = smaller<int64_t>(W, cols - j);
      Vec<T> sum = load_part_of_out(out + j, count);
      for (int r = 0; r < R; r++) sum += w[r] * load_part<S>(rows[r] + j, count);
      store_part<T>(out + j, sum, count);
    }
  }
  static Vec<T> load_part_of_out(const T* p, int64_t count) {
    Vec<T> v{};
    std::memcpy(&v, p, static_cast<size_t>(count) * sizeof *p);
    return v;
  }

  // Spans of columns, as wide as memory likes to be read, are cut into tiles as narrow as L2 needs them: a few tables'
  // tiles are copied side by side, and every token adds its rows of them to its sums.
  Status by_tables() const {
    const Spans shape(a_, plan_.tokens());
    const Memory memory(shape.bytes() * a_.threads);
    if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a_.threads)
    for (int64_t task = 0; task < shape.spans * shape.blocks; task++) {
      const int64_t c0 = task / shape.blocks * shape.cols, cols = smaller(shape.cols, a_.h - c0),
                    tiles = ceil_div(cols, C);
      const int64_t t0 = task % shape.blocks * shape.tokens, t1 = smaller(t0 + shape.tokens, plan_.tokens());
      T* const sums = memory.as<T>(shape.bytes() * thread_number());
      E* const copies = reinterpret_cast<E*>(sums + shape.tokens * shape.cols);
      start_sums(c0, cols, t1 - t0, sums);
      for (int64_t k = 0; k < a_.K; k += shape.together) {
        const int64_t count = smaller(shape.together, a_.K - k), rows = count * a_.n;
        copy_tiles(data_ + k * a_.n * a_.h + c0, rows, cols, copies);
        for (int64_t tile = 0; tile < tiles; tile++)
          add_tile(k, count, t0, t1, copies + tile * rows * C, sums + tile * (t1 - t0) * C);
      }
      for (int64_t t = t0; t < t1; t++)
        for (int64_t c = 0; c < cols; c += C)
          std::memcpy(out_ + t * a_.h + c0 + c, sums + (c / C * (t1 - t0) + t - t0) * C,
                      static_cast<size_t>(smaller(C, cols - c)) * sizeof(T));
    }
    return Status::ok;
  }

  struct Spans {
    int64_t cols, spans, tokens, blocks, together, copied;

    Spans(const LookupTables& a, int64_t count) {
      together = kGroup;
      while (together > 1 && together * a.n * C * int64_t(sizeof(E)) > kTileBytes) together /= 2;
      const int64_t share = round_up(ceil_div(a.h, a.threads), C),
                    copies = 4 * kTileBytes / (together * a.n * int64_t(sizeof(E)));
      cols = larger(C, smaller(share, smaller(kPiece / int64_t(sizeof(M)), copies / C * C)));
      spans = ceil_div(a.h, cols);
      tokens = ceil_div(count, smaller(ceil_div(a.threads, spans), ceil_div(count, a.n)));
      blocks = ceil_div(count, tokens);
      copied = together * a.n * cols;
    }
    int64_t bytes() const { return round_up(tokens * cols * int64_t(sizeof(T)) + copied * int64_t(sizeof(E)), 64); }
  };

  // sums [tiles, tokens, C] = bias
  void start_sums(int64_t c0, int64_t cols, int64_t tokens, T* sums) const {
    for (int64_t c = 0; c < cols; c += C) {
      alignas(64) T start[C] = {};
      if (bias_) std::memcpy(start, bias_ + c0 + c, static_cast<size_t>(smaller(C, cols - c)) * sizeof(T));
      for (int64_t t = 0; t < tokens; t++, sums += C) std::memcpy(sums, start, sizeof start);
    }
  }

  // out [tiles, rows, C] = in [rows, cols]
  void copy_tiles(const M* in, int64_t rows, int64_t cols, E* out) const {
    for (int64_t r = 0; r < rows; r++, in += a_.h, out += C) {
      for (int64_t c = 0; c < cols; c += kLine) __builtin_prefetch(in + kCopyAhead * a_.h + c);
      for (int64_t c = 0; c < cols; c += C) {
        Vec<T> row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          const int64_t left = cols - c - v * W;
          row[v] = left >= W ? load_as<S>(in + c + v * W) : load_part<S>(in + c + v * W, larger<int64_t>(0, left));
        }
        Tile::put(out + c * rows, row);
      }
    }
  }

  // sums [tokens, C] += the rows of `count` tables' tiles [n, C] from table k on
  void add_tile(int64_t k, int64_t count, int64_t t0, int64_t t1, const E* tile, T* sums) const {
    const int32_t* codes = plan_.codes(k / kGroup, t0) + k % kGroup;
    const T* weights = plan_.weights(k / kGroup, t0) + k % kGroup;
    const int64_t size = a_.n * C;
    for (int64_t t = t0; t < t1; t++, sums += C, codes += kGroup, weights += kGroup) {
      Vec<T> sum[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[v] = load<T>(sums + v * W);
      const E* at = tile;
      for (int64_t i = 0; i < count; i++, at += size) {
        const Vec<T> w = weights[i] - Vec<T>{};
        Vec<T> row[V];
        Tile::get(at + codes[i] * C, row);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[v] += w * row[v];
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store<T>(sums + v * W, sum[v]);
    }
  }

  const LookupTables& a_;
  const M* const data_;
  const Plan<T>& plan_;
  const T* const bias_;
  T* const out_;
};

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
        weights_(tables.K * grad.rows * int64_t(sizeof(T))) {}

  Status run(const int32_t* codes, const T* weights, T* dots) const {
    // Without dot products a table's columns can be shared out too.
    const int64_t shares = want_dots_ ? 1 : smaller(tiles_, ceil_div(4 * a_.threads, larger<int64_t>(a_.K, 1)));
    const int64_t tasks = a_.K * shares, per_share = ceil_div(tiles_, larger<int64_t>(shares, 1));
    const int threads = tokens_ * a_.K * a_.h + a_.K * a_.n * a_.h < kParallelWork ? 1 : a_.threads;
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
#pragma omp parallel for schedule(static) num_threads(a_.threads) if (rows * cols > kParallelWork)
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
#pragma omp parallel for schedule(static) num_threads(a_.threads) if (tokens_ * a_.h > kParallelWork)
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
          for (; written < code; written++)
            std::memset(gradient + written * step + tile * C, 0, static_cast<size_t>(cols) * sizeof(T));
        store_row(gradient + (first_ ? b : code) * step + tile * C, cols, sum);
        written = code + 1;
      }
    }
    if constexpr (SEGMENTS)
      if (!first_ && !zeroed)
        for (; written < a_.n; written++)
          std::memset(gradient + written * step + tile * C, 0, static_cast<size_t>(cols) * sizeof(T));
    if constexpr (DOTS) products.finish(tokens_);
  }

  static void load_row(const M* p, int64_t cols, Vec<T> (&row)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      if (cols == C)
        row[v] = load_as<S>(p + v * W);
      else
        row[v] = load_part<S>(p + v * W, smaller<int64_t>(W, larger<int64_t>(0, cols - v * W)));
    }
  }
  static void store_row(T* p, int64_t cols, const Vec<T> (&row)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      if (cols == C)
        store<T>(p + v * W, row[v]);
      else
        store_part<T>(p + v * W, row[v], smaller<int64_t>(W, larger<int64_t>(0, cols - v * W)));
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
};

// Calls f(X{}) with the storage type of x, f(S{}) with that of the tables.
template <class F>
Status by_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(StoreF64{});
    case DType::bf16:
      return f(StoreBf16{});
    case DType::f16:
      return f(StoreF16{});
    default:
      return f(StoreF32{});
  }
}
template <class F>
Status by_type(TableType type, F f) {
  return type == TableType::i8 ? f(StoreI8{}) : by_dtype(static_cast<DType>(type), f);
}

// Blocks of tokens: `plan_block(plan, t0, t1)` writes their codes and weights, then the rows are added.
template <class S, class PlanBlock>
Status forward(const LookupTables& a, int64_t tokens, const void* bias, LookupRoute route, void* out,
               PlanBlock plan_block) {
  using T = typename S::T;
  Plan<T> plan(a, smaller(tokens, kTokens));
  if (!plan.ok()) return Status::out_of_memory;
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
    const int64_t t1 = smaller(t0 + kTokens, tokens);
    Status status = plan_block(plan, t0, t1);
    const Forward<S> forward(a, plan, static_cast<const T*>(bias), static_cast<T*>(out) + t0 * a.h);
    if (status == Status::ok) status = forward.run(Forward<S>::streams(a, t1 - t0, route));
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

Status linear(const LookupTables& a, const LookupHash& p, const void* bias, LookupRoute route, void* out) {
  return by_type(a.type, [&](auto s) {
    using S = decltype(s);
    return forward<S>(a, p.x.rows, bias, route, out, [&](Plan<typename S::T>& plan, int64_t t0, int64_t t1) {
      if constexpr (sizeof(typename S::T) == 8)
        return plan.template hash<StoreF64>(p, t0, t1);
      else
        return by_dtype(p.dtype, [&](auto x) {
          using X = decltype(x);
          if constexpr (sizeof(typename X::T) == 8)
            return Status::ok;  // excluded by the binding
          else
            return plan.template hash<X>(p, t0, t1);
        });
    });
  });
}

Status sum(const LookupTables& a, int64_t tokens, const int32_t* codes, const void* weights, LookupRoute route,
           void* out) {
  return by_type(a.type, [&](auto s) {
    using T = typename decltype(s)::T;
    return forward<decltype(s)>(a, tokens, nullptr, route, out, [&](Plan<T>& plan, int64_t t0, int64_t t1) {
      plan.copy(codes, static_cast<const T*>(weights), t0, t1);
      return Status::ok;
    });
  });
}

Status backward(const LookupTables& a, const View& grad, const int32_t* codes, const void* weights,
                const int64_t* first, void* segments, void* dots) {
  return by_type(a.type, [&](auto s) {
    using T = typename decltype(s)::T;
    const Backward<decltype(s)> backward(a, grad, first, static_cast<T*>(segments), dots != nullptr);
    return backward.run(codes, static_cast<const T*>(weights), static_cast<T*>(dots));
  });
}

Status hash(const LookupHash& p, int32_t* codes, void* weights) {
  return by_dtype(p.dtype, [&](auto x) {
    using X = decltype(x);
    const int64_t K = p.x.cols / p.bits;
    return for_each_token<X>(p, 0, p.x.rows, [&](const Chunks<X>& chunks, int64_t t) {
      for (int64_t k = 0; k < K; k++) {
        codes[t * K + k] = chunks.code(k);
        static_cast<typename X::T*>(weights)[t * K + k] = chunks.weight(k);
      }
    });
  });
}

Status hash_backward(const LookupHash& p, const void* grad_weights, void* grad) {
  return by_dtype(p.dtype, [&](auto x) {
    using X = decltype(x);
    using T = typename X::T;
    const int64_t d = p.x.cols, K = d / p.bits;
    return for_each_token<X>(p, 0, p.x.rows, [&](const Chunks<X>& chunks, int64_t t) {
      for (int64_t k = 0; k < K; k++)
        chunks.derivative(k, static_cast<const T*>(grad_weights)[t * K + k],
                          static_cast<T*>(grad) + t * d + k * p.bits);
    });
  });
}

}  // namespace

LookupFunctions lookup_functions() { return {hash, hash_backward, linear, sum, backward}; }

}  // namespace cpu::PYREPR_LEVEL
}  // namespace pyrepr
