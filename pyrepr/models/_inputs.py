"""What data is, what a model is given of a batch, and which of its tokens count.

Data is an iterable of batches; the samples lie along the first axis of what a batch holds. A batch is ``x``, ``(x,)``,
``(x, labels)`` or a mapping, where labels are never an input; anything else is told by ``inputs=``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

LABELS = ("labels", "label", "label_ids")
TOKENS = ("all", "no_special")

Inputs = Callable[[Any], Any]
Tokens = str | Callable[[Any], Tensor]


def check_data(data: object) -> Iterable[Any]:
    """Data of :func:`pyrepr.compare`, :func:`pyrepr.convert` and :func:`pyrepr.distill`.

    Raises:
        TypeError: for anything that is no iterable of batches, with what to write instead.
    """
    fix = None
    if isinstance(data, (Tensor, PackedSequence)) or (hasattr(data, "__array__") and hasattr(data, "shape")):
        fix = "[x] is one batch, torch.as_tensor(x).split(32) several"
    elif isinstance(data, Mapping):
        fix = "[batch] is one batch"
    elif isinstance(data, Dataset) or (hasattr(data, "column_names") and hasattr(data, "features")):
        fix = "torch.utils.data.DataLoader(dataset, batch_size=32) makes batches of its samples"
    elif isinstance(data, (str, bytes, Path)):
        fix = "read the file, tokenize, and give the batches"
    elif not isinstance(data, Iterable) or isinstance(data, nn.Module):
        fix = "a list or a DataLoader is one"
    if fix:
        kind = "one tensor" if isinstance(data, Tensor) else type(data).__name__
        raise TypeError(f"data must be an iterable of batches, got {kind}; {fix}")
    return data  # type: ignore[return-value]


def taken(batch: Any, inputs: Inputs | None) -> Any:
    """What of a batch is fed to a model: by `inputs`, else all but the labels."""
    if inputs is not None:
        return inputs(batch)
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABELS}
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        if len(batch) not in (1, 2):
            raise ValueError(
                f"data: a batch of {len(batch)} parts is neither (x,) nor (x, labels); say what the models take with "
                "inputs=, as in inputs=lambda batch: (batch[0], batch[1])"
            )
        return batch[0]
    return batch


def _holds_samples(value: list | tuple) -> bool:
    """A list of texts, numbers or pictures: an item is a sample, where a list of tensors is a list of arguments."""
    return bool(value) and not any(isinstance(part, (Tensor, Mapping, list, tuple)) for part in value)


def count_samples(batch: Any) -> int | None:
    """How many samples a batch has, by its first tensor (or list of texts)."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor) or (hasattr(batch, "__array__") and hasattr(batch, "shape")):
        return batch.size(0) if isinstance(batch, Tensor) and batch.dim() else (list(batch.shape) or [None])[0]
    if isinstance(batch, Mapping):
        counts = [count_samples(part) for part in batch.values()]
    elif isinstance(batch, (tuple, list)):
        if _holds_samples(batch):
            return len(batch)
        counts = [count_samples(part) for part in batch]
    else:
        return None
    return next((count for count in counts if count is not None), None)


