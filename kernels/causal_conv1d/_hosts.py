"""Family `causal_conv1d` in Triton: the leaf ops of ``pyrepr/ops/causal_conv1d.py`` on the GPU. Maths and names as in
csrc/cpu/causal_conv1d.h; sums are float32, in one order, without atomics: the same bits every time.

What each kernel moves and computes at best, s being the bytes of an element:

- forward (W = 4): 2 s bytes an element, x once and out once. A program owns BLOCK_D channels of a span of tokens and
  walks down it with the last W − 1 tokens in registers, so an element is loaded once, but for the W − 1 tokens before a
  span (9 % of a span of 32, from L2). The bound is memory: in 16 bits an H100's 3.3 TB/s are 3.7 elements a cycle and
  multiprocessor, at about 23 instructions an element 66 % of the 128 there are. A B200's 8 TB/s would take more than
  there are: there the instructions are the bound. Where x is dense in the channels a thread has 16 bytes of them, and
  ROWS such loads in flight. Where it is dense in the tokens (`turned`) a thread has one channel and loads 16 bytes of
  its tokens; lines of x are used up from L1, and a warp stores 32 neighbouring channels.
- backward (W = 4): 3 s bytes: x, the gradient and dx; out is computed again. The same walk: dy = grad · silu'(y) is
  kept for W − 1 tokens, dx follows W − 1 tokens behind and past the end of the span, and the sums of the weights'
  gradients stay in registers until a span ends: 4 (W + 1) bytes a channel and span, 5 % of the rest for 16 bits and a
  span of 64. `sums` adds the spans up in their order.
- wide_* (any other W): every tap reads its own tokens, W s bytes an element out of L1 for 2 s from memory. Backward
  goes through dy in float32; the gradient of each tap reads it again. x is made dense first.
- index (packed): the number of its sequence and its place in it, for every token: 8 bytes, read D / BLOCK_D times.
- initial_gradient: the dx that fall before a sequence: W − 1 numbers a channel and sequence, out is computed again.
- update: one thread a channel, so that the state can move in its place: 2 S s + 2 T s bytes a channel.

x whose rows do not start at multiples of 16 bytes is read element by element if it is dense in the channels; any other
x is copied first. float64 is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from pyrepr.kernels._launch import F32, FLOATS, Config, Variant, architecture, assert_bounds, launch
from pyrepr.kernels.causal_conv1d import _variants as table
from pyrepr.kernels.causal_conv1d._shared import CU_SEQLENS, ROWS_SEQ, SEQ_IDX, WIDTH
from torch import Tensor

from pyrepr.backend import Unsupported

# Programs to aim for, a warp each: 16 on every multiprocessor of an A100, H100, B200. Not asked of the device, so that
# two devices of a kind give the same bits.
PROGRAMS = {80: 1728, 90: 2112, 100: 2368}

SHORTEST, LONGEST = 32, 256  # tokens of a span; ROWS divides the shortest

# Of a size or stride: they are 32-bit in the kernels, offsets are 64-bit.
LARGEST = 2**31 - 2**10


def _refuse(x: Tensor, *sizes: int) -> None:
    if x.dtype not in FLOATS:
        raise Unsupported(f"backend 'triton' computes causal_conv1d in float32 and refuses {x.dtype} tensors")
    if (largest := max(sizes, default=0)) > LARGEST:
        raise Unsupported(f"backend 'triton' takes sizes and strides of causal_conv1d up to {LARGEST}, got {largest}")


def _like(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


class Problem:
    """The inputs as the kernels take them, and where their sequences stand."""

    def __init__(
        self,
        x: Tensor,  # [B, T, D]
        weight: Tensor,  # [D, W]
        bias: Tensor | None,  # [D]
        initial_states: Tensor | None,  # [N, D, W − 1]
        seq_idx: Tensor | None,  # [B, T]
        cu_seqlens: Tensor | None,  # [N + 1]
        silu: bool,
        any_weight: bool = False,  # whether it may stay in x's dtype
    ) -> None:
        self.B, self.T, self.D = x.shape
        self.W, self.device, self.dtype = weight.shape[1], x.device, x.dtype
        self.layout, self.x = self._laid_out(x)
        wanted = x.dtype if any_weight and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype) else F32
        self.weight, self.bias, self.initial = (
            _like(weight, wanted),
            _like(bias, wanted),
            _like(initial_states, x.dtype),
        )
        if self.initial is not None and self.initial.numel() == 0:
            self.initial = None
        strides = tuple(
            0 if size == 1 and axis < 2 else stride
            for axis, (size, stride) in enumerate(zip(x.shape, self.x.stride(), strict=True))
        )
        self.N = self.B if cu_seqlens is None else cu_seqlens.numel() - 1
        _refuse(x, *strides, self.B * self.T, self.D, self.D * self.W, self.N)
        self.packed = seq_idx is not None or cu_seqlens is not None
        self.sequences = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        self.arguments: dict[str, Any] = {
            **dict(x=self.x, weight=self.weight, T=self.T, D=self.D, W=self.W, rows=self.B * self.T, silu=int(silu)),
            **dict(zip(("xb", "xt", "xd"), strides, strict=True)),
            **dict(bias=self.weight if bias is None else self.bias, has_bias=int(bias is not None)),
            **dict(initial=self.x if self.initial is None else self.initial),
            **dict(has_initial=int(self.initial is not None), N=self.N, packed=int(cu_seqlens is not None)),
        }
        self.position = self.number = self.new(0, dtype=torch.int32)
        if self.packed or self.W != WIDTH:
            self._find_places(None if seq_idx is None else seq_idx.contiguous())
        self.arguments |= {"position": self.position, "number": self.number}

    def _laid_out(self, x: Tensor) -> tuple[str, Tensor]:
        """Its layout, and x itself or a copy that is dense in the channels."""
        unit = 16 // x.element_size()

        def aligned(dense: int) -> bool:
            others = (x.stride(i) for i in range(3) if i != dense and x.shape[i] > 1)
            return x.data_ptr() % 16 == 0 and all(n % unit == 0 for n in (x.shape[dense], *others))

        if x.stride(2) != 1 and x.shape[2] > 1:
            if x.stride(1) == 1 and self.W == WIDTH and aligned(1):
                return "turned", x
            x = x.contiguous()
        if self.W != WIDTH:
            x = x.contiguous()
        return "dense" if aligned(2) else "odd", x

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _find_places(self, seq_idx: Tensor | None) -> None:
        kind = ROWS_SEQ if not self.packed else CU_SEQLENS if seq_idx is None else SEQ_IDX
        self.position, self.number = (self.new(self.B, self.T, dtype=torch.int32) for _ in range(2))
        valid = self.new(1, dtype=torch.bool)
        sequences = (self.new(0, dtype=torch.int64), seq_idx, self.sequences)[kind]
        outputs = {"position": self.position, "number": self.number, "valid": valid}

        def run(config: Config) -> None:
            # cu_seqlens are also looked at where there are no tokens.
            programs = max(int(kind == CU_SEQLENS), triton.cdiv(self.B * self.T, config.blocks["BLOCK"]))
            variant = table.index_variant(config, kind, sequences.dtype)
            self.launch(variant, programs, sequences=sequences, steps=self.N.bit_length(), **outputs)

        table.INDEX.run(self.device, run, (kind,))
        if kind == CU_SEQLENS:
            assert_bounds(valid, self.T)

    def launch(self, variant: Variant, programs: int, **more: Any) -> None:
        own = {**self.arguments, **more}
        launch(variant, (programs,), {name: own[name] for name in variant.signature}, self.device)

    def span(self, blocks: int) -> int:
        """Tokens a program walks, so that there are enough programs; a multiple of the shortest."""
        wanted = self.T * self.B * blocks // PROGRAMS[architecture(self.device)] // SHORTEST * SHORTEST
        return max(SHORTEST, min(LONGEST, wanted))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:  # [B, T, D]
    """The leaf op causal_conv1d_forward."""
    p = Problem(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, any_weight=weight.shape[1] == WIDTH)
    out = p.new(*x.shape)
    if out.numel() == 0:
        return out
    if p.W != WIDTH:
        _wide(p, None, out)
        return out

    def run(config: Config) -> None:
        blocks = triton.cdiv(p.D, config.blocks["BLOCK_D"])
        span = p.span(blocks)
        variant = table.forward_variant(config, p.layout, p.dtype, p.weight.dtype, p.packed)
        p.launch(variant, blocks * p.B * triton.cdiv(p.T, span), out=out, span=span)

    table.FORWARD[p.layout, p.dtype.itemsize].run(p.device, run, (p.dtype, p.packed, p.T * p.B, p.D))
    return out


def _wide(p: Problem, grad: Tensor | None, out: Tensor) -> None:
    def run(config: Config) -> None:
        programs = triton.cdiv(p.D, config.blocks["BLOCK_D"]) * triton.cdiv(p.B * p.T, config.blocks["BLOCK_T"])
        p.launch(table.wide_variant(config, p.dtype, grad is not None), programs, grad=grad, out=out)

    table.WIDE.run(p.device, run, (p.dtype, grad is not None))


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    grad: Tensor,  # [B, T, D]
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The leaf op causal_conv1d_backward."""
    p = Problem(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu)
    dx = p.new(*x.shape)
    grad = grad.to(x.dtype).contiguous()
    if grad.data_ptr() % 16:
        grad = grad.clone()
    if dx.numel() == 0:
        partial = p.new(0, p.W + 1, p.D, dtype=F32)
    else:
        partial = (_walk_back if p.W == WIDTH else _wide_back)(p, grad, dx)
    dweight, dbias = _sums(p, partial, weight.dtype, None if bias is None else bias.dtype)
    return dx, dweight, dbias, _initial_gradient(p, grad, initial_states)


