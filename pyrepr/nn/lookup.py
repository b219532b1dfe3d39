"""Layers made of hashed table lookups: in place of `nn.Linear`, of attention's projections, of a feed-forward network.

Ding et al. 2024, "MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers", arXiv 2411.12992.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrepr._checks import memory, shown
from pyrepr._modules import evaluating
from pyrepr.functional import lookup
from pyrepr.functional.lookup import check_bits, check_hash, check_weighting
from pyrepr.nn import _lookup_fit as fit
from pyrepr.nn._converted import Converted, bytes_of, calibration_rows, check_dtype, check_rank, check_sizes
from pyrepr.nn._lookup_fit import Fit
from pyrepr.nn.linear_plus import LinearPlus, Network, network_of
from pyrepr.ops.lookup import hash_op
from pyrepr.reference.lookup import HASHES, pack, unpack, without_low_rank

# What fits a linear target best, which is what most layers are.
FITTED_WEIGHTING = {"one_bit": "l1", "two_bit": "none"}
KINDS = ("remainder", "tables", "linear+neurons")  # what a whole network can become


@dataclass(frozen=True)
class Usage:
    """How a batch used a layer's buckets: counts [K, 2^bits], entropy [K] in bits, rows nobody read (of K · 2^bits)."""

    counts: Tensor
    entropy: Tensor
    dead_rows: int


def rms_weight(width: int, weighting: str, temperature: float = 1.0) -> float:
    """Root mean square of w over chunks of `width` independent standard normal elements, by quadrature."""
    z = torch.linspace(0, 12, 24001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z * z / 2) * math.sqrt(2 / math.pi)

    def mean(values: Tensor) -> float:
        return float(torch.trapezoid(values * density, z))

    if weighting == "none":
        return 1.0
    p2 = torch.ones_like(z) if weighting == "l1" else torch.sigmoid(2 * z / temperature) ** 2
    own, first, second = mean(p2), mean(z * p2), mean(z * z * p2)
    if weighting == "probability":
        return own ** (width / 2)
    square = width * second * own ** (width - 1) + width * (width - 1) * first**2 * own ** max(0, width - 2)
    return math.sqrt(square) / (width if weighting == "l1" else 1)


def _check_memory(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str | None) -> None:
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device or "cpu").type == "cpu" and size > (have := memory()):
        raise MemoryError(
            f"tables of shape {list(shape)} take {size / 2**30:.1f} GiB, more than this machine's "
            f"{have / 2**30:.1f}; use fewer bits or a smaller table_dtype"
        )


class Described(Tensor):
    """Shape, dtype and device of a dense weight; it holds no values, and computing with it is refused
    (not by a TypeError, which operators of tensors would take for an operand they do not know)."""

    _is_hf_initialized = True  # so that transformers, when it loads a converted model, does not draw values for it

    @classmethod
    def of(cls, h: int, d: int, stored: Tensor) -> Described:
        """Of a layer [h, d] that holds `stored`."""
        dtype = stored.dtype if stored.is_floating_point() else torch.float32
        return torch.empty((), dtype=dtype, device=stored.device).expand(h, d).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("__get__", "size", "dim", "numel", "element_size", "is_floating_point", "__repr__"):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if type(result) is Tensor else result  # `.data` holds no values either
        raise NotImplementedError(f"a lookup layer has no dense weight to compute with ({name}); call the layer")