def reordered(batch: Any, order: Tensor, count: int) -> Any:
    """The samples `order` of a batch of `count`: of every part whose first axis has that length."""
    if isinstance(batch, PackedSequence):
        padded, lengths = pad_packed_sequence(batch, batch_first=True)
        return pack_padded_sequence(padded[order], lengths[order], batch_first=True, enforce_sorted=False)
    if isinstance(batch, Tensor):
        if batch.is_nested:
            parts = batch.unbind()
            return torch.nested.nested_tensor([parts[i] for i in order.tolist()], layout=batch.layout)
        return batch[order.to(batch.device)] if batch.dim() and batch.shape[0] == count else batch
    if hasattr(batch, "__array__") and hasattr(batch, "shape"):
        return batch[order.numpy()] if batch.shape and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {key: reordered(part, order, count) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        if _holds_samples(batch) and len(batch) == count:
            return [batch[i] for i in order.tolist()]
        return [reordered(part, order, count) for part in batch]
    return batch


def _device(model: nn.Module) -> torch.device | None:
    """Where a batch has to be for this model; `None` if it places batches itself: its parameters are on several
    devices, on none, or offloaded."""
    devices = {tensor.device for tensor in model.parameters()}
    only = devices.pop() if len(devices) == 1 else None
    return None if only is None or only.type == "meta" or hasattr(model, "hf_device_map") else only


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, (Tensor, PackedSequence)):
        return value if device is None else value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_moved(part, device) for part in value]
    return value


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a module's forward; `None` where Python cannot know them (TorchScript)."""
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return None


def call(model: nn.Module, batch: Any, argument: str, inputs: Inputs | None = None) -> Any:
    """Feeds a batch to a model: a tensor by position, the parts of a tuple by position, a mapping by keyword.

    Keywords the model's forward does not have are left out (one tokenizer's output can serve models that differ in
    them); a tuple that does not fit is an error.
    """
    fed = _moved(taken(batch, inputs), _device(model))
    known = parameters_of(model)
    if isinstance(fed, dict):
        open_ended = known is None or any(p.kind is p.VAR_KEYWORD for p in known.values())
        chosen = {
            key: value
            for key, value in fed.items()
            if (known and key in known) or (open_ended and not key.endswith("special_tokens_mask"))
        }
        if not chosen:
            raise ValueError(f"data: {argument} takes none of the batch's keys {', '.join(map(str, fed))}")
        return model(**_with_decoder_inputs(model, chosen, batch))
    args = fed if isinstance(fed, list) else [fed]
    if any(isinstance(arg, str) or arg is None for arg in args):
        raise ValueError(f"data: {argument} cannot take {type(args[0]).__name__}; tokenize, or say how with inputs=")
    if known is not None:
        try:
            inspect.signature(model.forward).bind(*args)
        except TypeError as error:
            signature = f"{type(model).__name__}.forward{inspect.signature(model.forward)}"
            raise ValueError(
                f"data: {len(args)} input{'s' * (len(args) > 1)} of a batch do{'es' * (len(args) == 1)} not fit "
                f"{argument}, {signature} ({error}); say what it takes with inputs=, as in inputs=lambda batch: "
                "(batch[0], batch[1])"
            ) from None
    return model(*args)


def _with_decoder_inputs(model: nn.Module, fed: dict[str, Any], batch: Any) -> dict[str, Any]:
    """Encoder–decoder models make their decoder's input from labels; which are no input otherwise."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if shift is None or not isinstance(labels, Tensor) or "decoder_input_ids" in fed or "decoder_inputs_embeds" in fed:
        return fed
    return {**fed, "decoder_input_ids": shift(labels=_moved(labels, _device(model)))}


class Stream(NamedTuple):
    """The sequences a part of a model works on.

    `attended` [B, T]: which positions are no padding; `None`: all. `counted` [B, T]: which of them ``tokens=`` keeps;
    `None`: all. `missing`: why `counted` cannot be known, though it was asked for.
    """

    attended: Tensor | None = None
    counted: Tensor | None = None
    missing: str | None = None

    @property
    def mask(self) -> Tensor | None:
        """[B, T] bool, or `None` where every position counts."""
        if self.counted is None or self.attended is None:
            return self.counted if self.attended is None else self.attended
        return self.attended & self.counted.to(self.attended.device)


# What a model, or a part of one, takes where sequences begin: here they get a mask of their own.
NO_TEXT = ("pixel_values", "input_values", "input_features")
BEGINNINGS = ("input_ids", "inputs_embeds", *NO_TEXT, "src_key_padding_mask", "tgt_key_padding_mask")


def as_mask(mask: object) -> Tensor | None:
    """A padding mask [B, T] as bool; `None` if it is none of that shape (4-D attention biases, for one)."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask == 0 if mask.is_floating_point() and bool((mask <= 0).all()) and bool((mask < 0).any()) else mask.bool()


