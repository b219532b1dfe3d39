// Family `lookup`: codes, weights and the derivative of the weights of rows of x. Lanes hold chunks: a row's chunks are
// transposed W at a time, so that every step is taken for W of them. Included by level units only (see simd.h).
#pragma once

#include "cpu/gemm.h"
#include "cpu/lookup.h"
#include "cpu/tiles.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// A call of less than about 100 us on one thread wakes no other: these many elements to hash, or bytes of tables.
constexpr int64_t kParallelElements = int64_t(1) << 17;
constexpr int64_t kParallelBytes = int64_t(5) << 18;
constexpr int kMostBits = 16;

// Elements of a chunk, and chunks of a row.
inline int64_t width_of(const LookupHash& p) { return p.bits / static_cast<int>(p.kind); }
inline int64_t chunks_of(const LookupHash& p) { return p.x.cols / width_of(p); }

// v holds 8 vectors: W chunks of 8 elements, in the order they stand in memory. Afterwards v[i] holds element i of
// every chunk. The same exchange the other way undoes it.
template <class T, bool BACK = false>
__attribute__((always_inline)) inline void transpose_eights(Vec<T> (&v)[8]) {
  constexpr int W = Lanes<T>::W;
  if constexpr (W >= 8) {
    const auto split = [&] {
      // Vectors hold two chunks: first make them (0, 8), (1, 9), ..., so that the result is in order.
      if constexpr (W == 16)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) swap_quarters<T, 8>(v[i], v[i + 4], std::make_integer_sequence<int, W>{});
    };
    const auto order = [&](const int (&from)[8]) {
      Vec<T> moved[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) moved[i] = v[from[i]];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) v[i] = moved[i];
    };
    if constexpr (!BACK && W == 16) {
      split();
      order({0, 4, 1, 5, 2, 6, 3, 7});
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) swap_quarters<T, 1>(v[i], v[i + 1], std::make_integer_sequence<int, W>{});
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
      if (!(i & 2)) swap_quarters<T, 2>(v[i], v[i + 2], std::make_integer_sequence<int, W>{});
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) swap_quarters<T, 4>(v[i], v[i + 4], std::make_integer_sequence<int, W>{});
    if constexpr (BACK && W == 16) {
      order({0, 2, 4, 6, 1, 3, 5, 7});
      split();
    }
  } else {
    // A chunk takes 8 / W vectors; a W x W block holds the same W elements of every chunk.
    constexpr int pieces = 8 / W;
    Vec<T> moved[8];
    for (int piece = 0; piece < pieces; piece++) {
      Vec<T> block[W];
      for (int j = 0; j < W; j++) block[j] = BACK ? v[piece * W + j] : v[j * pieces + piece];
      transpose_registers<T>(block);
      for (int j = 0; j < W; j++) moved[BACK ? j * pieces + piece : piece * W + j] = block[j];
    }
    for (int i = 0; i < 8; i++) v[i] = moved[i];
  }
}

// One row of x at a time, W chunks at a time. What is read is of any storage type with sums of type T; the rest, most
// of the code, is made once for all of them, and never inlined.
template <class T>
class Chunks {
 public:
  using V = Vec<T>;
  using I = typename Lanes<T>::I;
  static constexpr int W = Lanes<T>::W;

  static int64_t bytes(const LookupHash& p) {
    return round_up(2 * padded(p) * int64_t(sizeof(T)) + round_up(chunks_of(p), W) * int64_t(4 + sizeof(T)), 64);
  }
  Chunks(const LookupHash& p, void* buffer)
      : p_(p),
        width_(static_cast<int>(width_of(p))),
        count_(chunks_of(p)),
        centre_(static_cast<const T*>(p.centre)),
        scale_(static_cast<const T*>(p.scale)),
        z_(static_cast<T*>(buffer)),
        grad_(z_ + padded(p)),
        weights_(grad_ + padded(p)),
        codes_(reinterpret_cast<int32_t*>(weights_ + round_up(count_, W))) {
    const double slope = 2 / p.temperature, largest = sizeof(T) == 4 ? 3e38 : 1e308;
    slope_ = static_cast<T>(slope < largest ? slope : largest);
    std::memset(z_ + p.x.cols, 0, static_cast<size_t>(padded(p) - p.x.cols) * sizeof(T));
  }

