// How a large product is cut into tiles for threads, and how what they find is added up. Included by level units only.
#pragma once

#include <omp.h>

#include <new>
#include <optional>

#include "cpu/simd.h"

namespace pyrepr {
inline namespace PYREPR_LEVEL {
namespace {

// Tiles are 336 x 672 at most: the rows, packed, fill half of a 1 MB L2 and are reused for every column panel; the
// panels stream through L1. Fewer than kMinTiles tiles would not share out evenly.
constexpr int64_t kTileRows = 336;
constexpr int64_t kTileCols = 672;
constexpr int64_t kMinTiles = 48;
constexpr int64_t kTileMemory = int64_t(20) << 20;  // bytes of tiles a thread may hold when there are many layers

// The grid of tiles over n x m, of nearly equal size, from the sizes alone; `grids` such grids share the work.
struct TileShape {
  int64_t rows, cols, row_blocks, col_blocks;
  TileShape(int64_t n, int64_t m, int64_t unit_rows, int64_t unit_cols, int64_t layers, int64_t item,
            int64_t grids = 1) {
    row_blocks = larger<int64_t>(1, ceil_div(n, kTileRows));
    col_blocks = larger<int64_t>(1, ceil_div(m, kTileCols));
    while (true) {
      rows = round_up(larger<int64_t>(1, ceil_div(n, row_blocks)), unit_rows);
      cols = round_up(larger<int64_t>(1, ceil_div(m, col_blocks)), unit_cols);
      const bool fits = rows * cols * layers * item <= kTileMemory;
      const bool splits_rows = rows > 120 && rows >= cols, splits_cols = !splits_rows && cols > 128;
      if ((fits && row_blocks * col_blocks * grids >= kMinTiles) || (!splits_rows && !splits_cols)) break;
      (splits_rows ? row_blocks : col_blocks) *= 2;
    }
    row_blocks = ceil_div(n, rows);
    col_blocks = ceil_div(m, cols);
  }
};

// One tile of the grid: rows [r0, r0 + rows) and columns [c0, c0 + cols).
struct Span {
  int64_t r0, rows, c0, cols;
  Span(const TileShape& shape, int64_t task, int64_t n, int64_t m)
      : r0(task / shape.col_blocks * shape.rows),
        rows(smaller(shape.rows, n - r0)),
        c0(task % shape.col_blocks * shape.cols),
        cols(smaller(shape.cols, m - c0)) {}
  bool below_diagonal() const { return r0 > c0 + cols - 1; }
};

inline int64_t thread_number() { return omp_get_thread_num(); }

// Calls work(own) on every thread of a team, each with a Scratch of its own made of `args`; loops in `work` are shared
// out by `omp for`. If there is no memory for one of them, nothing is called, and std::bad_alloc is thrown.
template <class Scratch, class Work, class... Args>
void with_scratch(int threads, Work work, const Args&... args) {
  bool ok = true;
#pragma omp parallel num_threads(threads)
  {
    std::optional<Scratch> own;
    try {
      own.emplace(args...);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      ok = false;
    }
#pragma omp barrier
    if (ok) work(*own);
  }
  if (!ok) throw std::bad_alloc();
}

// Runs work(task, slot) in parallel and commit(task, slot) one after the other in the order of tasks, a wave of tasks
// at a time. What is added up by commit has the same bits for any number of threads.
template <class Work, class Commit>
void in_task_order(int64_t tasks, int64_t slots, int threads, Work work, Commit commit) {
  for (int64_t first = 0; first < tasks; first += slots) {
    const int64_t wave = smaller(slots, tasks - first);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t slot = 0; slot < wave; slot++) work(first + slot, slot);
    for (int64_t slot = 0; slot < wave; slot++) commit(first + slot, slot);
  }
}

}  // namespace
}  // namespace PYREPR_LEVEL
}  // namespace pyrepr
