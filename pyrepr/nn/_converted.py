"""What the layers that take a linear one's place have in common: the parts that a conversion fits beside their tables
or weight, int8 with a scale a row, and how all of it is saved, loaded and described."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pyrepr._checks import check_tensor, name_of, shape_of, shown
from pyrepr.nn._lookup_fit import Fit, Parts
from pyrepr.ops.lookup import to_huge_pages

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)
BUFFERS, PARAMETERS = ("centre", "scale"), ("down", "up")  # of a conversion
Layer = TypeVar("Layer", bound="Converted")


class Converted(nn.Module):
    """A layer that computes with signs of its input: :class:`LookupLinear` or :class:`SignLinear`."""

    STORED: ClassVar[str]  # the parameter [..., a row] that holds nearly all of it, and that int8 stores
    DTYPE: ClassVar[str]  # the argument that says its dtype
    OPTIONS: ClassVar[tuple[str, ...]]  # what it was made for, beside its sizes
    NOTED: ClassVar[tuple[str, ...]]  # what a specification has beside arguments and tensors

    in_features: int
    out_features: int
    bias: Tensor | None
    scales: Tensor | None
    centre: Tensor | None
    scale: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def _make(self, shape: tuple[int, ...], bias: bool, dtype: torch.dtype, device: torch.device | str | None) -> None:
        """Parameters and buffers, empty; those of a conversion are ``None``."""
        self.conversion: Fit | None = None
        quantized = dtype == torch.int8
        stored = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=not quantized)
        self.register_parameter(self.STORED, stored)
        to_huge_pages(stored)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        added = nn.Parameter(torch.empty(self.out_features, dtype=wide, device=device)) if bias else None
        self.register_parameter("bias", added)
        self.register_buffer("scales", torch.ones(shape[:-1], device=device) if quantized else None)
        for name in BUFFERS:
            self.register_buffer(name, None)
        for name in PARAMETERS:
            self.register_parameter(name, None)

    def _deviation(self) -> float:
        """Of what is stored, for output of variance 1 from standard normal input."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        stored = getattr(self, self.STORED)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if stored.dtype == torch.int8:
            stored.zero_()
        elif stored.device.type != "meta":
            nn.init.normal_(stored, std=self._deviation())

    def _apply(self, fn, recurse: bool = True):
        scales = self._buffers["scales"]
        super()._apply(fn, recurse)
        moved = self._buffers["scales"]
        if scales is not None and moved is not None and moved.dtype != scales.dtype:
            self.scales = scales.to(moved.device)  # `.to(dtype)` would round what int8 rows are multiplied with
        to_huge_pages(getattr(self, self.STORED))
        return self

    def _rows(self, x: object) -> Tensor:
        """x [..., in_features] as [T, in_features], checked."""
        x = check_tensor("x", x)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have a last axis of in_features = {self.in_features}, got shape {shape_of(x)}")
        return x.reshape(math.prod(x.shape[:-1]), self.in_features)

    @torch.no_grad()
    def quantize_(self: Layer, kind: str) -> Layer:
        """Stores it as ``"bf16"``, or as ``"int8"`` with a scale a row: for inference, without a gradient."""
        if kind not in ("int8", "bf16"):
            raise ValueError(f"kind must be 'int8' or 'bf16', got {shown(kind)}")
        stored = getattr(self, self.STORED)
        if not stored.is_floating_point():
            raise ValueError(f"{self.STORED} must be floating-point to be quantized, got int8 already")
        if kind == "bf16":
            rounded = stored.bfloat16()
        else:
            scales = stored.abs().amax(-1).float() / 127
            rounded = (stored.float() / torch.where(scales == 0, 1, scales)[..., None]).round_().to(torch.int8)
            self.scales = scales
        setattr(self, self.STORED, nn.Parameter(rounded, requires_grad=False))
        to_huge_pages(rounded)
        return self

    def _take(self, parts: Parts) -> None:
        """What a conversion fits beside what is stored into the parameters and buffers, in their dtype."""
        dtype = getattr(self, self.STORED).dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.bias = nn.Parameter(parts.bias.to(wide))
        self.centre, self.scale = parts.centre.to(wide), parts.scale.to(wide)
        if parts.down is not None and parts.up is not None:
            # Contiguous, since safetensors stores nothing else.
            self.down = nn.Parameter(parts.down.to(dtype).contiguous())
            self.up = nn.Parameter(parts.up.to(dtype).contiguous())

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:  # where torch keeps a module's version
            metadata[prefix[:-1]].update({name: getattr(self, name) for name in self.OPTIONS})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Makes room for what a converted layer has and a new one has not."""
        for option in self.OPTIONS:
            # What has metadata and no such option is of another class, as a Linear whose weight has this one's shape.
            came = local_metadata.get(option, None if local_metadata else getattr(self, option))
            if came != getattr(self, option):
                errors.append(
                    f"{prefix}{option} must be {came!r} as of the saved {self.STORED}, got {getattr(self, option)!r}"
                )
        stored, name = getattr(self, self.STORED), prefix + self.STORED
        for part in (*BUFFERS, *PARAMETERS):
            value = state_dict.get(prefix + part)
            if value is not None and getattr(self, part) is None:
                room = torch.empty_like(value, device=stored.device)
                setattr(self, part, nn.Parameter(room) if part in PARAMETERS else room)
        came = state_dict[name].dtype if name in state_dict else stored.dtype
        if torch.int8 in (came, stored.dtype) and came != stored.dtype:  # a copy would round, or drop scales
            errors.append(
                f"{name} must be {stored.dtype} as this layer's, got {came}; make the layer with "
                f"{self.DTYPE}={came}" + (", or quantize_('int8') it" if came == torch.int8 else "")
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _tensors(self) -> dict[str, Any]:
        """What a specification says of tensors: the dtype of each, which are trained, and the rank."""
        tensors = {**self._parameters, **self._buffers}
        return {
            "rank": 0 if self.down is None else self.down.shape[0],
            "dtypes": {name: name_of(x.dtype) for name, x in tensors.items() if x is not None},
            "trained": [name for name, x in self._parameters.items() if x is not None and x.requires_grad],
        }

    def specification(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def specified(cls: type[Layer], specification: dict[str, Any], device: torch.device | str | None = None) -> Layer:
        """An empty layer with room for every tensor of the one that gave the :meth:`specification`; tables unpacked.

        Raises:
            ValueError: for anything that is no specification.
        """
        try:
            options = dict(specification)
            for name in cls.NOTED:
                options.pop(name)
            rank, trained = options.pop("rank"), options.pop("trained")
            dtypes = {name: getattr(torch, dtype) for name, dtype in options.pop("dtypes").items()}
            options |= {"bias": "bias" in dtypes, cls.DTYPE: dtypes[cls.STORED]}
            layer = cls(device="meta", **options)
            d, h, shape = layer.in_features, layer.out_features, getattr(layer, cls.STORED).shape
            shapes = {cls.STORED: shape, "scales": shape[:-1], "bias": (h,)}
            shapes |= {"centre": (d,), "scale": (d,), "down": (rank, d), "up": (rank, h)}
            for name, dtype in dtypes.items():
                tensor = torch.empty(shapes[name], dtype=dtype, device=device)
                if name in layer._parameters:
                    setattr(layer, name, nn.Parameter(tensor, requires_grad=name in trained))
                else:
                    setattr(layer, name, tensor)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"specification must come from {cls.__name__}.specification, got {specification!r:.200}: {error}"
            ) from error
        return layer


def check_sizes(in_features: int, out_features: int) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")


def check_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype:
    dtype = dtype or torch.float32
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16, float16 or int8, got {dtype}")
    return dtype


def calibration_rows(calibration: Tensor, d: int | None = None) -> Tensor:
    """[N, d], checked."""
    if not isinstance(calibration, Tensor) or not calibration.is_floating_point():
        came = str(getattr(calibration, "dtype", type(calibration).__name__)).removeprefix("torch.")
        raise TypeError(f"calibration must be a floating-point tensor, got {came}")
    if calibration.dim() < 1 or calibration.shape[-1] != (d or calibration.shape[-1] or 1):
        expected = "[..., d]" if d is None else f"[..., in_features] = [..., {d}]"
        raise ValueError(f"calibration must have shape {expected}, got {list(calibration.shape)}")
    d = calibration.shape[-1]
    rows = calibration.reshape(-1, d)
    if not len(rows):
        raise ValueError(f"calibration must have at least one row, got shape {list(calibration.shape)}")
    if not bool(rows.isfinite().all()):
        raise ValueError("calibration must be finite, got NaN or infinity")
    if len(rows) < d:
        warnings.warn(f"calibration has {len(rows)} rows for {d} features; the fit leans on the ridge", stacklevel=4)
    return rows


def check_rank(rank: int, d: int, h: int) -> None:
    if not 0 <= rank <= min(d, h):
        raise ValueError(f"rank must be from 0 to min(in_features, out_features) = {min(d, h)}, got {rank}")


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