class LookupLinear(Converted):
    """:func:`pyrepr.lookup_linear` with its tables, in place of ``nn.Linear``.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``; in_features must be a multiple of the elements of a chunk.
        bits: τ of a table, 1 to 16. Default 8: with one bit an element τ-fold fewer reads than a dense layer, and
            2^τ/τ = 32-fold memory.
        hash: ``"one_bit"`` (default): the signs of τ elements are a code. ``"two_bit"``: sign and magnitude of τ / 2
            are, which takes twice the tables and reads and loses a third of what one bit loses (:meth:`from_linear`).
        weighting, temperature: see :func:`pyrepr.lookup_linear`; the defaults are the paper's.
        table_dtype: float32 (default), float64, bfloat16, float16, or int8 (for loading; see :meth:`quantize_`).
        sparse: row-sparse gradients of the tables, for ``torch.optim.SparseAdam``. Not under
            ``DistributedDataParallel``, which asks ``nn.Embedding`` alone whether gradients are sparse and fails at
            those of other modules; dense ones (default) work there.

    Shape:
        x: [..., in_features] -> [..., out_features] in the dtype of x.

    Attributes:
        tables: [in_features / bits, 2^bits, out_features] (but see :meth:`pack_`). bias: [out_features] or ``None``.
            scales: [K, 2^bits] float32 with int8 tables, else ``None``. A converted layer (:meth:`from_linear`) also
            has centre and scale [in_features], for it hashes (x − centre) · scale, and with a low-rank part down
            [rank, in_features] and up [rank, out_features]. ``load_state_dict`` makes room for them in a new layer,
            which needs the same `hash`, `weighting` ("l1" for converted ones by default, "none" with two bits) and
            `temperature`. A state dict, also one that ``torch.save`` wrote, names them, and loading it into a layer
            with others is an error; a safetensors file holds tensors only and cannot tell.

    Tables start as N(0, 1 / (K · E w²)): standard normal input gives output of variance 1, whatever the weighting.

    Raises:
        ValueError: if in_features is no multiple of a chunk's elements, or bits, hash or weighting are out of range.
        MemoryError: if the tables are larger than the machine's memory, before they are allocated.

    Example:
        >>> layer = pyrepr.nn.LookupLinear(64, 32, bits=8)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    STORED, DTYPE = "tables", "table_dtype"
    OPTIONS, NOTED = ("hash", "weighting", "temperature"), ("packed",)
    tables: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        hash: str = "one_bit",
        weighting: str = "probability",
        temperature: float = 1.0,
        table_dtype: torch.dtype | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        width = check_hash(hash, check_bits(bits))
        check_weighting(weighting, temperature)
        check_sizes(in_features, out_features)
        if in_features % width:
            of = "bits" if width == bits else "bits / 2"
            raise ValueError(f"in_features must be a multiple of {of} = {width}, got {in_features}")
        table_dtype = check_dtype("table_dtype", table_dtype)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.hash, self.weighting, self.temperature, self.sparse = hash, weighting, temperature, sparse
        shape = (in_features // width, 1 << bits, out_features)
        _check_memory(shape, table_dtype, device)
        self._make(shape, bias, table_dtype, device)
        self.reset_parameters()

    def _deviation(self) -> float:
        rms = rms_weight(self.bits // HASHES[self.hash], self.weighting, self.temperature)
        return 1 / (rms * math.sqrt(self.tables.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        # Every attribute that is looked for in a module's dictionaries costs half a µs, a key in one of them nothing.
        parameters, buffers = self._parameters, self._buffers
        if not isinstance(x, Tensor) or not x.dim() or x.shape[-1] != self.in_features:
            self._rows(x)  # says what is wrong
        return lookup.lookup_linear(
            x,
            parameters["tables"],
            parameters["bias"],
            weighting=self.weighting,
            temperature=self.temperature,
            scales=buffers["scales"],
            sparse=self.sparse,
            hash=self.hash,
            centre=buffers["centre"],
            scale=buffers["scale"],
            down=parameters["down"],
            up=parameters["up"],
        )

    def quantize_(self, kind: str) -> LookupLinear:
        """Stores the tables as ``"bf16"``, or as ``"int8"`` with a scale a row: for inference, without a gradient."""
        if self.packed:
            raise ValueError("the tables are packed already: quantize first")
        return super().quantize_(kind)

    @torch.no_grad()
    def pack_(self) -> LookupLinear:
        """Keeps the tables in the order of :func:`pyrepr.pack_tables`, for inference on many tokens at a time.

        `tables` is then [out_features / 64, K, 2^bits, 64] and has no gradient; ``state_dict`` still holds, and loads,
        plain tables. Quantize first. ValueError if out_features is no multiple of 64.
        """
        if not self.packed:
            self.tables = nn.Parameter(lookup.pack_tables(self.tables), requires_grad=False)
        return self

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the dense weight it stands for, for code that asks its layers for them."""
        return Described.of(self.out_features, self.in_features, self.tables)

    @property
    def packed(self) -> bool:
        """Whether the tables are in the order of :meth:`pack_`."""
        return self.tables.dim() == 4

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination[prefix + "tables"] = unpack(destination[prefix + "tables"])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Makes room for what a converted layer has and a new one has not; packs tables where this layer's are."""
        name = prefix + "tables"
        shape = (self.in_features * HASHES[self.hash] // self.bits, 1 << self.bits, self.out_features)
        if self.packed and name in state_dict and state_dict[name].shape == shape:
            state_dict = {**state_dict, name: pack(state_dict[name])}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    @torch.no_grad()
    def usage(self, x: Tensor) -> Usage:
        """Which rows the tokens x [..., in_features] read."""
        rest, _ = without_low_rank(self._rows(x), self.down)
        codes, _ = hash_op(rest, self.bits, "none", 1.0, self.hash, self.centre, self.scale)  # [T, K]
        n = 1 << self.bits
        flat = (codes + n * torch.arange(codes.shape[1], device=codes.device)).flatten()
        counts = torch.bincount(flat, minlength=codes.shape[1] * n).view(-1, n)
        p = counts / max(1, len(codes))
        entropy = -torch.where(p > 0, p * p.log2(), 0).sum(1)
        return Usage(counts, entropy, int((counts == 0).sum()))

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        calibration: Tensor,
        *,
        bits: int = 8,
        hash: str = "one_bit",
        weighting: str | None = None,
        rank: int = 0,
        ridge: float = 1e-6,
    ) -> LookupLinear:
        """The lookup layer closest to a trained linear layer on its calibration inputs.

        For a linear target the best tables are linear in the signs: input z (standardised on the calibration data)
        becomes features w(z_k)·sign(z_i), their ridge regression on the outputs gives A, and T_k[c] = Σ_i
        s_i(c)·A_{kτ+i}; with two bits sign(|z_i| − 1)·sign(z_i) are features too. For white Gaussian input the relative
        squared error is 1 − [2/π + (1 − 2/π)/τ] with "l1" weights, 1 − 2/π with none, and .1176 with two bits (Max
        1960, "Quantizing for minimum distortion": .1175 where the cut is at .982 standard deviations, not 1).

        Args:
            linear: the layer; it is not changed.
            calibration: [..., in_features], inputs the layer sees; at least in_features rows, better ten times as many.
            bits, hash: see the class. weighting: "l1" (default) suits linear targets: it grows with the input. With two
                bits it gains nothing, and "none" is the default; but then x has a gradient through the dense part only.
            rank: of a dense part U(Vx) for the directions that carry most of the output; the tables get the rest of x.
                0 (default) for none; exact at min(in_features, out_features). An eighth of in_features is a strong
                choice.
            ridge: relative to the mean square of the features.

        Returns:
            A layer in the dtype of `linear` whose ``conversion`` reports error and bytes. Expect to fine-tune.

        Raises:
            ValueError: for calibration of another shape, without rows or with values that are not finite, or a rank out
                of range.

        Warns:
            UserWarning: for fewer calibration rows than features.
        """
        weighting = weighting or FITTED_WEIGHTING.get(hash, "l1")
        x = calibration_rows(calibration, linear.in_features)
        check_rank(rank, linear.in_features, linear.out_features)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bits=bits,
            hash=hash,
            weighting=weighting,
            table_dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        options = {"bits": bits, "weighting": weighting, "hash": hash, "rank": rank, "ridge": ridge}
        parts, relative_mse = fit.of_linear(linear, x, **options)
        layer._take(parts)
        layer._report(x.to(layer.tables.device), bytes_of(linear.weight), relative_mse)
        return layer

    @classmethod
    @torch.no_grad()
    def from_mlp(
        cls,
        mlp: Callable[[Tensor], Tensor],
        calibration: Tensor,
        *,
        kind: str = "remainder",
        bits: int = 8,
        hash: str = "one_bit",
        weighting: str | None = None,
        rank: int = 0,
        neurons: int = 48,
        ridge: float = 1e-4,
    ) -> LookupLinear | LinearPlus:
        """One layer in place of a whole feed-forward network, or of any function of single tokens.

        The start is :meth:`from_linear`'s fit to the network's best linear approximation. What that leaves is fitted by
        all K·2^bits rows freely (additive least squares by conjugate gradients, every table at once), with a penalty
        that keeps rows few tokens read near the start. Free rows overfit, so an eighth of the calibration data is held
        out and chooses the penalty; the error on it is in the report.

        Args:
            mlp: a module or function, [N, d] -> [N, h] in a float dtype; modules run in eval mode, and nothing in them
                is changed.
            calibration: [..., d], inputs the network sees, in its dtype and on its device. The free rows want many
                tokens a row: some 10 · 2^bits of them, more for less noise.
            kind: ``"remainder"`` (default): tables for what a dense part of `rank` leaves of x, one native call.
                ``"tables"``: a dense map of full rank, and beside it tables that hash x itself, whose directions of
                most variance are those the network bends in; more accurate, and slower by the map.
                ``"linear+neurons"``: a dense map, and beside it the network's strongest `neurons` kept as they are,
                both fitted anew by a ridge regression; the most accurate where the network is two linear layers with
                an activation between, which it must be. For MiniLM's fourth network, relative squared error on 2500
                tokens of other sentences: .111 for the map alone, .090 for a remainder of rank 96, .083 with tables,
                .078 with 48 of 1536 neurons and .040 with 384.
            bits, hash, weighting, rank: as of :meth:`from_linear`, for tables; `rank` for ``"remainder"`` alone.
            neurons: how many are kept; 48 by default, which adds a quarter to the map's work in MiniLM.
            ridge: of all regressions; larger by default, since a network's inputs have directions with hardly any
                variance.

        Returns:
            A layer with the dtype of calibration, with a bias; of the last two kinds a :class:`LinearPlus`. Its
            ``conversion`` has the error on the fitted rows (``relative_mse``) and on those held out (``held_out_mse``).

        Raises:
            ValueError: for calibration of fewer than 16 rows or with values that are not finite, an unknown kind, a
                rank or a number of neurons out of range, or a network that does not give a row a token or is not what
                its kind needs. TypeError: if it gives no floating-point tensor.

        Warns:
            UserWarning: for fewer calibration rows than features.

        Example:
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
            >>> layer = pyrepr.nn.LookupLinear.from_mlp(mlp, torch.randn(500, 8), kind="linear+neurons", neurons=4)
            >>> layer.rest[0].out_features
            4
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(kind)}")
        weighting = weighting or FITTED_WEIGHTING.get(hash, "l1")
        rows = calibration_rows(calibration)
        if len(rows) < 16:
            raise ValueError(f"calibration must have at least 16 rows, an eighth of which is held out, got {len(rows)}")
        y = _outputs(mlp, rows)
        d, h = rows.shape[1], y.shape[1]
        check_rank(rank, d, h)
        if rank and kind != "remainder":
            raise ValueError(f"rank must be 0 for kind {kind!r}, whose dense map is of full rank, got {rank}")
        options = {"bits": bits, "weighting": weighting, "hash": hash}
        network = network_of(mlp, rows) if kind == "linear+neurons" else None
        if network is not None:
            _check_neurons(neurons, network.first.out_features)
        tables = None if network else cls(d, h, table_dtype=rows.dtype, device=rows.device, **options)
        held = fit.hold_out(len(rows)).to(rows.device)
        units = fit.unit(rows), fit.unit(y)
        x, unseen = (rows[part].double() / units[0] for part in (~held, held))
        wanted, truth = (y[part].double() / units[1] for part in (~held, held))
        layer: LookupLinear | LinearPlus
        if network is not None:
            layer = _with_neurons(network, x, wanted, units, neurons, ridge, rows.dtype)
        elif kind == "tables":
            assert tables is not None
            weight, bias, parts = fit.beside_tables(x, wanted, unseen, truth, ridge=ridge, **options)
            tables._take(parts.in_units(*units))
            layer = LinearPlus(_dense(weight * (units[1] / units[0]), bias * units[1], rows.dtype), tables)
        else:
            assert tables is not None
            weight = fit.regression(x, wanted, ridge)
            parts, left = fit.sign_linear(x, wanted, weight, rank=rank, ridge=ridge, **options)
            tables._take(fit.with_full_tables(parts, x, left, unseen, truth, **options).in_units(*units))
            layer = tables
        dense_bytes = bytes_of(*mlp.parameters()) if isinstance(mlp, nn.Module) else 0
        errors = [fit.relative_mse(layer(rows[part]), y[part]) for part in (~held, held)]
        if tables is not None:
            tables._report(rows[~held], dense_bytes, *errors)
            layer.conversion = tables.conversion
        else:
            layer.conversion = Fit(errors[0], errors[1], dense_bytes, 0, 0, math.nan)
        return layer

    def specification(self) -> dict[str, Any]:
        """What :meth:`specified` makes an empty layer of the same kind from, in types that JSON has: the options, the
        dtype of each tensor it has, which of them are trained, and whether the tables are packed."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "hash": self.hash,
            "weighting": self.weighting,
            "temperature": self.temperature,
            "sparse": self.sparse,
            **self._tensors(),
            "packed": self.packed,
        }

    def _take(self, parts: fit.Parts) -> None:
        tables = parts.tables
        self.tables.copy_(fit.tables_of(parts.weights, self.bits, self.hash) if tables is None else tables)
        super()._take(parts)

    def _report(self, x: Tensor, dense_bytes: int, relative_mse: float, held_out_mse: float | None = None) -> None:
        table_bytes = bytes_of(self.tables)
        self.conversion = Fit(
            relative_mse,
            held_out_mse,
            dense_bytes,
            table_bytes,
            self.usage(x.to(torch.promote_types(self.tables.dtype, torch.float32))).dead_rows,
            dense_bytes / (table_bytes >> self.bits),
        )

    def extra_repr(self) -> str:
        low = "" if self.down is None else f", rank={self.down.shape[0]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, hash={self.hash!r}, weighting={self.weighting!r}, table_dtype={self.tables.dtype}{low}"
        )


