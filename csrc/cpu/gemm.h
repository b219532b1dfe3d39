// The register-blocked matrix product that all families stand on: C [MR, NR] += A [MR, kc] B [kc, NR].
//
//   A stays row-major (rows of `kPanelStride` elements): the kernel broadcasts single elements of it, and a constant
//     stride turns every address into a displacement. Copying rows is all the packing A needs.
//   B is packed into panels of NR columns, [kc][NR]: the kernel loads whole vectors of it.
//   MR x NR fills the register file with accumulators (28 of 32 vectors on AVX-512, 12 of 16 on AVX2 and SSE), so each
//     step of k issues MR * NR / W multiply-adds on NR / W loads and MR broadcasts.
//
// Included by level units only (see simd.h).
#pragma once

#include <cstdlib>

#include "cpu/simd.h"

namespace pyrepr {
namespace {

template <class T>
struct Block {
  static constexpr int W = Lanes<T>::W;
  static constexpr int NV = 2;
  static constexpr int NR = NV * W;
  static constexpr int MR = kVectorBytes == 64 ? 14 : 6;
};
constexpr int64_t kDepth = 384;                // elements of k per packed block: A rows and B panel stay in L2
constexpr int64_t kPanelStride = kDepth + 16;  // not a multiple of 4 KiB, so the rows of A spread over the L1 sets

// C [MR, NR] (rows of ldc elements) = or += A [MR, kc] B [kc, NR]; products and sums in T.
template <class T>
void multiply_block(int64_t kc, const T* __restrict a, const T* __restrict b, T* __restrict c, int64_t ldc, bool add) {
  using B = Block<T>;
  Vec<T> sum[B::MR][B::NV];
#pragma GCC unroll 16
  for (int i = 0; i < B::MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < B::NV; j++) sum[i][j] = Vec<T>{};
  for (int64_t k = 0; k < kc; k++) {
    Vec<T> row[B::NV];
#pragma GCC unroll 4
    for (int j = 0; j < B::NV; j++) row[j] = load<T>(b + k * B::NR + j * B::W);
#pragma GCC unroll 16
    for (int i = 0; i < B::MR; i++)
#pragma GCC unroll 4
      for (int j = 0; j < B::NV; j++) sum[i][j] += a[i * kPanelStride + k] * row[j];
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
  const T* mean_high = nullptr;      // null: nothing is subtracted
  const T* mean_low = nullptr;
  bool mean_along_k = true;          // the mean is indexed by k (rows are samples) or by r (rows are features)

  T at(int64_t r, int64_t k) const {
    const T x = load_one<S>(data + (r_index ? r_index[r] : r) * r_stride + (k_index ? k_index[k] : k) * k_stride);
    const int64_t m = mean_along_k ? k : r;
    return mean_high ? (x - mean_high[m]) - mean_low[m] : x;
  }
};

// Copies `count` neighbouring elements, minus `mean`: a vector of per-element means, or one value for all.
template <class S>
inline void copy_run(const typename S::Memory* in, int64_t count, const typename S::T* high, const typename S::T* low,
                     bool mean_per_element, typename S::T* out) {
  using T = typename S::T;
  constexpr int W = Lanes<T>::W;
  int64_t i = 0;
  if (!high) {
    for (; i + W <= count; i += W) store<T>(out + i, load_as<S>(in + i));
    for (; i < count; i++) out[i] = load_one<S>(in + i);
  } else if (mean_per_element) {
    for (; i + W <= count; i += W)
      store<T>(out + i, (load_as<S>(in + i) - load<T>(high + i)) - load<T>(low + i));
    for (; i < count; i++) out[i] = (load_one<S>(in + i) - high[i]) - low[i];
  } else {
    for (; i + W <= count; i += W) store<T>(out + i, (load_as<S>(in + i) - *high) - *low);
    for (; i < count; i++) out[i] = (load_one<S>(in + i) - *high) - *low;
  }
}

// Reads rows [r0, r0 + rows) x [k0, k0 + kc) of a source whose elements neighbour each other along k:
// out [rows][stride].
template <class S>
void read_along_k(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0, int64_t kc, typename S::T* out,
                  int64_t stride) {
  for (int64_t r = 0; r < rows; r++) {
    const int64_t row = s.r_index ? s.r_index[r0 + r] : r0 + r;
    const int64_t m = s.mean_along_k ? k0 : r0 + r;
    copy_run<S>(s.data + row * s.r_stride + k0, kc, s.mean_high ? s.mean_high + m : nullptr,
                s.mean_high ? s.mean_low + m : nullptr, s.mean_along_k, out + r * stride);
  }
}

// The same for a source whose elements neighbour each other along r: out [kc][stride].
template <class S>
void read_along_r(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0, int64_t kc, typename S::T* out,
                  int64_t stride) {
  for (int64_t k = 0; k < kc; k++) {
    const int64_t row = s.k_index ? s.k_index[k0 + k] : k0 + k;
    const int64_t m = s.mean_along_k ? k0 + k : r0;
    copy_run<S>(s.data + row * s.k_stride + r0, rows, s.mean_high ? s.mean_high + m : nullptr,
                s.mean_high ? s.mean_low + m : nullptr, !s.mean_along_k, out + k * stride);
  }
}

template <class T>
inline void zero(T* p, int64_t count) {
  std::memset(static_cast<void*>(p), 0, static_cast<size_t>(count) * sizeof(T));
}

// out[j][i] = in[i][j] for i < rows, j < cols, both rounded up to the vector width by the caller's buffers.
template <class T>
void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t cols, T* out, int64_t out_stride) {
  constexpr int W = Lanes<T>::W;
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < cols; j += W)
      transpose_block<T>(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
}

// Scratch for one strip of a factor on its way through a transposition: either orientation fits.
template <class T>
constexpr int64_t kStripSize = (kDepth + 16) * (Block<T>::NR + 16);

// Packs rows for the A side: out [round_up(rows, MR)][kPanelStride], rows past the end zero.
template <class S>
void pack_a(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0, int64_t kc, typename S::T* out,
            typename S::T* strip) {
  using T = typename S::T;
  constexpr int W = Lanes<T>::W;
  if (s.k_stride == 1 && !s.k_index) {
    read_along_k(s, r0, rows, k0, kc, out, kPanelStride);
  } else if (s.r_stride == 1 && !s.r_index) {
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t some = smaller<int64_t>(W, rows - r);
      read_along_r(s, r0 + r, some, k0, kc, strip, int64_t(W));
      // The last block of W columns may reach past kc, into the padding of the row: kPanelStride leaves room for it.
      transpose(strip, W, round_up(kc, W), int64_t(W), out + r * kPanelStride, kPanelStride);
    }
  } else {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < kc; k++) out[r * kPanelStride + k] = s.at(r0 + r, k0 + k);
  }
  for (int64_t r = rows; r < round_up(rows, Block<T>::MR); r++) zero(out + r * kPanelStride, kPanelStride);
}

