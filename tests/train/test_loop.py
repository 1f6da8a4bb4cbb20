"""Training on the true path: NF4, peft, 8-bit AdamW and trl, on a tiny model."""

import os
import random
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtune.data.packing import PackedRow
from qtune.distributed.ranks import Ranks
from qtune.errors import MachineError, TrainingDiverged
from qtune.evaluate.held_out_loss import held_out_loss, losses_by_source
from qtune.events import Evaluated, Event, Finished, MemoryMeasured, Rehearsed, Started, StepDone, Stopping
from qtune.hardware import find_device
from qtune.memory.engine import Engine
from qtune.memory.memory_report import Ledger
from qtune.model import adapter, base
from qtune.model.loaded import Loaded
from qtune.model.tokenizer import load_tokenizer
from qtune.plan.planner import decide
from qtune.plan.workload import Work
from qtune.recipe.schema import Data, Lora, Memory, Model, Recipe, Train
from qtune.train.learner import Learner
from qtune.train.loop import TrainingSession
from qtune.train.rows import HeldOutLoss, TrainingRows
from qtune.train.schedule_free import ScheduleFreeAdamW
from qtune.train.trainer import Meter, MeteredTrainer

LEARNABLE = "the quick brown fox jumps over the lazy dog"


def rows(count: int, seed: int = 0) -> list[PackedRow]:
    """Packs of two documents of a text a byte model can learn; the first bytes of each are not trained."""
    rng, result = random.Random(seed), []
    for _ in range(count):
        ids, labels, lengths = [], [], []
        for _ in range(2):
            start = rng.randrange(len(LEARNABLE) - 12)
            document = [0, *(6 + ord(c) % 250 for c in LEARNABLE[start : start + rng.randint(8, 12)])]
            ids += document
            labels += [-100, -100, *document[2:]]
            lengths.append(len(document))
        result.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    return result


def recipe_for(folder: Path, model: dict | None = None, memory: dict | None = None, **train: object) -> Recipe:
    """Ten steps, after the last of which alone the held-out loss is measured."""
    often = {"gradient_accumulation": 2, "max_steps": 10, "epochs": 100.0, "eval_every": 10}
    settings = {"learning_rate": 3e-3, **often, **train}
    return Recipe(
        name="t",
        model=Model(base=str(folder), **(model or {})),
        lora=Lora(rank=8, alpha=16),
        data=Data(train="rows.jsonl"),
        train=Train(**settings),
        memory=Memory(**(memory or {})),
    )


def session_of(recipe: Recipe, packs: int = 20, listen=None) -> tuple[TrainingSession, list[Event]]:
    events: list[Event] = []
    train, held_out = rows(packs), rows(6, seed=1)
    plan = decide(recipe, find_device(), base.read_config(recipe.model), Work.of_rows(train))
    ledger = Ledger.begin(plan.device)
    model = adapter.attach(
        base.load_base(recipe.model, plan.device.name, plan.compute_dtype), recipe.lora, recipe.train.seed
    )
    engine = Engine(model)
    engine.switch_to(plan.techniques)
    loaded = Loaded(model, load_tokenizer(recipe.model), plan.device.name, plan.compute_dtype)

    def told(event: Event) -> None:
        events.append(event)
        if listen:
            listen(event)

    measured = HeldOutLoss(
        len(held_out), lambda: losses_by_source(loaded, held_out, ()), lambda: held_out_loss(loaded, held_out[:1])
    )
    learner = Learner.of(loaded, engine, ledger, plan, told)
    return TrainingSession(recipe, plan, learner, TrainingRows(train, measured), told), events


def run(recipe: Recipe, folder: Path, packs: int = 20, listen=None) -> tuple[torch.nn.Module, list[Event]]:
    session, events = session_of(recipe, packs, listen)
    session.run(catches_signals=True)
    return session.learner.loaded.model, events


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def test_it_learns_and_says_so(tiny_base, tmp_path) -> None:
    model, events = run(recipe_for(tiny_base, max_steps=30, eval_every=10), tmp_path)
    held_out = [event.loss for event in events if isinstance(event, Evaluated)]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]
    assert losses(events)[-1] < losses(events)[0] - 0.3
    assert isinstance(next(e for e in events if not isinstance(e, MemoryMeasured | Rehearsed)), Started)
    assert isinstance(events[-1], Finished)
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, 31))
    assert any(isinstance(event, MemoryMeasured) for event in events)
    assert {p.dtype for p in adapter.trained_parameters(model)} == {torch.float32}


