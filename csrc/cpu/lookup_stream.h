// The forward of family `lookup` for many tokens. A thread owns a tile of columns: it brings the tiles of a group of
// tables into L2, copied row by row, or, of packed tables, read through as they stand, and all tokens add their rows of
// them to their sums there. Included by level units only (see simd.h).
//
// Bringing and adding take turns. Measured on Zen 4: prefetches in between the additions hold the few buffers for
// misses of L1 that the additions need themselves, while plain loads in sequence run at the speed of memory.
#pragma once

#include "cpu/lookup_rows.h"
#if defined(PYREPR_LEVEL_avx512_bf16)
#include "cpu/lookup_bytes.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kGroupBytes = int64_t(512) << 10;  // of the tiles of a group of tables, in half an L2 cache
constexpr int64_t kTileBytes = int64_t(512) << 10;   // of one table's tile at most: a larger one cannot be kept in L2

// A row of a tile times w, added to the vectors of a sum: in memory order, or of bfloat16 even columns in the first
// half of the vectors and odd ones in the second, because a shift and a mask widen a word of two.
template <class S>
struct TileRow {
  using T = typename S::T;
  static constexpr int W = Lanes<T>::W, V = kLookupTile / W;
  static void add(const typename S::Memory* row, Vec<T> w, Vec<T> (&sum)[V]) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sum[v] += w * load_as<S>(row + v * W);
  }
  static void order(const T* in, T* out) { std::memcpy(out, in, kLookupTile * sizeof(T)); }
  static void restore(const T* in, T* out) { order(in, out); }
};
template <>
struct TileRow<StoreBf16> {
  using T = float;
  static constexpr int W = Lanes<float>::W, V = kLookupTile / W, half = kLookupTile / 2;
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  static void add(const uint16_t* row, Vec<float> w, Vec<float> (&sum)[V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V / 2; v++) {
      const U32 pair = *reinterpret_cast<const Words*>(row + v * 2 * W);
      sum[v] += w * bits_to_float(pair << 16);
      sum[V / 2 + v] += w * bits_to_float(pair & 0xffff0000u);
    }
  }
  static void order(const float* in, float* out) {
    for (int i = 0; i < half; i++) out[i] = in[2 * i], out[half + i] = in[2 * i + 1];
  }
  static void restore(const float* in, float* out) {
    for (int i = 0; i < half; i++) out[2 * i] = in[i], out[2 * i + 1] = in[half + i];
  }
};

// `out` points to the first row of the plan's tokens. A task is a tile of columns and a block of tokens.
template <class S>
class Stream {
 public:
  using T = typename S::T;
  using M = typename S::Memory;
  using Row = TileRow<S>;
  static constexpr int W = Row::W, V = Row::V;
  static constexpr int64_t C = kLookupTile;

  // Measured on a 2-core Zen 4, fp32, 256 rows a table: level with gathering at 2.4 tokens a row, packed at 0.8.
  static bool pays(const LookupTables& a, int64_t tokens, LookupRoute route) {
    if (a.n * C * int64_t(sizeof(M)) > kTileBytes) return false;
    return route == LookupRoute::stream || (route != LookupRoute::rows && 2 * tokens >= (a.packed ? 2 : 5) * a.n);
  }
  // Whether groups are whole fours of tables, as ByteRows takes them.
  static bool in_fours(const LookupTables& a) { return together(a) % 4 == 0; }
  // Bytes a thread needs for a plan of this capacity.
  static int64_t bytes(const LookupTables& a, int64_t tokens) {
    return (a.packed ? 0 : together(a) * a.n * C * int64_t(sizeof(M))) + tokens * C * int64_t(sizeof(T));
  }

  Stream(const LookupTables& tables, const Plan<T>& plan, const T* bias, T* out, int64_t threads)
      : a_(tables), data_(static_cast<const M*>(tables.data)), plan_(plan), bias_(bias), out_(out) {
    const int64_t tiles = ceil_div(a_.h, C), count = plan.tokens();
    tokens_ = ceil_div(count, smaller(ceil_div(threads, tiles), ceil_div(count, a_.n)));
    blocks_ = ceil_div(count, tokens_);
    tasks_ = tiles * blocks_;
  }

#if defined(PYREPR_LEVEL_avx512_bf16)  // where only products of bytes are made here
  void take_bytes(const ByteRows* rows) { bytes_ = rows; }
#endif