// Packs rows for the B side: panels of NR rows, each [kc][NR], rows past the end zero.
template <class S>
void pack_b(const Source<S>& s, int64_t r0, int64_t rows, int64_t k0, int64_t kc, typename S::T* out,
            typename S::T* strip) {
  using T = typename S::T;
  constexpr int W = Lanes<T>::W;
  constexpr int NR = Block<T>::NR;
  for (int64_t r = 0; r < rows; r += NR, out += kDepth * NR) {
    const int64_t some = smaller<int64_t>(NR, rows - r);
    if (some < NR) zero(out, kDepth * NR);
    if (s.r_stride == 1 && !s.r_index) {
      read_along_r(s, r0 + r, some, k0, kc, out, int64_t(NR));
    } else if (s.k_stride == 1 && !s.k_index) {
      if (some < NR) zero(strip, kStripSize<T>);
      read_along_k(s, r0 + r, some, k0, kc, strip, kPanelStride);
      transpose(strip, kPanelStride, int64_t(NR), round_up(kc, W), out, int64_t(NR));
    } else {
      for (int64_t i = 0; i < some; i++)
        for (int64_t k = 0; k < kc; k++) out[k * NR + i] = s.at(r0 + r + i, k0 + k);
    }
  }
}

// One thread's buffers for tile products of up to rows x cols.
template <class T>
struct TileBuffers {
  T* a;
  T* b;
  T* strip;
  // pack_a may write W rows at a time, hence the slack.
  static int64_t size(int64_t rows, int64_t cols) {
    return (round_up(rows, Block<T>::MR) + Lanes<T>::W) * kPanelStride + round_up(cols, Block<T>::NR) * kDepth +
           kStripSize<T> + 64;
  }
  TileBuffers(T* memory, int64_t rows, int64_t cols) {
    a = memory;
    b = a + round_up((round_up(rows, Block<T>::MR) + Lanes<T>::W) * kPanelStride, 16);
    strip = b + round_up(cols, Block<T>::NR) * kDepth;
  }
};

// tile [rows, cols] = A [r0 : r0 + rows, 0 : depth] times B [c0 : c0 + cols, 0 : depth] transposed. The tile has rows of
// `ldc` elements and room for rows and cols rounded up to MR and NR. With `upper`, blocks wholly below the diagonal
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
    pack_a(a, r0, rows, k0, kc, buffers.a, buffers.strip);
    pack_b(b, c0, cols, k0, kc, buffers.b, buffers.strip);
    for (int64_t j = 0; j < cols; j += B::NR)
      for (int64_t i = 0; i < rows; i += B::MR) {
        if (upper && r0 + i > c0 + j + B::NR - 1) continue;
        multiply_block<T>(kc, buffers.a + i * kPanelStride, buffers.b + j * kDepth, tile + i * ldc + j, ldc, k0 > 0);
      }
  }
}

// Cache-line aligned memory that is freed with its owner. `ok()` is false if there was none.
class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes + 1, 64)))) {}
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

}  // namespace
}  // namespace pyrepr
