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
from derivatives import HESSIANS, MODES
from torch.autograd import gradcheck, gradgradcheck

import pyrepr
from pyrepr import functional
from pyrepr.nn import (
    GLA,
    CKALoss,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    KimiDeltaAttention,
    LookupLinear,
    ShortConvolution,
)
from pyrepr.ops import causal_conv1d as conv_ops
from pyrepr.ops import delta_rule as delta_ops
from pyrepr.ops import gram as gram_ops
from pyrepr.ops import lookup as lookup_ops
from pyrepr.reference import causal_conv1d as plain_conv
from pyrepr.reference import delta_rule as plain_rule
from pyrepr.reference import gram as plain_gram
from pyrepr.reference import lookup as plain_lookup
from pyrepr.similarity._hsic import hsic_op
from pyrepr.similarity.measures import kernel_op

# Worst error seen in all of them, of the norm of the result, is 1.2e-13 in float64 and 7.4e-5 in float32 (forward over
# forward through a centred cosine, where terms cancel); three times that.
TOLERANCE = {torch.float64: 4e-13, torch.float32: 2.3e-4}
# Where, and in what: the kernels; what runs where no kernel does; float64, whichever of them takes it.
WHERE = [("cpu", torch.float32), ("reference", torch.float32), ("cpu", torch.float64)]


class Row:
    """A function of ours, the same formula in plain PyTorch, and their tensors; those of `constant` are not varied."""

    def __init__(self, ours, plain, constant=(), **tensors):
        generator = torch.Generator().manual_seed(1)
        self.functions = {"ours": ours, "plain": plain}
        self.tensors = {
            name: torch.randn(t, generator=generator, dtype=torch.float64) if isinstance(t, tuple) else t
            for name, t in tensors.items()
        }
        self.names = [name for name in self.tensors if name not in constant]
        self.sizes = [self.tensors[name].numel() for name in self.names]
        self.vector = torch.cat([self.tensors[name].flatten() for name in self.names])
        self.direction = torch.randn(len(self.vector), generator=generator, dtype=torch.float64)

    def scalar(self, which, dtype):
        """The function of one vector: a curved one of everything that comes out."""

        def f(x):
            given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()}
            for name, part in zip(self.names, x.split(self.sizes), strict=True):
                given[name] = part.reshape(self.tensors[name].shape)
            out = self.functions[which](**given)
            out = out if isinstance(out, tuple) else (out,)
            return sum((y.to(dtype) * ramp(y)).sin().sum() for y in out)

        return f

    def result(self, mode, which, dtype):
        vector, direction = self.vector.to(dtype), self.direction.to(dtype)
        return MODES[mode](self.scalar(which, dtype), vector, direction)


def ramp(y):
    """Other weights for other elements."""
    return torch.linspace(0.3, 1.1, y.numel(), dtype=y.dtype).view(y.shape)


# gram, hsic, cka, cka_matrix

OPTIONS = {"rbf": {"sigma": 1.3}, "laplacian": {"sigma": 1.3}, "polynomial": {"gamma": 0.2}}


def matrix(x, y, kernel):
    return plain_gram.kernel_matrix(x, y, kernel, 0.2 if kernel == "polynomial" else 1.3, 3, 1.0)


def centred(k):
    return k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()


def plain_hsic(x, y, kernel="linear", estimator="unbiased"):
    return plain_gram.hsic_of_kernels(matrix(x, x, kernel), matrix(y, y, kernel), estimator)


def plain_cka(x, y, kernel="linear", estimator="unbiased"):
    xy, xx, yy = (plain_hsic(*z, kernel, estimator) for z in ((x, y), (x, x), (y, y)))
    return xy / (xx * yy).sqrt()


def plain_table(xs, ys):
    return torch.stack([torch.stack([plain_cka(x, y) for y in ys]) for x in xs])


