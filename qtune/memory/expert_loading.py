"""Experts quantised to NF4 while a model is loaded, one matrix at a time; what is to live in host memory goes there.

Held less of: while loading, one parameter's matrices in 16 bits (those of one layer's experts before their activation)
and the same parameter packed; transformers by itself would join them first, which takes twice that.
Costs: nothing beside the quantisation.
Refuses: what `packed_experts.refusal` refuses; such experts are loaded in 16 bits.

transformers picks its quantiser for `BitsAndBytesConfig(load_in_4bit=True)` from a table; inside `quantized_experts`
the table names the one below, which does what the original does and quantises experts too.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qtune.memory.mixture_of_experts import install
from qtune.memory.packed_experts import is_expert_parameter, is_packed, pack

TABLE_KEY = "bitsandbytes_4bit"


def nowhere(name: str) -> bool:
    return False


@contextlib.contextmanager
def quantized_experts(lives_on_host: Callable[[str], bool] = nowhere) -> Iterator[None]:
    """Inside, `from_pretrained` with a 4-bit BitsAndBytesConfig holds experts in NF4 and runs them as in
    `mixture_of_experts`.

    Parameters for whose name `lives_on_host` holds are quantised on the device like all others, and leave it at once:
    a model larger than the device can be loaded if enough of it lives in host memory.
    """
    before = AUTO_QUANTIZER_MAPPING[TABLE_KEY]
    AUTO_QUANTIZER_MAPPING[TABLE_KEY] = type(
        "ExpertQuantizer", (ExpertQuantizer,), {"lives_on_host": staticmethod(lives_on_host)}
    )
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[TABLE_KEY] = before


class ExpertQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantiser for linears, and ours for experts."""

    lives_on_host: Callable[[str], bool] = staticmethod(nowhere)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Also of what is only to be moved: it passes through the same operation."""
        is_linear = super().param_needs_quantization(model, param_name, **kwargs)
        return is_linear or is_expert_parameter(model, param_name) or self.lives_on_host(param_name)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """By this transformers reserves memory on the device before it loads."""
        on_device = super().param_element_size(model, param_name, param)
        return 0.0 if self.lives_on_host(param_name) else on_device

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list, *others: Any) -> list:
        double = self.quantization_config.bnb_4bit_use_double_quant
        updated = super().update_weight_conversions(weight_conversions, *others)
        return [_packing(conversion, double) for conversion in updated]

    def is_serializable(self) -> bool:
        return False

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        install(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


JOININGS = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _packing(conversion: Any, double: bool) -> Any:
    """`conversion`, with its joining of matrices replaced by one that packs them, if that is all it does."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return conversion
    if [(type(operation), getattr(operation, "dim", None)) for operation in conversion.operations] not in JOININGS:
        return conversion
    packing = copy.deepcopy(conversion)
    packing.operations = [_JoinPacked(packing.operations, double)]
    return packing


class _JoinPacked(ConversionOps):
    """Joins a checkpoint's experts, each a matrix or several on top of each other, into one packed parameter."""

    def __init__(self, operations: list[ConversionOps], double: bool):
        self._operations, self._double = operations, double

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **others: Any
    ) -> dict[str, Any]:
        model, name = others["model"], others["full_layer_name"]
        if not is_expert_parameter(model, name):
            for operation in self._operations:
                input_dict = operation.convert(
                    input_dict, source_patterns=source_patterns, target_patterns=target_patterns, **others
                )
            return input_dict
        sources = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        shape = model.get_parameter(name).shape
        return {target_patterns[0]: pack(_joined(sources), shape, self._double)}


def _joined(sources: list[list[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """One expert's matrix after the other; what was given out is forgotten here."""
    for source in sources:
        source.reverse()
    while sources[0]:
        parts = [source.pop() for source in sources]
        yield torch.cat(parts) if len(parts) > 1 else parts[0]


class _Quantize(Bnb4bitQuantize):
    """Quantises what is about to be put into a model: linears as bitsandbytes does, stacked experts as `pack` does."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **others: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, given in input_dict.items():
            value = given[0] if isinstance(given, list) else given
            if not is_expert_parameter(model, name):
                is_linear = Bnb4BitHfQuantizer.param_needs_quantization(self.hf_quantizer, model, name)
                result |= super().convert({name: value}, model=model, **others) if is_linear else {name: value}
            elif is_packed(value):
                result[name] = value
            else:
                double = self.hf_quantizer.quantization_config.bnb_4bit_use_double_quant
                result[name] = pack(iter(value), value.shape, double)
            if self.hf_quantizer.lives_on_host(name):
                result[name] = result[name].to("cpu")
        return result
