"""What needs a GPU and is no case of `pyrepr.gpu_check` (which runs this file too): how the ops behave inside torch."""

from __future__ import annotations

import pytest
import torch

import pyrepr

pytestmark = pytest.mark.gpu


def pair(n=300, device="cuda"):
    return torch.randn(n, 40, device=device), torch.randn(n, 70, device=device)


def test_nothing_changes_before_a_kernel_is_proven():
    from pyrepr import backend

    if "gram_stats" not in backend.GPU_ORDER:
        x, y = pair()
        with pyrepr.use_backend("reference"):
            expected = pyrepr.cka(x, y)
        assert torch.equal(pyrepr.cka(x, y), expected)


def test_compile_fullgraph_forward_and_backward():
    x, y = pair()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pyrepr.use_backend("triton"):
        expected = pyrepr.cka(a, y)
        compiled = torch.compile(pyrepr.cka, fullgraph=True)(b, y)
        expected.backward()
        compiled.backward()
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: no device that is not the current one")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_another_device_than_the_current_one(backend):
    x, y = pair(device="cuda:1")
    with pyrepr.use_backend(backend):
        value = pyrepr.cka(x, y)
    assert value.device == x.device
    torch.testing.assert_close(value.cpu(), pyrepr.cka(x.cpu(), y.cpu()), rtol=1e-5, atol=1e-6)


def test_more_than_two_to_the_31_elements():
    """Biased CKA does not notice that every sample is there 300 times."""
    x, y = torch.randn(7500, 1000, device="cuda").bfloat16(), torch.randn(7500, 20, device="cuda").bfloat16()
    y[:, :20] += x[:, :20]
    with pyrepr.use_backend("triton"):
        expected = pyrepr.cka(x, y, estimator="biased")
        x, y = x.repeat(300, 1), y.repeat(300, 1)
        assert x.numel() > 2**31
        torch.testing.assert_close(pyrepr.cka(x, y, estimator="biased"), expected, rtol=1e-4, atol=1e-5)


def test_out_of_memory_is_torchs_own_error():
    x = torch.zeros(1, 1, device="cuda").expand(1 << 20, 1 << 20)
    with pyrepr.use_backend("triton"), pytest.raises(torch.cuda.OutOfMemoryError):
        pyrepr.gram(x)


def delta_inputs(T=300, dtype=torch.bfloat16):
    q, k, v = (torch.randn(1, T, 2, 64, device="cuda", dtype=dtype) for _ in range(3))
    return q, torch.nn.functional.normalize(k, dim=-1), v, torch.rand(1, T, 2, device="cuda")


