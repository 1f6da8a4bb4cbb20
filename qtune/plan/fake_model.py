"""The model that a recipe describes, without its weights: the real modules on fake tensors.

Built on torch's meta device from config.json alone, its linears replaced by bitsandbytes' as loading would, the adapter
attached by peft; then every tensor becomes a fake one of the same shape and dtype (torch's FakeTensorMode), so that a
real step can run through it in which no byte is allocated.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import dora
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from qtune.errors import ModelError
from qtune.memory import (
    fused_cross_entropy,
    fused_layers,
    gated_delta_rule,
    mixture_of_experts,
    nf4,
    packed_attention,
    packed_experts,
    packed_mixers,
)
from qtune.model import adapter, base
from qtune.recipe.schema import Recipe


def build(config: PreTrainedConfig, recipe: Recipe, compute_dtype: str, mode: FakeTensorMode) -> PeftModel:
    """The base in the recipe's quantisation with its adapter, all of it fake tensors of `mode`.

    Raises ModelError for a config.json from which transformers cannot build a model.
    """
    dtype = getattr(torch, compute_dtype)
    model = _without_weights(config, recipe, dtype)
    held = base.held_as(config, recipe.model)
    if held:
        quantization = nf4.config(held.double, dtype)
        apart = [*get_keys_to_not_convert(model), *nf4.multiplied_by_hand(type(model)), *_left_whole(config)]
        model = replace_with_bnb_linear(model, modules_to_not_convert=apart, quantization_config=quantization)
        model.is_loaded_in_4bit = True  # peft chooses its layers by this
    model.requires_grad_(False)
    model.config.use_cache = False
    packed_attention.install(model)
    gated_delta_rule.install(model)
    packed_mixers.install(model)
    fused_layers.install(model)
    fused_cross_entropy.install(model)
    if held and not held.is_given:
        _pack_experts(model, held.double, mode)
    mixture_of_experts.install(model)
    peft_model = attached(model, recipe)
    adapter.use_master_dtype(peft_model, recipe.lora.master_dtype)
    with mode:
        _fill(peft_model, held is not None and held.double)
    nf4.keep_weights_as_quantised(peft_model)
    return peft_model


def _left_whole(config: PreTrainedConfig) -> list[str]:
    """The modules that files in 4 bits have in 16."""
    return (getattr(config, "quantization_config", None) or {}).get("llm_int8_skip_modules") or []


def empty(config: PreTrainedConfig, recipe: Recipe) -> PreTrainedModel:
    """The base on the meta device, not quantised, and ready for an adapter: names and shapes, nothing else."""
    model = _without_weights(config, recipe, torch.float32)
    mixture_of_experts.install(model)
    return model


def attached(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """A fresh adapter on a base that is on the meta device. Raises ModelError as `adapter.attach` does."""
    with torch.device("meta"), dora_on_empty_weights():
        return adapter.attach(model, recipe.lora, recipe.train.seed)


def refuse_unknown_targets(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Raises ModelError for lora.targets that no layer of the base has, which needs neither rows nor a plan.

    Experts are left to `build`, which holds them as the run will.
    """
    if recipe.lora.targets != "all-linear":
        named = tuple(target for target in recipe.lora.targets if target != adapter.EXPERTS)
        model = _without_weights(config, recipe, torch.float32)
        adapter.resolve_targets(model, recipe.lora.model_copy(update={"targets": named}))


def _without_weights(config: PreTrainedConfig, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """The base on the meta device, as its config.json describes it."""
    _refuse_contradictions(config)
    packed_attention.register()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=packed_attention.implementation_for(config),
                trust_remote_code=recipe.model.trust_remote_code,
            )
    except Exception as fault:  # a config can be wrong in as many ways as there are architectures
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise ModelError(f"model.base: no model can be built from its config.json ({reason}).") from None
    _refuse_shared_layers(model)
    return model


