"""Family `lookup`: contracts with torch and with the caller, and every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import pyrepr
from pyrepr.ops import lookup as ops

BACKENDS = ("reference", "cpu")
LEVELS = pyrepr.backend.native()[0].simd_levels()


OPCHECK = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ["hash", "linear", "sum", "backward", "hash_backward"])
def test_opcheck(name):
    x, tables, bias = torch.randn(6, 12).bfloat16(), torch.randn(3, 16, 5), torch.randn(5)
    codes, weights = ops.hash_op(x, 4, "scaled", 1.0)
    quantized, scales = torch.randint(-127, 128, (3, 16, 5), dtype=torch.int8), torch.rand(3, 16)
    grad, rows = torch.randn(6, 5), (codes.long() + 16 * torch.arange(3)).unique()
    cases = {
        "hash": [(x, 4, "scaled", 1.0)],
        "linear": [(x, tables, None, bias, "l1", 1.0, 0), (x, quantized, scales, None, "l1", 1.0, 0)],
        "sum": [(codes, weights, tables, None, 0)],
        "backward": [
            (grad, codes, weights, tables, None, 16, None, True),
            (grad, codes, weights, quantized, scales, 16, None, False),
            (grad, codes, weights, None, None, 16, None, True),
            (grad, codes, weights, None, None, 16, rows, True),
        ],
        "hash_backward": [(x, weights, 4, "scaled", 1.0)],
    }
    for arguments in cases[name]:
        torch.library.opcheck(getattr(torch.ops.pyrepr, f"lookup_{name}").default, arguments, test_utils=OPCHECK)


def test_compiles_without_a_graph_break():
    def loss(x, tables, bias):
        return pyrepr.lookup_linear(x, tables, bias).square().sum()

    arguments = [torch.randn(9, 12), torch.randn(3, 16, 5), torch.randn(5)]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [a.clone().requires_grad_() for a in arguments]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*results, strict=True):
        assert_close(eager, compiled)


def test_functional_gradient_export_and_autocast():
    x, tables = torch.randn(9, 12), torch.randn(3, 16, 5)
    grad = torch.func.grad(lambda t: pyrepr.lookup_linear(x, t).square().sum())(tables)
    leaf = tables.clone().requires_grad_()
    pyrepr.lookup_linear(x, leaf).square().sum().backward()
    assert torch.equal(grad, leaf.grad)

    class Layer(torch.nn.Module):
        def forward(self, x, tables):
            return pyrepr.lookup_linear(x, tables)

    exported = torch.export.export(Layer(), (x, tables)).module()
    assert torch.equal(exported(x, tables), pyrepr.lookup_linear(x, tables))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyrepr.lookup_linear(torch.nn.functional.linear(x, x), tables[:, :8]).dtype == torch.bfloat16


X, TABLES = torch.zeros(2, 12), torch.zeros(3, 16, 5)
CODES = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyrepr.hash_codes(X, 5), ValueError, "multiple of bits = 5, got 12"),
        (
            lambda: pyrepr.segment_sum(torch.ones(3, 2), torch.ones(3, dtype=torch.int64).to_sparse(), 2),
            TypeError,
            "codes must be a dense tensor, got layout sparse_coo",
        ),
        (lambda: pyrepr.hash_codes(X, 0), ValueError, "from 1 to 16, got 0"),
        (lambda: pyrepr.hash_codes(X, 17), ValueError, "from 1 to 16, got 17"),
        (lambda: pyrepr.hash_codes(X.int(), 4), TypeError, "x must be float32"),
        (lambda: pyrepr.lookup_linear(X, TABLES[:2]), ValueError, r"K · bits = 2 · 4 = 8"),
        (lambda: pyrepr.lookup_linear(X, TABLES[:, :15]), ValueError, "2\\^bits rows"),
        (lambda: pyrepr.lookup_linear(X, TABLES[0]), ValueError, r"\[K, n, h\]"),
        (lambda: pyrepr.lookup_linear(X, TABLES.char()), ValueError, "need scales"),
        (lambda: pyrepr.lookup_linear(X, TABLES, scales=TABLES[:, :, 0]), ValueError, "only they"),
        (lambda: pyrepr.lookup_linear(X, TABLES.char(), scales=TABLES[:, :3, 0]), ValueError, r"\[3, 16\]"),
        (lambda: pyrepr.lookup_linear(X, TABLES, X[0]), ValueError, r"bias must have shape \[h\] = \[5\]"),
        (lambda: pyrepr.lookup_linear(X, TABLES, weighting="p"), ValueError, "weighting must be one of"),
        (lambda: pyrepr.lookup_linear(X, TABLES, temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: pyrepr.lookup_linear(X.double(), TABLES), TypeError, "both be float64"),
        (lambda: pyrepr.lookup_linear(X, TABLES.to("meta")), ValueError, "device"),
        (lambda: pyrepr.lookup_sum(CODES, X[:, :2], TABLES), ValueError, "shape of codes"),
        (lambda: pyrepr.lookup_sum(CODES.float(), X[:, :3], TABLES), TypeError, "integer dtype"),
        (lambda: pyrepr.lookup_sum(CODES + 16, X[:, :3], TABLES), IndexError, "from 0 to n - 1 = 15"),
        (lambda: pyrepr.lookup_sum(CODES - 1, X[:, :3], TABLES), IndexError, "from 0 to n - 1 = 15, got -1"),
        (lambda: pyrepr.lookup_sum(CODES + 2**32, X[:, :3], TABLES), IndexError, "from 0 to n - 1 = 15"),
        (lambda: pyrepr.lookup_sum(CODES.clamp(min=40), X[:, :3], TABLES), IndexError, "from 0 to n - 1 = 15, got 40"),
        (lambda: pyrepr.segment_sum(X, CODES, 0), ValueError, "n must be a positive int"),
        (lambda: pyrepr.segment_sum(X, CODES[:1], 4), ValueError, "codes must have shape"),
        (lambda: pyrepr.segment_sum(X, CODES + 4, 4), IndexError, "from 0 to n - 1 = 3"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_refused_in_one_sentence(backend, call, error, message):
    with pyrepr.use_backend(backend), pytest.raises(error, match=message):
        call()
