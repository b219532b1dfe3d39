// Linear maps of signs, of family `lookup`: out [T, h] = bias + scales (f weight^T) + inner up for the features f of
// what is hashed, 1 or -1, and weights of 8 bits, summed in 32. Included by level units only (see simd.h).
//
// A feature is a bit of a chunk's code. Products of bytes want one side without signs, so there it is b = 0 or 1, and
// sum f w = 2 sum b w - sum w; tiles take signs on both sides. An instruction makes 4 multiply-adds a lane (AVX-512
// VNNI; without it three instructions do), one of tiles 16384.
//
// Many tokens: a vector holds tokens. Features stand as [T / L][F / 4][L][4] bytes, L lanes, so that a row of weights
// is read as it stands, four at a time for all lanes. Few tokens: a vector holds features, and the rows of weights,
// once in L1, are read by all tokens. Sums are exact: neither order nor shares of threads matter.
#pragma once

#include "cpu/lookup_low_rank.h"
#if defined(PYREPR_LEVEL_amx)
#include "cpu/amx.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// Multiply-adds of signs, and of the dense part, that take about 100 us, below which no second thread is woken.
#if defined(PYREPR_LEVEL_amx)
constexpr int64_t kParallelSigns = int64_t(1) << 26;
#elif defined(PYREPR_LEVEL_avx512_bf16)
constexpr int64_t kParallelSigns = int64_t(1) << 24;
#else
constexpr int64_t kParallelSigns = int64_t(1) << 22;
#endif
constexpr int64_t kParallelDense = int64_t(1) << 22;

constexpr int64_t kSignBytes = int64_t(512) << 10;  // of the features of a block of tokens, which stay in L2

// The eight features of every code, as bytes.
struct SignBytes {
  int8_t of[256][8];
};
constexpr SignBytes sign_bytes(bool two, int8_t unset) {
  SignBytes bytes{};
  for (int code = 0; code < 256; code++)
    for (int i = 0; i < 8; i++) {
      bool set = code >> i & 1;
      if (two && i % 2) set = set == (code >> (i - 1) & 1);  // sign times size
      bytes.of[code][i] = static_cast<int8_t>(set ? 1 : unset);
    }
  return bytes;
}

// Features of some tokens, filled as a plan is.
class Signs {
 public:
#if defined(PYREPR_LEVEL_amx)
  static constexpr int64_t kFewest = 1;  // tokens from which on lanes hold tokens
  static constexpr int8_t kUnset = -1;
#else
  static constexpr int64_t kFewest = 6;
  static constexpr int8_t kUnset = 0;
#endif

  Signs(const LookupHash& p, int64_t capacity)
      : chunks_(chunks_of(p)),
        bits_(p.bits),
        width_(width(p)),
        lanes_(capacity < kFewest ? 1 : Lanes<float>::W),
        bytes_(p.kind == Hash::two_bit ? kTwo : kOne),
        memory_(round_up(capacity, lanes_) * width_),
        nan_(capacity) {}
  // Bytes of a token: its features and zeros.
  static int64_t width(const LookupHash& p) {
    return larger<int64_t>(round_up(chunks_of(p) * p.bits, kVectorBytes), kVectorBytes);
  }
  bool ok() const { return memory_.ok() && nan_.ok(); }
  int64_t lanes() const { return lanes_; }
  int64_t tokens() const { return tokens_; }
  // Those of the tokens from t on, a multiple of the lanes.
  const int8_t* at(int64_t t) const { return memory_.as<int8_t>(t * width_); }
  bool is_nan(int64_t t) const { return *nan_.as<char>(t); }

