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
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import SAFETENSORS_WEIGHTS_NAME, transformers_weight_conversion
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtune.errors import ModelError
from qtune.memory import fused_cross_entropy, mixture_of_experts, nf4, packed_experts, trained_rows
from qtune.model import lora_variants
from qtune.recipe.base_kind import ADAPTER_CONFIG
from qtune.recipe.schema import Lora

EXPERTS = "experts"
LORA_PREFIX = "base_model.model."  # of every name in an adapter's file
ROWS_IN_FILE = "token_adapter.trainable_tokens_delta"  # which are the rows themselves


def attach(model: PreTrainedModel, lora: Lora, seed: int, token_ids: Sequence[int] | None = None) -> PeftModel:
    """`model` with a fresh adapter: A random from `seed`, B zero, so that the first output is the base's.

    `token_ids` are those of lora.train_tokens; without a tokenizer to say them, as many. Raises ModelError for a target
    that matches no linear layer, and for a pattern that matches none of those with an adapter, or one that another
    matches too.
    """
    torch.manual_seed(seed)
    targets = resolve_targets(model, lora)
    settings: dict[str, Any] = {
        "lora_alpha": lora.alpha,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
    }
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
        with _names_as_they_are(), warnings.catch_warnings(action="ignore"):  # of patterns that match nothing
            attached = get_peft_model(model, config)
    except ValueError as fault:
        raise ModelError(f"lora: peft cannot attach this adapter ({str(fault).splitlines()[0]}).") from None
    _refuse_idle_patterns(attached, lora)
    if lora.train_tokens:
        train_rows(attached, range(len(lora.train_tokens)) if token_ids is None else token_ids)
    return attached


def train_rows(model: PeftModel, token_ids: Sequence[int]) -> None:
    """Train these tokens' rows of the embedding, and of the head, with the adapter on `model`.

    Raises ModelError for a head beside which they cannot be held.
    """
    causal = model.get_base_model()
    if not fused_cross_entropy.suits(model):
        raise ModelError(
            f"lora.train_tokens: the output head of a {causal.config.model_type} has a bias, or more is done with its"
            " logits than scaling and capping, and rows of it cannot be trained. Leave it out."
        )
    rows = causal.get_input_embeddings().weight.shape[0]
    if beyond := [token for token in token_ids if token >= rows]:
        raise ModelError(f"lora.train_tokens: token {beyond[0]} has no row in the embedding, which has {rows:,}.")
    layer = next(layer for _, layer in adapted_layers(model))
    small = next(parameter for parameter in causal.parameters() if parameter.ndim < 2)  # which no technique moves
    trained_rows.put_on(causal, token_ids, small.device, lambda: not layer.disable_adapters)


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
    with _targets_as_peft_reads_them(model), _without_a_card(model), _rows_as_peft_has_them(model):
        # without embedding layers: else they come from all of the base's
        model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)
    if rows := _rows_by_file(model):
        path = folder / SAFETENSORS_WEIGHTS_NAME
        saved = {name: place.rows.detach().cpu().contiguous() for name, place in rows.items()}
        save_file({**load_file(path), **saved}, path, metadata={"format": "pt"})
    return sum(path.stat().st_size for path in folder.iterdir())


def put_back(model: PeftModel, folder: Path) -> None:
    """Give the adapter on `model` the weights that `save` wrote, to the bit and in the dtype that it has now.

    Raises ModelError where they are not those of this adapter.
    """
    weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    _put_rows_back(model, weights, folder)
    with _names_as_they_are():
        outcome = set_peft_model_state_dict(model, weights)
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
            token_ids, config.trainable_token_indices = config.trainable_token_indices, None
            mixture_of_experts.register(config, model)
            with _names_as_they_are():
                loaded = PeftModel.from_pretrained(model, folder, config=config)
            if token_ids:
                train_rows(loaded, _token_ids_in(token_ids, folder))
                _put_rows_back(loaded, load_file(folder / SAFETENSORS_WEIGHTS_NAME), folder)
                for place in _rows_by_file(loaded).values():
                    place.rows.requires_grad_(False)
            return loaded
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
    odd = {
        "dropout": config.lora_dropout > 0,
        "dora": config.use_dora,
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
    }
    taken = _taken_for_experts(config, model) if any(odd.values()) else set()
    if taken:
        raise ModelError(
            f"lora.{next(key for key, is_on in odd.items() if is_on)}: peft takes {', '.join(sorted(taken))} of a"
            f" {model.config.model_type} for its experts, which have neither dropout nor DoRA, and other names. Name"
            " lora.targets without them, or leave it out."
        )


