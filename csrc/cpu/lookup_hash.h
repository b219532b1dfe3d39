// Family `lookup`: codes, weights and the derivative of the weights of a row of x. Included by lookup.cpp only.
#pragma once

#include <omp.h>

#include "cpu/gemm.h"
#include "cpu/lookup.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kParallelWork = int64_t(1) << 14;  // fewer elements than this are not worth waking threads for

inline int64_t thread_number() { return omp_get_thread_num(); }

// `count` < W elements; the other lanes are zero.
template <class S>
inline Vec<typename S::T> load_part(const typename S::Memory* p, int64_t count) {
  typename S::Memory padded[Lanes<typename S::T>::W] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof *p);
  return load_as<S>(padded);
}
template <class T>
inline void store_part(T* p, Vec<T> v, int64_t count) {
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof *p);
}

// Chunks of one row of x: their elements z, and e = exp(-2 |z| / t) where the weighting asks for it.
template <class X>
class Chunks {
 public:
  using T = typename X::T;
  static constexpr int W = Lanes<T>::W;

  static int64_t bytes(const LookupHash& p) { return round_up(2 * round_up(p.x.cols, W) * int64_t(sizeof(T)), 64); }
  Chunks(const LookupHash& p, T* buffer) : p_(p), z_(buffer), e_(buffer + round_up(p.x.cols, W)) {
    const double slope = 2 / p.temperature, largest = sizeof(T) == 4 ? 3e38 : 1e308;
    slope_ = static_cast<T>(slope < largest ? slope : largest);
  }

  void read(int64_t t) {
    const auto* const row = static_cast<const typename X::Memory*>(p_.x.data) + t * p_.x.row_stride;
    const int64_t d = p_.x.cols;
    for (int64_t i = 0; i < d; i += W) {
      const Vec<T> z = i + W <= d ? load_as<X>(row + i) : load_part<X>(row + i, d - i);
      store<T>(z_ + i, z);
      if (decaying()) store<T>(e_ + i, exp_nonpositive<T>((z < splat<T>(0) ? z : -z) * slope_));
    }
  }

  int32_t code(int64_t k) const {
    const T* const z = z_ + k * p_.bits;
    int32_t code = 0;
    if (p_.bits == 8) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) code |= int32_t(z[i] >= 0) << i;
    } else {
      for (int64_t i = 0; i < p_.bits; i++) code |= int32_t(z[i] >= 0) << i;
    }
    return code;
  }

  T weight(int64_t k) const {
    T sum = 0, inverse = 1;
    sums(k, sum, inverse);
    switch (p_.weighting) {
      case Weighting::probability:
        return 1 / inverse;
      case Weighting::scaled:
        return sum / inverse;
      case Weighting::l1:
        return sum / static_cast<T>(p_.bits);
      default:
        return sum == sum ? T(1) : sum;
    }
  }

  // grad [bits] = outer * d weight / d z. The derivative of |z| is 0 at 0.
  void derivative(int64_t k, T outer, T* grad) const {
    T sum = 0, inverse = 1;
    sums(k, sum, inverse);
    for (int64_t i = 0; i < p_.bits; i++) {
      const T z = z_[k * p_.bits + i], e = e_[k * p_.bits + i];
      const T sign = z == z ? T((z > 0) - (z < 0)) : z;
      const T other = decaying() ? slope_ * e / (1 + e) : 0;  // of log p
      T slope = 0;
      if (p_.weighting == Weighting::probability) slope = other / inverse;
      if (p_.weighting == Weighting::scaled) slope = (1 + sum * other) / inverse;
      if (p_.weighting == Weighting::l1) slope = 1 / static_cast<T>(p_.bits);
      grad[i] = outer * sign * slope;
    }
  }

 private:
  bool decaying() const { return p_.weighting == Weighting::probability || p_.weighting == Weighting::scaled; }

  // sum = sum of |z_i|, inverse = 1 / p = product of 1 + e_i <= 2^16
  void sums(int64_t k, T& sum, T& inverse) const {
    const T* const z = z_ + k * p_.bits;
    const T* const e = e_ + k * p_.bits;
    if (p_.bits == 8) {
      sum = tree_sum<8>(z);
      if (decaying()) inverse = tree_product<8>(e);
      return;
    }
    for (int64_t i = 0; i < p_.bits; i++) sum += magnitude(z[i]);
    if (decaying())
      for (int64_t i = 0; i < p_.bits; i++) inverse *= 1 + e[i];
  }
  static T magnitude(T z) { return sizeof(T) == 4 ? __builtin_fabsf(static_cast<float>(z)) : __builtin_fabs(z); }
  // Trees rather than chains: the latency of a chain of eight would be most of a hash's time.
  template <int N>
  static T tree_sum(const T* z) {
    if constexpr (N == 1)
      return magnitude(*z);
    else
      return tree_sum<N / 2>(z) + tree_sum<N / 2>(z + N / 2);
  }
  template <int N>
  static T tree_product(const T* e) {
    if constexpr (N == 1)
      return 1 + *e;
    else
      return tree_product<N / 2>(e) * tree_product<N / 2>(e + N / 2);
  }

  const LookupHash& p_;
  T* const z_;
  T* const e_;
  T slope_;
};

// Calls `use(chunks, t)` for every row t0 <= t < t1 of x, rows shared out to the threads.
template <class X, class Use>
Status for_each_token(const LookupHash& p, int64_t t0, int64_t t1, Use use) {
  const int64_t bytes = Chunks<X>::bytes(p);
  const int threads = (t1 - t0) * p.x.cols < kParallelWork ? 1 : p.threads;
  const Memory memory(bytes * threads);
  if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Chunks<X> chunks(p, memory.as<typename X::T>(bytes * thread_number()));
#pragma omp for schedule(static)
    for (int64_t t = t0; t < t1; t++) {
      chunks.read(t);
      use(chunks, t);
    }
  }
  return Status::ok;
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
