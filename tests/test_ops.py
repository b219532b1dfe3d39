"""The contract of every leaf op of family `gram`, and of the public functions on top, with torch's own machinery."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pyrepr
from pyrepr.ops import delta_rule as delta_ops
from pyrepr.ops import gram as ops
from pyrepr.ops.moments import moments_op_

ONES = torch.ones(2, dtype=torch.float64)
CONSTANTS = ops.constants_of(ONES, "linear")


def layers(n=20):
    return [torch.randn(n, 3), torch.randn(n, 5)]


CALLS = {
    "gram_stats": lambda: (ops.stats_op, (layers(), None, CONSTANTS, "rbf", 1, True, False, 0, False)),
    "gram_stats masked": lambda: (
        ops.stats_op,
        (layers(), torch.arange(20) < 9, CONSTANTS, "linear", 1, True, True, 1, False),
    ),
    "gram_stats keeping dots": lambda: (ops.stats_op, (layers(), None, CONSTANTS, "linear", 1, True, False, 0, True)),
    "gram_matrix": lambda: (ops.matrix_op, (torch.randn(7, 3), torch.randn(4, 3), ONES[:1], "rbf", 1, 0.0, True)),
    "gram_row_stats": lambda: (ops.row_stats_op, (layers(), False, 0)),
    "gram_row_stats by features": lambda: (ops.row_stats_op, (layers(), True, 0)),
    "gram_row_stats of two sides": lambda: (ops.row_stats_op, (layers(), False, 1)),
    "gram_median": lambda: (ops.median_op, (layers(), None, True)),
    "gram_moments_": lambda: (
        moments_op_,
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


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_the_op_that_goes_from_layers_to_values(estimator, backend):
    xs = [*layers(), torch.ones(20, 4)]
    torch.library.opcheck(ops.at_once_op.overload, (xs[:2], estimator, 1, True, False, True, True))
    values, states, *_ = ops.at_once_op(xs, estimator, 0, True, True, False, False)
    pairs = [[pyrepr.reference.gram.cka(x.double(), y.double(), estimator=estimator) for y in xs[:2]] for x in xs[:2]]
    torch.testing.assert_close(values[:2, :2].double(), torch.tensor(pairs).double(), rtol=1e-5, atol=1e-6)
    assert states.tolist() == [0, 0, ops.ALIKE] and values[2].isnan().all() and values[:, 2].isnan().all()
    hsic, *_ = ops.at_once_op(xs[:2], estimator, 1, False, False, False, False)
    truth = pyrepr.reference.gram.hsic(xs[0].double(), xs[1].double(), estimator=estimator)
    torch.testing.assert_close(hsic[0, 1].double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["tiny", "huge", "outlier"])
def test_layers_whose_digits_are_lost_are_not_taken_at_once(change):
    first = torch.zeros(1, dtype=torch.long)
    x, y = layers()

    def make(x):
        return x.index_fill(0, first, 1e5) if change == "outlier" else x * (1e-8 if change == "tiny" else 1e8)

    for xs in ([x, make(y)], [make(x), y]):
        _, states, *_ = ops.at_once_op(xs, "unbiased", 1, True, True, False, False)
        assert states.tolist() == [ops.LOST * (each is not x and each is not y) for each in xs]
        assert ops.hsic_at_once(xs, "unbiased", 1, True) is None
    for strange in (float("nan"), float("inf")):  # no digits to look for
        strangers = [x, y.index_fill(0, first, strange)]
        values, states, *_ = ops.at_once_op(strangers, "unbiased", 1, True, True, False, False)
        assert states.tolist() == [0, 0] and values[0, 1].isnan()


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


@pytest.mark.parametrize("name", ["gram_median", "gram_apply", "gram_row_stats"])
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
        _C.Gram([(0, 4, 2, 2, 1)], 0, 0, 4, 0, [[1.0], [0.0], [0.0]], 1, True, 1)
    with pytest.raises(ValueError, match="dtype code 9 is unknown"):
        _C.Gram([(64, 4, 2, 2, 1)], 9, 0, 4, 0, [[1.0], [0.0], [0.0]], 1, True, 1)


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


def delta_step(dtype=torch.float32, **change):
    """A decoding step: o and the state that was written."""
    x = {"q": (1, 1, 2, 8), "k": (1, 1, 2, 8), "v": (1, 1, 4, 20), "g": (1, 1, 4), "beta": (1, 1, 4)}
    x = {name: torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5 for name, shape in x.items()}
    x = {name: t.to(dtype) if name != "g" else t for name, t in x.items()} | change
    state = torch.linspace(-1, 1, 4 * 8 * 20).view(1, 4, 8, 20)
    o, final = pyrepr.fused_recurrent_gated_delta_rule(**x, initial_state=state, output_final_state=True)
    again, _ = pyrepr.fused_recurrent_gated_delta_rule(**x, initial_state=state, out_state=state)
    return o, final, again, state


def looked_up(dtype=torch.float32, shape=(3, 12), tables=torch.float32):
    x = torch.linspace(-1, 2, 36).view(shape).to(dtype)
    rows = (torch.arange(3 * 16 * 5).view(3, 16, 5) % 7 - 3).to(tables)
    scales = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) if tables == torch.int8 else None
    return pyrepr.lookup_linear(x, rows, torch.arange(5.0), scales=scales, weighting="l1")


def converted(rank=3):
    """As `looked_up`, of what a converted layer hashes."""
    x = torch.linspace(-1, 2, 36).view(3, 12)
    rows, generator = (torch.arange(6 * 16 * 5).view(6, 16, 5) % 7 - 3).float(), torch.Generator().manual_seed(0)
    shapes = {"centre": 12, "scale": 12, "down": (rank, 12), "up": (rank, 5)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return pyrepr.lookup_linear(x, rows, torch.arange(5.0), hash="two_bit", **given)


def convolved(dtype=torch.float32, D=32, S=4, dims=3):
    generator = torch.Generator().manual_seed(0)
    x, state = torch.randn(2, D, generator=generator).to(dtype), torch.randn(2, D, S, generator=generator).to(dtype)
    weight, bias = torch.randn(D, 4, generator=generator), torch.randn(D, generator=generator)
    return pyrepr.causal_conv1d_update(x if dims == 2 else x[..., None], state, weight, bias, "silu"), state


SHORT = {
    "step": delta_step,
    "step in bfloat16": lambda: delta_step(torch.bfloat16),
    "step of strided": lambda: delta_step(q=torch.full((1, 1, 2, 16), 0.3)[..., :8]),
    "lookup": looked_up,
    "lookup of three axes in float16": lambda: looked_up(torch.float16, (3, 1, 12)),
    "lookup of a converted layer": converted,
    "lookup of one row in int8": lambda: looked_up(tables=torch.int8),
    "convolution": convolved,
    "convolution of odd width": lambda: convolved(D=33, S=5),
    "convolution in bfloat16": lambda: convolved(torch.bfloat16, dims=2),
}


@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_is_the_long_way(name, monkeypatch):
    """Calls that read their tensors in native code give the bits, shapes and dtypes of those through the dispatcher."""
    with Watcher() as watcher:
        expected = SHORT[name]()
    assert any("pyrepr." in op for op in watcher.seen)
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):  # PyTorch 2.10; older ones have the long way only
        monkeypatch.setattr("pyrepr.ops._leaf.choose", None)
    torch.testing.assert_close(SHORT[name](), expected, rtol=0, atol=0)


def test_the_short_way_is_not_taken_where_it_would_be_wrong():
    x = [torch.rand(1, 1, 2, 8) for _ in range(3)] + [-torch.rand(1, 1, 2), torch.rand(1, 1, 2)]
    memory = torch.zeros(2 * 128)
    state = memory[:128].view(1, 2, 8, 8)

    def short(*tensors, initial=state, final=state):
        return delta_ops.step(*tensors, None, initial, final, False, delta_ops.Gate.PER_HEAD) is not None

    assert short(*x) == hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert not short(torch._neg_view(-x[0]), *x[1:])
    assert not short(x[0].clone().requires_grad_(), *x[1:])
    assert not short(x[0].to("meta"), *x[1:])
    assert not short(x[0].double(), *x[1:])
    assert not short(x[0][..., :4], *x[1:])
    assert not short(*x[:4], x[4][..., :1])
    assert not short(*x, initial=memory[8:136].view(1, 2, 8, 8)), "a state that overlaps the one to write"
    with pyrepr.use_backend("reference"):
        assert not short(*x)
    with torch.profiler.profile():
        assert not short(*x)
    with torch.no_grad():
        assert short(x[0].clone().requires_grad_(), *x[1:]) == short(*x)
