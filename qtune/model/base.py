"""The frozen base: its configuration, and the model itself, in 4 bits or not."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qtune import accelerator, card_faults, logs
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import MachineError, ModelError, QtuneError
from qtune.lock import Quantization
from qtune.memory import (
    fused_cross_entropy,
    fused_layers,
    gated_delta_rule,
    mixture_of_experts,
    nf4,
    packed_attention,
    packed_mixers,
)
from qtune.memory.dealt_layers import Deal
from qtune.memory.expert_loading import quantized_experts
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.oom_recovery import is_out_of_memory, let_go
from qtune.memory.packed_experts import is_packed
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.weight_streaming import spread
from qtune.model import base_files, nf4_cache, untrusted_folder
from qtune.model.checkpoint import BaseCheckpoint
from qtune.recipe import base_kind
from qtune.recipe.schema import Model
from qtune.recipe.text_part import CONFIG, TextPart, json_in, text_config_of

SAMPLED_ROWS, NEXT_TO_NOTHING = 512, 0.01  # of an embedding, and the share of a row's usual length; both chosen


def quiet_libraries() -> None:
    """Send what the libraries print by themselves to the log; every verb that loads a model calls this first."""
    logs.quiet_libraries()
    transformers.utils.logging.disable_progress_bar()


def base_folder(model: Model, is_text_alone: bool = True) -> Path:
    """The local folder with the base's files; a hub model is downloaded once and then found in the cache.

    With `is_text_alone` files of weights that hold nothing of the text model may be missing. Raises ModelError for a
    folder that holds no model, MachineError where the hub cannot be reached.
    """
    if model.base == "demo":
        return base_files.DEMO_BASE
    return _checked(base_files.local_folder(model) or base_files.whole(model, is_text_alone), model)


def _checked(folder: Path, model: Model, needs_weights: bool = True) -> Path:
    """`folder`, if a causal language model in safetensors is in it."""
    if not folder.is_dir():
        raise ModelError(f"model.base: there is no folder {folder}.")
    if fault := base_kind.fault_of(folder, needs_weights, model.trust_remote_code):
        raise ModelError(f"model.base: {fault}")
    return folder


def read_config(model: Model) -> PreTrainedConfig:
    """The configuration of the base's text model; ModelError unless that is a causal language model."""
    return config_in(base_folder(model), model)


def read_config_alone(model: Model) -> PreTrainedConfig:
    """The same without the weights: of a hub model nothing but config.json is fetched."""
    folder = base_files.local_folder(model) or base_files.config_alone(model)
    config = config_in(_checked(folder, model, needs_weights=False), model)
    _refuse_contradiction(nf4.given(config), model)
    return config


def _refuse_contradiction(given: Quantization | None, model: Model) -> None:
    """Raises ModelError for settings that files in 4 bits cannot have."""
    if given and model.quantization == "none":
        raise ModelError(
            f'model.quantization = "none": the weights of {model.base} are in 4 bits already, and are used as they are.'
            " Leave it out, or name the model that they were made from."
        )
    if given and given.double and not model.double_quantization:
        raise ModelError(
            f"model.double_quantization = false: the scales of {model.base} are quantised already, and are used as they"
            " are. Leave it out, or name the model that they were made from."
        )


def held_as(config: PreTrainedConfig, model: Model) -> Quantization | None:
    """How the base's linears are held: as its files have them, or as the recipe says; None for not in 4 bits."""
    asked = Quantization("nf4", model.double_quantization) if model.quantization == "nf4" else None
    return nf4.given(config) or asked


def config_in(folder: Path, model: Model) -> PreTrainedConfig:
    """The same for a folder that is there, which `model` says how to trust."""
    if model.trust_remote_code:
        untrusted_folder.refuse_code_elsewhere(folder)
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as fault:  # a config can be wrong in as many ways as there are architectures
        reason = str(fault).strip().splitlines()
        told = reason[0] if reason else type(fault).__name__
        raise ModelError(f"model.base: {folder / 'config.json'} cannot be used ({told})") from None
    _refuse_unfit(folder, described, model.trust_remote_code)
    if base_kind.is_read_from_codes(described):  # and not by transformers, which would keep the codes
        del config.quantization_config
    return config if text_config_of(described) is None else _text_config(config, described)


def _text_config(config: PreTrainedConfig, described: Mapping[str, Any]) -> PreTrainedConfig:
    """The text model's own configuration, with what the whole model's config.json says for it."""
    text: PreTrainedConfig = config.text_config
    if "tie_word_embeddings" in described:
        text.tie_word_embeddings = bool(described["tie_word_embeddings"])
    text.dtype = text.dtype or config.dtype
    if base_kind.is_in_4_bits(described):
        text.quantization_config = _by_own_names(config.quantization_config, TextPart.of(described))
    text.name_or_path = config.name_or_path
    return text