  template <class X>
  void read(int64_t t) {
    const auto* const row = static_cast<const typename X::Memory*>(p_.x.data) + t * p_.x.row_stride;
    if (centre_)
      copy<X>(row, [&](int64_t i, int64_t count, V x) { return standardised(i, count, x); });
    else
      copy<X>(row, [](int64_t, int64_t, V x) { return x; });
  }

  // Fills codes() [K] and weights() [K].
  __attribute__((noinline)) void hash() {
    by_width([&](auto width) {
      if (p_.kind == Hash::two_bit)
        hash_chunks<width, true>();
      else
        hash_chunks<width, false>();
    });
  }
  const int32_t* codes() const { return codes_; }
  const T* weights() const { return weights_; }

  // grad [d] = outer [K] times the derivative of the weights with respect to x. That of |z| is 0 at 0.
  __attribute__((noinline)) void derivative(const T* outer, T* grad) const {
    by_width([&](auto width) { derivative_of_chunks<width>(outer); });
    for (int64_t i = 0; scale_ && i < p_.x.cols; i++) grad_[i] *= scale_[i];
    std::memcpy(grad, grad_, static_cast<size_t>(p_.x.cols) * sizeof(T));
  }

 private:
  static int64_t padded(const LookupHash& p) { return round_up(p.x.cols, W * width_of(p)); }

  // Calls f with the elements of a chunk as a constant, or with 0 if they are known only here.
  template <class F>
  void by_width(F f) const {
    if (width_ == 8)
      f(std::integral_constant<int, 8>{});
    else if (width_ == 4)
      f(std::integral_constant<int, 4>{});
    else
      f(std::integral_constant<int, 0>{});
  }

  // z = f(i, count, x) of the `count` elements x of the row from i on.
  template <class X, class F>
  void copy(const typename X::Memory* row, F f) {
    const int64_t d = p_.x.cols;
    int64_t i = 0;
    for (; i + W <= d; i += W) store<T>(z_ + i, f(i, W, load_as<X>(row + i)));
    if (i < d) store_some<StoreOf<T>>(z_ + i, d - i, f(i, d - i, load_some<X>(row + i, d - i)));
  }
  // (x - centre) scale of the `count` elements from i on. The same rounding at every level: there is no multiplication
  // before the addition, which a fused one could spare.
  V standardised(int64_t i, int64_t count, V x) const {
    using S = StoreOf<T>;
    return (x - load_some<S>(centre_ + i, count)) * load_some<S>(scale_ + i, count);
  }

  template <int WIDTH>
  void derivative_of_chunks(const T* outer) const {
    for (int64_t k = 0; k < count_; k += W) {
      V z[kMostBits], slope[kMostBits];
      load_chunks<WIDTH>(k, z);
      V sum{}, inverse = splat<T>(1);
      for (int i = 0; i < width_; i++) slope[i] = sums(z[i], sum, inverse);
      const int64_t left = count_ - k;
      const V out = load_some<StoreOf<T>>(outer + k, left);
      for (int i = 0; i < width_; i++) {
        const V one = splat<T>(1), zero{};
        const V sign = z[i] == z[i] ? (z[i] > zero ? one : zero) - (z[i] < zero ? one : zero) : z[i];
        V s = zero;
        if (p_.weighting == Weighting::probability) s = slope[i] / inverse;
        if (p_.weighting == Weighting::scaled) s = (1 + sum * slope[i]) / inverse;
        if (p_.weighting == Weighting::l1) s = one / static_cast<T>(width_);
        z[i] = out * sign * s;
      }
      store_chunks<WIDTH>(k, z);
    }
  }

