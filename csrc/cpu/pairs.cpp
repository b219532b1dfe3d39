// Family `pairs` on the CPU, compiled once per instruction set (PYREPR_LEVEL).
#include "cpu/pairs_functions.h"
#include "cpu/pairs_gradient.h"
#include "cpu/pairs_topk.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// Calls run(S{}) with the storage type of x and y.
template <class Run>
Status with_storage(DType dtype, Run run) {
  try {
    return by_narrow_dtype(dtype, [&](auto s) { return run(s), Status::ok; });
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

Status topk(const TopkProblem& p) {
  return with_storage(p.dtype, [&](auto s) { topk_of<decltype(s)>(p); });
}
Status logsumexp(const PairsProblem& p, const LogSumExpResult& out) {
  return with_storage(p.dtype, [&](auto s) { LogSumExp<decltype(s)>::run(p, out); });
}
Status logsumexp_backward(const PairsProblem& p, const LogSumExpGradients& out) {
  return with_storage(p.dtype, [&](auto s) { LogSumExpGradient<decltype(s)>::run(p, out); });
}

}  // namespace

PairsFunctions pairs_functions() { return {topk, logsumexp, logsumexp_backward}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
