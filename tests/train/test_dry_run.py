"""The worst step first: it leaves nothing behind, it climbs when it must, and every rung trains the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from made_models import on_cpu
from transformers import LlamaForCausalLM

from qtune.data.packing import PackedRow, collate
from qtune.errors import OutOfMemory
from qtune.events import Event, MemoryMeasured, Rehearsed, StepDone
from qtune.hardware import find_device
from qtune.memory.engine import Engine
from qtune.memory.memory_report import Ledger
from qtune.memory.memory_tracker import Peak
from qtune.memory.techniques import STEPS, Techniques
from qtune.model import adapter, base
from qtune.model.tokenizer import load_tokenizer
from qtune.plan import activation_memory
from qtune.plan.ladder import Budget
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.plan.workload import Work
from qtune.recipe.schema import Data, Lora, Memory, Model, Recipe, Train
from qtune.train import dry_run
from qtune.train.dry_run import Rehearsal, rehearse, rehearse_until_it_fits
from qtune.train.learner import Learner
from qtune.train.loop import TrainingSession
from qtune.train.rows import TrainingRows

LAYERS, TOKENS = 2, 600


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide_base")
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=LAYERS, intermediate_size=384, max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rows(count: int, tokens: int) -> list[PackedRow]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        length = tokens - index
        ids = torch.randint(6, 30, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": [length - 8, 8]})
    return made


def recipe_for(folder: Path, memory: dict | None = None, lora: dict | None = None, **train: object) -> Recipe:
    settings = {"learning_rate": 3e-3, "gradient_accumulation": 1, "max_steps": 3, "epochs": 100.0, **train}
    return Recipe(
        name="t",
        model=Model(base=str(folder), compute_dtype="float32"),
        lora=Lora(rank=8, alpha=16, **(lora or {})),
        data=Data(train="rows.jsonl"),
        train=Train(**settings),
        memory=Memory(**(memory or {})),
    )


def plan_for(recipe: Recipe, train: list[PackedRow]) -> Plan:
    return decide(recipe, find_device(), base.read_config(recipe.model), Work.of_rows(train))


def run(
    recipe: Recipe, folder: Path, train: list[PackedRow], plan: Plan | None = None
) -> tuple[torch.nn.Module, list[Event]]:
    events: list[Event] = []
    plan = plan or plan_for(recipe, train)
    ledger = Ledger.begin(plan.device)
    model = adapter.attach(base.load_base(recipe.model, "cpu", "float32"), recipe.lora, recipe.train.seed)
    engine = Engine(model)
    engine.switch_to(plan.techniques)
    learner = Learner.of(on_cpu(model, load_tokenizer(recipe.model)), engine, ledger, plan, events.append)
    TrainingSession(recipe, plan, learner, TrainingRows(train), events.append).run()
    return model, events


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def rehearsed(events: list[Event]) -> Rehearsed:
    return next(event for event in events if isinstance(event, Rehearsed))


@pytest.mark.parametrize(
    "train",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"gradient_accumulation": 2, "optimizer": "adamw", "weight_decay": 0.1},
    ],
)
def test_a_run_is_the_same_to_the_bit_with_and_without(tiny_base: Path, tmp_path: Path, train: dict) -> None:
    """Dropout draws the same random numbers too."""
    runs = [
        run(recipe_for(tiny_base, {"rehearse": on}, {"dropout": 0.1}, **train), tmp_path, rows(6, 60))
        for on in (True, False)
    ]
    assert losses(runs[0][1]) == losses(runs[1][1])
    assert not any(isinstance(event, Rehearsed) for event in runs[1][1])
    for with_it, without in zip(*(adapter.trained_parameters(model) for model, _ in runs), strict=True):
        assert torch.equal(with_it, without)


def test_it_says_what_it_held_beside_the_forecast(tiny_base: Path, tmp_path: Path) -> None:
    _, events = run(recipe_for(tiny_base), tmp_path, rows(6, 100))
    told = rehearsed(events)
    assert told.measured_bytes == pytest.approx(told.forecast_bytes, rel=0.01)
    assert told.climbed == ()
    phases = [event for event in events if isinstance(event, MemoryMeasured) and event.is_rehearsal]
    assert {"rehearsed forward", "rehearsed loss", "rehearsed step"} <= {event.phase for event in phases}
    assert max(event.peak_bytes for event in phases) == told.measured_bytes
    for event in phases:
        assert sum(size for _, size in event.parts) == event.peak_bytes


def rehearse_once(folder: Path, poison: bool = False) -> tuple[torch.nn.Module, torch.optim.Optimizer, list, Rehearsal]:
    recipe = recipe_for(folder)
    model = adapter.attach(base.load_base(recipe.model, "cpu", "float32"), recipe.lora, 0)
    engine = Engine(model)
    trained = list(adapter.trained_parameters(model))
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.01)
        if poison:
            model.get_base_model().model.norm.weight.fill_(float("nan"))
    before = [parameter.clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    model.eval()

    def loss_of(batch: dict) -> torch.Tensor:
        return model(**batch, fused_loss=True).nats

    found = rehearse(model, engine, optimizer, collate(rows(1, 40)), loss_of, True, find_device())
    return model, optimizer, before, found


@pytest.mark.parametrize("poison", [False, True], ids=["a loss", "no number"])
def test_nothing_is_left_of_it(tiny_base: Path, poison: bool) -> None:
    """A loss that was no number once left an adapter that was none either, before the first step could say so."""
    state = torch.get_rng_state()
    model, optimizer, before, _ = rehearse_once(tiny_base, poison)
    torch.manual_seed(0)
    assert state.shape == torch.get_rng_state().shape
    assert not model.training
    assert not optimizer.state
    for parameter, was in zip(adapter.trained_parameters(model), before, strict=True):
        assert torch.equal(parameter, was)
        assert parameter.grad is None


def test_random_numbers_go_on_where_they_were(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtune.memory import rng_state

    noted = []
    original = rng_state.note
    monkeypatch.setattr(rng_state, "note", lambda device: noted.append(original(device)) or noted[-1])
    rehearse_once(tiny_base)
    assert torch.equal(torch.get_rng_state(), noted[0].host)


def test_a_wrong_forecast_climbs_and_says_so(wide_base: Path, tmp_path: Path) -> None:
    """The plan is told that half of what it needs is there, and to begin with nothing switched on."""

    recipe, train = recipe_for(wide_base), rows(3, 300)
    plan = plan_for(recipe, train)
    plain = losses(run(recipe, tmp_path, train, plan)[1])
    wrong = replace(plan, budget=Budget(plan.forecast.device_bytes * 2 // 3, plan.budget.host_bytes))
    _, events = run(recipe, tmp_path, train, wrong)
    told = rehearsed(events)
    assert told.climbed[0] == "recompute layers"
    assert told.measured_bytes <= wrong.budget.device_bytes < told.forecast_bytes
    assert losses(events) == pytest.approx(plain, abs=1e-3)


def test_a_second_rehearsal_counts_what_the_first_would_have(wide_base: Path) -> None:
    """Buffers in host memory that the first had made were once counted as the device's."""
    recipe = recipe_for(wide_base)
    model = adapter.attach(base.load_base(recipe.model, "cpu", "float32"), recipe.lora, 0)
    engine = Engine(model)
    engine.switch_to(Techniques(LAYERS, True))
    optimizer = torch.optim.AdamW(list(adapter.trained_parameters(model)))
    batch = collate(rows(1, 100))
    found = [
        rehearse(model, engine, optimizer, batch, lambda b: model(**b, fused_loss=True).nats, True, find_device())
        for _ in range(2)
    ]
    assert found[0].peaks == found[1].peaks


