"""A linear layer of the signs of its input, in place of ``nn.Linear``."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr.functional import signs
from pyrepr.functional.lookup import check_hash
from pyrepr.nn import _lookup_fit as fit
from pyrepr.nn._converted import (
    BUFFERS,
    PARAMETERS,
    Converted,
    bytes_of,
    calibration_rows,
    check_dtype,
    check_rank,
    check_sizes,
)
from pyrepr.nn.lookup import LookupLinear
from pyrepr.reference.lookup import HASHES


class SignLinear(Converted):
    """:func:`pyrepr.functional.sign_linear` with its weight, in place of ``nn.Linear``.

    It is what a :class:`LookupLinear` converted with weighting ``"none"`` computes, by the weights that its table rows
    are sums of: a thirty-second of the memory of tables with 256 rows, far fewer parameters to fine-tune, and a matrix
    product (of bytes, with int8) that is faster than gathering rows from a few tokens on. For one token at a time
    tables can be faster: :meth:`to_lookup` makes them.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``; any positive in_features will do.
        hash: ``"two_bit"`` (default): two signs an element, of it and of |z| − 1, so F = 2 · in_features.
            ``"one_bit"``: its sign alone, F = in_features, half the memory and three times the error
            (:meth:`from_linear`).
        dtype: of the weight, float32 (default), float64, bfloat16, float16, or int8 (for loading; see
            :meth:`quantize_`).

    Shape:
        x: [..., in_features] -> [..., out_features] in the dtype of x; float64 with a float64 weight alone.

    Attributes:
        weight: [out_features, F]; of element i columns 2 i and 2 i + 1 with two bits. It multiplies signs: code that
            multiplies x itself by a layer's weight must not be given this one. bias: [out_features] or ``None``.
            scales: [out_features] float32 with an int8 weight, else ``None``. A converted layer (:meth:`from_linear`)
            also has centre and scale [in_features], for it takes signs of (x − centre) · scale, and with a low-rank
            part down [rank, in_features] and up [rank, out_features]. ``load_state_dict`` makes room for them in a new
            layer; loading into a layer with another `hash`, of a state dict of another class, or of int8 into
            floating-point or the other way, is an error. With one bit and no conversion the names and shapes are those
            of ``nn.Linear``, which takes such a state dict, and a safetensors file cannot tell which of both it is of.

    The weight starts as N(0, 1 / F): standard normal input gives output of variance 1. A sign has no derivative: x has
    a gradient through the low-rank part only, and what comes before a layer without one does not train.

    Raises:
        TypeError: for sizes that are no ints, or another dtype. ValueError: for sizes below 1, or an unknown hash.

    Source: see :func:`pyrepr.functional.sign_linear`.

    Example:
        >>> layer = pyrepr.nn.SignLinear(50, 32)
        >>> layer(torch.randn(5, 50)).shape, layer.weight.shape
        (torch.Size([5, 32]), torch.Size([32, 100]))
    """

    STORED, DTYPE = "weight", "dtype"
    OPTIONS, NOTED = ("hash",), ("class",)
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        hash: str = "two_bit",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_hash(hash, 2)
        check_sizes(in_features, out_features)
        self.in_features, self.out_features, self.hash = in_features, out_features, hash
        shape = (out_features, in_features * HASHES[hash])
        self._make(shape, bias, check_dtype("dtype", dtype), device)
        self.reset_parameters()

    def _deviation(self) -> float:
        return 1 / math.sqrt(self.weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        # Every attribute that is looked for in a module's dictionaries costs half a µs, a key in one of them nothing.
        parameters, buffers = self._parameters, self._buffers
        if not isinstance(x, Tensor) or not x.dim() or x.shape[-1] != self.in_features:
            self._rows(x)  # says what is wrong
        return signs.sign_linear(
            x,
            parameters["weight"],
            parameters["bias"],
            hash=self.hash,
            centre=buffers["centre"],
            scale=buffers["scale"],
            scales=buffers["scales"],
            down=parameters["down"],
            up=parameters["up"],
        )

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        calibration: Tensor,
        *,
        hash: str = "two_bit",
        rank: int = 0,
        ridge: float = 1e-6,
    ) -> SignLinear:
        """The layer of signs closest to a trained linear layer on its calibration inputs.

        The fit is that of :meth:`LookupLinear.from_linear` with weighting ``"none"``: a ridge regression of the outputs
        on the signs of the standardised inputs. For white Gaussian input the relative squared error is .1176 with two
        bits and 1 − 2/π = .363 with one.

        Args:
            linear: the layer; it is not changed.
            calibration: [..., in_features], inputs the layer sees; at least in_features rows, better ten times as many.
            hash: see the class.
            rank: of a dense part U(Vx) for the directions that carry most of the output; signs are taken of what it
                leaves of x. 0 (default) for none; exact at min(in_features, out_features). An eighth of in_features is
                a strong choice.
            ridge: relative to the mean square of the features.

        Returns:
            A layer in the dtype of `linear`, with a bias, whose ``conversion`` reports error and bytes: ``table_bytes``
            are the weight's, ``dead_rows`` is 0 and ``break_even_tokens`` NaN, since there are no rows to gather.
            Expect to fine-tune.

        Raises:
            ValueError: for calibration of another shape, without rows or with values that are not finite, or a rank out
                of range. TypeError: for calibration that is no floating-point tensor.

        Warns:
            UserWarning: for fewer calibration rows than features.

        Example:
            >>> linear, x = torch.nn.Linear(16, 8), torch.randn(4000, 16)
            >>> round(pyrepr.nn.SignLinear.from_linear(linear, x).conversion.relative_mse, 1)
            0.1
        """
        x = calibration_rows(calibration, linear.in_features)
        weight, d, h = linear.weight, linear.in_features, linear.out_features
        check_rank(rank, d, h)
        layer = cls(d, h, hash=hash, dtype=weight.dtype, device=weight.device)
        parts, error = fit.of_linear(linear, x, bits=HASHES[hash], weighting="none", hash=hash, rank=rank, ridge=ridge)
        layer.weight.copy_(parts.weights.T)
        layer._take(parts)
        layer.conversion = fit.Fit(error, None, bytes_of(weight), bytes_of(layer.weight), 0, math.nan)
        return layer

    @torch.no_grad()
    def to_lookup(self, *, bits: int = 8) -> LookupLinear:
        """The :class:`LookupLinear` that computes the same by tables of 2^bits rows.

        Tables have the dtype of the weight, float32 those of an int8 one (``quantize_`` them again); their rows are
        sums in float64, rounded once. The layer shares no memory with this one.

        Raises:
            ValueError: if in_features is no multiple of the elements of a chunk, bits with one bit an element and
                bits / 2 with two. MemoryError: if the tables are larger than the machine's memory.

        Example:
            >>> layer, x = pyrepr.nn.SignLinear(64, 32), torch.randn(5, 64)
            >>> torch.allclose(layer.to_lookup()(x), layer(x), atol=1e-5)
            True
        """
        weight = self.weight.double()
        if self.scales is not None:
            weight = weight * self.scales.double()[:, None]
        layer = LookupLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            bits=bits,
            hash=self.hash,
            weighting="none",
            table_dtype=self.weight.dtype if self.scales is None else torch.float32,
            device=self.weight.device,
        )
        layer.tables.copy_(fit.tables_of(weight.T, bits, self.hash))
        for name in ("bias", *BUFFERS, *PARAMETERS):
            setattr(layer, name, copy.deepcopy(getattr(self, name)))
        return layer.train(self.training)

    def specification(self) -> dict[str, Any]:
        """What :meth:`specified` makes an empty layer of the same kind from, in types that JSON has: the options, the
        dtype of each tensor it has, and which of them are trained."""
        return {
            "class": "SignLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "hash": self.hash,
            **self._tensors(),
        }

    def extra_repr(self) -> str:
        low = "" if self.down is None else f", rank={self.down.shape[0]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"hash={self.hash!r}, dtype={self.weight.dtype}{low}"
        )
