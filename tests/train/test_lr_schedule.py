"""The rate of every step, beside the schedules of transformers, whose warm-up is another."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import get_scheduler

from qtune.recipe.schema import Train
from qtune.train.lr_schedule import rate_of, wind

STEPS, PEAK = 24, 2e-4
# What transformers calls each, with what it has to be told; a floor that it does not have is put in by hand.
THEIRS: dict[str, tuple[dict, str, Callable[[int], dict]]] = {
    "cosine": ({}, "cosine", lambda span: {}),
    "linear": ({}, "linear", lambda span: {}),
    "constant": ({}, "constant_with_warmup", lambda span: {}),
    "cosine to a floor": (
        {"schedule": "cosine", "floor_fraction": 0.1},
        "cosine_with_min_lr",
        lambda span: {"min_lr_rate": 0.1},
    ),
    "cosine_restarts": ({"cycles": 4}, "cosine_with_restarts", lambda span: {"num_cycles": 4}),
    "wsd": (
        {"decay_fraction": 0.25, "floor_fraction": 0.05},
        "warmup_stable_decay",
        lambda span: {"num_decay_steps": min(span, 6), "decay_type": "1-sqrt", "min_lr_ratio": 0.05},
    ),
}


def scheduler(rate: Callable[[int], float]) -> torch.optim.lr_scheduler.LambdaLR:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    made = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0)
    made.lr_lambdas = [rate]
    wind(made, 0)
    return made


def theirs(name: str, warmup_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    _, called, told = THEIRS[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    more = told(STEPS - warmup_steps) or None
    return get_scheduler(called, optimizer, warmup_steps, STEPS, scheduler_specific_kwargs=more)


@pytest.mark.parametrize("warmup_steps", [0, 1, 4, STEPS])
@pytest.mark.parametrize("name", THEIRS)
def test_the_first_step_does_something_and_those_after_the_warm_up_are_as_in_transformers(name, warmup_steps) -> None:
    """The first step of a warm-up had the rate 0: of three steps, a third was nothing."""
    train = Train(**{"schedule": name, **THEIRS[name][0]})
    other, ours = theirs(name, warmup_steps), scheduler(rate_of(train, STEPS, warmup_steps))
    for step in range(1, STEPS + 1):
        (rate,), (before,) = ours.get_last_lr(), other.get_last_lr()
        assert ours.optimizer.param_groups[0]["lr"] == rate > 0
        assert rate == pytest.approx(PEAK * step / warmup_steps if step <= warmup_steps else before)
        for each in (ours, other):
            each.optimizer.step()
            each.step()


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_rates_of_before_there_was_a_floor_are_the_same_to_the_bit(name: str) -> None:
    ours, other = rate_of(Train(schedule=name), STEPS, 5), theirs(name, 5)
    assert [ours(done) for done in range(5, STEPS)] == [other.lr_lambdas[0](done) for done in range(5, STEPS)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "cosine_restarts"])
def test_a_schedule_ends_at_its_floor_and_never_goes_below(name: str) -> None:
    rate = rate_of(Train(schedule=name, floor_fraction=0.3), STEPS, 3)
    rates = [rate(done) for done in range(3, STEPS)]
    assert rates[0] == max(rates) == 1.0
    assert min(rates) >= 0.3
    assert rate(STEPS) == 0.3


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "cosine_restarts", "constant"])
def test_the_shortest_runs_have_a_rate(name: str, steps: int) -> None:
    for warmup_steps in range(steps + 1):
        rate = rate_of(Train(schedule=name), steps, warmup_steps)
        assert all(0 < rate(done) <= 1 for done in range(steps))


def test_restarts_begin_at_the_peak_again() -> None:
    rate = rate_of(Train(schedule="cosine_restarts", cycles=3), STEPS, 0)
    assert [done for done in range(STEPS) if rate(done) == 1.0] == [0, 8, 16]
    assert math.isclose(rate(7), 0.5 * (1 + math.cos(math.pi * 7 / 8)))