def adapted_names(model: PeftModel) -> list[str]:
    """What has an adapter, as the base calls it and peft's patterns do: `model.layers.0.self_attn.q_proj`, and of
    experts `model.layers.0.mlp.experts.down_proj`."""
    return [_own_name(name, layer) for name, layer in adapted_layers(model)]


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Every layer with an adapter, by its name in the base, in which it stands now."""
    every = model.get_base_model().named_modules()
    return ((name, module) for name, module in every if isinstance(module, LoraLayer))


def _own_name(name: str, layer: LoraLayer) -> str:
    own = name.replace(".base_layer", "")  # experts are wrapped once for each of their parameters
    return f"{own}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else own


def _refuse_idle_patterns(model: PeftModel, lora: Lora) -> None:
    """peft saves patterns in the order of the alphabet, so of two that match one layer another may be the first to do
    so when the adapter is read."""
    names = adapted_names(model)
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        owners: dict[str, str] = {}
        for pattern in patterns:
            matched = [name for name in names if get_pattern_key([pattern], name) == pattern]
            if not matched:
                raise ModelError(f"lora.{key}.{pattern}: {_no_such_pattern(pattern, names)}")
            for name in matched:
                if name in owners:
                    raise ModelError(
                        f"lora.{key}.{pattern}: {name} is matched by {owners[name]!r}, too. A layer takes one of them:"
                        " make each say what the other does not."
                    )
                owners[name] = pattern


def _no_such_pattern(pattern: str, names: list[str]) -> str:
    ends = sorted({_last_name(name) for name in names})
    near = get_close_matches(pattern.rpartition(".")[2], ends, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"no layer with an adapter has a name that ends so.{hint} Those that end in {', '.join(ends)} have one, such as"
        f" {names[0]}."
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


def _rows_by_file(model: PeftModel) -> dict[str, trained_rows.Place]:
    """The trained rows of `model`, by their names in an adapter's file; of a tied table once."""
    return {
        f"{LORA_PREFIX}{name}.{ROWS_IN_FILE}": place
        for name, module in model.get_base_model().named_modules()
        if (place := getattr(module, trained_rows.PLACE, None)) is not None and place.owner is module
    }


def _put_rows_back(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Give the trained rows of `model` what `weights` of a file have for them, and take it out of there."""
    for name, place in _rows_by_file(model).items():
        saved = weights.pop(name, None)
        if saved is None or saved.shape != place.rows.shape:
            raise ModelError(f"{folder}: is not the adapter of this recipe ({name}).")
        place.rows.data.copy_(saved)


def _token_ids_in(found: Any, folder: Path) -> list[int]:
    """The tokens of which an adapter_config.json says that their rows are trained: a list, or one for each table."""
    lists = list(found.values()) if isinstance(found, dict) else [found]
    if any(each != lists[0] for each in lists):
        raise ModelError(f"{folder}: trains rows of other tokens in each table, which qtune does not hold.")
    return list(lists[0])


@contextlib.contextmanager
def _rows_as_peft_has_them(model: PeftModel) -> Iterator[None]:
    """Inside, the configurations name the trained rows, by table."""
    ends = len(f".{ROWS_IN_FILE}")
    named = {name[len(LORA_PREFIX) : -ends]: place.ids.tolist() for name, place in _rows_by_file(model).items()}
    for config in model.peft_config.values():
        config.trainable_token_indices = named or None
    try:
        yield
    finally:
        for config in model.peft_config.values():
            config.trainable_token_indices = None


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
