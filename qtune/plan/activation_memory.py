"""One trace of a shallow model -> what a pass through the whole one holds, of any batch with any set of techniques.

Layers of one kind hold the same, so what a pass holds is a straight line in their number. How steep it is is seen
between the layers of the same trace: what one leaves behind of those that keep their activations, and the input that is
kept of one that is recomputed. Tokens are not fitted: a trace is made of the very batch that is asked about.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedConfig

from qtune.errors import ModelError
from qtune.memory.memory_tracker import Peak
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.standing import Parts
from qtune.plan import fake_model
from qtune.plan.fake_step import Traced, trace
from qtune.plan.forecast import FIRST_BACKWARD, FORWARD, LOSS, Forecaster
from qtune.plan.parameter_count import count
from qtune.plan.workload import BatchShape
from qtune.recipe.schema import Recipe


def forecaster(
    config: PreTrainedConfig, recipe: Recipe, compute_dtype: str, is_card: bool, context_bytes: int
) -> Forecaster:
    """Forecasts of the model that `config` describes. Raises ModelError where transformers cannot build it, and when
    asked where it cannot run."""
    standing = count(config, recipe, compute_dtype, is_card)
    passes = TracedPasses(config, recipe, compute_dtype, is_card, len(standing.layers))
    return Forecaster(recipe, standing, passes, is_card, context_bytes)


@dataclass(frozen=True)
class TracedPasses:
    """What passes hold, from traces, which are kept, as neighbouring questions share them. `layers` is 0 where the
    decoder layers cannot be told apart."""

    config: PreTrainedConfig
    recipe: Recipe
    compute_dtype: str
    is_card: bool
    layers: int
    traces: dict[tuple[int, Techniques, BatchShape], Traced] = field(default_factory=dict)

    def peaks(self, techniques: Techniques, batch: BatchShape) -> dict[str, Peak]:
        if self._is_shallow:
            return self._trace(self.config.get_text_config().num_hidden_layers, techniques, batch).peaks
        recomputed = min(techniques.recomputed_layers, self.layers)
        first = self._few if recomputed else 0
        depth = first + (0 if recomputed == self.layers else self._period + (1 if first else 2))
        traced = self._trace(depth, techniques.having(recomputed_layers=first), batch)
        others = Counter(self._kinds(recomputed, self.layers))
        others.subtract(self._kinds(first, depth))
        kept = [(traced.left_by(i), others[i % self._period]) for i in range(max(1, first), depth - 1)]
        return {
            phase: _with_others(phase, peak, traced.checkpoint, recomputed - first, kept)
            for phase, peak in traced.peaks.items()
        }

    def checkpoint_bytes(self, batch: BatchShape) -> int:
        depth = self.layers if self._is_shallow else self._few
        traced = self._trace(depth, Techniques(recomputed_layers=depth), batch)
        return traced.checkpoint.device["checkpoints"]

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
            config = fake_model.shallow(self.config, layers)
            try:
                self.traces[key] = trace(config, self.recipe, self.compute_dtype, on, batch, self.is_card)
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as fault:
                reason = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
                raise ModelError(f"model.base: the model its config.json describes cannot run ({reason}).") from fault
        return self.traces[key]


def _with_others(phase: str, peak: Peak, checkpoint: Peak, recomputed: int, kept: Sequence[tuple[Peak, int]]) -> Peak:
    """`peak` with what `recomputed` further layers hold in `phase`, and of each of the `kept` so many more.

    A layer's activations wait until the loss has gone back through it; its checkpoint until that reaches the layer,
    but in host memory, where buffers are kept for the next pass, to the end.
    """
    device, host = peak.device, _add(peak.host, checkpoint.host, recomputed)
    if phase != FIRST_BACKWARD:
        device = _add(device, checkpoint.device, recomputed)
    for left, layers in kept if phase in (FORWARD, LOSS) else ():
        device, host = _add(device, left.device, layers), _add(host, left.host, layers)
    return Peak(device, host)


def _add(parts: Parts, others: Parts, times: int) -> Parts:
    return {name: parts.get(name, 0) + times * others.get(name, 0) for name in parts | others}
