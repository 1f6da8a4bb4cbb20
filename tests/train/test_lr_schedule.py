"""The rate of every step, by the schedules of transformers, whose warm-up is ours."""

import pytest
import torch
from transformers import get_scheduler

from qtune.train.lr_schedule import warming_from_first_step, wind
from qtune.train.trainer import SCHEDULES

STEPS, PEAK = 12, 2e-4


def scheduler(name: str, warmup_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    return get_scheduler(SCHEDULES[name], optimizer, num_warmup_steps=warmup_steps, num_training_steps=STEPS)


@pytest.mark.parametrize("warmup_steps", [0, 1, 4, STEPS])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_step_does_something_and_those_after_the_warm_up_are_as_they_were(name: str, warmup_steps) -> None:
    """The first step of a warm-up had the rate 0: of three steps, a third was nothing."""
    theirs, ours = scheduler(name, warmup_steps), scheduler(name, warmup_steps)
    ours.lr_lambdas = [warming_from_first_step(rate, warmup_steps) for rate in ours.lr_lambdas]
    wind(ours, 0)
    for step in range(1, STEPS + 1):
        (rate,), (before,) = ours.get_last_lr(), theirs.get_last_lr()
        assert ours.optimizer.param_groups[0]["lr"] == rate > 0
        assert rate == pytest.approx(PEAK * step / warmup_steps if step <= warmup_steps else before)
        for each in (ours, theirs):
            each.optimizer.step()
            each.step()
