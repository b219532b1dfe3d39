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