def test_tokens_are_counted_without_padding(tiny_base, tmp_path) -> None:
    _, events = run(recipe_for(tiny_base, max_steps=10, gradient_accumulation=2), tmp_path, packs=20)
    steps = [event for event in events if isinstance(event, StepDone)]
    packs = rows(20)
    assert sum(step.tokens for step in steps) == sum(len(pack["input_ids"]) for pack in packs)
    assert sum(step.trained_tokens for step in steps) == sum(x != -100 for pack in packs for x in pack["labels"])


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [
        ({"quantization": "none", "compute_dtype": "float32"}, 1e-6),
        ({"quantization": "nf4", "compute_dtype": "float32"}, 1e-6),
        ({"quantization": "nf4", "compute_dtype": "bfloat16"}, 1e-3),
    ],
)
def test_the_first_ten_losses_are_a_cross_entropy_written_by_hand(
    tiny_base, tmp_path, monkeypatch, model, tolerance
) -> None:
    """Same weights, same tokens, but the logits whole, and the log-softmax and the mean in float64."""
    by_hand: list[float] = []
    sums: list[tuple[float, int]] = []
    original = MeteredTrainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits[0]
        labels = inputs["labels"][0, 1:]
        nats = torch.nn.functional.cross_entropy(logits[:-1].double(), labels, ignore_index=-100, reduction="sum")
        sums.append((nats.item(), int((labels != -100).sum())))
        if len(sums) == self.args.gradient_accumulation_steps:
            by_hand.append(sum(n for n, _ in sums) / sum(c for _, c in sums))
            sums.clear()
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MeteredTrainer, "training_step", spy)
    _, events = run(recipe_for(tiny_base, model=model), tmp_path)
    assert len(by_hand) == 10
    assert losses(events) == pytest.approx(by_hand, abs=tolerance)
    assert by_hand[0] != pytest.approx(by_hand[-1], abs=1e-2)  # the weights did move in between


def test_one_seed_gives_one_run(tiny_base, tmp_path) -> None:
    first, second, other = (
        run(recipe_for(tiny_base, seed=seed), tmp_path / str(i)) for i, seed in enumerate((1, 1, 2))
    )
    assert losses(first[1]) == losses(second[1])
    assert losses(first[1]) != losses(other[1])
    for mine, again in zip(adapter.trained_parameters(first[0]), adapter.trained_parameters(second[0]), strict=True):
        assert torch.equal(mine, again)


def test_batch_and_accumulation_factor_the_same_step(tiny_base, tmp_path) -> None:
    """The loss of a step is a mean over its tokens, however they came: accumulation once weighed batches equally."""
    settings = {"quantization": "none", "compute_dtype": "float32"}
    runs = [
        run(
            recipe_for(
                tiny_base, settings, micro_batch=m, gradient_accumulation=8 // m, max_steps=3, optimizer="adamw"
            ),
            tmp_path / str(m),
            packs=24,
        )[1]
        for m in (1, 2, 8)
    ]
    for events in runs[1:]:
        assert losses(events) == pytest.approx(losses(runs[0]), abs=2e-6)


