#!/usr/bin/env python3
"""Useful tokens per second and peak memory: a plain trl script at its defaults beside `qtune run`, taking turns.

    scripts/bench_against_trl.py --data medquad_3000.jsonl [--base FOLDER] [--rounds 3] [--steps 12]

Both train the same LoRA on the same NF4 base and the same question/answer rows. Useful tokens are those that are not
padding; the time is the training loop's own, without imports and loading; the peak is the operating system's figure
for the whole process (`ru_maxrss`). Figures are compared within a round, as the speed of a shared machine drifts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANK, ALPHA = 16, 32
RECIPE = """\
name = "bench"
[model]
base = "{base}"
[lora]
rank = {rank}
alpha = {alpha}
[data]
train = "{data}"
format = "question-answer"
held_out_fraction = 0
max_tokens = 2048
on_long = "truncate"
[train]
max_steps = {steps}
epochs = 100
gradient_accumulation = {accumulation}
[evaluate]
metric = "none"
"""


@dataclass(frozen=True)
class Trial:
    """One training run: useful tokens a second, trained seconds, and the process's peak in bytes."""

    tokens_per_second: float
    seconds: float
    peak_bytes: int


def plain_trl(data: Path, base: Path, steps: int) -> None:
    """What a person writes after reading trl's documentation; prints tokens and seconds as JSON."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        begun = ended = 0.0

        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            self.begun = time.perf_counter()

        def on_train_end(self, *args: object, **kwargs: object) -> None:
            self.ended = time.perf_counter()

    rows = load_dataset("json", data_files=str(data), split="train")
    rows = rows.rename_columns({"question": "prompt", "answer": "completion"}).select_columns(["prompt", "completion"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.bfloat16),
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    tokens = next(log["num_tokens"] for log in reversed(trainer.state.log_history) if "num_tokens" in log)
    print(json.dumps({"tokens": tokens, "seconds": clock.ended - clock.begun}))


def run_measured(command: list[str]) -> tuple[str, int]:
    """Standard output and peak resident bytes of a finished command; its failure is this script's."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        ) as child,
    ):
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
    return output, usage.ru_maxrss * 1024


def trl_trial(data: Path, base: Path, steps: int) -> Trial:
    command = [sys.executable, __file__, "--data", str(data), "--base", str(base), "--steps", str(steps), "--plain-trl"]
    output, peak = run_measured(command)
    figures = json.loads(output.splitlines()[-1])
    return Trial(figures["tokens"] / figures["seconds"], figures["seconds"], peak)


def qtune_trial(data: Path, base: Path, steps: int, accumulation: int) -> Trial:
    with tempfile.TemporaryDirectory() as folder:
        recipe, run = Path(folder) / "bench.toml", Path(folder) / "run"
        recipe.write_text(
            RECIPE.format(base=base, data=data, rank=RANK, alpha=ALPHA, steps=steps, accumulation=accumulation)
        )
        _, peak = run_measured([sys.executable, "-m", "qtune", "run", str(recipe), "--output", str(run)])
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(event["tokens"] for event in events if event["event"] == "step")
    seconds = next(event["train_seconds"] for event in events if event["event"] == "finished")
    return Trial(tokens / seconds, seconds, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--base", type=Path, default=ROOT / "qtune" / "demo_base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of the trl script")
    parser.add_argument("--accumulation", type=int, default=1, help="packs of 2,048 tokens in a qtune step")
    parser.add_argument("--plain-trl", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    data, base = options.data.resolve(), options.base.resolve()
    if options.plain_trl:
        plain_trl(data, base, options.steps)
        return
    pairs = []
    for number in range(options.rounds):
        trl = trl_trial(data, base, options.steps)
        qtune = qtune_trial(data, base, options.steps, options.accumulation)
        pairs.append((trl, qtune))
        print(f"round {number + 1}: {line('trl', trl)}   {line('qtune', qtune)}", flush=True)
    speed = statistics.median(q.tokens_per_second / t.tokens_per_second for t, q in pairs)
    peak = statistics.median(q.peak_bytes / t.peak_bytes for t, q in pairs)
    print(f"median of {len(pairs)} rounds: qtune is {speed:.2f}x as fast, at {peak:.2f}x the peak memory")


def line(who: str, trial: Trial) -> str:
    return (
        f"{who} {trial.tokens_per_second:,.0f} tokens/s over {trial.seconds:.0f} s,"
        f" peak {trial.peak_bytes / 1024**2:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
