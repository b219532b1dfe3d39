// The register-blocked matrix product that all families stand on: C [MR, NR] += A [MR, kc] B [kc, NR].
//
//   A stays row-major (rows of `kPanelStride` elements): the kernel broadcasts single elements of it, and a constant
//     stride turns every address into a displacement. Copying rows is all the packing A needs.
//   B is packed into panels of NR columns, [kc][NR]: the kernel loads whole vectors of it.
//   MR x NR fills the register file with accumulators (28 of 32 vectors on AVX-512 and NEON, 12 of 16 on AVX2 and SSE),
//     so each step of k issues MR * NR / W multiply-adds on NR / W loads and MR broadcasts.
//
// Included by level units only (see simd.h).
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <new>

#include "cpu/simd.h"

namespace pyrepr {
inline namespace PYREPR_LEVEL {
namespace {

#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = kVectorBytes == 64 ? 32 : 16;
#endif

template <class T>
struct Block {
  static constexpr int W = Lanes<T>::W;
  static constexpr int NV = 2;
  static constexpr int NR = NV * W;
  static constexpr int MR = kRegisters == 32 ? 14 : 6;
};
constexpr int64_t kDepth = 384;                // elements of k per packed block: A rows and B panel stay in L2
constexpr int64_t kPanelStride = kDepth + 16;  // not a multiple of 4 KiB, so the rows of A spread over the L1 sets

// Up to three runs of memory, one per row, that a call of the micro-kernel asks for a line at a time: a burst of
// requests would have to wait for the few that can be under way at once.
struct Ahead {
  const char* run[3] = {};
  int64_t step = 0;  // bytes that go with one k
  int count = 0;
  void add(const void* p, int64_t bytes) {
    if (count < 3) run[count++] = static_cast<const char*>(p);
    step = bytes;
  }
};

// C [MR, NR] (rows of ldc elements) = or += A [MR, kc] B [kc, NR]; products and sums in T. With `transposed`, A is [kc,
// MR] with rows of kPanelStride.
template <class T, bool transposed = false>
__attribute__((noinline)) void multiply_block(int64_t kc, const T* __restrict a, const T* __restrict b, T* __restrict c,
                                              int64_t ldc, bool add, const Ahead& ahead = {}) {
  using B = Block<T>;
  constexpr int64_t stretch = 16;
  // Nothing asked for: a line that is at hand. (An address that is nowhere costs a walk through the page table.)
  const char* const near = reinterpret_cast<const char*>(a);
  const char* const p = ahead.count > 0 ? ahead.run[0] : near;
  const char* const q = ahead.count > 1 ? ahead.run[1] : near;
  const char* const r = ahead.count > 2 ? ahead.run[2] : near;
  Vec<T> sum[B::MR][B::NV];
#pragma GCC unroll 16
  for (int i = 0; i < B::MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < B::NV; j++) sum[i][j] = Vec<T>{};
  for (int64_t k0 = 0; k0 < kc; k0 += stretch) {
    const int64_t offset = k0 * ahead.step, end = smaller(k0 + stretch, kc);
    __builtin_prefetch(p + offset);
    __builtin_prefetch(q + offset);
    __builtin_prefetch(r + offset);
    for (int64_t k = k0; k < end; k++) {
      Vec<T> row[B::NV];
#pragma GCC unroll 4
      for (int j = 0; j < B::NV; j++) row[j] = load<T>(b + k * B::NR + j * B::W);
#pragma GCC unroll 16
      for (int i = 0; i < B::MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < B::NV; j++)
          sum[i][j] += a[transposed ? k * kPanelStride + i : i * kPanelStride + k] * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < B::MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < B::NV; j++) {
      T* at = c + i * ldc + j * B::W;
      store<T>(at, add ? load<T>(at) + sum[i][j] : sum[i][j]);
    }
}

// A factor as the product sees it: element (r, k), r along the output, k along the sum, of the matrix minus a mean.
// The mean is held as high + low so that x - mean is right to the last bit of T however large the mean is.
template <class S>
struct Source {
  using T = typename S::T;
  const typename S::Memory* data;
  int64_t r_stride;
  int64_t k_stride;
  const int64_t* r_index = nullptr;  // if given, r counts the listed rows only (a mask)
  const int64_t* k_index = nullptr;
  const T* mean_high = nullptr;  // null: nothing is subtracted
  const T* mean_low = nullptr;
  bool mean_along_k = true;  // the mean is indexed by k (rows are samples) or by r (rows are features)

  int64_t at_r(int64_t r) const { return r_index ? r_index[r] : r; }
  int64_t at_k(int64_t k) const { return k_index ? k_index[k] : k; }
  T at(int64_t r, int64_t k) const {
    const T x = load_one<S>(data + at_r(r) * r_stride + at_k(k) * k_stride);
    const int64_t m = mean_along_k ? k : r;
    return mean_high ? (x - mean_high[m]) - mean_low[m] : x;
  }
};

// Copies `count` neighbouring elements, minus `mean`: a vector of per-element means, or one value for all.
// Not inlined, nor are the other packing loops: inside a large caller the compiler spills their counters.
template <class S>
__attribute__((noinline)) void copy_run(const typename S::Memory* in, int64_t count, const typename S::T* high,
                                        const typename S::T* low, bool mean_per_element, typename S::T* out) {
  using T = typename S::T;
  constexpr int W = Lanes<T>::W;
  int64_t i = 0;
  if (!high) {
    for (; i + W <= count; i += W) store<T>(out + i, load_as<S>(in + i));
    for (; i < count; i++) out[i] = load_one<S>(in + i);
  } else if (mean_per_element) {
    for (; i + W <= count; i += W) store<T>(out + i, (load_as<S>(in + i) - load<T>(high + i)) - load<T>(low + i));
    for (; i < count; i++) out[i] = (load_one<S>(in + i) - high[i]) - low[i];
  } else {
    for (; i + W <= count; i += W) store<T>(out + i, (load_as<S>(in + i) - *high) - *low);
    for (; i < count; i++) out[i] = (load_one<S>(in + i) - *high) - *low;
  }
}

// Asks for a row that will be read along k. Rows are too short for the hardware prefetcher, and far apart.
// Inlined by force: GCC takes a function that only prefetches for one without effect, and drops its calls.
template <class S>
__attribute__((always_inline)) inline void prefetch_row(const Source<S>& s, int64_t r, int64_t k0, int64_t kc) {
  constexpr int64_t line = 64 / sizeof(typename S::Memory);
  if (s.k_stride != 1) return;
  const typename S::Memory* const row = s.data + s.at_r(r) * s.r_stride + k0;
  for (int64_t k = 0; k < kc; k += line) __builtin_prefetch(row + k);
}

// Asks for the `part`-th of `parts` shares of the block [r0, r0 + rows) x [k0, k0 + kc), whichever way it lies in
// memory.
template <class S>
__attribute__((always_inline)) inline void prefetch_share(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0,
                                                          int64_t kc, int64_t part, int64_t parts) {
  constexpr int64_t line = 64 / sizeof(typename S::Memory);
  if (s.k_stride == 1) {
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; r++) prefetch_row(s, r0 + r, k0, kc);
  } else if (s.r_stride == 1 && rows > 0) {
    for (int64_t k = kc * part / parts; k < kc * (part + 1) / parts; k++) {
      const typename S::Memory* const run = s.data + s.at_k(k0 + k) * s.k_stride + r0;
      for (int64_t r = 0; r < rows; r += line) __builtin_prefetch(run + r);
    }
  }
}

// Reads rows [r0, r0 + rows) x [k0, k0 + kc) of a source whose elements neighbour each other along k:
// out [rows][stride].
template <class S>
void read_along_k(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0, int64_t kc, typename S::T* out,
                  int64_t stride) {
  constexpr int64_t ahead = 2;
  for (int64_t r = 0; r < rows; r++) {
    if (r + ahead < rows) prefetch_row(s, r0 + r + ahead, k0, kc);
    const int64_t m = s.mean_along_k ? k0 : r0 + r;
    copy_run<S>(s.data + s.at_r(r0 + r) * s.r_stride + k0, kc, s.mean_high ? s.mean_high + m : nullptr,
                s.mean_high ? s.mean_low + m : nullptr, s.mean_along_k, out + r * stride);
  }
}

template <class T>
inline void zero(T* p, int64_t count) {
  std::memset(static_cast<void*>(p), 0, static_cast<size_t>(count) * sizeof(T));
}

// One panel of a source whose elements neighbour each other along r: out [kc][NR], zero past `rows`.
template <class S>
__attribute__((noinline)) void read_panel(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0, int64_t kc,
                                          typename S::T* out) {
  using T = typename S::T;
  using B = Block<T>;
  Vec<T> high[B::NV] = {}, low[B::NV] = {};
  for (int v = 0; s.mean_high && !s.mean_along_k && v < B::NV; v++) {
    if (rows <= v * B::W) break;
    high[v] = load_some<StoreOf<T>>(s.mean_high + r0 + v * B::W, rows - v * B::W);
    low[v] = load_some<StoreOf<T>>(s.mean_low + r0 + v * B::W, rows - v * B::W);
  }
  for (int64_t k = 0; k < kc; k++) {
    const typename S::Memory* const run = s.data + s.at_k(k0 + k) * s.k_stride + r0;
    const T line_high = s.mean_high && s.mean_along_k ? s.mean_high[k0 + k] : T(0);
    const T line_low = s.mean_high && s.mean_along_k ? s.mean_low[k0 + k] : T(0);
#pragma GCC unroll 2
    for (int v = 0; v < B::NV; v++) {
      Vec<T> x{};
      if (rows > v * B::W)
        x = ((load_some<S>(run + v * B::W, rows - v * B::W) - high[v]) - line_high - low[v]) - line_low;
      store<T>(out + k * B::NR + v * B::W, x);
    }
  }
}

// out[j * out_stride + i] = line i, element j, minus the mean, for `lines` runs of `length` neighbouring elements.
// Writes whole W x W blocks: lines and length rounded up, zero (or rubbish past `length`) where there is nothing.
// mean_per_line: the mean is one number for each line, else one for each element.
template <class S>
__attribute__((noinline)) void copy_transposed(const typename S::Memory* const* line, int64_t lines, int64_t length,
                                               const typename S::T* high, const typename S::T* low, bool mean_per_line,
                                               typename S::T* out, int64_t out_stride) {
  using T = typename S::T;
  constexpr int W = Lanes<T>::W;
  for (int64_t j = 0; j < length; j += W)
    for (int64_t i0 = 0; i0 < lines; i0 += W) {
      Vec<T> mean_high{}, mean_low{};
      if (high && !mean_per_line) {
        mean_high = load_some<StoreOf<T>>(high + j, length - j);
        mean_low = load_some<StoreOf<T>>(low + j, length - j);
      }
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        v[i] = i0 + i < lines ? load_some<S>(line[i0 + i] + j, length - j) - mean_high : Vec<T>{};
        if (i0 + i < lines) v[i] -= mean_low;
        if (high && mean_per_line && i0 + i < lines) v[i] = (v[i] - high[i0 + i]) - low[i0 + i];
      }
      transpose_registers<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store<T>(out + (j + i) * out_stride + i0, v[i]);
    }
}

// Packs rows for the A side: out [round_up(rows, MR)][kPanelStride], rows past the end zero.
template <class S>
void pack_a(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0, int64_t kc, typename S::T* out) {
  using T = typename S::T;
  constexpr int W = Lanes<T>::W;
  if (s.k_stride == 1 && !s.k_index) {
    read_along_k(s, r0, rows, k0, kc, out, kPanelStride);
  } else if (s.r_stride == 1 && !s.r_index) {
    // W lines of k at a time: each becomes a column of out. The last ones reach into the padding of the rows.
    for (int64_t k = 0; k < kc; k += W) {
      const typename S::Memory* line[W];
      const int64_t lines = smaller<int64_t>(W, kc - k);
      for (int64_t i = 0; i < lines; i++) line[i] = s.data + s.at_k(k0 + k + i) * s.k_stride + r0;
      const int64_t m = s.mean_along_k ? k0 + k : r0;
      copy_transposed<S>(line, lines, rows, s.mean_high ? s.mean_high + m : nullptr,
                         s.mean_high ? s.mean_low + m : nullptr, s.mean_along_k, out + k, kPanelStride);
    }
  } else {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < kc; k++) out[r * kPanelStride + k] = s.at(r0 + r, k0 + k);
  }
  for (int64_t r = rows; r < round_up(rows, Block<T>::MR); r++) zero(out + r * kPanelStride, kPanelStride);
}

// Packs up to NR rows for the B side: one panel [kc][NR], rows past the end zero.
template <class S>
void pack_b(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0, int64_t kc, typename S::T* out) {
  constexpr int NR = Block<typename S::T>::NR;
  if (rows < NR) zero(out, kDepth * NR);
  if (s.r_stride == 1 && !s.r_index) {
    read_panel(s, r0, rows, k0, kc, out);
  } else if (s.k_stride == 1 && !s.k_index) {
    const typename S::Memory* line[NR];
    for (int64_t i = 0; i < rows; i++) line[i] = s.data + s.at_r(r0 + i) * s.r_stride + k0;
    const int64_t m = s.mean_along_k ? k0 : r0;
    copy_transposed<S>(line, rows, kc, s.mean_high ? s.mean_high + m : nullptr, s.mean_high ? s.mean_low + m : nullptr,
                       !s.mean_along_k, out, int64_t(NR));
  } else {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < kc; k++) out[k * NR + i] = s.at(r0 + i, k0 + k);
  }
}

