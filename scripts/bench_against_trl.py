#!/usr/bin/env python3
"""Useful tokens per second and peak memory: trl in the ways a person would run it, beside qtune, taking turns.

    scripts/bench_against_trl.py --data medquad_3000.jsonl --base SmolLM2-135M-Instruct --output benchmarks/cpu.md
    scripts/bench_against_trl.py --data medquad_3000.jsonl --rounds 1 --steps 12 --seconds 30     the demo base

    trl                    its defaults: bfloat16, 8 padded rows a batch, rows cut at 1,024 tokens, layers recomputed
    trl, packing           the same with `packing=True`: sequences of 2,048 tokens, one a batch
    trl in float32, ...    both again in float32, which many processors are faster in
    qtune                  packs of 2,048 tokens, one a batch; all else as the plan chooses

All train the same LoRA on the same NF4 base and the same question/answer rows, for `--steps` steps or to the end of
the first step after `--seconds`. Useful tokens are those that are not padding; the time is the training loop's own,
without imports, loading and the rehearsal; the peak is the operating system's figure for the whole process
(`ru_maxrss`). Figures are compared within a round, as the speed of a shared machine drifts. A trial that has not done
its first step within ten times `--seconds` is ended and has no speed.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANK, ALPHA, MAX_TOKENS = 16, 32, 2048
PATIENCE = 10  # times --seconds: for a first step
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Way:
    """One way to train. Without a dtype of its own it is qtune, which chooses that itself."""

    name: str
    dtype: str | None = None
    is_packed: bool = True


QTUNE = Way("qtune")
WAYS = (
    Way("trl", "bfloat16", is_packed=False),
    Way("trl, packing", "bfloat16"),
    Way("trl in float32", "float32", is_packed=False),
    Way("trl in float32, packing", "float32"),
    QTUNE,
)


@dataclass(frozen=True)
class Trial:
    """One training run; `tokens` are useful ones, `planned` the tokens a second that a plan had estimated."""

    tokens: int
    steps: int
    seconds: float
    peak_bytes: int
    planned: float | None

    @property
    def speed(self) -> float | None:
        """Tokens a second; None where no step was done."""
        return self.tokens / self.seconds if self.tokens else None


# ---- inside a trial's own process


class Progress:
    """Writes a line after every step, so that a trial which is ended has said how far it came."""

    def __init__(self, target: Path, most_seconds: float):
        self.target, self.most_seconds, self.steps = target, most_seconds, 0

    def begin(self) -> None:
        self.began = time.perf_counter()
        self._write({"steps": 0, "tokens": 0, "seconds": 0.0})

    def step(self, tokens: int) -> bool:
        """A step is done, and `tokens` so far; whether it should be the last."""
        self.steps += 1
        seconds = time.perf_counter() - self.began
        self._write({"steps": self.steps, "tokens": tokens, "seconds": seconds})
        return seconds >= self.most_seconds

    def note(self, **values: Any) -> None:
        self._write(values)

    def _write(self, values: dict[str, Any]) -> None:
        with self.target.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


def train_with_trl(way: Way, options: argparse.Namespace, progress: Progress) -> None:
    """What a person writes after reading trl's documentation."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            progress.begin()

        def on_log(self, args: object, state: object, control: Any, logs: dict[str, Any], **kwargs: object) -> None:
            if "num_tokens" in logs and "loss" in logs:
                control.should_training_stop |= progress.step(int(logs["num_tokens"]))

    rows = load_dataset("json", data_files=str(options.data), split="train")
    rows = rows.rename_columns({"question": "prompt", "answer": "completion"}).select_columns(["prompt", "completion"])
    dtype = getattr(torch, way.dtype)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    packing = {"packing": True, "max_length": MAX_TOKENS, "per_device_train_batch_size": 1} if way.is_packed else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.base, quantization_config=nf4, dtype=dtype),
            args=SFTConfig(
                output_dir=folder,
                max_steps=options.steps,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                use_cpu=not torch.cuda.is_available(),
                bf16=way.dtype == "bfloat16",
                **packing,
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(options.base),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()


def train_with_qtune(options: argparse.Namespace, progress: Progress) -> None:
    """The same through `import qtune`, which does what `qtune run` does."""
    import qtune
    from qtune.events import Started, StepDone
    from qtune.recipe.schema import Data, Evaluate, Lora, Model, Recipe, Train

    recipe = Recipe(
        name="bench",
        model=Model(base=str(options.base)),
        lora=Lora(rank=RANK, alpha=ALPHA),
        data=Data(
            train=str(options.data),
            format="question-answer",
            held_out_fraction=0,
            max_tokens=MAX_TOKENS,
            on_long="truncate",
        ),
        train=Train(max_steps=options.steps, epochs=100, gradient_accumulation=options.accumulation),
        evaluate=Evaluate(metric="none"),
    )
    with tempfile.TemporaryDirectory() as folder:
        training, tokens = qtune.Training(recipe, Path(folder) / "run"), 0
        for event in training:
            if isinstance(event, Started):
                progress.begin()
            elif isinstance(event, StepDone):
                tokens += event.tokens
                if progress.step(tokens):
                    training.stop()
        plan = json.loads(training.run.folder.plan.read_text(encoding="utf-8"))
    progress.note(planned=plan["speed"]["tokens_per_second"])


# ---- outside of it


def trial(way: Way, options: argparse.Namespace) -> Trial:
    """One run in a process of its own; where that fails, so does this script."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        target = Path(folder) / "progress.jsonl"
        settings = [
            f"--{name}={getattr(options, name)}" for name in ("data", "base", "steps", "seconds", "accumulation")
        ]
        command = [sys.executable, __file__, *settings, "--trial", json.dumps(dataclasses.asdict(way)), str(target)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        impatient = threading.Timer(PATIENCE * options.seconds, end_without_a_step, (child, target))
        impatient.start()
        _, status, usage = os.wait4(child.pid, 0)
        impatient.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        written = [json.loads(line) for line in lines_of(target)]
        if child.returncode != 0 and not (child.returncode == -9 and len(written) == 1):
            said.seek(0)
            sys.exit(f"{way.name} failed:\n{said.read()[-3000:]}")
    last = [line for line in written if "steps" in line][-1]
    planned = next((line["planned"] for line in written if "planned" in line), None)
    return Trial(last["tokens"], last["steps"], last["seconds"], usage.ru_maxrss * 1024, planned)


def end_without_a_step(child: "subprocess.Popen[bytes]", target: Path) -> None:
    """What begins takes a line, a step another."""
    if len(lines_of(target)) == 1:
        child.kill()


def lines_of(target: Path) -> list[str]:
    return target.read_text(encoding="utf-8").splitlines() if target.is_file() else []


Round = dict[str, Trial]


def report(rounds: Sequence[Round], options: argparse.Namespace) -> str:
    """What was measured, as Markdown: medians, how they compare with qtune within a round, and every trial."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        f"# Beside trl, {date.today().isoformat()}",
        "",
        f"`{options.base.name}` in NF4, LoRA rank {RANK} on all linears, `{options.data.name}`; {options.steps} steps"
        f" or {options.seconds:g} s a trial, {len(rounds)} rounds of all ways by turns; {processor()}. {versions}.",
        "",
        "Useful tokens, without padding; the peak is that of the whole process. Medians; ratios within a round.",
        "",
        "| | tokens/s | peak, MiB | steps | seconds | qtune is as fast, times | qtune's peak, times |",
        "|---|---|---|---|---|---|---|",
        *(line_of(name, rounds) for name in rounds[0]),
        "",
        *against_the_best(rounds),
        *beside_the_plan(rounds),
        "",
        "| round | " + " | ".join(f"{name}, tokens/s | peak, MiB" for name in rounds[0]) + " |",
        "|---|" + "---|---|" * len(rounds[0]),
    ]
    for number, taken in enumerate(rounds, start=1):
        cells = [f"{speed(each.speed)} | {each.peak_bytes / 1024**2:,.0f}" for each in taken.values()]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def line_of(name: str, rounds: Sequence[Round]) -> str:
    trials = [taken[name] for taken in rounds]
    speeds = [each.speed for each in trials if each.speed]
    cells = [
        name,
        speed(statistics.median(speeds) if speeds else None),
        f"{statistics.median(each.peak_bytes for each in trials) / 1024**2:,.0f}",
        f"{statistics.median(each.steps for each in trials):g}",
        f"{statistics.median(each.seconds for each in trials):,.0f}",
        *("" if ratio is None or name == QTUNE.name else f"{ratio:.2f}" for ratio in ratios(name, rounds)),
    ]
    return "| " + " | ".join(cells) + " |"


def ratios(name: str, rounds: Sequence[Round]) -> tuple[float | None, float]:
    """How many times as fast as `name` qtune is, None where that did no step, and how its peak compares."""
    pairs = [(taken[QTUNE.name], taken[name]) for taken in rounds]
    faster = [ours.speed / theirs.speed for ours, theirs in pairs if ours.speed and theirs.speed]
    peak = statistics.median(ours.peak_bytes / theirs.peak_bytes for ours, theirs in pairs)
    return statistics.median(faster) if faster else None, peak


def against_the_best(rounds: Sequence[Round]) -> list[str]:
    """A sentence on the fastest way that is not qtune's."""
    others = {name: ratios(name, rounds) for name in rounds[0] if name != QTUNE.name}
    timed = {name: (faster, peak) for name, (faster, peak) in others.items() if faster is not None}
    if not timed:
        return []
    best = min(timed, key=lambda name: timed[name][0])
    faster, peak = timed[best]
    return [
        f"Against the fastest of them, {best}: {faster:.2f} times the tokens a second at {peak:.2f} times the peak."
    ]


def beside_the_plan(rounds: Sequence[Round]) -> list[str]:
    """A sentence on the time that qtune's plan had estimated."""
    ours = [taken[QTUNE.name] for taken in rounds]
    pairs = [(each.planned, each.speed) for each in ours if each.planned and each.speed]
    if not pairs:
        return []
    estimated = statistics.median(planned for planned, _ in pairs)
    off = statistics.median(planned / measured - 1 for planned, measured in pairs)
    return [f"The plan had estimated {speed(estimated)} tokens/s: {100 * off:+.0f} % off what was measured."]


