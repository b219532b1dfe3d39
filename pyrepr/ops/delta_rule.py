"""Family `delta_rule`: the leaf ops, their implementations, and the differentiable function on top, :func:`delta_rule`.

Three ops over the same arguments: the forward, the backward, and the forward without a gradient, which writes the final
state where it is told (decoding). The forward leaves √n of the n chunk states behind for the backward, which recomputes
the others (maths in ``csrc/cpu/delta_rule.h``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrepr.backend import Unsupported
from pyrepr.ops._leaf import leaf_op, written
from pyrepr.ops._native import DTYPE_CODES, direct, module
from pyrepr.reference import delta_rule as reference
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.delta_rule import sequence_bounds

CHUNK = 32  # tokens per chunk, as in csrc/cpu/delta_rule.h


def segment_length(total: int) -> int:
    """Chunks between two states that the forward keeps: √ of the chunks in T tokens, so that as many are kept."""
    return max(1, int(math.sqrt(-(-total // CHUNK))))  # math.isqrt takes no symbolic sizes of torch.compile


def kept_states(batch: int, total: int, sequences: int) -> int:
    """How many states the forward keeps for the backward: an upper bound for packed sequences, from the sizes alone."""
    chunks, segment = -(-total // CHUNK), segment_length(total)
    if batch == sequences:
        return batch * -(-chunks // segment)
    return (chunks + sequences) // segment + sequences


def _forward_fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots):
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    dtype = compute_dtype(v.dtype)
    o = v.new_empty(v.shape)
    state = v.new_empty((sequences, v.shape[2], k.shape[3], v.shape[3]), dtype=dtype)
    return o, state, v.new_empty((slots, *state.shape[1:]), dtype=dtype)


def _dense(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x with its last axis dense, and its strides: every other one is the kernel's business."""
    stride = x.stride()
    if stride[-1] != 1:
        x = x.contiguous()
        stride = x.stride()
    return x, stride


def _problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm):
    """What every native function is called on, and the tensors that must live while it runs."""
    (q, q_stride), (k, k_stride), (v, v_stride) = _rows(q), _rows(k), _rows(v)
    beta = _dense(beta)
    g = None if g is None else _dense(g)
    state = None if initial_state is None else _dense(initial_state)
    problem = module().DeltaRule(
        (
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if g is None else g.data_ptr(),
            beta.data_ptr(),
            0 if state is None else state.data_ptr(),
        ),
        (*k.shape, *v.shape[2:]),
        (*q_stride, *k_stride, *v_stride),
        DTYPE_CODES[v.dtype],
        g is not None and g.dim() == 4,
        () if cu_seqlens is None else sequence_bounds(cu_seqlens, v.shape[1]),
        scale,
        use_qk_l2norm,
        torch.get_num_threads(),
    )
    return problem, (q, k, v, g, beta, state)


def _forward_cpu(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots):
    if v.dtype == torch.float64:
        return reference.delta_rule_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots)
    o, state, checkpoints = _forward_fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots)
    problem, _alive = _problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    kept = checkpoints.data_ptr() if slots else 0
    problem.forward(o.data_ptr(), state.data_ptr(), kept, slots, segment_length(v.shape[1]))
    return o, state, checkpoints


def _kept_tokens(total: int) -> int:
    """Tokens between two kept states, in which the GPU's chunks are counted."""
    return segment_length(total) * CHUNK


def _forward_triton(q, k, v, *rest):
    from pyrepr.kernels import delta_rule as kernels

    return kernels.forward(q, k, v, *rest, _kept_tokens(v.shape[1]))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, "

forward_op = leaf_op(
    f"delta_rule_forward({_INPUTS}Tensor? initial_state, Tensor? cu_seqlens, float scale, bool use_qk_l2norm, "
    "SymInt slots) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    reference=reference.delta_rule_forward,
    cpu=_forward_cpu,
    triton=_forward_triton,
)


def _update_fake(state, q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm):
    return v.new_empty(v.shape)


