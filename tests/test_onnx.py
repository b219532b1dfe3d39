"""Layers written as ONNX files and run by ONNX Runtime."""

from __future__ import annotations

import doctest
import sys

import pytest
import torch

onnx = pytest.importorskip("onnx", minversion="1.23")
onnxruntime = pytest.importorskip("onnxruntime", minversion="1.32")
pytest.importorskip("onnxscript")

import pyrepr  # noqa: E402
from pyrepr.integrations.onnx import export  # noqa: E402

LAYERS = {
    "DeltaNet": lambda: pyrepr.nn.DeltaNet(hidden_size=32, num_heads=2, use_gate=True),
    "DeltaNet, conv_bias, relu": lambda: pyrepr.nn.DeltaNet(
        hidden_size=32, num_heads=2, conv_bias=True, qk_activation="relu", qk_norm="sum", allow_neg_eigval=True
    ),
    "GatedDeltaNet": lambda: pyrepr.nn.GatedDeltaNet(32, head_dim=16, num_heads=2, expand_v=1),
    "GatedDeltaNet, grouped": lambda: pyrepr.nn.GatedDeltaNet(32, head_dim=16, num_heads=2, num_v_heads=4),
    "KimiDeltaAttention": lambda: pyrepr.nn.KimiDeltaAttention(32, head_dim=16, num_heads=2),
    "KimiDeltaAttention, bounded": lambda: pyrepr.nn.KimiDeltaAttention(
        32, head_dim=16, num_heads=2, safe_gate=True, lower_bound=-5.0
    ),
    "GLA": lambda: pyrepr.nn.GLA(hidden_size=32, num_heads=2),
    "GatedDeltaProduct": lambda: pyrepr.nn.GatedDeltaProduct(32, head_dim=16, num_heads=2, num_householder=2),
}


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path, *inputs):
    engine = session(path)
    names = [x.name for x in engine.get_inputs()]
    return [torch.from_numpy(x) for x in engine.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})]


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_runs_in_onnx_runtime(name, tmp_path):
    torch.manual_seed(0)
    layer, path = LAYERS[name]().eval(), tmp_path / "layer.onnx"
    x, longer = torch.randn(2, 9, 32), torch.randn(2, 70, 32)
    export(layer, (x,), path, dynamic_shapes=({1: torch.export.Dim("T", min=2)},))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert operators(path).count("LinearAttention") == 1
    with torch.no_grad():
        for given in (x, longer):
            expected = layer(given)[0]
            torch.testing.assert_close(run(path, given)[0], expected, atol=2e-6, rtol=2e-5)


class Serving(torch.nn.Module):
    """A convolution and a rule whose states come in and go out."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.filter = rule, torch.nn.Parameter(torch.randn(3 * 32, 4))

    def forward(self, x, g, beta, conv_state, state):  # [B, T, 96], [B, T, 2], [B, T, 2], [B, 96, 3], [B, 2, 16, 16]
        y, conv_state = pyrepr.causal_conv1d_fn(
            x.mT, self.filter, initial_states=conv_state, return_final_states=True, activation="silu"
        )
        q, k, v = (part.unflatten(-1, (2, 16)) for part in y.mT.chunk(3, -1))
        options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        o, state = self.rule(q, k, v, g=g, beta=beta, **options)
        return o, conv_state, state


@pytest.mark.parametrize("rule", [pyrepr.chunk_gated_delta_rule, pyrepr.fused_recurrent_gated_delta_rule])
def test_states_come_in_and_go_out(rule, tmp_path):
    """A text in three pieces through the file, its states handed on, is the text in one."""
    torch.manual_seed(0)
    model, path = Serving(rule), tmp_path / "serving.onnx"
    x, g, beta = torch.randn(1, 20, 96), -torch.rand(1, 20, 2), torch.rand(1, 20, 2)
    states = [torch.randn(1, 96, 3), torch.randn(1, 2, 16, 16)]
    length = torch.export.Dim("T", min=2)
    shapes = {"x": {1: length}, "g": {1: length}, "beta": {1: length}, "conv_state": {}, "state": {}}
    export(model, (x, g, beta, *states), path, dynamic_shapes=shapes)
    with torch.no_grad():
        expected, *last = model(x, g, beta, *states)
    found = []
    for start, end in ((0, 7), (7, 9), (9, 20)):
        o, *states = run(path, *(t[:, start:end].contiguous() for t in (x, g, beta)), *states)
        found.append(o)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-5)
    for state, wanted in zip(states, last, strict=True):
        torch.testing.assert_close(state, wanted, atol=1e-5, rtol=1e-5)


def test_sixteen_bits_are_computed_in_float32(tmp_path):
    torch.manual_seed(0)
    layer, path = LAYERS["GatedDeltaNet"]().eval().half(), tmp_path / "layer.onnx"
    x = torch.randn(1, 40, 32).half()
    export(layer, (x,), path)
    with torch.no_grad():
        torch.testing.assert_close(run(path, x)[0], layer(x)[0], atol=2e-3, rtol=2e-3)


def test_options_reach_torch_and_names_the_file(tmp_path):
    layer, path = LAYERS["DeltaNet"]().eval(), tmp_path / "layer.onnx"
    export(layer, (torch.randn(1, 5, 32),), path, input_names=["tokens"], output_names=["mixed"])
    engine = session(path)
    assert [x.name for x in engine.get_inputs()] == ["tokens"] and engine.get_outputs()[0].name == "mixed"
    assert {(s.domain, s.version) for s in onnx.load(path).opset_import} == {("", 27)}


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def refused(function, *tensors):
    with pytest.raises((ValueError, TypeError)) as caught:
        export(Function(function), tensors)
    return str(caught.value)


def test_what_the_opset_cannot_say_is_refused():
    q, beta = torch.randn(1, 6, 2, 8), torch.rand(1, 6, 2)
    bounds = torch.tensor([0, 2, 6])
    packed = refused(lambda q, b, c: pyrepr.chunk_delta_rule(q, q, q, b, cu_seqlens=c)[0], q, beta, bounds)
    assert packed == "cu_seqlens must be None, ONNX's opset 27 keeps no packed sequences apart"
    x, weight = torch.randn(1, 4, 6), torch.randn(4, 3)
    numbers = torch.zeros(1, 6, dtype=torch.int32)
    packed = refused(lambda x, w, s: pyrepr.causal_conv1d_fn(x, w, seq_idx=s), x, weight, numbers)
    assert packed.startswith("seq_idx must be None")
    wide = refused(lambda q, b: pyrepr.chunk_delta_rule(q, q, q, b)[0], q.double(), beta.double())
    assert wide == "module must be float32, bfloat16 or float16 for delta_rule_forward of ONNX, got float64"
    other = refused(lambda x, y: pyrepr.cka(x, y), torch.randn(8, 3), torch.randn(8, 3))
    assert other.startswith("module must be made of what ONNX's opset 27 can say, which has nothing for")


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(export.__doc__, {"torch": torch, "pyrepr": pyrepr}, "export", None, 0)
    assert example.examples and not doctest.DocTestRunner(verbose=False).run(example).failed


def test_without_onnx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'onnx is needed here .* pip install "pyrepr-kernels\[onnx\]"'):
        export(torch.nn.Identity(), (torch.zeros(1),))
