"""The LoRA adapter: attached, kept in its master dtype, saved as a standard PEFT folder, and loaded again.

In the mixtures that transformers 4 had with an expert for each linear, peft takes the targets gate_proj, up_proj and
down_proj for the experts', which are stacked parameters now, and leaves out what still is a linear of that name: a
dense layer's, a shared expert's (peft 0.21, `convert_peft_config_for_transformers`). Here a target is what it is
called. The saved folder says the same in words that peft does not turn into others: such a linear's weight is among
its `target_parameters`, which is the same sum of weight and B @ A.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, transformers_weight_conversion
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtune.errors import ModelError
from qtune.memory import mixture_of_experts, nf4, packed_experts
from qtune.model import lora_variants
from qtune.recipe.base_kind import ADAPTER_CONFIG
from qtune.recipe.schema import Lora

EXPERTS = "experts"


def attach(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """`model` with a fresh adapter: A random from `seed`, B zero, so that the first output is the base's.

    Raises ModelError for a target that matches no linear layer.
    """
    torch.manual_seed(seed)
    targets = resolve_targets(model, lora)
    settings: dict[str, Any] = {"lora_alpha": lora.alpha}
    for variant in lora_variants.of_recipe(lora):
        settings |= variant.peft_settings(lora)
    config = LoraConfig(
        r=lora.rank,
        lora_dropout=lora.dropout,
        target_modules=[name for name in targets if name != EXPERTS],
        target_parameters=mixture_of_experts.expert_targets(model) if EXPERTS in targets else None,
        task_type="CAUSAL_LM",
        **settings,
    )
    _refuse_what_peft_cannot_say(model, config)
    mixture_of_experts.register(config, model)
    try:
        with _names_as_they_are():
            return get_peft_model(model, config)
    except ValueError as fault:
        raise ModelError(f"lora: peft cannot attach this adapter ({str(fault).splitlines()[0]}).") from None


def resolve_targets(model: PreTrainedModel, lora: Lora) -> tuple[str, ...]:
    """The last parts of the names of the linears that get an adapter, sorted; every target asked for must match.

    `experts` stands for all experts that qtune runs itself; "all-linear" leaves them out, as there are so many, and
    with them what can have no adapter (`left_out`) and routers: a step that moves one sends tokens to experts that have
    not seen their like, and the loss that keeps experts evenly busy is not trained with.
    """
    linears = linear_names(model)
    there = linears | ({EXPERTS} if mixture_of_experts.expert_targets(model) else set())
    if lora.targets == "all-linear":
        return tuple(sorted(linears - _router_names(model)))
    without = left_out(model)
    for target in (each for each in lora.targets if each in without):
        raise ModelError(
            f"lora.targets: {target!r} can have no adapter in a base of type {model.config.model_type}:"
            f" {without[target]}. Those that can are {', '.join(sorted(there))}."
        )
    missing = [target for target in lora.targets if target not in there]
    if missing:
        raise ModelError("\n".join(_no_such_target(target, there) for target in missing))
    return tuple(sorted(set(lora.targets)))


def _no_such_target(target: str, there: set[str]) -> str:
    near = get_close_matches(target, there, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if target == EXPERTS:
        hint = " Its experts can have no adapter of their own."
    if target in ("gate", "router"):  # what transformers calls them where they are layers of their own
        hint = " A router that is no linear layer stays as it is."
    return f"lora.targets: no linear layer is named {target!r}.{hint} This base has {', '.join(sorted(there))}."


def linear_names(model: PreTrainedModel) -> set[str]:
    """The last part of the name of every linear layer that can have an adapter; the output head, which the fused loss
    reads directly, has none. Of layers that are only numbered it is the list's name and the number."""
    return _all_linear_names(model) - left_out(model).keys()


