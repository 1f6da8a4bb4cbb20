"""One fake step of the real model: what forward, loss and backward hold at their peaks, without weights or a GPU.

Only what comes and goes in a pass is traced; what stands through it (weights, gradients, optimizer) is counted in
`plan.static_memory`. Gradients exist before the pass begins, as they do from the second micro-batch on.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from qtune.memory import fused_cross_entropy, memory_tracker
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_tracker import LiveBytes, Peak
from qtune.memory.techniques import Engine, Techniques
from qtune.model import adapter
from qtune.model.loaded import autocast
from qtune.plan import fake_model
from qtune.plan.static_memory import STANDING
from qtune.recipe.schema import Recipe

TRL_LOSS_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Batch:
    """What one forward pass is fed: the lengths of its documents in tokens, and how many tokens have a label."""

    document_lengths: tuple[int, ...]
    labelled: int

    @property
    def tokens(self) -> int:
        return sum(self.document_lengths)

    @classmethod
    def of_one_document(cls, tokens: int) -> "Batch":
        return cls((tokens,), tokens - 1)


@dataclass(frozen=True)
class Traced:
    """Peaks of `forward`, `loss`, `backward first` and `backward last` (layer); what is kept of a layer that is
    recomputed, its input; and what is held as each layer begins its forward pass, where layers can be told apart."""

    peaks: dict[str, Peak]
    checkpoint: Peak
    held: tuple[Peak, ...]

    def left_by(self, layer: int) -> Peak:
        """What that layer's forward pass leaves behind; not to be asked of the last layer, nor of the first, whose
        input needs no gradient."""
        before, after = self.held[layer], self.held[layer + 1]
        return Peak(_grown(before.device, after.device), _grown(before.host, after.host))


def trace(
    config: PreTrainedConfig, recipe: Recipe, compute_dtype: str, techniques: Techniques, batch: Batch, is_card: bool
) -> Traced:
    """One pass through a model as deep as `config` says.

    Streaming holds the same in a pass as not streaming, and is left out.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model.build(config, recipe, compute_dtype, mode)
    with mode, _as_on_a_card(is_card), fake_model.dora_on_empty_weights():
        engine = Engine(model)
        with LiveBytes(stands_for_card=is_card) as counter:
            engine.switch_to(replace(techniques, streamed_layers=0))
            for parameter in adapter.trained_parameters(model):
                parameter.grad = torch.zeros_like(parameter)
            counter.count(standing_tensors(model), STANDING)
            model.train()
            held = _held_before_layers(model, counter)
            counter.peaks.clear()
            counter.enter_phase("forward")
            with counter.part_of_new("batch"):
                ids = torch.zeros(1, batch.tokens, dtype=torch.long)
                inputs = {"input_ids": ids, "labels": ids.clone(), "position_ids": ids.clone()}
                labelled = torch.zeros(batch.labelled, dtype=torch.long)
            with autocast("cpu", compute_dtype):
                loss = _loss(model, inputs, batch.document_lengths, labelled)
            loss.backward()
    checkpoint = _a_checkpoint(counter.begun["loss"], techniques.recomputed_layers)
    return Traced(_first_and_last(counter.peaks), checkpoint, tuple(held))


def _a_checkpoint(held: Peak, layers: int) -> Peak:
    """Of what is `held` with every one of `layers` checkpoints there, one."""
    return Peak(*({"checkpoints": side.get("checkpoints", 0) // max(1, layers)} for side in (held.device, held.host)))


def _held_before_layers(model: PeftModel, counter: LiveBytes) -> list[Peak]:
    """A list that gets what is held as each layer begins, one entry a layer, in the forward pass alone."""
    held: list[Peak] = []

    def note(layer: torch.nn.Module, arguments: Any) -> None:
        if counter.phase == "forward":
            held.append(counter.now())

    for layer in find_layers(model):
        layer.register_forward_pre_hook(note)
    return held


def _grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """By how many bytes each part has grown, where it has."""
    return {part: size - before.get(part, 0) for part, size in after.items() if size > before.get(part, 0)}


def standing_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that stand through a step; under one name, as they are counted elsewhere."""
    found: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    return found + memory_tracker.quantization_state(model.parameters())


def _loss(
    model: PeftModel, inputs: dict[str, torch.Tensor], lengths: tuple[int, ...], labelled: torch.Tensor
) -> torch.Tensor:
    if fused_cross_entropy.suits(model):
        return model(**inputs, document_lengths=lengths, tiled_loss=True, labelled=labelled).nats
    labels = inputs.pop("labels")
    causal: Any = model.get_base_model()
    hidden = causal.base_model(**inputs, document_lengths=lengths, use_cache=False).last_hidden_state
    memory_tracker.enter_phase("loss")
    # trl's fused head: a float32 gradient of the hidden states beside a chunk of logits
    memory_tracker.note_workspace("loss", TRL_LOSS_BYTES + 8 * 2 * hidden.shape[-1] * labels.shape[1])
    return hidden.sum()


def _first_and_last(peaks: dict[str, Peak]) -> dict[str, Peak]:
    """The backward passes of single layers folded into two: the first layer's, and the largest of the others."""
    result = {phase: peaks[phase] for phase in ("forward", "loss")}
    backward = {int(phase.split()[1]): peak for phase, peak in peaks.items() if phase.startswith("backward")}
    if backward:
        result["backward first"] = backward[0]
        others = [peak for index, peak in backward.items() if index] or [backward[0]]
        result["backward last"] = max(others, key=lambda peak: peak.device_bytes)
    return result


@contextlib.contextmanager
def _as_on_a_card(is_card: bool) -> Iterator[None]:
    """peft asks whether CUDA autocasts before it casts the adapter's inputs; on a card it would."""
    if not is_card:
        yield
        return
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)
