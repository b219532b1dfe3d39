// Vectors of one instruction set, in the compiler's own vector types: one source for every level.
// Included by level units only. Everything is in an anonymous namespace, so that no function compiled for one
// instruction set can be linked in for another, inside a namespace named after the level, so that symbols tell what
// they were compiled for (tests/test_native.py looks at the disassembly).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common.h"

#if defined(PYREPR_LEVEL_avx512) || defined(PYREPR_LEVEL_avx512_bf16)
#include <immintrin.h>
#endif

namespace pyrepr {
inline namespace PYREPR_LEVEL {
namespace {

#if defined(PYREPR_LEVEL_avx512) || defined(PYREPR_LEVEL_avx512_bf16)
constexpr int kVectorBytes = 64;
#elif defined(PYREPR_LEVEL_avx2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Lanes<T>: the vector types that go with accumulation type T (float or double). `u` types may be unaligned.
template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int W = kVectorBytes / 4;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float Vu __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Hu __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef double Wide __attribute__((vector_size(kVectorBytes * 2)));  // as many doubles as V has floats
  using Int = int32_t;
};
template <>
struct Lanes<double> {
  static constexpr int W = kVectorBytes / 8;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double Vu __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  using Wide = V;
  using Int = int64_t;
};
template <class T>
using Vec = typename Lanes<T>::V;

template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Vu*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::Vu*>(p) = v;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x + 0 is not always x: this is one broadcast, that would be an addition
}

// Storage types: how an element is kept in memory, and the type it is computed in.
struct StoreF32 {
  using T = float;
  using Memory = float;
};
struct StoreF64 {
  using T = double;
  using Memory = double;
};
struct StoreBf16 {
  using T = float;
  using Memory = uint16_t;
};
struct StoreF16 {
  using T = float;
  using Memory = uint16_t;
};

// Calls f(S{}) with the storage type S of a dtype; `by_narrow_dtype` where float64 has no kernel.
template <class F>
Status by_narrow_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(StoreBf16{});
    case DType::f16:
      return f(StoreF16{});
    default:
      return f(StoreF32{});
  }
}
template <class F>
Status by_dtype(DType dtype, F f) {
  return dtype == DType::f64 ? f(StoreF64{}) : by_narrow_dtype(dtype, f);
}

// The same for an f without a status: around what alone depends on how elements are stored, amid code that is made once
// for all of them.
template <class F>
void by_storage(DType dtype, F f) {
  by_narrow_dtype(dtype, [&](auto s) { return f(s), Status::ok; });
}

// The storage of accumulation type T itself.
template <class T>
using StoreOf = std::conditional_t<sizeof(T) == 4, StoreF32, StoreF64>;

using U32 = Lanes<float>::U;

