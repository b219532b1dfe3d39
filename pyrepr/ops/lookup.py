"""Family `lookup`: the leaf ops, their implementations, and the differentiable functions on top.

Tokens are flattened to T rows here: x [T, d], codes [T, K] int32, weights [T, K], tables [K, n, h], out [T, h]. Sums
are in float32, in float64 for float64. The maths is in ``csrc/cpu/lookup.h`` and ``pyrepr/reference/lookup.py``.

With w the weights, c the codes and g the gradient of out, everything is one of three maps, linear in each argument:
sum Σ_k w T[k, c] -> [T, h]; segments Σ_t w g by code -> [K, n, h]; dots ⟨g, T[k, c]⟩ -> [T, K]. Each derivative of one
is another. `sparse` asks for the gradient of tables as a sparse tensor; nothing else reads it.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from pyrepr.backend import Unsupported, forced_backend, native
from pyrepr.ops._differentiable import SHARED, Derivative, Fold
from pyrepr.ops._leaf import leaf_op
from pyrepr.ops._native import DTYPE_CODES, direct, matrix, module, optional
from pyrepr.reference import lookup as reference
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.lookup import HASHES, WEIGHTINGS, sizes, unpack, without_low_rank

# A table's storage type as csrc/cpu/lookup.h numbers it.
TABLE_CODES = {**DTYPE_CODES, torch.int8: 4}

# Which forward kernel runs: by size; token by token (few tokens); each table once (many tokens); in registers (int8
# tables of at most 16 rows) or token by token as bytes (int8 tables), both where the instruction set has products of
# bytes. One that cannot run gives way to another.
ROUTES = {"auto": 0, "rows": 1, "stream": 2, "registers": 3, "bytes": 4}

WEIGHTING_CODES = {name: code for code, name in enumerate(WEIGHTINGS)}

# More tokens than these read most rows more than once: left alone, `lookup_linear` then goes on to the Triton kernels.
CUDA_TOKENS = 64


def _tables(tables: Tensor, scales: Tensor | None):
    scales_address = optional("scales", scales)
    code, packed = TABLE_CODES[tables.dtype], tables.dim() == 4
    return module().LookupTables(
        tables.data_ptr(), code, scales_address, *sizes(tables), packed, torch.get_num_threads()
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def to_huge_pages(tables: Tensor) -> bool:
    """Has the system hold large CPU tables in huge pages, in place: gathers from small ones wait for the page table.

    Values and address stay. False where there is nothing to gain or the system refused.
    """
    loaded, _ = native()
    if loaded is None or tables.device.type != "cpu" or not tables.is_contiguous():
        return False
    return loaded.huge_pages(tables.data_ptr(), tables.numel() * tables.element_size())


def rows_contiguous(x: Tensor) -> Tensor:
    """x as it is if its rows are contiguous, whatever lies between them."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.contiguous() if x.numel() else x.new_empty(x.shape)  # an empty tensor is contiguous with any strides


def _triton(function: str, count: int | None = None):
    """A Triton implementation by name, imported when it is first called, of the first `count` arguments. Packed tables
    are the CPU kernels' order."""

    def run(*args):
        plain = (unpack(x) if isinstance(x, Tensor) and x.dim() == 4 else x for x in args[:count])
        return getattr(importlib.import_module("pyrepr.kernels.lookup"), function)(*plain)

    return run


def wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What kernels read as it is: contiguous, in the compute dtype."""
    return x if x is None else x.to(dtype).contiguous()


def _hash_arguments(x, bits, weighting, temperature, hash, centre, scale):
    """What the native functions want to know of a hash of x, and the tensors whose addresses are among it."""
    held = x, centre, scale = (rows_contiguous(x), *(wide(t, compute_dtype(x.dtype)) for t in (centre, scale)))
    options = (bits, WEIGHTING_CODES[weighting], temperature, HASHES[hash])
    return (matrix(x), DTYPE_CODES[x.dtype], *options, optional("centre", centre), optional("scale", scale)), held


def _hash_fake(x, bits, weighting, temperature, hash="one_bit", centre=None, scale=None):
    shape = (x.shape[0], x.shape[1] * HASHES[hash] // bits)
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=compute_dtype(x.dtype))


def _hash_cpu(x, bits, weighting, temperature, hash="one_bit", centre=None, scale=None):
    codes, weights = _hash_fake(x, bits, weighting, temperature, hash)
    arguments, held = _hash_arguments(x, bits, weighting, temperature, hash, centre, scale)
    module().lookup_hash(*arguments, codes.data_ptr(), weights.data_ptr(), torch.get_num_threads())
    del held
    return codes, weights


hash_op = leaf_op(
    "lookup_hash(Tensor x, int bits, str weighting, float temperature, str hash='one_bit', Tensor? centre=None, "
    "Tensor? scale=None) -> (Tensor, Tensor)",
    fake=_hash_fake,
    reference=reference.hash_op,
    cpu=_hash_cpu,
    triton=_triton("hashed"),
)


def _table_gradient(grad, codes, weights, tables, scales, sparse, want_tables, want_dots):
    """(gradient of the tables or None, dots or None); the former as sparse COO over its rows under `sparse`."""
    k, n, h = sizes(tables)
    if want_dots and tables.dim() == 4:
        tables = unpack(tables)
    rows = None
    if want_tables and sparse:
        rows = (codes.long() + n * torch.arange(k, device=codes.device)).unique()
    read = tables if want_dots else None
    scales, dtype = scales if want_dots else None, tables.dtype if want_tables else None
    segments, dots = backward_op(grad, codes, weights, read, scales, n, rows, want_tables, dtype)
    if not want_tables:
        return None, dots
    if rows is None:
        return segments.view(k, n, h), dots
    indices = torch.stack([rows // n, rows % n])
    return torch.sparse_coo_tensor(indices, segments, (k, n, h), is_coalesced=True, check_invariants=False), dots


def _linear_backward(args, kept, grads, wanted):
    x, tables, scales, bias, weighting, temperature, _, sparse, hash = args
    (grad,), (want_x, want_tables, _, want_bias) = grads, wanted
    grad = _widened(grad, x)
    hashing = (weighting, temperature, hash, None, None)
    grad_x, grad_tables = _lookup_gradients(x, grad, tables, scales, sparse, hashing, want_x, want_tables)
    return grad_x, grad_tables, None, _bias_gradient(grad, x, bias) if want_bias else None


def _widened(grad, x):
    """The gradient as the kernels take it: those of GPUs read fewer bytes and widen them themselves."""
    return grad if grad.is_cuda else grad.to(compute_dtype(x.dtype))


def _bias_gradient(grad, x, bias):
    return grad.sum(0, dtype=compute_dtype(x.dtype)).to(bias.dtype)


def _lookup_gradients(x, grad, tables, scales, sparse, hashing, want_x, want_tables):
    """Those of x and tables. Hashes x again: that costs less than keeping codes and weights."""
    if not want_x and not want_tables:
        return None, None
    bits = sizes(tables)[1].bit_length() - 1
    codes, weights = hash_op(x, bits, *hashing)
    grad_tables, dots = _table_gradient(grad, codes, weights, tables, scales, sparse, want_tables, want_x)
    return hash_backward_op(x, dots, bits, *hashing) if want_x else None, grad_tables


def _converted_backward(args, kept, grads, wanted):
    """x reaches the tables through what the low-rank part leaves of it, rest = x − inner · down."""
    x, tables, scales, bias, centre, scale, down, up, weighting, temperature, _, sparse, hash = args
    (grad,), (want_x, want_tables, _, want_bias, _, _, want_down, want_up) = grads, wanted
    grad = _widened(grad, x)
    hashing, want_rest = (weighting, temperature, hash, centre, scale), want_x or want_down
    rest, inner = without_low_rank(x, down)
    grad_x, grad_tables = _lookup_gradients(rest, grad, tables, scales, sparse, hashing, want_rest, want_tables)
    grad_down = grad_up = None
    if down is not None:
        grad, wide_down = grad.to(inner.dtype), down.to(inner.dtype)
        if want_up:
            grad_up = (inner.T @ grad).to(up.dtype)
        if want_rest:
            grad_inner = grad @ up.to(inner.dtype).T - grad_x @ wide_down.T
        if want_down:
            grad_down = (grad_inner.T @ x.to(inner.dtype) - inner.T @ grad_x).to(down.dtype)
        if want_x:
            grad_x = (grad_x + grad_inner @ wide_down).to(x.dtype)
    grad_bias = _bias_gradient(grad, x, bias) if want_bias else None
    return grad_x if want_x else None, grad_tables, None, grad_bias, None, None, grad_down, grad_up


def _sum_backward(args, kept, grads, wanted):
    codes, weights, tables, scales, _, sparse = args
    _, want_weights, want_tables, _ = wanted
    grad_tables, dots = _table_gradient(*grads, codes, weights, tables, scales, sparse, want_tables, want_weights)
    return None, dots if want_weights else None, grad_tables, None


def _linear_fake(x, tables, *_):
    return x.new_empty(x.shape[0], sizes(tables)[2])


def _linear_cpu(x, tables, scales, bias, weighting, temperature, route, sparse=False, hash="one_bit"):
    nothing = (None,) * 4
    return _converted_cpu(x, tables, scales, bias, *nothing, weighting, temperature, route, sparse, hash)


def _converted_cpu(
    x, tables, scales, bias, centre, scale, down, up, weighting, temperature, route, sparse=False, hash="one_bit"
):
    dtype = x.dtype
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    packed = tables.dim() == 4
    k, n, h = sizes(tables) if packed else tables.shape
    x, tables = rows_contiguous(x), tables.contiguous()
    rows, stride = x.shape[0], x.stride(0)
    out = x.new_empty(rows, h, dtype=compute)
    if bias is not None and (bias.dtype is not compute or not bias.is_contiguous()):
        bias = bias.to(compute).contiguous()
    if scales is not None:
        scales = scales.contiguous()
    centre, scale, down, up = (wide(t, compute) for t in (centre, scale, down, up))
    module().lookup_linear(
        tables.data_ptr(),
        TABLE_CODES[tables.dtype],
        optional("scales", scales),
        k,
        n,
        h,
        packed,
        x.data_ptr(),
        DTYPE_CODES[dtype],
        rows,
        stride,
        n.bit_length() - 1,
        WEIGHTING_CODES[weighting],
        temperature,
        HASHES[hash],
        optional("centre", centre),
        optional("scale", scale),
        optional("down", down),
        optional("up", up),
        0 if down is None else down.shape[0],
        optional("bias", bias),
        route,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out if dtype is compute else out.to(dtype)


def _linear_cuda(x, tables, scales, bias, weighting, temperature, route, sparse=False, hash="one_bit"):
    """Few tokens."""
    if hash != "one_bit":
        raise Unsupported(f"backend 'cuda' has no {hash} hash")
    if torch.float64 in (x.dtype, tables.dtype):
        raise Unsupported("backend 'cuda' computes lookup_linear in float32 and refuses float64 tensors")
    if route == ROUTES["stream"] or (forced_backend() is None and x.shape[0] > CUDA_TOKENS):
        raise Unsupported(f"backend 'cuda' is for up to {CUDA_TOKENS} tokens, got {x.shape[0]}")
    tables = (unpack(tables) if tables.dim() == 4 else tables).contiguous()
    x, out = rows_contiguous(x), _linear_fake(x, tables)
    k, n, h = tables.shape
    scales = scales if scales is None else scales.contiguous()
    bias = bias if bias is None else (bias.float() if bias.dtype == torch.float64 else bias).contiguous()
    code, native = TABLE_CODES[tables.dtype], module()
    with torch.cuda.device(x.device):
        parts = native.cuda_lookup_linear_parts(x.shape[0], k, h, code)
        partial = out.new_empty(parts if parts > 1 else 0, *out.shape, dtype=torch.float32)
        native.cuda_lookup_linear(
            matrix(x),
            DTYPE_CODES[x.dtype],
            tables.data_ptr(),
            code,
            _address(scales),
            k,
            h,
            n.bit_length() - 1,
            WEIGHTINGS.index(weighting),
            min(2 / temperature, 3e38),
            _address(bias),
            0 if bias is None else DTYPE_CODES[bias.dtype],
            partial.data_ptr(),
            parts,
            out.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return out


linear_op = leaf_op(
    "lookup_linear(Tensor x, Tensor tables, Tensor? scales, Tensor? bias, str weighting, float temperature, int route, "
    "bool sparse=False, str hash='one_bit') -> Tensor",
    fake=_linear_fake,
    derivative=Derivative(
        reference=lambda args, kept: (reference.linear_op(*args),),
        backward=_linear_backward,
        fixed=("scales",),
        fold=Fold((0, SHARED, SHARED, SHARED), (0,)),
    ),
    reference=reference.linear_op,
    cpu=_linear_cpu,
    triton=_triton("linear"),
    cuda=_linear_cuda,
)

converted_op = leaf_op(
    "lookup_converted(Tensor x, Tensor tables, Tensor? scales, Tensor? bias, Tensor? centre, Tensor? scale, "
    "Tensor? down, Tensor? up, str weighting, float temperature, int route, bool sparse=False, str hash='one_bit') "
    "-> Tensor",
    fake=_linear_fake,
    derivative=Derivative(
        reference=lambda args, kept: (reference.converted_op(*args),),
        backward=_converted_backward,
        fixed=("scales", "centre", "scale"),
        fold=Fold((0, *[SHARED] * 7), (0,)),
    ),
    reference=reference.converted_op,
    cpu=_converted_cpu,
    triton=_triton("converted"),
)


def _sum_fake(codes, weights, tables, scales, route, sparse=False):
    return weights.new_empty(codes.shape[0], sizes(tables)[2])


def _sum_cpu(codes, weights, tables, scales, route, sparse=False):
    codes, weights, tables = codes.contiguous(), weights.contiguous(), tables.contiguous()
    out = _sum_fake(codes, weights, tables, scales, route)
    scales = scales if scales is None else scales.contiguous()
    _tables(tables, scales).sum(codes.data_ptr(), weights.data_ptr(), codes.shape[0], route, out.data_ptr())
    return out


sum_op = leaf_op(
    "lookup_sum(Tensor codes, Tensor weights, Tensor tables, Tensor? scales, int route, bool sparse=False) -> Tensor",
    fake=_sum_fake,
    derivative=Derivative(
        reference=lambda args, kept: (reference.sum_op(*args, check=False),),
        backward=_sum_backward,
        fixed=("scales",),
        fold=Fold((0, 0, SHARED, SHARED), (0,)),
    ),
    reference=reference.sum_op,
    cpu=_sum_cpu,
    triton=_triton("sum", count=5),
)


def _backward_fake(grad, codes, weights, tables, scales, n, rows, want_segments, dtype=None):
    count = codes.shape[1] * n if rows is None else rows.shape[0]
    segments = weights.new_empty(count if want_segments else 0, grad.shape[1], dtype=dtype)
    return segments, weights.new_empty((0,) if tables is None else codes.shape)


# Bytes from which on a dense gradient of tables takes memory that an earlier one has freed: see csrc/bindings/blocks.h.
REUSED_FROM = 32 << 20


def _uninitialised(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    count = rows * columns
    if count * dtype.itemsize < REUSED_FROM or not hasattr(module(), "Block"):
        return torch.empty(rows, columns, dtype=dtype, device="cpu")
    return torch.frombuffer(module().Block(count * dtype.itemsize), dtype=dtype, count=count).view(rows, columns)


def _backward_cpu(grad, codes, weights, tables, scales, n, rows, want_segments, dtype=None):
    codes, weights, grad = codes.contiguous(), weights.contiguous(), rows_contiguous(grad)
    count = codes.shape[1] * n if rows is None else rows.shape[0]
    segments = _uninitialised(count if want_segments else 0, grad.shape[1], weights.dtype)
    dots = weights.new_empty((0,) if tables is None else codes.shape)
    if tables is None:
        native = module().LookupTables(
            0, TABLE_CODES[grad.dtype], 0, codes.shape[1], n, grad.shape[1], False, torch.get_num_threads()
        )
    else:
        tables = tables.contiguous()
        scales = scales if scales is None else scales.contiguous()
        native = _tables(tables, scales)
    first = None
    if rows is not None:
        first = torch.searchsorted(rows, n * torch.arange(codes.shape[1] + 1, device=rows.device))
    native.backward(
        matrix(grad),
        codes.data_ptr(),
        weights.data_ptr(),
        _address(first),
        segments.data_ptr() if want_segments else 0,
        0 if tables is None else dots.data_ptr(),
    )
    return segments if dtype is None else segments.to(dtype), dots


backward_op = leaf_op(
    "lookup_backward(Tensor grad, Tensor codes, Tensor weights, Tensor? tables, Tensor? scales, int n, Tensor? rows, "
    "bool want_segments, ScalarType? dtype=None) -> (Tensor, Tensor)",
    fake=_backward_fake,
    reference=reference.backward_op,
    cpu=_backward_cpu,
    triton=_triton("backward"),
)


def _hash_backward_fake(x, grad_weights, bits, weighting, temperature, hash="one_bit", centre=None, scale=None):
    return x.new_empty(x.shape)


def _hash_backward_cpu(x, grad_weights, bits, weighting, temperature, hash="one_bit", centre=None, scale=None):
    grad = x.new_empty(x.shape, dtype=compute_dtype(x.dtype))
    grad_weights = grad_weights.contiguous()
    arguments, held = _hash_arguments(x, bits, weighting, temperature, hash, centre, scale)
    module().lookup_hash_backward(*arguments, grad_weights.data_ptr(), grad.data_ptr(), torch.get_num_threads())
    del held
    return grad.to(x.dtype)


hash_backward_op = leaf_op(
    "lookup_hash_backward(Tensor x, Tensor grad_weights, int bits, str weighting, float temperature, "
    "str hash='one_bit', Tensor? centre=None, Tensor? scale=None) -> Tensor",
    fake=_hash_backward_fake,
    reference=reference.hash_backward_op,
    cpu=_hash_backward_cpu,
    triton=_triton("hash_backward"),
)


def _segments_fake(values, codes, weights, n):
    return weights.new_empty(codes.shape[1], n, values.shape[1])


def _segments(backward):
    """An implementation of the segments alone, by one of `backward_op`."""

    def run(values, codes, weights, n):
        found, _ = backward(values, codes, weights, None, None, n, None, True)
        return found.view(codes.shape[1], n, values.shape[1])

    return run


def _segments_backward(args, kept, grads, wanted):
    (values, codes, weights, n), (grad,) = args, grads
    grad_values = sum_op(codes, weights, grad, None, ROUTES["auto"]) if wanted[0] else None
    grad_weights = backward_op(values, codes, weights, grad, None, n, None, False)[1] if wanted[2] else None
    return grad_values, None, grad_weights


segments_op = leaf_op(
    "lookup_segments(Tensor values, Tensor codes, Tensor weights, int n) -> Tensor",
    fake=_segments_fake,
    derivative=Derivative(
        reference=lambda args, kept: (reference.segments_op(*args, check=False),), backward=_segments_backward
    ),
    reference=reference.segments_op,
    cpu=_segments(_backward_cpu),
    triton=_segments(_triton("backward")),
)


def lookup_linear_direct(
    x: Tensor,  # [..., d]
    tables: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    converted: tuple[Tensor | None, ...],  # centre, scale, down, up
    weighting: str,
    temperature: float,
    hash: str,
) -> Tensor | None:
    """[..., h] of unchecked arguments in one native call, or ``None``: see `direct`."""
    native = direct()
    if native is None or type(weighting) is not str or type(hash) is not str:
        return None
    code, kind, grad = WEIGHTING_CODES.get(weighting, -1), HASHES.get(hash, 0), torch.is_grad_enabled()
    threads = torch.get_num_threads()
    out = native.lookup_linear_direct(x, tables, scales, bias, converted, code, temperature, kind, grad, threads)
    return out if out is None or out.dtype is x.dtype else out.to(x.dtype)


def lookup_linear(
    x: Tensor,  # [T, d]
    tables: Tensor,  # [K, 2^bits, h]
    scales: Tensor | None,  # [K, 2^bits] float32, for int8 tables
    bias: Tensor | None,  # [h]
    converted: tuple[Tensor | None, ...],  # centre, scale [d], down [r, d], up [r, h]
    weighting: str,
    temperature: float,
    sparse: bool,
    hash: str,
) -> Tensor:
    """Checked arguments to [T, h] in the dtype of x; differentiable in x, tables, bias, down and up."""
    if tables.dim() == 4 and not tables.is_cpu:
        tables = unpack(tables)
    options = (weighting, temperature, ROUTES["auto"], sparse, hash)
    if all(t is None for t in converted):
        return linear_op(x, tables, scales, bias, *options)
    return converted_op(x, tables, scales, bias, *converted, *options)


def lookup_sum(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None, sparse: bool) -> Tensor:
    """codes [T, K] int32, weights [T, K] in the compute dtype -> [T, h]; differentiable in weights and tables."""
    if tables.dim() == 4 and not tables.is_cpu:
        tables = unpack(tables)
    return sum_op(codes, weights, tables, scales, ROUTES["auto"], sparse)


def segment_sum(values: Tensor, codes: Tensor, weights: Tensor, n: int) -> Tensor:
    """values [T, h] and weights [T, K] in the compute dtype -> [K, n, h]; differentiable in values and weights."""
    return segments_op(values, codes, weights, n)
