"""Every differentiable function beside its plain formula: what test_derivatives.py takes through every mode."""

from __future__ import annotations

import functools

import torch
from derivatives import MODES

import pyrepr
from pyrepr import functional
from pyrepr.reference import causal_conv1d as plain_conv
from pyrepr.reference import delta_rule as plain_rule
from pyrepr.reference import gram as plain_gram
from pyrepr.reference import lookup as plain_lookup
from pyrepr.reference import signs as plain_signs


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
    **{
        f"sign_linear, {hash}": Row(
            functools.partial(pyrepr.functional.sign_linear, hash=hash),
            functools.partial(plain_signs.sign_linear, hash=hash),
            ["centre", "scale"],
            x=(3, 4),
            weight=(2, features),
            bias=(2,),
            **STANDARD,
            **LOW_RANK,
        )
        for hash, features in (("one_bit", 4), ("two_bit", 8))
    },
    "sign_linear, x alone": Row(
        pyrepr.functional.sign_linear,
        plain_signs.sign_linear,
        ["weight", "centre", "scale", "down", "up"],
        x=(3, 4),
        weight=(2, 8),
        **STANDARD,
        **LOW_RANK,
    ),
    "sign_linear, weight alone": Row(
        pyrepr.functional.sign_linear, plain_signs.sign_linear, ["x"], x=(3, 4), weight=(2, 8)
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


def plain_info_nce(x, y, scale, labels=None, normalize=False, smoothing=0.0, widths=None, rows_alone=False):
    labels = torch.arange(len(x)) if labels is None else labels
    losses = []
    for width in widths or [x.shape[1]]:
        a, b = x[:, :width], y[:, :width]
        if normalize:
            a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        s = scale * (a @ b.T)
        both = (s, labels), (s.T[labels], torch.arange(len(x)))
        for logits, target in both[: 2 - rows_alone]:
            loss = torch.nn.functional.cross_entropy(logits, target, label_smoothing=smoothing)
            losses.append(loss / (2 - rows_alone))
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
    "info_nce, rows": Row(
        functools.partial(pyrepr.functional.info_nce, normalize=True, directions="rows", prefixes=[1, 3]),
        functools.partial(plain_info_nce, normalize=True, widths=[1, 3], rows_alone=True),
        x=(4, 3),
        y=(5, 3),
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
