// Family `causal_conv1d` on the CPU, compiled once per instruction set (PYREPR_LEVEL). The maths is in causal_conv1d.h.
//
// Work, at best, per element: W multiply-adds and about 20 operations of SiLU; bytes: x once, out once. A task is a
// slice of the tokens (those of all sequences stand in one row) and a block of channels. It walks its tokens in tiles
// that fit L1 as [tokens, channels] in float, whatever the strides of x, behind the W - 1 rows before them. So the
// arithmetic is the same for every layout and every W, and no element is read twice from memory. Rows are far apart in
// memory and the hardware does not see them coming: each tile asks for the next one.
//
// Determinism: slices, blocks and tiles are cut from sizes and strides alone; the weights' gradients are summed per
// slice, then over slices in their order.
#include "cpu/causal_conv1d.h"

#include <omp.h>

#include "cpu/causal_conv1d_token.h"
#include "cpu/gemm.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int W = Lanes<float>::W;
constexpr int64_t kSlice = 256;               // tokens of a task
constexpr int64_t kTile = 4096;               // elements
constexpr int64_t kSmall = int64_t(1) << 14;  // elements below which threads do not pay

using V = Vec<float>;

// Channels and tokens of a tile: long pieces along the axis that is dense in memory.
struct Shape {
  int64_t channels, tokens;

  explicit Shape(const CausalConvProblem& p) {
    const bool tokens_dense = p.token == 1 && p.channel != 1;
    channels = smaller<int64_t>(tokens_dense ? 64 : 512, round_up(p.channels, W));
    tokens = larger<int64_t>(8, smaller<int64_t>(kTile / channels, 64));
  }
};

// `in` [count, N] dense to out [N, stride]; and back. With N known the compiler shuffles whole vectors.
template <int N>
void split(const float* in, int64_t count, float* out, int64_t stride) {
  for (int64_t c = 0; c < count; c++)
    for (int64_t j = 0; j < N; j++) out[j * stride + c] = in[c * N + j];
}
template <int N>
void join(const float* in, int64_t count, int64_t stride, float* out) {
  for (int64_t c = 0; c < count; c++)
    for (int64_t j = 0; j < N; j++) out[c * N + j] = in[j * stride + c];
}

// Neighbouring channels [first, first + count) with their weights: [W, stride], then the bias. `stride` is the length
// of every row of channels in scratch.
struct Block {
  int64_t first, count, stride;
  float* weights;

  static int64_t size(const CausalConvProblem& p, int64_t stride) { return (p.taps + 1) * stride; }
  Block(const CausalConvProblem& p, int64_t number, int64_t stride_, float* memory)
      : first(number * stride_), count(smaller(stride_, p.channels - first)), stride(stride_), weights(memory) {
    by_narrow_dtype(p.filter, [&](auto s) { return read<decltype(s)>(p), Status::ok; });
  }
  V weight(int64_t j, int64_t c) const { return load<float>(weights + j * stride + c); }

