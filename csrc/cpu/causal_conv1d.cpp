// Family `causal_conv1d` on the CPU, compiled once per instruction set (PYREPR_LEVEL). The maths is in causal_conv1d.h.
//
// Work, at best, per element: W multiply-adds and about 15 operations of SiLU; bytes: x once, out once. The tokens of
// all sequences stand in one row and are cut into tiles of kTokens tokens and kBlock channels; a tile is brought into
// L1 as [tokens, channels] in float, whatever its strides, with the W - 1 tokens before it. So the arithmetic is the
// same for every layout and every W, and no element is read twice from memory.
//
// Determinism: tiles are cut from sizes alone; the weights' gradients are summed per slice of kSlice tiles, then over
// slices in their order.
#include "cpu/causal_conv1d.h"

#include <omp.h>

#include "cpu/gemm.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int W = Lanes<float>::W;
constexpr int64_t kTokens = 64;
constexpr int64_t kBlock = 4 * W;             // channels
constexpr int64_t kSlice = 16;                // tiles
constexpr int64_t kSmall = int64_t(1) << 14;  // elements below which threads do not pay

using V = Vec<float>;

// `count` <= W neighbouring elements, zeros after them.
template <class S>
inline V load_part(const typename S::Memory* p, int64_t count) {
  if (count >= W) return load_as<S>(p);
  typename S::Memory padded[W] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = p[i];
  return load_as<S>(padded);
}
template <class S>
inline void store_part(typename S::Memory* p, int64_t count, V v) {
  if (count >= W) return store_as<S>(p, v);
  typename S::Memory padded[W];
  store_as<S>(padded, v);
  for (int64_t i = 0; i < count; i++) p[i] = padded[i];
}

inline V sigmoid(V y) {
  const V e = exp_nonpositive<float>(y < 0 ? y : -y), s = 1 / (1 + e);
  return y < 0 ? e * s : s;
}

// Neighbouring channels [first, first + count) with their weights: [W, kBlock], then the bias.
struct Block {
  int64_t first, count;
  float* weights;

  static int64_t size(const CausalConvProblem& p) { return (p.taps + 1) * kBlock; }
  Block(const CausalConvProblem& p, int64_t number, float* memory)
      : first(number * kBlock), count(smaller(kBlock, p.channels - first)), weights(memory) {
    for (int64_t i = 0; i < size(p); i++) weights[i] = 0;
    for (int64_t c = 0; c < count; c++) {
      const float* const w = p.weight + (first + c) * p.taps;
      for (int64_t j = 0; j < p.taps; j++) weights[j * kBlock + c] = w[j];
      weights[p.taps * kBlock + c] = p.bias ? p.bias[first + c] : 0;
    }
  }
  V weight(int64_t j, int64_t c) const { return load<float>(weights + j * kBlock + c); }
};

// Tokens [begin, end) of sequence `number`, a part of [start, stop).
struct Run {
  int64_t number, start, stop, begin, end;
};

// Calls work(run) for every sequence that has tokens in [begin, end).
template <class Work>
void for_each_run(const CausalConvProblem& p, int64_t begin, int64_t end, Work work) {
  int64_t low = 0, high = p.sequences;  // the last sequence that starts at or before `begin`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.bounds[middle] <= begin ? low : high) = middle;
  }
  for (int64_t n = low; n < p.sequences && p.bounds[n] < end; n++) {
    const Run run{n, p.bounds[n], p.bounds[n + 1], larger(begin, p.bounds[n]), smaller(end, p.bounds[n + 1])};
    if (run.begin < run.end) work(run);
  }
}

