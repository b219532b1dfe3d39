"""How the ops behave inside PyTorch on a GPU: what is no comparison of numbers with float64.

Plain functions with assertions, because the machine that has a GPU need not have pytest; `tests/test_gpu.py` runs them
too, where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from pyrepr.benchmarks.gpu import implementations_taken

import pyrepr

DEVICE = "cuda"


class NotHere(RuntimeError):
    """Why it cannot be tried on this machine."""


def _raises(kind: type[Exception], function: Callable) -> None:
    try:
        function()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def _pair(n: int = 300, device: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 40, device=device or DEVICE), torch.randn(n, 70, device=device or DEVICE)


def nothing_changes_before_a_kernel_is_proven() -> None:
    from pyrepr import backend

    if "gram_stats" not in backend.GPU_ORDER:
        x, y = _pair()
        with pyrepr.use_backend("reference"):
            expected = pyrepr.cka(x, y)
        assert torch.equal(pyrepr.cka(x, y), expected)


def backward_takes_the_forced_backend() -> None:
    x, y = _pair()
    x.requires_grad_()
    with pyrepr.use_backend("triton"), implementations_taken() as taken:
        pyrepr.cka(x, y).backward()
    assert {name for _, name in taken} == {"triton"}, taken


def cka_compiles_fullgraph_forward_and_backward() -> None:
    x, y = _pair()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pyrepr.use_backend("triton"):
        expected = pyrepr.cka(a, y)
        compiled = torch.compile(pyrepr.cka, fullgraph=True)(b, y)
        expected.backward()
        with implementations_taken() as taken:
            compiled.backward()
    assert {name for _, name in taken} == {"triton"}, taken
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(b.grad, a.grad)


def another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        raise NotHere("one GPU: no device that is not the current one")
    x, y = _pair(device="cuda:1")
    with pyrepr.use_backend("triton"):
        value = pyrepr.cka(x, y)
    assert value.device == x.device
    torch.testing.assert_close(value.cpu(), pyrepr.cka(x.cpu(), y.cpu()), rtol=1e-5, atol=1e-6)


def autocast_changes_nothing() -> None:
    """Kernels say themselves what they compute in: the same bits with and without it, and dtypes as ever."""
    x, y = _pair()
    q, k, v = (torch.randn(1, 100, 2, 64, device=DEVICE) for _ in range(3))
    beta = torch.rand(1, 100, 2, device=DEVICE)

    def run() -> list[torch.Tensor]:
        return [pyrepr.cka(x, y), pyrepr.chunk_delta_rule(q, k, v, beta=beta, use_qk_l2norm_in_kernel=True)[0]]

    with pyrepr.use_backend("triton"):
        expected = run()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = run()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def cka_of_more_than_two_to_the_31_elements() -> None:
    """Biased CKA does not notice that every sample is there 300 times."""
    x, y = torch.randn(7500, 1000, device=DEVICE).bfloat16(), torch.randn(7500, 20, device=DEVICE).bfloat16()
    y[:, :20] += x[:, :20]
    with pyrepr.use_backend("triton"):
        expected = pyrepr.cka(x, y, estimator="biased")
        x, y = x.repeat(300, 1), y.repeat(300, 1)
        assert x.numel() > 2**31
        torch.testing.assert_close(pyrepr.cka(x, y, estimator="biased"), expected, rtol=1e-4, atol=1e-5)


def out_of_memory_is_torchs_own_error() -> None:
    x = torch.zeros(1, 1, device=DEVICE).expand(1 << 20, 1 << 20)
    with pyrepr.use_backend("triton"):
        _raises(torch.cuda.OutOfMemoryError, lambda: pyrepr.gram(x))
        small, _ = _pair()
        assert pyrepr.gram(small).isfinite().all()  # and everything works afterwards


def _delta_inputs(T: int = 300, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(1, T, 2, 64, device=DEVICE, dtype=dtype) for _ in range(3))
    return q, torch.nn.functional.normalize(k, dim=-1), v, torch.rand(1, T, 2, device=DEVICE)


def delta_rule_compiles_fullgraph_forward_and_backward() -> None:
    results = []
    with pyrepr.use_backend("triton"):
        for function in (pyrepr.chunk_delta_rule, torch.compile(pyrepr.chunk_delta_rule, fullgraph=True)):
            torch.manual_seed(0)
            leaves = [x.requires_grad_() for x in _delta_inputs()]
            o, _ = function(*leaves)
            results.append([o, *torch.autograd.grad(o.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def packed_delta_rule_in_a_cuda_graph_follows_the_bounds() -> None:
    """Nothing was read back while the graph was recorded: other bounds give the other answer."""
    x = _delta_inputs()
    bounds = torch.tensor([0, 100, 300], device=DEVICE)
    with pyrepr.use_backend("triton"):
        pyrepr.chunk_delta_rule(*x, cu_seqlens=bounds)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = pyrepr.chunk_delta_rule(*x, cu_seqlens=bounds)
        bounds.copy_(torch.tensor([0, 170, 300]))
        graph.replay()
        assert torch.equal(o, pyrepr.chunk_delta_rule(*x, cu_seqlens=bounds)[0])


def decoding_in_a_cuda_graph(backend: str) -> None:
    q, k, v, beta = _delta_inputs(1)
    state = torch.randn(1, 2, 64, 64, device=DEVICE)
    options = {"initial_state": state, "output_final_state": True, "out_state": state}
    with pyrepr.use_backend(backend), torch.no_grad():
        start = state.clone()
        expected = pyrepr.fused_recurrent_delta_rule(q, k, v, beta, **options)[0].clone()
        state.copy_(start)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = pyrepr.fused_recurrent_delta_rule(q, k, v, beta, **options)
        state.copy_(start)
        graph.replay()
        assert torch.equal(o, expected)


def _convolution_inputs(T: int = 300, device: str | None = None) -> tuple[torch.Tensor, ...]:
    """x [B, D, T], weight, bias."""
    new = {"device": device or DEVICE, "dtype": torch.bfloat16}
    return torch.randn(1, T, 200, **new).mT, torch.randn(200, 4, **new), torch.randn(200, **new)


def convolution_compiles_fullgraph_forward_and_backward(width: int) -> None:
    results = []
    with pyrepr.use_backend("triton"):
        for function in (pyrepr.causal_conv1d_fn, torch.compile(pyrepr.causal_conv1d_fn, fullgraph=True)):
            torch.manual_seed(0)
            x, weight, bias = _convolution_inputs()
            leaves = [t.detach().requires_grad_() for t in (x, weight[:, :width], bias)]
            out = function(*leaves, activation="silu")
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def packed_convolution_in_a_cuda_graph_follows_the_bounds() -> None:
    x = _convolution_inputs()
    options = {"return_final_states": True, "activation": "silu"}
    bounds = torch.tensor([0, 100, 300], device=DEVICE)
    with pyrepr.use_backend("triton"):
        pyrepr.causal_conv1d_fn(*x, cu_seqlens=bounds, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, last = pyrepr.causal_conv1d_fn(*x, cu_seqlens=bounds, **options)
        bounds.copy_(torch.tensor([0, 170, 300]))
        graph.replay()
        again = pyrepr.causal_conv1d_fn(*x, cu_seqlens=bounds, **options)
        assert torch.equal(out, again[0]) and torch.equal(last, again[1])


def decoding_a_convolution_in_a_cuda_graph(ring: bool) -> None:
    x, weight, bias = _convolution_inputs(1)
    state = torch.randn(3, 200, 5, device=DEVICE, dtype=x.dtype)
    start = state.clone()
    places = torch.full((1,), 2, device=DEVICE, dtype=torch.int32) if ring else None
    index = torch.ones(1, device=DEVICE, dtype=torch.int32) if ring else None
    state, start = (state, start) if ring else (state[:1], start[:1])

    def step():
        return pyrepr.causal_conv1d_update(x[..., 0], state, weight, bias, "silu", places, index)

    with pyrepr.use_backend("triton"), torch.no_grad():
        expected = step()
        after = state.clone()
        state.copy_(start)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        state.copy_(start)
        graph.replay()
    assert torch.equal(out, expected) and torch.equal(state, after)


def convolution_on_a_side_stream_without_a_synchronisation() -> None:
    x, weight, bias = _convolution_inputs()
    seq_idx = torch.arange(300, device=DEVICE)[None] // 70
    stream = torch.cuda.Stream()
    with pyrepr.use_backend("triton"):
        expected = pyrepr.causal_conv1d_fn(x, weight, bias, seq_idx)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                out = pyrepr.causal_conv1d_fn(x, weight, bias, seq_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert torch.equal(out, expected)


def convolution_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        raise NotHere("one GPU: no device that is not the current one")
    x, weight, bias = _convolution_inputs(device="cuda:1")
    with pyrepr.use_backend("triton"):
        out = pyrepr.causal_conv1d_fn(x, weight, bias, activation="silu")
    expected = pyrepr.causal_conv1d_fn(x.cpu(), weight.cpu(), bias.cpu(), activation="silu")
    torch.testing.assert_close(out.cpu(), expected, rtol=0.02, atol=0.02)


def convolution_of_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(1, 4, (1 << 29) + 64, device=DEVICE, dtype=torch.bfloat16)
    x[..., -3:] = torch.randn(4, 3, device=DEVICE)
    weight = torch.randn(4, 4, device=DEVICE)
    with pyrepr.use_backend("triton"):
        for rows in (x, x[..., :-1]):  # the second has to be copied
            out = pyrepr.causal_conv1d_fn(rows, weight)
            assert torch.equal(out[..., -9:], pyrepr.causal_conv1d_fn(rows[..., -12:].contiguous(), weight)[..., -9:])


def _lookup_problem(
    tokens: int = 9, k: int = 16, h: int = 64, device: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    new = {"device": device or DEVICE}
    return torch.randn(tokens, 8 * k, **new).to(dtype), torch.randn(k, 256, h, **new).to(dtype)


def lookup_compiles_fullgraph_forward_and_backward(tokens: int) -> None:
    leaves = [t.requires_grad_() for t in _lookup_problem(tokens)]
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    with pyrepr.use_backend("triton"):
        expected = pyrepr.lookup_linear(*leaves)
        compiled = torch.compile(pyrepr.lookup_linear, fullgraph=True)(*copies)
        grad = torch.randn_like(expected)
        expected.backward(grad)
        compiled.backward(grad)
    assert torch.equal(compiled, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, copies, strict=True))


def lookup_on_another_device_than_the_current_one(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        raise NotHere("one GPU: no device that is not the current one")
    x, tables = _lookup_problem(device="cuda:1")
    with pyrepr.use_backend(backend):
        out = pyrepr.lookup_linear(x, tables)
    torch.testing.assert_close(out.cpu(), pyrepr.lookup_linear(x.cpu(), tables.cpu()), rtol=0.02, atol=0.02)


def lookup_of_special_values(backend: str, tokens: int) -> None:
    x, tables = _lookup_problem(tokens)
    x[:1, 3], x[1:2, 5], x[2:3] = float("nan"), float("inf"), -0.0
    for weighting in ("probability", "scaled", "l1", "none"):
        with pyrepr.use_backend(backend):
            out = pyrepr.lookup_linear(x, tables, weighting=weighting)
        with pyrepr.use_backend("reference"):
            truth = pyrepr.lookup_linear(x, tables, weighting=weighting)
        torch.testing.assert_close(out, truth, rtol=0.02, atol=0.05, equal_nan=True)


def lookup_in_more_than_two_to_the_31_table_elements(backend: str) -> None:
    tables = torch.zeros(2, 1 << 16, 16400, dtype=torch.int8, device=DEVICE)
    tables[1, -1] = torch.arange(16400, device=DEVICE).to(torch.int8)
    x, scales = torch.ones(1, 32, device=DEVICE), torch.ones(2, 1 << 16, device=DEVICE)
    with pyrepr.use_backend(backend):
        out = pyrepr.lookup_linear(x, tables, scales=scales, weighting="none")
    assert torch.equal(out[0], tables[1, -1].float())


def codes_out_of_range_give_nan_without_a_synchronisation() -> None:
    codes, tables = torch.tensor([[0, 5], [256, 1], [7, -1]], device=DEVICE), torch.randn(2, 256, 64, device=DEVICE)
    weights = torch.ones(3, 2, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pyrepr.use_backend("triton"):
            out = pyrepr.lookup_sum(codes, weights, tables)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().all(1).tolist() == [False, True, True]
    assert out[0].isfinite().all()


def _all() -> dict[str, Callable[[], None]]:
    both = [{"backend": backend} for backend in ("triton", "cuda")]
    special = [{**options, "tokens": tokens} for options in both for tokens in (0, 1, 63, 65)]
    given: list[tuple[Callable[..., None], list[dict]]] = [
        (nothing_changes_before_a_kernel_is_proven, [{}]),
        (backward_takes_the_forced_backend, [{}]),
        (codes_out_of_range_give_nan_without_a_synchronisation, [{}]),
        (decoding_in_a_cuda_graph, both),
        (packed_delta_rule_in_a_cuda_graph_follows_the_bounds, [{}]),
        (packed_convolution_in_a_cuda_graph_follows_the_bounds, [{}]),
        (decoding_a_convolution_in_a_cuda_graph, [{"ring": False}, {"ring": True}]),
        (convolution_on_a_side_stream_without_a_synchronisation, [{}]),
        (lookup_of_special_values, special),
        (out_of_memory_is_torchs_own_error, [{}]),
        (cka_compiles_fullgraph_forward_and_backward, [{}]),
        (delta_rule_compiles_fullgraph_forward_and_backward, [{}]),
        (lookup_compiles_fullgraph_forward_and_backward, [{"tokens": 9}, {"tokens": 600}]),
        (convolution_compiles_fullgraph_forward_and_backward, [{"width": 3}, {"width": 4}]),
        (cka_of_more_than_two_to_the_31_elements, [{}]),
        (convolution_of_more_than_two_to_the_31_elements, [{}]),
        (lookup_in_more_than_two_to_the_31_table_elements, both),
        (another_device_than_the_current_one, [{}]),
        (autocast_changes_nothing, [{}]),
        (lookup_on_another_device_than_the_current_one, both),
        (convolution_on_another_device_than_the_current_one, [{}]),
    ]
    found = {}
    for function, choices in given:
        for options in choices:
            words = [function.__name__.replace("_", " "), *(f"{key}={value}" for key, value in options.items())]
            found[", ".join(words)] = partial(function, **options)
    return found


ALL = _all()