def _check_neurons(neurons: int, most: int) -> None:
    if isinstance(neurons, bool) or not isinstance(neurons, int) or not 1 <= neurons <= most:
        raise ValueError(f"neurons must be an int from 1 to the network's {most}, got {shown(neurons)}")


def _dense(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """The ``nn.Linear`` of these values, in this dtype."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    # Cloned: a single row may have any strides and be called contiguous, but products go other ways by them.
    linear.weight = nn.Parameter(weight.to(dtype).clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype))
    return linear


def _with_neurons(
    network: Network,
    x: Tensor,
    y: Tensor,
    units: tuple[float, float],
    neurons: int,
    ridge: float,
    dtype: torch.dtype,
) -> LinearPlus:
    """A dense map and the strongest neurons of a network, for x [N, d] and y [N, h] in these units."""
    inward, bias = network.first.weight.double(), network.first.bias
    shift = None if bias is None else bias.double()
    hidden = network.activation(functional.linear(x * units[0], inward, shift))
    size = fit.unit(hidden)
    hidden, out = hidden / size, network.second.weight.double() * (size / units[1])
    chosen = fit.strongest_neurons(x, hidden, out, neurons, ridge)
    weight, added, written = fit.beside_neurons(x, hidden[:, chosen], y, out[:, chosen], ridge)
    kept = nn.Sequential(
        _dense(inward[chosen], None if shift is None else shift[chosen], dtype),
        network.activation,
        _dense(written * (units[1] / size), None, dtype),
    )
    return LinearPlus(_dense(weight * (units[1] / units[0]), added * units[1], dtype), kept)


def _outputs(mlp: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """mlp of rows [N, d], in pieces: [N, h]."""
    with evaluating([mlp] if isinstance(mlp, nn.Module) else []):
        pieces = [mlp(piece) for piece in rows.split(4096)]
    y = pieces[0]
    if not isinstance(y, Tensor) or not y.is_floating_point():
        came = str(getattr(y, "dtype", type(y).__name__)).removeprefix("torch.")
        raise TypeError(f"mlp must give a floating-point tensor, got {came}")
    if y.dim() != 2 or sum(map(len, pieces)) != len(rows):
        raise ValueError(f"mlp must give [N, h] for N = {len(rows[:4096])} rows, got {list(y.shape)}")
    return torch.cat(pieces)