MASK = torch.tensor([True, True, False, True, True, True])
LAYERS = {"x": (6, 2), "y": (6, 3)}
WIDE = {"x": (5, 9), "y": (5, 8)}
ROWS = {
    "cka, one side": Row(pyrepr.cka, plain_cka, ["y"], **LAYERS),
    "cka, kept products": Row(pyrepr.cka, plain_cka, ["y"], **WIDE),
    "cka_matrix": Row(
        lambda x, y, z: pyrepr.cka_matrix([x, y, z]),
        lambda x, y, z: plain_table((x, y, z), (x, y, z)),
        x=(5, 2),
        y=(5, 3),
        z=(5, 1),
    ),
    "cka_matrix of two": Row(
        lambda x, y, z: pyrepr.cka_matrix([x, y], [z]),
        lambda x, y, z: plain_table((x, y), (z,)),
        x=(5, 2),
        y=(5, 3),
        z=(5, 1),
    ),
    "gram of two, linear, centred": Row(
        lambda x, y: pyrepr.gram(x, y, center=True), lambda x, y: centred(matrix(x, y, "linear")), x=(4, 2), y=(3, 2)
    ),
}
SPECS = {kernel: pyrepr.Kernel(kernel, **OPTIONS.get(kernel, {})) for kernel in plain_gram.KERNELS}
for kernel, spec in SPECS.items():
    ours = functools.partial(pyrepr.gram, kernel=spec)
    ROWS |= {
        f"gram, {kernel}": Row(ours, lambda x, k=kernel: matrix(x, x, k), x=(5, 3)),
        f"gram of two, {kernel}": Row(ours, lambda x, y, k=kernel: matrix(x, y, k), x=(3, 3), y=(2, 3)),
        f"cka, {kernel}": Row(
            functools.partial(pyrepr.cka, kernel=spec), functools.partial(plain_cka, kernel=kernel), **LAYERS
        ),
    }
ROWS |= {
    "gram, cosine, centred": Row(
        functools.partial(pyrepr.gram, kernel="cosine", center=True),
        lambda x: centred(matrix(x, x, "cosine")),
        x=(5, 3),
    ),
    "hsic": Row(
        functools.partial(pyrepr.hsic, kernel=SPECS["rbf"]), functools.partial(plain_hsic, kernel="rbf"), **LAYERS
    ),
    "cka, biased": Row(
        functools.partial(pyrepr.cka, kernel=SPECS["polynomial"], estimator="biased"),
        functools.partial(plain_cka, kernel="polynomial", estimator="biased"),
        **LAYERS,
    ),
    "cka, masked": Row(functools.partial(pyrepr.cka, mask=MASK), lambda x, y: plain_cka(x[MASK], y[MASK]), **LAYERS),
    "cka, laplacian, masked": Row(
        functools.partial(pyrepr.cka, kernel=SPECS["laplacian"], mask=MASK),
        lambda x, y: plain_cka(x[MASK], y[MASK], "laplacian"),
        **LAYERS,
    ),
}

# The delta rule

RULES = {
    "": (pyrepr.chunk_delta_rule, pyrepr.fused_recurrent_delta_rule),
    "gated ": (pyrepr.chunk_gated_delta_rule, pyrepr.fused_recurrent_gated_delta_rule),
    "kda ": (pyrepr.chunk_kda, pyrepr.fused_recurrent_kda),
}


def rule_row(function, gate, T=4, cu=None, constant=(), states=True):
    B, H, K, HV, V = 1, 1, 2, 2, 1
    tensors = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "beta": (B, T, HV)}
    if gate:
        generator = torch.Generator().manual_seed(2)
        g = torch.rand((B, T, HV) if gate == "gated " else (B, T, HV, K), generator=generator, dtype=torch.float64)
        tensors["g"] = -g
    if states:
        tensors["initial_state"] = (B if cu is None else len(cu) - 1, HV, K, V)
    options = {"cu_seqlens": None if cu is None else torch.tensor(cu), "scale": 0.7}

    def ours(**given):
        return function(**given, **options, output_final_state=True, use_qk_l2norm_in_kernel=True)

    def plain(g=None, **given):
        return plain_rule.delta_rule(g=g, **given, **options, use_qk_l2norm=True)

    return Row(ours, plain, constant, **tensors)


ROWS |= {f"{gate}delta rule": rule_row(chunk, gate) for gate, (chunk, _) in RULES.items()}
ROWS |= {
    "gated delta rule, recurrent": rule_row(RULES["gated "][1], "gated ", T=2),
    "delta rule, in chunks": rule_row(RULES["gated "][0], "gated ", T=11, constant=["v", "beta", "initial_state"]),
    "kda, in chunks": rule_row(RULES["kda "][0], "kda ", T=10, constant=["q", "v", "beta", "initial_state"]),
    "delta rule, packed": rule_row(RULES["gated "][0], "gated ", T=5, cu=[0, 2, 2, 5], constant=["q", "v"]),
    "delta rule, keys alone": rule_row(RULES[""][0], "", states=False, constant=["q", "v", "beta"]),
}


