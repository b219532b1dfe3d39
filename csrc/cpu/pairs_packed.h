// The operands of the log-sum-exp's products, packed. Included by level units only.
//
// Features are cut into segments where a prefix ends. A matrix of rows is packed along its features (`ByFeature`, for
// x y^T) or, a tile at a time, along its rows (`pack_samples`, for the gradients), in panels as gemm.h's and dots.h's B
// has them.
#pragma once

#include "cpu/gemm.h"
#include "cpu/pairs_columns.h"
#include "cpu/tiles.h"
#if defined(PYREPR_LEVEL_avx512_bf16)
#include "cpu/dots.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// What a product works on: words that each hold `step` neighbours along the sum.
struct FloatWords {
  struct Products {
    Products() {}
  };
  using Word = float;
  static constexpr int64_t step = 1;
  static constexpr bool by_columns = true;  // A may be [count, MR]
  static constexpr int MR = Block<float>::MR, NR = Block<float>::NR;
  // c [MR, NR] = or += A [MR, count] B [count, NR]; A has rows of kPanelStride, or with `transposed` columns of it.
  template <bool transposed>
  static void multiply(int64_t count, const Word* a, const Word* b, float* c, int64_t ldc, bool add) {
    multiply_block<float, transposed>(count, a, b, c, ldc, add);
  }
};
#if defined(PYREPR_LEVEL_avx512_bf16)
struct Bf16Words {
  using Products = PairProducts;
  using Word = int32_t;
  static constexpr int64_t step = 2;
#if defined(PYREPR_LEVEL_amx)
  static constexpr bool by_columns = false;  // as tiles are not
#else
  static constexpr bool by_columns = true;
#endif
  static constexpr int MR = kPairRows, NR = kPairColumns;
  template <bool transposed>
  static void multiply(int64_t count, const Word* a, const Word* b, float* c, int64_t ldc, bool add) {
    multiply_pairs<Bf16Pairs, transposed>(count, a, b, c, ldc, add);
  }
};
#endif

// Features [first, first + count), which are `words` words from `word` on along the features (whole vectors of them are
// there), and feature panels [panel, panel + panels).
struct Segment {
  int64_t first, count, word, words, panel, panels;
};

template <class Words>
struct Segments {
  Array<Segment> list;
  int64_t words = 0, panels = 0, blocks = 0;  // in all; blocks: of at most kDepth words

  Segments(const int64_t* prefixes, int64_t count) : list(count) {
    for (int64_t p = 0, first = 0; p < count; first = prefixes[p++]) {
      const int64_t features = prefixes[p] - first, used = ceil_div(features, Words::step);
      list[p] = {first, features, words, used, panels, ceil_div(features, Words::NR)};
      words += round_up(used, 16);
      panels += list[p].panels;
      blocks += ceil_div(used, kDepth);
    }
  }
};

// `count` elements of row r of x from `first` on, as words: out [count in words, rounded up to 16], zero behind them.
template <class Words>
void read_words(const View& x, DType dtype, int64_t r, int64_t first, int64_t count, typename Words::Word* out) {
  if constexpr (Words::step == 1) {
    constexpr int W = Lanes<float>::W;
    by_storage(dtype, [&](auto s) {
      const auto* const p = row_at<decltype(s)>(x, r) + first;
      for (int64_t k = 0; k < round_up(count, 16); k += W)
        store<float>(out + k, load_some<decltype(s)>(p + k, count - k));
    });
  } else {
    zero(out, round_up(ceil_div(count, 2), 16));
    std::memcpy(out, row_at<StoreBf16>(x, r) + first, static_cast<size_t>(count) * sizeof(uint16_t));
  }
}

// Panels of NR rows, along the features: [panels][words][NR].
template <class Words>
class ByFeature {
 public:
  using Word = typename Words::Word;
  static constexpr int NR = Words::NR;