@contextlib.contextmanager
def dora_on_empty_weights() -> Iterator[None]:
    """Inside, peft's DoRA takes the weight of a 4-bit linear without real bytes, which it reads at its start and in
    every pass; peft asks for bitsandbytes' own kind of parameter, which a fake tensor cannot be."""
    original = dora.dequantize_module_weight

    def weight_of(module: torch.nn.Module) -> torch.Tensor:
        if not isinstance(module, Linear4bit):
            return original(module)
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            shape = (module.out_features, module.in_features)
            return torch.empty(shape, dtype=module.compute_dtype, device=module.weight.device)
        return dequantize_4bit(module.weight.data, state)

    dora.dequantize_module_weight = weight_of
    try:
        yield
    finally:
        dora.dequantize_module_weight = original


def _refuse_shared_layers(model: PreTrainedModel) -> None:
    """Raises ModelError for a decoder of which layers have weights in common."""
    model.tie_weights()
    for layers in (module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
        owners = Counter(id(weight) for layer in layers for weight in {*layer.parameters()})
        if any(count > 1 for count in owners.values()):
            raise ModelError(
                f"model.base: in models of type {model.config.model_type} several layers have the same weights, and"
                " what is resumed and merged goes by layer. Take a base whose layers are their own, such as Bamba or"
                " Granite 4 among those with Mamba layers."
            )


def _refuse_contradictions(config: PreTrainedConfig) -> None:
    """Raises ModelError for sizes that no model has, which transformers would meet as a division by zero."""
    text, says = config.get_text_config(), "model.base: its config.json says"
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        for size in sizes_in_layers(text, name):
            if size is not None and not (isinstance(size, int) and size >= 1):
                raise ModelError(f"{says} {name} = {size}, which must be a whole number of at least 1.")
    heads = getattr(text, "num_attention_heads", None)
    for groups in sizes_in_layers(text, "num_key_value_heads"):
        if heads and groups and heads % groups:
            raise ModelError(
                f"{says} num_attention_heads = {heads} and num_key_value_heads = {groups}, and the first must be a"
                " multiple of the second."
            )


def sizes_in_layers(text: PreTrainedConfig, name: str) -> tuple[Any, ...]:
    """What `text` says of each layer by that name, or once of all of them; Gemma 4's global layers have other heads."""
    try:
        return (getattr(text, name, None),)
    except RuntimeError:  # which transformers raises, since 5.10, of a size that is not the same in every layer
        return tuple(getattr(text.per_layer_config[layer], name) for layer in range(text.num_hidden_layers))


def shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """`config` with `layers` decoder layers, of the kinds its first ones have; of what sees or hears, one layer."""
    cut = copy.deepcopy(config)
    for name in ("vision_config", "audio_config"):
        tower: Any = getattr(cut, name, None)
        if getattr(tower, "num_hidden_layers", None):
            tower.num_hidden_layers = 1
    text = cut.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        with contextlib.suppress(AttributeError):  # some work it out from num_hidden_layers themselves
            text.layer_types = text.layer_types[:layers]
    return cut


def period(config: PreTrainedConfig) -> int:
    """After how many layers their kinds repeat: 1 for most models, 6 where five windows go with one full attention, and
    as many as there are where the last ones read what earlier ones share."""
    text = config.get_text_config()
    if getattr(text, "num_kv_shared_layers", None):
        return int(text.num_hidden_layers)
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    return next(n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))


def _pack_experts(model: torch.nn.Module, double: bool, mode: FakeTensorMode) -> None:
    """Hold a mixture's experts as loading would: in NF4 where that is possible."""
    for module in list(packed_experts.expert_modules(model)):
        if packed_experts.refusal(module) is None:
            for name in packed_experts.stacked_names(module):
                with mode:
                    setattr(module, name, packed_experts.packed_like(getattr(module, name), double))


def _fill(model: torch.nn.Module, double: bool) -> None:
    """Replace every meta tensor by a fake one; the weights of 4-bit linears by packed ones."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight = nf4.empty_packed((module.out_features, module.in_features), module.compute_dtype, double)
            module.quant_state = module.weight.quant_state
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:  # tied weights stay tied
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
