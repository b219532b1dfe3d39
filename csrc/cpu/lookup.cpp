// Family `lookup` on the CPU, compiled once per instruction set (PYREPR_LEVEL). The maths is in lookup.h.
//
// Bytes at best, s bytes a table entry: rows (lookup_rows.h) T K h s, a decoder's single token is memory-bound; stream
// (lookup_stream.h) K n h s once per kTokens tokens, then T K h multiply-adds out of L2; backward (lookup_backward.h)
// reads and writes every table once and does 2 T K h multiply-adds out of L2.
//
// Determinism: an element of `out` is summed by one thread in the order of k, one of `segments` in the order of tokens,
// one of `dots` in the order of columns, whatever the shares of the threads are.
#include "cpu/lookup.h"

#include <omp.h>

#include "cpu/lookup_backward.h"
#include "cpu/lookup_hash.h"
#include "cpu/lookup_low_rank.h"
#if defined(PYREPR_LEVEL_avx512_bf16)
#include "cpu/lookup_byte_rows.h"
#include "cpu/lookup_registers.h"
#endif
#include "cpu/lookup_rows.h"
#include "cpu/lookup_signs.h"
#include "cpu/lookup_stream.h"

namespace pyrepr::cpu {
namespace avx512 {
LookupFunctions lookup_functions();
}
namespace avx512_bf16 {
LookupFunctions lookup_functions();
}
}  // namespace pyrepr::cpu

namespace pyrepr::cpu::PYREPR_LEVEL {

#if defined(PYREPR_LEVEL_amx)  // products of tiles are all that it adds

LookupFunctions lookup_functions() {
  LookupFunctions functions = avx512_bf16::lookup_functions();
  functions.signs = linear_of_signs;
  return functions;
}

#else

namespace {

constexpr int64_t kTokens = 8192;  // tokens hashed at a time

// How many threads a forward is worth: by the bytes it reads of tables, and a third of one for a multiply-add of the
// low-rank part. Measured on Zen 4, 384 x 1536, 8-bit tables: 93 us for 8 tokens of 0.9 MB, 127 us of 1.5 MB.
int threads_for(const LookupTables& a, int64_t tokens, int64_t item, int64_t multiply_adds = 0) {
  return tokens * (a.K * a.h * item + multiply_adds / 3) < kParallelBytes ? 1 : a.threads;
}

#if defined(PYREPR_LEVEL_avx512_bf16)  // products of bytes are all that it adds

// How tables of 8-bit integers are summed by products of bytes, if at all.
LookupRoute in_bytes(const LookupTables& a, int64_t tokens, LookupRoute route) {
  if (!ByteWeights::fits(a) || route == LookupRoute::rows) return LookupRoute::rows;
  if (route == LookupRoute::bytes) return route;
  if (Registers::pays(a, tokens, route)) return LookupRoute::registers;
  if (Stream<StoreI8>::pays(a, tokens, route) && Stream<StoreI8>::in_fours(a)) return LookupRoute::stream;
  return GatheredBytes::pays(a, tokens) ? LookupRoute::bytes : LookupRoute::rows;
}

// Tokens whose weights two bytes cannot hold gather their rows as floats.
Status linear_in_bytes(const LookupTables& a, const LookupHash& p, const LookupLowRank& low, const float* bias,
                       LookupRoute way, float* out) {
  const int64_t tokens = p.x.rows, capacity = smaller(tokens, kTokens);
  const int threads = threads_for(a, tokens, 1, low.rank * (2 * p.x.cols + a.h));
  int64_t bytes = Inputs<float>::bytes(p, low);
  if (way == LookupRoute::registers) bytes = larger(bytes, Registers::bytes(capacity));
  if (way == LookupRoute::stream) bytes = larger(bytes, Stream<StoreI8>::bytes(a, capacity));
  bytes = round_up(bytes, 64);
  Plan<float> plan(a, capacity);
  const Memory memory(bytes * threads);
  const ByteWeights weights(a, plan, capacity);
  const Inputs<float> inputs(p, low, capacity, a.h);
  if (!plan.ok() || !memory.ok() || !weights.ok() || !inputs.ok()) return Status::out_of_memory;
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
    plan.start(smaller(kTokens, tokens - t0));
    float* const to = out + t0 * a.h;
    const Rows<StoreI8> rows(a, plan, bias, to);
    const Registers registers(a, weights, bias, to, plan.tokens());
    const GatheredBytes gathered(a, plan, weights, bias, to);
    const ByteRows byte_rows(plan, weights, a.n);
    Stream<StoreI8> stream(a, plan, bias, to, threads);
    stream.take_bytes(&byte_rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      void* const buffer = memory.as<char>(bytes * thread_number());
      inputs.hash(plan, t0, buffer);
      weights.share();
      if (way == LookupRoute::registers)
        registers.share(buffer);
      else if (way == LookupRoute::stream)
        stream.share(buffer);
      else
        gathered.share(threads);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < plan.tokens(); t++)
        if (!weights.fits(t)) rows.token(t);
      inputs.raise(plan, to, buffer);
    }
  }
  return Status::ok;
}

