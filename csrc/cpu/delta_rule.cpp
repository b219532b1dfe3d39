// Family `delta_rule` on the CPU, compiled once per instruction set (PYREPR_LEVEL). The maths is in delta_rule.h.
//
// Work, at best, per token and head: forward 3 K V multiply-adds, 4 K V with a gate per key, backward with C = 32
// 8 K V + 7 C K or so; bytes: the inputs once, the outputs once. The forward keeps columns of S in L1 and goes token by
// token, which was measured to take half the time of the chunk form at every level; the backward goes by chunks, and so
// does the forward of bfloat16 where products are of tiles (delta_rule_tiles.h).
//
// Where the forward's time goes, measured by leaving stages out (gated, T = 2048, K = V = 128, fp32, one thread of a
// Zen 4): its multiply-adds 57 %, q and k of the tokens brought in 17 %, outputs stored 6 %, the state stored 4 %, v
// brought in 1 %. The rest is what these take beyond their own when all are there: they share L1 and the ways to L2.
//
// A task is one sequence of one value head; the forward also cuts the value columns (they have nothing else in common)
// when there are fewer of those than threads. No task shares a sum with another, so the bits are the same for any
// number of threads.
#include "cpu/delta_rule.h"

#include <omp.h>

#include "cpu/delta_rule_around.h"
#include "cpu/delta_rule_backward.h"
#include "cpu/delta_rule_chunk.h"
#include "cpu/delta_rule_recurrence.h"
#include "cpu/delta_rule_step.h"
#include "cpu/delta_rule_wide.h"
#if defined(PYREPR_LEVEL_amx)
#include "cpu/delta_rule_tiles.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kShort = 8;  // tokens of a call that decodes

template <class F>
void by_erase(const DeltaRuleProblem& p, const F& f) {
  p.beta ? f(std::true_type{}) : f(std::false_type{});
}

#if defined(PYREPR_LEVEL_amx)
constexpr int64_t kLeastTiled = 16;  // tokens from which on tiles are faster, as measured

bool tiled(const Columns& at) { return at.s.length >= kLeastTiled && TiledRule<true>::fits(at.p); }
#endif

// Value columns through all tokens, the way that is fastest at this level.
template <bool erases>
void walk(const Columns& at, float* scratch, const DeltaRuleStates& states) {
#if defined(PYREPR_LEVEL_amx)
  if (tiled(at) && TiledRule<erases>(at, scratch).run(states)) return;
#endif
  Recurrence<erases>(at, scratch).run(states);
}

int64_t forward_size(const DeltaRuleProblem& p, int64_t slice) {
  const int64_t size = larger(step_size(p), Recurrence<true>::size(p, slice));
#if defined(PYREPR_LEVEL_amx)
  if (p.total >= kLeastTiled && TiledRule<true>::fits(p)) return larger(size, TiledRule<true>::size(p, slice));
#endif
  return size;
}

Status forward(const DeltaRuleProblem& p, void* o, float* final, const DeltaRuleStates& states) {
  const int64_t heads = p.sequences * p.value_heads, panels = ceil_div(p.value_width, NR);
  if (heads == 0 || panels == 0) return Status::ok;
  const int64_t work = heads * p.width * p.value_width * (p.bounds ? ceil_div(p.total, p.sequences) : p.total);
  const int threads = work < kSmall ? 1 : p.threads;
  const int64_t slices = heads >= threads ? 1 : smaller(panels, ceil_div(threads, heads));
  const int64_t slice = ceil_div(panels, slices) * NR;  // value columns per task
  const bool decoding = p.total <= kShort && !states.data;
  const int64_t bytes = round_up(forward_size(p, slice) * 4, 64);
  const Memory memory(bytes * threads);
  if (!memory.ok()) return Status::out_of_memory;
  const auto run = [&](int64_t task) {
    float* const scratch = memory.as<float>(bytes * omp_get_thread_num());
    const Sequence s(p, task / slices);
    const int64_t v0 = task % slices * slice, columns = smaller(slice, p.value_width - v0);
    if (columns <= 0) return;
    const Columns at{p, s, v0, columns, o, final + s.state_offset(p) + v0};
    if (s.length <= 1 && !states.data)
      step_in_place(at, scratch);
    else
      by_erase(p, [&](auto erases) { walk<decltype(erases)::value>(at, scratch, states); });
  };
  // Token after token, a thread gets the same heads, whose states its cache holds.
  if (decoding) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < heads * slices; task++) run(task);
  } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < heads * slices; task++) run(task);
  }
  return Status::ok;
}

Status backward(const DeltaRuleProblem& p, const DeltaRuleStates& states, const DeltaRuleGradients& grads) {
  const int64_t tasks = p.sequences * p.value_heads;
  if (tasks == 0 || p.value_width == 0) return Status::ok;
  const int64_t bytes = round_up(DeltaRuleBackward::size(p, states.segment) * 4, 64);
  const Memory memory(bytes * p.threads);
  if (!memory.ok()) return Status::out_of_memory;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
  for (int64_t task = 0; task < tasks; task++) {
    const Sequence s(p, task);
    DeltaRuleBackward(p, s, states, grads, memory.as<float>(bytes * omp_get_thread_num())).run();
  }
  return Status::ok;
}

}  // namespace

DeltaRuleFunctions delta_rule_functions() {
  return {forward, backward, activate, gated_norm, decode, WideRule::forward, WideRule::backward};
}

}  // namespace pyrepr::cpu::PYREPR_LEVEL
