"""One trace of a shallow model -> bytes by part for the whole one, any batch and any set of techniques.

Layers of one kind hold the same, so what a pass holds is a straight line in their number. How steep it is is seen
between the layers of the same trace: what one leaves behind of those that keep their activations, and the input that is
kept of one that is recomputed. Tokens are not fitted: a trace is made of the very batch that is asked about.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedConfig

from qtune.errors import ModelError
from qtune.memory.memory_tracker import Peak
from qtune.memory.techniques import Techniques
from qtune.plan import fake_model
from qtune.plan.fake_step import Batch, Traced, trace
from qtune.plan.static_memory import STANDING, Standing, count
from qtune.recipe.schema import Recipe

Parts = dict[str, int]
SLACK_FRACTION = 0.04  # of what the allocator has handed out: freed blocks that fit nothing else; not measured yet


@dataclass(frozen=True)
class Forecast:
    """Bytes by part at the peak of a step. `phases` are the device's peaks of each phase.

    `context` and `slack` are outside of what torch's allocator counts as allocated. `load_bytes` is what the device
    holds while the base is loaded, before its head is quantised.
    """

    device: Parts
    host: Parts
    peak_phase: str
    phases: Parts
    load_bytes: int

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def needed_bytes(self) -> int:
        """The most that the device has to hold, while loading or training."""
        return max(self.device_bytes, self.load_bytes)

    @property
    def allocated_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated() would say."""
        return self.device_bytes - self.device.get("context", 0) - self.device.get("slack", 0)

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass
class Forecaster:
    """Forecasts for one model, adapter and optimizer. Traces are kept, as neighbouring questions share them.

    `is_card` says that the device is a CUDA card, here or not; else it is this machine's processor, where nothing is
    outside the tensors and `context_bytes` is 0.
    """

    config: PreTrainedConfig
    recipe: Recipe
    compute_dtype: str
    is_card: bool
    context_bytes: int
    _traces: dict[tuple[int, Techniques, Batch], Traced] = field(default_factory=dict)

    @cached_property
    def standing(self) -> Standing:
        return count(self.config, self.recipe, self.compute_dtype)

    @property
    def layers(self) -> int:
        return len(self.standing.layers)

    def forecast(self, techniques: Techniques, batch: Batch, accumulates: bool = True) -> Forecast:
        """The peak of a step in which `batch` is the largest. `accumulates` says that gradients outlive a pass.

        Raises ModelError where transformers cannot build the model.
        """
        standing = self.standing.on_device(techniques)
        phases: dict[str, Parts] = {}
        for phase, peak in self._passing(techniques, batch).items():
            phases[phase] = {**self._at(phase, standing, accumulates), **peak.device}
        if not accumulates and "backward last" in phases:
            near_the_end = self._near_the_end(phases["backward last"], standing, techniques)
            phases["backward last"] = max(phases["backward last"], near_the_end, key=lambda parts: sum(parts.values()))
        phases["step"] = {**standing, "layer workspace": self._step_workspace()}
        sums = {phase: sum(parts.values()) for phase, parts in phases.items()}
        highest = max(sums, key=lambda phase: sums[phase])
        device = _only_filled(phases[highest])
        if self.is_card:
            slack = round(SLACK_FRACTION * sums[highest])
            device |= {"slack": slack, "context": self.context_bytes}
        return Forecast(device, self.host_parts(techniques, batch), highest, sums, self._loading_bytes(techniques))

    def least_bytes(self, techniques: Techniques) -> int:
        """What the device has to hold whatever the batch: the optimizer's step and loading. It needs no trace."""
        step = sum(self.standing.on_device(techniques).values()) + self._step_workspace()
        outside = round(SLACK_FRACTION * step) + self.context_bytes if self.is_card else 0
        return max(step + outside, self._loading_bytes(techniques))

    def _loading_bytes(self, techniques: Techniques) -> int:
        return self.standing.while_loading(techniques) + (self.context_bytes if self.is_card else 0)

    def host_parts(self, techniques: Techniques, batch: Batch) -> Parts:
        """Bytes by part in host memory, found without a trace of the other techniques."""
        parts: Parts = dict(self.standing.on_host(techniques))
        if techniques.host_checkpoints and techniques.recomputed_layers:
            parts["checkpoints"] = techniques.recomputed_layers * self._checkpoint_bytes(batch)
        parts["undo copy of the adapter"] = self.standing.adapter_bytes + self.standing.optimizer_bytes
        return _only_filled(parts)

    def _at(self, phase: str, standing: Parts, accumulates: bool) -> Parts:
        """What stands during `phase`: without accumulation gradients grow from the last layer to the first."""
        if accumulates or phase == "backward first":
            return standing
        share = 1 / max(1, self.layers) if phase == "backward last" else 0.0
        return {**standing, "gradients": round(share * standing["gradients"])}

    def _near_the_end(self, parts: Parts, standing: Parts, techniques: Techniques) -> Parts:
        """`parts` of a pass through the last layers, as they are in the second: its gradients almost all made, and of
        the inputs that wait on the device two."""
        layers = max(1, self.layers)
        gradients = round((layers - 1.5) / layers * standing["gradients"])
        waiting = parts.get("checkpoints", 0)
        if not techniques.host_checkpoints:
            waiting = waiting * 2 // max(2, techniques.recomputed_layers)
        return {**parts, "gradients": gradients, "checkpoints": waiting}

    def _passing(self, techniques: Techniques, batch: Batch) -> dict[str, Peak]:
        """What comes and goes in a pass through the whole model, by phase."""
        if self._is_shallow:
            return self._trace(self.config.get_text_config().num_hidden_layers, techniques, batch).peaks
        recomputed = min(techniques.recomputed_layers, self.layers)
        first = self._few if recomputed else 0
        depth = first + (0 if recomputed == self.layers else self._period + (1 if first else 2))
        traced = self._trace(depth, replace(techniques, recomputed_layers=first), batch)
        others = Counter(self._kinds(recomputed, self.layers))
        others.subtract(self._kinds(first, depth))
        kept = [(traced.left_by(i), others[i % self._period]) for i in range(max(1, first), depth - 1)]
        return {
            phase: _with_others(phase, peak, traced.checkpoint, recomputed - first, kept)
            for phase, peak in traced.peaks.items()
        }

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

    def _checkpoint_bytes(self, batch: Batch) -> int:
        """The input of a layer, which is all that is kept of one that is recomputed, whatever else is on."""
        depth = self.layers if self._is_shallow else self._few
        traced = self._trace(depth, Techniques(recomputed_layers=depth), batch)
        return traced.checkpoint.device["checkpoints"]

    def _trace(self, layers: int, techniques: Techniques, batch: Batch) -> Traced:
        """A trace of `layers` layers."""
        traced = in_a_pass(techniques)
        key = (layers, traced, batch)
        if key not in self._traces:
            config = fake_model.shallow(self.config, layers)
            try:
                found = trace(config, self.recipe, self.compute_dtype, traced, batch, self.is_card)
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as fault:
                reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
                raise ModelError(f"model.base: the model its config.json describes cannot run ({reason}).") from fault
            self._traces[key] = replace(found, peaks={p: _without_standing(peak) for p, peak in found.peaks.items()})
        return self._traces[key]

    def _step_workspace(self) -> int:
        """On a card torch's AdamW makes a list of denominators as large as the adapter; the others work in place."""
        return self.standing.adapter_bytes if self.is_card and self.recipe.train.optimizer == "adamw" else 0