def without_erase_row(function, T, constant=(), **gates):
    """Gated linear attention; its gates by name with their shapes."""
    B, H, K, HV, V = 1, 1, 2, 2, 1
    tensors = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "initial_state": (B, HV, K, V)}
    generator = torch.Generator().manual_seed(2)
    tensors |= {n: -torch.rand(shape, generator=generator, dtype=torch.float64) for n, shape in gates.items()}

    def plain(**given):
        g = given.pop("gk", None)
        return plain_rule.delta_rule(**{"g": g} | given, beta=None, scale=0.7)

    return Row(functools.partial(function, scale=0.7, output_final_state=True), plain, constant, **tensors)


def product_row(n, T, constant=()):
    """Several steps a token, written out as tokens of which every n-th is read."""
    B, H, K, HV, V = 1, 1, 2, 2, 1
    tensors = {"q": (B, T, H, K), "k": (B, T * n, H, K), "v": (B, T * n, HV, V), "beta": (B, T * n, HV)}
    tensors["initial_state"] = (B, HV, K, V)
    tensors["g"] = -torch.rand(B, T, HV, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def ours(**given):
        return functional.chunk_gated_delta_product(
            **given, num_householder=n, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    def plain(q, g, **given):
        first = torch.arange(T * n) % n == 0
        q, g = q.repeat_interleave(n, 1), torch.where(first[:, None], g.repeat_interleave(n, 1), 0)
        o, state = plain_rule.delta_rule(q=q, g=g, **given, use_qk_l2norm=True)
        return o[:, n - 1 :: n], state

    return Row(ours, plain, constant, **tensors)


def scan_row(T, constant=()):
    """Mamba-2's scan, written out."""
    x, G, N = (1, T, 2, 1), 1, 2
    tensors = {"x": x, "dt": x[:3], "B": (1, T, G, N), "C": (1, T, G, N), "D": (2,), "z": x, "dt_bias": (2,)}
    tensors |= {"initial_states": (1, 2, 1, N), "A": -torch.tensor([0.7, 0.2], dtype=torch.float64)}

    def ours(**given):
        return functional.mamba_chunk_scan_combined(**given, dt_softplus=True, return_final_states=True)

    def plain(x, dt, A, B, C, D, z, dt_bias, initial_states):
        state, out = initial_states, []
        dt = (1 + (dt + dt_bias).exp()).log()
        for t in range(T):
            state = state * (A * dt[:, t]).exp()[..., None, None]
            state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            out.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
        return torch.stack(out, 1) * z / (1 + (-z).exp()), state

    return Row(ours, plain, constant, **tensors)


def apart_row(function, T, **shapes):
    """A rule that reads what it erases along a vector of its own."""
    B, H, K, HV, V = 1, 1, 2, 2, 1
    tensors = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "initial_state": (B, HV, K, V)} | shapes
    generator = torch.Generator().manual_seed(2)
    for name in shapes:  # steps below 1: states that grow lose digits
        sign = -1 if name == "g" else 0.5
        tensors[name] = sign * torch.rand(shapes[name], generator=generator, dtype=torch.float64)

    def plain(q, k, v, g, initial_state, p=None, beta=None, b=None, w=None):
        q, k, p = (None if x is None else x.repeat_interleave(HV, 2) for x in (q, k, p))
        s, out = initial_state, []
        for t in range(T):
            if b is None:
                error = beta[:, t, :, None] * (v[:, t] - (s * p[:, t, ..., None]).sum(2))
                s = s * g[:, t, :, None, None].exp()
            else:
                s = s * g[:, t, ..., None].exp()
                error = w[:, t] * v[:, t] - (s * (b * k)[:, t, ..., None]).sum(2)
            s = s + k[:, t, ..., None] * error[:, :, None]
            out.append((s * q[:, t, ..., None]).sum(2) * K**-0.5)
        return torch.stack(out, 1), s

    return Row(functools.partial(function, output_final_state=True), plain, ["q"], **tensors)


ROWS |= {
    "comba": apart_row(functional.chunk_comba, 3, p=(1, 3, 1, 2), g=(1, 3, 2), beta=(1, 3, 2)),
    "gdn2": apart_row(functional.chunk_gdn2, 3, g=(1, 3, 2, 2), b=(1, 3, 2, 2), w=(1, 3, 2, 1)),
    "linear attention": without_erase_row(functional.chunk_simple_gla, 4),
    "simple gla": without_erase_row(functional.fused_recurrent_simple_gla, 3, g=(1, 3, 2)),
    "simple gla, in chunks": without_erase_row(functional.chunk_simple_gla, 11, ["v", "initial_state"], g=(1, 11, 2)),
    "gla": without_erase_row(functional.chunk_gla, 4, g=(1, 4, 2, 2)),
    "gla, in chunks": without_erase_row(functional.fused_recurrent_gla, 10, ["q", "v"], gk=(1, 10, 2, 2)),
    "delta product": product_row(2, 3),
    "delta product, in chunks": product_row(3, 4, ["v", "beta", "initial_state"]),
    "mamba": scan_row(3, ["dt_bias", "z"]),
}


def gated_inputs(gate, T, *names):
    """The tensors of a rule with its gate, before the activation where there is an A_log, and more of them."""
    B, H, K, HV, V = 1, 1, 2, 2, 1
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "g": (B, T, HV, *(K,) * (gate == "kda "))}
    shapes |= {"beta": (B, T, HV), "A_log": (HV,), "dt_bias": (HV * K if gate == "kda " else HV,)}
    shapes |= {"initial_state": (B, HV, V, K), "gv": (B, T, HV, V)}
    found: dict = {name: shapes[name] for name in ("q", "k", "v", "g", "beta", *names)}
    if "A_log" not in names:  # states that grow lose digits
        generator = torch.Generator().manual_seed(2)
        for name in ("g", "gv"):
            found[name] = -torch.rand(shapes[name], generator=generator, dtype=torch.float64)
    return found


