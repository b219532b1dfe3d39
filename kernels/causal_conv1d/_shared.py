"""What the kernels of family `causal_conv1d` share: the names of their arguments, and the tokens before a sequence.

Nothing is specialised at launch: which values are divisible is said by UNIT, so what is launched is what was compiled.
"""

import triton
import triton.language as tl

# The filter that every model has; the others go tap by tap.
WIDTH = 4
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
def activation(y, silu):
    return tl.where(silu != 0, y * tl.sigmoid(y), y)


@triton.jit
def slope(y, silu):
    s = tl.sigmoid(y)
    return tl.where(silu != 0, s * (1 + y * (1 - s)), 1.0)
