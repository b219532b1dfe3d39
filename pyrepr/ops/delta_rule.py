"""Family `delta_rule`: the leaf ops, their implementations, and the differentiable function on top, :func:`delta_rule`.

Three ops over the same arguments, of which beta may be ``None``, for a rule without an erase: the forward, the
backward, and the forward without a gradient, which writes the final state where it is told (decoding). The forward
leaves √n of the n chunk states behind for the backward, which recomputes the others, and on a CPU V', as much as v in
float32 (maths in ``csrc/cpu/delta_rule.h``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrepr.backend import Unsupported, forced_backend
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


def kept_slots(batch: int, total: int, sequences: int, width: int) -> int:
    """The same with room for what the erase leaves of v, V', of every token, which the backward on a CPU else computes
    again; a state has room for K tokens. Not where most of the last one would stay empty."""
    return kept_states(batch, total, sequences) + (batch * -(-total // width) if total >= width else 0)


def _values_at(slots: int, batch: int, total: int, sequences: int, width: int) -> int:
    """In which slot of a row of the batch V' starts; −1 where so many slots have no room for it."""
    states = kept_states(batch, total, sequences)
    return -1 if slots != kept_slots(batch, total, sequences, width) or slots == states else states // batch


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


def _problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, p=None, undecayed=False):
    """What every native function is called on, and the tensors that must live while it runs."""
    (q, q_stride), (k, k_stride), (v, v_stride) = _rows(q), _rows(k), _rows(v)
    p, p_stride = (None, (0, 0, 0, 0)) if p is None else _rows(p)
    g, beta, state = (None if x is None else _dense(x) for x in (g, beta, initial_state))
    problem = module().DeltaRule(
        (
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            optional("g", g),
            optional("beta", beta),
            optional("initial_state", state),
            optional("p", p),
        ),
        (*k.shape, *v.shape[2:]),
        (*q_stride, *k_stride, *v_stride, *p_stride),
        0 if p is None else p.shape[2],
        undecayed,
        DTYPE_CODES[v.dtype],
        _gate(g),
        () if cu_seqlens is None else sequence_bounds(cu_seqlens, v.shape[1]),
        scale,
        use_qk_l2norm,
        torch.get_num_threads(),
    )
    return problem, (q, k, v, g, beta, state, p)


def _wide(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, p=None, undecayed=False):
    """The float64 rule, and the tensors that must live while it runs."""
    *prepared, p = reference.prepared(q, k, v, g, beta, scale, use_qk_l2norm, p)
    tensors = [None if x is None else x.contiguous() for x in (*prepared, initial_state, p)]
    batch, total = v.shape[:2]
    bounds = [i * total for i in range(batch + 1)] if cu_seqlens is None else sequence_bounds(cu_seqlens, total)
    names = ("q", "k", "v", "g", "beta", "initial_state", "p")
    problem = module().DeltaRuleWide(
        [optional(name, x) for name, x in zip(names, tensors, strict=True)],
        (v.shape[2], k.shape[3], v.shape[3]),
        bounds,
        _gate(g),
        undecayed,
        torch.get_num_threads(),
    )
    return problem, tensors