// One thread's buffers for tile products of up to `rows` rows: packed A (in L2) and one panel of B (in L1).
template <class T>
struct TileBuffers {
  T* a;
  T* b;
  // pack_a writes W rows at a time, hence the slack.
  static int64_t a_size(int64_t rows) { return (round_up(rows, Block<T>::MR) + Lanes<T>::W) * kPanelStride; }
  static int64_t size(int64_t rows) { return a_size(rows) + kDepth * Block<T>::NR; }
  TileBuffers(T* memory, int64_t rows) : a(memory), b(memory + a_size(rows)) {}
};

// tile [rows, cols] = A [r0 : r0 + rows, 0 : depth] times B [c0 : c0 + cols, 0 : depth] transposed. The tile has rows
// of `ldc` elements and room for rows and cols rounded up to MR and NR. With `upper`, blocks wholly below the diagonal
// r0 + i <= c0 + j are left as they are.
template <class SA, class SB>
void tile_product(const Source<SA>& a, int64_t r0, int64_t rows, const Source<SB>& b, int64_t c0, int64_t cols,
                  int64_t depth, bool upper, const TileBuffers<typename SA::T>& buffers, typename SA::T* tile,
                  int64_t ldc) {
  using T = typename SA::T;
  using B = Block<T>;
  if (depth == 0)
    for (int64_t i = 0; i < rows; i++) zero(tile + i * ldc, round_up(cols, B::NR));
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int64_t kc = smaller(kDepth, depth - k0);
    pack_a(a, r0, rows, k0, kc, buffers.a);
    int64_t asked = -1;  // the last row of A's next block that was asked for
    for (int64_t j = 0; j < cols; j += B::NR) {
      if (upper && r0 > c0 + j + B::NR - 1) continue;
      pack_b(b, c0 + j, smaller<int64_t>(B::NR, cols - j), k0, kc, buffers.b);
      // While this panel is multiplied, the next one is on its way from memory, and a share of the next block of A.
      const int64_t calls = ceil_div(rows, B::MR), next = larger<int64_t>(0, smaller<int64_t>(B::NR, cols - j - B::NR));
      const bool more = k0 + kDepth < depth;
      for (int64_t i = 0, call = 0; i < rows && !(upper && r0 + i > c0 + j + B::NR - 1); i += B::MR, call++) {
        Ahead ahead;
        if (b.k_stride == 1) {
          for (int64_t r = next * call / calls; r < next * (call + 1) / calls; r++)
            ahead.add(b.data + b.at_r(c0 + j + B::NR + r) * b.r_stride + k0, sizeof *b.data);
          const int64_t r = (j / B::NR * calls + call) * rows / (ceil_div(cols, B::NR) * calls);
          if (more && a.k_stride == 1 && r != asked) {
            ahead.add(a.data + a.at_r(r0 + r) * a.r_stride + k0 + kDepth, sizeof *a.data);
            asked = r;
          }
        } else {
          prefetch_share(b, c0 + j + B::NR, next, k0, kc, call, calls);
        }
        multiply_block<T>(kc, buffers.a + i * kPanelStride, buffers.b, tile + i * ldc + j, ldc, k0 > 0, ahead);
      }
    }
  }
}

