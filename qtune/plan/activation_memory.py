"""One fake step of a shallow model -> what a pass through the whole one holds, of any batch with any set of techniques.

Only what comes and goes in a pass is traced, without weights or a GPU; what stands through it (weights, gradients,
optimizer) is counted in `plan.parameter_count`. Gradients exist before the pass begins, as they do from the second
micro-batch on.

Layers of one kind hold the same, so what a pass holds is a straight line in their number. How steep it is is seen
between the layers of the same trace: what one leaves behind of those that keep their activations, and the input that is
kept of one that is recomputed. Tokens are not fitted: a trace is made of the very batch that is asked about.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from qtune.accelerator import Capability
from qtune.memory import fused_cross_entropy, head_logits, memory_tracker
from qtune.memory.engine import Engine
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_tracker import LiveBytes, MovedBytes, Peak
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.standing import Parts
from qtune.model import adapter, base
from qtune.model.loaded import autocast
from qtune.plan import fake_model
from qtune.plan.forecast import FIRST_BACKWARD, FORWARD, LAST_BACKWARD, LOSS, REFERENCE, Forecaster
from qtune.plan.parameter_count import count
from qtune.plan.workload import BatchShape
from qtune.recipe.schema import Recipe
from qtune.train.objectives import OBJECTIVES

STANDING = "standing"
TRL_TILE = (4096, 32768)  # tokens and words of the logits that trl's fused head makes at once, whatever the vocabulary


@dataclass(frozen=True)
class Traced:
    """Peaks by phase (`plan.forecast.Passes`), of what stands not counted; what is kept of a layer that is recomputed,
    its input, and what its attention returned where that is kept; what is held as each layer begins its forward pass,
    and how large the input of each is, where layers can be told apart; and bytes that the layers move beside products
    and attention, 0 for a card."""

    peaks: dict[str, Peak]
    checkpoint: Peak
    attention: Peak
    held: tuple[Peak, ...]
    inputs: tuple[int, ...]
    moved_bytes: int = 0

    def left_by(self, layer: int) -> Peak:
        """What that layer's forward pass leaves behind; not to be asked of the last layer, nor of the first, whose
        input needs no gradient."""
        before, after = self.held[layer], self.held[layer + 1]
        return Peak(_grown(before.device, after.device), _grown(before.host, after.host))


def trace(
    config: PreTrainedConfig,
    recipe: Recipe,
    compute_dtype: str,
    techniques: Techniques,
    batch: BatchShape,
    card: Capability | None,
    counter: LiveBytes | None = None,
) -> Traced:
    """One pass through a model as deep as `config` says, on a `card` of that capability or on the processor; under
    `counter` where more than live bytes is asked for."""
    if counter is None:
        counter = MovedBytes() if card is None else LiveBytes(card=card)
    mode, objective = FakeTensorMode(allow_non_fake_inputs=True), OBJECTIVES[recipe.train.objective]
    model = fake_model.build(config, recipe, compute_dtype, mode)
    with mode, _as_on_a_card(card is not None), fake_model.dora_on_empty_weights():
        engine = Engine(model)
        with counter:
            engine.switch_to(techniques.in_a_pass())
            for parameter in adapter.trained_parameters(model):
                parameter.grad = torch.zeros_like(parameter)
            counter.count(standing_tensors(model), STANDING)
            counter.peaks.clear()
            counter.enter_phase(REFERENCE if objective.has_reference else FORWARD)
            with counter.part_of_new("batch"):
                ids = torch.zeros(1, batch.tokens, dtype=torch.long)
                inputs = {"input_ids": ids, "labels": ids.clone(), "position_ids": ids.clone()}
                labelled = torch.zeros(batch.labelled, dtype=torch.long)
            with autocast("cpu", compute_dtype):
                if objective.has_reference:
                    model.eval()
                    with torch.no_grad(), model.disable_adapter():
                        _loss(model, dict(inputs), batch.document_lengths, labelled, of_each=True)
                    counter.enter_phase(FORWARD)
                model.train()
                held, given = _before_layers(model, counter)
                loss = _loss(model, inputs, batch.document_lengths, labelled, objective.learns_pairs)
            loss.backward()
    begun, again = counter.begun[LOSS], _again(techniques)
    checkpoint = _of_a_layer("checkpoints", begun, techniques.recomputed_layers)
    attention = _of_a_layer("kept attention", begun, techniques.recomputed_layers - again)
    moved = counter.moved if isinstance(counter, MovedBytes) else 0
    return Traced(_first_and_last(counter), checkpoint, attention, tuple(held), tuple(given), moved)


def _again(techniques: Techniques) -> int:
    """How many of the recomputed layers run attention again."""
    return int(min(techniques.recomputed_attention, techniques.recomputed_layers))


def _of_a_layer(part: str, held: Peak, layers: int) -> Peak:
    """Of a part of what is `held` when every one of `layers` has left its own, one layer's."""
    return Peak(*({part: side.get(part, 0) // max(1, layers)} for side in (held.device, held.host)))


def _before_layers(model: PeftModel, counter: LiveBytes) -> tuple[list[Peak], list[int]]:
    """Lists that get what is held as each layer begins, and the bytes of its input, one entry a layer, in the forward
    pass alone."""
    held: list[Peak] = []
    inputs: list[int] = []

    def note(layer: torch.nn.Module, arguments: Any) -> None:
        if counter.phase == FORWARD:
            held.append(counter.now())
            inputs.append(memory_tracker.storage_sizes(arguments[:1]))

    for layer in find_layers(model):
        layer.register_forward_pre_hook(note)
    return held, inputs


def _grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """By how many bytes each part has grown, where it has."""
    return {part: size - before.get(part, 0) for part, size in after.items() if size > before.get(part, 0)}


def standing_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that stand through a step; under one name, as they are counted elsewhere."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    scales = memory_tracker.quantization_state(model.parameters())
    return [*model.parameters(), *model.buffers(), *gradients, *scales]


def _loss(
    model: PeftModel,
    inputs: dict[str, torch.Tensor],
    lengths: tuple[int, ...],
    labelled: torch.Tensor,
    of_each: bool,
) -> torch.Tensor:
    if fused_cross_entropy.suits(model):
        asked = {**inputs, "document_lengths": lengths, "labelled": labelled}
        nats: torch.Tensor = model(**asked, fused_loss=True, of_each=of_each).nats
        return nats.sum() if of_each else nats
    labels = inputs.pop("labels")
    causal: Any = model.get_base_model()
    hidden = head_logits.decoder_of(causal)(**inputs, document_lengths=lengths, use_cache=False).last_hidden_state
    memory_tracker.enter_phase(LOSS)
    # trl's fused head: a float32 gradient of the hidden states beside a tile of logits in the dtype of products
    tokens, words = min(TRL_TILE[0], labels.shape[1]), TRL_TILE[1]
    size = torch.get_autocast_dtype("cpu").itemsize if torch.is_autocast_enabled("cpu") else hidden.element_size()
    memory_tracker.note_workspace("loss", size * tokens * words + 8 * 2 * hidden.shape[-1] * labels.shape[1])
    return hidden.sum()


def _first_and_last(counter: LiveBytes) -> dict[str, Peak]:
    """The backward passes of single layers folded into two: the first layer's, and the largest of the others."""
    there = [phase for phase in (REFERENCE, FORWARD, LOSS) if phase in counter.peaks]
    peaks = {phase: _without_standing(counter.peaks[phase]) for phase in there}
    backward = {layer: _without_standing(counter.peaks[phase]) for layer, phase in counter.layer_phases.items()}
    if backward:
        peaks[FIRST_BACKWARD] = backward[0]
        others = [peak for layer, peak in backward.items() if layer] or [backward[0]]
        peaks[LAST_BACKWARD] = max(others, key=lambda peak: peak.device_bytes)
    return peaks


def _without_standing(peak: Peak) -> Peak:
    return Peak({part: size for part, size in peak.device.items() if part != STANDING}, peak.host)


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


def forecaster(
    config: PreTrainedConfig, recipe: Recipe, compute_dtype: str, card: Capability | None, context_bytes: int
) -> Forecaster:
    """Forecasts of the model that `config` describes, on a `card` of that capability or on the processor.

    Raises ModelError where transformers cannot build it, and when asked where it cannot run.
    """
    with base.refusing_unfit(config.model_type, "counting its parameters"):
        standing = count(config, recipe, compute_dtype, is_card=card is not None)
    passes = TracedPasses(config, recipe, compute_dtype, card, len(standing.layers))
    return Forecaster(recipe, standing, passes, card, context_bytes)


@dataclass(frozen=True)
class TracedPasses:
    """What passes hold, from traces, which are kept, as neighbouring questions share them. `layers` is 0 where the
    decoder layers cannot be told apart."""

    config: PreTrainedConfig
    recipe: Recipe
    compute_dtype: str
    card: Capability | None
    layers: int
    traces: dict[tuple[int, Techniques, BatchShape], Traced] = field(default_factory=dict)

    def peaks(self, techniques: Techniques, batch: BatchShape) -> dict[str, Peak]:
        if self._is_shallow:
            return self._trace(self.config.get_text_config().num_hidden_layers, techniques, batch).peaks
        recomputed = min(techniques.recomputed_layers, self.layers)
        again = min(techniques.recomputed_attention, recomputed)
        first, depth = self._first_and_depth(recomputed)
        few = techniques.having(recomputed_layers=first, recomputed_attention=first if again == recomputed else 0)
        traced = self._trace(depth, few, batch)
        further = _of_layers(traced, recomputed - first, recomputed - again - (first - _again(few)))
        others = Counter(self._kinds(recomputed, self.layers))
        others.subtract(self._kinds(first, depth))
        kept = [(traced.left_by(i), others[i % self._period]) for i in range(max(1, first), depth - 1)]
        return {phase: _with_others(phase, peak, further, kept) for phase, peak in traced.peaks.items()}

    def moved_bytes(self, techniques: Techniques, batch: BatchShape) -> int:
        if self._is_shallow:
            return self._trace(self.config.get_text_config().num_hidden_layers, techniques, batch).moved_bytes
        first, depth = self._first_and_depth(min(techniques.recomputed_layers, self.layers))
        few = techniques.having(recomputed_layers=first, recomputed_attention=0)
        traced = self._trace(depth, few, batch)
        return traced.moved_bytes * self.layers // depth

    def _first_and_depth(self, recomputed: int) -> tuple[int, int]:
        """How many recomputed layers a trace has that stands for so many, and how many layers."""
        first = self._few if recomputed else 0
        return first, first + (0 if recomputed == self.layers else self._period + (1 if first else 2))

    def checkpoint_bytes(self, batch: BatchShape) -> int:
        traced = next((traced for (_, _, its), traced in self.traces.items() if its == batch), None)
        if traced is None:
            depth = self.layers if self._is_shallow else self._few
            traced = self._trace(depth, Techniques(recomputed_layers=depth), batch)
        return sum(traced.inputs) // len(traced.inputs)

    @property
    def _is_shallow(self) -> bool:
        """Whether all layers are traced, as that takes no more of them than a pass of which some are kept."""
        return self._few + self._period + 1 >= self.layers

    @property
    def _few(self) -> int:
        """As many recomputed layers as show what the first holds in its backward pass, and the others at most."""
        return max(2, self._period)

    @cached_property
    def _period(self) -> int:
        return fake_model.period(self.config)

    def _kinds(self, first: int, end: int) -> list[int]:
        return [layer % self._period for layer in range(first, end)]

    def _trace(self, layers: int, techniques: Techniques, batch: BatchShape) -> Traced:
        """A trace of `layers` layers."""
        on = techniques.in_a_pass()
        key = (layers, on, batch)
        if key not in self.traces:
            with base.refusing_unfit(self.config.model_type, "a step of one, on tensors without bytes,"):
                config = fake_model.shallow(self.config, layers)
                self.traces[key] = trace(config, self.recipe, self.compute_dtype, on, batch, self.card)
        return self.traces[key]


def _of_layers(traced: Traced, recomputed: int, keeping_attention: int) -> Peak:
    """What so many further layers leave that are recomputed, and so many that keep attention, fewer if negative."""
    device = _add({}, traced.checkpoint.device, recomputed)
    host = _add({}, traced.checkpoint.host, recomputed)
    return Peak(_add(device, traced.attention.device, keeping_attention), host)


def _with_others(phase: str, peak: Peak, further: Peak, kept: Sequence[tuple[Peak, int]]) -> Peak:
    """`peak` with what `further` recomputed layers hold in `phase`, and of each of the `kept` so many more.

    A layer's activations wait until the loss has gone back through it; its checkpoint until that reaches the layer,
    but in host memory, where buffers are kept for the next pass, to the end. The base's pass keeps neither.
    """
    device, host = peak.device, _add(peak.host, further.host, 1)
    if phase not in (FIRST_BACKWARD, REFERENCE):
        device = _add(device, further.device, 1)
    for left, layers in kept if phase in (FORWARD, LOSS) else ():
        device, host = _add(device, left.device, layers), _add(host, left.host, layers)
    return Peak(device, host)


def _add(parts: Parts, others: Parts, times: int) -> Parts:
    return {name: parts.get(name, 0) + times * others.get(name, 0) for name in parts | others}
