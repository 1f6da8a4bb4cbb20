"""What a plan promises: bytes of disk and seconds a step that a person can work out, the nearest change that fits."""

import pytest
from conftest import tiny_config

from qtune.hardware import Device
from qtune.plan.plan import Plan
from qtune.plan.planner import decide
from qtune.plan.workload import BatchShape, Work
from qtune.recipe.schema import Data, Lora, Model, Recipe, Save, Train
from qtune.units import GIB, MIB

CARD = Device("cuda:0", "RTX 3060", 12 * GIB, 11 * GIB, "bfloat16", "a test", 32 * GIB, 500 * MIB, 25e12)
LINEARS = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 172  # weights of the seven of a layer: q, k and v, o, the MLP
SIDES = 128 + 2 * 96 + 128 + 3 * 236  # inputs and outputs of the seven, which a rank of A and B has a weight for each
HEAD = 262 * 64


def planned(layers: int = 2, rank: int = 16, keep: int = 2, tokens: int = 24, **train: object) -> Plan:
    recipe = Recipe(
        name="t",
        model=Model(base="demo"),
        lora=Lora(rank=rank),
        data=Data(train="rows.jsonl", max_tokens=64),
        train=Train(**{"optimizer": "adamw", **train}),
        save=Save(keep=keep),
    )
    work = Work(tuple(BatchShape.of_one_document(tokens) for _ in range(64)))
    return decide(recipe, CARD, tiny_config(num_hidden_layers=layers), work)


@pytest.mark.parametrize("keep", [1, 2, 7])
def test_the_disk_holds_the_adapter_and_checkpoints_with_an_optimizer(keep: int) -> None:
    """The newest checkpoints, the best one and the one that is being written, and something to spare."""
    trained = 2 * 16 * SIDES
    adapter, optimizer = 4 * trained, 8 * trained
    promised = planned(keep=keep).disk_bytes - 64 * MIB
    assert promised == pytest.approx(adapter + (keep + 2) * (adapter + optimizer), rel=0.05)  # a card rounds sizes up
    averaged = planned(keep=keep, optimizer="schedule_free_adamw").disk_bytes - 64 * MIB
    assert averaged == pytest.approx(adapter + (keep + 2) * (2 * adapter + optimizer), rel=0.05)


def test_a_step_takes_as_long_as_its_arithmetic() -> None:
    """4 operations a frozen weight and token, 6 a trained one, and attention over the document."""
    speed = planned(gradient_accumulation=8, micro_batch=1).speed
    trained = 2 * 16 * SIDES
    attention = 3.5 * 2 * 64 * 2 * 24  # hidden size, layers and tokens
    operations = 4 * (2 * LINEARS + HEAD) + 6 * trained + attention
    assert speed.tokens_per_second == pytest.approx(25e12 / operations / (1 + speed.overhead_fraction), rel=0.02)
    assert speed.step_seconds == pytest.approx(8 * 24 / speed.tokens_per_second)
    assert speed.total_seconds == pytest.approx(8 * speed.step_seconds)  # of 64 sequences


def test_what_is_in_a_step_takes_its_time() -> None:
    one = planned(gradient_accumulation=1, micro_batch=1).speed
    for more in ({"gradient_accumulation": 3, "micro_batch": 1}, {"gradient_accumulation": 1, "micro_batch": 3}):
        assert planned(**more).speed.step_seconds == pytest.approx(3 * one.step_seconds)
    assert planned(tokens=48, gradient_accumulation=1, micro_batch=1).speed.step_seconds > 2 * one.step_seconds


def on_the_cpu(device_bytes: int, rank: int, tokens: int) -> Plan:
    device = Device("cpu", "CPU", device_bytes, device_bytes, "float32", "a test", 20 * GIB)
    recipe = Recipe(
        name="t",
        model=Model(base="demo"),
        lora=Lora(rank=rank),
        data=Data(train="rows.jsonl", max_tokens=64),
        train=Train(micro_batch=1),
    )
    work = Work(tuple(BatchShape.of_one_document(tokens) for _ in range(4)))
    return decide(recipe, device, tiny_config(num_hidden_layers=1), work)


@pytest.mark.long  # five plans, a dozen traces each
def test_a_remedy_is_the_nearest_that_fits() -> None:
    """The longest rows, and the highest of the halves of the rank: more of either does not fit."""
    rank, tokens = 256, 3000
    budget = round(0.97 * on_the_cpu(4 * MIB, rank, tokens).forecast.needed_bytes)
    remedies = on_the_cpu(budget, rank, tokens).remedies
    said = {text.split(" = ")[0]: int(text.split()[2]) for text in remedies if " = " in text}
    assert set(said) == {"data.max_tokens", "lora.rank"}
    assert on_the_cpu(budget, rank, said["data.max_tokens"]).fits
    assert not on_the_cpu(budget, rank, said["data.max_tokens"] + 64).fits
    assert on_the_cpu(budget, said["lora.rank"], tokens).fits
    assert said["lora.rank"] == rank // 2 or not on_the_cpu(budget, 2 * said["lora.rank"], tokens).fits