def plain_gated(q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, gv=None, bound=None):
    """Gates and step sizes written out; states [N, HV, V, K]; gv, where V = 1, is one more g."""
    if A_log is not None:
        raw = g + dt_bias.view(g.shape[2:])
        rate = A_log.exp().view(-1, *[1] * (g.dim() - 3))
        g = -rate * (1 + raw.exp()).log() if bound is None else bound / (1 + (-rate * raw).exp())
    if gv is not None:
        g = g + gv[..., 0]
    beta = 2 / (1 + (-beta).exp()) if A_log is not None else beta
    state = None if initial_state is None else initial_state.mT
    o, state = plain_rule.delta_rule(q, k, v, g, beta, 0.7, state, use_qk_l2norm=True)
    return o, state.mT


IN_KERNEL = {"scale": 0.7, "output_final_state": True, "use_qk_l2norm_in_kernel": True, "state_v_first": True}
ACTIVATED = IN_KERNEL | {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}


def every_token(**given):
    o, state, every = pyrepr.fused_recurrent_gated_delta_rule(**given, **IN_KERNEL, output_states="every token")
    return o, state, every


def plain_every_token(**given):
    o, state = plain_gated(**given)
    parts = [plain_gated(**{n: x[:, :t] for n, x in given.items()})[1] for t in range(1, o.shape[1] + 1)]
    return o, state, torch.stack(parts, 1)


ROWS |= {
    "gated delta rule, its gate": Row(
        functools.partial(pyrepr.chunk_gated_delta_rule, **ACTIVATED),
        plain_gated,
        **gated_inputs("gated ", 3, "A_log", "dt_bias", "initial_state"),
    ),
    "kda, its gate": Row(
        functools.partial(pyrepr.chunk_kda, **ACTIVATED),
        plain_gated,
        ["q", "v"],
        **gated_inputs("kda ", 2, "A_log", "dt_bias"),
    ),
    "kda, its bounded gate": Row(
        functools.partial(pyrepr.fused_recurrent_kda, **ACTIVATED, lower_bound=-3.0),
        functools.partial(plain_gated, bound=-3.0),
        ["q", "v"],
        **gated_inputs("kda ", 2, "A_log", "dt_bias"),
    ),
    "gated delta rule, per value channel": Row(
        functools.partial(pyrepr.fused_recurrent_gated_delta_rule, **IN_KERNEL),
        plain_gated,
        ["v"],
        **gated_inputs("gated ", 2, "gv", "initial_state"),
    ),
    "gated delta rule, every state": Row(every_token, plain_every_token, ["v", "gv"], **gated_inputs("gated ", 3)),
    "gated norm": Row(
        lambda x, g, weight: pyrepr.functional.rms_norm_gated(x, g, weight),
        lambda x, g, weight: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight * g / (1 + (-g).exp()),
        x=(3, 4),
        g=(3, 4),
        weight=(4,),
    ),
}

