"""Does it hold on this card? One row for each thing that a processor cannot show; and the same passes under torch's
own watch over streams."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from profile_memory import step
from transformers import AutoModelForCausalLM

from qtune import accelerator
from qtune.data.packing import PackedRow
from qtune.evaluate import generate
from qtune.memory.attention_kernels import (
    Call,
    causal_band,
    kernel_of,
    needs_repeated_heads,
    suits_varlen,
    varlen_fault,
)
from qtune.memory.memory_parts import standing_parts
from qtune.memory.oom_recovery import free_memory, is_out_of_memory, let_go
from qtune.memory.techniques import Techniques
from qtune.model import base
from qtune.plan.forecast import Forecaster
from qtune.plan.workload import BatchShape, Work
from qtune.recipe.schema import Memory, Model
from qtune.train.trainer import sft_config
from qtune.units import GIB, MIB, format_bytes

from .lab import Figures, Lab, Trained, joined, let_memory_go, limited_to, recipe_of

SHAPE, LAYERS, STEPS = "llama_1b", 4, 3
LENGTHS = (700, 500, 300, 548)
HEAD_WIDTHS = (64, 128, 208, 256, 288)  # 208 and 288 are refused by flash attention on some cards, and on all
LONG = 8192  # tokens, eight times the window
ALLOWED_FRACTION, ALLOWED_BYTES = 0.10, 64 * MIB  # beyond a forecast; chosen: less than any of these faults adds


class Broken(Exception):
    """What was seen is not what has to be."""


def smoke_rows(lab: Lab) -> Iterator[Figures]:
    """Every check, whatever the others came to; `ok` and what was seen."""
    for check in CHECKS:
        start = time.perf_counter()
        try:
            seen, is_ok = check(lab), True
        except Exception as fault:
            let_go(fault)
            seen, is_ok = f"{type(fault).__name__}: {str(fault).strip()[:300]}", False
        let_memory_go()
        what = (check.__doc__ or "").strip().splitlines()[0]
        yield {"what": what, "ok": is_ok, "seen": seen, "seconds": round(time.perf_counter() - start, 1)}


def host_embedding(lab: Lab) -> str:
    """The embedding in host memory: the trainer takes steps, and the model answers."""
    trained = trained_with(lab, Memory(embedding="host"))
    stays_on_the_host(trained)
    text = generate.answer(trained.loaded, [[2, 3, 4, 5]], [], 4)
    return f"{losses(trained)}; answered {len(text)} prompt"


def streamed_layers(lab: Lab) -> str:
    """Streamed layers are in host memory after training as before, and the model answers."""
    trained = trained_with(lab, Memory(stream_layers=LAYERS, checkpoints="host", keep_layers=0))
    on_host = stays_on_the_host(trained)
    generate.answer(trained.loaded, [[2, 3, 4, 5]], [], 4)
    return f"{losses(trained)}; {format_bytes(on_host)} on the host"


def host_head(lab: Lab) -> str:
    """The output head in host memory: the trainer takes steps, and the model answers."""
    trained = trained_with(lab, Memory(head="host"))
    stays_on_the_host(trained)
    generate.answer(trained.loaded, [[2, 3, 4, 5]], [], 4)
    return losses(trained)


def several_cards(lab: Lab) -> str:
    """Several visible cards: the trainer is told of one."""
    forecaster, rows = material(lab, Memory())
    plan = lab.planned(forecaster, Work.of_rows(rows), lab.device.free_bytes)
    visible = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder, mock.patch("torch.cuda.device_count", return_value=max(2, visible)):
        told = sft_config(forecaster.recipe, plan, Path(folder)).n_gpu
    if told > 1:
        raise Broken(f"with two cards the trainer would use {told}")
    return f"{visible} visible here; with two the trainer uses {told}"


def loading(lab: Lab) -> str:
    """A load whose layers stay on the host reserves no more of the card than was forecast."""
    forecaster = lab.forecaster(SHAPE, layers=LAYERS)
    techniques = Techniques(streamed_layers=forecaster.layers, host_embedding=True)
    with tempfile.TemporaryDirectory() as folder:
        config = forecaster.passes.config
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        lab.reset_peak()
        loaded = base.load_base(Model(base=folder), lab.device.name, lab.device.compute_dtype, techniques)
    del loaded
    expected = techniques.while_loading(forecaster.standing)
    reserved = torch.cuda.max_memory_reserved() if lab.device.is_card else None
    return near(reserved, expected, "reserved")


def attention(lab: Lab) -> str:
    """torch takes the attention kernels that the plan counts with, and its varlen_attn is right."""
    device, dtype = torch.device(lab.device.name), getattr(torch, lab.device.compute_dtype)
    card, told = accelerator.capability(device), []
    for width in HEAD_WIDTHS:
        for has_band in (False, True):
            call = Call(dtype, 8, 2, width, width, has_band)
            call = call.repeated if needs_repeated_heads(call, card) else call
            if card is not None and (taken := kernel_taken(call, device)) != kernel_of(call, card):
                raise Broken(f"{call} takes {taken} on {card}, not {kernel_of(call, card)}")
            if suits_varlen(call, (70, 150), None, card) and (why := varlen_fault(call, has_band, device)):
                raise Broken(f"varlen_attn of {call}: {why}")
            told.append(f"{width}{' in a window' * has_band}: {'torch' if card is None else kernel_of(call, card)}")
    return "; ".join(told)


def kernel_taken(call: Call, device: torch.device) -> str:
    """What torch says itself that it takes for `call`, in training."""
    query, key, value = (
        torch.empty(1, heads, 256, call.width, dtype=call.dtype, device=device, requires_grad=True)
        for heads in (call.heads, call.key_heads, call.key_heads)
    )
    band = causal_band(256, 100, device) if call.has_band else None
    asked = torch.backends.cuda.SDPAParams(query, key, value, band, 0.0, band is None, call.is_grouped)
    if torch.backends.cuda.can_use_flash_attention(asked):
        return "flash"
    return "memory-efficient" if torch.backends.cuda.can_use_efficient_attention(asked) else "math"


def windows(lab: Lab) -> str:
    """Sliding windows with grouped heads take the memory that was forecast, far less than the math kernel's."""
    forecaster = lab.forecaster("gemma3_4b", layers=6)  # one of six layers is without a window
    tokens = lab.tokens(LONG)
    techniques = Techniques(recomputed_layers=forecaster.layers)
    forecast = forecaster.forecast(techniques, BatchShape.of_one_document(tokens))
    stage = lab.build(forecaster, techniques)
    measured = lab.try_to_measure(stage, lab.batch(forecaster, tokens))
    if not measured["ran"]:
        raise Broken(f"out of memory; {format_bytes(forecast.allocated_bytes)} forecast")
    return near(measured["allocated_bytes"], forecast.allocated_bytes, "allocated")


def paged_optimizer(lab: Lab) -> str:
    """A paged optimizer's steps, each with a copy of its state to go back to."""
    trained = trained_with(lab, Memory(), optimizer="paged_adamw_8bit")
    return f"{losses(trained)}; {1000 * trained.steps[-1].step_seconds:.0f} ms a step"


def out_of_memory(lab: Lab) -> str:
    """Memory that runs out is caught, and the step after it runs: no error of the card is left pending."""
    forecaster = lab.forecaster(SHAPE, layers=LAYERS)
    stage, tokens = lab.build(forecaster, Techniques()), lab.tokens(2048)
    batch = lab.batch(forecaster, tokens)
    caught = "nothing"
    with limited_to(lab, 24 * GIB):
        step(stage, batch)
        try:
            loss = stage.loss_of(batch)
            torch.empty(1 << 46, dtype=torch.uint8, device=lab.device.name)
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            caught = type(fault).__name__
            let_go(fault)
            loss = None
        del loss
        stage.engine.forget_pass()
        free_memory()
        value = step(stage, batch)
        lab.synchronize()
    if caught == "nothing" or not math.isfinite(value):
        raise Broken(f"caught {caught}; the next loss is {value}")
    return f"caught {caught}; the next step's loss is {value:.3f}"


CHECKS: tuple[Callable[[Lab], str], ...] = (
    several_cards,
    host_embedding,
    streamed_layers,
    host_head,
    paged_optimizer,
    loading,
    attention,
    windows,
    out_of_memory,
)


def watched_rows(lab: Lab) -> Iterator[Figures]:
    """Layers streamed and their inputs kept on the host, in a process in which torch watches every stream."""
    forecaster = lab.forecaster(SHAPE, layers=LAYERS)
    layers = forecaster.layers
    techniques = Techniques(recomputed_layers=layers, host_checkpoints=True, streamed_layers=layers, head="host")
    stage = lab.build(forecaster, techniques)
    for tokens in (lab.tokens(1024), lab.tokens(512)):  # a shorter pass after a longer one has buffers taken again
        try:
            loss = step(stage, lab.batch(forecaster, tokens))
            lab.synchronize()
            told = "nothing unordered" if is_watched() else "not watched"
            row: Figures = {"ok": is_watched() or not lab.device.is_card, "seen": f"loss {loss:.3f}, {told}"}
        except Exception as fault:
            row = {"ok": False, "seen": f"{type(fault).__name__}: {str(fault).strip()[:2000]}"}
        yield {"tokens": tokens, **row}


def is_watched() -> bool:
    from torch.cuda import _sanitizer

    return bool(_sanitizer.cuda_sanitizer.enabled)


# ---- what the checks share


def material(lab: Lab, memory: Memory, **train: object) -> tuple[Forecaster, list[PackedRow]]:
    """A forecaster of the small shape, and packs of several documents, two for each step."""
    recipe = recipe_of(memory, max_steps=STEPS, epochs=1000.0, gradient_accumulation=1, **train)
    forecaster = lab.forecaster(SHAPE, recipe, LAYERS)
    rows = lab.rows(forecaster, [lab.tokens(length) for length in LENGTHS])
    return forecaster, [joined(rows[:2]), joined(rows[2:])]


def trained_with(lab: Lab, memory: Memory, **train: object) -> Trained:
    """A few steps of qtune's own loop, rehearsal and all, with these settings."""
    forecaster, packs = material(lab, memory, **train)
    return lab.train(forecaster, lab.planned(forecaster, Work.of_rows(packs), lab.device.free_bytes), packs)


def losses(trained: Trained) -> str:
    told = [each.loss for each in trained.steps]
    if len(told) != STEPS or not all(map(math.isfinite, told)):
        raise Broken(f"losses {told}")
    return f"loss {told[0]:.3f}, then {told[-1]:.3f}"


def stays_on_the_host(trained: Trained) -> int:
    """Bytes of what the techniques keep in host memory, all of which is there."""
    size = 0
    for part, side, tensors in standing_parts(trained.stage.model, trained.stage.engine, None):
        if side == "host":
            elsewhere = {str(tensor.device) for tensor in tensors} - {"cpu"}
            if elsewhere:
                raise Broken(f"{part} is on {', '.join(elsewhere)}")
            size += sum(tensor.nbytes for tensor in tensors)
    if not size:
        raise Broken("nothing is in host memory")
    return size


def near(measured: int | None, expected: int, what: str) -> str:
    """Both, told; Broken where more was taken than may be."""
    if measured is None:
        return f"{format_bytes(expected)} forecast; the processor has no such figure"
    told = f"{format_bytes(measured)} {what}, {format_bytes(expected)} forecast"
    if measured > (1 + ALLOWED_FRACTION) * expected + ALLOWED_BYTES:
        raise Broken(told)
    return told