// Small products (tens to hundreds each way) on operands that stay packed between products. A matrix [rows, cols] is
// kept in panels of NR columns; element (r, c) stands at data[(c / NR) * rows * NR + r * NR + c % NR]. In C = A^T B
// both operands have the sum along their rows, so one layout serves as either factor and as the result.
struct Panels {
  static constexpr int W = Lanes<float>::W;
  static constexpr int NR = 2 * W;
  static constexpr int MR = kRegisters == 32 ? 8 : 4;  // 8 x 2 or 4 x 2 sums: enough to hide an FMA's latency

  float* data;
  int64_t rows;

  float* at(int64_t r, int64_t c) const { return data + (c / NR) * rows * NR + r * NR + c % NR; }
  Panels panel(int64_t j) const { return {data + j * rows * NR, rows}; }
  static int64_t size(int64_t rows, int64_t cols) { return rows * round_up(cols, NR); }
};

// C [MR, NV * W] = A^T B, or keep * C + A^T B, for A [count, MR] and B [count, NV * W]; all rows of NR. What is added
// to C is summed first: C may be large, and is rounded once.
template <int NV, bool fresh>
__attribute__((noinline)) void multiply_panel_block(int64_t count, const float* __restrict a, const float* __restrict b,
                                                    float* c, float keep) {
  constexpr int W = Panels::W, NR = Panels::NR, MR = Panels::MR;
  Vec<float> sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) sum[i][j] = Vec<float>{};
  for (int64_t k = 0; k < count; k++) {
    Vec<float> row[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) row[j] = load<float>(b + k * NR + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) sum[i][j] += a[k * NR + i] * row[j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) {
      float* const at = c + i * NR + j * W;
      store<float>(at, fresh ? sum[i][j] : load<float>(at) * keep + sum[i][j]);
    }
}