def left_out(model: PreTrainedModel) -> dict[str, str]:
    """By the same names, the linear layers that can have no adapter, and why."""
    past = dict.fromkeys(nf4.multiplied_by_hand(type(model)), "its model multiplies by its weight, past an adapter")
    past |= dict.fromkeys(_router_names(model, more=True), "it is a router whose layer does more than multiply")
    past |= dict.fromkeys(_indexer_names(model), "it only helps to choose keys, and a choice has no gradient")
    return {
        name: why
        for name in sorted(_all_linear_names(model))
        if (why := past.get(name) or _refused_by_peft(model, name))
    }


def _router_names(model: PreTrainedModel, more: bool = False) -> set[str]:
    """Names that only routers have; only of those that do `more` than a linear, if that is asked."""
    routers = packed_experts.router_names(model)
    others = {_last_name(name) for name, module in _linears(model) if name not in routers}
    found = {
        _last_name(name) for name, module in _linears(model) if name in routers and not (more and _is_plain(module))
    }
    return found - others


def _indexer_names(model: PreTrainedModel) -> set[str]:
    """Names that only layers of a sparse attention's indexers have."""
    linears = [name for name, _ in _linears(model)]
    return {_last_name(name) for name in linears if ".indexer." in name} - {
        _last_name(name) for name in linears if ".indexer." not in name
    }


def _is_plain(module: torch.nn.Module) -> bool:
    return type(module) in (torch.nn.Linear, Linear4bit)


def _all_linear_names(model: PreTrainedModel) -> set[str]:
    return {_last_name(name) for name, _ in _linears(model)}


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            yield name, module


def _last_name(path: str) -> str:
    """`q_proj` of `layers.0.self_attn.q_proj`, `ffn.2` of `h.0.ffn.2`: "2" would be a layer's name, too."""
    names = path.split(".")
    first = max((at for at, name in enumerate(names) if not name.isdigit()), default=0)
    return ".".join(names[first:])


def _refused_by_peft(model: PreTrainedModel, name: str) -> str | None:
    """peft knows of some architectures whose kernels read a weight past its adapter."""
    check = getattr(LoraModel, "_check_target_module_compatiblity", None)  # spelt like that in peft since 0.18
    try:
        if check is not None:
            check(None, LoraConfig(), model, name)
    except ValueError:
        return "peft refuses one there, as the kernels of such models read its weight past an adapter"
    return None


def use_master_dtype(model: torch.nn.Module, dtype: str) -> None:
    """Keep every trained weight in `dtype`.

    Call after the trainer is built: it casts the adapter of a quantised model to bfloat16, which loses small updates.
    """
    for parameter in trained_parameters(model):
        parameter.data = parameter.data.to(getattr(torch, dtype))