inline Vec<float> bits_to_float(U32 u) {
  Vec<float> v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

template <class S>
inline Vec<typename S::T> load_as(const typename S::Memory* p) {
  return load<typename S::T>(p);
}
template <>
inline Vec<float> load_as<StoreBf16>(const uint16_t* p) {
#if defined(__AVX512F__)  // GCC would widen in two halves
  const U32 wide =
      reinterpret_cast<U32>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  const U32 wide = __builtin_convertvector(*reinterpret_cast<const Lanes<float>::Hu*>(p), U32);
#endif
  return bits_to_float(wide << 16);
}
// fp16 by integer arithmetic, right for denormals, infinities and NaN: put the magnitude where fp32 keeps it, rescale
// the exponent by 2^112, and give an all-ones exponent back its meaning.
template <>
inline Vec<float> load_as<StoreF16>(const uint16_t* p) {
  const U32 wide = __builtin_convertvector(*reinterpret_cast<const Lanes<float>::Hu*>(p), U32);
  const U32 magnitude = (wide & 0x7fffu) << 13;
  const Vec<float> rescaled = bits_to_float(magnitude) * 0x1p112f;
  U32 bits;
  std::memcpy(&bits, &rescaled, sizeof bits);
  bits |= reinterpret_cast<U32>((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bits_to_float(bits | ((wide & 0x8000u) << 16));
}

// The other way: T rounded to the storage type, to nearest even.
template <class S>
inline void store_as(typename S::Memory* p, Vec<typename S::T> v) {
  store<typename S::T>(p, v);
}
inline void store_halves(uint16_t* p, U32 bits) {
  *reinterpret_cast<Lanes<float>::Hu*>(p) = __builtin_convertvector(bits, Lanes<float>::Hu);
}
template <>
inline void store_as<StoreBf16>(uint16_t* p, Vec<float> v) {
  U32 u;  // not by the instruction for it, which makes zeros of subnormal numbers
  std::memcpy(&u, &v, sizeof u);
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  store_halves(p, (u & 0x7fffffffu) > 0x7f800000u ? (rounded & 0u) + 0x7fc0u : rounded);
}
// Normal numbers by shifting the mantissa, denormals by letting an addition to 0.5 round at 2^-24.
template <>
inline void store_as<StoreF16>(uint16_t* p, Vec<float> v) {
  U32 u;
  std::memcpy(&u, &v, sizeof u);
  const U32 sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const U32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const Vec<float> shifted = bits_to_float(magnitude) + 0.5f;
  U32 denormal;
  std::memcpy(&denormal, &shifted, sizeof denormal);
  U32 half = magnitude < 0x38800000u ? denormal - 0x3f000000u : normal;
  half = magnitude >= 0x47800000u ? (half & 0u) + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? (half & 0u) + 0x7e00u : half;
  store_halves(p, half | sign);
}

template <class S>
inline typename S::T load_one(const typename S::Memory* p) {
  if constexpr (sizeof(typename S::Memory) == 2) {
    uint16_t padded[Lanes<float>::W] = {*p};
    return load_as<S>(padded)[0];
  } else {
    return *p;
  }
}

// `count` neighbouring elements, of any number: zeros take the place of those that are missing; and back.
template <class S>
inline Vec<typename S::T> load_some(const typename S::Memory* p, int64_t count) {
  constexpr int W = Lanes<typename S::T>::W;
  if (count >= W) return load_as<S>(p);
  typename S::Memory padded[W] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = p[i];
  return load_as<S>(padded);
}
template <class S>
inline void store_some(typename S::Memory* p, int64_t count, Vec<typename S::T> v) {
  constexpr int W = Lanes<typename S::T>::W;
  if (count >= W) return store_as<S>(p, v);
  typename S::Memory padded[W];
  store_as<S>(padded, v);
  for (int64_t i = 0; i < count; i++) p[i] = padded[i];
}

// The sum of all lanes in double, always in the same order.
template <class T>
inline double lane_sum(Vec<T> v) {
  double sum = 0;
  for (int i = 0; i < Lanes<T>::W; i++) sum += static_cast<double>(v[i]);
  return sum;
}

// e^x for x <= 0 (what every decaying kernel needs): x = m ln 2 + r, Taylor series of e^r, times 2^m.
// |r| <= ln(2)/2, so the first term left out is below half a unit in the last place (degree 7 in fp32, 13 in fp64).
template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x) {
  using L = Lanes<T>;
  using I = typename L::I;
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? T(-87) : T(-708);
  constexpr T ln2_high = single ? T(0.693145751953125) : T(6.93147180369123816490e-01);
  constexpr T ln2_low = single ? T(1.42860682030941723e-06) : T(1.90821492927058770002e-10);
  constexpr int degree = single ? 7 : 13;
  constexpr int mantissa_bits = single ? 23 : 52;
  constexpr typename L::Int exponent_bias = single ? 127 : 1023;
  constexpr T to_integer =
      single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^(mantissa_bits): rounds to nearest

  const Vec<T> clamped = x < lowest ? splat<T>(lowest) : x;
  const Vec<T> m = (clamped * T(1.4426950408889634074) + to_integer) - to_integer;
  const Vec<T> r = (clamped - m * ln2_high) - m * ln2_low;
  T coefficient = 1;
  for (int i = 2; i <= degree; i++) coefficient /= T(i);
  Vec<T> sum = splat<T>(coefficient);
  for (int i = degree; i > 0; i--) {
    coefficient *= T(i);
    sum = sum * r + coefficient;
  }
  const I bits = (__builtin_convertvector(m, I) + exponent_bias) << mantissa_bits;
  Vec<T> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < lowest ? splat<T>(0) : sum * scale;
}

inline Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> e = exp_nonpositive<float>(x < 0 ? x : -x), s = 1 / (1 + e);
  return x < 0 ? e * s : s;
}

// For x >= 0 (or NaN); the compiler turns the loop into the level's square-root instruction.
template <class T>
inline Vec<T> square_root(Vec<T> x) {
  Vec<T> root;
  for (int i = 0; i < Lanes<T>::W; i++) root[i] = __builtin_sqrt(x[i]);
  return root;
}
template <>
inline Vec<float> square_root<float>(Vec<float> x) {
  Vec<float> root;
  for (int i = 0; i < Lanes<float>::W; i++) root[i] = __builtin_sqrtf(x[i]);
  return root;
}

// A W x W block held in W vectors is transposed in log2(W) rounds that swap the
// off-diagonal quarters of ever larger blocks.
#if defined(__clang__) || __GNUC__ >= 12
#define PYREPR_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PYREPR_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, typename Lanes<T>::I{__VA_ARGS__})
#endif
template <class T, int S, int... L>
inline void swap_quarters(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  constexpr int W = Lanes<T>::W;
  const Vec<T> upper = PYREPR_SHUFFLE(T, a, b, ((L & S) ? W + L - S : L)...);
  const Vec<T> lower = PYREPR_SHUFFLE(T, a, b, ((L & S) ? W + L : L + S)...);
  a = upper;
  b = lower;
}
template <class T, int S = 1>
inline void transpose_registers(Vec<T> (&v)[Lanes<T>::W]) {
  constexpr int W = Lanes<T>::W;
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & S)) swap_quarters<T, S>(v[i], v[i + S], std::make_integer_sequence<int, W>{});
    transpose_registers<T, S * 2>(v);
  }
}
// Vectors whose lanes stand in turn in memory, a0 b0 a1 b1 ..., apart from each other; and back.
template <class T, int... L>
inline void unzip(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  const Vec<T> even = PYREPR_SHUFFLE(T, a, b, (2 * L)...), odd = PYREPR_SHUFFLE(T, a, b, (2 * L + 1)...);
  a = even;
  b = odd;
}
template <class T, int... L>
inline void zip(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  constexpr int W = Lanes<T>::W;
  const Vec<T> low = PYREPR_SHUFFLE(T, a, b, (L / 2 + L % 2 * W)...);
  const Vec<T> high = PYREPR_SHUFFLE(T, a, b, (W / 2 + L / 2 + L % 2 * W)...);
  a = low;
  b = high;
}
// The same for four: v[j] holds lanes j, j + 4, j + 8 ... of memory.
template <class T>
inline void unzip_four(Vec<T> (&v)[4]) {
  constexpr std::make_integer_sequence<int, Lanes<T>::W> lanes{};
  unzip<T>(v[0], v[1], lanes);
  unzip<T>(v[2], v[3], lanes);
  unzip<T>(v[0], v[2], lanes);
  unzip<T>(v[1], v[3], lanes);
}
template <class T>
inline void zip_four(Vec<T> (&v)[4]) {
  constexpr std::make_integer_sequence<int, Lanes<T>::W> lanes{};
  zip<T>(v[0], v[2], lanes);
  zip<T>(v[1], v[3], lanes);
  zip<T>(v[0], v[1], lanes);
  zip<T>(v[2], v[3], lanes);
}
// For three: v[j] holds lanes j, j + 3, j + 6 ... of memory.
template <class T, int J, int... L>
inline Vec<T> every_third(const Vec<T> (&v)[3], std::integer_sequence<int, L...>) {
  constexpr int W = Lanes<T>::W;
  const Vec<T> first = PYREPR_SHUFFLE(T, v[0], v[1], (3 * L + J < 2 * W ? 3 * L + J : 0)...);
  return PYREPR_SHUFFLE(T, first, v[2], (3 * L + J < 2 * W ? L : 3 * L + J - W)...);
}
template <class T>
inline void unzip_three(Vec<T> (&v)[3]) {
  constexpr std::make_integer_sequence<int, Lanes<T>::W> lanes{};
  const Vec<T> a = every_third<T, 0>(v, lanes), b = every_third<T, 1>(v, lanes), c = every_third<T, 2>(v, lanes);
  v[0] = a;
  v[1] = b;
  v[2] = c;
}
template <class T, int M, int... L>
inline Vec<T> third_of(const Vec<T> (&v)[3], std::integer_sequence<int, L...>) {
  constexpr int W = Lanes<T>::W;
  const Vec<T> first =
      PYREPR_SHUFFLE(T, v[0], v[1], ((M * W + L) % 3 < 2 ? (M * W + L) % 3 * W + (M * W + L) / 3 : 0)...);
  return PYREPR_SHUFFLE(T, first, v[2], ((M * W + L) % 3 < 2 ? L : W + (M * W + L) / 3)...);
}
template <class T>
inline void zip_three(Vec<T> (&v)[3]) {
  constexpr std::make_integer_sequence<int, Lanes<T>::W> lanes{};
  const Vec<T> a = third_of<T, 0>(v, lanes), b = third_of<T, 1>(v, lanes), c = third_of<T, 2>(v, lanes);
  v[0] = a;
  v[1] = b;
  v[2] = c;
}
#undef PYREPR_SHUFFLE

}  // namespace
}  // namespace PYREPR_LEVEL
}  // namespace pyrepr