def speed(tokens_per_second: float | None) -> str:
    if tokens_per_second is None:
        return "no step"
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.1f}"


def processor() -> str:
    """Its name, how many cores, and whether it multiplies bfloat16 itself."""
    from qtune.hardware import cpu_has_bfloat16

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a processor")
    return f"{name}, {os.cpu_count()} cores, bfloat16 {'its own' if cpu_has_bfloat16() else 'emulated'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--base", type=Path, default=ROOT / "qtune" / "demo_base", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each trial")
    parser.add_argument("--seconds", type=float, default=120, help="after which a trial's step is its last")
    parser.add_argument("--accumulation", type=int, default=1, help="packs of 2,048 tokens in a step of qtune")
    parser.add_argument("--only", default="", metavar="NAMES", help="some of the ways, with semicolons between them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the tables go as Markdown")
    parser.add_argument("--trial", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.data, options.base = options.data.resolve(), options.base.resolve()
    if options.trial:
        way, progress = Way(**json.loads(options.trial[0])), Progress(Path(options.trial[1]), options.seconds)
        if way == QTUNE:
            train_with_qtune(options, progress)
        else:
            train_with_trl(way, options, progress)
        return 0
    for path in (options.data, options.base):
        if not path.exists():
            print(f"{path}: is not there.", file=sys.stderr)
            return 2
    sys.path.insert(0, str(ROOT))
    names = [way.name for way in WAYS]
    asked = [name.strip() for name in options.only.split(";") if name.strip()] or names
    unknown = [name for name in asked if name not in names]
    if unknown:
        print(f"--only: there is no {unknown[0]!r}. There are {'; '.join(names)}.", file=sys.stderr)
        return 2
    rounds: list[Round] = []
    for number in range(options.rounds):
        rounds.append({})
        for way in WAYS:
            if way.name in asked or way == QTUNE:
                taken = rounds[-1][way.name] = trial(way, options)
                said = f"{speed(taken.speed)} tokens/s over {taken.steps} steps, {taken.seconds:.0f} s"
                print(f"round {number + 1}, {way.name}: {said}, peak {taken.peak_bytes / 1024**2:,.0f} MiB", flush=True)
    written = report(rounds, options)
    if options.output is not None:
        options.output.write_text(written, encoding="utf-8")
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