def in_a_pass(techniques: Techniques) -> Techniques:
    """What of `techniques` makes a difference to what passes: not where weights stand, nor where checkpoints would if
    there were any."""
    has_checkpoints = techniques.host_checkpoints and techniques.recomputed_layers > 0
    return replace(techniques, streamed_layers=0, host_embedding=False, host_checkpoints=has_checkpoints)


def _without_standing(peak: Peak) -> Peak:
    return Peak({part: size for part, size in peak.device.items() if part != STANDING}, peak.host)


def _with_others(phase: str, peak: Peak, checkpoint: Peak, recomputed: int, kept: Sequence[tuple[Peak, int]]) -> Peak:
    """`peak` with what `recomputed` further layers hold in `phase`, and of each of the `kept` so many more.

    A layer's activations wait until the loss has gone back through it; its checkpoint until that reaches the layer,
    but in host memory, where buffers are kept for the next pass, to the end.
    """
    device, host = peak.device, _add(peak.host, checkpoint.host, recomputed)
    if phase != "backward first":
        device = _add(device, checkpoint.device, recomputed)
    for left, layers in kept if phase in ("forward", "loss") else ():
        device, host = _add(device, left.device, layers), _add(host, left.host, layers)
    return Peak(device, host)


def _add(parts: Parts, others: Parts, times: int) -> Parts:
    return {name: parts.get(name, 0) + times * others.get(name, 0) for name in parts | others}


def _only_filled(parts: Parts) -> Parts:
    return {name: size for name, size in parts.items() if size > 0}