  void start(int64_t tokens) {
    tokens_ = tokens;
    const int64_t whole = tokens / lanes_ * lanes_;
    std::memset(memory_.as<char>(whole * width_), 0, static_cast<size_t>((round_up(tokens, lanes_) - whole) * width_));
  }
  template <class X>
  void hash(const LookupHash& p, int64_t t0, void* buffer) const {
    share_of_tokens<X>(p, t0, t0 + tokens_, buffer, [&](Chunks<float>& chunks, int64_t t) { put(chunks, t - t0); });
  }
  void put(Chunks<float>& chunks, int64_t t) const {
    chunks.hash();
    const int32_t* const codes = chunks.codes();
    int8_t* const to = memory_.as<int8_t>(t / lanes_ * lanes_ * width_ + t % lanes_ * 4);
    const int64_t step = lanes_ * 4;
    float sum = 0;
    for (int64_t k = 0; k < chunks_; k++) sum += chunks.weights()[k];  // of ones, or NaN
    *nan_.as<char>(t) = !(sum == sum);
    const auto place = [&](int64_t f) -> int8_t& { return to[f / 4 * step + f % 4]; };
    if (bits_ == 8) {
      for (int64_t k = 0; k < chunks_; k++) {
        std::memcpy(to + 2 * k * step, bytes_.of[codes[k]], 4);
        std::memcpy(to + (2 * k + 1) * step, bytes_.of[codes[k]] + 4, 4);
      }
    } else {
      for (int64_t k = 0; k < chunks_; k++)
        for (int64_t i = 0; i < bits_; i++) place(k * bits_ + i) = bytes_.of[codes[k]][i];
    }
    for (int64_t f = chunks_ * bits_; f < width_; f++) place(f) = 0;
  }

 private:
  static constexpr SignBytes kOne = sign_bytes(false, kUnset), kTwo = sign_bytes(true, kUnset);

  const int64_t chunks_, bits_, width_, lanes_;
  const SignBytes& bytes_;
  const Memory memory_, nan_;
  int64_t tokens_ = 0;
};

// `out` points to the first row of the tokens.
class SignProduct {
 public:
  SignProduct(const LookupSigns& a, const Signs& signs, int64_t width, const float* bias, float* out)
      : a_(a), signs_(signs), width_(width), bias_(bias), out_(out) {}

  // Bytes a thread needs.
  static int64_t bytes(int64_t width) {
#if defined(PYREPR_LEVEL_amx)
    return kRows * (width + 64) + 2 * kRows * kTile * 4;
#else
    return 0 * width;
#endif
  }

  // What every thread of a team does. Ends with a barrier.
  void share(void* buffer) const {
#if defined(PYREPR_LEVEL_amx)
    const Tiles registers(kTile);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < a_.h; r += kRows) tiles(r, buffer);
#else
    (void)buffer;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < a_.h; r += kRows) signs_.lanes() == 1 ? dots(r) : lanes(r);
#endif
#pragma omp for schedule(static)
    for (int64_t t = 0; t < signs_.tokens(); t++)
      if (signs_.is_nan(t))
        for (int64_t i = 0; i < a_.h; i++) out_[t * a_.h + i] = __builtin_nanf("");
  }

 private:
  using V = Vec<float>;
  using I = Lanes<float>::I;
  static constexpr int W = Lanes<float>::W;

  const int8_t* row(int64_t r) const { return a_.weight + smaller(r, a_.h - 1) * a_.features; }

  // out of one token and the rows from r on, whose exact sums these are; W of them at most.
  void finish(int64_t t, int64_t r, int64_t count, I sums) const {
    V y = __builtin_convertvector(sums, V) * load_some<StoreF32>(a_.scales + r, count);
    if (bias_) y += load_some<StoreF32>(bias_ + r, count);
    store_some<StoreF32>(out_ + t * a_.h + r, count, y);
  }
  // The same of W tokens from t on, sums[i] of row r + i.
  void finish_lanes(int64_t t, int64_t r, int64_t count, const I* sums) const {
    V v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) std::memcpy(&v[i], sums + i, sizeof v[i]);
    transpose_registers<float>(v);
    for (int64_t j = 0; j < smaller<int64_t>(W, signs_.tokens() - t); j++) {
      I of_token;
      std::memcpy(&of_token, &v[j], sizeof of_token);
      finish(t + j, r, count, of_token);
    }
  }

