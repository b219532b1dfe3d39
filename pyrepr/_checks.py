"""Checks that the functions of all families share. Each failure is one sentence: argument, expectation, what came."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def shown(x: object) -> str:
    """What came, short and on one line."""
    if isinstance(x, Tensor):
        return f"a tensor {shape_of(x)}"
    text = " ".join(repr(x).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def check_is_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    return x


def check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """x, a tensor of one of the dtypes."""
    x = check_is_tensor(name, x)
    if x.dtype not in dtypes:
        *others, last = map(name_of, dtypes)
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name} must be {wanted}, got {name_of(x.dtype)}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {str(x.layout).removeprefix('torch.')}")
    check_memory(name, x)
    return x


def check_memory(name: str, x: Tensor) -> None:
    """Reading an element of a tensor whose storage was freed is a crash, in PyTorch's own operations too."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or _is_wrapped(x):
        return
    if x.untyped_storage().nbytes() == 0 and x.numel() > 0 and not x._is_zerotensor():
        raise ValueError(f"{name} has no memory, its storage was freed")


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if not (x.is_cpu and other.is_cpu) and x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def check_shape(name: str, x: Tensor, symbols: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {symbols} = [{', '.join(map(str, shape))}], got {shape_of(x)}")


def _strides_overlap(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements may stand at one address: no axis reaches beyond what the axes inside it span."""
    if 0 in sizes:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def check_written(name: str, x: Tensor) -> None:
    """An argument that is written in place: each of its elements has a place of its own."""
    if not torch.compiler.is_compiling() and _strides_overlap(tuple(x.shape), x.stride()):
        raise ValueError(
            f"{name} is written in place, so its elements must not share memory, got {shape_of(x)} with strides "
            f"{list(x.stride())}"
        )


def check_layer(name: str, x: object) -> Tensor:
    """x as a [n, d] tensor of a dtype the kernels take."""
    x = check_tensor(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape [n, d], got {shape_of(x)}; flatten samples and features first")
    return x


def check_layers(names: Sequence[str], xs: Sequence[object]) -> list[Tensor]:
    """All layers [n, d_l] with one n, dtype and device. Under autocast, mixed dtypes become the widest of them."""
    layers = [check_layer(name, x) for name, x in zip(names, xs, strict=True)]
    first = layers[0]
    for name, x in zip(names, layers, strict=True):
        check_device(name, x, names[0], first)
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} must have the n of {names[0]}, {first.shape[0]} samples, got {x.shape[0]}; row i of every "
                "layer belongs to the same sample"
            )
    if any(x.dtype != first.dtype for x in layers):
        if not torch.is_autocast_enabled(first.device.type):
            name, x = next((name, x) for name, x in zip(names, layers, strict=True) if x.dtype != first.dtype)
            raise TypeError(f"{name} must have the dtype of {names[0]}, {first.dtype}, got {x.dtype}")
        widest = first.dtype
        for x in layers:
            widest = torch.promote_types(widest, x.dtype)
        layers = [x.to(widest) for x in layers]
    return layers


def layer_list(name: str, xs: object) -> tuple[list[str], list]:
    """Names and layers of an argument that is a list of layers or one tensor [L, n, d]."""
    if isinstance(xs, Tensor):
        if xs.dim() != 3:
            came = "[" + ", ".join(map(str, xs.shape)) + "]"
            raise ValueError(f"{name} must be a list of [n, d] tensors or one tensor [L, n, d], got {came}")
        xs = list(xs.unbind())
    if not isinstance(xs, (list, tuple)):
        raise TypeError(f"{name} must be a list of [n, d] tensors or one tensor [L, n, d], got {type(xs).__name__}")
    if not xs:
        raise ValueError(f"{name} must hold at least one layer, got none")
    return [f"{name}[{i}]" for i in range(len(xs))], list(xs)


def check_cu_seqlens(cu_seqlens: object, name: str, x: Tensor) -> int:
    """The number of sequences packed in x [B, ...]. What the numbers say is checked where they are read, by the op."""
    cu_seqlens = check_tensor("cu_seqlens", cu_seqlens, INTEGERS)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [N + 1], got {shape_of(cu_seqlens)}")
    if x.shape[0] != 1:
        raise ValueError(f"{name} must have B = 1 when cu_seqlens packs the sequences along T, got B = {x.shape[0]}")
    check_device("cu_seqlens", cu_seqlens, name, x)
    return cu_seqlens.numel() - 1


def check_agreed(options: dict[str, Any], group: Any) -> None:
    """That all processes of the group have the same options: before a collective in which one would wait for ever."""
    from torch import distributed

    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, options, group=group)
    for name, value in found[0].items():
        for rank, other in enumerate(found):
            if other[name] != value:
                raise ValueError(
                    f"{name} must be the same in all processes, got {value!r} in process 0 and {other[name]!r} in "
                    f"process {rank}"
                )


def memory() -> int:
    """Bytes of this machine's memory; where that is unknown, more than any has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
