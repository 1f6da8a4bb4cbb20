"""What stands and what passes -> bytes by part at the peak of a step, for any batch and any set of techniques."""

from dataclasses import dataclass
from typing import Protocol

from qtune.accelerator import Capability
from qtune.memory.memory_tracker import Peak
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.embedding_offload import STAGING_BYTES
from qtune.memory.techniques.standing import PAGED_OPTIMIZER, Parts, Standing
from qtune.plan.workload import BatchShape
from qtune.recipe.schema import Recipe
from qtune.units import KIB, MIB

SLACK_FRACTION = 0.04  # of what the allocator has handed out: freed blocks that fit nothing else; not measured yet
NOT_ALLOCATED = ("context", "slack", PAGED_OPTIMIZER)
FORWARD, LOSS, FIRST_BACKWARD, LAST_BACKWARD, STEP = "forward", "loss", "backward first", "backward last", "step"
REFERENCE = "reference"  # the base's pass before that which trains, where the objective asks for one
EXCHANGE = "exchange"  # between several ranks, before the step
EXCHANGED_BYTES = 12  # of a trained weight: float32 in one buffer, in parts for the ranks, and theirs (train.replicas)


@dataclass(frozen=True)
class Forecast:
    """Bytes by part at the peak of a step. `phases` are the device's peaks of each phase.

    `context`, `slack` and what is paged are outside of what torch's allocator counts as allocated. `load_bytes` is what
    the device holds while the base is loaded, before its head is quantised.
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
        return sum(size for part, size in self.device.items() if part not in NOT_ALLOCATED)

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


class Passes(Protocol):
    """What comes and goes in a pass through the whole model: traced, or worked out."""

    def peaks(self, techniques: Techniques, batch: BatchShape) -> dict[str, Peak]:
        """By phase: `FORWARD`, `LOSS`, and where layers are recomputed `FIRST_BACKWARD` and `LAST_BACKWARD`, the
        backward passes of the first layer and of the one of the others that holds most; `REFERENCE` where there is
        such a pass."""
        ...

    def checkpoint_bytes(self, batch: BatchShape) -> int:
        """The input of a layer, which is all that is kept of one that is recomputed, whatever else is on."""
        ...

    def moved_bytes(self, techniques: Techniques, batch: BatchShape) -> int:
        """What all layers read and write, forward and backward, beside products and attention. Only of the
        processor."""
        ...


@dataclass(frozen=True)
class Forecaster:
    """Forecasts for one model, adapter and optimizer.

    `card` is the capability of a CUDA card, here or not; without one it is on this machine's processor, where nothing
    is outside the tensors and `context_bytes` is 0.
    """

    recipe: Recipe
    standing: Standing
    passes: Passes
    card: Capability | None
    context_bytes: int

    @property
    def is_card(self) -> bool:
        return self.card is not None

    @property
    def layers(self) -> int:
        return len(self.standing.layers)

    def forecast(self, techniques: Techniques, batch: BatchShape, accumulates: bool = True) -> Forecast:
        """The peak of a step in which `batch` is the largest. `accumulates` says that gradients outlive a pass."""
        standing = self._standing(techniques)
        phases: dict[str, Parts] = {}
        for phase, peak in self.passes.peaks(techniques, batch).items():
            phases[phase] = {**self._at(phase, standing, accumulates), **peak.device}
        if not accumulates and LAST_BACKWARD in phases:
            near_the_end = self._near_the_end(phases[LAST_BACKWARD], standing, techniques)
            phases[LAST_BACKWARD] = max(phases[LAST_BACKWARD], near_the_end, key=lambda parts: sum(parts.values()))
        phases[STEP] = {**standing, "layer workspace": self.standing.optimizer_workspace_bytes}
        if self.standing.ranks > 1:
            phases[EXCHANGE] = {**standing, "layer workspace": self._exchanged_bytes}
        sums = {phase: sum(parts.values()) for phase, parts in phases.items()}
        highest = max(sums, key=lambda phase: sums[phase])
        device = _only_filled(phases[highest])
        if self.is_card:
            slack = round(SLACK_FRACTION * sums[highest])
            device |= {"slack": slack, "context": self.context_bytes}
        return Forecast(device, self.host_parts(techniques, batch), highest, sums, self._loading_bytes(techniques))

    def least_bytes(self, techniques: Techniques) -> int:
        """What the device has to hold whatever the batch: the optimizer's step and loading. It needs no trace."""
        workspace = max(self.standing.optimizer_workspace_bytes, self._exchanged_bytes)
        step = sum(self._standing(techniques).values()) + workspace
        outside = round(SLACK_FRACTION * step) + self.context_bytes if self.is_card else 0
        return max(step + outside, self._loading_bytes(techniques))

    def _standing(self, techniques: Techniques) -> Parts:
        return {**techniques.on_device(self.standing), "matmul workspaces": matmul_workspaces(self.card)}

    @property
    def _exchanged_bytes(self) -> int:
        return EXCHANGED_BYTES * self.standing.trained_parameters if self.standing.ranks > 1 else 0

    def _loading_bytes(self, techniques: Techniques) -> int:
        return techniques.while_loading(self.standing) + self.context_bytes

    def host_parts(self, techniques: Techniques, batch: BatchShape) -> Parts:
        """Bytes by part in host memory, found without a trace of the other techniques."""
        parts: Parts = dict(techniques.on_host(self.standing))
        if techniques.host_checkpoints and techniques.recomputed_layers:
            parts["checkpoints"] = techniques.recomputed_layers * self.passes.checkpoint_bytes(batch)
        if self.is_card and (techniques.host_embedding or (self.standing.is_tied and techniques.head == "host")):
            parts["embedding"] = parts.get("embedding", 0) + STAGING_BYTES
        parts["undo copy of the adapter"] = self.standing.adapter_bytes + self.standing.optimizer_bytes
        return _only_filled(parts)

    def _at(self, phase: str, standing: Parts, accumulates: bool) -> Parts:
        """What stands during `phase`: without accumulation gradients grow from the last layer to the first."""
        if accumulates or phase == FIRST_BACKWARD:
            return standing
        share = 1 / max(1, self.layers) if phase == LAST_BACKWARD else 0.0
        return {**standing, "gradients": round(share * standing["gradients"])}

    def _near_the_end(self, parts: Parts, standing: Parts, techniques: Techniques) -> Parts:
        """`parts` of a pass through the last layers, as they are in the second: its gradients almost all made, and of
        the inputs that wait on the device two, of kept attention its own and the first layer's if that keeps it."""
        layers = max(1, self.layers)
        gradients = round((layers - 1.5) / layers * standing["gradients"])
        waiting = parts.get("checkpoints", 0)
        if not techniques.host_checkpoints:
            waiting = waiting * 2 // max(2, techniques.recomputed_layers)
        again = min(techniques.recomputed_attention, techniques.recomputed_layers)
        attention = parts.get("kept attention", 0) * (1 if again else 2) // max(2, techniques.recomputed_layers - again)
        return {**parts, "gradients": gradients, "checkpoints": waiting, "kept attention": attention}


def matmul_workspaces(card: Capability | None) -> int:
    """What torch's allocator gives to cuBLAS: to the handle of the thread that goes forward, and of autograd's.

    torch 2.11, ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`: 2 x 4096 + 8 x 16 KiB, and 32 MiB from
    Hopper on, which a later version extends to consumer Blackwell.
    """
    if card is None:
        return 0
    return 2 * (32 * MIB if card >= (9, 0) else (2 * 4096 + 8 * 16) * KIB)


def _only_filled(parts: Parts) -> Parts:
    return {name: size for name, size in parts.items() if size > 0}