def script(*ends: object) -> tuple[Callable[[], Rehearsal], list[str]]:
    """A rehearsal that ends in turn as `ends` say: in so many bytes or an exception; and what happened."""
    log, left = [], list(ends)

    def run_once() -> Rehearsal:
        end = left.pop(0)
        log.append("run")
        if isinstance(end, Exception):
            raise end
        return Rehearsal({"loss": Peak({"allocated": end})})

    return run_once, log


def test_what_runs_out_climbs_until_it_fits() -> None:
    run_once, log = script(torch.OutOfMemoryError("CUDA out of memory."), 12, MemoryError(), 9)
    rungs = iter(["a", "b", "c", "d"])
    found, climbed = rehearse_until_it_fits(run_once, 10, lambda: next(rungs), lambda: log.append("forget"))
    assert (found.device_bytes, climbed) == (9, ["a", "b", "c"])
    assert log == ["run", "forget"] * 3 + ["run"]


def test_with_nothing_left_it_ends_before_a_step_is_taken() -> None:
    run_once, _ = script(MemoryError(), MemoryError())
    rungs = iter(["a"])
    with pytest.raises(OutOfMemory, match=r"no memory technique is left to switch on\. No step was taken"):
        rehearse_until_it_fits(run_once, 10, lambda: next(rungs, None), lambda: None)