  ByFeature(const View& x, DType dtype, const Segments<Words>& segments, int threads)
      : words_(segments.words), memory_(ceil_div(x.rows, NR) * NR * segments.words, kUnset) {
    const auto pack = [&](const Array<Word>& rows) {
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < ceil_div(x.rows, NR); panel++) {
        zero(rows.data(), rows.size());
        for (int64_t r = 0; r < smaller<int64_t>(NR, x.rows - panel * NR); r++)
          for (const Segment& s : segments.list)
            read_words<Words>(x, dtype, panel * NR + r, s.first, s.count, rows.data() + r * words_ + s.word);
        transpose(rows.data(), memory_.data() + panel * NR * words_);
      }
    };
    with_scratch<Array<Word>>(threads, pack, NR * segments.words);
  }
  // Row r is a multiple of NR.
  const Word* at(int64_t r, int64_t word) const { return memory_.data() + r * words_ + word * NR; }

 private:
  // in [NR, words] -> out [words, NR], whole vectors of words at a time
  void transpose(const Word* in, Word* out) const {
    constexpr int W = Lanes<float>::W;
    for (int64_t k = 0; k < words_; k += W)
      for (int64_t r = 0; r < NR; r += W) {
        Vec<float> v[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) std::memcpy(&v[i], in + (r + i) * words_ + k, sizeof v[i]);
        transpose_registers<float>(v);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) std::memcpy(out + (k + i) * NR + r, &v[i], sizeof v[i]);
      }
  }

  const int64_t words_;
  const Array<Word> memory_;
};

// A panel of `count` features, at most NR, of `rows` rows, along the rows: out [rows in words][NR], zero behind what
// exists.
template <class Words>
__attribute__((noinline)) void pack_samples(const View& x, DType dtype, int64_t r0, int64_t rows, int64_t first,
                                            int64_t count, typename Words::Word* out) {
  if constexpr (Words::step == 1) {
    constexpr int W = Lanes<float>::W;
    by_storage(dtype, [&](auto s) {
      using S = decltype(s);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < Words::NR; c += W)
          store<float>(out + r * Words::NR + c,
                       count > c ? load_some<S>(row_at<S>(x, r0 + r) + first + c, count - c) : Vec<float>{});
    });
  } else {
    for (int64_t r = 0; r < rows; r += Words::step, out += Words::NR) {
      uint16_t both[2][Words::NR] = {};
      for (int64_t half = 0; half < smaller<int64_t>(2, rows - r); half++)
        std::memcpy(both[half], row_at<StoreBf16>(x, r0 + r + half) + first,
                    static_cast<size_t>(count) * sizeof *both[half]);
      for (int64_t c = 0; c < Words::NR; c++) out[c] = static_cast<int32_t>(both[0][c] | uint32_t(both[1][c]) << 16);
    }
  }
}

// A block of rows for the A side, along the features: [blocks][rows][kPanelStride].
template <class Words>
class RowBlock {
 public:
  using Word = typename Words::Word;
  RowBlock(const Segments<Words>& segments, int64_t capacity)
      : segments_(segments),
        capacity_(capacity),
        memory_(segments.blocks * capacity * kPanelStride, kUnset),
        row_(segments.words) {}

  void pack(const View& x, DType dtype, int64_t first, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) {
      int64_t block = 0;
      for (const Segment& s : segments_.list) {
        read_words<Words>(x, dtype, first + r, s.first, s.count, row_.data());
        for (int64_t k = 0; k < s.words; k += kDepth, block++)
          std::memcpy(at(block, r), row_.data() + k, static_cast<size_t>(smaller(kDepth, s.words - k)) * 4);
      }
    }
  }
  Word* at(int64_t block, int64_t r) const { return memory_.data() + (block * capacity_ + r) * kPanelStride; }

  // tile [rows, cols] (rows of kPanelStride) = or += the rows' inner products with rows [c0, c0 + cols) of y over the
  // features of a segment, which starts at block `block` here.
  void multiply(int64_t rows, const ByFeature<Words>& y, int64_t c0, int64_t cols, const Segment& s, int64_t block,
                float* tile) const {
    const typename Words::Products products;
    for (int64_t k = 0; k < s.words; k += kDepth, block++)
      for (int64_t j = 0; j < cols; j += Words::NR)
        for (int64_t i = 0; i < rows; i += Words::MR)
          Words::template multiply<false>(smaller(kDepth, s.words - k), at(block, i), y.at(c0 + j, s.word + k),
                                          tile + i * kPanelStride + j, kPanelStride, s.first + k > 0);
  }

 private:
  const Segments<Words>& segments_;
  const int64_t capacity_;
  const Array<Word> memory_;
  Array<Word> row_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