def test_a_loss_that_is_no_number_stops_before_the_step(tiny_base, tmp_path) -> None:
    """A learning rate of 0.1 cannot blow up so small a model reliably, so a weight is poisoned in mid-run."""
    held: dict[str, torch.nn.Module] = {}
    original = adapter.attach

    def poison(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            held["model"].base_model.model.model.norm.weight.data.fill_(float("nan"))

    def attach(*args):
        held["model"] = original(*args)
        return held["model"]

    adapter.attach = attach
    try:
        with pytest.raises(TrainingDiverged, match="Step 4: the loss is not a finite number"):
            run(recipe_for(tiny_base), tmp_path, listen=poison)
    finally:
        adapter.attach = original
    assert all(torch.isfinite(p).all() for p in adapter.trained_parameters(held["model"]))


@pytest.mark.parametrize(("number", "by"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
@pytest.mark.parametrize(("every", "steps"), [(1, 2), (100, 3)])
def test_a_signal_lets_what_is_under_way_finish_and_ends_training(
    tiny_base, tmp_path, number, by, every, steps
) -> None:
    """After the loss of step 2 that is the held-out loss of step 2, where it is measured, and else step 3."""

    def send(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    _, events = run(recipe_for(tiny_base, eval_every=every), tmp_path, listen=send)
    assert len(losses(events)) == steps
    assert isinstance(events[-1], Finished)
    assert events[-1].steps == steps
    assert [event for event in events if isinstance(event, Stopping)] == [Stopping(by, drops=False)]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("log_every", [1, 3])
def test_the_loss_of_a_step_comes_before_the_held_out_loss_after_it(tiny_base, tmp_path, log_every: int) -> None:
    """The log had the held-out loss of step 1 above the loss of step 1."""
    _, events = run(recipe_for(tiny_base, max_steps=4, eval_every=1, log_every=log_every), tmp_path)
    told = [(type(event), event.step) for event in events if isinstance(event, StepDone | Evaluated)]
    logged = [step for step in range(1, 5) if step % log_every == 0]
    assert told == [
        (kind, step) for step in range(1, 5) for kind in (StepDone, Evaluated) if kind is Evaluated or step in logged
    ]


def test_a_second_signal_drops_the_step_at_once(tiny_base, tmp_path) -> None:
    """In the middle of a step of many batches: it went on to the end of the step or ended with a traceback's words."""
    passes = []

    def count(*args: object) -> None:
        passes.append(args)
        if len(passes) == 2 * 2 + 1:  # the first of step 3, of two each
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "count", count)
        _, events = run(recipe_for(tiny_base, micro_batch=1, gradient_accumulation=2), tmp_path)
    assert len(passes) == 5
    assert len(losses(events)) == 2
    assert events[-1].steps == 2
    stops = [event for event in events if isinstance(event, Stopping)]
    assert stops == [Stopping("Ctrl-C", drops=False), Stopping("Ctrl-C", drops=True)]


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("paged_adamw_8bit", "cosine"),
        ("adamw_8bit", "linear"),
        ("adamw", "constant"),
        ("lion_8bit", "cosine_restarts"),
        ("ademamix_8bit", "wsd"),
        ("muon", "cosine"),
        ("schedule_free_adamw", "constant"),
    ],
)
def test_every_optimizer_and_schedule_takes_its_steps(tiny_base, tmp_path, optimizer, schedule) -> None:
    train = {"optimizer": optimizer, "schedule": schedule, "lora_plus_ratio": 2.0, "warmup_fraction": 0.3}
    _, events = run(recipe_for(tiny_base, **train), tmp_path)
    rates = [event.learning_rate for event in events if isinstance(event, StepDone)]
    assert max(rates) == pytest.approx(3e-3)
    assert rates[0] < rates[2]
    assert (rates[-1] < rates[4]) == (schedule != "constant")
    before = next(event.loss for event in events if isinstance(event, StepDone))
    assert events_of(Evaluated, events)[-1].loss < 0.98 * before


def events_of(kind: type, events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_what_is_scored_and_left_is_the_average_where_the_optimizer_makes_one(tiny_base, monkeypatch) -> None:
    """At every held-out loss, and at the end; the steps between go on from the weights that are trained."""
    made, scored, init = [], [], ScheduleFreeAdamW.__init__

    def noted(self: ScheduleFreeAdamW, *given: Any, **named: Any) -> None:
        init(self, *given, **named)
        made.append(self)

    def is_average() -> bool:
        states = made[-1].state.items()
        return all(torch.allclose(0.9 * weight + 0.1 * state["z"], state["y"], atol=1e-6) for weight, state in states)

    def scoring() -> tuple[float, dict[str, float]]:
        scored.append([weight.detach().clone() for weight in trained])
        assert is_average()
        return session.rows.held_out.of_largest(), {}

    monkeypatch.setattr(ScheduleFreeAdamW, "__init__", noted)
    session, _ = session_of(recipe_for(tiny_base, optimizer="schedule_free_adamw", eval_every=2, max_steps=4))
    trained = list(adapter.trained_parameters(session.learner.loaded.model))
    held_out = HeldOutLoss(6, scoring, session.rows.held_out.of_largest)
    replace(session, rows=replace(session.rows, held_out=held_out)).run()
    assert len(scored) == 2
    assert all(map(torch.equal, scored[-1], trained))
    assert not all(map(torch.equal, scored[0], trained))
    replace(session, rows=replace(session.rows, held_out=None)).run()
    assert is_average()


def test_an_optimizer_that_rounds_by_card_is_refused_on_cards_of_two_kinds(tiny_base) -> None:
    session, _ = session_of(recipe_for(tiny_base, optimizer="muon"))

    class Two(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, "RTX 4090"]

    with pytest.raises(MachineError, match=r"RTX 4090 would no longer train one run"):
        replace(session, ranks=Two()).run()


def test_noise_is_on_the_embeddings_of_training_passes_alone(tiny_base) -> None:
    """The held-out loss before the second step is that of a run without noise whose first step changed nothing."""
    told = {}
    for alpha in (0.0, 50.0):
        recipe = recipe_for(tiny_base, neftune_alpha=alpha, max_steps=2, eval_every=1, learning_rate=1e-12)
        session, events = session_of(recipe)
        session.run()
        told[alpha] = losses(events), [event.loss for event in events_of(Evaluated, events)]
        embedding = session.learner.loaded.model.get_base_model().get_input_embeddings()
        assert not embedding._forward_hooks
    assert told[0.0][1] == told[50.0][1]
    assert all(
        without != pytest.approx(noisy, rel=1e-4) for without, noisy in zip(told[0.0][0], told[50.0][0], strict=True)
    )


def test_noise_is_that_of_its_document_whatever_is_in_the_pass(tiny_base) -> None:
    """In pieces of one document of micro-batches of two packs, and where a pass begins with other random numbers."""
    model = {"quantization": "none", "compute_dtype": "float32"}
    told = []
    for size, pieces in ((1, 1), (2, sys.maxsize)):
        train = {"micro_batch": size, "gradient_accumulation": 4 // size, "max_steps": 2, "neftune_alpha": 50.0}
        session, events = session_of(recipe_for(tiny_base, model, **train))
        session.learner.recovery.pieces = pieces
        torch.manual_seed(size)
        session.run()
        told.append(losses(events))
    assert told[1] == pytest.approx(told[0], rel=1e-5)


@pytest.mark.long  # of single passes: memory/test_gradient_checkpointing.py
def test_recomputing_layers_does_not_change_the_losses(tiny_base, tmp_path) -> None:
    settings = {"quantization": "nf4", "compute_dtype": "float32"}
    with_it, without = (
        losses(run(recipe_for(tiny_base, settings, {"keep_layers": kept}), tmp_path / str(kept))[1]) for kept in (0, 2)
    )
    assert with_it == pytest.approx(without, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_event_set_from_outside_lets_the_step_finish_and_ends_training(tiny_base, tmp_path, steps: int) -> None:
    stop, caught = threading.Event(), signal.getsignal(signal.SIGINT)

    def listen(event: Event) -> None:
        assert signal.getsignal(signal.SIGINT) is caught
        if isinstance(event, StepDone) and event.step == steps:
            stop.set()

    session, events = session_of(recipe_for(tiny_base, eval_every=1), listen=listen)
    fitted = session.run(stop)
    assert (fitted.steps, fitted.was_stopped, fitted.stopped_by) == (steps, True, None)
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, steps + 1))
    assert not any(isinstance(event, Stopping) for event in events)
    assert isinstance(events[-1], Finished)


def test_it_trains_off_the_main_thread_as_on_it(tiny_base, tmp_path) -> None:
    here, told_here = session_of(recipe_for(tiny_base, max_steps=3))
    there, told_there = session_of(recipe_for(tiny_base, max_steps=3))
    here.run()
    thread = threading.Thread(target=there.run)
    thread.start()
    thread.join()
    assert losses(told_there) == losses(told_here)


def weighed(packs: list[PackedRow]) -> list[PackedRow]:
    """Documents that count for different things."""
    return [{**pack, "weights": [0.25 + i % 3, 2.0 - i % 2]} for i, pack in enumerate(packs)]


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [({"gradient_accumulation": 4}, 1), ({"gradient_accumulation": 2, "micro_batch": 2}, 1), ({"micro_batch": 2}, 9)],
)
def test_the_loss_of_a_step_is_the_mean_over_weighed_tokens(tiny_base, settings: dict, pieces: int) -> None:
    """Against a loop over documents with the whole logits in float64; the first step's is the base's own."""
    plain = {"quantization": "none", "compute_dtype": "float32"}
    session, events = session_of(recipe_for(tiny_base, plain, max_steps=1, **settings))
    packs = weighed(session.rows.packs)
    session = replace(session, rows=replace(session.rows, packs=packs))
    session.learner.recovery.pieces = pieces
    model, recipe = session.learner.loaded.model, session.recipe
    first = session.rows.order(0).of_step(1, recipe.train.micro_batch, recipe.train.gradient_accumulation)
    nats = counted = 0.0
    with torch.no_grad():
        for pack in (packs[i] for i in first):
            start = 0
            for length, counts in zip(pack["seq_lengths"], pack["weights"], strict=True):
                ids, labels = (torch.tensor(pack[name][start : start + length]) for name in ("input_ids", "labels"))
                start += length
                scores = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
                for place, label in enumerate(labels[1:].tolist()):
                    if label != -100:
                        nats, counted = nats - counts * float(scores[place, label]), counted + counts
    session.run()
    assert losses(events) == pytest.approx([nats / counted], rel=1e-5)
