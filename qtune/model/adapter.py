"""The LoRA adapter: attached, kept in its master dtype, saved as a standard PEFT folder, and loaded again."""

import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtune.errors import ModelError
from qtune.memory import mixture_of_experts, nf4
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
    mixture_of_experts.register(config, model)
    try:
        return get_peft_model(model, config)
    except ValueError as fault:
        raise ModelError(f"lora: peft cannot attach this adapter ({str(fault).splitlines()[0]}).") from None


def resolve_targets(model: PreTrainedModel, lora: Lora) -> tuple[str, ...]:
    """The last parts of the names of the linears that get an adapter, sorted; every target asked for must match.

    `experts` stands for all experts that are held in NF4; "all-linear" leaves them out, as there are so many, and with
    them what can have no adapter (`left_out`).
    """
    linears = linear_names(model)
    there = linears | ({EXPERTS} if mixture_of_experts.expert_targets(model) else set())
    if lora.targets == "all-linear":
        return tuple(sorted(linears))
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
    return f"lora.targets: no linear layer is named {target!r}.{hint} This base has {', '.join(sorted(there))}."


def linear_names(model: PreTrainedModel) -> set[str]:
    """The last part of the name of every linear layer that can have an adapter; the output head, which the fused loss
    reads directly, has none. Of layers that are only numbered it is the list's name and the number."""
    return _all_linear_names(model) - left_out(model).keys()


def left_out(model: PreTrainedModel) -> dict[str, str]:
    """By the same names, the linear layers that can have no adapter, and why."""
    past = dict.fromkeys(nf4.multiplied_by_hand(type(model)), "its model multiplies by its weight, past an adapter")
    return {
        name: why
        for name in sorted(_all_linear_names(model))
        if (why := past.get(name) or _refused_by_peft(model, name))
    }


def _all_linear_names(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    return {
        _last_name(name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


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
    model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)  # without it, from all of the base's
    (folder / "README.md").unlink(missing_ok=True)  # peft's form to fill in; the run's own card comes at its end
    return sum(path.stat().st_size for path in folder.iterdir())


def put_back(model: PeftModel, folder: Path) -> None:
    """Give the adapter on `model` the weights that `save` wrote, to the bit and in the dtype that it has now.

    Raises ModelError where they are not those of this adapter.
    """
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
            config = LoraConfig.from_pretrained(folder)
            mixture_of_experts.register(config, model)
            return PeftModel.from_pretrained(model, folder, config=config)
    except (RuntimeError, ValueError, SafetensorError) as fault:
        raise ModelError(f"{folder}: does not fit this base ({str(fault).splitlines()[0]}).") from None