def _by_own_names(settings: dict[str, Any], part: TextPart) -> dict[str, Any]:
    """How weights are quantised, with what is left whole called as the text model calls it."""
    whole = settings.get("llm_int8_skip_modules") or []
    return {**settings, "llm_int8_skip_modules": [part.name(f"{name}.") or name for name in whole] or None}


def _refuse_unfit(folder: Path, described: dict[str, Any], trust_remote_code: bool) -> None:
    """Raises ModelError for a config.json whose model cannot be tuned here, by what it is."""
    causal = None if trust_remote_code else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if fault := base_kind.fault_of_config(described, causal):
        raise ModelError(f"model.base: {folder} {fault}")


def load_base(
    model: Model, device: str, compute_dtype: str, techniques: Techniques | None = None, ranks: Ranks = ALONE
) -> PreTrainedModel:
    """The base on `device`, every parameter frozen; its linears in NF4 where the recipe says so.

    What `techniques` keep in host memory is left there, for `memory.engine.Engine` to take up. Attention keeps
    packed documents apart without a mask (`memory.packed_attention`). Of layers that `ranks` will hold in parts each of
    them reads some. Raises ModelError for weights that cannot be
    read, MachineError where memory runs out.
    """
    config = read_config(model)
    packed_attention.register()
    dtype = getattr(torch, compute_dtype)
    quantization, given = None, nf4.given(config)
    if given:
        config.quantization_config["bnb_4bit_compute_dtype"] = compute_dtype
    elif model.quantization == "nf4":
        quantization = nf4.config(model.double_quantization, dtype, packed_attention.model_class(config))
    text, planned = config.get_text_config(), techniques or Techniques()

    def lives_on_host(weight: str) -> bool:
        return any(each.stays_on_host(weight, planned, text) for each in planned.on())

    in_parts = () if given or ranks.size == 1 else spread(planned.sharded_layers, text.num_hidden_layers)
    deal = Deal(ranks, tuple(in_parts), model.double_quantization)
    folder = base_folder(model)
    place = nf4_cache.place_of(model, folder, device, quantization) if quantization else None
    entry = place.find() if place else None
    with contextlib.ExitStack() as stack:
        if quantization:
            stack.enter_context(quantized_experts(lives_on_host))
        if deal.layers:
            stack.enter_context(deal.own_layers_alone(nf4_cache.put))
        if entry:
            stack.enter_context(nf4_cache.weights_from(entry, device, lives_on_host))
        with _refusing(folder, device, "4 bits" if quantization else compute_dtype):
            loaded = from_folder(
                folder,
                config,
                model.trust_remote_code,
                dtype=dtype,
                device_map={"": device},
                quantization_config=quantization,
                attn_implementation=packed_attention.implementation_for(config),
            )
    loaded.requires_grad_(False)
    if deal.layers:
        deal.say_whose(loaded, find_layers(loaded))
    if (quantization or given) and not entry:
        _leave_the_files(loaded)
    if given:
        _compute_in(loaded, dtype, folder)
    if place and not entry and not deal.layers:
        place.keep(loaded)
    nf4.keep_weights_as_quantised(loaded)
    packed_attention.install(loaded)
    gated_delta_rule.install(loaded)
    packed_mixers.install(loaded)
    fused_layers.install(loaded)
    mixture_of_experts.install(loaded)
    fused_cross_entropy.install(loaded)
    loaded.config.use_cache = False
    if getattr(loaded.config, "rescale_every", 0):
        loaded.config.rescale_every = 0  # or RWKV halves weights in place as it answers, which 4 bits do not survive
    return loaded


def from_folder(folder: Path, config: PreTrainedConfig, trust_remote_code: bool, **settings: Any) -> PreTrainedModel:
    """The causal language model that `config` describes, as transformers loads it with `settings`.

    Of a checkpoint that holds more only its tensors are read, and codes as what they stand for (`model.checkpoint`).
    Raises ModelError where some tensors are missing.
    """
    described = json_in(folder / CONFIG)
    is_own = base_kind.is_read_from_codes(described) or base_kind.is_in_4_bits(described)
    if not TextPart.of(described).is_within and not is_own:
        return AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust_remote_code, use_safetensors=True, **settings
        )
    kind, checkpoint = (
        packed_attention.model_class(config),
        BaseCheckpoint.open(folder, is_text_alone=True, keeps_4_bits=True),
    )
    if kind is None:
        raise ModelError(
            f"model.base: {folder} holds weights in {base_kind.quantization_of(described)['quant_method']}, which are"
            " read for classes of transformers and not for code beside the weights. Name a copy of it in 16 bits."
        )
    if settings.get("dtype") == "auto":
        settings["dtype"] = config.dtype or next(spec.dtype for spec in checkpoint.text_specs().values())
    with contextlib.suppress(OSError):  # without the file transformers takes what the model's own configuration says
        settings["generation_config"] = GenerationConfig.from_pretrained(folder)
    with checkpoint.text_tensors() as tensors:
        try:
            loaded, told = kind.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, **settings
            )
            missing = sorted(told["missing_keys"])
        except NotImplementedError:  # what is missing is made anew, which bytes of 4 bits cannot be
            with torch.device("meta"):
                missing = sorted(kind(config).state_dict().keys() - tensors.keys() - set(kind._tied_weights_keys or ()))
            if not missing:
                raise
    if missing:
        raise ModelError(
            f"model.base: the weights in {folder} lack {missing[0]} of the text model that its {CONFIG} describes."
            " Download the base again."
        )
    loaded.name_or_path = loaded.config.name_or_path = str(folder)
    return loaded


