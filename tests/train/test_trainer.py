"""What the trainer counts, and which rows it blames; the steps themselves are in test_loop.py."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_models import on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.data.packing import collate
from qtune.errors import TrainingDiverged
from qtune.events import Event, Notice
from qtune.hardware import find_device
from qtune.memory.engine import Engine
from qtune.memory.memory_report import Ledger
from qtune.memory.oom_recovery import Recovery, unheard
from qtune.model import adapter, base
from qtune.model.tokenizer import load_tokenizer
from qtune.plan.planner import decide
from qtune.plan.workload import Work
from qtune.recipe.schema import Data, Lora, Model, Recipe, Train
from qtune.train.callbacks import Reporter
from qtune.train.learner import Learner
from qtune.train.replicas import tokens_in
from qtune.train.rows import TrainingRows
from qtune.train.trainer import Descent, Meter, MeteredTrainer, sft_config

IDS = [[5, 6, 7, number] for number in range(8, 20)]
PACKS = [{"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": [4]} for ids in IDS]


def test_a_meter_is_the_same_in_another_process_but_for_the_clock() -> None:
    meter = Meter(tokens=7, steps=2, loss=3.5, since=time.perf_counter() - 10)
    values = meter.as_json()
    assert values["since"] == pytest.approx(10, abs=0.5)
    back = Meter.from_json(values)
    assert back.since == pytest.approx(meter.since, abs=0.5)
    assert (back.tokens, back.steps, back.loss) == (7, 2, 3.5)


def test_a_meter_counts_all_tokens_and_those_with_a_label() -> None:
    meter = Meter()
    for pack in PACKS[:2]:
        meter.count(*tokens_in([collate([pack])]))
    assert (meter.tokens, meter.trained_tokens) == (8, 6)


def trainer(tiny_base: Path, folder: Path, **train: str) -> MeteredTrainer:
    settings = Train(learning_rate=3e-3, gradient_accumulation=2, micro_batch=3, max_steps=2, **train)
    recipe = Recipe(
        name="t", model=Model(base=str(tiny_base)), lora=Lora(rank=4), data=Data(train="rows.jsonl"), train=settings
    )
    plan = decide(recipe, find_device(), base.read_config(recipe.model), Work.of_rows(PACKS))
    model = adapter.attach(base.load_base(recipe.model, "cpu", "float32"), recipe.lora, 0)
    loaded = on_cpu(model, load_tokenizer(recipe.model))
    learner = Learner(loaded, Engine(model), Recovery(), Ledger.begin(plan.device))

    def places(numbers: Sequence[int]) -> list[str]:
        return [f"rows.jsonl:{number}" for number in numbers]

    rows, descent = TrainingRows(PACKS, places=places), Descent.of(recipe, plan)
    return MeteredTrainer(learner, sft_config(recipe, plan, folder), descent, rows, None)


@pytest.fixture(scope="module")
def built(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> MeteredTrainer:
    return trainer(tiny_base, tmp_path_factory.mktemp("built"))


def test_the_rehearsals_optimizer_pages_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """What bitsandbytes pages it never gives back, and a rehearsal throws its state away, again for every rung."""
    paging = trainer(tiny_base, tmp_path, optimizer="paged_adamw_8bit")
    large = torch.empty(200_000, device="meta")  # on the processor nothing is paged anyway
    assert paging.optimizer_of_its_own().get_state_buffer(large, torch.uint8).device.type == "meta"
    assert paging.create_optimizer().is_paged


def test_it_is_built_whole(built: MeteredTrainer) -> None:
    assert built.train_dataset is PACKS
    assert len(built.order) == len(PACKS)
    assert not built.has_begun
    assert built.may_drop
    assert 0 <= built.seconds < 60


def test_a_loss_that_is_no_number_names_the_rows_of_its_step(built: MeteredTrainer) -> None:
    rows = built.order.of_epoch(0)[:6]
    said = str(built.diverged("loss"))
    assert said.startswith("Step 1: the loss is not a finite number, so the step was not taken.")
    assert f"It was made of {', '.join(f'rows.jsonl:{row}' for row in rows[:5])} and 1 more." in said
    assert "train.learning_rate is 0.003" in said


def test_the_seconds_before_a_break_count(built: MeteredTrainer) -> None:
    built.start_clock(100.0)
    assert 100 <= built.seconds < 160
    built.start_clock(0.0)


def test_an_optimizer_of_its_own_is_not_kept(built: MeteredTrainer) -> None:
    optimizer = built.optimizer_of_its_own()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert built.optimizer is None


def test_the_loss_of_a_batch_says_how_far_its_step_has_come(built: MeteredTrainer) -> None:
    built.begin_step("The rehearsal")
    assert built.open_step.phase == "forward pass"
    loss = built.loss_of(collate(PACKS[:1]))
    assert torch.isfinite(loss)
    assert built.open_step.phase == "backward pass"


def test_what_a_dropped_step_changed_is_put_back(built: MeteredTrainer) -> None:
    built.meter.tokens = 11
    built._note_standing()
    expected = torch.rand(3)
    built.meter.tokens = 99
    torch.rand(5)
    built.put_standing_back()
    assert built.meter.tokens == 11
    assert torch.equal(torch.rand(3), expected)


def test_a_gradient_that_is_no_number_ends_training_but_where_a_scaler_skips_the_step(built: MeteredTrainer) -> None:
    """In float16 the first steps overflow as a rule, until the scale has been halved often enough."""
    reporter = Reporter(built, None, unheard)
    weight = next(adapter.trained_parameters(built.model))
    patch = pytest.MonkeyPatch()
    try:
        for gradient, fp16, ends in ((1.0, False, False), (math.inf, True, False), (math.nan, False, True)):
            weight.grad = torch.full_like(weight, gradient)
            built.begin_step("Step 1")
            settings = replace(built.args, fp16=fp16, bf16=False)
            patch.setattr(built, "args", settings)
            with pytest.raises(TrainingDiverged, match="the gradient is not a finite") if ends else nullcontext():
                reporter.on_pre_optimizer_step(settings, built.state, built.control)
    finally:
        patch.undo()
        weight.grad = None


class Waits(TorchDispatchMode):
    """What would make this thread wait for a card: values that the host wants, and shapes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_neither_loss_nor_labels_of_a_micro_batch_wait_for_a_card(built: MeteredTrainer) -> None:
    """The loss was asked for after every micro-batch, and its labelled positions were found on the card."""
    built.begin_step("Step 1")
    batch = built._prepare_inputs(collate(PACKS[:1]))
    assert batch["labelled"].tolist() == [0, 1, 2]
    with Waits() as waits:
        built.step_loss += built.loss_of(batch)
    assert waits.names == ["_local_scalar_dense"]  # transformers looks whether positions begin anew in a row