def trained_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def save(model: PeftModel, folder: Path, base_name: str) -> int:
    """Write the adapter as `PeftModel.from_pretrained` and servers read it; returns its bytes.

    `base_name` is what adapter_config.json will call the base.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with _targets_as_peft_reads_them(model), _without_a_card(model):
        # without embedding layers: else they come from all of the base's
        model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)
    return sum(path.stat().st_size for path in folder.iterdir())


def put_back(model: PeftModel, folder: Path) -> None:
    """Give the adapter on `model` the weights that `save` wrote, to the bit and in the dtype that it has now.

    Raises ModelError where they are not those of this adapter.
    """
    with _names_as_they_are():
        outcome = set_peft_model_state_dict(model, load_file(folder / SAFETENSORS_WEIGHTS_NAME))
    missing = [name for name in outcome.missing_keys if ".lora_" in name]
    if missing or outcome.unexpected_keys:
        raise ModelError(f"{folder}: is not the adapter of this recipe ({(missing or outcome.unexpected_keys)[0]}).")


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The saved adapter on `model`, frozen, for answering and merging.

    Raises ModelError where the folder holds no adapter or one whose shapes do not fit this base.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder}: holds no adapter, it has no {ADAPTER_CONFIG}.")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():  # peft would look for a pickle
        raise ModelError(f"{folder}: holds no adapter weights, it has no {SAFETENSORS_WEIGHTS_NAME}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = _with_linears_as_modules(LoraConfig.from_pretrained(folder), model)
            mixture_of_experts.register(config, model)
            with _names_as_they_are():
                return PeftModel.from_pretrained(model, folder, config=config)
    except (RuntimeError, ValueError, SafetensorError) as fault:
        raise ModelError(f"{folder}: does not fit this base ({str(fault).splitlines()[0]}).") from None


@contextlib.contextmanager
def _names_as_they_are() -> Iterator[None]:
    """Inside, peft leaves the targets of a configuration and the names in an adapter's file as they are: it would read
    both as transformers 4 had them, and of a name that both have make one that neither has."""
    kept = {
        "convert_peft_config_for_transformers": lambda *given, **named: None,
        "convert_peft_adapter_state_dict_for_transformers": lambda **given: given["adapter_state_dict"],
    }
    before = {name: getattr(transformers_weight_conversion, name) for name in kept}
    try:
        for name, function in kept.items():
            setattr(transformers_weight_conversion, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(transformers_weight_conversion, name, function)


def _taken_for_experts(config: LoraConfig, model: torch.nn.Module) -> set[str]:
    """Those of `target_modules` that peft would take for experts of `model` when it reads them."""
    read = copy.deepcopy(config)
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(read, model, None)
    except ValueError:  # some of those that are one parameter now: it would not read the others either
        pairs = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING.values()
        return {target for target in config.target_modules or () if any(target in each for each in pairs)}
    return set(config.target_modules or ()) - set(read.target_modules or ())


def _refuse_what_peft_cannot_say(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raises ModelError for linears that only `target_parameters` can name, which take neither dropout nor DoRA."""
    odd = {"dropout": config.lora_dropout > 0, "dora": config.use_dora}
    taken = _taken_for_experts(config, model) if any(odd.values()) else set()
    if taken:
        raise ModelError(
            f"lora.{next(key for key, is_on in odd.items() if is_on)}: peft takes {', '.join(sorted(taken))} of a"
            f" {model.config.model_type} for its experts, which have neither dropout nor DoRA. Name lora.targets"
            " without them, or leave it out."
        )


@contextlib.contextmanager
def _targets_as_peft_reads_them(model: PeftModel) -> Iterator[None]:
    """Inside, the configurations name in `target_parameters` what peft would not find by `target_modules`."""
    base, before = model.get_base_model(), dict(model.peft_config)
    for adapter, config in before.items():
        if taken := _taken_for_experts(config, base):
            said = copy.deepcopy(config)
            said.target_modules = set(config.target_modules) - taken
            said.target_parameters = sorted({*(config.target_parameters or ()), *_weights_of(base, taken)})
            model.peft_config[adapter] = said
    try:
        yield
    finally:
        model.peft_config.update(before)


@contextlib.contextmanager
def _without_a_card(model: PeftModel) -> Iterator[None]:
    """Inside, peft writes no README.md, a form to fill in; the run's own card comes at its end."""
    vars(model)["create_or_update_model_card"] = lambda folder: None
    try:
        yield
    finally:
        del vars(model)["create_or_update_model_card"]


def _weights_of(base: torch.nn.Module, targets: set[str]) -> set[str]:
    """`mlp.shared_expert.down_proj.weight`: the adapted linears called one of `targets`, from their layer on."""
    names = [name.split(".") for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    numbers = [max((i for i, part in enumerate(parts) if part.isdigit()), default=-1) for parts in names]
    return {
        ".".join([*parts[number + 1 :], "weight"])
        for parts, number in zip(names, numbers, strict=True)
        if parts[-1] in targets
    }


def _with_linears_as_modules(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """A saved configuration as `attach` had it: linears by name, whose weights may be in 4 bits."""
    targets = {name: own for own in linear_names(model) for name in config.target_parameters or () if _is_of(name, own)}
    if targets:
        config.target_modules = {*(config.target_modules or ()), *targets.values()}
        config.target_parameters = sorted(set(config.target_parameters) - targets.keys()) or None
    return config


def _is_of(parameter: str, linear: str) -> bool:
    return parameter.endswith(f".{linear}.weight")