def _compute_in(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Restore weights that came in 4 bits in `dtype`, whatever they were in before. Raises ModelError for a linear that
    is in 4 bits by its configuration and not by its tensors, and for blocks of another size."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if state is None or state.blocksize != nf4.BLOCK:
                found = "no 4 bits" if state is None else f"blocks of {state.blocksize}"
                raise ModelError(
                    f"model.base: {folder} holds {found} for {name}.weight, and blocks of {nf4.BLOCK} were looked for."
                    f" Take the files and the {CONFIG} that belong together, or name the model they were made from."
                )
            state.dtype = dtype


def _leave_the_files(model: PreTrainedModel) -> None:
    """Copy what still lies in the mapped files, which count as this process's memory while one tensor needs them: all
    that was quantised from them, too."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not accelerator.is_card(tensor.device) and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()


@contextlib.contextmanager
def _refusing(folder: Path, device: str, held_in: str) -> Iterator[None]:
    """What goes wrong as weights are loaded, as a sentence."""
    try:
        yield
    except (SafetensorError, OSError) as fault:
        raise ModelError(
            f"model.base: {folder} cannot be loaded ({str(fault).splitlines()[0]}). Download the base again."
        ) from None
    except Exception as fault:
        if not is_out_of_memory(fault):
            raise
        let_go(fault)
        or_else = "" if device == "cpu" else ", or take the processor, with CUDA_VISIBLE_DEVICES= in the environment"
        raise MachineError(
            f"{folder}: in {held_in} it does not fit into what is free of the memory of {device}. Close what else uses"
            f" it{or_else}."
        ) from None


@contextlib.contextmanager
def refusing_unfit(model_type: str, what: str) -> Iterator[None]:
    """Inside, before any step is taken, `what` fails means that models of this type cannot be trained: a ModelError.

    What is refused by itself stays as it is, and so do memory that runs out and a card that falls out.
    """
    try:
        yield
    except QtuneError:
        raise
    except Exception as fault:  # transformers has as many ways to run a model as there are architectures
        if is_out_of_memory(fault) or card_faults.why_gone(fault):
            raise
        lines = str(fault).strip().splitlines()
        reason = f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__
        if isinstance(fault, DataDependentOutputException | DynamicOutputShapeException):
            reason = "its layers read on the host what they computed, such as which experts were hit"
        raise ModelError(
            f"model.base: models of type {model_type} cannot be trained here: {what} fails ({reason}). Take another"
            " base."
        ) from fault


def never_seen(model: PreTrainedModel, token_ids: Sequence[int]) -> list[int]:
    """Those of `token_ids` that the base was never trained on: their rows of the embedding are next to nothing, as
    those of Llama 3's `<|eot_id|>`. Of the token that pads torch leaves the row at 0, whatever it is trained for."""
    embedding: Any = model.get_input_embeddings()
    weight, padding = embedding.weight.detach(), getattr(embedding, "padding_idx", None)
    if weight.is_meta or not weight.is_floating_point():
        return []
    usual = weight[:: max(1, len(weight) // SAMPLED_ROWS)].float().norm(dim=1).median()
    known = [token for token in token_ids if token < len(weight) and token != padding]
    return [token for token in known if weight[token].float().norm() < NEXT_TO_NOTHING * usual]


def quantized_modules(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the linears that are held in NF4, and of the parameters with experts that are, in the model's order."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            names.append(name)
        elif "Expert" in type(module).__name__:
            names += [f"{name}.{own}" for own, each in module.named_parameters(recurse=False) if is_packed(each)]
    return tuple(names)


def without_weights(model: Model) -> PreTrainedModel:
    """The base's modules on torch's meta device: names and shapes, nothing else."""
    config = read_config(model)
    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    return empty
