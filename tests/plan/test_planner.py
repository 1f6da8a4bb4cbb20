"""The plan: arithmetic a person can redo, and a reason for each choice."""

import json

import pytest
from conftest import tiny_config

from qtune.errors import DoesNotFit, MachineError, ModelError
from qtune.hardware import Device
from qtune.plan.plan import Plan
from qtune.plan.planner import budget_of, decide
from qtune.plan.suggestions import refuse_unless_it_fits
from qtune.plan.workload import BatchShape, Work
from qtune.recipe.schema import Data, Lora, Memory, Model, Recipe, Train

GIB = 1024**3
CARD = Device("cuda:0", "RTX 3060", 12 * GIB, 11 * GIB, "bfloat16", "a test", 32 * GIB, 500 * 1024**2, 25e12)
OLD_CARD = Device("cuda:0", "GTX 1080", 8 * GIB, 7 * GIB, "float16", "a test", 32 * GIB, 500 * 1024**2)
HOST = Device("cpu", "CPU, 2 cores", 24 * GIB, 20 * GIB, "float32", "a test", 20 * GIB)
CONFIG = tiny_config()
SHALLOW = tiny_config(num_hidden_layers=1)


def recipe(memory: dict | None = None, lora: dict | None = None, **train: object) -> Recipe:
    return Recipe(
        name="t",
        model=Model(base="demo"),
        lora=Lora(**(lora or {})),
        data=Data(train="rows.jsonl", max_tokens=64),
        train=Train(**train),
        memory=Memory(**(memory or {})),
    )


def packs(count: int, tokens: int = 24) -> Work:
    return Work(tuple(BatchShape.of_one_document(tokens) for _ in range(count)))


@pytest.mark.parametrize(
    ("train", "count", "steps"),
    [
        ({"gradient_accumulation": 8, "epochs": 1.0}, 16, 2),
        ({"gradient_accumulation": 8, "epochs": 1.0}, 17, 3),  # a last step with what is left
        ({"gradient_accumulation": 8, "epochs": 0.5}, 32, 2),
        ({"gradient_accumulation": 2, "micro_batch": 4, "epochs": 3.0}, 9, 6),
        ({"gradient_accumulation": 1, "epochs": 2.0, "max_steps": 5}, 100, 5),
        ({"gradient_accumulation": 8, "epochs": 1.0}, 1, 1),
        ({"gradient_accumulation": 8, "epochs": 0.001}, 10, 1),
    ],
)
def test_steps(train: dict, count: int, steps: int) -> None:
    assert decide(recipe(**train), CARD, CONFIG, packs(count)).steps == steps


def test_a_plan_of_one_step_has_no_steps() -> None:
    choices = {choice.name: choice for choice in decide(recipe(), CARD, SHALLOW, packs(1)).choices}
    assert choices["steps"].reason == "1 epoch of 1 step over 1 sequence"
    assert choices["learning rate"].reason == "cosine, after 1 step of warm-up"
    assert choices["held-out loss"].value == "every step"


@pytest.mark.parametrize(("device", "dtype"), [(CARD, "bfloat16"), (OLD_CARD, "float16"), (HOST, "float32")])
def test_compute_is_what_the_device_has(device: Device, dtype: str) -> None:
    assert decide(recipe(), device, CONFIG, packs(10)).compute_dtype == dtype


def test_what_the_recipe_says_is_kept() -> None:
    asked = recipe(eval_every=7).model_copy(update={"model": Model(base="demo", compute_dtype="float32")})
    plan = decide(asked, CARD, CONFIG, packs(100))
    assert plan.compute_dtype == "float32"
    assert plan.eval_every == 7


def test_every_choice_has_a_reason_and_the_plan_is_json() -> None:
    plan = decide(recipe(), CARD, CONFIG, packs(1000))
    assert all(choice.value and choice.reason for choice in plan.choices)
    assert json.loads(json.dumps(plan.as_json()))["steps"] == plan.steps
    assert plan.eval_every * 10 >= plan.steps
    assert plan.fits
    assert plan.remedies == ()


