"""Family `delta_rule`: the leaf ops, their implementations, and the differentiable function on top, :func:`delta_rule`.

Three ops over the same arguments, of which beta may be ``None``, for a rule without an erase: the forward, the
backward, and the forward without a gradient, which writes the final state where it is told (decoding). The forward
leaves √n of the n chunk states behind for the backward, which recomputes the others (maths in
``csrc/cpu/delta_rule.h``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrepr.backend import Unsupported
from pyrepr.ops._differentiable import ALONE, Derivative, Fold
from pyrepr.ops._leaf import derives, leaf_op
from pyrepr.ops._native import DTYPE_CODES, apart, direct, module, optional
from pyrepr.reference import delta_rule as reference
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.delta_rule import Gate, sequence_bounds

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


def _gate(g: Tensor | None) -> Gate:
    return Gate.NONE if g is None else Gate.PER_KEY if g.dim() == 4 else Gate.PER_HEAD


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
    g, beta, state = (None if x is None else _dense(x) for x in (g, beta, initial_state))
    problem = module().DeltaRule(
        (
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            optional("g", g),
            optional("beta", beta),
            optional("initial_state", state),
        ),
        (*k.shape, *v.shape[2:]),
        (*q_stride, *k_stride, *v_stride),
        DTYPE_CODES[v.dtype],
        _gate(g),
        () if cu_seqlens is None else sequence_bounds(cu_seqlens, v.shape[1]),
        scale,
        use_qk_l2norm,
        torch.get_num_threads(),
    )
    return problem, (q, k, v, g, beta, state)


def _wide(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm):
    """The float64 rule, and the tensors that must live while it runs."""
    prepared = reference.prepared(q, k, v, g, beta, scale, use_qk_l2norm)
    tensors = [None if x is None else x.contiguous() for x in (*prepared, initial_state)]
    batch, total = v.shape[:2]
    bounds = [i * total for i in range(batch + 1)] if cu_seqlens is None else sequence_bounds(cu_seqlens, total)
    problem = module().DeltaRuleWide(
        [optional(name, x) for name, x in zip(("q", "k", "v", "g", "beta", "initial_state"), tensors, strict=True)],
        (v.shape[2], k.shape[3], v.shape[3]),
        bounds,
        _gate(g),
        torch.get_num_threads(),
    )
    return problem, tensors


def _forward_cpu(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots):
    o, state, checkpoints = _forward_fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots)
    if v.dtype == torch.float64:  # keeps no states
        problem, _alive = _wide(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
        problem.forward(o.data_ptr(), state.data_ptr())
        return o, state, checkpoints.zero_()
    problem, _alive = _problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    kept = checkpoints.data_ptr() if slots else 0
    problem.forward(o.data_ptr(), state.data_ptr(), kept, slots, segment_length(v.shape[1]))
    return o, state, checkpoints


def _kept_tokens(total: int) -> int:
    """Tokens between two kept states, in which the GPU's chunks are counted."""
    return segment_length(total) * CHUNK


def _check_erase(beta: Tensor | None) -> None:
    if beta is None:
        raise Unsupported("the GPU kernels of the delta rule take no rule without an erase")


def _forward_triton(q, k, v, g, beta, *rest):
    from pyrepr.kernels import delta_rule as kernels

    _check_erase(beta)
    return kernels.forward(q, k, v, g, beta, *rest, _kept_tokens(v.shape[1]))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, "


def _update_fake(state, q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm):
    return v.new_empty(v.shape)


def _update_cpu(state, q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm):
    if v.dtype == torch.float64:
        rest = (cu_seqlens, scale, use_qk_l2norm, 0)
        o, last, _ = _forward_cpu(q, k, v, g, beta, initial_state, *rest)
        return (o, state.copy_(last))[0]
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = state if state.is_contiguous() else torch.empty_like(state, memory_format=torch.contiguous_format)
    q, k, v, g, beta = apart(final, q, k, v, g, beta)
    initial_state = _apart(initial_state, final)
    problem, _alive = _problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    kept = (o.data_ptr(), final.data_ptr(), 0, 0, 1)
    # In one line: nothing may go wrong between the state's move and the return.
    return (o, problem.forward(*kept), None if final is state else state.copy_(final))[0]


def _apart(initial_state: Tensor | None, final: Tensor) -> Tensor | None:
    """The initial state as a kernel may read it that writes `final`: that very state, or one that overlaps no part."""
    if initial_state is None:
        return None
    initial_state = _dense(initial_state)
    overlaps = 0 < abs(initial_state.data_ptr() - final.data_ptr()) < 4 * final.numel()
    return initial_state.clone() if overlaps else initial_state