// Memory that will be needed soon, asked for a few lines at a time between the blocks of a product: a burst of requests
// would have to wait for the few that can be under way at once.
class Requests {
 public:
  // `rows` runs of `bytes` bytes, `stride` bytes apart.
  void add(const void* first, int64_t rows, int64_t stride, int64_t bytes) {
    if (count_ == kRuns || rows <= 0 || bytes <= 0) return;
    runs_[count_++] = {static_cast<const char*>(first), stride, ceil_div(bytes, 64), rows};
    lines_ += ceil_div(bytes, 64) * rows;
  }
  // Shares the lines out over this many calls of `some`.
  void spread(int64_t calls) { each_ = ceil_div(lines_, larger<int64_t>(1, calls)); }
  // Inlined by force, because GCC drops calls of a function that only prefetches.
  __attribute__((always_inline)) void some() {
    for (int64_t i = 0; i < each_ && at_ < count_; i++) {
      Run& run = runs_[at_];
      __builtin_prefetch(run.row + line_ * 64, 0, 2);
      if (++line_ < run.lines) continue;
      line_ = 0;
      run.row += run.stride;
      if (--run.rows == 0) at_++;
    }
  }

 private:
  static constexpr int kRuns = 9;
  struct Run {
    const char* row;
    int64_t stride, lines, rows;
  };
  Run runs_[kRuns];
  int count_ = 0, at_ = 0;
  int64_t line_ = 0, lines_ = 0, each_ = 0;
};

