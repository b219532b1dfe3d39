"""Hashed table lookups: the functions of the family `lookup`. The layers made of them are in :mod:`pyrepr.nn`.

Ding et al. 2024, "MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers", arXiv 2411.12992.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from pyrepr._checks import (
    DTYPES,
    check_device,
    check_is_tensor,
    check_memory,
    check_shape,
    check_tensor,
    name_of,
    shape_of,
    shown,
)
from pyrepr.ops import lookup as ops
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.lookup import HASHES, TILE, WEIGHTINGS, pack, sizes

__all__ = ["hash_codes", "lookup_linear", "lookup_sum", "pack_tables", "segment_sum"]

MAX_BITS = 16
_tracing = torch._C._get_tracing_state


def _check_float(name: str, x: object, least_dim: int, shape: str) -> Tensor:
    x = check_tensor(name, x)
    if x.dim() < least_dim:
        raise ValueError(f"{name} must have shape {shape}, got {shape_of(x)}")
    return x


def _traced_sizes(tables: Tensor) -> tuple[int, ...]:
    """Those of tables as the plain numbers that `torch.jit.trace` hides: they are the same whenever the trace runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(map(int, sizes(tables)))


def check_bits(bits: int) -> int:
    """Returns `bits` if tables of 2^bits rows can be indexed; raises TypeError or ValueError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an int from 1 to {MAX_BITS}, got {type(bits).__name__}")
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from 1 to {MAX_BITS}, got {bits}")
    return bits


def check_weighting(weighting: str, temperature: float) -> None:
    """Raises ValueError for an unknown weighting, or a temperature that is not positive and finite."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {shown(weighting)}")
    if not 0 < temperature < math.inf:  # not math.isfinite, which torch.compile cannot trace for symbolic numbers
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_hash(hash: str, bits: int) -> int:
    """Returns the elements of a chunk; raises ValueError for an unknown hash, or an odd number of bits for two."""
    if hash not in HASHES:
        raise ValueError(f"hash must be one of {', '.join(HASHES)}, got {shown(hash)}")
    if bits % HASHES[hash]:
        raise ValueError(f"bits must be even with the {hash} hash, got {bits}")
    return bits // HASHES[hash]