def _update_cpu(state, q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm):
    if v.dtype == torch.float64:
        return reference.delta_rule_update_(state, q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = state if state.is_contiguous() else torch.empty_like(state, memory_format=torch.contiguous_format)
    if initial_state is not None:
        initial_state = _dense(initial_state)
        # The kernel may read the state that it writes, but not one that merely overlaps it.
        if 0 < abs(initial_state.data_ptr() - final.data_ptr()) < 4 * final.numel():
            initial_state = initial_state.clone()
    problem, _alive = _problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    problem.forward(o.data_ptr(), final.data_ptr(), 0, 0, 1)
    if final is not state:
        state.copy_(final)
    return o


def _start(state: Tensor, initial_state: Tensor | None) -> None:
    """For kernels that know an update in place only."""
    if initial_state is None:
        state.zero_()
    elif initial_state is not state:
        state.copy_(initial_state)


def _update_triton(state, q, k, v, g, beta, initial_state, *rest):
    from pyrepr.kernels import delta_rule as kernels

    _start(state, initial_state)
    return kernels.update_(state, q, k, v, g, beta, *rest, _kept_tokens(v.shape[1]))


def _update_cuda(state, q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm):
    """The recurrence in csrc/cuda/delta_rule.cu. Compiled, not yet run on a GPU."""
    if q.dtype != v.dtype or k.dtype != v.dtype or v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"backend 'cuda' takes q, k, v of one dtype, float32, bfloat16 or float16; v is {v.dtype}")
    if k.shape[3] > 256:
        raise Unsupported(f"backend 'cuda' takes K up to 256, got {k.shape[3]}")
    _start(state, initial_state)
    o, dense = torch.empty_like(v, memory_format=torch.contiguous_format), state.contiguous()
    (q, _), (k, _), (v, _) = _rows(q), _rows(k), _rows(v)
    beta, g = (None if x is None else x.to(torch.float32).contiguous() for x in (beta, g))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        good = (cu_seqlens[0] == 0) & (cu_seqlens.diff() >= 0).all() & (cu_seqlens[-1] == v.shape[1])
        torch._assert_async(good, f"cu_seqlens must start at 0, never decrease, and end at T = {v.shape[1]}")
    tensors = (q, k, v, g, beta, dense, dense, o, cu_seqlens)
    with torch.cuda.device(v.device):
        module().cuda_delta_rule_step(
            [0 if x is None else x.data_ptr() for x in tensors],
            [s for x in (q, k, v) for s in x.stride()[:3]],
            (*k.shape, v.shape[2], v.shape[3]),
            dense.shape[0],
            DTYPE_CODES[v.dtype],
            g is not None and g.dim() == 4,
            scale,
            use_qk_l2norm,
            torch.cuda.current_stream().cuda_stream,
        )
    if dense is not state:
        state.copy_(dense)
    return o


update_op_ = leaf_op(
    f"delta_rule_update_(Tensor(a!) state, {_INPUTS}Tensor? initial_state, Tensor? cu_seqlens, float scale, "
    "bool use_qk_l2norm) -> Tensor",
    fake=_update_fake,
    reference=reference.delta_rule_update_,
    cpu=_update_cpu,
    triton=_update_triton,
    cuda=_update_cuda,
)


def _backward_fake(q, k, v, g, beta, initial_state, cu_seqlens, checkpoints, grad_o, grad_state, scale, use_qk_l2norm):
    dtype = compute_dtype(v.dtype)
    dense = [x.new_empty(x.shape) for x in (q, k, v)]
    dg = v.new_empty(0, dtype=dtype) if g is None else g.new_empty(g.shape)
    return (*dense, dg, beta.new_empty(beta.shape), grad_state.new_empty(grad_state.shape, dtype=dtype))


