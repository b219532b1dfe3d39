"""What the kernels of family `causal_conv1d` share: the names of their arguments, and the tokens before a sequence.

Nothing is specialised at launch: which values are divisible is said by UNIT, so what is launched is what was compiled.
"""

import triton
import triton.language as tl

from pyrepr.backend import triton_interprets

# The filter that every model has; the others go tap by tap.
WIDTH = 4
_INTERPRETED = tl.constexpr(triton_interprets())
ROWS_SEQ, SEQ_IDX, CU_SEQLENS = range(3)  # what says where sequences start: the index kernel's KIND

POINTERS = ("x", "weight", "bias", "initial", "position", "number", "grad", "out", "dx", "partial", "dy", "state")
POINTERS += ("sequences", "valid", "dweight", "dbias", "dinitial")

SIZES = ("xb", "xt", "xd", "B", "T", "D", "N", "S", "W", "span", "rows", "parts", "sb", "sd", "st", "steps")
SIZES += ("has_bias", "has_initial", "silu", "packed")


@triton.jit
def only_if(condition, D):
    """D, or nothing. Masks are d < only_if(…): the interpreter makes no block of a condition."""
    return tl.where(condition, D, 0)


@triton.jit
def initial_value(initial, n, place, d, D, W, mask):
    """initial [N, D, W − 1] of sequence n."""
    offset = (tl.cast(n, tl.int64) * D + d) * (W - 1) + place
    return tl.load(initial + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sigmoid(y):
    """1 / (1 + 2^(−y log₂ e)) in four instructions, about float32's accuracy: the sum is 1 or more, so neither its
    reciprocal nor the power needs the scaling that tl.sigmoid does for what is below 2⁻¹²⁶. By the hardware's tanh
    two fewer, but an error of 2⁻¹² of |y| with any sign: of y = −8 nothing is right."""
    if _INTERPRETED:  # which has no assembly
        return 1 / (1 + tl.exp2(y * -1.4426950408889634))
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 power;
        mul.ftz.f32 power, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 power, power;
        add.ftz.f32 power, power, 0f3F800000;
        rcp.approx.ftz.f32 $0, power;
        }""",
        "=f,f",
        [y],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def activation(y, silu):
    return tl.where(silu != 0, y * sigmoid(y), y)


@triton.jit
def slope(y, silu):
    s = sigmoid(y)
    return tl.where(silu != 0, s * (1 + y * (1 - s)), 1.0)
