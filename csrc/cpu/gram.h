// Family `gram` on the CPU: what csrc/bindings/gram.cpp calls and gram.cpp defines once per instruction set.
//
// M layers of n samples each; X_l is [n, d_l], D = sum of d_l. With m_l the mean row of a layer (0 where the kernel is
// not shift-invariant) and q_li = |x_li - m_l|^2, every similarity measure of the family is a function of
//   S [M, M]  sums over i != j of k_a(i, j) k_b(i, j)
//   R [M, n]  sums over j != i of k_l(i, j)
//   D [M, n]  k_l(i, i)
// and no n x n matrix has to exist. k is the kernel minus a constant `shift` near its mean: the measures do not notice
// a constant, sums in finite precision do. All four are float64; tiles are made in float32 (float64 for float64
// inputs).
//
// A constant that is much larger than what sets pairs apart would be gone with its digits before `shift` is subtracted.
// With `base` the kernel is its difference from its value at distance (or inner product) 0, made without cancellation.
#pragma once

#include "common.h"

namespace pyrepr::cpu {

// The codes Python passes; `KERNELS` in pyrepr/reference/gram.py holds the same order.
enum class GramKernel : int { linear = 0, rbf = 1, laplacian = 2, polynomial = 3, cosine = 4 };

struct GramProblem {
  const View* layers;    // [M], all with the same number of rows
  int64_t count;         // M
  DType dtype;           // of every layer
  const int64_t* index;  // [n] the rows that count, or null for all
  int64_t n;
  GramKernel kernel;
  const double* scale;   // [M]: sigma of rbf and laplacian, gamma of polynomial
  const double* offset;  // [M]: coef0 of polynomial; rbf and laplacian are multiplied by e^offset
  const double* base;    // [M]: 1 to subtract the kernel's value at 0, coef0^degree or e^offset; else 0
  int degree;            // polynomial: (gamma <x, y> + coef0)^degree
  bool centre;           // subtract the mean row, where the kernel is shift-invariant
  int threads;
};

struct GramStats {
  double* s;            // [M, M]
  double* r;            // [M, n]
  double* d;            // [M, n]
  double* shift;        // [M]
  double* norms;        // [M, n] squared norms of the (centred) rows
  void* dots;           // [M, n, n] inner products of the centred rows, in the accumulation type; null: not kept
  double* p = nullptr;  // [M (M + 1) / 2, n] for a <= b the sums over j != i of k_a(i, j) k_b(i, j); null: not wanted
  double* moved = nullptr;  // [M, M, n] of b and a the sums over j of k_b(i, j) |x_aj|^2, for a linear kernel
  void* cross = nullptr;    // by way of features: the products of shares.h's Crosses; with p, not null
};

struct GramFunctions {
  // n^2 D multiply-adds (half of them by symmetry), tiles only; moments.h has the way by features.
  Status (*stats)(const GramProblem&, const GramStats&);
  // out [n, m] = kernel of every row of layer 0 with every row of layer 1 (with itself when count is 1).
  Status (*matrix)(const GramProblem&, bool centre, void* out);
  // median [M] of the off-diagonal distances |x_i - x_j|, exact, by radix selection; norms [M, n] as in GramStats.
  Status (*median)(const GramProblem&, double* median, double* norms);
  // out [rows, d] = weights [rows, n] X, for the one layer of the problem, with X minus its mean row under `centre`.
  Status (*apply)(const GramProblem&, bool centre, const void* weights, int64_t rows, void* out);
};

}  // namespace pyrepr::cpu