@pytest.mark.parametrize("fp16", [False, True])
def test_a_loss_that_is_no_number_among_others_ends_its_step(built: MeteredTrainer, fp16: bool) -> None:
    built.begin_step("Step 1")
    batches = [collate(PACKS[:1]), collate(PACKS[1:2])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built, "args", replace(built.args, fp16=fp16, bf16=False))
        built.refuse_unless_finite([torch.ones(2)])
        for batch, value in zip(batches, (math.nan, 1.0), strict=True):
            built.step_loss += built.loss_of(batch).detach() * value
        with pytest.raises(TrainingDiverged, match="the loss is not a finite"):
            built.refuse_unless_finite([torch.ones(2)])


def test_watched_prompts_are_answered_by_what_is_kept_also_without_held_out_rows(built, monkeypatch) -> None:
    """Where an optimizer takes gradients elsewhere than it has come to, they were answered from there."""
    order: list[str] = []

    def answers() -> list[tuple[str, str]]:
        order.append("asked")
        return []

    monkeypatch.setattr(built, "be_the_result", lambda: order.append("the result"))
    Reporter(built, None, unheard, answers=answers).ask(3)
    assert order == ["the result", "asked"]


def test_a_loss_is_said_to_rise_once_it_is_three_times_the_first(built: MeteredTrainer) -> None:
    heard: list[Event] = []
    reporter = Reporter(built, None, heard.append)
    for step, loss in enumerate((1.0, 1.1, 2.9, 0.5), start=1):
        reporter._warn_of_rise(loss, step)
    assert heard == []
    reporter._warn_of_rise(3.1, 5)
    (notice,) = heard
    assert isinstance(notice, Notice)
    assert notice.text.startswith("The loss at step 5 is 3.1, 3.1 times that of the first step.")
    reporter._warn_of_rise(9.0, 6)
    assert len(heard) == 1
