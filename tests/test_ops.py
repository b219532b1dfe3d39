"""The contract of every leaf op of family `gram`, and of the public functions on top, with torch's own machinery."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pyrepr
from pyrepr.ops import gram as ops

ONES = torch.ones(2, dtype=torch.float64)


def layers(n=20):
    return [torch.randn(n, 3), torch.randn(n, 5)]


CALLS = {
    "gram_stats": lambda: (ops.stats_op, (layers(), None, ONES, "rbf", 1, 0.0, False, 0, False)),
    "gram_stats masked": lambda: (
        ops.stats_op,
        (layers(), torch.arange(20) < 9, ONES, "linear", 1, 0.0, True, 1, False),
    ),
    "gram_stats keeping dots": lambda: (ops.stats_op, (layers(), None, ONES, "linear", 1, 0.0, False, 0, True)),
    "gram_matrix": lambda: (ops.matrix_op, (torch.randn(7, 3), torch.randn(4, 3), ONES[:1], "rbf", 1, 0.0, True)),
    "gram_median": lambda: (ops.median_op, (layers(), None)),
    "gram_moments_": lambda: (
        ops.moments_op_,
        ([torch.zeros(3, 3).double(), torch.zeros(3, 5).double()], layers(), [0, 0, 0, 1]),
    ),
    "gram_apply": lambda: (ops.apply_op, (torch.randn(4, 20), torch.randn(20, 3), True)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_opcheck(name, backend_name):
    op, args = CALLS[name]()
    with pyrepr.use_backend(backend_name):
        torch.library.opcheck(op.overload, args)


@pytest.mark.parametrize("name", CALLS)
def test_cpu_equals_reference(name):
    results = []
    for backend_name in ("cpu", "reference"):
        torch.manual_seed(1)
        op, args = CALLS[name]()
        with pyrepr.use_backend(backend_name):
            out = op(*args)
        results.append(args[0] if name.endswith("_") else out)
    for a, b in zip(*[r if isinstance(r, (list, tuple)) else [r] for r in results], strict=True):
        if name == "gram_stats":
            break  # the statistics may differ by a constant shift of the kernel; measures are compared in test_gram
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in CALLS if not n.endswith("_")])
def test_leaf_ops_refuse_to_be_differentiated(name):
    op, args = CALLS[name]()
    first = args[0]
    (first[0] if isinstance(first, list) else first).requires_grad_()
    with pytest.raises(RuntimeError, match="is a leaf op without a derivative"):
        op(*args)


PUBLIC = {
    "cka": lambda x, y: pyrepr.cka(x, y),
    "cka rbf": lambda x, y: pyrepr.cka(x, y, kernel="rbf"),
    "hsic": lambda x, y: pyrepr.hsic(x, y, kernel="cosine", estimator="biased"),
    "cka_matrix": lambda x, y: pyrepr.cka_matrix([x, y]).sum(),
    "masked": lambda x, y: pyrepr.cka(x, y, mask=x[:, 0] < 1),
    "loss": lambda x, y: pyrepr.nn.CKALoss()(x, y),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_compile_fullgraph_forward_and_backward(name):
    f = PUBLIC[name]
    x, y = torch.randn(30, 4), torch.randn(30, 6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = f(a, y)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(b, y)
    torch.testing.assert_close(compiled, expected)
    expected.backward()
    compiled.backward()
    torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "masked"])
def test_func_grad(name):
    f = PUBLIC[name]
    x, y = torch.randn(30, 4), torch.randn(30, 6)
    gradient = torch.func.grad(f)(x, y)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(f(x, y), x)
    torch.testing.assert_close(gradient, expected)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return pyrepr.cka(x, y), pyrepr.gram(x, kernel="rbf", sigma=1.0)

    args = (torch.randn(30, 4), torch.randn(30, 6))
    exported = torch.export.export(Model(), args)
    for a, b in zip(exported.module()(*args), Model()(*args), strict=True):
        torch.testing.assert_close(a, b)


def test_null_pointers_are_refused_by_the_native_code():
    from pyrepr import _C

    with pytest.raises(ValueError, match="a layer has no memory"):
        _C.Gram([(0, 4, 2, 2, 1)], 0, 0, 4, 0, [1.0], 1, 0.0, 1)
    with pytest.raises(ValueError, match="dtype code 9 is unknown"):
        _C.Gram([(64, 4, 2, 2, 1)], 9, 0, 4, 0, [1.0], 1, 0.0, 1)


@pytest.mark.gpu
def test_cuda_kernel():
    x, y = torch.randn(300, 40, device="cuda"), torch.randn(300, 70, device="cuda")
    with pyrepr.use_backend("cuda"):
        value = pyrepr.cka(x, y)
    torch.testing.assert_close(value.cpu(), pyrepr.cka(x.cpu(), y.cpu()), rtol=1e-5, atol=1e-6)


class Watcher(TorchDispatchMode):
    """Notes the names of the ops that pass through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_direct_way_is_not_taken_where_somebody_could_tell():
    x, y = torch.randn(6, 3), torch.randn(4, 3)
    rest = (ONES[:1], "linear", 1, 0.0, False)
    expected = x @ y.T
    torch.testing.assert_close(ops.matrix_op(x, y, *rest), expected)
    negated = torch._neg_view(-x)
    assert negated.is_neg()
    torch.testing.assert_close(ops.matrix_op(negated, y, *rest), expected)
    with Watcher() as watcher:
        ops.matrix_op(x, y, *rest)
    assert "pyrepr.gram_matrix.default" in watcher.seen
    with torch.profiler.profile() as profile:
        ops.matrix_op(x, y, *rest)
    assert any(event.key == "pyrepr::gram_matrix" for event in profile.key_averages())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ops.matrix_op(mode.from_tensor(x), mode.from_tensor(y), *rest).shape == (6, 4)
    traced = make_fx(lambda a: ops.matrix_op(a, y, *rest))(x)
    assert any("gram_matrix" in str(node.target) for node in traced.graph.nodes)


def test_autograd_notices_what_an_op_overwrote():
    state = torch.randn(1, 2, 3, 4)
    loss = (torch.ones_like(state, requires_grad=True) * state).sum()  # keeps the state for its backward
    x = torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 4), torch.rand(1, 1, 2)
    with torch.no_grad():
        pyrepr.fused_recurrent_delta_rule(*x, initial_state=state, output_final_state=True, out_state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
