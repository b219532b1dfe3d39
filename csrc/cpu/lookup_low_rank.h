// The low-rank part of a converted layer of family `lookup`: what it reads of x, inner = x down^T, what it leaves to
// the tables, x - inner down, and what it adds to their sum, inner up. The rank is small, so both matrices stay in L2,
// and products are taken in blocks of a few tokens by a few rows or vectors. Included by level units only (see simd.h).
#pragma once

#include "cpu/lookup_rows.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

template <class T>
class LowRank {
 public:
  static constexpr int W = Lanes<T>::W;
  static constexpr int64_t kTokens = 64;  // taken together by a thread

  LowRank(const LookupLowRank& low, int64_t d, int64_t h)
      : down_(static_cast<const T*>(low.down)), up_(static_cast<const T*>(low.up)), rank_(low.rank), d_(d), h_(h) {}

  // Of the buffer that both functions want.
  static int64_t bytes(int64_t rank) { return round_up(rank * kVectors * W * int64_t(sizeof(T)), 64); }

  // inner [tokens, rank] = x down^T, then x [tokens, d] -= inner down
  void lower(int64_t tokens, T* x, T* inner, T* buffer) const {
    int64_t t = 0;
    for (; t + kMany <= tokens; t += kMany) dots<kMany>(x + t * d_, inner + t * rank_);
    for (; t < tokens; t++) dots<1>(x + t * d_, inner + t * rank_);
    add<true>(tokens, inner, down_, d_, x, buffer);
  }
  // out [tokens, h] += inner up
  void raise(int64_t tokens, const T* inner, T* out, T* buffer) const {
    add<false>(tokens, inner, up_, h_, out, buffer);
  }

 private:
  static constexpr int kSums = kRegisters == 32 ? 16 : 8;  // registers that hold sums
  static constexpr int kMany = kRegisters == 32 ? 4 : 2;   // tokens of a block of products with rows
  static constexpr int kTall = kRegisters == 32 ? 6 : 2;   // of one of sums of vectors
  static constexpr int kVectors = 4;                       // of the latter

  // inner [R, rank] = x [R, d] down^T, kSums products at a time.
  template <int R>
  void dots(const T* x, T* inner) const {
    constexpr int N = kSums / R;
    for (int64_t row = 0; row < rank_; row += N) {
      const T* rows[N];
      for (int n = 0; n < N; n++) rows[n] = down_ + smaller(row + n, rank_ - 1) * d_;
      Vec<T> sum[kSums] = {};
      int64_t i = 0;
      for (; i + W <= d_; i += W) multiply<R, N>(x, rows, i, W, sum);
      if (i < d_) multiply<R, N>(x, rows, i, d_ - i, sum);
      T sums[kSums];
      for (int s = 0; s < kSums; s += W) {
        Vec<T> lanes[W];
        for (int w = 0; w < W; w++) lanes[w] = sum[s + w];
        transpose_registers<T>(lanes);
#pragma GCC unroll 16
        for (int w = 1; w < W; w++) lanes[0] += lanes[w];
        store<T>(sums + s, lanes[0]);
      }
      for (int r = 0; r < R; r++)
        for (int n = 0; n < smaller<int64_t>(N, rank_ - row); n++) inner[r * rank_ + row + n] = sums[r * N + n];
    }
  }
  template <int R, int N>
  void multiply(const T* x, const T* const* rows, int64_t i, int64_t count, Vec<T>* sum) const {
    using S = StoreOf<T>;
    Vec<T> row[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) row[n] = load_some<S>(rows[n] + i, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vec<T> value = load_some<S>(x + r * d_ + i, count);
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sum[r * N + n] += value * row[n];
    }
  }

  // out [tokens, cols] += or -= inner [tokens, rank] rows [rank, cols]. For more than a few tokens the columns at work
  // are copied: in rows a power of two apart they would share a few places of L1.
  template <bool MINUS>
  void add(int64_t tokens, const T* inner, const T* rows, int64_t cols, T* out, T* buffer) const {
    constexpr int64_t panel = kVectors * W;
    int64_t c = 0;
    for (; c + panel <= cols; c += panel) {
      const bool copied = tokens > 2 * kTall;
      for (int64_t k = 0; copied && k < rank_; k++)
        std::memcpy(buffer + k * panel, rows + k * cols + c, panel * sizeof(T));
      const T* const at = copied ? buffer : rows + c;
      add_columns<MINUS, kVectors>(tokens, inner, at, copied ? panel : cols, W, out + c, cols);
    }
    for (; c < cols; c += W)
      add_columns<MINUS, 1>(tokens, inner, rows + c, cols, smaller<int64_t>(W, cols - c), out + c, cols);
  }
  // V vectors of columns, of which a single one may have fewer than W.
  template <bool MINUS, int V>
  void add_columns(int64_t tokens, const T* inner, const T* rows, int64_t row_stride, int64_t count, T* out,
                   int64_t stride) const {
    int64_t t = 0;
    for (; t + kTall <= tokens; t += kTall)
      add_block<MINUS, kTall, V>(inner + t * rank_, rows, row_stride, count, out + t * stride, stride);
    for (; t + 2 <= tokens; t += 2)
      add_block<MINUS, 2, V>(inner + t * rank_, rows, row_stride, count, out + t * stride, stride);
    for (; t < tokens; t++)
      add_block<MINUS, 1, V>(inner + t * rank_, rows, row_stride, count, out + t * stride, stride);
  }
  template <bool MINUS, int R, int V>
  void add_block(const T* inner, const T* rows, int64_t row_stride, int64_t count, T* out, int64_t stride) const {
    using S = StoreOf<T>;
    if (V > 1) count = W;
    Vec<T> sum[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = load_some<S>(out + r * stride + v * W, count);
    for (int64_t k = 0; k < rank_; k++, rows += row_stride) {
      Vec<T> row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) row[v] = load_some<S>(rows + v * W, count);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const T factor = MINUS ? -inner[r * rank_ + k] : inner[r * rank_ + k];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] += factor * row[v];
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store_some<S>(out + r * stride + v * W, count, sum[r][v]);
  }