# Convolution

SEQUENCES = torch.tensor([[0, 0, 1], [0, 1, 1]])
FILTER = {"x": (2, 3, 3), "weight": (3, 3), "bias": (3,)}


def plain_convolution(x, silu=True, **given):
    given = {name: t for name, t in given.items() if name != "activation"}
    return plain_conv.causal_conv1d(x.mT, silu=silu, **given).mT


ROWS |= {
    "convolution": Row(
        functools.partial(pyrepr.causal_conv1d_fn, activation="silu"),
        plain_convolution,
        initial_states=(2, 3, 2),
        **FILTER,
    ),
    "convolution, packed": Row(
        functools.partial(pyrepr.causal_conv1d_fn, cu_seqlens=torch.tensor([0, 2, 2, 4])),
        functools.partial(plain_convolution, silu=False, cu_seqlens=torch.tensor([0, 2, 2, 4])),
        x=(1, 3, 4),
        weight=(3, 3),
        initial_states=(3, 3, 2),
    ),
    "convolution of sequences": Row(
        functools.partial(pyrepr.causal_conv1d_fn, seq_idx=SEQUENCES, activation="silu"),
        functools.partial(plain_convolution, seq_idx=SEQUENCES),
        **FILTER,
    ),
    "convolution, filter alone": Row(
        functools.partial(pyrepr.causal_conv1d_fn, activation="silu"), plain_convolution, ["x"], **FILTER
    ),
}

# Lookups

CODES = torch.tensor([[0, 3], [1, 3], [3, 2]], dtype=torch.int32)
TABLES = {"x": (3, 4), "tables": (2, 4, 2), "bias": (2,)}
for weighting in plain_lookup.WEIGHTINGS:
    options = {"weighting": weighting, "temperature": 0.8}
    ROWS[f"lookup_linear, {weighting}"] = Row(
        functools.partial(pyrepr.functional.lookup_linear, **options),
        functools.partial(plain_lookup.lookup_linear, **options),
        ["x"] if weighting == "none" else [],
        **TABLES,
    )
    ROWS[f"lookup_linear of two bits, {weighting}"] = Row(
        functools.partial(pyrepr.functional.lookup_linear, hash="two_bit", **options),
        functools.partial(plain_lookup.lookup_linear, hash="two_bit", **options),
        ["x"] if weighting == "none" else [],
        x=(3, 4),
        tables=(4, 4, 2),
        bias=(2,),
    )
STANDARD = {"centre": torch.tensor([0.1, -0.2, 0.3, 0.0]), "scale": torch.tensor([1.2, 0.7, 1.0, 0.9])}
LOW_RANK = {"down": (2, 4), "up": (2, 2)}
for hash, bits in (("one_bit", 2), ("two_bit", 4)):
    options = {"weighting": "scaled", "hash": hash}
    ROWS[f"converted, {hash}"] = Row(
        functools.partial(pyrepr.functional.lookup_linear, **options),
        functools.partial(plain_lookup.lookup_linear, **options),
        ["centre", "scale"],
        x=(3, 4),
        tables=(2, 1 << bits, 2),
        bias=(2,),
        **STANDARD,
        **LOW_RANK,
    )
ROWS |= {
    "converted, x alone": Row(
        functools.partial(pyrepr.functional.lookup_linear, weighting="none"),
        functools.partial(plain_lookup.lookup_linear, weighting="none"),
        ["tables", "centre", "scale", "down", "up"],
        x=(3, 4),
        tables=(2, 4, 2),
        **STANDARD,
        **LOW_RANK,
    ),
    "lookup_linear, x alone": Row(
        pyrepr.functional.lookup_linear, plain_lookup.lookup_linear, ["tables", "bias"], **TABLES
    ),
    "lookup_linear, tables alone": Row(
        pyrepr.functional.lookup_linear, plain_lookup.lookup_linear, ["x", "bias"], **TABLES
    ),
    "lookup_sum": Row(
        functools.partial(pyrepr.functional.lookup_sum, CODES),
        functools.partial(plain_lookup.lookup_sum, CODES),
        weights=(3, 2),
        tables=(2, 4, 2),
    ),
    "segment_sum": Row(
        functools.partial(pyrepr.functional.segment_sum, codes=CODES, n=4),
        functools.partial(plain_lookup.segment_sum, codes=CODES, n=4, check=False),
        values=(3, 2),
        weights=(3, 2),
    ),
}

