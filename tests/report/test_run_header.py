"""A run before it begins, in three lines."""

from typing import Any

import pytest
from made_events import DATA
from test_plan_table import plan_json, shown

from qtune.plan.plan import Choice
from qtune.report.plan_table import brief

CHOICES = (
    Choice("base", "NF4, double quantisation", "model.quantization"),
    Choice("adapter", "LoRA, rank 16, scale 2, 33.0M weights (0.8 %) in float32", "lora"),
)
QUIET: dict[str, Any] = {**DATA, "dropped": [], "truncated_rows": 0, "duplicate_rows": 0, "notices": []}


def test_three_lines_where_all_is_well() -> None:
    text = shown(brief("medical", "Qwen/Qwen3-4B-Instruct", QUIET, plan_json(choices=CHOICES)), 220)
    assert text == (
        "medical   Qwen/Qwen3-4B-Instruct · NF4, double quantisation · LoRA, rank 16, scale 2, 33.0M weights (0.8 %) in"
        " float32\n"
        "data      2,850 rows, 148 held out · 412k tokens, 286k trained · longest 1,911\n"
        "plan      fits   5.7 GiB of 7.0 GiB on RTX 4060, 1.3 GiB to spare; 672 MiB of 20 GiB host memory · recompute"
        " layers, 32 of 32 · checkpoints in host memory · 500 steps, about 1 h 30 min · 230 MiB of disk"
    )


def test_what_was_left_out_is_counted_and_then_explained() -> None:
    text = shown(brief("medical", "demo", DATA, plan_json(choices=CHOICES)), 100)
    assert "longest 1,911 · 14 cut · 2 dropped" in text
    for note in ("the answer is empty (rows.jsonl:17", "14 rows cut", "no system role"):
        assert note in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_is_lost_at_any_width(width: int) -> None:
    text = shown(brief("medical", "demo", DATA, plan_json(choices=CHOICES)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "of disk" in " ".join(text.split())


def test_one_is_one() -> None:
    text = shown(brief("one", "demo", {**QUIET, "train_rows": 1}, plan_json(choices=CHOICES, steps=1)), 200)
    assert "1 row, 148 held out" in text
    assert "1 step, about" in text
