"""Right or refused, in every mode of differentiation: every public function × every mode, against float64.

The truth is autograd through the plain formulas of ``pyrepr.reference``, token by token and with whole n × n matrices,
in float64; modules are held to finite differences. What a function is differentiated in is one vector of all its
inputs, so that the mixed second derivatives are tested too.
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from derivative_rows import CODES, ROWS, SPECS, STANDARD
from derivatives import FIRST, HESSIANS, MODES, SECOND, few
from torch.autograd import functional, gradcheck, gradgradcheck

import pyrepr
from pyrepr.nn import (
    GLA,
    CKALoss,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    KimiDeltaAttention,
    LookupLinear,
    ShortConvolution,
    SignLinear,
)
from pyrepr.ops import causal_conv1d as conv_ops
from pyrepr.ops import delta_rule as delta_ops
from pyrepr.ops import gram as gram_ops
from pyrepr.ops import lookup as lookup_ops
from pyrepr.ops import signs as sign_ops
from pyrepr.reference import gram as plain_gram
from pyrepr.similarity._hsic import hsic_op
from pyrepr.similarity.measures import kernel_op

# Worst error seen in all of them, of the norm of the result, is 1.2e-13 in float64 and 7.4e-5 in float32 (forward over
# forward through a centred cosine, where terms cancel); three times that.
TOLERANCE = {torch.float64: 4e-13, torch.float32: 2.3e-4}
# Where, and in what: the kernels; what runs where no kernel does; float64, whichever of them takes it.
WHERE = [("cpu", torch.float32), ("reference", torch.float32), ("cpu", torch.float64)]


@functools.cache
def truths(row):
    """Of every mode, from value, gradient and Hessian of the plain formula at x and at x + v."""
    f, x, v = ROWS[row].scalar("plain", torch.float64), ROWS[row].vector, ROWS[row].direction
    found = [(f(x), functional.jacobian(f, x), functional.hvp(f, x, v)[1]) for x in (x, x + v)]
    values, gradients, products = map(torch.stack, zip(*found, strict=True))
    gradient, product, hessian = gradients[0], products[0], functional.hessian(f, x)
    others = {
        **dict.fromkeys(["jvp", "dual numbers"], gradient @ v),
        "vmap": values,
        "vmap of grad": gradients,
        "vmap of vmap of grad": gradients[None],
        "grad of vmap": gradients.T,
        "vmap of jvp": gradients @ v,
        "gradient penalty": gradient + 2 * hessian @ gradient,
        "forward over forward": v @ product,
        "vmap of hvp": products,
        "autograd hessian": hessian[few(x)][:, few(x)],
        "third": MODES["third"](f, x, v),
    }
    return dict.fromkeys(FIRST, gradient) | dict.fromkeys(SECOND, product) | dict.fromkeys(HESSIANS, hessian) | others


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", ROWS)
def test_every_function_in_every_mode(row, mode):
    expected = truths(row)[mode]
    assert expected.norm() > 1e-6, "a test of nothing"
    for backend, dtype in WHERE:
        with pyrepr.use_backend(backend):
            found = ROWS[row].result(mode, "ours", dtype)
        error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-3)
        assert found.dtype == dtype and found.shape == expected.shape
        assert error < TOLERANCE[dtype], f"{backend}, {dtype}: off by {error:.1e}"


CHECKED = [
    "gated delta rule",
    "kda, in chunks",
    "simple gla",
    "convolution",
    "lookup_linear, scaled",
    "lookup_linear of two bits, scaled",
    "converted, two_bit",
    "sign_linear, two_bit",
    "lookup_sum",
    "segment_sum",
    "info_nce, cosine",
    "cka, laplacian, masked",
    "cka, kept products",
    "gram of two, rbf",
]


@pytest.mark.parametrize("row", CHECKED)
def test_finite_differences(row):
    """Of first and second derivatives, forward and reverse, also batched; along random directions, since every entry
    is held to the plain formula above."""
    row = ROWS[row]
    f = row.scalar("ours", torch.float64)
    x, one = row.vector.clone().requires_grad_(), torch.ones((), dtype=torch.float64)
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(f, x, fast_mode=True, check_batched_grad=True, **forward)
    assert gradgradcheck(f, x, one, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


MODULES = {
    "DeltaNet": (lambda: DeltaNet(hidden_size=4, num_heads=2, conv_size=2), (1, 3, 4)),
    "GatedDeltaNet": (
        lambda: GatedDeltaNet(hidden_size=4, num_heads=1, head_dim=2, expand_v=1, conv_size=2),
        (1, 3, 4),
    ),
    "KimiDeltaAttention": (
        lambda: KimiDeltaAttention(hidden_size=4, num_heads=1, head_dim=2, expand_v=1, conv_size=2),
        (1, 3, 4),
    ),
    "GatedDeltaProduct": (
        lambda: GatedDeltaProduct(hidden_size=4, num_heads=1, head_dim=2, expand_v=1, conv_size=2),
        (1, 3, 4),
    ),
    "GLA": (lambda: GLA(hidden_size=4, num_heads=1, gate_logit_normalizer=1), (1, 3, 4)),
    "ShortConvolution": (lambda: ShortConvolution(4, 3), (1, 3, 4)),
    "LookupLinear": (lambda: LookupLinear(4, 3, bits=2), (3, 4)),
    "LookupLinear of two bits": (lambda: LookupLinear(4, 3, bits=4, hash="two_bit"), (3, 4)),
    "SignLinear": (lambda: SignLinear(4, 3), (3, 4)),
    "CKALoss": (lambda: CKALoss(kernel="cosine"), (5, 3)),
}


def called(module, x):
    guide = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape).cos()
    out = module(x, guide) if isinstance(module, CKALoss) else module(x)
    return (out[0] if isinstance(out, tuple) else out).sin().sum()


@pytest.mark.parametrize("name", MODULES)
def test_modules_by_finite_differences_and_for_each_sample(name):
    make, shape = MODULES[name]
    module = make().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    # The norms of these layers have no forward mode of their own in all PyTorch versions: reverse over reverse.
    assert gradgradcheck(lambda x: called(module, x), x, one)
    parameters = {k: p.detach() for k, p in module.named_parameters()}
    samples = torch.randn(3, *shape, dtype=torch.float64)

    def loss(parameters, x):
        if isinstance(module, CKALoss):
            return called(module, x)
        out = torch.func.functional_call(module, parameters, (x,))
        return (out[0] if isinstance(out, tuple) else out).sin().sum()

    both = torch.func.grad(loss, argnums=(0, 1))
    found = torch.func.vmap(both, in_dims=(None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        expected = both(parameters, sample)
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient[i], expected[0][name])
        torch.testing.assert_close(found[1][i], expected[1])


# What is refused, with one sentence

LEAVES = {
    "gram_row_stats": lambda x: gram_ops.row_stats_op([x], True, 0)[5],
    "gram_median": lambda x: gram_ops.median_op([x], None, True)[0],
    "gram_apply": lambda x: gram_ops.apply_op(x, x.detach(), False),
    "gram_hsic_slopes": lambda x: gram_ops.slopes_op(x, x.detach(), x.detach(), "biased", 0, True)[0],
    "lookup_hash": lambda x: lookup_ops.hash_op(x, 2, "l1", 1.0)[1],
    "delta_rule_update_": lambda x: delta_ops.update_op_(
        torch.zeros(1, 1, 4, 4), *(x[None, :, None],) * 3, None, torch.ones(1, 4, 1), None, None, 1.0, False
    ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_op_without_a_derivative_refuses_all_of_them(name):
    x, f = torch.rand(4, 4), LEAVES[name]
    ways = {
        "backward": lambda: f(x.clone().requires_grad_()),
        "func.grad": lambda: torch.func.grad(lambda x: f(x).sum())(x),
        "jvp": lambda: torch.func.jvp(f, (x,), (x,)),
        "dual": lambda: MODES["dual numbers"](f, x, x),
        "jacfwd": lambda: torch.func.jacfwd(f)(x),
    }
    for way, attempt in ways.items():
        with pytest.raises(RuntimeError, match="is a leaf op without a derivative"):
            pytest.fail(f"{way} gave {attempt()}")


def test_what_is_written_in_place_is_not_differentiated():
    x, state, weight = torch.randn(2, 3), torch.randn(2, 3, 4), torch.randn(3, 3)
    with pytest.raises(RuntimeError, match="without a derivative"):
        torch.func.jvp(lambda x: pyrepr.causal_conv1d_update(x, state, weight), (x,), (x,))
    before = state.clone()
    with pytest.raises(RuntimeError, match="written in place"):
        torch.func.grad(lambda x: pyrepr.causal_conv1d_update(x, state, weight).sum())(x)
    assert torch.equal(state, before)


def test_scales_of_int8_tables_have_no_derivative():
    x, tables = torch.randn(3, 4), torch.ones(2, 4, 2, dtype=torch.int8)

    def f(scales):
        return pyrepr.functional.lookup_linear(x, tables, scales=scales)

    scales = torch.rand(2, 4)
    with pytest.raises(RuntimeError, match="scales counts as a constant in lookup_linear"):
        f(scales.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="scales counts as a constant in lookup_linear"):
        torch.func.jvp(f, (scales,), (scales,))


@pytest.mark.parametrize("name", STANDARD)
def test_what_a_converted_layer_standardises_by_has_no_derivative(name):
    x, tables = torch.randn(3, 4), torch.randn(2, 4, 2)

    def f(constant):
        return pyrepr.functional.lookup_linear(x, tables, **{**STANDARD, name: constant})

    with pytest.raises(RuntimeError, match=f"{name} counts as a constant in lookup_converted"):
        f(STANDARD[name].clone().requires_grad_())
    with pytest.raises(RuntimeError, match=f"{name} counts as a constant in lookup_converted"):
        torch.func.jvp(f, (STANDARD[name],), (STANDARD[name],))


def test_a_sparse_gradient_is_right_once():
    x, tables = torch.randn(3, 4), torch.randn(2, 4, 2)

    def loss(tables, sparse):
        return pyrepr.functional.lookup_linear(x, tables, sparse=sparse).square().sum()

    tables.requires_grad_()
    sparse, dense = (torch.autograd.grad(loss(tables, s), tables, create_graph=True)[0] for s in (True, False))
    assert sparse.is_sparse
    torch.testing.assert_close(sparse.to_dense(), dense)
    with pytest.raises(RuntimeError, match="a sparse gradient cannot be differentiated again"):
        torch.autograd.grad(sparse.to_dense().square().sum(), tables)


def test_the_median_is_a_constant_in_every_mode():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    sigmas = [2 * plain_gram.median_distance(z) for z in (x, y)]

    def plain(x):
        k, l = (plain_gram.kernel_matrix(z, z, "rbf", s, 1, 0.0) for z, s in zip((x, y), sigmas, strict=True))
        xy, xx, yy = (plain_gram.hsic_of_kernels(*pair) for pair in ((k, l), (k, k), (l, l)))
        return xy / (xx * yy).sqrt()

    def ours(x):
        return pyrepr.cka(x, y, kernel="rbf", bandwidth=2.0)

    v = torch.randn_like(x)
    for mode in ("backward", "jvp", "jacfwd", "dual numbers", "autograd hvp", "forward over reverse", "hessian"):
        torch.testing.assert_close(MODES[mode](ours, x, v), MODES[mode](plain, x, v), msg=mode)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(ours))(torch.stack([x, 3 * x])),
        torch.stack([torch.func.grad(ours)(x), torch.func.grad(ours)(3 * x)]),
    )


def test_what_vmap_hides_is_not_looked_at():
    """A layer whose samples are all alike, and ones of other magnitudes, among others under vmap."""
    x, y = torch.randn(3, 6, 3), torch.randn(6, 2)
    x[1] = 1.0
    x[2] *= 1e-25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.func.vmap(lambda x: pyrepr.cka(x, y))(x)
    assert found.isnan().tolist() == [False, True, False]
    for i in (0, 2):
        assert torch.equal(found[i], pyrepr.cka(x[i], y))


# With torch.compile, torch.export and autocast

GRAPHS = [
    "gated delta rule",
    "gla",
    "convolution",
    "lookup_linear, scaled",
    "converted, two_bit",
    "sign_linear, two_bit",
    "lookup_sum",
    "segment_sum",
    "info_nce, cosine",
    "cka, linear",
    "gram, rbf",
]


@pytest.mark.parametrize("row", GRAPHS)
def test_compiled_in_one_graph(row):
    f = ROWS[row].scalar("ours", torch.float32)
    x, v = ROWS[row].vector.float(), ROWS[row].direction.float()
    transforms = {
        "backward": f,
        "func.grad": torch.func.grad(f),
        "jvp": lambda x: torch.func.jvp(f, (x,), (v,))[1],
        "func.grad of func.grad": torch.func.grad(lambda x: (torch.func.grad(f)(x) * v).sum()),
        "vmap of grad": lambda x: torch.func.vmap(torch.func.grad(f), in_dims=1)(torch.stack([x, x + v], 1)),
    }
    for mode, transform in transforms.items():
        torch._dynamo.reset()
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        found = MODES[mode](compiled, x, v) if mode == "backward" else compiled(x)
        torch.testing.assert_close(found, truths(row)[mode].float(), rtol=1e-4, atol=1e-4, msg=f"{row}, {mode}")


@pytest.mark.parametrize("row", GRAPHS)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_exported_and_differentiated(row, grad_mode):
    f = ROWS[row].scalar("ours", torch.float32)

    class Function(torch.nn.Module):
        def forward(self, x):
            return f(x)

    x, v = ROWS[row].vector.float(), ROWS[row].direction.float()
    with torch.set_grad_enabled(grad_mode):
        exported = torch.export.export(Function(), (x,)).module()
    for mode in ("backward", "grad of grad"):
        found = MODES[mode](exported, x, v)
        torch.testing.assert_close(found, truths(row)[mode].float(), rtol=1e-4, atol=1e-4, msg=f"{row}, {mode}")


@pytest.mark.parametrize("row", ["gated delta rule", "convolution", "lookup_linear, scaled", "cka, linear"])
def test_autocast_changes_no_derivative(row):
    f, x, v = ROWS[row].scalar("ours", torch.float32), ROWS[row].vector.float(), ROWS[row].direction.float()
    for mode in ("jvp", "grad of grad", "forward over reverse"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = MODES[mode](f, x, v)
        torch.testing.assert_close(found, MODES[mode](f, x, v), rtol=1e-5, atol=1e-6, msg=mode)


OPS = {
    "gram_stats": lambda: (
        gram_ops.stats_op,
        ([randn(6, 3), randn(6, 2)], None, CONSTANTS, "rbf", 1, True, False, 0, False),
    ),
    "gram_hsic_at_once": lambda: (
        gram_ops.at_once_op,
        ([randn(6, 3), randn(6, 2)], "unbiased", 1, True, False, True, True),
    ),
    "gram_hsic_at_once, features": lambda: (
        gram_ops.at_once_op,
        ([randn(9, 3), randn(9, 2), randn(9, 4)], "biased", 0, False, True, True, True),
    ),
    "gram_matrix": lambda: (gram_ops.matrix_op, (randn(5, 3), randn(4, 3), ONES[:1], "cosine", 1, 0.0, False)),
    "gram_hsic": lambda: (hsic_op, ([randn(6, 3), randn(6, 2)], None, None, *SPECS["rbf"].fields(), "biased", 1)),
    "gram_kernel": lambda: (kernel_op, ([randn(5, 3), randn(4, 3)], None, None, *SPECS["laplacian"].fields())),
    "delta_rule": lambda: (
        delta_ops.forward_op,
        (randn(1, 5, 1, 3), randn(1, 5, 1, 3), randn(1, 5, 2, 2), None, randn(1, 5, 2), None, None, 0.5, False, 1),
    ),
    "delta_rule, no erase": lambda: (
        delta_ops.forward_op,
        (randn(1, 5, 1, 3), randn(1, 5, 1, 3), randn(1, 5, 2, 2), randn(1, 5, 2), None, None, None, 0.5, False, 1),
    ),
    "causal_conv1d": lambda: (
        conv_ops.forward_op,
        (randn(2, 4, 3), randn(3, 2), randn(3), randn(2, 3, 1), None, None, True),
    ),
    "lookup_linear": lambda: (
        lookup_ops.linear_op,
        (randn(3, 4), randn(2, 4, 3), None, randn(3), "scaled", 1.0, 0, False),
    ),
    "lookup_converted": lambda: (
        lookup_ops.converted_op,
        (*(randn(3, 4), randn(2, 16, 3), None, randn(3), *STANDARD.values(), randn(2, 4), randn(2, 3)), *CONVERTED),
    ),
    "sign_linear": lambda: (
        sign_ops.sign_op,
        (randn(3, 4), BYTES, torch.rand(3), randn(3), *STANDARD.values(), randn(2, 4), randn(2, 3), "two_bit"),
    ),
    "sign_linear, bare": lambda: (sign_ops.sign_op, (randn(3, 8), BYTES, torch.rand(3), *(None,) * 5, "one_bit")),
    "lookup_sum": lambda: (lookup_ops.sum_op, (CODES, randn(3, 2), randn(2, 4, 3), None, 0, False)),
    "lookup_segments": lambda: (lookup_ops.segments_op, (randn(3, 2), CODES, randn(3, 2), 4)),
}
CONVERTED = ("scaled", 1.0, 0, False, "two_bit")
BYTES = torch.arange(24, dtype=torch.int8).view(3, 8) - 12
ONES = torch.ones(2, dtype=torch.float64)
CONSTANTS = gram_ops.constants_of(ONES, "linear")


def randn(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_opcheck(name, backend_name):
    op, args = OPS[name]()
    with pyrepr.use_backend(backend_name):
        torch.library.opcheck(op.overload, args)


def test_first_derivatives_run_the_kernels(monkeypatch):
    """Whoever asks, and however: the reference's autograd is for second derivatives and forward mode."""
    x = torch.randn(6, 4)
    monkeypatch.setattr("pyrepr.ops._differentiable.Derived.outputs_of", None)

    def f(x):
        return pyrepr.cka(x, x.detach().cos()) + pyrepr.functional.lookup_linear(x, TABLE).sin().sum()

    for mode in ("backward", "func.grad", "jacrev", "vjp, later", "vmap of grad"):
        assert MODES[mode](f, x.flatten()[:4].expand(5, 4) + x[:5], x[:5]).isfinite().all()


TABLE = torch.linspace(-1, 1, 16).view(2, 4, 2)