def _update_triton(state, q, k, v, g, beta, initial_state, *rest):
    from pyrepr.kernels import delta_rule as kernels

    _check_erase(beta)
    initial_state = _apart(initial_state, state)
    return kernels.update_(state, q, k, v, g, beta, initial_state, *rest, _kept_tokens(v.shape[1]))


def _update_cuda(state, q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm):
    """The recurrence in csrc/cuda/delta_rule.cu."""
    _check_erase(beta)
    if q.dtype != v.dtype or k.dtype != v.dtype or v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"backend 'cuda' takes q, k, v of one dtype, float32, bfloat16 or float16; v is {v.dtype}")
    if k.shape[3] > 256:
        raise Unsupported(f"backend 'cuda' takes K up to 256, got {k.shape[3]}")
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = state if state.is_contiguous() else torch.empty_like(state, memory_format=torch.contiguous_format)
    initial = _apart(initial_state, final)
    (q, _), (k, _), (v, _) = _rows(q), _rows(k), _rows(v)
    beta, g = (None if x is None else x.to(torch.float32).contiguous() for x in (beta, g))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        good = (cu_seqlens[0] == 0) & (cu_seqlens.diff() >= 0).all() & (cu_seqlens[-1] == v.shape[1])
        torch._assert_async(good, f"cu_seqlens must start at 0, never decrease, and end at T = {v.shape[1]}")
    tensors = (q, k, v, g, beta, initial, final, o, cu_seqlens)
    with torch.cuda.device(v.device):
        module().cuda_delta_rule_step(
            [0 if x is None else x.data_ptr() for x in tensors],
            [s for x in (q, k, v) for s in x.stride()[:3]],
            (*k.shape, v.shape[2], v.shape[3]),
            final.shape[0],
            DTYPE_CODES[v.dtype],
            _gate(g),
            scale,
            use_qk_l2norm,
            torch.cuda.current_stream().cuda_stream,
        )
    if final is not state:
        state.copy_(final)
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
    gates = [v.new_empty(0, dtype=dtype) if x is None else x.new_empty(x.shape) for x in (g, beta)]
    return (*dense, *gates, grad_state.new_empty(grad_state.shape, dtype=dtype))