  const T *const down_, *const up_;
  const int64_t rank_, d_, h_;
};

// What is hashed: x, or what the low-rank part leaves of it.
template <class T>
class Inputs {
 public:
  Inputs(const LookupHash& p, const LookupLowRank& low, int64_t capacity, int64_t h)
      : p_(p), low_(low, p.x.cols, h), rank_(low.rank), h_(h), inner_(low.rank * capacity * int64_t(sizeof(T)) + 64) {}
  bool ok() const { return inner_.ok(); }
  // Bytes a thread needs.
  static int64_t bytes(const LookupHash& p, const LookupLowRank& low) {
    const int64_t rest = low.rank ? LowRank<T>::kTokens * p.x.cols * int64_t(sizeof(T)) : 0;
    return Chunks<T>::bytes(p) + round_up(rest, 64) + LowRank<T>::bytes(low.rank);
  }

  // What every thread of a team does: puts the tokens from t0 on into the plan, or into what is filled as one. Ends
  // with a barrier.
  template <class P>
  void hash(const P& plan, int64_t t0, void* buffer) const {
    if (!rank_) return by_x([&](auto x) { plan.template hash<decltype(x)>(p_, t0, buffer); });
    T* const panel = static_cast<T*>(buffer);
    char* const behind = static_cast<char*>(buffer) + LowRank<T>::bytes(rank_);
    T* const rest = reinterpret_cast<T*>(behind + Chunks<T>::bytes(p_));
    LookupHash of_rest = p_;
    of_rest.x = {rest, LowRank<T>::kTokens, p_.x.cols, p_.x.cols, 1};
    Chunks<T> chunks(of_rest, behind);
    for_blocks(plan.tokens(), [&](int64_t t, int64_t count) {
      by_x([&](auto x) { copy<decltype(x)>(t0 + t, count, rest); });
      low_.lower(count, rest, inner(t), panel);
      for (int64_t i = 0; i < count; i++) {
        chunks.template read<StoreOf<T>>(i);
        plan.put(chunks, t + i);
      }
    });
  }
  // Likewise, out [tokens, h] += inner up.
  template <class P>
  void raise(const P& plan, T* out, void* buffer) const {
    const auto add = [&](int64_t t, int64_t count) {
      low_.raise(count, inner(t), out + t * h_, static_cast<T*>(buffer));
    };
    if (rank_) for_blocks(plan.tokens(), add);
  }

 private:
  // A token's sums are the same in any block, so there may be as many as threads.
  template <class Use>
  static void for_blocks(int64_t tokens, Use use) {
    const int64_t share = round_up(ceil_div(tokens, int64_t(omp_get_num_threads())), 4);
    const int64_t size = smaller(share, LowRank<T>::kTokens);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t += size) use(t, smaller(size, tokens - t));
  }
  // Calls f(X{}) with the storage type of x, whose sums are of type T.
  template <class F>
  void by_x(F f) const {
    const auto call = [&](auto x) { return f(x), Status::ok; };
    if constexpr (sizeof(T) == 8)
      call(StoreF64{});
    else
      by_narrow_dtype(p_.dtype, call);
  }
  template <class X>
  void copy(int64_t t, int64_t count, T* to) const {
    const int64_t d = p_.x.cols;
    for (const int64_t end = t + count; t < end; t++, to += d) {
      const auto* const row = static_cast<const typename X::Memory*>(p_.x.data) + t * p_.x.row_stride;
      for (int64_t i = 0; i < d; i += W) store_some<StoreOf<T>>(to + i, d - i, load_some<X>(row + i, d - i));
    }
  }
  T* inner(int64_t t) const { return inner_.template as<T>() + t * rank_; }

  static constexpr int W = Lanes<T>::W;
  const LookupHash& p_;
  const LowRank<T> low_;
  const int64_t rank_, h_;
  const Memory inner_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
