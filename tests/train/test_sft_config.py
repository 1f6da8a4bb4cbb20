"""Every setting of a recipe, and every choice of a plan, arrives at trl."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtune.hardware import Device
from qtune.model import base
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.plan.workload import Work
from qtune.recipe.schema import Data, Model, Recipe, Train
from qtune.train.trainer import sft_config
from qtune.units import GIB

TRAIN = Train(
    learning_rate=3e-3,
    weight_decay=0.07,
    max_grad_norm=0.3,
    warmup_fraction=0.5,
    schedule="constant",
    micro_batch=2,
    gradient_accumulation=3,
    max_steps=4,
    seed=11,
    log_every=5,
)
CPU = Device("cpu", "CPU", 64 * GIB, 64 * GIB, "float32", "a test", 64 * GIB, operations_per_second=1e9)


@pytest.fixture(scope="module")
def planned(tiny_base: Path) -> tuple[Recipe, Plan]:
    recipe = Recipe(name="t", model=Model(base=str(tiny_base)), data=Data(train="rows.jsonl"), train=TRAIN)
    work = Work.of_packs([(16,)] * 60, [(i,) for i in range(60)], [8] * 60)
    return recipe, decide(recipe, CPU, base.read_config(recipe.model), work)


def test_what_the_recipe_says_is_what_is_trained_with(planned: tuple[Recipe, Plan], tmp_path: Path) -> None:
    made = sft_config(*planned, tmp_path)
    assert (made.learning_rate, made.weight_decay, made.max_grad_norm) == (3e-3, 0.07, 0.3)
    assert (made.seed, made.data_seed, made.logging_steps) == (11, 11, 5)
    assert made.max_steps == 4
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (2, 3)
    assert made.use_cpu


def test_nothing_is_left_to_trl_that_is_done_here(planned: tuple[Recipe, Plan], tmp_path: Path) -> None:
    made = sft_config(*planned, tmp_path)
    assert not made.gradient_checkpointing
    assert not made.packing
    assert made.max_length is None
    assert made.report_to == []
    assert (made.eval_strategy, made.save_strategy) == ("no", "no")
    assert not made.logging_nan_inf_filter  # it would show the last good loss in place of one that ran away


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_plan_computes_in_the_dtype_it_settled(dtype: str, planned: tuple[Recipe, Plan], tmp_path: Path) -> None:
    recipe, plan = planned
    made = sft_config(recipe, replace(plan, compute_dtype=dtype), tmp_path)
    assert (made.bf16, made.fp16) == (dtype == "bfloat16", dtype == "float16")


def test_one_card_is_trained_on_however_many_are_visible(
    planned: tuple[Recipe, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers takes the first, counts all of them, and trl refuses more than one."""
    recipe, plan = planned
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    second = Device("cuda:1", "a card", 8 * GIB, 8 * GIB, "float16")
    made = sft_config(recipe, replace(plan, device=second), tmp_path)
    assert (made.n_gpu, made.device, current[-1]) == (1, torch.device("cuda:1"), torch.device("cuda:1"))