Status linear(const LookupTables& a, const LookupHash& p, const LookupLowRank& low, const void* bias, LookupRoute route,
              void* out) {
  const LookupRoute way = in_bytes(a, smaller(p.x.rows, kTokens), route);
  if (way == LookupRoute::rows) return avx512::lookup_functions().linear(a, p, low, bias, route, out);
  return linear_in_bytes(a, p, low, static_cast<const float*>(bias), way, static_cast<float*>(out));
}

}  // namespace

LookupFunctions lookup_functions() {
  LookupFunctions functions = avx512::lookup_functions();
  functions.linear = linear;
  functions.signs = linear_of_signs;
  return functions;
}

#else

// Calls f(S{}) with the storage type of tables.
template <class F>
Status by_type(TableType type, F f) {
  return type == TableType::i8 ? f(StoreI8{}) : by_dtype(static_cast<DType>(type), f);
}

// Blocks of tokens, each by one team: fill(plan, t0, buffer) writes the codes and weights of a thread's share of the
// tokens from t0 on with `bytes` of a buffer, then the rows are added, then finish(plan, out, buffer).
template <class S, class Fill, class Finish>
Status forward(const LookupTables& a, int64_t tokens, const void* bias, LookupRoute route, int threads, void* out,
               int64_t bytes, Fill fill, Finish finish) {
  using T = typename S::T;
  const int64_t capacity = smaller(tokens, kTokens);
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
      finish(plan, to, buffer);
    }
  }
  return Status::ok;
}

Status linear(const LookupTables& a, const LookupHash& p, const LookupLowRank& low, const void* bias, LookupRoute route,
              void* out) {
  return by_type(a.type, [&](auto s) {
    using T = typename decltype(s)::T;
    const Inputs<T> inputs(p, low, smaller(p.x.rows, kTokens), a.h);
    if (!inputs.ok()) return Status::out_of_memory;
    const int64_t item = sizeof(typename decltype(s)::Memory), dense = low.rank * (2 * p.x.cols + a.h);
    return forward<decltype(s)>(
        a, p.x.rows, bias, route, threads_for(a, p.x.rows, item, dense), out, Inputs<T>::bytes(p, low),
        [&](const Plan<T>& plan, int64_t t0, void* buffer) { inputs.hash(plan, t0, buffer); },
        [&](const Plan<T>& plan, T* to, void* buffer) { inputs.raise(plan, to, buffer); });
  });
}

Status sum(const LookupTables& a, int64_t tokens, const int32_t* codes, const void* weights, LookupRoute route,
           void* out) {
  return by_type(a.type, [&](auto s) {
    using T = typename decltype(s)::T;
    const int threads = threads_for(a, tokens, sizeof(typename decltype(s)::Memory));
    return forward<decltype(s)>(
        a, tokens, nullptr, route, threads, out, 64,
        [&](const Plan<T>& plan, int64_t t0, void*) {
          plan.copy(codes + t0 * a.K, static_cast<const T*>(weights) + t0 * a.K);
        },
        [](const Plan<T>&, T*, void*) {});
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
    const int64_t K = chunks_of(p);
    return for_each_token<X>(p, [&](Chunks<T>& chunks, int64_t t) {
      chunks.hash();
      std::memcpy(codes + t * K, chunks.codes(), static_cast<size_t>(K) * sizeof *codes);
      std::memcpy(static_cast<T*>(weights) + t * K, chunks.weights(), static_cast<size_t>(K) * sizeof(T));
    });
  });
}

Status hash_backward(const LookupHash& p, const void* grad_weights, void* grad) {
  return by_dtype(p.dtype, [&](auto x) {
    using X = decltype(x);
    using T = typename X::T;
    const int64_t d = p.x.cols, K = chunks_of(p);
    return for_each_token<X>(p, [&](const Chunks<T>& chunks, int64_t t) {
      chunks.derivative(static_cast<const T*>(grad_weights) + t * K, static_cast<T*>(grad) + t * d);
    });
  });
}

}  // namespace

LookupFunctions lookup_functions() { return {hash, hash_backward, linear, sum, backward, linear_of_signs}; }

#endif
#endif

}  // namespace pyrepr::cpu::PYREPR_LEVEL
