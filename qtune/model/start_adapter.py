"""The adapter that a run starts from (`lora.start_from`): found, read as names and shapes, and held against recipe and
base before any weight of the base is.

What qtune takes is plain LoRA, and the variants in `model.lora_variants`, on all linear layers and experts of a name.
What a PEFT folder may hold beside that is refused by its own name for it, as it would be lost.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from qtune.errors import ModelError
from qtune.lock import Lock, LockedStart
from qtune.memory import mixture_of_experts
from qtune.model import adapter, base_files, fingerprint
from qtune.model.lora_variants import LORA_VARIANTS, saved_in
from qtune.recipe.base_kind import ADAPTER_CONFIG, INVOCATION, LOCK
from qtune.recipe.error_messages import explain, shown
from qtune.recipe.paths import HUB_NAME
from qtune.recipe.schema import Lora, Model, Recipe
from qtune.recipe.text_part import json_in
from qtune.rundir import RunDir

KEY = "lora.start_from"
PREFIX = "base_model.model."  # of every tensor in a PEFT folder
# What an adapter_config.json says that is read, or that changes nothing in an adapter which is there already: how it
# was trained, how it began, and settings of what is not switched on. Which layers it is on is told by its tensors.
READ = {
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
}
IDLE = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
}
INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # of peft 0.21, those that leave the base as it is


@dataclass(frozen=True)
class StartAdapter:
    """`name` as the recipe has it, the `folder` of its files, what its adapter_config.json says, and the `shapes` of
    its tensors by their names in the file."""

    name: str
    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, lora: Lora) -> "StartAdapter | None":
        """The one that the recipe names; None where it names none.

        Raises ModelError for a folder that holds no adapter, or none that qtune can train, MachineError where the hub
        cannot be reached.
        """
        if lora.start_from is None:
            return None
        folder = folder_of(lora.start_from)
        config = json_in(folder / ADAPTER_CONFIG)
        faults = [f"{KEY}: {folder}: {fault}" for fault in _faults_of(config)]
        if faults:
            raise ModelError("\n".join(faults))
        return cls(lora.start_from, folder, config, _shapes_in(folder / SAFETENSORS_WEIGHTS_NAME))

    def locked(self) -> LockedStart:
        return LockedStart(self.name, fingerprint.fingerprint(self.folder))

    def refuse_unless(self, then: LockedStart | None) -> None:
        """Raises ModelError where its weights are not those that a run started from `then`."""
        if then is not None and self.locked().sha256 != then.sha256:
            raise ModelError(f"{KEY}: {self.folder} has changed since the run started from it. Put back what it was.")

    def taken_over(self, recipe: Recipe, model: PreTrainedModel) -> Recipe:
        """`recipe` with the adapter's rank, alpha, targets and variants where it is silent.

        Raises ModelError, by key, for what it says otherwise, and for an adapter of another base than `model`.
        """
        self._refuse_other_base(recipe.model)
        own = self._settings(model)
        lora = recipe.lora
        said = {name: getattr(lora, name) for name in own if name in lora.model_fields_set}
        if "targets" in said:
            said["targets"] = adapter.resolve_targets(model, lora)
        faults = [
            f"lora.{name}: is {_shown(value)}, and the adapter of {KEY} has {_shown(own[name])}. Leave it out, or start"
            " from another."
            for name, value in said.items()
            if value != own[name]
        ]
        if faults:
            raise ModelError("\n".join(faults))
        silent = {name: value for name, value in own.items() if name not in said}
        return recipe.model_copy(update={"lora": lora.model_copy(update=silent)})

    def _settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """What it is, by the names that [lora] has for it."""
        own: dict[str, Any] = {
            "rank": self.config.get("r"),
            "alpha": self.config.get("lora_alpha"),
            "targets": self._targets(model),
            "rank_pattern": self.config.get("rank_pattern") or {},
            "alpha_pattern": self.config.get("alpha_pattern") or {},
            **{name: each in saved_in(self.config) for name, each in LORA_VARIANTS.items() if each.saved_as},
        }
        try:
            checked = Lora(**own)
        except ValidationError as found:
            wrong = explain([{**error, "loc": ("lora", *error["loc"])} for error in found.errors(include_url=False)])
            raise ModelError(
                "\n".join(f"{KEY}: {self.folder / ADAPTER_CONFIG} cannot be taken over: {told}" for _, told in wrong)
            ) from None
        return {name: getattr(checked, name) for name in own}

    def _targets(self, model: PreTrainedModel) -> tuple[str, ...]:
        """The layers that it is on, as lora.targets names them; what fits no layer is left to `refuse_unfit`."""
        modules = {_module_of(name) for name in self.shapes}
        experts = {target.rpartition(".")[0] for target in mixture_of_experts.expert_targets(model)}
        on_experts = any(module.endswith(tuple(experts)) for module in modules) if experts else False
        names = adapter.linear_names(model)
        found = {own for own in names if any(f".{module}".endswith(f".{own}") for module in modules)}
        if not found and not on_experts:
            raise ModelError(
                f"{KEY}: {self.folder} is on {sorted(modules)[0]}, and no layer of this base that can have an adapter"
                f" is called that. This base has {', '.join(sorted(names))}."
            )
        return tuple(sorted({*found, *([adapter.EXPERTS] if on_experts else [])}))

    def refuse_unfit(self, fresh: PeftModel, base_name: str) -> None:
        """Raises ModelError, with the first tensor, where `fresh`, an adapter of the recipe on the base, has others."""
        held = get_peft_model_state_dict(fresh, save_embedding_layers=False)
        wanted = {name: tuple(tensor.shape) for name, tensor in held.items()}
        other = f"{KEY}: {self.folder} does not fit {base_name}, which is not the base that it was trained on:"
        modules = {name for name, _ in fresh.get_base_model().named_modules()}
        for name, shape in self.shapes.items():
            if name not in wanted and (module := _module_of(name)) in modules:
                raise ModelError(f"{KEY}: {self.folder} has {name}, and qtune trains no adapter on {module}.")
            if name not in wanted:
                raise ModelError(f"{other} it has {name}, and this base has no place for that.")
            if shape != wanted[name]:
                raise ModelError(f"{other} {name} is {_by(shape)}, and this base takes {_by(wanted[name])}.")
        lacking = [name for name in wanted if name not in self.shapes]
        if lacking:
            raise ModelError(
                f"{KEY}: {self.folder} lacks {lacking[0]}. qtune trains an adapter on all layers of a name; this one is"
                f" on some of them, or its base has fewer than {base_name}."
            )

    def _refuse_other_base(self, model: Model) -> None:
        """Raises ModelError where it says of itself that its base is another one: by weights, where both are on this
        machine, else by their names on the hub."""
        lock, here = self._lock(), base_files.local_folder(model)
        was = lock.base.name if lock else self.config.get("base_model_name_or_path")
        if not isinstance(was, str) or not was:
            return
        if here is None:
            is_other = "/" in was and bool(HUB_NAME.fullmatch(was)) and was.lower() != model.base.lower()
        elif not _has_weights(here):  # a plan needs none
            is_other = False
        elif lock:
            is_other = _is_another(lock, here)
        else:
            there = base_files.DEMO_BASE if was == "demo" else Path(was)
            is_here = there.is_absolute() and _has_weights(there)
            is_other = is_here and fingerprint.glance(there) != fingerprint.glance(here)
        same_all_the_same = (
            f" Where the two are the same in other files, write {shown(model.base)} as base_model_name_or_path in its"
            f" {ADAPTER_CONFIG}."
        )
        if is_other:
            raise ModelError(
                f"{KEY}: {self.folder} was trained on {was}, and model.base is {model.base}. Name {was} there, or start"
                f" from an adapter of {model.base}.{'' if lock else same_all_the_same}"
            )

    def put_on(self, fresh: PeftModel) -> None:
        """Give `fresh`, an adapter of the recipe, its weights, to the bit where they are held as widely.

        Raises ModelError for weights that are no numbers.
        """
        adapter.put_back(fresh, self.folder)
        for name, weight in fresh.named_parameters():
            if ".lora_" in name and not weight.isfinite().all():
                raise ModelError(f"{KEY}: {self.folder} holds numbers in {name} that are not finite.")

    def told(self, model: Model) -> str:
        """What a run that starts from it says; also where nobody can tell from here whether its base, which it names
        otherwise, is the recipe's."""
        told = f'starting from the adapter of {self.name}; the score of "base" is that of the base with it on'
        was = self.config.get("base_model_name_or_path")
        if not isinstance(was, str) or was in ("", "demo") or self._lock() is not None or Path(was).is_dir():
            return told
        if Path(was).name.lower() == Path(model.base).name.lower():
            return told
        return (
            f"{told}. It says that it was trained on {was}, and model.base is {model.base}: its shapes fit, and whether"
            " the weights are the same cannot be told"
        )

    def _lock(self) -> Lock | None:
        """Of the run that the adapter, or the checkpoint with it, lies in."""
        run = RunDir(self.folder.parent)
        return run.read_lock() if run.lock.is_file() else None


