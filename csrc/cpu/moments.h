// Products of features on the CPU: what csrc/bindings/moments.cpp calls and moments.cpp defines once per instruction
// set. Names are those of gram.h.
#pragma once

#include "cpu/gram.h"

namespace pyrepr::cpu {

struct MomentsFunctions {
  // The statistics of gram.h for the linear kernel by way of features: n D^2 multiply-adds (half by symmetry),
  // S_ab = |X_a^T X_b|^2 minus the diagonals' share. With split > 0 only the pairs (a < split, b >= split) and (a, a)
  // are computed, the others are NaN.
  Status (*stats)(const GramProblem&, int64_t split, const GramStats&);
  // blocks[p] [d_a, d_b] += X_a^T X_b for (a, b) = pairs[p]; of a pair (a, a) only the upper triangle.
  Status (*moments)(const GramProblem&, const int64_t* pairs, int64_t pair_count, double* const* blocks);
};

}  // namespace pyrepr::cpu