// x [rows, count] of elements `token` and `channel` apart, as float rows of kBlock; what is past `count` is not zeroed
// where the channels are not neighbours, and nobody reads it into a result.
template <class S>
void load_tile(const typename S::Memory* x, int64_t token, int64_t channel, int64_t rows, int64_t count, float* out) {
  if (channel == 1) {
    for (int64_t c = 0; c < count; c += W)
      for (int64_t r = 0; r < rows; r++) store<float>(out + r * kBlock + c, load_part<S>(x + r * token + c, count - c));
    return;
  }
  int64_t r = 0;
  if (token == 1)
    for (; r + W <= rows; r += W)
      for (int64_t c = 0; c < count; c += W) {
        V v[W];
        for (int i = 0; i < W; i++) v[i] = c + i < count ? load_as<S>(x + (c + i) * channel + r) : V{};
        transpose_registers<float>(v);
        for (int i = 0; i < W; i++) store<float>(out + (r + i) * kBlock + c, v[i]);
      }
  for (; r < rows; r++)
    for (int64_t c = 0; c < count; c++) out[r * kBlock + c] = load_one<S>(x + r * token + c * channel);
}

// Row `distance` before the start of a sequence: of its initial state, or zero.
template <class S>
void load_before(const CausalConvProblem& p, int64_t sequence, int64_t distance, const Block& block, float* out) {
  const int64_t kept = p.taps - 1;
  const bool zero = !p.initial || distance > kept;
  const auto* const state = static_cast<const typename S::Memory*>(p.initial);
  for (int64_t c = 0; c < kBlock; c++)
    out[c] = zero || c >= block.count
                 ? 0
                 : load_one<S>(state + (sequence * p.channels + block.first + c) * kept + kept - distance);
}

// x at tokens [begin - (W - 1), end) of a run's sequence.
template <class S>
void load_window(const CausalConvProblem& p, const Run& run, int64_t begin, int64_t end, const Block& block,
                 float* out) {
  int64_t t = begin - (p.taps - 1);
  for (; t < run.start; t++, out += kBlock) load_before<S>(p, run.number, run.start - t, block, out);
  const auto* const x = static_cast<const typename S::Memory*>(p.x) + t / p.total * p.batch + t % p.total * p.token;
  load_tile<S>(x + block.first * p.channel, p.token, p.channel, end - t, block.count, out);
}

// y at one token; `window` points to the first of the W tokens it sees.
inline V convolve(const Block& block, const float* window, int64_t taps, int64_t c) {
  V y = block.weight(taps, c);
  for (int64_t j = 0; j < taps; j++) y += block.weight(j, c) * load<float>(window + j * kBlock + c);
  return y;
}

// `rows` tokens of a block from their window to out [.., D].
template <class S>
void convolve_tile(const CausalConvProblem& p, const Block& block, const float* window, int64_t rows,
                   typename S::Memory* out) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < block.count; c += W) {
      V y = convolve(block, window + r * kBlock, p.taps, c);
      if (p.silu) y *= sigmoid(y);
      store_part<S>(out + r * p.channels + c, block.count - c, y);
    }
}

template <class S>
class CausalConv {
 public:
  using Element = typename S::Memory;