#if defined(PYREPR_LEVEL_amx)
  static constexpr int64_t kRows = 2 * kTile, kFar = 2048;

  // Rows r ... r + 31 for all tokens; a weight's row is a tile's as it stands, unless it has to be filled up, or rows
  // are so far apart that tiles of them would be read from memory line by line.
  void tiles(int64_t r, void* buffer) const {
    auto* const sums = static_cast<int32_t*>(buffer);  // [2, 2, 16, 16]
    const int8_t* weights = row(r);
    int64_t stride = a_.features;
    if (stride < width_ || stride >= kFar || r + kRows > a_.h) {
      int8_t* const panel = reinterpret_cast<int8_t*>(sums + 2 * kRows * kTile);
      stride = width_ + 64;  // rows in places of L1 of their own
      for (int64_t i = 0; i < kRows; i++) {
        const int64_t some = r + i < a_.h ? a_.features : 0;
        if (some) std::memcpy(panel + i * stride, row(r + i), static_cast<size_t>(some));
        std::memset(panel + i * stride + some, 0, static_cast<size_t>(width_ - some));
      }
      weights = panel;
    }
    for (int64_t t = 0; t < signs_.tokens(); t += 2 * kTile) {
      const bool two = t + kTile < signs_.tokens();
      two ? multiply<2>(weights, stride, t, sums) : multiply<1>(weights, stride, t, sums);
      for (int64_t i = 0; i < 2 && r + i * kTile < a_.h; i++)
        for (int64_t j = 0; j < 1 + two; j++) {
          I of[W];
          std::memcpy(of, sums + (2 * i + j) * kTile * kTile, sizeof of);
          finish_lanes(t + j * kTile, r + i * kTile, smaller(kTile, a_.h - r - i * kTile), of);
        }
    }
  }
  // Of 32 rows and N times 16 tokens.
  template <int N>
  void multiply(const int8_t* weights, int64_t stride, int64_t t, int32_t* sums) const {
    const int8_t *left = signs_.at(t), *right = N == 2 ? signs_.at(t + kTile) : left;
    tile_zero<0>();
    tile_zero<2>();
    if constexpr (N == 2) {
      tile_zero<1>();
      tile_zero<3>();
    }
    for (int64_t k = 0; k < width_; k += 64) {
      tile_load<4>(weights + k, stride);
      tile_load<6>(left + k * kTile, 64);
      tile_dot_bytes<0, 4, 6>();
      tile_load<5>(weights + kTile * stride + k, stride);
      tile_dot_bytes<2, 5, 6>();
      if constexpr (N == 2) {
        tile_load<7>(right + k * kTile, 64);
        tile_dot_bytes<1, 4, 7>();
        tile_dot_bytes<3, 5, 7>();
      }
    }
    constexpr int64_t size = kTile * kTile;
    tile_store<0>(sums, 64);
    tile_store<2>(sums + 2 * size, 64);
    if constexpr (N == 2) {
      tile_store<1>(sums + size, 64);
      tile_store<3>(sums + 3 * size, 64);
    }
  }
#else
  static constexpr int kRows = W;

  // sum + bits [4] weights [4] of every lane.
  static I dot(I sum, I bits, I weights) {
#if defined(PYREPR_LEVEL_avx512_bf16)
    return reinterpret_cast<I>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(bits),
                                                   reinterpret_cast<__m512i>(weights)));
#elif defined(PYREPR_LEVEL_avx512)
    const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(bits), reinterpret_cast<__m512i>(weights));
    return sum + reinterpret_cast<I>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(PYREPR_LEVEL_avx2)
    const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(bits), reinterpret_cast<__m256i>(weights));
    return sum + reinterpret_cast<I>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    typedef int8_t Bytes __attribute__((vector_size(kVectorBytes)));
    const I kept = weights & reinterpret_cast<I>(-reinterpret_cast<Bytes>(bits));  // 0 or 1: less it, a mask
    return sum + (kept >> 24) + (kept << 8 >> 24) + (kept << 16 >> 24) + (kept << 24 >> 24);