def _forward_cpu(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots, *apart):
    given = (q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    o, state, checkpoints = _forward_fake(*given, slots)
    if v.dtype == torch.float64:  # keeps no states
        problem, _alive = _wide(*given, *apart)
        problem.forward(o.data_ptr(), state.data_ptr())
        return o, state, checkpoints.zero_()
    problem, _alive = _problem(*given, *apart)
    kept = (checkpoints.data_ptr() if slots else 0, slots, segment_length(v.shape[1]))
    values = _values_at(slots, *v.shape[:2], state.shape[0], k.shape[3])
    problem.forward(o.data_ptr(), state.data_ptr(), *kept, values)
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
    kept = (o.data_ptr(), final.data_ptr(), 0, 0, 1, -1)
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


def _backward_cpu(
    q, k, v, g, beta, initial_state, cu_seqlens, checkpoints, grad_o, grad_state, scale, use_qk_l2norm, *apart
):
    given = (q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    if v.dtype == torch.float64:
        return _backward_wide(given, grad_o, grad_state, apart)
    problem, _alive = _problem(*given, *apart)
    batch, total, _, width = k.shape
    if checkpoints.numel() and bool(checkpoints.flatten()[0].isinf()):  # the forward was the reference's
        checkpoints = _forward_cpu(*given, checkpoints.shape[0], *apart)[2]
    grad_o, checkpoints = grad_o.to(torch.float32).contiguous(), checkpoints.contiguous()
    per_value_head = (batch, total, v.shape[2], width)
    # Value heads that share a query and key head each write a gradient of it; their sum is taken here.
    dq, dk, *dp = (v.new_empty(per_value_head, dtype=torch.float32) for _ in (q, k, *apart[:1]))
    dv = v.new_empty(v.shape, dtype=torch.float32)
    dbeta, dg = (v.new_empty(v.shape[:3] if x is None else x.shape, dtype=torch.float32) for x in (beta, g))
    ds = grad_state.to(torch.float32).clone(memory_format=torch.contiguous_format)
    grads = (*(x.data_ptr() for x in (grad_o, dq, dk, dv, dg, dbeta, ds)), dp[0].data_ptr() if dp else 0)
    values = _values_at(checkpoints.shape[0], batch, total, grad_state.shape[0], width)
    problem.backward(checkpoints.data_ptr(), checkpoints.shape[0], segment_length(total), values, grads)
    dq, dk, *dp = (_of_heads(dx, x) for dx, x in zip((dq, dk, *dp), (q, k, *apart), strict=False))
    dg, dbeta = (_or_none(dx, x, v) for dx, x in ((dg, g), (dbeta, beta)))
    return dq, dk, dv.to(v.dtype), dg, dbeta, ds, *dp


def _of_heads(grad: Tensor, x: Tensor) -> Tensor:
    """[B, T, HV, K] -> the gradient in x, [B, T, H, K]."""
    if grad.shape[2] != x.shape[2]:
        grad = grad.unflatten(2, (x.shape[2], -1)).sum(3)
    return grad.to(x.dtype)


def _or_none(grad: Tensor | None, x: Tensor | None, v: Tensor) -> Tensor:
    """The gradient in what may be left out; empty without it."""
    return v.new_empty(0, dtype=compute_dtype(v.dtype)) if x is None or grad is None else grad.to(x.dtype)


def _backward_wide(given, grad_o, grad_state, apart):
    q, k, v, g, beta, *_, scale, use_qk_l2norm = given
    problem, tensors = _wide(*given, *apart)
    grad_o, ds = grad_o.to(v.dtype).contiguous(), grad_state.to(v.dtype).clone(memory_format=torch.contiguous_format)
    dq, dk, dv, dg, dbeta, dp = (None if x is None else torch.empty_like(x) for x in (*tensors[:5], tensors[6]))
    problem.backward([0 if x is None else x.data_ptr() for x in (grad_o, dq, dk, dv, dg, dbeta, ds, dp)])
    found = (
        reference.heads_backward(q, dq * scale, use_qk_l2norm),
        reference.heads_backward(k, dk, use_qk_l2norm),
        dv,
        _or_none(dg, g, v),
        _or_none(dbeta, beta, v),
        ds,
    )
    return found if dp is None else (*found, reference.heads_backward(apart[0], dp, use_qk_l2norm))


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


def _apart_forward_fake(q, k, v, g, beta, p, *rest):
    return _forward_fake(q, k, v, g, beta, *rest[:-2], rest[-1])


def _apart_forward_cpu(q, k, v, g, beta, p, initial_state, cu_seqlens, scale, use_qk_l2norm, undecayed, slots):
    return _forward_cpu(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots, p, undecayed)


def _apart_backward_fake(q, k, v, g, beta, p, initial_state, cu_seqlens, checkpoints, grad_o, grad_state, *constants):
    dense = [x.new_empty(x.shape) for x in (q, k, v, g, beta, p)]
    return (*dense, grad_state.new_empty(grad_state.shape, dtype=compute_dtype(v.dtype)))


def _apart_backward_cpu(q, k, v, g, beta, p, *rest):
    *found, ds, dp = _backward_cpu(q, k, v, g, beta, *rest[:-1], p, rest[-1])
    return (*found, dp, ds)


_APART = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor p, Tensor? initial_state, Tensor? cu_seqlens, "

apart_backward_op = leaf_op(
    f"delta_rule_apart_backward({_APART}Tensor checkpoints, Tensor grad_o, Tensor grad_state, float scale, "
    "bool use_qk_l2norm, bool undecayed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_apart_backward_fake,
    reference=reference.delta_rule_apart_backward,
    cpu=_apart_backward_cpu,
)


def _apart_backward(args, kept, grads, wanted):
    *tensors, scale, use_qk_l2norm, undecayed, slots = args
    v, cu_seqlens = tensors[2], tensors[7]
    if slots == 0 and v.dtype != torch.float64:
        sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        kept = apart_forward_op(*args[:-1], kept_states(v.shape[0], v.shape[1], sequences))[2:]
    found = apart_backward_op(*tensors, *kept, *grads, scale, use_qk_l2norm, undecayed)
    return (*(x if want else None for x, want in zip(found, wanted, strict=False)), None)


apart_forward_op = leaf_op(
    f"delta_rule_apart_forward({_APART}float scale, bool use_qk_l2norm, bool undecayed, SymInt slots) -> "
    "(Tensor, Tensor, Tensor)",
    fake=_apart_forward_fake,
    derivative=Derivative(
        reference=lambda args, kept: reference.delta_rule_apart_chunks(*args[:-1]),
        backward=_apart_backward,
        outputs=(0, 1),
        kept=(2,),
        fold=Fold((0,) * 7 + (ALONE,), (0, 0, 0), lambda size, options: (*options[:-1], size * options[-1])),
    ),
    reference=reference.delta_rule_apart_forward,
    cpu=_apart_forward_cpu,
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
    o, state, _ = forward_op(*inputs, cu_seqlens, scale, use_qk_l2norm, _slots(inputs, beta is not None, state_shape))
    return o, state


def _slots(inputs: tuple[Tensor | None, ...], erases: bool, state_shape: tuple[int, int, int, int]) -> int:
    """How many slots of the size of a state the forward fills for the backward of these inputs: v is the third."""
    v = inputs[2]
    if v is None or v.dtype == torch.float64 or not any(x is not None and x.requires_grad for x in inputs):
        return 0
    native = torch.compiler.is_compiling() or forced_backend() in (None, "cpu")
    sizes = (v.shape[0], v.shape[1], state_shape[0])
    return kept_slots(*sizes, state_shape[2]) if erases and v.is_cpu and native else kept_states(*sizes)


def delta_rule_apart(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor,  # [B, T, HV] or [B, T, HV, K]
    beta: Tensor,  # [B, T, HV]
    p: Tensor,  # [B, T, H or HV, K], q's dtype
    initial_state: Tensor | None,  # [N, HV, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
    scale: float,
    use_qk_l2norm: bool,
    undecayed: bool,
    state_shape: tuple[int, int, int, int],  # N, HV, K, V
) -> tuple[Tensor, Tensor]:  # [B, T, HV, V], [N, HV, K, V]
    """:func:`delta_rule` with an erase along p, which with `undecayed` reads the state before its decay."""
    inputs = (q, k, v, g, beta, p, initial_state)
    slots = _slots(inputs, True, state_shape)
    return apart_forward_op(*inputs, cu_seqlens, scale, use_qk_l2norm, undecayed, slots)[:2]


def may_decode(x: Tensor) -> bool:
    """Whether :func:`decode` is worth preparing its arguments for tokens like x."""
    return x.is_cpu and x.dtype != torch.float64 and direct() is not None


def decode(
    x: tuple[Tensor, ...],
    conv_state: tuple[Tensor, ...],
    weight: tuple[Tensor, ...],
    bias: tuple[Tensor, ...] | None,
    out_conv_state: tuple[Tensor, ...] | None,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    swish: bool,
    eps: float,
    allow_neg_eigval: bool,
    out_state: Tensor | None,
    state_indices: Tensor | None,
) -> Tensor | None:
    """:func:`pyrepr.functional.gated_delta_decode` of unchecked arguments in one native call, or ``None``: see
    `direct`."""
    native = direct()
    if native is None:
        return None
    return native.delta_rule_decode(
        x,
        conv_state,
        weight,
        bias,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        gate,
        norm_weight,
        out_conv_state,
        out_state,
        state_indices,
        eps,
        swish,
        allow_neg_eigval,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )
