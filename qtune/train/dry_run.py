"""The worst step first: the largest batch, once, before any time is spent on the others.

Forward, backward and optimizer step run as they will, with a learning rate of 0; weights, state, gradients and random
numbers are put back. On the CPU every tensor is counted, by the forecast's parts; on a card the allocator tells the
peak of each phase. What runs out of memory, or takes more than was promised, climbs a rung and is tried again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from qtune import accelerator
from qtune.errors import OutOfMemory
from qtune.events import Listener, MemoryMeasured, Rehearsed
from qtune.hardware import Device
from qtune.memory import rng_state
from qtune.memory.engine import Engine
from qtune.memory.memory_parts import standing_parts
from qtune.memory.memory_tracker import LiveBytes, Peak
from qtune.memory.oom_recovery import Batch, NextTechnique, free_memory, is_out_of_memory, let_go
from qtune.model.adapter import trained_parameters

if TYPE_CHECKING:
    from qtune.plan.plan import Plan

Loss = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Rehearsal:
    """Peaks by phase. On a card each is one number, named `allocated`; on the CPU there is one a part.

    `reserved_bytes` is the most that a card's allocator took for them, holes between tensors and all.
    """

    peaks: dict[str, Peak]
    reserved_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        return max(peak.device_bytes for peak in self.peaks.values())

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase].device_bytes)


def rehearse_until_it_fits(
    run_once: Callable[[], Rehearsal], most_bytes: int, climb: NextTechnique, forget_pass: Callable[[], None]
) -> tuple[Rehearsal, list[str]]:
    """The rehearsal that stayed within `most_bytes`, and what was switched on for it.

    Raises OutOfMemory when nothing is left to switch on and memory really ran out; a peak above the budget that the
    device could hold is let through.
    """
    climbed: list[str] = []
    while True:
        try:
            found = run_once()
            if max(found.device_bytes, found.reserved_bytes) <= most_bytes:
                return found, climbed
            ran_out = False
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
            ran_out = True
        forget_pass()
        free_memory()
        sentence = climb()
        if sentence is None and ran_out:
            raise OutOfMemory(
                "The largest batch runs out of memory, and no memory technique is left to switch on. No step was taken."
                " Lower data.max_tokens or lora.rank, or close what else uses this device."
            )
        if sentence is None:
            return found, climbed
        climbed.append(sentence)


def tell(listen: Listener, plan: "Plan", found: Rehearsal, climbed: list[str]) -> None:
    """Report what the rehearsal held, phase by phase, beside the forecast."""
    for phase, peak in found.peaks.items():
        parts = tuple(sorted(peak.device.items(), key=lambda part: -part[1]))
        sizes = (peak.device_bytes, plan.device.total_bytes, plan.device.free_bytes)
        listen(MemoryMeasured(0, parts, *sizes, f"rehearsed {phase}", is_rehearsal=True))
    listen(Rehearsed(plan.forecast.allocated_bytes, found.device_bytes, found.peak_phase, tuple(climbed)))


def rehearse(
    model: PeftModel,
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    loss_of: Loss,
    accumulates: bool,
    device: Device,
) -> Rehearsal:
    """One step on `batch`, its traces removed. `optimizer` must be one of its own, as its state is thrown away."""
    place = next(trained_parameters(model)).device
    before = rng_state.note(place)
    was_training = model.training
    trained = list(trained_parameters(model))
    weights = [parameter.detach().to("cpu", copy=True) for parameter in trained]  # 0 times infinity is no number
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        as_after_a_step(model, optimizer, accumulates)
        watch = _on_a_card if device.is_card else _by_counting
        return watch(model, engine, optimizer, batch, loss_of)
    finally:
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.data.copy_(weight)
        model.zero_grad()
        optimizer.state.clear()
        model.train(was_training)
        rng_state.wind_back(before, place)


def as_after_a_step(model: PeftModel, optimizer: torch.optim.Optimizer, accumulates: bool) -> None:
    """Have the optimizer's state there, as it is from the second step on, and gradients if they outlive a pass."""
    for parameter in trained_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not accumulates:
        model.zero_grad()


def count_what_is_there(
    counter: LiveBytes, model: PeftModel, engine: Engine, optimizer: torch.optim.Optimizer, batch: Batch
) -> None:
    """Have `counter` know, by part, what a step on `batch` begins with."""
    for part, side, tensors in standing_parts(model, engine, optimizer):
        counter.count(tensors, part, side)
    counter.count([value for value in batch.values() if isinstance(value, torch.Tensor)], "batch")


def _by_counting(
    model: PeftModel, engine: Engine, optimizer: torch.optim.Optimizer, batch: Batch, loss_of: Loss
) -> Rehearsal:
    with LiveBytes() as counter:
        count_what_is_there(counter, model, engine, optimizer, batch)
        counter.enter_phase("forward")
        loss = loss_of(batch)
        loss.backward()
        del loss  # and what its graph still holds, as the trainer does before it steps
        counter.count([p.grad for p in trained_parameters(model) if p.grad is not None], "gradients")
        counter.enter_phase("step")
        finish_step(model, optimizer)
    counter.peaks.pop("load", None)
    return Rehearsal(counter.peaks)


def _on_a_card(
    model: PeftModel, engine: Engine, optimizer: torch.optim.Optimizer, batch: Batch, loss_of: Loss
) -> Rehearsal:
    peaks: dict[str, Peak] = {}
    reserved = [0]

    def end(phase: str) -> None:
        accelerator.synchronize(engine.device)
        peaks[phase] = Peak({"allocated": accelerator.most_allocated_bytes(engine.device)})
        reserved.append(accelerator.most_reserved_bytes(engine.device))
        accelerator.count_anew(engine.device)

    accelerator.free_cached_memory()  # what loading left is no part of a step
    accelerator.count_anew(engine.device)
    loss = loss_of(batch)
    end("forward")
    loss.backward()
    del loss
    end("backward")
    finish_step(model, optimizer)
    end("step")
    return Rehearsal(peaks, max(reserved))


def finish_step(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradients and take the step."""
    gradients = [p for p in trained_parameters(model) if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(gradients, 1.0)
    optimizer.step()