  // WIDTH is the elements of a chunk, or 0 if they are known only here.
  template <int WIDTH, bool TWO>
  void hash_chunks() {
    typedef int32_t Codes __attribute__((vector_size(W * 4)));
    const int width = WIDTH ? WIDTH : width_;
    for (int64_t k = 0; k < count_; k += W) {
      V z[WIDTH ? WIDTH : kMostBits];
      load_chunks<WIDTH>(k, z);
      I code{};
      V sum{}, inverse = splat<T>(1);
#pragma GCC unroll 8
      for (int i = 0; i < width; i++) {
        if constexpr (TWO) {
          const V one = splat<T>(1);
          code |= ((z[i] >= V{}) & (I{} + (1 << 2 * i))) | (((z[i] >= one) | (-z[i] >= one)) & (I{} + (2 << 2 * i)));
        } else {
          code |= (z[i] >= V{}) & (I{} + (1 << i));
        }
        sums(z[i], sum, inverse);
      }
      const Codes narrow = __builtin_convertvector(code, Codes);
      std::memcpy(codes_ + k, &narrow, sizeof narrow);
      store<T>(weights_ + k, weight(sum, inverse));
    }
  }

  bool decaying() const { return p_.weighting == Weighting::probability || p_.weighting == Weighting::scaled; }

  // z[i] = element i of the chunks k, k + 1, ...
  template <int WIDTH>
  void load_chunks(int64_t k, V* z) const {
    const T* const from = z_ + k * width_;
    if constexpr (WIDTH == 0) {
      T lanes[W];
      for (int i = 0; i < width_; i++) {
        for (int j = 0; j < W; j++) lanes[j] = from[j * width_ + i];
        z[i] = load<T>(lanes);
      }
    } else {
      V v[WIDTH];
#pragma GCC unroll 8
      for (int i = 0; i < WIDTH; i++) v[i] = load<T>(from + i * W);
      if constexpr (WIDTH == 8)
        transpose_eights<T>(v);
      else
        unzip_four<T>(v);
#pragma GCC unroll 8
      for (int i = 0; i < WIDTH; i++) z[i] = v[i];
    }
  }
  template <int WIDTH>
  void store_chunks(int64_t k, const V* z) const {
    T* const to = grad_ + k * width_;
    if constexpr (WIDTH == 8) {
      V v[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) v[i] = z[i];
      transpose_eights<T, true>(v);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) store<T>(to + i * W, v[i]);
    } else {
      for (int i = 0; i < width_; i++)
        for (int j = 0; j < W; j++) to[j * width_ + i] = z[i][j];
    }
  }

  // sum += |z|, inverse *= 1 + e with e = exp(-2 |z| / t) (so that it becomes 1 / p <= 2^16); the derivative of log p
  // with respect to |z| is returned.
  V sums(V z, V& sum, V& inverse) const {
    const V size = z < splat<T>(0) ? -z : z;
    sum += size;
    if (!decaying()) return V{};
    const V e = exp_nonpositive<T>(-size * slope_);
    inverse *= 1 + e;
    return slope_ * e / (1 + e);
  }

  V weight(V sum, V inverse) const {
    switch (p_.weighting) {
      case Weighting::probability:
        return 1 / inverse;
      case Weighting::scaled:
        return sum / inverse;
      case Weighting::l1:
        return sum / static_cast<T>(width_);
      default:
        return sum == sum ? splat<T>(1) : sum;
    }
  }

  const LookupHash& p_;
  const int width_;
  const int64_t count_;  // K
  const T *const centre_, *const scale_;
  T *const z_, *const grad_, *const weights_;
  int32_t* const codes_;
  T slope_;
};

// What every thread of a team does: calls use(chunks, t) for its share of the rows t0 <= t < t1 of x, with a buffer of
// Chunks<T>::bytes. Ends with a barrier.
template <class X, class Use>
void share_of_tokens(const LookupHash& p, int64_t t0, int64_t t1, void* buffer, Use use) {
  Chunks<typename X::T> chunks(p, buffer);
#pragma omp for schedule(static)
  for (int64_t t = t0; t < t1; t++) {
    chunks.template read<X>(t);
    use(chunks, t);
  }
}

// The same by a team of its own.
template <class X, class Use>
Status for_each_token(const LookupHash& p, Use use) {
  const int64_t bytes = Chunks<typename X::T>::bytes(p);
  const int threads = p.x.rows * p.x.cols < kParallelElements ? 1 : p.threads;
  const Memory memory(bytes * threads);
  if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  share_of_tokens<X>(p, 0, p.x.rows, memory.as<char>(bytes * thread_number()), use);
  return Status::ok;
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
