"""One run as a stream of events, the same every time: what the tests and the eye look at."""

import math
import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from qtune.events import (
    Evaluated,
    Event,
    Finished,
    MemoryMeasured,
    Notice,
    Saved,
    Scored,
    Started,
    StepDone,
)
from qtune.report.dashboard_state import View, advance
from qtune.rundir import RunDir, write_json

MIB, GIB = 1024**2, 1024**3
TITLE = "medical · Qwen3-4B-Instruct · NF4 · LoRA r=16"
NOON = datetime(2026, 11, 24, 12, 0)


def card_memory(step: int) -> MemoryMeasured:
    """An 8 GiB card with 1.1 GiB in the hands of others."""
    parts = (
        ("context", 460 * MIB),
        ("base", 2_610 * MIB),
        ("adapter", 126 * MIB),
        ("gradients", 126 * MIB),
        ("optimizer", 64 * MIB if step > 1 else 0),
        ("activations and workspace", 1_480 * MIB),
    )
    held = sum(size for _, size in parts)
    return MemoryMeasured(step, parts, held, 8 * GIB, 8 * GIB - held - 1_130 * MIB)


def host_memory(step: int) -> MemoryMeasured:
    """The same on a machine without a card."""
    parts = (("python and libraries", 620 * MIB), ("base", 90 * MIB), ("adapter", 9 * MIB), ("gradients", 9 * MIB))
    parts = (*parts, ("optimizer", 5 * MIB), ("activations and workspace", 210 * MIB))
    held = sum(size for _, size in parts)
    return MemoryMeasured(step, parts, held, 16 * GIB, 11 * GIB)


def events_of_a_run(steps: int = 282, on_card: bool = True) -> Iterator[Event]:
    """A run that learns well, then begins to learn its rows by heart; about half a second a step."""
    dice = random.Random(7)
    yield Notice("loading Qwen/Qwen3-4B-Instruct")
    yield Scored("base", 2.113, "token_f1", 0.181, 100, 41.2)
    yield Started(steps, 2_850, 150)
    held_out, best = math.inf, math.inf
    for step in range(1, steps + 1):
        yield (card_memory if on_card else host_memory)(step)
        done = step / steps
        level = 1.18 + 1.0 * math.exp(-9 * done) - 0.1 * done
        if step % 28 == 0 or step == steps:
            held_out = 1.24 + 0.9 * math.exp(-8 * done) + (0.35 * max(0.0, done - 0.6)) ** 2
            yield Evaluated(step, held_out, held_out < best, 4.2)
            best = min(best, held_out)
        yield StepDone(
            step=step,
            epoch=3 * done,
            loss=level * math.exp(dice.gauss(0, 0.06)),
            learning_rate=2e-4 * min(1.0, step / 9) * (1 + math.cos(math.pi * done)) / 2,
            grad_norm=0.3 + 0.3 * dice.random(),
            tokens=16_000 + dice.randrange(384),
            trained_tokens=9_000,
            step_seconds=3.8 + 0.2 * dice.random(),
            wait_seconds=0.0,
        )
    yield Finished(steps, 1_104.0)
    yield Saved("adapter", 66 * MIB, 0.4)
    yield Scored("tuned", 1.246, "token_f1", 0.402, 100, 38.9)


def view_after(events: Iterator[Event], title: str = TITLE) -> View:
    view, now = View(title, 0), NOON
    for event in events:
        if isinstance(event, StepDone):
            now += timedelta(seconds=event.step_seconds)
        view = advance(view, event, now)
    return view


def halfway(on_card: bool = True) -> View:
    """The run just after step 176."""

    def first_half() -> Iterator[Event]:
        for event in events_of_a_run(on_card=on_card):
            yield event
            if isinstance(event, StepDone) and event.step == 176:
                return

    return view_after(first_half())


DATA: dict[str, Any] = {
    "source": "rows.jsonl",
    "format": "prompt-completion",
    "rows_read": 3_000,
    "dropped": [{"reason": "the answer is empty", "rows": 2, "places": ["rows.jsonl:17", "rows.jsonl:212"]}],
    "truncated_rows": 14,
    "trained_tokens_lost": 861,
    "train_rows": 2_850,
    "held_out_rows": 148,
    "tokens": 412_000,
    "trained_tokens": 286_139,
    "longest_row_tokens": 1_911,
    "packs": 214,
    "pack_fill_fraction": 0.963,
    "duplicate_rows": 3,
    "overlap_rows": 0,
    "notices": ["the template has no system role, so [system] texts go before the first question"],
    "sample": [
        ["<|im_start|>user\nWhat does the ending -olol mean?<|im_end|>\n<|im_start|>assistant\n", False],
        ["A beta blocker.<|im_end|>", True],
        ["\n", False],
    ],
}
PLAN: dict[str, Any] = {
    "steps": 282,
    "choices": [
        {"name": "device", "value": "RTX 4060, 8.0 GiB", "reason": "the first CUDA card"},
        {"name": "adapter", "value": "LoRA, rank 16, scale 2", "reason": "lora"},
        {"name": "steps", "value": "282", "reason": "3 epochs of 2,850 rows | in packs"},
    ],
}
SCORES: dict[str, Any] = {
    "metric": "token_f1",
    "rows": 100,
    "base": {"held_out_loss": 2.113, "score": 0.181, "low": 0.152, "high": 0.211},
    "tuned": {"held_out_loss": 1.246, "score": 0.402, "low": 0.358, "high": 0.447},
    "samples": [
        {
            "prompt": "What does the ending -olol mean?",
            "reference": "A beta blocker.",
            "base": "The ending -olol is often used in chemistry to say that a molecule has an alcohol group.",
            "tuned": "A beta blocker.",
            "base_score": 0.08,
            "tuned_score": 1.0,
        },
        {
            "prompt": "Write [b]bold[/b] | ```code```\x1b[2J",
            "reference": "<b>bold</b>",
            "base": "",
            "tuned": "**bold**",
            "base_score": 0.0,
            "tuned_score": 0.5,
        },
    ],
}
LOCK: dict[str, Any] = {
    "name": "medical",
    "base": {"name": "Qwen/Qwen3-4B-Instruct", "folder": "/models/qwen", "sha256": "c0ffee" * 10 + "beef"},
    "model": {"base": "Qwen/Qwen3-4B-Instruct"},
    "recipe": {"about": "Answers medical questions briefly"},
    "quantized_modules": [],
    "quantization": None,
    "compute_dtype": "bfloat16",
    "data_sha256": "da7a" * 16,
    "stop_token_ids": [2],
    "seed": 0,
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
}


def start_run(folder: Path) -> RunDir:
    """A run folder in which nothing has happened yet."""
    return RunDir.create(folder / "medical-1", 'name = "medical"\n', {})


def whole_run_in(folder: Path) -> RunDir:
    """The folder of a run that went through."""
    run = start_run(folder)
    for path, value in ((run.data, DATA), (run.plan, PLAN), (run.lock, LOCK), (run.scores, SCORES)):
        write_json(path, value)
    for event in events_of_a_run():
        run.record(event)
    run.adapter.mkdir()
    return run
