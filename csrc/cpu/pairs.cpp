// Family `pairs` on the CPU, compiled once per instruction set (PYREPR_LEVEL).
#include "cpu/pairs_functions.h"
#include "cpu/pairs_gradient.h"
#include "cpu/pairs_topk.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

Status topk(const TopkProblem& p) {
  return by_narrow_dtype(p.dtype, [&](auto s) { return topk_of<decltype(s)>(p); });
}
Status logsumexp(const PairsProblem& p, const LogSumExpResult& out) {
  return by_narrow_dtype(p.dtype, [&](auto s) { return LogSumExp<decltype(s)>::run(p, out); });
}
Status logsumexp_backward(const PairsProblem& p, const LogSumExpGradients& out) {
  return by_narrow_dtype(p.dtype, [&](auto s) { return LogSumExpGradient<decltype(s)>::run(p, out); });
}

}  // namespace

PairsFunctions pairs_functions() { return {topk, logsumexp, logsumexp_backward}; }

}  // namespace pyrepr::cpu::PYREPR_LEVEL
