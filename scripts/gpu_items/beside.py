"""Tokens a second beside a plain trl script, and beside Unsloth where it is installed, on rows of many lengths."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from profile_memory import any_tokenizer, random_weights
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qtune.data.packing import PackedRow, pack
from qtune.memory.oom_recovery import free_memory, is_out_of_memory, let_go
from qtune.plan.forecast import Forecaster
from qtune.plan.workload import Work
from qtune.recipe.schema import Memory
from qtune.units import GIB

from .lab import RANK, Figures, Lab, joined, let_memory_go, limited_to, on, recipe_of

ROWS, MAX_TOKENS, BATCH = 160, 2048, 8
STEPS, FIRST = 10, 3  # steps, and how many of them are not timed
UNSLOTH_LAYERS, UNSLOTH_SECONDS = 8, 120


@dataclass(frozen=True)
class Match:
    """What is trained: a shape, `layers` of it where not all, and the memory that all have."""

    shape: str
    card_bytes: int
    layers: int | None = None


DENSE = Match("llama_8b", 16 * GIB)
MIXTURE = Match("qwen3_30b_a3b", 48 * GIB, layers=12)  # plain trl holds its experts in 16 bits


def trl_rows(lab: Lab, match: Match) -> Iterator[Figures]:
    """trl at its defaults pads a batch of rows, qtune packs them; all within one memory limit.

    Useful tokens a second from the fourth step on. trl's batch is halved until it fits, as a person would.
    """
    ways: dict[str, Callable[[], Figures]] = {
        "plain trl": partial(run_trl, lab, match, is_packed=False),
        "trl, packing": partial(run_trl, lab, match, is_packed=True),
        "qtune, adamw_8bit": partial(run_qtune, lab, match, "adamw_8bit"),
        "qtune, paged_adamw_8bit": partial(run_qtune, lab, match, "paged_adamw_8bit"),
    }
    speeds: dict[str, float] = {}
    for who, run in ways.items():
        with limited_to(lab, match.card_bytes):
            lab.reset_peak()
            row = run()
        speeds[who] = row.get("tokens_per_second") or 0.0
        ratio = speeds[who] / speeds["plain trl"] if speeds["plain trl"] else None
        yield {"who": who, "card_bytes": match.card_bytes, "beside_plain_trl": ratio, **row}


def unsloth_rows(lab: Lab) -> Iterator[Figures]:
    """Both on a folder of the same weights, with fewer layers, as Unsloth loads a model only from a disk."""
    match = Match("llama_8b", 16 * GIB, UNSLOTH_LAYERS)
    if importlib.util.find_spec("unsloth") is None:
        yield {"who": "Unsloth", "why": "not installed here"}
        return
    forecaster = lab.forecaster(match.shape, layers=match.layers)
    with tempfile.TemporaryDirectory() as folder:
        model = random_weights(
            forecaster.passes.config,
            forecaster.recipe.model.model_copy(update={"quantization": "none"}),
            lab.device.name,
            "bfloat16",
            is_plain=True,
        )
        model.save_pretrained(folder)
        any_tokenizer().save_pretrained(folder)
        del model
        let_memory_go()
        rows = [[int(token) for token in row["input_ids"]] for row in documents(lab, forecaster)]
        asked = {"base": folder, "rows": rows, "rank": RANK, "batch": BATCH, "steps": STEPS, "first": FIRST}
        Path(folder, "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        script = Path(__file__).with_name("unsloth_trial.py")
        done = subprocess.run(
            [sys.executable, str(script), str(Path(folder, "asked.json"))],
            capture_output=True,
            text=True,
            timeout=UNSLOTH_SECONDS,
        )
    if done.returncode:
        yield {"who": "Unsloth", "why": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
    else:
        yield {"who": "Unsloth", **json.loads(done.stdout.splitlines()[-1])}
    with limited_to(lab, match.card_bytes):
        lab.reset_peak()
        yield {"who": "qtune", **run_qtune(lab, match, "adamw_8bit")}


def documents(lab: Lab, forecaster: Forecaster) -> list[PackedRow]:
    """Rows whose lengths are spread as those of questions with answers are: a median of 330 tokens."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.empty(ROWS).log_normal_(mean=5.8, std=0.7, generator=draw)
    return lab.rows(forecaster, [lab.tokens(int(length)) for length in drawn.clamp(48, MAX_TOKENS)])


@dataclass
class Clock(TrainerCallback):
    """When each step ended."""

    ends: list[float] = field(default_factory=list)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def run_trl(lab: Lab, match: Match, is_packed: bool) -> Figures:
    """What a person writes after reading trl's documentation."""
    batch = BATCH
    while batch:
        try:
            return _run_trl(lab, match, batch, is_packed)
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
        free_memory()
        batch //= 2
    return {"ran": False, "tokens_per_second": None}


def _run_trl(lab: Lab, match: Match, batch: int, is_packed: bool) -> Figures:
    device, clock, steps = lab.device, Clock(), steps_of(lab)
    forecaster = lab.forecaster(match.shape, layers=match.layers)
    loaded = random_weights(
        forecaster.passes.config, forecaster.recipe.model, device.name, device.compute_dtype, is_plain=True
    )
    rows = documents(lab, forecaster)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=loaded,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=1 if is_packed else batch,
                gradient_accumulation_steps=packs_a_step(rows, lab) if is_packed else 1,
                max_length=lab.tokens(MAX_TOKENS),
                packing=is_packed,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                use_cpu=not device.is_card,
                bf16=device.compute_dtype == "bfloat16",
            ),
            train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
            processing_class=any_tokenizer(),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seen = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    first = min(FIRST, steps - 1) - 1
    speed = (seen[steps - 1] - seen[first]) / (clock.ends[-1] - clock.ends[first])
    return {"ran": True, "batch": 1 if is_packed else batch, "tokens_per_second": speed, "peak_bytes": lab.peak_bytes()}


def packs_a_step(rows: Sequence[PackedRow], lab: Lab) -> int:
    """As many full sequences as the rows of one padded batch come to."""
    tokens = sum(len(row["input_ids"]) for row in rows) * BATCH / len(rows)
    return max(1, round(tokens / lab.tokens(MAX_TOKENS)))


def run_qtune(lab: Lab, match: Match, optimizer: str) -> Figures:
    """`qtune run` without files: the plan for a card of that size, then its own training loop."""
    tokens, count = lab.tokens(MAX_TOKENS), steps_of(lab)
    accumulation = packs_a_step(documents(lab, lab.forecaster(match.shape, layers=match.layers)), lab)
    settings = {"max_steps": count, "epochs": 1000.0, "gradient_accumulation": accumulation, "optimizer": optimizer}
    forecaster = lab.forecaster(match.shape, recipe_of(Memory(rehearse=False), **settings), match.layers)
    rows = documents(lab, forecaster)
    packs = pack([len(row["input_ids"]) for row in rows], tokens)
    packed = [joined([rows[i] for i in members]) for members in packs]
    plan = lab.planned(forecaster, Work.of_rows(packed), match.card_bytes)
    trained = lab.train(forecaster, plan, packed)
    timed = trained.steps[min(FIRST, count - 1) :]
    speed = sum(each.tokens for each in timed) / sum(each.step_seconds for each in timed)
    return {
        "ran": True,
        "batch": plan.micro_batch,
        "techniques": on(plan.techniques),
        "tokens_per_second": speed,
        "planned_tokens_per_second": plan.speed.tokens_per_second,
        "peak_bytes": lab.peak_bytes(),
    }


def steps_of(lab: Lab) -> int:
    return 3 if lab.is_rehearsed else STEPS