  static Status forward(const CausalConvProblem& p, void* out_) {
    Element* const out = static_cast<Element*>(out_);
    const int64_t tiles = ceil_div(p.tokens(), kTokens), blocks = ceil_div(p.channels, kBlock);
    const int threads = p.tokens() * p.channels < kSmall ? 1 : p.threads;
    const int64_t bytes = (Block::size(p) + (kTokens + p.taps - 1) * kBlock) * 4;
    const Memory memory(bytes * threads);
    if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t task = 0; task < tiles * blocks; task++) {
      float* const scratch = memory.as<float>(bytes * omp_get_thread_num());
      const Block block(p, task % blocks, scratch);
      float* const window = scratch + Block::size(p);
      const int64_t first = task / blocks * kTokens;
      for_each_run(p, first, smaller(first + kTokens, p.tokens()), [&](const Run& run) {
        load_window<S>(p, run, run.begin, run.end, block, window);
        convolve_tile<S>(p, block, window, run.end - run.begin, out + run.begin * p.channels + block.first);
      });
    }
    return Status::ok;
  }

  static Status backward(const CausalConvProblem& p, const CausalConvGradients& grads) {
    const int64_t slices = ceil_div(p.tokens(), kSlice * kTokens), blocks = ceil_div(p.channels, kBlock);
    const int64_t size = Block::size(p);
    const Memory sums(slices * blocks * size * 4 + 64);  // [slices, blocks, W + 1, kBlock]
    const int64_t bytes = (size + 2 * (kTokens + 2 * (p.taps - 1)) * kBlock) * 4;
    const Memory memory(bytes * p.threads);
    if (!sums.ok() || !memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t task = 0; task < slices * blocks; task++) {
      float* const scratch = memory.as<float>(bytes * omp_get_thread_num());
      float* const sum = sums.as<float>() + task * size;
      for (int64_t i = 0; i < size; i++) sum[i] = 0;
      const Block block(p, task % blocks, scratch);
      const int64_t first = task / blocks * kSlice * kTokens, end = smaller(first + kSlice * kTokens, p.tokens());
      for (int64_t t = first; t < end; t += kTokens)
        for_each_run(p, t, smaller(t + kTokens, end),
                     [&](const Run& run) { backward_run(p, grads, block, run, scratch + size, sum); });
    }
    add_slices(p, grads, sums.as<float>(), slices, blocks);
    return Status::ok;
  }

  // Rows of the batch are sequences of T tokens each; out [B, T, D].
  static Status update(const CausalConvProblem& p, const CausalConvStep& s, void* out_) {
    Element *const out = static_cast<Element*>(out_), *const state = static_cast<Element*>(s.state);
    const int64_t blocks = ceil_div(p.channels, kBlock), kept = s.state_length;
    const int threads = p.tokens() * p.channels < kSmall ? 1 : p.threads;
    const int64_t bytes = (Block::size(p) + (kept + p.total) * kBlock) * 4;
    const Memory memory(bytes * threads);
    if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < p.sequences * blocks; task++) {
      float* const scratch = memory.as<float>(bytes * omp_get_thread_num());
      const Block block(p, task % blocks, scratch);
      float* const rows = scratch + Block::size(p);  // the state, then the new tokens
      const int64_t b = task / blocks;
      Element* const own = state + b * s.state_batch + block.first * s.state_channel;
      load_tile<S>(own, s.state_token, s.state_channel, kept, block.count, rows);
      const auto* const x = static_cast<const Element*>(p.x) + b * p.batch + block.first * p.channel;
      load_tile<S>(x, p.token, p.channel, p.total, block.count, rows + kept * kBlock);
      convolve_tile<S>(p, block, rows + (kept - p.taps + 1) * kBlock, p.total,
                       out + b * p.total * p.channels + block.first);
      for (int64_t i = 0; i < kept; i++)
        store_row(rows + (p.total + i) * kBlock, block.count, own + i * s.state_token, s.state_channel);
    }
    return Status::ok;
  }

 private:
  static void store_row(const float* row, int64_t count, Element* out, int64_t stride) {
    for (int64_t c = 0; c < count; c += W) {
      Element packed[W];
      store_as<S>(packed, load<float>(row + c));
      for (int64_t i = 0; i < smaller<int64_t>(W, count - c); i++) out[(c + i) * stride] = packed[i];
    }
  }

  // dx of a run's tokens, its part of the sums [W + 1, kBlock], and before the first token the initial state's
  // gradient.
  static void backward_run(const CausalConvProblem& p, const CausalConvGradients& grads, const Block& block,
                           const Run& run, float* scratch, float* sum) {
    const int64_t kept = p.taps - 1, rows = run.end - run.begin;
    const int64_t seen = smaller(run.end + kept, run.stop) - run.begin;  // tokens whose y depends on these x
    float* const window = scratch;                                       // x at [begin - kept, begin + seen)
    float* const dy = scratch + (kTokens + 2 * kept) * kBlock;           // dy at [begin - kept, end + kept)
    load_window<S>(p, run, run.begin, run.begin + seen, block, window);
    for (int64_t i = 0; i < kept * kBlock; i++) dy[i] = 0;
    for (int64_t i = (kept + seen) * kBlock; i < (rows + 2 * kept) * kBlock; i++) dy[i] = 0;
    const Element* const dout = static_cast<const Element*>(grads.out) + run.begin * p.channels + block.first;
    for (int64_t c = 0; c < block.count; c += W)
      for (int64_t r = 0; r < seen; r++) {
        V d = load_part<S>(dout + r * p.channels + c, block.count - c);
        if (p.silu) {
          const V y = convolve(block, window + r * kBlock, p.taps, c), s = sigmoid(y);
          d *= s * (1 + y * (1 - s));
        }
        store<float>(dy + (kept + r) * kBlock + c, d);
      }
    add_sums(p, block, window, dy + kept * kBlock, rows, sum);
    Element* const dx = static_cast<Element*>(grads.x) + run.begin * p.channels + block.first;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < block.count; c += W)
        store_part<S>(dx + r * p.channels + c, block.count - c, transposed(p, block, dy + (kept + r) * kBlock, c));
    if (grads.initial && run.begin == run.start)
      for (int64_t i = 0; i < kept; i++) {
        float* const out = grads.initial + (run.number * p.channels + block.first) * kept + i;
        for (int64_t c = 0; c < block.count; c += W) {
          const V d = transposed(p, block, dy + i * kBlock, c);
          for (int64_t lane = 0; lane < smaller<int64_t>(W, block.count - c); lane++) out[(c + lane) * kept] = d[lane];
        }
      }
  }

  // dx at the token whose dy stands at `dy`.
  static V transposed(const CausalConvProblem& p, const Block& block, const float* dy, int64_t c) {
    V d{};
    for (int64_t j = 0; j < p.taps; j++) d += block.weight(j, c) * load<float>(dy + (p.taps - 1 - j) * kBlock + c);
    return d;
  }

  static void add_sums(const CausalConvProblem& p, const Block& block, const float* window, const float* dy,
                       int64_t rows, float* sum) {
    for (int64_t j = 0; j <= p.taps; j++)
      for (int64_t c = 0; c < block.count; c += W) {
        V total{};
        for (int64_t r = 0; r < rows; r++) {
          const V d = load<float>(dy + r * kBlock + c);
          total += j < p.taps ? d * load<float>(window + (r + j) * kBlock + c) : d;
        }
        float* const at = sum + j * kBlock + c;
        store<float>(at, load<float>(at) + total);
      }
  }

  static void add_slices(const CausalConvProblem& p, const CausalConvGradients& grads, const float* sums,
                         int64_t slices, int64_t blocks) {
    for (int64_t c = 0; c < p.channels; c++)
      for (int64_t j = 0; j <= p.taps; j++) {
        const float* const first = sums + c / kBlock * Block::size(p) + j * kBlock + c % kBlock;
        double total = 0;
        for (int64_t i = 0; i < slices; i++) total += static_cast<double>(first[i * blocks * Block::size(p)]);
        if (j < p.taps)
          grads.weight[c * p.taps + j] = static_cast<float>(total);
        else if (grads.bias)
          grads.bias[c] = static_cast<float>(total);
      }
  }
};

#define PYREPR_BY_DTYPE(call)             \
  switch (p.dtype) {                      \
    case DType::bf16:                     \
      return CausalConv<StoreBf16>::call; \
    case DType::f16:                      \
      return CausalConv<StoreF16>::call;  \
    default:                              \
      return CausalConv<StoreF32>::call;  \
  }
Status forward(const CausalConvProblem& p, void* out) { PYREPR_BY_DTYPE(forward(p, out)); }
Status backward(const CausalConvProblem& p, const CausalConvGradients& grads) { PYREPR_BY_DTYPE(backward(p, grads)); }
Status update(const CausalConvProblem& p, const CausalConvStep& s, void* out) { PYREPR_BY_DTYPE(update(p, s, out)); }
#undef PYREPR_BY_DTYPE

}  // namespace

CausalConvFunctions causal_conv1d_functions() { return {forward, backward, update}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