// Which part of a product is wanted. Row i of the result takes the terms before i + MR (A is upper triangular), those
// from i on (A is lower triangular), or has its columns from i on computed (the result is upper triangular).
enum class Part { all, terms_upto, terms_from, upper };

// c [m, n] = A^T B (fresh) or keep * c + A^T B, for a [count, m] and b [count, n]; m a multiple of MR, n of W.
template <Part part, bool fresh>
void multiply_panels(const Panels& a, int64_t m, const Panels& b, int64_t n, int64_t count, const Panels& c,
                     float keep = 1, Requests* requests = nullptr) {
  constexpr int W = Panels::W, NR = Panels::NR, MR = Panels::MR;
  for (int64_t j = 0; j < n; j += NR)
    for (int64_t i = 0; i < m; i += MR) {
      int64_t first = 0, last = count, column = j;
      if constexpr (part == Part::terms_upto) last = smaller(count, i + MR);
      if constexpr (part == Part::terms_from) first = smaller(i, count);
      if constexpr (part == Part::upper) column = larger(j, i / W * W);
      if (column >= j + NR) continue;
      if (requests) requests->some();
      const float* const left = a.at(first, i);
      const float* const right = b.at(first, column);
      if (smaller(n, j + NR) - column > W)
        multiply_panel_block<2, fresh>(last - first, left, right, c.at(i, column), keep);
      else
        multiply_panel_block<1, fresh>(last - first, left, right, c.at(i, column), keep);
    }
}

