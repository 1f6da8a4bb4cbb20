"""One training by Unsloth, in a process of its own, as its import changes transformers and trl; not run yet, as no
machine at hand has both its wheels and a card.

    unsloth_trial.py ASKED.json    `base` (a folder), `rows` (token ids), `rank`, `batch`, `steps`, `first`

The last line that it prints is what it measured, as JSON. As its documentation has it: 4-bit loading, its own
recomputation, rows padded in batches.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  (before all that it changes)

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows, batch, steps, first, clock = asked["rows"], asked["batch"], asked["steps"], asked["first"], Clock()
    longest = max(map(len, rows))
    model, tokenizer = FastLanguageModel.from_pretrained(asked["base"], max_seq_length=longest, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model,
        r=asked["rank"],
        lora_alpha=2 * asked["rank"],
        target_modules=LINEARS,
        use_gradient_checkpointing="unsloth",
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            max_length=longest,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            bf16=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    mean = sum(map(len, rows)) / len(rows)  # rows come shuffled: their mean is what a batch has of each
    tokens = mean * batch * (steps - first)
    speed = tokens / (clock.ends[-1] - clock.ends[first - 1])
    print(
        json.dumps(
            {"ran": True, "batch": batch, "tokens_per_second": speed, "peak_bytes": torch.cuda.max_memory_allocated()}
        )
    )


if __name__ == "__main__":
    main()
