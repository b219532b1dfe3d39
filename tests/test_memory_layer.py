"""Product-key memory against every slot's score in float64, and its derivatives, state and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from derivatives import MODES
from torch.testing import assert_close

from pyrepr.nn import ProductKeyMemory

# A second derivative of torch's bags by autograd alone; under torch.func it is there.
REFUSED = {"grad of grad", "gradient penalty", "autograd hvp", "autograd vhp", "hvp of a checkpoint", "third"}
REFUSED |= {"autograd hessian", "autograd hessian, vectorized"}


def plain(layer: ProductKeyMemory, x: torch.Tensor) -> torch.Tensor:
    """The scores of all n² slots, their k best, the softmax of these; without product keys."""
    out = 0
    for query, (first, second) in zip(
        layer.query(x).unflatten(-1, (layer.heads, -1)).unbind(1), layer.keys, strict=True
    ):
        one, two = layer.norm(query).chunk(2, -1)
        scores = ((one @ first.T)[:, :, None] + (two @ second.T)[:, None, :]).flatten(1)
        best, slots = scores.topk(layer.k, dim=1)
        out = out + (best.softmax(-1)[..., None] * layer.values.weight[slots]).sum(1)
    if layer.gate_in is not None:
        out = layer.gate_out(out * torch.nn.functional.silu(layer.gate_in(x)))
    return out


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("keys", "k", "heads"), [(16, 5, 3), (4, 4, 1), (40, 32, 2), (1, 1, 1)])
def test_the_best_of_all_slots(keys, k, heads, gate):
    torch.manual_seed(0)
    layer = ProductKeyMemory(24, 20, keys=keys, k=k, heads=heads, gate=gate)
    twin = copy.deepcopy(layer).double()
    x, grad = torch.randn(70, 24, requires_grad=True), torch.randn(70, 20)
    ours, truth = layer(x), plain(twin, exact := x.detach().double().requires_grad_())
    assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    ours.backward(grad)
    truth.backward(grad.double())
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    rows, weights = layer.slots(x)
    assert rows.shape == weights.shape == (70, heads, k) and (weights.diff(dim=-1) <= 0).all()
    assert_close(weights.sum(-1), torch.ones(70, heads))


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_are_right_or_refused_in_every_mode(mode):
    torch.manual_seed(0)
    layer = ProductKeyMemory(6, 3, keys=5, k=3, heads=2).double()
    x, v = torch.randn(2, 24, dtype=torch.float64)

    def scalar(function):
        return lambda t: function(t.view(4, 6)).sin().sum()

    truth = MODES[mode](scalar(lambda t: plain(layer, t)), x, v)
    try:
        found = MODES[mode](scalar(layer), x, v)
    except (RuntimeError, NotImplementedError) as error:
        assert mode in REFUSED and "embedding_bag" in str(error)
        return
    assert mode not in REFUSED
    assert_close(found, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_second_derivative_by_the_values_is_refused(sparse):
    layer = ProductKeyMemory(6, 3, keys=5, k=3, heads=2, sparse=sparse)
    first = torch.autograd.grad(layer(torch.randn(4, 6)).sin().sum(), layer.values.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="derivative for '_embedding_bag_backward' is not implemented"):
        torch.autograd.grad((first.to_dense() if sparse else first).square().sum(), layer.values.weight)


def test_sparse_gradients_of_the_values():
    layer = ProductKeyMemory(16, 8, keys=16, k=4, heads=2)
    twin = copy.deepcopy(layer)
    twin.values.sparse = True
    x = torch.randn(9, 16)
    for each in (layer, twin):
        each(x).square().sum().backward()
    assert twin.values.weight.grad.is_sparse and twin.values.weight.grad.coalesce().indices().shape[1] <= 9 * 2 * 4
    assert_close(twin.values.weight.grad.to_dense(), layer.values.weight.grad)
    torch.optim.SparseAdam([twin.values.weight], 0.01).step()


def test_shapes_dtypes_state_and_nan():
    layer = ProductKeyMemory(16, 8, keys=16, k=4, gate=True)
    x = torch.randn(2, 3, 16)
    assert_close(layer(x)[1, 2], layer(x[1, 2]))
    assert layer(x[:0]).shape == (0, 3, 8)
    again = ProductKeyMemory(16, 8, keys=16, k=4, gate=True)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    x[0, 1, 5] = torch.nan
    assert layer(x).isnan().any(-1).nonzero().tolist() == [[0, 1]]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        out = copy.deepcopy(layer).to(dtype)(x[1].to(dtype))
        assert out.dtype == dtype and out.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x[1]).isfinite().all()
    assert "keys=16, k=4, heads=4, key_dim=8" in repr(layer)
    assert ProductKeyMemory(16, device="meta").values.weight.shape == (128 * 128, 16)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ProductKeyMemory(0), ValueError, "in_features must be a positive integer, got 0"),
        (lambda: ProductKeyMemory(8, 2.0), ValueError, "out_features must be a positive integer, got 2.0"),
        (lambda: ProductKeyMemory(8, keys=8, k=9), ValueError, "k must be at most keys = 8, got 9"),
        (lambda: ProductKeyMemory(8, key_dim=5), ValueError, "key_dim must be even, for it is cut in halves, got 5"),
        (lambda: ProductKeyMemory(8, gate=1), TypeError, "gate must be a bool, got 1"),
        (lambda: ProductKeyMemory(8)(torch.ones(3, 9)), ValueError, "x must have a last axis of in_features = 8"),
        (lambda: ProductKeyMemory(8)([1.0]), TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
