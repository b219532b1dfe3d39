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

#include "cpu/lookup_backward.h"
#include "cpu/lookup_hash.h"
#include "cpu/lookup_rows.h"
#include "cpu/lookup_stream.h"
#if defined(PYREPR_LEVEL_avx512_bf16)
#include "cpu/lookup_registers.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kTokens = 8192;  // tokens hashed at a time

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

// Blocks of tokens, each by one team: fill(plan, t0, buffer) writes the codes and weights of a thread's share of the
// tokens from t0 on with `bytes` of a buffer, then the rows are added.
template <class S, class Fill>
Status forward(const LookupTables& a, int64_t tokens, const void* bias, LookupRoute route, void* out, int64_t bytes,
               Fill fill) {
  using T = typename S::T;
  const int64_t capacity = smaller(tokens, kTokens);
  const int threads = tokens * a.K * a.h < kParallelWork ? 1 : a.threads;
  Plan<T> plan(a, capacity);
  if (Stream<S>::pays(a, capacity, route)) bytes = larger(bytes, round_up(Stream<S>::bytes(a, capacity), 64));
  const Memory memory(bytes * threads);
  if (!plan.ok() || !memory.ok()) return Status::out_of_memory;
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
    plan.start(smaller(kTokens, tokens - t0));
    const bool stream = Stream<S>::pays(a, plan.tokens(), route);
    T* const to = static_cast<T*>(out) + t0 * a.h;
    const Rows<S> rows(a, plan, static_cast<const T*>(bias), to);
    Stream<S> streamed(a, plan, static_cast<const T*>(bias), to, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      void* const buffer = memory.as<char>(bytes * thread_number());
      fill(plan, t0, buffer);
      if (stream)
        streamed.share(buffer);
      else
        rows.share(threads);
    }
  }
  return Status::ok;
}

// Calls f(X{}) with a storage type of x whose sums are of type T.
template <class T, class F>
void by_x(DType dtype, F f) {
  if constexpr (sizeof(T) == 8)
    f(StoreF64{});
  else if (dtype == DType::bf16)
    f(StoreBf16{});
  else if (dtype == DType::f16)
    f(StoreF16{});
  else
    f(StoreF32{});
}

#if defined(PYREPR_LEVEL_avx512_bf16)
Status linear_in_registers(const LookupTables& a, const LookupHash& p, const float* bias, float* out) {
  const int64_t tokens = p.x.rows, capacity = smaller(tokens, kTokens);
  const int64_t bytes = larger(Chunks<StoreF32>::bytes(p), Registers::bytes(a, capacity));
  Plan<float> plan(a, capacity);
  const Memory memory(bytes * a.threads);
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
    plan.start(smaller(kTokens, tokens - t0));
    const Rows<StoreI8> rows(a, plan, bias, out + t0 * a.h);
    const Registers registers(a, plan, bias, out + t0 * a.h, capacity);
    if (!plan.ok() || !memory.ok() || !registers.ok()) return Status::out_of_memory;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
      void* const buffer = memory.as<char>(bytes * thread_number());
      by_x<float>(p.dtype, [&](auto x) { plan.template hash<decltype(x)>(p, t0, buffer); });
      registers.share(buffer, rows);
    }
  }
  return Status::ok;
}
#endif

Status linear(const LookupTables& a, const LookupHash& p, const void* bias, LookupRoute route, void* out) {
#if defined(PYREPR_LEVEL_avx512_bf16)
  if (a.type == TableType::i8 && Registers::pays(a, p.x.rows, route))
    return linear_in_registers(a, p, static_cast<const float*>(bias), static_cast<float*>(out));
#endif
  return by_type(a.type, [&](auto s) {
    using T = typename decltype(s)::T;
    const int64_t bytes = Chunks<StoreOf<T>>::bytes(p);
    return forward<decltype(s)>(a, p.x.rows, bias, route, out, bytes, [&](Plan<T>& plan, int64_t t0, void* buffer) {
      by_x<T>(p.dtype, [&](auto x) { plan.template hash<decltype(x)>(p, t0, buffer); });
    });
  });
}

Status sum(const LookupTables& a, int64_t tokens, const int32_t* codes, const void* weights, LookupRoute route,
           void* out) {
  return by_type(a.type, [&](auto s) {
    using T = typename decltype(s)::T;
    return forward<decltype(s)>(a, tokens, nullptr, route, out, 64, [&](Plan<T>& plan, int64_t t0, void*) {
      plan.copy(codes + t0 * a.K, static_cast<const T*>(weights) + t0 * a.K);
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
    using T = typename X::T;
    const int64_t K = p.x.cols / p.bits;
    return for_each_token<X>(p, [&](const Chunks<X>& chunks, int64_t t) {
      chunks.hash([&](int64_t k, int64_t count, const typename Chunks<X>::Hashed& hashed) {
        std::memcpy(codes + t * K + k, hashed.codes, static_cast<size_t>(count) * sizeof *codes);
        std::memcpy(static_cast<T*>(weights) + t * K + k, hashed.weights, static_cast<size_t>(count) * sizeof(T));
      });
    });
  });
}

Status hash_backward(const LookupHash& p, const void* grad_weights, void* grad) {
  return by_dtype(p.dtype, [&](auto x) {
    using X = decltype(x);
    using T = typename X::T;
    const int64_t d = p.x.cols, K = d / p.bits;
    return for_each_token<X>(p, [&](Chunks<X>& chunks, int64_t t) {
      chunks.derivative(static_cast<const T*>(grad_weights) + t * K, static_cast<T*>(grad) + t * d);
    });
  });
}

}  // namespace

LookupFunctions lookup_functions() { return {hash, hash_backward, linear, sum, backward}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