def test_delta_rule_compiles_in_one_graph_forward_and_backward():
    results = []
    with pyrepr.use_backend("triton"):
        for function in (pyrepr.chunk_delta_rule, torch.compile(pyrepr.chunk_delta_rule, fullgraph=True)):
            torch.manual_seed(0)
            leaves = [x.requires_grad_() for x in delta_inputs()]
            o, _ = function(*leaves)
            results.append([o, *torch.autograd.grad(o.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_packed_delta_rule_in_a_cuda_graph_follows_the_bounds():
    """Nothing was read back while the graph was recorded: other bounds give the other answer."""
    x = delta_inputs()
    bounds = torch.tensor([0, 100, 300], device="cuda")
    with pyrepr.use_backend("triton"):
        pyrepr.chunk_delta_rule(*x, cu_seqlens=bounds)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = pyrepr.chunk_delta_rule(*x, cu_seqlens=bounds)
        bounds.copy_(torch.tensor([0, 170, 300]))
        graph.replay()
        assert torch.equal(o, pyrepr.chunk_delta_rule(*x, cu_seqlens=bounds)[0])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_decoding_in_a_cuda_graph(backend):
    q, k, v, beta = delta_inputs(1)
    state = torch.randn(1, 2, 64, 64, device="cuda")
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


def convolution_inputs(T=300, dtype=torch.bfloat16, device="cuda"):
    """x [B, D, T], weight, bias."""
    x = torch.randn(1, T, 200, device=device, dtype=dtype).mT
    return x, torch.randn(200, 4, device=device, dtype=dtype), torch.randn(200, device=device, dtype=dtype)


@pytest.mark.parametrize("width", [3, 4])
def test_convolution_compiles_in_one_graph_forward_and_backward(width):
    results = []
    with pyrepr.use_backend("triton"):
        for function in (pyrepr.causal_conv1d_fn, torch.compile(pyrepr.causal_conv1d_fn, fullgraph=True)):
            torch.manual_seed(0)
            x, weight, bias = convolution_inputs()
            leaves = [t.detach().requires_grad_() for t in (x, weight[:, :width], bias)]
            out = function(*leaves, activation="silu")
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_packed_convolution_in_a_cuda_graph_follows_the_bounds():
    x = convolution_inputs()
    options = {"return_final_states": True, "activation": "silu"}
    bounds = torch.tensor([0, 100, 300], device="cuda")
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


@pytest.mark.parametrize("ring", [False, True])
def test_decoding_a_convolution_in_a_cuda_graph(ring):
    x, weight, bias = convolution_inputs(1)
    state = torch.randn(3, 200, 5, device="cuda", dtype=x.dtype)
    start = state.clone()
    places = torch.full((1,), 2, device="cuda", dtype=torch.int32) if ring else None
    index = torch.ones(1, device="cuda", dtype=torch.int32) if ring else None
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


def test_convolution_on_a_side_stream_without_a_synchronisation():
    x, weight, bias = convolution_inputs()
    seq_idx = torch.arange(300, device="cuda")[None] // 70
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: no device that is not the current one")
def test_convolution_on_another_device_than_the_current_one():
    x, weight, bias = convolution_inputs(device="cuda:1")
    with pyrepr.use_backend("triton"):
        out = pyrepr.causal_conv1d_fn(x, weight, bias, activation="silu")
    expected = pyrepr.causal_conv1d_fn(x.cpu(), weight.cpu(), bias.cpu(), activation="silu")
    torch.testing.assert_close(out.cpu(), expected, rtol=0.02, atol=0.02)


def test_convolution_of_more_than_two_to_the_31_elements():
    x = torch.zeros(1, 4, (1 << 29) + 64, device="cuda", dtype=torch.bfloat16)
    x[..., -3:] = torch.randn(4, 3, device="cuda")
    weight = torch.randn(4, 4, device="cuda")
    with pyrepr.use_backend("triton"):
        for rows in (x, x[..., :-1]):  # the second has to be copied
            out = pyrepr.causal_conv1d_fn(rows, weight)
            assert torch.equal(out[..., -9:], pyrepr.causal_conv1d_fn(rows[..., -12:].contiguous(), weight)[..., -9:])


def lookup_problem(tokens=9, k=16, h=64, device="cuda", dtype=torch.bfloat16):
    return torch.randn(tokens, 8 * k, device=device).to(dtype), torch.randn(k, 256, h, device=device).to(dtype)


@pytest.mark.parametrize("tokens", [9, 600])
def test_lookup_compiles_fullgraph_forward_and_backward(tokens):
    leaves = [t.requires_grad_() for t in lookup_problem(tokens)]
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    with pyrepr.use_backend("triton"):
        expected = pyrepr.lookup_linear(*leaves)
        compiled = torch.compile(pyrepr.lookup_linear, fullgraph=True)(*copies)
        grad = torch.randn_like(expected)
        expected.backward(grad)
        compiled.backward(grad)
    assert torch.equal(compiled, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, copies, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: no device that is not the current one")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_lookup_on_another_device_than_the_current_one(backend):
    x, tables = lookup_problem(device="cuda:1")
    with pyrepr.use_backend(backend):
        out = pyrepr.lookup_linear(x, tables)
    torch.testing.assert_close(out.cpu(), pyrepr.lookup_linear(x.cpu(), tables.cpu()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("tokens", [0, 1, 63, 65])
def test_lookup_of_special_values(backend, tokens):
    x, tables = lookup_problem(tokens)
    x[:1, 3], x[1:2, 5], x[2:3] = float("nan"), float("inf"), -0.0
    for weighting in ("probability", "scaled", "l1", "none"):
        with pyrepr.use_backend(backend):
            out = pyrepr.lookup_linear(x, tables, weighting=weighting)
        with pyrepr.use_backend("reference"):
            truth = pyrepr.lookup_linear(x, tables, weighting=weighting)
        torch.testing.assert_close(out, truth, rtol=0.02, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_lookup_in_more_than_two_to_the_31_table_elements(backend):
    tables = torch.zeros(2, 1 << 16, 16400, dtype=torch.int8, device="cuda")
    tables[1, -1] = torch.arange(16400, device="cuda").to(torch.int8)
    x, scales = torch.ones(1, 32, device="cuda"), torch.ones(2, 1 << 16, device="cuda")
    with pyrepr.use_backend(backend):
        out = pyrepr.lookup_linear(x, tables, scales=scales, weighting="none")
    assert torch.equal(out[0], tables[1, -1].float())


def test_codes_out_of_range_give_nan_without_a_synchronisation():
    codes, tables = torch.tensor([[0, 5], [256, 1], [7, -1]], device="cuda"), torch.randn(2, 256, 64, device="cuda")
    weights = torch.ones(3, 2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pyrepr.use_backend("triton"):
            out = pyrepr.lookup_sum(codes, weights, tables)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().all(1).tolist() == [False, True, True]
    assert out[0].isfinite().all()