def test_more_than_the_budget_that_the_device_could_hold_is_let_through() -> None:
    found, climbed = rehearse_until_it_fits(script(12, 11)[0], 10, iter(["a", None]).__next__, lambda: None)
    assert (found.device_bytes, climbed) == (11, ["a"])


def test_holes_between_tensors_count_against_the_budget() -> None:
    ends = iter([Rehearsal({"loss": Peak({"allocated": 8})}, 12), Rehearsal({"loss": Peak({"allocated": 7})}, 9)])
    found, climbed = rehearse_until_it_fits(lambda: next(ends), 10, lambda: "a", lambda: None)
    assert (found.reserved_bytes, climbed) == (9, ["a"])


def test_a_card_tells_what_its_allocator_took(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most of the phases, each counted anew; what loading left is given back before."""
    taken = iter([500, 900, 700])
    freed = []
    answers = {"synchronize": None, "count_anew": None, "most_allocated_bytes": 400}
    for name, answer in answers.items():
        monkeypatch.setattr(dry_run.accelerator, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(dry_run.accelerator, "most_reserved_bytes", lambda device: next(taken), raising=False)
    monkeypatch.setattr(dry_run.accelerator, "free_cached_memory", lambda: freed.append(True))
    monkeypatch.setattr(dry_run, "_by_counting", dry_run._on_a_card)
    assert rehearse_once(tiny_base)[3].reserved_bytes == 900
    assert freed == [True]


def test_another_fault_is_not_taken_for_memory() -> None:
    with pytest.raises(ValueError, match="no"):
        rehearse_until_it_fits(script(ValueError("no"))[0], 10, lambda: "a", lambda: None)


@pytest.mark.long
def test_every_rung_trains_the_same(wide_base: Path, tmp_path: Path) -> None:
    """Budgets that end at each rung in turn, two steps of each, and the largest batch within the budget as measured."""
    recipe, train = recipe_for(wide_base, max_steps=2), rows(2, TOKENS)
    forecasts = activation_memory.forecaster(base.read_config(recipe.model), recipe, "float32", None, 0)
    heaviest, techniques = Work.of_rows(train).heaviest(1), Techniques()
    plan = plan_for(recipe, train)
    assert plan.techniques == techniques
    plain = losses(run(recipe, tmp_path, train, plan)[1])
    for step in STEPS:
        techniques = step.up(techniques, forecasts.standing)
        forecast = forecasts.forecast(techniques, heaviest, accumulates=False)
        within = Budget(round(1.01 * forecast.device_bytes), plan.budget.host_bytes)
        rung = replace(plan, techniques=techniques, forecast=forecast, budget=within, reserve=())
        events = run(recipe, tmp_path, train, rung)[1]
        told = rehearsed(events)
        assert told.measured_bytes <= within.device_bytes, step.name
        assert told.climbed == ()
        assert losses(events) == pytest.approx(plain, abs=1e-5), step.name


def test_a_budget_in_the_recipe_decides_what_is_climbed(wide_base: Path, tmp_path: Path) -> None:
    train = rows(2, 300)
    recipe = recipe_for(wide_base, max_steps=2)
    roomy, least = plan_for(recipe, train), plan_for(recipe_for(wide_base, {"keep_layers": 0}, max_steps=2), train)
    assert least.techniques == Techniques(LAYERS)
    needed = (roomy.forecast.device_bytes + least.forecast.device_bytes) // 2
    asked = recipe_for(wide_base, {"budget": f"{needed // 1024}KiB"}, max_steps=2)
    plan = plan_for(asked, train)
    assert plan.techniques == Techniques(plan.techniques.recomputed_layers)
    assert plan.techniques.recomputed_layers > 0
    told = run(asked, tmp_path, train, plan)[1]
    assert rehearsed(told).climbed == ()
    assert losses(told) == pytest.approx(losses(run(recipe, tmp_path, train, roomy)[1]), abs=1e-5)