def _backward_cpu(q, k, v, g, beta, initial_state, cu_seqlens, checkpoints, grad_o, grad_state, scale, use_qk_l2norm):
    if v.dtype == torch.float64:
        return _backward_wide(q, k, v, g, beta, initial_state, cu_seqlens, grad_o, grad_state, scale, use_qk_l2norm)
    problem, _alive = _problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    batch, total, heads, width = k.shape
    if checkpoints.numel() and bool(checkpoints.flatten()[0].isinf()):  # the forward was the reference's
        given = (q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
        checkpoints = _forward_cpu(*given, checkpoints.shape[0])[2]
    grad_o, checkpoints = grad_o.to(torch.float32).contiguous(), checkpoints.contiguous()
    per_value_head = (batch, total, v.shape[2], width)
    # Value heads that share a query and key head each write a gradient of it; their sum is taken here.
    dq, dk = (v.new_empty(per_value_head, dtype=torch.float32) for _ in range(2))
    dv = v.new_empty(v.shape, dtype=torch.float32)
    dbeta, dg = (v.new_empty(v.shape[:3] if x is None else x.shape, dtype=torch.float32) for x in (beta, g))
    ds = grad_state.to(torch.float32).clone(memory_format=torch.contiguous_format)
    grads = tuple(x.data_ptr() for x in (grad_o, dq, dk, dv, dg, dbeta, ds))
    problem.backward(checkpoints.data_ptr(), checkpoints.shape[0], segment_length(total), grads)
    if heads != v.shape[2]:
        dq, dk = (x.unflatten(2, (heads, -1)).sum(3) for x in (dq, dk))
    dg, dbeta = (_or_none(dx, x, v) for dx, x in ((dg, g), (dbeta, beta)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, dbeta, ds


def _or_none(grad: Tensor | None, x: Tensor | None, v: Tensor) -> Tensor:
    """The gradient in what may be left out; empty without it."""
    return v.new_empty(0, dtype=compute_dtype(v.dtype)) if x is None or grad is None else grad.to(x.dtype)


def _backward_wide(q, k, v, g, beta, initial_state, cu_seqlens, grad_o, grad_state, scale, use_qk_l2norm):
    problem, tensors = _wide(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    grad_o, ds = grad_o.to(v.dtype).contiguous(), grad_state.to(v.dtype).clone(memory_format=torch.contiguous_format)
    dq, dk, dv, dg, dbeta = (None if x is None else torch.empty_like(x) for x in tensors[:5])
    problem.backward([0 if x is None else x.data_ptr() for x in (grad_o, dq, dk, dv, dg, dbeta, ds)])
    return (
        reference.heads_backward(q, dq * scale, use_qk_l2norm),
        reference.heads_backward(k, dk, use_qk_l2norm),
        dv,
        _or_none(dg, g, v),
        _or_none(dbeta, beta, v),
        ds,
    )


def _backward_triton(q, k, v, g, beta, *rest):
    from pyrepr.kernels import delta_rule as kernels

    _check_erase(beta)
    return kernels.backward(q, k, v, g, beta, *rest, _kept_tokens(v.shape[1]))


backward_op = leaf_op(
    f"delta_rule_backward({_INPUTS}Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints, Tensor grad_o, "
    "Tensor grad_state, float scale, bool use_qk_l2norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    reference=reference.delta_rule_backward,
    cpu=_backward_cpu,
    triton=_backward_triton,
)


def _backward(args, kept, grads, wanted):
    *tensors, scale, use_qk_l2norm, slots = args
    v, cu_seqlens = tensors[2], tensors[6]
    if slots == 0 and v.dtype != torch.float64:  # a graph made for inference, say
        sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        kept = forward_op(*args[:-1], kept_states(v.shape[0], v.shape[1], sequences))[2:]
    *found, ds = backward_op(*tensors, *kept, *grads, scale, use_qk_l2norm)
    return (*(x if want else None for x, want in zip((*found, ds), wanted, strict=False)), None)


forward_op = leaf_op(
    f"delta_rule_forward({_INPUTS}Tensor? initial_state, Tensor? cu_seqlens, float scale, bool use_qk_l2norm, "
    "SymInt slots) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    derivative=Derivative(
        reference=lambda args, kept: reference.delta_rule_chunks(*args[:-1]),
        backward=_backward,
        outputs=(0, 1),
        kept=(2,),
        fold=Fold((0, 0, 0, 0, 0, 0, ALONE), (0, 0, 0), lambda size, options: (*options[:-1], size * options[-1])),
    ),
    reference=reference.delta_rule_forward,
    cpu=_forward_cpu,
    triton=_forward_triton,
)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    out_state: Tensor | None,
    use_qk_l2norm: bool,
    gate: Gate,
    activations: tuple | None = None,
) -> tuple[Tensor, Tensor] | None:
    """o and the final state of unchecked arguments in one native call, or ``None``: see `direct`.

    activations: how g and beta come about, (A_log, dt_bias, lower_bound, whether g is before its activation, whether
    beta is, allow_neg_eigval), which are checked but for the tensors; ``None``: they are given as the rule takes them.
    """
    native = direct()
    if native is None:
        return None
    return native.delta_rule_step(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        out_state,
        activations,
        use_qk_l2norm,
        gate,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )


def states_after(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    count: int,
    use_qk_l2norm: bool,
    gate: Gate,
    activations: tuple,
) -> tuple[Tensor, Tensor] | None:
    """As :func:`step`: o, and the states after the last `count` tokens, [count, B, HV, K, V]; −1: after every one."""
    native = direct()
    if native is None:
        return None
    return native.delta_rule_states(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        count,
        activations,
        use_qk_l2norm,
        gate,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )


def delta_rule(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None,  # [B, T, HV], [B, T, HV, K] or None
    beta: Tensor | None,  # [B, T, HV]
    initial_state: Tensor | None,  # [N, HV, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
    scale: float,
    use_qk_l2norm: bool,
    state_shape: tuple[int, int, int, int],  # N, HV, K, V
) -> tuple[Tensor, Tensor]:  # [B, T, HV, V], [N, HV, K, V]
    """o and the final state, differentiable in every floating input; the public function checks the arguments."""
    inputs = (q, k, v, g, beta, initial_state)
    if not derives(*inputs) and v.is_cpu and not torch.compiler.is_exporting():
        # Without the kept states the update is the same, and has one tensor less to allocate.
        state = torch.empty(state_shape, dtype=compute_dtype(v.dtype), device=v.device)
        return update_op_(state, *inputs, cu_seqlens, scale, use_qk_l2norm), state
    keeps = v.dtype != torch.float64 and any(x is not None and x.requires_grad for x in inputs)
    slots = kept_states(v.shape[0], v.shape[1], state_shape[0]) if keeps else 0
    o, state, _ = forward_op(*inputs, cu_seqlens, scale, use_qk_l2norm, slots)
    return o, state
