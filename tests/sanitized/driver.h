// What the families of the driver share: random numbers, and memory that holds exactly what a kernel may touch.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common.h"
#include "cpu/dispatch.h"

namespace driver {

using pyrepr::DType;
using pyrepr::Status;
using pyrepr::View;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform() { return static_cast<double>(bits() >> 11) / 9007199254740992.0 * 2 - 1; }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[below(static_cast<int64_t>(from.size()))];
  }
  // Mostly small, around the widths of vectors and tiles, seldom 0.
  int64_t size(int64_t most) {
    if (chance(3)) return 0;
    const int64_t n = pick<int64_t>({1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 200, 300});
    return n > most ? 1 + below(most) : n;
  }

 private:
  uint64_t state_;
};

inline int64_t item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A number as an element of a dtype; `wild`: sometimes NaN, infinite or enormous.
inline void store(char* to, DType dtype, double value) {
  const float single = static_cast<float>(value);
  uint32_t word;
  std::memcpy(&word, &single, 4);
  if (dtype == DType::f64) {
    std::memcpy(to, &value, 8);
  } else if (dtype == DType::f32) {
    std::memcpy(to, &single, 4);
  } else if (dtype == DType::bf16) {
    const uint16_t half = static_cast<uint16_t>(word >> 16);
    std::memcpy(to, &half, 2);
  } else {
    const uint32_t exponent = word >> 23 & 255;
    uint16_t half = static_cast<uint16_t>(word >> 16 & 0x8000);
    if (exponent >= 143)
      half = static_cast<uint16_t>(half | 0x7c00 | (exponent == 255 && word << 9 ? 1 : 0));
    else if (exponent > 112)
      half = static_cast<uint16_t>(half | (exponent - 112) << 10 | (word >> 13 & 0x3ff));
    std::memcpy(to, &half, 2);
  }
}

// `count` elements in a block of their own: what lies before and after belongs to the sanitizer.
class Buffer {
 public:
  Buffer(Random& random, int64_t count, DType dtype)
      : count_(count), item_(item_size(dtype)), skip_(random.chance(30) ? item_ : 0) {
    data_ = static_cast<char*>(std::malloc(static_cast<size_t>(bytes() + skip_)));
  }
  ~Buffer() { std::free(data_); }
  Buffer(Buffer&& other) noexcept : count_(other.count_), item_(other.item_), skip_(other.skip_), data_(other.data_) {
    other.data_ = nullptr;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  int64_t bytes() const { return count_ * item_; }
  char* at() const { return data_ + skip_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(at());
  }
  Buffer& fill(Random& random, DType dtype, double scale, bool wild) {
    for (int64_t i = 0; i < count_; i++) {
      double value = random.uniform() * scale;
      if (wild && random.chance(2))
        value =
            random.pick<double>({1e30, -1e30, 1e-40, 0.0, -0.0, __builtin_inf(), -__builtin_inf(), __builtin_nan("")});
      store(at() + i * item_, dtype, value);
    }
    return *this;
  }
  // Reads every byte, so that one that was never written is found; returns a sum of them.
  uint64_t read() const {
    uint64_t sum = 1469598103934665603u;
    for (int64_t i = 0; i < bytes(); i++) sum = (sum ^ static_cast<uint8_t>(at()[i])) * 1099511628211u;
    volatile bool odd = false;
    if (sum & 1) odd = true;  // a branch on the result: this is where MemorySanitizer and valgrind look
    (void)odd;
    return sum;
  }

 private:
  int64_t count_, item_, skip_;
  char* data_;
};

// [rows, cols] in one of the layouts a view can have.
struct Matrix {
  Buffer buffer;
  View view;

  static Matrix random(Random& random, int64_t rows, int64_t cols, DType dtype, bool dense_rows, double scale,
                       bool wild) {
    int64_t row = cols, col = 1;
    const int kind = static_cast<int>(random.below(dense_rows ? 3 : 5));
    if (kind == 1) row = cols + 3;
    if (kind == 2) row = random.chance(50) ? 0 : 1;  // expanded, or windows that overlap
    if (kind == 3) row = 1, col = rows;
    if (kind == 4) row = 2 * cols + 1, col = 2;
    const bool empty = rows == 0 || cols == 0;
    const int64_t span = empty ? 0 : 1 + (rows - 1) * row + (cols - 1) * col;
    Buffer buffer(random, span, dtype);
    buffer.fill(random, dtype, scale, wild);
    const View view{buffer.at(), rows, cols, row, col};
    return {std::move(buffer), view};
  }
};

[[noreturn]] inline void die(const char* family, const char* what) {
  std::fprintf(stderr, "%s: %s\n", family, what);
  std::exit(1);
}

// Calls run(threads, outputs) on one thread and on several, and compares every byte of the outputs.
template <class Make, class Run>
void same_bits(Random& random, const char* family, Make make, Run run) {
  uint64_t first = 0;
  for (int round = 0; round < 2; round++) {
    std::vector<Buffer> outputs = make();
    if (run(round ? static_cast<int>(2 + random.below(3)) : 1, outputs) != Status::ok) die(family, "out of memory");
    uint64_t sum = 0;
    for (const Buffer& out : outputs) sum = sum * 31 + out.read();
    if (round && sum != first) die(family, "other bits on another number of threads");
    first = sum;
  }
}

// One random call of every function of a family at a level.
void gram(const pyrepr::cpu::Level& level, Random& random);
void delta_rule(const pyrepr::cpu::Level& level, Random& random);
void lookup(const pyrepr::cpu::Level& level, Random& random);
void causal_conv1d(const pyrepr::cpu::Level& level, Random& random);
void pairs(const pyrepr::cpu::Level& level, Random& random);

}  // namespace driver
