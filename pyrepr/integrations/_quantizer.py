"""Converted models of transformers in ``save_pretrained`` and ``from_pretrained``.

transformers names what its own modules were replaced by in ``config.json``, under ``quantization_config``, and has
classes for the method of that name prepare an empty model before weights are read. Those of the method "pyrepr" are
here: the configuration holds the specification of every layer of tables or signs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyrepr.nn._specification import Specification, pack, replacements, specification, specified

METHOD = "pyrepr"


@register_quantization_config(METHOD)
class LookupConfig(QuantizationConfigMixin):
    """``layers``: from the name of everything that a conversion made to its specification."""

    def __init__(self, layers: dict[str, Specification], **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = layers


@register_quantizer(METHOD)
class LookupQuantizer(HfQuantizer):
    """Puts empty lookup layers where the configuration has them; the weights are then loaded as any others."""

    quantization_config: LookupConfig
    requires_calibration = True  # :func:`pyrepr.convert` makes such models, `from_pretrained` only reads them

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, given in self.quantization_config.layers.items():
            holder, _, attribute = name.rpartition(".")
            try:
                old = model.get_submodule(name)
                layer = specified(given, device="meta")
            except (AttributeError, ValueError) as error:
                raise ValueError(
                    f"config.json has a lookup layer {name} that {type(model).__name__} cannot have: {error}"
                ) from error
            setattr(model.get_submodule(holder), attribute, layer.train(old.training))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, given in self.quantization_config.layers.items():
            pack(model.get_submodule(name), given)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The dtype of the empty tensor, which the specification gave: tables may be bfloat16 in a float32 model."""
        return dtype

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Called before anything is saved: the configuration as the layers are now."""
        self.quantization_config.layers = specifications(model)
        return None, {}

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def specifications(model: nn.Module) -> dict[str, Specification]:
    return {name: specification(layer) for name, layer in replacements(model.named_modules()).items()}


def mark(model: nn.Module) -> None:
    """Lets ``model.save_pretrained`` write what ``from_pretrained`` needs to make a converted model again. A model that
    another method has quantized keeps that one's mark. The model gets a configuration of its own: others that were made
    from the same one are not converted."""
    if isinstance(getattr(model, "hf_quantizer", None), (LookupQuantizer, type(None))):
        config = LookupConfig(specifications(model))
        model.config = copy.deepcopy(model.config)  # type: ignore[assignment]
        model.config.quantization_config = config  # type: ignore[union-attr]
        model.hf_quantizer = LookupQuantizer(config)  # type: ignore[assignment]