def folder_of(name: str) -> Path:
    """The folder with the adapter's files; one on the hub is downloaded once and then found in the cache.

    Raises as `StartAdapter.of` does.
    """
    folder = Path(name) if os.path.isabs(name) else base_files.adapter_on_hub(name, KEY)
    if (folder / LOCK).is_file() or (folder / INVOCATION).is_file():
        if not (folder / "adapter" / ADAPTER_CONFIG).is_file():
            raise ModelError(f"{KEY}: {folder} is a run without an adapter yet. `qtune resume` goes on with it.")
        return folder / "adapter"
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{KEY}: {folder} holds no adapter, it has no {ADAPTER_CONFIG}.")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ModelError(
            f"{KEY}: {folder} has no {SAFETENSORS_WEIGHTS_NAME}. Weights in a .bin are a pickle, which can run code"
            " when it is opened, and are not read: where you trust them, load it with peft and `save_pretrained` it."
        )
    return folder


def _faults_of(config: Mapping[str, Any]) -> Iterator[str]:
    """What qtune would not carry on, a sentence each."""
    if not config:
        yield f"its {ADAPTER_CONFIG} holds no JSON object."
        return
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        yield f"is an adapter of type {shown(kind)}, and qtune trains LoRA."
        return
    if config.get("bias", "none") != "none":
        yield f"it trained biases of the base (bias = {shown(config['bias'])}), which qtune leaves as they are."
    if init not in INITS:
        yield (
            f"it was begun by {shown(init)}, which changes the base beside it. Convert it to plain LoRA where it was"
            " made: peft's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    known = READ | IDLE | {each.saved_as for each in LORA_VARIANTS.values()}
    for key in sorted(name for name, value in config.items() if value and name not in known):
        yield f"it has {key} = {shown(config[key])}, which a run that starts from it would lose."


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{KEY}: {path} cannot be read ({fault}).") from None
    if not shapes:
        raise ModelError(f"{KEY}: {path} holds no tensors.")
    return shapes


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _is_another(lock: Lock, folder: Path) -> bool:
    """Whether the base in `folder` is not that of a run; older runs did not note a glance at it."""
    then = lock.base
    if then.glance_sha256 is None:
        return fingerprint.fingerprint(folder) != then.sha256
    return fingerprint.glance(folder) != then.glance_sha256


def _module_of(tensor: str) -> str:
    """`model.layers.0.self_attn.q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return tensor.removeprefix(PREFIX).partition(".lora_")[0].replace(".base_layer", "").removesuffix(".weight")


def _shown(value: Any) -> str:
    return shown(list(value) if isinstance(value, tuple) else value)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