def test_unread_data_is_taken_to_be_full() -> None:
    plan = decide(recipe(micro_batch=3), CARD, CONFIG, Work.of_full_sequences(64))
    assert plan.is_assumed
    assert plan.speed.tokens_per_second
    assert Work.of_full_sequences(64).heaviest(3).tokens == 3 * 64


def test_a_budget_is_never_more_than_what_is_free() -> None:
    asked = recipe({"budget": "80GiB", "host_budget": "80GiB"})
    assert budget_of(asked, CARD).device_bytes == CARD.free_bytes
    assert budget_of(asked, CARD).host_bytes == CARD.host_free_bytes
    assert budget_of(recipe(), CARD).host_bytes == round(0.8 * CARD.host_free_bytes)
    assert budget_of(recipe({"budget": "6GiB"}), CARD).device_bytes == 6 * GIB


def plan_within(device_bytes: int, memory: dict | None = None, tokens: int = 300, rank: int = 16) -> Plan:
    device = Device("cpu", "CPU", device_bytes, device_bytes, "float32", "a test", 20 * GIB)
    return decide(recipe(memory, lora={"rank": rank}), device, SHALLOW, packs(16, tokens))


@pytest.mark.long
def test_what_does_not_fit_names_three_changes_that_do() -> None:
    """Applied as written, each of them fits."""
    kept = {"keep_layers": 1}
    budget = round(0.8 * plan_within(GIB, kept | {"tile_tokens": 0}, tokens=1500).forecast.needed_bytes)
    kept |= {"tile_tokens": 0}
    plan = plan_within(budget, kept, tokens=1500)
    assert not plan.fits
    left_open, shorter, larger = plan.remedies
    left_out = next(key for key in kept if left_open.startswith(f"without memory.{key} = {kept[key]}, which"))
    others = {key: value for key, value in kept.items() if key != left_out}
    assert plan_within(budget, others, tokens=1500).fits
    assert plan_within(budget, kept, tokens=int(shorter.split()[2])).fits
    size = larger.removeprefix("a device with ").removesuffix(" free (memory.budget)")
    assert plan_within(GIB, kept | {"budget": size}, tokens=1500).fits
    with pytest.raises(DoesNotFit) as caught:
        refuse_unless_it_fits(recipe(), plan)
    assert caught.value.exit_code == 3
    assert str(caught.value).count("\n  ") == 3
    assert "data.max_tokens = 64 takes" in str(caught.value)


@pytest.mark.long
def test_a_host_that_is_too_small_is_what_is_said() -> None:
    """It once named the device, which had room, as what lacked."""
    plan = plan_within(GIB, {"host_budget": "1KiB"})
    assert not plan.fits
    with pytest.raises(DoesNotFit, match=r"takes .* of host memory, of which 1\.0 KiB may be taken\. What would fit"):
        refuse_unless_it_fits(recipe(), plan)
    assert len(plan.remedies) == 1
    size = plan.remedies[0].split(" of host")[0]
    assert plan_within(GIB, {"host_budget": size}).fits


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"stream_layers": 1}, "memory.stream_layers = 1 would keep"),
        ({"checkpoints": "host", "keep_layers": 0}, 'memory.checkpoints = "host" would keep'),
        (
            {"embedding": "host", "stream_layers": 1},
            'memory.stream_layers = 1 and memory.embedding = "host" would keep',
        ),
    ],
)
def test_less_host_memory_than_was_asked_to_pin_is_refused(memory: dict, words: str) -> None:
    """It was once left out without a word, the plan saying that the recipe wanted it so."""
    undo = plan_within(GIB).forecast.host["undo copy of the adapter"]
    with pytest.raises(MachineError) as caught:
        plan_within(GIB, memory | {"host_budget": f"{undo // 1024 + 1}KiB"})
    assert words in str(caught.value)
    assert "in host memory, and" in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "words"), [(3, "does not divide the 2 key/value heads; 2 would"), (4, "does not divide")]
)
def test_groups_that_are_no_whole_heads_are_refused(groups: int, words: str) -> None:
    with pytest.raises(ModelError, match=f"memory.head_groups = {groups} {words}"):
        plan_within(GIB, {"head_groups": groups})
