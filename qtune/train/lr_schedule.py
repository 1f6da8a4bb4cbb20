"""The learning rate's schedules: at what share of its peak each step is taken.

Step k of n of the warm-up is taken at k/n of the peak; in transformers it is (k - 1)/n, which makes nothing of the
first step. From there cosine, linear and constant are those of transformers. `cosine_restarts` falls several times
(SGDR, arXiv:1608.03983). `wsd` is warm-up, stable, decay (arXiv:2404.06395): it stays at the peak and falls in its last
steps, as 1 - sqrt does from 0 to 1 (arXiv:2405.18392). All that fall do so to a floor.
"""

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qtune.recipe.schema import Train

Rate = Callable[[int], float]


def rate_of(train: "Train", steps: int, warmup_steps: int) -> Rate:
    """The share of the peak at which a step is taken when so many of `steps` are done."""
    span, floor = max(1, steps - warmup_steps), train.floor_fraction
    falling = min(span, math.ceil(train.decay_fraction * steps))

    def height(done: int) -> float:
        """From 1 to 0, `done` of `span` steps after the warm-up."""
        if train.schedule == "linear":
            return (span - done) / span
        if train.schedule == "wsd":
            return 1.0 - math.sqrt(max(0, done - (span - falling)) / falling)
        turns = train.cycles if train.schedule == "cosine_restarts" else 1
        return 0.5 * (1.0 + math.cos(math.pi * (turns * done % span / span)))

    def rate(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        if train.schedule == "constant":
            return 1.0
        return floor + (1.0 - floor) * (height(done - warmup_steps) if done < steps else 0.0)

    return rate


def quicken(optimizer: torch.optim.Optimizer, weights: Collection[torch.Tensor], ratio: float) -> None:
    """Have `weights` move at `ratio` times the rate of the others, in groups of their own behind theirs: of an
    adapter's B that is LoRA+ (arXiv:2402.12354)."""
    quick = {id(weight) for weight in weights}
    for group in list(optimizer.param_groups):
        apart = [weight for weight in group["params"] if id(weight) in quick]
        if apart:
            group["params"] = [weight for weight in group["params"] if id(weight) not in quick]
            optimizer.add_param_group({**group, "params": apart, "lr": ratio * group["lr"]})


def wind(scheduler: Any, steps: int) -> None:
    """Bring a LambdaLR, and the rates of its optimizer, to where `steps` steps are done."""
    scheduler.last_epoch = steps
    rates = [base * rate(steps) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