def _backward_cpu(q, k, v, g, beta, initial_state, cu_seqlens, checkpoints, grad_o, grad_state, scale, use_qk_l2norm):
    if v.dtype == torch.float64:
        return reference.delta_rule_backward(
            q, k, v, g, beta, initial_state, cu_seqlens, checkpoints, grad_o, grad_state, scale, use_qk_l2norm
        )
    problem, _alive = _problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    batch, total, heads, width = k.shape
    grad_o = grad_o.to(torch.float32).contiguous()
    per_value_head = (batch, total, v.shape[2], width)
    # Value heads that share a query and key head each write a gradient of it; their sum is taken here.
    dq, dk = (v.new_empty(per_value_head, dtype=torch.float32) for _ in range(2))
    dv = v.new_empty(v.shape, dtype=torch.float32)
    dbeta = v.new_empty(v.shape[:3], dtype=torch.float32)
    dg = torch.empty_like(dbeta) if g is None else v.new_empty(g.shape, dtype=torch.float32)
    ds = grad_state.to(torch.float32).clone(memory_format=torch.contiguous_format)
    grads = tuple(x.data_ptr() for x in (grad_o, dq, dk, dv, dg, dbeta, ds))
    problem.backward(checkpoints.data_ptr(), checkpoints.shape[0], segment_length(total), grads)
    if heads != v.shape[2]:
        dq, dk = (x.unflatten(2, (heads, -1)).sum(3) for x in (dq, dk))
    dg = v.new_empty(0, dtype=torch.float32) if g is None else dg.to(g.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, dbeta.to(beta.dtype), ds


def _backward_triton(q, k, v, *rest):
    from pyrepr.kernels import delta_rule as kernels

    return kernels.backward(q, k, v, *rest, _kept_tokens(v.shape[1]))


backward_op = leaf_op(
    f"delta_rule_backward({_INPUTS}Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints, Tensor grad_o, "
    "Tensor grad_state, float scale, bool use_qk_l2norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    reference=reference.delta_rule_backward,
    cpu=_backward_cpu,
    triton=_backward_triton,
)


class _DeltaRule(torch.autograd.Function):
    """(o, final state); the kept states come out too and count as constants."""

    @staticmethod
    def forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots):
        return forward_op(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, scale, use_qk_l2norm, _ = inputs
        checkpoints = output[2]
        ctx.options = (scale, use_qk_l2norm)
        ctx.mark_non_differentiable(checkpoints)
        ctx.set_materialize_grads(True)
        ctx.save_for_backward(*tensors, checkpoints)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, grad_state, _):
        *grads, ds = backward_op(*ctx.saved_tensors, grad_o, grad_state, *ctx.options)
        grads = [x if needed else None for x, needed in zip((*grads, ds), ctx.needs_input_grad[:6], strict=True)]
        return (*grads, None, None, None, None)


_GATES = {"": 0, "HV": 1, "K": 2}


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    out_state: Tensor | None,
    use_qk_l2norm: bool,
    gate: str,
) -> tuple[Tensor, Tensor] | None:
    """o and the final state of unchecked arguments in one native call, or ``None``: see `direct`."""
    native = direct()
    if native is None:
        return None
    done = native.delta_rule_step(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        out_state,
        use_qk_l2norm,
        _GATES[gate],
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )
    if done is not None and out_state is not None:
        written(out_state)
    return done


def delta_rule(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None,  # [B, T, HV], [B, T, HV, K] or None
    beta: Tensor,  # [B, T, HV]
    initial_state: Tensor | None,  # [N, HV, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
    scale: float,
    use_qk_l2norm: bool,
    state_shape: tuple[int, int, int, int],  # N, HV, K, V
) -> tuple[Tensor, Tensor]:  # [B, T, HV, V], [N, HV, K, V]
    """o and the final state, differentiable in every floating input; the public function checks the arguments."""
    inputs = (q, k, v, g, beta, initial_state)
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        if not v.is_cpu:
            o, state, _ = forward_op(*inputs, cu_seqlens, scale, use_qk_l2norm, 0)
            return o, state
        # Without the kept states the update is the same, and has one tensor less to allocate.
        state = torch.empty(state_shape, dtype=compute_dtype(v.dtype), device=v.device)
        return update_op_(state, *inputs, cu_seqlens, scale, use_qk_l2norm), state
    slots = 0 if v.dtype == torch.float64 else kept_states(v.shape[0], v.shape[1], state_shape[0])
    o, state, _ = _DeltaRule.apply(*inputs, cu_seqlens, scale, use_qk_l2norm, slots)
    return o, state
