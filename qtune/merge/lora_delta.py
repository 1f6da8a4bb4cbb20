"""What a saved LoRA adapter does to a weight: the arithmetic of peft, from the files alone, in float32.

Letters: O output features, I input features, R rank.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from qtune.errors import ModelError
from qtune.merge.checkpoint_names import Stack
from qtune.merge.nf4_round_trip import Index
from qtune.model import lora_variants
from qtune.model.lora_variants import LoraVariant

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
ROWS = ".token_adapter.trainable_tokens_delta"  # behind a table's name; rows in place of its own, not added to them
# Settings under which B @ A is not the whole change, or not a change of this base; `False` and absent are fine.
UNMERGEABLE = ("lora_bias", "alora_invocation_tokens", "arrow_config", "layer_replication")
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

    def of_rows(self, rows: slice) -> "LoraDelta":
        """What it does to some rows of the weight."""
        parts = {name: part[rows] for name, part in self.parts.items()}
        return LoraDelta(self.a, self.b[rows], self.scale, parts, self.variants)


@dataclass(frozen=True)
class StackedDelta:
    """An adapted parameter with a matrix (O, I) for each of E experts: `a` (E, R, I), `b` (E, O, R)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @classmethod
    def of(cls, stack: Stack, a: torch.Tensor, b: torch.Tensor, scale: float) -> "StackedDelta":
        """From what peft keeps: (R E, in), expert after expert, and (out, R E), all experts of a rank beside each other
        (`ParamWrapper.get_delta_weight`). Where matrices are (in, out), the update is transposed."""
        experts = stack.shape[0]
        a, b = a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)
        return cls(b.transpose(1, 2), a.transpose(1, 2), scale) if stack.is_transposed else cls(a, b, scale)

    def apply(self, weight: torch.Tensor, rows: Index = slice(None)) -> torch.Tensor:
        """The same as `LoraDelta.apply`; a row of `weight` is an expert's matrix, (rows, O * I)."""
        a, b = (part[rows].to(weight.device, torch.float32) for part in (self.a, self.b))
        changed = torch.baddbmm(weight.float().view(len(a), b.shape[1], a.shape[2]), b, a, alpha=self.scale)
        return changed.view(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (len(self.a), self.b.shape[1], self.a.shape[2])

    def of_expert(self, expert: int, rows: slice) -> LoraDelta:
        return LoraDelta(self.a[expert], self.b[expert, rows], self.scale)


@dataclass(frozen=True)
class PiledDelta:
    """What is done to weights that stand on top of each other in one matrix, each with its `heights` of rows."""

    deltas: tuple[LoraDelta | None, ...]
    heights: tuple[int, ...]

    def apply(self, weight: torch.Tensor, rows: Index = slice(None)) -> torch.Tensor:
        """The same as `LoraDelta.apply`, of rows that follow each other."""
        assert isinstance(rows, slice)
        merged = weight.float().clone()
        first, last, _ = rows.indices(sum(self.heights))
        for delta, (start, end) in zip(self.deltas, pairwise([0, *accumulate(self.heights)]), strict=True):
            low, high = max(first, start), min(last, end)
            if delta is not None and low < high:
                own = slice(low - first, high - first)
                merged[own] = delta.apply(merged[own], slice(low - start, high - start))
        return merged


@dataclass(frozen=True)
class RowsDelta:
    """A table some of whose rows were trained: `values` (N, H) stand in place of its rows `ids` (N,)."""

    ids: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, config: Mapping[str, Any], module: str, values: torch.Tensor) -> "RowsDelta":
        """As peft saves them: the tokens in the configuration, for all tables or by the end of a table's name."""
        found = config.get("trainable_token_indices")
        if isinstance(found, dict):
            found = next((ids for name, ids in found.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(found, list) or len(found) != len(values):
            raise ModelError(f"{module}: its trained rows are {len(values)}, and {CONFIG_NAME} says {found} of them.")
        return cls(torch.tensor(found), values)

    def apply(self, weight: torch.Tensor, rows: Index = slice(None)) -> torch.Tensor:
        """The same as `LoraDelta.apply`."""
        first = (rows.start or 0) if isinstance(rows, slice) else 0
        numbers = torch.arange(first, first + len(weight)) if isinstance(rows, slice) else rows.cpu()
        at, which = (numbers[:, None] == self.ids).nonzero(as_tuple=True)
        return weight.float().index_copy(0, at.to(weight.device), self.values[which].to(weight.device, torch.float32))

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] == self.values.shape[1] and int(self.ids.max()) < shape[0]

    def of_rows(self, rows: slice) -> "RowsDelta":
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        return RowsDelta(self.ids[inside] - rows.start, self.values[inside])


Delta = LoraDelta | StackedDelta | PiledDelta | RowsDelta


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter folder: `changes` by the name of a linear, `stacked` by that of a parameter with experts; by tensor
    name, whole tensors (`modules_to_save`) and some `rows` of a table."""

    changes: dict[str, LoraDelta]
    replaced: dict[str, torch.Tensor]
    stacked: dict[str, StackedDelta] = field(default_factory=dict)
    rows: dict[str, RowsDelta] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, stacks: Mapping[str, Sequence[Stack]] | None = None) -> "AdapterWeights":
        """Read a PEFT folder; `stacks` are the base's experts, by module. Raises ModelError for a missing or damaged
        file, half a pair, or another method."""
        config = read_config(folder)
        _refuse_unmergeable(folder, config)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        replaced: dict[str, torch.Tensor] = {}
        rows: dict[str, RowsDelta] = {}
        for key, tensor in _read_weights(folder).items():
            name, kind = _split(key)
            if kind is None and name.endswith(ROWS):
                rows[f"{name.removesuffix(ROWS)}.weight"] = RowsDelta.of(config, name.removesuffix(ROWS), tensor)
            elif kind is None:
                replaced[name] = tensor
            else:
                parts.setdefault(name, {})[kind] = tensor
        variants = tuple(lora_variants.saved_in(config))
        beside = {name for variant in variants for name in variant.parts}
        _refuse_partial(folder, parts, needed={"lora_A", "lora_B", *beside})

        def scale(name: str, rank: int) -> float:
            return lora_variants.scale_of(variants, _alpha(config, name), rank)

        stacked = {}
        for wrapped, (name, stack) in _wrapped(parts, stacks or {}, config).items():
            part = parts.pop(wrapped)
            a, b = part["lora_A"], part["lora_B"]
            stacked[name] = StackedDelta.of(stack, a, b, scale(name, len(a) // stack.shape[0]))
        changes = {
            module: LoraDelta(
                part["lora_A"],
                part["lora_B"],
                scale(module, part["lora_A"].shape[0]),
                {name: part[name] for name in beside},
                variants,
            )
            for module, part in parts.items()
        }
        return cls(changes, replaced, stacked, rows)

    def of_tensor(self, tensor: str) -> LoraDelta | StackedDelta | RowsDelta | None:
        """What it does to the model's `tensor`."""
        return self.rows.get(tensor) or self.stacked.get(tensor) or self.changes.get(tensor.removesuffix(".weight"))


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


def _wrapped(
    parts: Mapping[str, Any], stacks: Mapping[str, Sequence[Stack]], config: Mapping[str, Any]
) -> dict[str, tuple[str, Stack]]:
    """Which parameter of the experts each of `parts` is of, by name.

    peft wraps one after another in the module's order, each around the one before, which is its `base_layer`.
    """
    targets = config.get("target_parameters") or ()
    found = {}
    for module, own in stacks.items():
        asked = [each for each in own if f"{module}.{each.name}".endswith(tuple(f".{target}" for target in targets))]
        for depth, stack in enumerate(reversed(asked)):
            name = module + ".base_layer" * depth
            if name in parts:
                found[name] = f"{module}.{stack.name}", stack
    return found


def _alpha(config: dict[str, Any], module: str) -> float:
    """It may differ by module."""
    alphas = config.get("alpha_pattern") or {}
    alpha: float = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
    return alpha