#endif
  }
  static I splat_word(int32_t word) { return word - I{}; }

  // The sums of W rows from r on (the last again where there are fewer) over features that f(k) gives a vector of.
  template <class F>
  I dots_of(int64_t r, F f) const {
    const int8_t* rows[W];
    for (int i = 0; i < W; i++) rows[i] = row(r + i);
    I sum[W] = {}, weights;
    int64_t k = 0;
    for (; k + kVectorBytes <= a_.features; k += kVectorBytes) {
      const I features = f(k);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        std::memcpy(&weights, rows[i] + k, sizeof weights);
        sum[i] = dot(sum[i], features, weights);
      }
    }
    if (k < a_.features)
      for (int i = 0; i < W; i++) {
        weights = I{};
        std::memcpy(&weights, rows[i] + k, static_cast<size_t>(a_.features - k));
        sum[i] = dot(sum[i], f(k), weights);
      }
    V v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) std::memcpy(&v[i], &sum[i], sizeof v[i]);
    transpose_registers<float>(v);
    I total{};
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      I part;
      std::memcpy(&part, &v[i], sizeof part);
      total += part;
    }
    return total;
  }
  I sums_of_rows(int64_t r) const {
    return dots_of(r, [](int64_t) { return splat_word(0x01010101); });
  }

  // Rows r ... r + kRows - 1 for few tokens.
  void dots(int64_t r) const {
    const I all = sums_of_rows(r);
    for (int64_t t = 0; t < signs_.tokens(); t++) {
      const int8_t* const features = signs_.at(t);
      const I set = dots_of(r, [features](int64_t k) {
        I v;
        std::memcpy(&v, features + k, sizeof v);
        return v;
      });
      finish(t, r, smaller<int64_t>(kRows, a_.h - r), set + set - all);
    }
  }

  // For many, whose lanes hold tokens.
  void lanes(int64_t r) const {
    int32_t all[W];
    const I sums = sums_of_rows(r);
    std::memcpy(all, &sums, sizeof all);
    const int8_t* rows[W];
    for (int i = 0; i < W; i++) rows[i] = row(r + i);
    const int64_t whole = a_.features / 4 * 4, left = a_.features - whole;
    for (int64_t t = 0; t < signs_.tokens(); t += W) {
      I sum[W] = {};
      const auto add = [&](int64_t k, const auto& word) {
        I features;
        std::memcpy(&features, signs_.at(t) + k * W, sizeof features);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) sum[i] = dot(sum[i], features, splat_word(word(rows[i] + k)));
      };
      for (int64_t k = 0; k < whole; k += 4)
        add(k, [](const int8_t* from) {
          int32_t four;
          std::memcpy(&four, from, 4);
          return four;
        });
      if (left)
        add(whole, [left](const int8_t* from) {
          int32_t some = 0;
          std::memcpy(&some, from, static_cast<size_t>(left));
          return some;
        });
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) sum[i] += sum[i] - splat_word(all[i]);
      finish_lanes(t, r, smaller<int64_t>(W, a_.h - r), sum);
    }
  }
#endif

  const LookupSigns& a_;
  const Signs& signs_;
  const int64_t width_;
  const float* const bias_;
  float* const out_;
};

Status linear_of_signs(const LookupSigns& a, const LookupHash& p, const LookupLowRank& low, const float* bias,
                       float* out) {
  const int64_t tokens = p.x.rows, width = Signs::width(p), dense = low.rank * (2 * p.x.cols + a.h);
  const int64_t capacity = smaller(tokens, larger<int64_t>(kSignBytes / width / 64 * 64, 64));
  const double each = double(a.features * a.h) / kParallelSigns + double(dense) / kParallelDense;
  const double work = larger(each * double(tokens), double(a.features * a.h) / kParallelBytes);
  const int threads = work < 1 ? 1 : a.threads;
  const int64_t bytes = round_up(larger(Inputs<float>::bytes(p, low), SignProduct::bytes(width)), 64);
  Signs signs(p, capacity);
  const Memory memory(bytes * threads);
  const Inputs<float> inputs(p, low, capacity, a.h);
  if (!signs.ok() || !memory.ok() || !inputs.ok()) return Status::out_of_memory;
  for (int64_t t0 = 0; t0 < tokens; t0 += capacity) {
    signs.start(smaller(capacity, tokens - t0));
    float* const to = out + t0 * a.h;
    const SignProduct product(a, signs, width, bias, to);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      void* const buffer = memory.as<char>(bytes * thread_number());
      inputs.hash(signs, t0, buffer);
      product.share(buffer);
      inputs.raise(signs, to, buffer);
    }
  }
  return Status::ok;
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
