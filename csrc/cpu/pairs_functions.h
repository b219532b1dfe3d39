// Family `pairs` on the CPU: what csrc/bindings/pairs.cpp calls and pairs.cpp defines once per instruction set. Nothing
// here holds the n x m matrix, unless the caller wants it kept. The maths is in pyrepr/reference/pairs.py.
#pragma once

#include "common.h"

namespace pyrepr::cpu {

// The codes Python passes; `METRICS` in pyrepr/reference/pairs.py holds the same order.
enum class Metric : int { ip = 0, cosine = 1, sqeuclidean = 2 };

// The k rows of y with the largest scores for each row of x: <x, y>, the cosine, or -|x - y|^2. Equal ones in the order
// of their indices; a score that is no number, or -inf, is none.
struct TopkProblem {
  View x, y;    // [n, d], [m, d], rows dense
  DType dtype;  // of both; not f64
  int64_t k;
  Metric metric;
  bool exclude_self;  // leaves out the pairs (i, j) with i = offset + j
  int64_t offset;     // of y's rows in a larger whole: row j has the index offset + j
  float* values;      // [n, k] the best so far, best first, -inf where there is none; then the best of those and y's
  int64_t* indices;   // [n, k] theirs, -1 where there is none
  float* logsumexp;   // [n] of the scores so far, -inf for none; y's are added. null: not wanted
  int threads;
};

// Logits s_ij = scale <x_i, y_j>, or scale times the cosine under `normalize`, of the first prefixes[q] features.
struct PairsProblem {
  View x, y;                // [n, d], [m, d], rows dense
  DType dtype;              // of both; not f64
  const int64_t* prefixes;  // [P] increasing, the last at most d
  int64_t prefix_count;     // P
  const int64_t* labels;    // [n] the column of each row's positive; null: none
  double scale;
  bool normalize;
  int threads;
};

struct LogSumExpResult {
  float* r;            // [P, n] or null: not wanted
  float* c;            // [P, m] or null: not wanted
  float* row_gaps;     // [P, n], with labels and r
  float* column_gaps;  // [P, n], with labels and c
  float* kept;         // [P, n, m] the logits, or null
};

struct LogSumExpGradients {
  const float* r;                 // [P, n] or null, as the forward left it
  const float* c;                 // [P, m] or null
  const float* kept;              // [P, n, m] or null: they are computed again
  const float* row_weights;       // [P, n] with r
  const float* column_weights;    // [P, m] with c
  const float* positive_weights;  // [P, n] with labels, or null
  void* x;                        // [n, d] in the problem's dtype
  void* y;                        // [m, d]
  float* scale;
};

// InfoNCE over rows and its gradient at once: the loss is the sum of weights[q] gap_qi.
struct RowLossResult {
  const double* weights;  // [P]
  float* loss;
  float* x;  // [n, d], float32 whatever the problem's dtype is
  float* y;  // [m, d]
  float* scale;
};

struct PairsFunctions {
  Status (*topk)(const TopkProblem&);
  Status (*logsumexp)(const PairsProblem&, const LogSumExpResult&);
  Status (*logsumexp_backward)(const PairsProblem&, const LogSumExpGradients&);
  Status (*row_loss)(const PairsProblem&, const RowLossResult&);  // with labels
};

}  // namespace pyrepr::cpu