def _padding(mask: object) -> Tensor | None:
    """PyTorch's ``…_key_padding_mask`` the other way round: what is no padding. Bool, or a bias of 0 and −∞."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask == 0 if mask.is_floating_point() else ~mask.bool()


class Streams:
    """Which sequences are being worked on while a model runs: encoder, decoder and vision towers have their own.

    A part of a model that takes ``input_ids``, ``pixel_values`` and the like begins a stream with the mask it is given;
    what runs inside it works on that. Everything else works on the batch's ``attention_mask``, or none.

    Args:
        model: whose parts are watched while the hooks of :meth:`hooks` are there.
        tokens: ``"all"``, ``"no_special"`` or a function from the batch to a mask [B, T].
    """

    def __init__(self, model: nn.Module, tokens: Tokens = "all") -> None:
        self.model, self.tokens = model, tokens
        self._beginnings: list[nn.Module] | None = None
        self._stack: list[list[Stream]] = []
        self._known: list[tuple[Any, list[Stream]]] = []  # token ids of the batch, with their streams

    @property
    def current(self) -> list[Stream]:
        """Candidates for what runs now, best first; a layer's positions say which fits."""
        return self._stack[-1]

    def begin(self, batch: Any, fed: Any) -> None:
        """A new batch: `batch` as the data gave it, `fed` what the model gets of it."""
        holder = fed if isinstance(fed, Mapping) else batch if isinstance(batch, Mapping) else {}
        own = as_mask(holder.get("attention_mask"))
        if own is None:
            own = _padding(holder.get("src_key_padding_mask"))
        packed = next((part for part in _leaves(fed) if isinstance(part, PackedSequence)), None)
        if own is None and packed is not None:
            own = lengths_mask(pad_packed_sequence(packed)[1])
        decoder = as_mask(holder.get("decoder_attention_mask"))
        ids = holder.get("decoder_input_ids")
        if decoder is None and isinstance(ids, Tensor) and ids.dim() == 2:
            decoder = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        base = self._with_tokens(own, batch, holder, "")
        self._known = [(holder.get("input_ids"), base)]
        self._stack = [base]
        if decoder is not None:
            second = self._with_tokens(decoder, batch, holder, "decoder_")
            self._known.append((ids, second))
            self._stack = [[*second, *base]]  # what is neither in the encoder nor in the decoder comes after both

    def _with_tokens(self, attended: Tensor | None, batch: Any, holder: Mapping, prefix: str) -> list[Stream]:
        if callable(self.tokens):
            counted = self.tokens(batch)
            if not isinstance(counted, Tensor) or counted.dim() != 2:
                came = list(counted.shape) if isinstance(counted, Tensor) else type(counted).__name__
                raise ValueError(f"tokens must give a mask [B, T] for a batch, got {came}")
            fits = attended is None or attended.shape == counted.shape
            return [Stream(attended, counted.bool())] if fits else [Stream(None, counted.bool()), Stream(attended)]
        if self.tokens == "all":
            return [Stream(attended)]
        special = holder.get(f"{prefix}special_tokens_mask")
        if special is None and isinstance(batch, Mapping):
            special = batch.get(f"{prefix}special_tokens_mask")
        if special is None:
            return [Stream(attended, missing=f"tokens='no_special' needs {prefix}special_tokens_mask in the batch")]
        return [Stream(attended, ~special.bool())]

    def hooks(self) -> Iterator[Callable[[], RemovableHandle]]:
        """Where streams begin, for :func:`pyrepr._modules.hooked`."""
        if self._beginnings is None:  # reading hundreds of signatures takes as long as a small layer runs
            parts = [m for m in self.model.modules() if not isinstance(m, torch.jit.ScriptModule)]
            self._beginnings = [m for m in parts if any(name in (parameters_of(m) or ()) for name in BEGINNINGS)]
        for module in self._beginnings:
            yield partial(module.register_forward_pre_hook, self._enter, with_kwargs=True, prepend=True)
            yield partial(module.register_forward_hook, self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        known = parameters_of(module) or {}
        try:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        except TypeError:
            given = kwargs
        self._stack.append(self._begun(known, {**given, **given.get("kwargs", {})}))

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _begun(self, known: Mapping, given: Mapping) -> list[Stream]:
        for name in ("tgt_key_padding_mask", "src_key_padding_mask"):
            if name in known:
                mask = _padding(given.get(name))
                return self.current if mask is None else [self._with_counted(mask)]
        if "decoder_input_ids" in known:
            return self.current
        ids, mask = given.get("input_ids"), as_mask(given.get("attention_mask"))
        for wanted, streams in self._known:
            if _same(ids, wanted) or (mask is not None and any(_same(mask, s.attended) for s in streams)):
                return streams
        if mask is not None:
            return [self._with_counted(mask)]
        begun = ids is not None or any(given.get(name) is not None for name in NO_TEXT)
        return [Stream()] if begun else self.current  # embeddings alone go on with what they were made of

    def _with_counted(self, mask: Tensor) -> Stream:
        """The batch's stream where it has this mask, else one of its own."""
        for stream in self.current:
            if stream.attended is None or stream.attended.shape == mask.shape:
                return Stream(mask, stream.counted, stream.missing)
        return Stream(mask)


def _same(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.shape == other.shape
        and (one is other or bool((one.to(other.device) == other).all()))
    )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def lengths_mask(lengths: Tensor, most: int | None = None) -> Tensor:
    """[B, T] bool from lengths [B]."""
    return torch.arange(most or int(lengths.max())) < lengths.cpu()[:, None]


def dense(value: Any) -> tuple[Any, Tensor | None]:
    """A packed sequence or a nested tensor as [B, T, …] with its mask [B, T]; anything else as it is."""
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        return padded, lengths_mask(lengths, padded.shape[1])
    if isinstance(value, Tensor) and value.is_nested:
        lengths = torch.tensor([part.shape[0] for part in value.unbind()])
        padded = torch.nested.to_padded_tensor(value, 0.0)
        return padded, lengths_mask(lengths, padded.shape[1])
    return value, None


def tensors_of(output: Any, path: tuple = ()) -> list[tuple[tuple, Any]]:
    """Every floating-point tensor (packed and nested ones whole) in a tensor, tuple, list, dict or dataclass, with the
    path that leads to it, depth first."""
    from dataclasses import fields, is_dataclass

    if isinstance(output, PackedSequence):
        return [(path, output)]
    if isinstance(output, Tensor):
        return [(path, output)] if output.is_floating_point() else []
    parts: Sequence[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        parts = list(output.items())
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [(field.name, getattr(output, field.name)) for field in fields(output)]
    elif isinstance(output, (tuple, list)):
        parts = list(enumerate(output))
    return [found for key, part in parts for found in tensors_of(part, (*path, key))]


# The names under which models put out what they are for, in the order of preference.
MAIN = ("logits", "last_hidden_state", "logits_per_image", "image_embeds", "text_embeds", "pooler_output")


def main_output(output: Any) -> tuple[str, Tensor] | None:
    """What a model puts out, with its name: by :data:`MAIN`, else the first floating-point tensor that is no scalar."""
    found = [(path, dense(tensor)[0]) for path, tensor in tensors_of(output)]
    found = [(path, tensor) for path, tensor in found if tensor.dim()]
    for name in MAIN:
        for path, tensor in found:
            if path == (name,):
                return name, tensor
    return (".".join(map(str, found[0][0])), found[0][1]) if found else None