# Pairs

POSITIVES = torch.tensor([2, 0, 2])


def plain_info_nce(x, y, scale, labels=None, normalize=False, smoothing=0.0, widths=None):
    labels = torch.arange(len(x)) if labels is None else labels
    losses = []
    for width in widths or [x.shape[1]]:
        a, b = x[:, :width], y[:, :width]
        if normalize:
            a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        s = scale * (a @ b.T)
        for logits, target in ((s, labels), (s.T[labels], torch.arange(len(x)))):
            losses.append(torch.nn.functional.cross_entropy(logits, target, label_smoothing=smoothing) / 2)
    return sum(losses)


SCALE = torch.tensor(1.5, dtype=torch.float64)
ROWS |= {
    "pairwise_logsumexp": Row(
        pyrepr.functional.pairwise_logsumexp,
        lambda x, y, scale: (scale * (x @ y.T)).logsumexp(1),
        x=(3, 2),
        y=(4, 2),
        scale=SCALE,
    ),
    "info_nce": Row(pyrepr.functional.info_nce, plain_info_nce, x=(3, 4), y=(3, 4), scale=SCALE),
    "info_nce, cosine": Row(
        functools.partial(pyrepr.functional.info_nce, normalize=True, labels=POSITIVES, prefixes=[2, 3]),
        functools.partial(plain_info_nce, normalize=True, labels=POSITIVES, widths=[2, 3]),
        x=(3, 3),
        y=(4, 3),
        scale=SCALE,
    ),
    "info_nce, smoothed": Row(
        functools.partial(pyrepr.functional.info_nce, label_smoothing=0.2),
        functools.partial(plain_info_nce, smoothing=0.2),
        ["y"],
        x=(3, 2),
        y=(3, 2),
        scale=SCALE,
    ),
}


@functools.cache
def truth(row, mode):
    # Hessians by columns: the plain formulas are not all of a kind that the older vmap takes.
    return ROWS[row].result("autograd hessian" if mode in HESSIANS else mode, "plain", torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", ROWS)
def test_every_function_in_every_mode(row, mode):
    expected = truth(row, mode)
    assert expected.norm() > 1e-6, "a test of nothing"
    for backend, dtype in WHERE:
        with pyrepr.use_backend(backend):
            found = ROWS[row].result(mode, "ours", dtype)
        error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-3)
        assert found.dtype == dtype and error < TOLERANCE[dtype], f"{backend}, {dtype}: off by {error:.1e}"


CHECKED = [
    "gated delta rule",
    "kda, in chunks",
    "simple gla",
    "convolution",
    "lookup_linear, scaled",
    "lookup_linear of two bits, scaled",
    "converted, two_bit",
    "lookup_sum",
    "segment_sum",
    "info_nce, cosine",
    "cka, laplacian, masked",
    "cka, kept products",
    "gram of two, rbf",
]


@pytest.mark.parametrize("row", CHECKED)
def test_finite_differences(row):
    """Of first and second derivatives, forward and reverse, also batched."""
    row = ROWS[row]
    f = row.scalar("ours", torch.float64)
    x = row.vector.clone().requires_grad_()
    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, x, torch.ones((), dtype=torch.float64), check_fwd_over_rev=True, check_rev_over_rev=True)


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
    "gram_row_stats": lambda x: gram_ops.row_stats_op([x])[5],
    "gram_median": lambda x: gram_ops.median_op([x], None, True)[0],
    "gram_apply": lambda x: gram_ops.apply_op(x, x.detach(), False),
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
        torch.testing.assert_close(found, truth(row, mode).float(), rtol=1e-4, atol=1e-4, msg=f"{row}, {mode}")


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
        torch.testing.assert_close(found, truth(row, mode).float(), rtol=1e-4, atol=1e-4, msg=f"{row}, {mode}")


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
    "lookup_sum": lambda: (lookup_ops.sum_op, (CODES, randn(3, 2), randn(2, 4, 3), None, 0, False)),
    "lookup_segments": lambda: (lookup_ops.segments_op, (randn(3, 2), CODES, randn(3, 2), 4)),
}
CONVERTED = ("scaled", 1.0, 0, False, "two_bit")
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