def _walk_back(p: Problem, grad: Tensor, dx: Tensor) -> Tensor:
    """Writes dx; [spans, W + 1, D]."""

    def run(config: Config) -> Tensor:
        blocks = triton.cdiv(p.D, config.blocks["BLOCK_D"])
        span = p.span(blocks)
        parts = p.B * triton.cdiv(p.T, span)
        partial = p.new(parts, p.W + 1, p.D, dtype=F32)
        variant = table.backward_variant(config, p.layout, p.dtype, p.packed)
        p.launch(variant, blocks * parts, grad=grad, dx=dx, partial=partial, span=span)
        return partial

    return table.BACKWARD[p.layout, p.dtype.itemsize].run(p.device, run, (p.dtype, p.packed, p.T * p.B, p.D))


def _wide_back(p: Problem, grad: Tensor, dx: Tensor) -> Tensor:
    dy = p.new(*dx.shape, dtype=F32)
    _wide(p, grad, dy)

    def run_input(config: Config) -> None:
        programs = triton.cdiv(p.D, config.blocks["BLOCK_D"]) * triton.cdiv(p.B * p.T, config.blocks["BLOCK_T"])
        p.launch(table.wide_input_variant(config, p.dtype), programs, dy=dy, dx=dx)

    def run_weight(config: Config) -> Tensor:
        blocks = triton.cdiv(p.D, config.blocks["BLOCK_D"]) * (p.W + 1)
        span = p.span(blocks)
        parts = triton.cdiv(p.B * p.T, span)
        partial = p.new(parts, p.W + 1, p.D, dtype=F32)
        p.launch(table.wide_weight_variant(config, p.dtype), blocks * parts, dy=dy, partial=partial, span=span)
        return partial

    table.WIDE_INPUT.run(p.device, run_input, (p.dtype,))
    return table.WIDE_WEIGHT.run(p.device, run_weight, (p.dtype,))


