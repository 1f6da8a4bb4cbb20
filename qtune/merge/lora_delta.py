"""What a saved LoRA adapter does to a weight: the arithmetic of peft, from the files alone, in float32.

Letters: O output features, I input features, R rank.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from qtune.errors import ModelError
from qtune.merge.nf4_round_trip import Index
from qtune.model import lora_variants
from qtune.model.lora_variants import LoraVariant

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
# Settings under which B @ A is not the whole change, or not a change of this base; `False` and absent are fine.
UNMERGEABLE = ("fan_in_fan_out", "lora_bias", "alora_invocation_tokens", "arrow_config", "layer_replication")
UNCHANGED_BASE_INITS = (True, False, "gaussian", "orthogonal", "eva", None)


@dataclass(frozen=True)
class LoraDelta:
    """One adapted weight: `a` (R, I), `b` (O, R), and what the `variants` of LoRA that trained it keep beside, by name,
    each of the `parts` with a row for every output."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    variants: tuple[LoraVariant, ...] = ()

    def apply(self, weight: torch.Tensor, rows: Index = slice(None)) -> torch.Tensor:
        """W + scale * B @ A for the `rows` of W that `weight` (rows, I) holds, in float32 on its device, finished as
        the variants do."""
        a, b = (part.to(weight.device, torch.float32) for part in (self.a, self.b[rows]))
        changed = torch.addmm(weight.float(), b, a, alpha=self.scale)
        for variant in self.variants:
            if variant.finished is not None:
                parts = {name: self.parts[name][rows].to(weight.device, torch.float32) for name in variant.parts}
                changed = variant.finished(changed, parts)
        return changed

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (self.b.shape[0], self.a.shape[1]) and self.a.shape[0] == self.b.shape[1]


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter folder: `changes` by module name, and whole tensors (`modules_to_save`) by tensor name."""

    changes: dict[str, LoraDelta]
    replaced: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> "AdapterWeights":
        """Read a PEFT folder. Raises ModelError for a missing or damaged file, half a pair, or another method."""
        config = read_config(folder)
        _refuse_unmergeable(folder, config)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        replaced: dict[str, torch.Tensor] = {}
        for key, tensor in _read_weights(folder).items():
            name, kind = _split(key)
            if kind is None:
                replaced[name] = tensor
            else:
                parts.setdefault(name, {})[kind] = tensor
        variants = tuple(lora_variants.saved_in(config))
        beside = {name for variant in variants for name in variant.parts}
        _refuse_partial(folder, parts, needed={"lora_A", "lora_B", *beside})
        changes = {
            module: LoraDelta(
                part["lora_A"],
                part["lora_B"],
                lora_variants.scale_of(variants, _alpha(config, module), part["lora_A"].shape[0]),
                {name: part[name] for name in beside},
                variants,
            )
            for module, part in parts.items()
        }
        return cls(changes, replaced)


def read_config(folder: Path) -> dict[str, Any]:
    """What an adapter says of itself. Raises ModelError for a missing or damaged file, and another method than LoRA."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: holds no adapter, it has no {CONFIG_NAME}.") from None
    except ValueError as fault:
        raise ModelError(f"{path}: is not readable JSON ({fault}).") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{path}: describes no LoRA adapter (peft_type = {found!r}), and qtune knows no other.")
    return config


def _refuse_unmergeable(folder: Path, config: dict[str, Any]) -> None:
    odd = [f"{key} = {config[key]!r}" for key in UNMERGEABLE if config.get(key)]
    if config.get("init_lora_weights", True) not in UNCHANGED_BASE_INITS:
        odd.append(f"init_lora_weights = {config['init_lora_weights']!r}, which trains against a changed base")
    if odd:
        raise ModelError(
            f"{folder / CONFIG_NAME}: cannot be merged: {', '.join(odd)}. Serve the adapter beside its base instead."
        )


def weights_path(folder: Path) -> Path:
    """The file with A and B. Raises ModelError where there is none."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder}: holds no adapter weights, it has no {path.name}.")
    return path


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = weights_path(folder)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{path}: cannot be read ({fault}).") from None


def _split(key: str) -> tuple[str, str | None]:
    """Module and part of an adapter tensor's name; a tensor that replaces the base's has its name and None."""
    name = key.removeprefix(PREFIX)
    module, dot, part = name.partition(".lora_")
    return (module, f"lora_{part.removesuffix('.weight')}") if dot else (name, None)


def _refuse_partial(folder: Path, parts: dict[str, dict[str, torch.Tensor]], needed: set[str]) -> None:
    faults = [f"{name} has {', '.join(sorted(part))}" for name, part in parts.items() if set(part) != needed]
    if faults:
        raise ModelError(f"{folder}: every adapted module needs {', '.join(sorted(needed))}; {'; '.join(faults)}.")


def _alpha(config: dict[str, Any], module: str) -> float:
    """It may differ by module."""
    alphas = config.get("alpha_pattern") or {}
    alpha: float = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
    return alpha
