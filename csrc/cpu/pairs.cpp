// Family `pairs` on the CPU, compiled once per instruction set (PYREPR_LEVEL).
#include "cpu/pairs_functions.h"
#include "cpu/pairs_gradient.h"
#include "cpu/pairs_stripes.h"
#include "cpu/pairs_topk.h"

namespace pyrepr::cpu::avx512 {
PairsFunctions pairs_functions();
}

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

template <class Run>
Status within_memory(Run run) {
  try {
    run();
    return Status::ok;
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

Status search(const TopkProblem& p) {
  return within_memory([&] { topk_of(p); });
}

#if defined(PYREPR_LEVEL_avx512_bf16)  // adds products of 16-bit numbers: to screen with, and of bfloat16 rows

Status topk(const TopkProblem& p) { return p.logsumexp ? avx512::pairs_functions().topk(p) : search(p); }
Status logsumexp(const PairsProblem& p, const LogSumExpResult& out) {
  if (p.dtype != DType::bf16) return avx512::pairs_functions().logsumexp(p, out);
  return within_memory([&] { LogSumExp<Bf16Words>::run(p, out); });
}
Status logsumexp_backward(const PairsProblem& p, const LogSumExpGradients& out) {
  if (p.dtype != DType::bf16) return avx512::pairs_functions().logsumexp_backward(p, out);
  return within_memory([&] { LogSumExpGradient<Bf16Words>::run(p, out); });
}
Status row_loss(const PairsProblem& p, const RowLossResult& out) { return avx512::pairs_functions().row_loss(p, out); }

#else

Status topk(const TopkProblem& p) { return search(p); }
Status logsumexp(const PairsProblem& p, const LogSumExpResult& out) {
  return within_memory([&] { LogSumExp<FloatWords>::run(p, out); });
}
Status logsumexp_backward(const PairsProblem& p, const LogSumExpGradients& out) {
  return within_memory([&] { LogSumExpGradient<FloatWords>::run(p, out); });
}
Status row_loss(const PairsProblem& p, const RowLossResult& out) {
  return within_memory([&] { RowLoss::run(p, out); });
}

#endif

}  // namespace

PairsFunctions pairs_functions() { return {topk, logsumexp, logsumexp_backward, row_loss}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