 private:
  template <class S>
  void read(const CausalConvProblem& p) {
    const auto* const w = static_cast<const typename S::Memory*>(p.weight) + first * p.taps;
    int64_t c = 0;
    for (; p.taps == 4 && c + W <= count; c += W) {
      V taps[4];
      load_four<S>(w + c * 4, taps);
      for (int64_t j = 0; j < 4; j++) store<float>(weights + j * stride + c, taps[j]);
    }
    for (; c < count; c++)
      for (int64_t j = 0; j < p.taps; j++) weights[j * stride + c] = load_one<S>(w + c * p.taps + j);
    const auto* const bias = static_cast<const typename S::Memory*>(p.bias);
    for (c = 0; c < count; c++) weights[p.taps * stride + c] = bias ? load_one<S>(bias + first + c) : 0;
  }
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

// x [rows, count] of elements `token` and `channel` apart, as float rows of `stride`; asks for the next `rows` tokens.
// What is past `count` is left to chance where the channels are not neighbours, and nobody reads it into a result.
template <class S>
void load_tile(const typename S::Memory* x, int64_t token, int64_t channel, int64_t rows, int64_t count, float* out,
               int64_t stride) {
  if (channel == 1) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < count; c += W) {
        __builtin_prefetch(x + (r + rows) * token + c, 0, 2);
        store<float>(out + r * stride + c, load_some<S>(x + r * token + c, count - c));
      }
    return;
  }
  int64_t r = 0;
  if (token == 1)
    for (; r + W <= rows; r += W)
      for (int64_t c = 0; c < count; c += W) {
        V v[W];
        for (int i = 0; i < W; i++) {
          const typename S::Memory* const at = x + (c + i) * channel + r;
          if (c + i < count) __builtin_prefetch(at + rows, 0, 2);
          v[i] = c + i < count ? load_as<S>(at) : V{};
        }
        transpose_registers<float>(v);
        for (int i = 0; i < W; i++) store<float>(out + (r + i) * stride + c, v[i]);
      }
  for (; r < rows; r++)
    for (int64_t c = 0; c < count; c++) out[r * stride + c] = load_one<S>(x + r * token + c * channel);
}

template <class S>
const typename S::Memory* token_of(const CausalConvProblem& p, int64_t t, const Block& block) {
  return static_cast<const typename S::Memory*>(p.x) + t / p.total * p.batch + t % p.total * p.token +
         block.first * p.channel;
}

// The W - 1 rows before the first token of a run: earlier tokens, or the initial state, or zero.
template <class S>
void load_before(const CausalConvProblem& p, const Run& run, const Block& block, float* out) {
  const int64_t kept = p.taps - 1;
  const auto* const state = static_cast<const typename S::Memory*>(p.initial);
  for (int64_t i = 0; i < kept; i++, out += block.stride) {
    const int64_t t = run.begin - kept + i;
    if (t >= run.start) {
      load_tile<S>(token_of<S>(p, t, block), p.token, p.channel, 1, block.count, out, block.stride);
      continue;
    }
    const int64_t place = kept - (run.start - t);
    for (int64_t c = 0; c < block.stride; c++)
      out[c] = state && c < block.count && place >= 0
                   ? load_one<S>(state + (run.number * p.channels + block.first + c) * kept + place)
                   : 0;
  }
}

// Rows [from, from + W - 1) of `window` to its beginning, where they are what comes before the next tile.
inline void carry(float* window, int64_t from, int64_t kept, int64_t stride) {
  std::memmove(window, window + from * stride, static_cast<size_t>(kept * stride) * 4);
}

// y at one token; `window` points to the first of the W tokens it sees.
inline V convolve(const Block& block, const float* window, int64_t taps, int64_t c) {
  V y = block.weight(taps, c);
  for (int64_t j = 0; j < taps; j++) y += block.weight(j, c) * load<float>(window + j * block.stride + c);
  return y;
}

// `rows` tokens of a block from their window to out [.., D].
template <class S>
void convolve_tile(const CausalConvProblem& p, const Block& block, const float* window, int64_t rows,
                   typename S::Memory* out) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < block.count; c += W) {
      typename S::Memory* const at = out + r * p.channels + c;
      __builtin_prefetch(at + rows * p.channels, 1, 2);
      V y = convolve(block, window + r * block.stride, p.taps, c);
      if (p.silu) y *= sigmoid(y);
      store_some<S>(at, block.count - c, y);
    }
}

template <class S>
class CausalConv {
 public:
  using Element = typename S::Memory;

