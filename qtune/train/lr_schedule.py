"""The learning rate's schedule: transformers' own, but for a warm-up whose first step does something."""

from collections.abc import Callable
from typing import Any

Rate = Callable[[int], float]


def warming_from_first_step(rate: Rate, warmup_steps: int) -> Rate:
    """`rate` (share of the peak after so many steps done) with step k of n of the warm-up taken at k/n of the peak.

    transformers takes step k at (k - 1)/n, which makes nothing of the first step; the steps behind the warm-up stay
    what they are.
    """
    return lambda done: (done + 1) / warmup_steps if done < warmup_steps else rate(done)


def wind(scheduler: Any, steps: int) -> None:
    """Bring a LambdaLR, and the rates of its optimizer, to where `steps` steps are done."""
    scheduler.last_epoch = steps
    rates = [base * rate(steps) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