  // What every thread of a team does.
  void share(void* buffer) const {
    T* const sums = static_cast<T*>(buffer);
    M* const copies = reinterpret_cast<M*>(sums + tokens_ * C);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks_; task++) {
      const int64_t tile = task / blocks_, c0 = tile * C, cols = smaller(C, a_.h - c0);
      const int64_t t0 = task % blocks_ * tokens_, t1 = smaller(t0 + tokens_, plan_.tokens());
      start_sums(c0, cols, t1 - t0, sums);
      for (int64_t k = 0; k < a_.K; k += together(a_)) {
        const int64_t count = smaller(together(a_), a_.K - k);
        const M* rows = copies;
        if (a_.packed)
          read_through(rows = data_ + (tile * a_.K + k) * a_.n * C, count * a_.n);
        else
          copy(data_ + k * a_.n * a_.h + c0, count * a_.n, cols, copies);
        add_group(k, count, t0, t1, rows, sums);
      }
      finish(c0, cols, t0, t1, sums);
    }
  }

 private:
  static constexpr int64_t kAhead = 32;  // rows between the one being copied and the one being fetched
  static constexpr int64_t kLine = 64 / int64_t(sizeof(M));

  static int64_t together(const LookupTables& a) {
    int64_t group = sizeof(M) == 1 ? 2 * kGroup : kGroup;
    while (group > 1 && group * a.n * C * int64_t(sizeof(M)) > kGroupBytes) group /= 2;
    return group;
  }

  static void read_through(const M* rows, int64_t count) {
    for (int64_t i = 0; i < count * C; i += kLine) {
      const M first = *static_cast<const volatile M*>(rows + i);
      (void)first;
    }
  }

  // out [rows, C] = in [rows, cols]. Fetched to L2 only: the rows may all fall into one set of L1.
  void copy(const M* in, int64_t rows, int64_t cols, M* out) const {
    for (int64_t r = 0; r < rows; r++, in += a_.h, out += C) {
      for (int64_t c = 0; c < cols; c += kLine) __builtin_prefetch(in + kAhead * a_.h + c, 0, 2);
      if (cols == C) {
        std::memcpy(out, in, C * sizeof(M));
      } else {
        std::memcpy(out, in, static_cast<size_t>(cols) * sizeof(M));
        std::memset(out + cols, 0, static_cast<size_t>(C - cols) * sizeof(M));
      }
    }
  }

  // sums [tokens, C] += the rows [count, n, C] of the tables from k on
  void add_group(int64_t k, int64_t count, int64_t t0, int64_t t1, const M* rows, T* sums) const {
#if defined(PYREPR_LEVEL_avx512_bf16)
    bytes_->add(k, count, t0, t1, rows, sums);
#else
    if (count == 16) {
      add_group(k, 8, t0, t1, rows, sums);
      add_group(k + 8, 8, t0, t1, rows + 8 * a_.n * C, sums);
    } else if (count == 8)
      add<8>(k, t0, t1 - t0, rows, sums);
    else if (count == 4)
      add<4>(k, t0, t1 - t0, rows, sums);
    else if (count == 2)
      add<2>(k, t0, t1 - t0, rows, sums);
    else
      for (int64_t i = 0; i < count; i++) add<1>(k + i, t0, t1 - t0, rows + i * a_.n * C, sums);
#endif
  }

  // sums [tokens, C] = bias
  void start_sums(int64_t c0, int64_t cols, int64_t tokens, T* sums) const {
    alignas(64) T start[C] = {};
#if defined(PYREPR_LEVEL_avx512_bf16)
    (void)c0, (void)cols;  // the bias comes last
#else
    T bias[C] = {};
    if (bias_) std::memcpy(bias, bias_ + c0, static_cast<size_t>(cols) * sizeof(T));
    Row::order(bias, start);
#endif
    for (int64_t t = 0; t < tokens; t++) std::memcpy(sums + t * C, start, sizeof start);
  }
  void finish(int64_t c0, int64_t cols, int64_t t0, int64_t t1, const T* sums) const {
    T bias[C] = {}, whole[C];
    if (bias_) std::memcpy(bias, bias_ + c0, static_cast<size_t>(cols) * sizeof(T));
    for (int64_t t = t0; t < t1; t++, sums += C) {
      T* const to = out_ + t * a_.h + c0;
      restore(t, sums, bias, cols == C ? to : whole);
      if (cols < C) std::memcpy(to, whole, static_cast<size_t>(cols) * sizeof(T));
    }
  }
  void restore(int64_t t, const T* sums, const T* bias, T* out) const {
#if defined(PYREPR_LEVEL_avx512_bf16)
    bytes_->restore(t, sums, bias, out);
#else
    (void)t, (void)bias;  // the sums started with it
    Row::restore(sums, out);
#endif
  }
#if !defined(PYREPR_LEVEL_avx512_bf16)
  template <int G>
  void add(int64_t k, int64_t t, int64_t tokens, const M* tile, T* sums) const {
    const int32_t* codes = plan_.codes(k / kGroup, t) + k % kGroup;
    const T* weights = plan_.weights(k / kGroup, t) + k % kGroup;
    const int64_t size = a_.n * C;
    for (int64_t i = 0; i < tokens; i++, sums += C, codes += kGroup, weights += kGroup) {
      Vec<T> sum[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sum[v] = load<T>(sums + v * W);
      const M* at = tile;
#pragma GCC unroll 8
      for (int g = 0; g < G; g++, at += size) Row::add(at + codes[g] * C, splat<T>(weights[g]), sum);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) store<T>(sums + v * W, sum[v]);
    }
  }
#endif

  const LookupTables& a_;
  const M* const data_;
  const Plan<T>& plan_;
  const T* const bias_;
  T* const out_;
  int64_t tokens_, blocks_, tasks_;
#if defined(PYREPR_LEVEL_avx512_bf16)
  const ByteRows* bytes_ = nullptr;
#endif
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