  static Status forward(const CausalConvProblem& p, void* out_) {
    Element* const out = static_cast<Element*>(out_);
    const Shape shape(p);
    const int64_t slices = ceil_div(p.tokens(), kSlice), blocks = ceil_div(p.channels, shape.channels);
    const int threads = p.tokens() * p.channels < kSmall ? 1 : p.threads;
    const int64_t size = Block::size(p, shape.channels), kept = p.taps - 1;
    const int64_t bytes = round_up((size + (kept + shape.tokens) * shape.channels) * 4, 64);
    const Memory memory(bytes * threads);
    if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < slices * blocks; task++) {
      float* const scratch = memory.as<float>(bytes * omp_get_thread_num());
      const Block block(p, task % blocks, shape.channels, scratch);
      float* const window = scratch + size;
      const int64_t first = task / blocks * kSlice;
      for_each_run(p, first, smaller(first + kSlice, p.tokens()), [&](const Run& run) {
        load_before<S>(p, run, block, window);
        for (int64_t t = run.begin; t < run.end; t += shape.tokens) {
          const int64_t rows = smaller(shape.tokens, run.end - t);
          load_tile<S>(token_of<S>(p, t, block), p.token, p.channel, rows, block.count, window + kept * block.stride,
                       block.stride);
          convolve_tile<S>(p, block, window, rows, out + t * p.channels + block.first);
          carry(window, rows, kept, block.stride);
        }
      });
    }
    return Status::ok;
  }

  static Status backward(const CausalConvProblem& p, const CausalConvGradients& grads) {
    const Shape shape(p);
    const int64_t slices = ceil_div(p.tokens(), kSlice), blocks = ceil_div(p.channels, shape.channels);
    const int64_t size = Block::size(p, shape.channels);
    const Memory sums(slices * blocks * size * 4);  // [slices, blocks, W + 1, channels of a block]
    const int64_t bytes = round_up((size + 2 * (p.taps - 1 + shape.tokens) * shape.channels) * 4, 64);
    const Memory memory(bytes * p.threads);
    if (!sums.ok() || !memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
    for (int64_t task = 0; task < slices * blocks; task++) {
      float* const scratch = memory.as<float>(bytes * omp_get_thread_num());
      float* const sum = sums.as<float>() + task * size;
      for (int64_t i = 0; i < size; i++) sum[i] = 0;
      const Block block(p, task % blocks, shape.channels, scratch);
      const int64_t first = task / blocks * kSlice;
      for_each_run(p, first, smaller(first + kSlice, p.tokens()),
                   [&](const Run& run) { backward_run(p, grads, shape, block, run, scratch + size, sum); });
    }
    add_slices(p, grads, sums.as<float>(), slices, blocks, shape.channels);
    return Status::ok;
  }

  // Rows of the batch are sequences of T tokens each; out [B, T, D].
  static Status update(const CausalConvProblem& p, const CausalConvStep& s, void* out_) {
    Element *const out = static_cast<Element*>(out_), *const state = static_cast<Element*>(s.state);
    const Shape shape(p);
    const int64_t blocks = ceil_div(p.channels, shape.channels), kept = s.state_length;
    const bool known = p.taps == 4 && (kept == 3 || kept == 4);
    if (p.total == 1 && known && dense(s) && p.channel == 1 && p.channels % W == 0)
      return p.filter == p.dtype ? step_in_registers<S>(p, s, out) : step_in_registers<StoreF32>(p, s, out);
    const int threads = p.tokens() * p.channels < kSmall ? 1 : p.threads;
    const int64_t size = Block::size(p, shape.channels);
    const int64_t bytes = round_up((size + (kept + p.total) * shape.channels) * 4, 64);
    const Memory memory(bytes * threads);
    if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < p.sequences * blocks; task++) {
      float* const scratch = memory.as<float>(bytes * omp_get_thread_num());
      const Block block(p, task % blocks, shape.channels, scratch);
      float* const rows = scratch + size;  // the state, then the new tokens
      const int64_t b = task / blocks;
      Element* const own = state + b * s.state_batch + block.first * s.state_channel;
      load_state(s, own, block, rows);
      load_tile<S>(token_of<S>(p, b * p.total, block), p.token, p.channel, p.total, block.count,
                   rows + kept * block.stride, block.stride);
      convolve_tile<S>(p, block, rows + (kept - p.taps + 1) * block.stride, p.total,
                       out + b * p.total * p.channels + block.first);
      store_state(s, rows + p.total * block.stride, block, own);
    }
    return Status::ok;
  }

 private:
  static void load_state(const CausalConvStep& s, const Element* own, const Block& block, float* rows) {
    if constexpr (sizeof(Element) == 4) {
      if (dense(s) && s.state_length == 4) return split<4>(own, block.count, rows, block.stride);
      if (dense(s) && s.state_length == 3) return split<3>(own, block.count, rows, block.stride);
    }
    load_tile<S>(own, s.state_token, s.state_channel, s.state_length, block.count, rows, block.stride);
  }
  static void store_state(const CausalConvStep& s, const float* rows, const Block& block, Element* own) {
    if constexpr (sizeof(Element) == 4) {
      if (dense(s) && s.state_length == 4) return join<4>(rows, block.count, block.stride, own);
      if (dense(s) && s.state_length == 3) return join<3>(rows, block.count, block.stride, own);
    }
    for (int64_t i = 0; i < s.state_length; i++)
      for (int64_t c = 0; c < block.count; c += W) {
        Element packed[W];
        store_as<S>(packed, load<float>(rows + i * block.stride + c));
        for (int64_t lane = 0; lane < smaller<int64_t>(W, block.count - c); lane++)
          own[(c + lane) * s.state_channel + i * s.state_token] = packed[lane];
      }
  }
  // One token in the layout that models have, where weights, state and x go from memory to registers and back. F: what
  // weight and bias are in.
  template <class F>
  static Status step_in_registers(const CausalConvProblem& p, const CausalConvStep& s, Element* out) {
    const int threads = p.sequences * p.channels < kSmall ? 1 : p.threads;
    const int64_t blocks = p.channels / W;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < p.sequences * blocks; task++) {
      const int64_t b = task / blocks, c = task % blocks * W;
      Element* const own = static_cast<Element*>(s.state) + b * s.state_batch + c * s.state_length;
      const auto* const bias = static_cast<const typename F::Memory*>(p.bias);
      const TokenConvolution<S, F> token{static_cast<const Element*>(p.x) + b * p.batch + c,
                                         static_cast<const typename F::Memory*>(p.weight) + c * 4,
                                         bias ? bias + c : nullptr,
                                         own,
                                         own,
                                         4,
                                         s.state_length,
                                         p.silu};
      token.run(W, out + b * p.channels + c);
    }
    return Status::ok;
  }
  static bool dense(const CausalConvStep& s) { return s.state_token == 1 && s.state_channel == s.state_length; }

  // dx of a run's tokens, its part of the sums [W + 1, stride], and before the first token the initial state's
  // gradient. The dy of the W - 1 tokens after the run are needed too; dx is W - 1 tokens behind.
  static void backward_run(const CausalConvProblem& p, const CausalConvGradients& grads, const Shape& shape,
                           const Block& block, const Run& run, float* scratch, float* sum) {
    const int64_t kept = p.taps - 1, stride = block.stride;
    float* const window = scratch;                               // x, the W - 1 rows before the tile first
    float* const dy = scratch + (kept + shape.tokens) * stride;  // likewise
    load_before<S>(p, run, block, window);
    for (int64_t i = 0; i < kept * stride; i++) dy[i] = 0;
    for (int64_t t = run.begin; t < run.end + kept; t += shape.tokens) {
      const int64_t rows = smaller(shape.tokens, run.end + kept - t), seen = smaller(rows, run.stop - t);
      if (seen > 0) {
        load_tile<S>(token_of<S>(p, t, block), p.token, p.channel, seen, block.count, window + kept * stride, stride);
        through_silu(p, block, window, static_cast<const Element*>(grads.out) + t * p.channels + block.first, seen,
                     dy + kept * stride);
      }
      for (int64_t i = (kept + larger<int64_t>(0, seen)) * stride; i < (kept + rows) * stride; i++) dy[i] = 0;
      add_sums(p, block, window, dy + kept * stride, smaller(rows, run.end - t), sum);
      for (int64_t r = 0; r < rows; r++) store_dx(p, grads, block, run, t - kept + r, dy + r * stride);
      carry(window, rows, kept, stride);
      carry(dy, rows, kept, stride);
    }
  }

  static void through_silu(const CausalConvProblem& p, const Block& block, const float* window, const Element* grad,
                           int64_t rows, float* dy) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < block.count; c += W) {
        const Element* const at = grad + r * p.channels + c;
        __builtin_prefetch(at + rows * p.channels, 0, 2);
        V d = load_some<S>(at, block.count - c);
        if (p.silu) {
          const V y = convolve(block, window + r * block.stride, p.taps, c), s = sigmoid(y);
          d *= s * (1 + y * (1 - s));
        }
        store<float>(dy + r * block.stride + c, d);
      }
  }

  // dx at token t, whose dy stands at `dy`.
  static void store_dx(const CausalConvProblem& p, const CausalConvGradients& grads, const Block& block, const Run& run,
                       int64_t t, const float* dy) {
    const int64_t kept = p.taps - 1;
    const bool before = t < run.begin;
    if (before && (!grads.initial || run.begin != run.start)) return;
    for (int64_t c = 0; c < block.count; c += W) {
      const int64_t channel = block.first + c, count = block.count - c;
      V d{};
      for (int64_t j = 0; j < p.taps; j++) d += block.weight(j, c) * load<float>(dy + (kept - j) * block.stride + c);
      if (!before) {
        store_some<S>(static_cast<Element*>(grads.x) + t * p.channels + channel, count, d);
        continue;
      }
      float* const state = grads.initial + (run.number * p.channels + channel) * kept + kept - (run.start - t);
      for (int64_t lane = 0; lane < smaller<int64_t>(W, count); lane++) state[lane * kept] = d[lane];
    }
  }

  static void add_sums(const CausalConvProblem& p, const Block& block, const float* window, const float* dy,
                       int64_t rows, float* sum) {
    for (int64_t j = 0; j <= p.taps; j++)
      for (int64_t c = 0; c < block.count; c += W) {
        V total{};
        for (int64_t r = 0; r < rows; r++) {
          const V d = load<float>(dy + r * block.stride + c);
          total += j < p.taps ? d * load<float>(window + (r + j) * block.stride + c) : d;
        }
        float* const at = sum + j * block.stride + c;
        store<float>(at, load<float>(at) + total);
      }
  }

  static void add_slices(const CausalConvProblem& p, const CausalConvGradients& grads, const float* sums,
                         int64_t slices, int64_t blocks, int64_t channels) {
    const int64_t size = Block::size(p, channels);
    for (int64_t c = 0; c < p.channels; c++)
      for (int64_t j = 0; j <= p.taps; j++) {
        const float* const first = sums + c / channels * size + j * channels + c % channels;
        double total = 0;
        for (int64_t i = 0; i < slices; i++) total += static_cast<double>(first[i * blocks * size]);
        if (j < p.taps)
          grads.weight[c * p.taps + j] = static_cast<float>(total);
        else if (grads.bias)
          grads.bias[c] = static_cast<float>(total);
      }
  }
};

Status forward(const CausalConvProblem& p, void* out) {
  return by_narrow_dtype(p.dtype, [&](auto s) { return CausalConv<decltype(s)>::forward(p, out); });
}
Status backward(const CausalConvProblem& p, const CausalConvGradients& grads) {
  return by_narrow_dtype(p.dtype, [&](auto s) { return CausalConv<decltype(s)>::backward(p, grads); });
}
Status update(const CausalConvProblem& p, const CausalConvStep& s, void* out) {
  return by_narrow_dtype(p.dtype, [&](auto x) { return CausalConv<decltype(x)>::update(p, s, out); });
}

}  // namespace

CausalConvFunctions causal_conv1d_functions() { return {forward, backward, update}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