def _sums(p: Problem, partial: Tensor, weight: torch.dtype, bias: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias (empty without one) from those of the spans."""
    kind = weight if weight in FLOATS and bias in (None, weight) else F32
    dweight = p.new(p.D, p.W, dtype=kind)
    dbias = p.new(0 if bias is None else p.D, dtype=kind)

    def run(config: Config) -> None:
        programs = triton.cdiv((p.W + 1) * p.D, config.blocks["BLOCK"])
        outputs = {"dweight": dweight, "dbias": dbias, "parts": partial.shape[0], "has_bias": int(bias is not None)}
        p.launch(table.sums_variant(config, kind), programs, partial=partial, **outputs)

    table.SUMS.run(p.device, run, (partial.shape[0],))
    return dweight.to(weight), dbias if bias is None else dbias.to(bias)


def _initial_gradient(p: Problem, grad: Tensor, initial_states: Tensor | None) -> Tensor:
    if initial_states is None:
        return p.new(0, dtype=F32)
    dinitial = p.new(*initial_states.shape, dtype=F32)
    if dinitial.numel():
        bounds = p.new(0, dtype=torch.int64) if p.sequences is None else p.sequences

        def run(config: Config) -> None:
            programs = triton.cdiv(p.D, config.blocks["BLOCK_D"]) * p.N * (p.W - 1)
            p.launch(
                table.initial_gradient_variant(config, p.dtype),
                programs,
                grad=grad,
                dinitial=dinitial,
                sequences=bounds,
            )

        table.INITIAL_GRADIENT.run(p.device, run, (p.dtype,))
    return dinitial.to(initial_states.dtype)


def update_(conv_state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:  # [B, T, D]
    """The leaf op causal_conv1d_update_."""
    B, T, D = x.shape
    S = conv_state.shape[2]
    _refuse(x, *x.stride(), *conv_state.stride(), B, T, D, S, weight.numel())
    kind = x.dtype if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype) else F32
    weight, bias, out = _like(weight, kind), _like(bias, kind), x.new_empty(x.shape)
    strides = dict(zip(("xb", "xt", "xd", "sb", "sd", "st"), (*x.stride(), *conv_state.stride()), strict=True))
    arguments = {"state": conv_state, "x": x, "weight": weight, "out": out, "T": T, "D": D, "S": S, **strides}
    arguments |= {"W": weight.shape[1], "bias": weight if bias is None else bias}
    arguments |= {"has_bias": int(bias is not None), "silu": int(silu)}
    # The state is written in place, so a search could not repeat it.
    config = table.UPDATE.rows[architecture(x.device)]
    programs = B * triton.cdiv(D, config.blocks["BLOCK_D"]) if T else 0
    launch(table.update_variant(config, x.dtype, kind), (programs,), arguments, x.device)
    return out