// out [cols, rows] = in [rows, cols] transposed; both counts multiples of W.
__attribute__((noinline)) inline void transpose_panels(const Panels& in, int64_t rows, int64_t cols,
                                                       const Panels& out) {
  constexpr int W = Panels::W, NR = Panels::NR;
  for (int64_t c = 0; c < cols; c += W)
    for (int64_t r = 0; r < rows; r += W) {
      const float* const from = in.at(r, c);
      float* const to = out.at(c, r);
      Vec<float> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) v[i] = load<float>(from + i * NR);
      transpose_registers<float>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store<float>(to + i * NR, v[i]);
    }
}

// Cache-line aligned memory that is freed with its owner. `ok()` is false if there was none. What is worth it asks for
// huge pages, where the system gives them: tiles and panels touch a page every few lines.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    constexpr int64_t huge = int64_t(2) << 20;
    const int64_t alignment = bytes >= 2 * huge ? huge : 64, size = round_up(bytes + 1, alignment);
    data_ = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(size));
#if defined(__linux__)
    if (alignment == huge && data_) madvise(data_, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  bool ok() const { return data_ != nullptr; }
  template <class T>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  void* data_;
};

// A fixed number of elements, all `value` at first, or whatever memory holds; throws std::bad_alloc if there is none.
// (What the standard library makes for numbers would be linked in for every instruction set.)
enum Unset { kUnset };
template <class T>
class Array {
 public:
  explicit Array(int64_t size = 0, T value = T()) : Array(size, kUnset) {
    for (int64_t i = 0; i < size; i++) data()[i] = value;
  }
  Array(int64_t size, Unset) : size_(size), memory_(size * int64_t(sizeof(T))) {
    if (!memory_.ok()) throw std::bad_alloc();
  }
  T* data() const { return memory_.as<T>(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }

 private:
  int64_t size_;
  Memory memory_;
};

}  // namespace
}  // namespace PYREPR_LEVEL
}  // namespace pyrepr
