"""A few traces of a shallow model -> bytes by part for the whole one, any batch and any set of techniques.

Layers of one kind hold the same, so what a pass holds is a straight line in their number: traces of two depths give
it, for layers that are recomputed and for layers that keep their activations. Tokens are not fitted: a trace is made of
the very batch that is asked about.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedConfig

from qtune.errors import ModelError
from qtune.memory.live import Peak
from qtune.memory.techniques import Techniques
from qtune.plan import skeleton
from qtune.plan.standing import STANDING, Standing, count
from qtune.plan.trace import Batch, trace
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
    _traces: dict[tuple[int, Techniques, Batch], dict[str, Peak]] = field(default_factory=dict)

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
        if techniques.host_checkpoints:
            plain = Techniques(recomputed_layers=techniques.recomputed_layers, host_checkpoints=True)
            peaks = self._passing(plain, batch).values()
            parts["checkpoints"] = max((peak.host.get("checkpoints", 0) for peak in peaks), default=0)
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
        kept = max(0, self.layers - techniques.recomputed_layers)
        few = max(2, skeleton.period(self.config))
        if not self.layers or few + 2 >= self.layers:
            return self._trace(self.config.get_text_config().num_hidden_layers, techniques, batch)
        if kept == 0:
            shallow = self._trace(few, replace(techniques, recomputed_layers=few), batch)
            return _deeper(shallow, self._checkpoints_a_layer(techniques, batch), self.layers - few)
        if kept == self.layers:
            shallow, deep = (self._trace(n, replace(techniques, recomputed_layers=0), batch) for n in (few, few + 1))
            return _deeper(shallow, _difference(deep, shallow), self.layers - few)
        one, two = (self._trace(few + n, replace(techniques, recomputed_layers=few), batch) for n in (1, 2))
        recomputed = _deeper(one, self._checkpoints_a_layer(techniques, batch), self.layers - kept - few)
        return _deeper(recomputed, _difference(two, one), kept - 1)

    def _checkpoints_a_layer(self, techniques: Techniques, batch: Batch) -> dict[str, Peak]:
        """What one more recomputed layer adds: its input, on the device or the host, whatever else is on."""
        few = max(2, skeleton.period(self.config))
        plain = Techniques(host_checkpoints=techniques.host_checkpoints)
        first, second = (self._trace(n, replace(plain, recomputed_layers=n), batch) for n in (few, few + 1))
        return {
            phase: Peak(
                {"checkpoints": peak.device.get("checkpoints", 0)}, {"checkpoints": peak.host.get("checkpoints", 0)}
            )
            for phase, peak in _difference(second, first).items()
        }

    def _trace(self, layers: int, techniques: Techniques, batch: Batch) -> dict[str, Peak]:
        """A trace of `layers` layers. Where weights stand makes no difference to what passes."""
        key = (layers, replace(techniques, streamed_layers=0, host_embedding=False), batch)
        if key not in self._traces:
            config = skeleton.shallow(self.config, layers)
            try:
                found = trace(config, self.recipe, self.compute_dtype, key[1], batch, self.is_card)
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as fault:
                reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
                raise ModelError(f"model.base: the model its config.json describes cannot run ({reason}).") from fault
            self._traces[key] = {phase: _without_standing(peak) for phase, peak in found.items()}
        return self._traces[key]

    def _step_workspace(self) -> int:
        """On a card torch's AdamW makes a list of denominators as large as the adapter; the others work in place."""
        return self.standing.adapter_bytes if self.is_card and self.recipe.train.optimizer == "adamw" else 0


def _without_standing(peak: Peak) -> Peak:
    return Peak({part: size for part, size in peak.device.items() if part != STANDING}, peak.host)


def _difference(second: dict[str, Peak], first: dict[str, Peak]) -> dict[str, Peak]:
    """second - first, part by part, of the phases that both have."""
    return {
        phase: Peak(_add(peak.device, first[phase].device, -1), _add(peak.host, first[phase].host, -1))
        for phase, peak in second.items()
        if phase in first
    }


def _deeper(shallow: dict[str, Peak], a_layer: dict[str, Peak], layers: int) -> dict[str, Peak]:
    """`shallow` and `layers` times what one layer adds."""
    return {
        phase: Peak(_add(peak.device, a_layer[phase].device, layers), _add(peak.host, a_layer[phase].host, layers))
        for phase, peak in shallow.items()
        if phase in a_layer
    }


def _add(parts: Parts, others: Parts, times: int) -> Parts:
    return {name: parts.get(name, 0) + times * others.get(name, 0) for name in parts | others}


def _only_filled(parts: Parts) -> Parts:
    return {name: size for name, size in parts.items() if size > 0}