def check_converted(
    x: Tensor, h: int, centre: Tensor | None, scale: Tensor | None, down: Tensor | None, up: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a converted layer has beside its tables."""
    d = x.shape[-1]
    rank = down.shape[0] if isinstance(down, Tensor) and down.dim() else 0
    shapes = {"centre": ("[d]", (d,)), "scale": ("[d]", (d,)), "down": ("[rank, d]", (rank, d))}
    shapes["up"] = ("[rank, h]", (rank, h))
    given = {"centre": centre, "scale": scale, "down": down, "up": up}
    for one, other in (("centre", "scale"), ("scale", "centre"), ("down", "up"), ("up", "down")):
        if given[one] is not None and given[other] is None:
            raise ValueError(f"{one} and {other} go together, got {one} alone")
    for name, tensor in given.items():
        if tensor is None:
            continue
        check_shape(name, check_tensor(name, tensor), *shapes[name])
        check_device(name, tensor, "x", x)
        if tensor.dtype == torch.float64 and x.dtype != torch.float64:
            raise TypeError(f"{name} must be float64 only where x is, got {name_of(x.dtype)} x")
    return centre, scale, down, up


def _check_tables(tables: object, scales: Tensor | None) -> Tensor:
    tables = check_tensor("tables", tables, (*DTYPES, torch.int8))
    packed = tables.dim() == 4 and tables.shape[3] == TILE
    if tables.dim() != 3 and not packed:
        raise ValueError(f"tables must have shape [K, n, h], or be packed by pack_tables, got {shape_of(tables)}")
    if packed and tables.requires_grad:
        raise ValueError("packed tables are for inference: they must not require a gradient")
    if (tables.dtype == torch.int8) != (scales is not None):
        came = "no scales" if scales is None else f"scales with {name_of(tables.dtype)} tables"
        raise ValueError(f"int8 tables, and only they, need scales of shape [K, n], got {came}")
    if scales is not None:
        k, n, _ = sizes(tables)
        check_shape("scales", check_tensor("scales", scales, (torch.float32,)), "[K, n]", (k, n))
        check_device("scales", scales, "tables", tables)
    return tables


def _check_precision(name: str, x: Tensor, tables: Tensor) -> None:
    """float64 goes with float64: nothing may be rounded to float32 behind the caller's back."""
    if (x.dtype == torch.float64) != (tables.dtype == torch.float64):
        raise TypeError(
            f"{name} and tables must both be float64 or neither, got {name_of(x.dtype)} and {name_of(tables.dtype)}"
        )


def _check_codes(codes: object, n: int) -> Tensor:
    """codes as int32; what does not fit stays out of range, so that the kernels refuse it."""
    codes = check_is_tensor("codes", codes)
    if codes.layout is not torch.strided:
        raise TypeError(f"codes must be a dense tensor, got layout {str(codes.layout).removeprefix('torch.')}")
    if codes.dtype in (torch.bool, torch.uint64) or codes.is_floating_point() or codes.is_complex():
        raise TypeError(f"codes must have an integer dtype, got {name_of(codes.dtype)}")
    check_memory("codes", codes)
    if codes.dtype in (torch.int64, torch.uint32):
        limits = torch.iinfo(torch.int32)
        codes = codes.long().clamp(limits.min, max(n, limits.max))
    return codes.to(torch.int32)


def hash_codes(x: Tensor, bits: int, *, hash: str = "one_bit") -> Tensor:
    """The bits of every chunk of x as one integer; bit 0 is of the chunk's first element.

    Args:
        x: [..., d], d a multiple of the elements of a chunk. float32, float64, bfloat16 or float16.
        bits: τ, from 1 to 16.
        hash: ``"one_bit"`` (default): the sign of each of `bits` elements; 0 and −0 count as positive (bit 1), NaN as
            negative (bit 0). ``"two_bit"``: of each of bits / 2 elements the sign, then whether |x| ≥ 1 (NaN: no).

    Returns:
        [..., K] int32, from 0 to 2^bits − 1, for K chunks.

    Raises:
        ValueError: if `bits` is out of range, odd with two bits an element, or d is no multiple of a chunk's elements.
        TypeError: if x is not a floating-point tensor.

    Example:
        >>> pyrepr.hash_codes(torch.tensor([[1.0, -1.0, 1.0, 1.0]]), bits=2).tolist()
        [[1, 3]]
    """
    _check_float("x", x, 1, "[..., d]")
    width, d = check_hash(hash, check_bits(bits)), x.shape[-1]
    if d % width:
        of = "bits" if width == bits else "bits / 2"
        raise ValueError(f"x must have a last axis that is a multiple of {of} = {width}, got {d}")
    codes, _ = ops.hash_op(x.detach().reshape(math.prod(x.shape[:-1]), d), bits, "none", 1.0, hash)
    return codes.reshape(*x.shape[:-1], d // width)


def pack_tables(tables: Tensor) -> Tensor:
    """Tables in the order in which many tokens read them: [K, n, h] -> [h / 64, K, n, 64], for inference.

    :func:`lookup_linear` and :func:`lookup_sum` take the result in place of the tables, and give the same bits. It pays
    from about as many tokens on as a table has rows: many tokens copy plain tables into this order, tile by tile, on
    every call. A few tokens are faster on plain tables, whose rows stand in one piece.

    Raises:
        ValueError: if h is no multiple of 64, or tables has not three axes.

    Example:
        >>> pyrepr.pack_tables(torch.randn(8, 256, 128)).shape
        torch.Size([2, 8, 256, 64])
    """
    if not isinstance(tables, Tensor) or tables.dim() != 3 or tables.shape[2] % TILE:
        came = shape_of(tables) if isinstance(tables, Tensor) else type(tables).__name__
        raise ValueError(f"tables must have shape [K, n, h], h a multiple of {TILE}, got {came}")
    packed = pack(tables.detach())
    ops.to_huge_pages(packed)
    return packed


def lookup_linear(
    x: Tensor,
    tables: Tensor,
    bias: Tensor | None = None,
    *,
    weighting: str = "probability",
    temperature: float = 1.0,
    scales: Tensor | None = None,
    sparse: bool = False,
    hash: str = "one_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """A linear layer's replacement: bias + Σ_k w(z_k) · tables[k, h(z_k)] over the K chunks z_k of z.

    z is x, or (x − centre) · scale where these are given. With `down` and `up` a dense map of low rank stands beside
    the tables, which then get what it leaves of x: inner = x · downᵀ, z = (x − inner · down − centre) · scale, and
    inner · up is added to the result. On the CPU all of it is one native call.

    Hash, weight, gather and bias in one pass. Gradients to x, tables, bias, down and up; the one to x flows through w
    (and the dense map) only, because a code has no derivative: the result jumps where an element of z changes sign,
    and with two bits where it crosses 1 or −1. Differentiable any number
    of times, forward and reverse, and under ``torch.func``: first derivatives in reverse run on the kernels, forward
    mode and higher orders in plain PyTorch, with memory for the [..., K, h] rows that were read. ``vmap`` over x
    becomes part of the tokens; over tables, or for a gradient of tables for each entry, it loops.

    Args:
        x: [..., d], float32, float64, bfloat16 or float16. NaN in a chunk makes the token's result NaN, ±inf counts as
            a sign and as a size.
        tables: [K, 2^bits, h], d = K · bits, or K · bits / 2 with two bits an element. float32, bfloat16, float16, or
            int8 with `scales`; float64 for float64 x.
            Need not be of the dtype of x. Only contiguous tables are read in place. Or, for inference, what
            :func:`pack_tables` made of them. With int8 tables and many tokens the weights are rounded to 16 bits of the
            token's largest one on some processors: 1e-5 of the result, where int8 itself costs 7e-3.
        bias: [h], optional.
        weighting: ``"probability"`` (default, the paper): Π σ(2|z_i|/t). ``"scaled"`` (its released code): that times
            Σ|z_i|. ``"l1"``: the mean of |z_i|, what suits linear layers converted with one bit. ``"none"``: 1.
        temperature: t of the first two; 1.0 as in the paper.
        scales: [K, 2^bits] float32, what the rows of int8 tables are multiplied with. No derivative: to ask for
            one is an error. int8 tables have none either.
        sparse: the gradient of tables as a sparse tensor of the rows that were read, for ``torch.optim.SparseAdam`` and
            ``torch.optim.SGD``. A dense one is the default since it works with every optimizer. Eager mode only; to
            differentiate a sparse gradient again is an error.
        hash: ``"one_bit"`` (default): a chunk is `bits` elements, and their signs are its code. ``"two_bit"``: it is
            bits / 2 elements, and each gives its sign and whether |z_i| ≥ 1: four levels of a standardised input.
        centre, scale: [d], both or neither. Constants: to ask for their derivative is an error.
        down, up: [rank, d] and [rank, h], both or neither.

    Returns:
        [..., h] in the dtype of x, summed in float32 (float64 for float64). Autocast changes nothing: there is no
        matrix product to speed up. The same bits on any number of threads.

    Raises:
        ValueError: for shapes that do not fit together, int8 tables without scales, an odd number of bits for two bits
            an element, one of two arguments that go together, or tensors on several devices.
        TypeError: for a dtype that is not listed above.

    Example:
        >>> x, tables = torch.randn(5, 64), torch.randn(8, 256, 32)
        >>> pyrepr.lookup_linear(x, tables).shape
        torch.Size([5, 32])
    """
    converted = (centre, scale, down, up)
    done = ops.lookup_linear_direct(x, tables, scales, bias, converted, weighting, temperature, hash)
    if done is not None:
        return done
    _check_float("x", x, 1, "[..., d]")
    _check_tables(tables, scales)
    check_weighting(weighting, temperature)
    _check_precision("x", x, tables)
    check_device("tables", tables, "x", x)
    k, n, h = sizes(tables) if _tracing() is None else _traced_sizes(tables)
    bits = n.bit_length() - 1
    if not 1 <= bits <= MAX_BITS or n != 1 << bits:
        raise ValueError(f"tables must have 2^bits rows, bits from 1 to {MAX_BITS}, got shape {shape_of(tables)}")
    width = check_hash(hash, bits)
    if x.shape[-1] != k * width:
        of = "bits" if width == bits else "bits / 2"
        raise ValueError(
            f"x must have a last axis of K · {of} = {k} · {width} = {k * width} for tables {shape_of(tables)}, "
            f"got {x.shape[-1]}"
        )
    check_converted(x, h, *converted)
    if bias is not None:
        _check_float("bias", bias, 1, "[h]")
        check_shape("bias", bias, "[h]", (h,))
        check_device("bias", bias, "x", x)
    options = (converted, weighting, temperature, sparse, hash)
    if x.dim() == 2:
        return ops.lookup_linear(x, tables, scales, bias, *options)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = ops.lookup_linear(flat, tables, scales, bias, *options)
    return out.reshape(*x.shape[:-1], h)


def lookup_sum(
    codes: Tensor, weights: Tensor, tables: Tensor, *, scales: Tensor | None = None, sparse: bool = False
) -> Tensor:
    """Σ_k weights[..., k] · tables[k, codes[..., k]]; the adjoint of :func:`segment_sum`.

    Args:
        codes: [..., K] integers from 0 to n − 1.
        weights: [..., K], a float dtype (float64 with float64 tables only).
        tables: [K, n, h], any n; dtypes and `scales` [K, n] as in :func:`lookup_linear`.
        sparse: see :func:`lookup_linear`.

    Returns:
        [..., h], float32 (float64 for float64). Gradients to weights and tables, of any order as in
        :func:`lookup_linear`.

    Raises:
        ValueError: for shapes that do not fit together. IndexError: for a code outside 0 … n − 1. TypeError: for
            dtypes.

    Example:
        >>> codes, weights = torch.randint(0, 256, (5, 8)), torch.rand(5, 8)
        >>> pyrepr.lookup_sum(codes, weights, torch.randn(8, 256, 32)).shape
        torch.Size([5, 32])
    """
    _check_tables(tables, scales)
    k, n, h = sizes(tables)
    _check_float("weights", weights, 1, "[..., K]")
    _check_precision("weights", weights, tables)
    codes = _check_codes(codes, n)
    if codes.dim() < 1 or codes.shape[-1] != k:
        raise ValueError(f"codes must have shape [..., K] with K = {k}, got {shape_of(codes)}")
    if weights.shape != codes.shape:
        raise ValueError(f"weights must have the shape of codes, {shape_of(codes)}, got {shape_of(weights)}")
    check_device("codes", codes, "tables", tables)
    check_device("weights", weights, "tables", tables)
    count = math.prod(codes.shape[:-1])
    flat = weights.to(compute_dtype(weights.dtype)).reshape(count, k)
    out = ops.lookup_sum(codes.reshape(count, k), flat, tables, scales, sparse)
    return out.reshape(*codes.shape[:-1], h)


def segment_sum(values: Tensor, codes: Tensor, n: int, *, weights: Tensor | None = None) -> Tensor:
    """Sums of rows by code: out[k, c] = Σ weights[..., k] · values[...] over the rows with codes[..., k] = c.

    The adjoint of :func:`lookup_sum`, and with one code a row: class sums, centroids, bags of visual words. The order
    of summation is the order of the rows, so the result has the same bits on any number of threads.

    Args:
        values: [..., h], a float dtype.
        codes: [..., K] integers from 0 to n − 1, or [...] for one code a row.
        n: number of segments, at least 1.
        weights: the shape of codes; ones if left out.

    Returns:
        [K, n, h], or [n, h] for one code a row; float32 (float64 for float64). Gradients to values and weights, of any
        order as in :func:`lookup_linear`.

    Raises:
        ValueError: for shapes that do not fit together. IndexError: for a code outside 0 … n − 1. TypeError: for
            dtypes.

    Example:
        >>> values, codes = torch.ones(3, 2), torch.tensor([[0], [1], [0]])
        >>> pyrepr.segment_sum(values, codes, 2).tolist()
        [[[2.0, 2.0], [1.0, 1.0]]]
    """
    _check_float("values", values, 1, "[..., h]")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a positive int, got {shown(n)}")
    codes = _check_codes(codes, n)
    check_device("codes", codes, "values", values)
    single = codes.shape == values.shape[:-1]
    if not single and codes.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"codes must have shape [..., K] or [...] for values {shape_of(values)}, got {shape_of(codes)}"
        )
    count, k = math.prod(values.shape[:-1]), 1 if single else codes.shape[-1]
    dtype = compute_dtype(values.dtype)
    if weights is None:
        weights = torch.ones((), dtype=dtype, device=values.device).expand(codes.shape)
    _check_float("weights", weights, 0, "of codes")
    if weights.shape != codes.shape:
        raise ValueError(f"weights must have the shape of codes, {shape_of(codes)}, got {shape_of(weights)}")
    check_device("weights", weights, "values", values)
    flat = values.to(dtype).reshape(count, values.shape[-1])
    out = ops.segment_sum(flat, codes.reshape(count, k), weights.to(dtype).reshape(count, k), n)
    return out[0] if single else out
