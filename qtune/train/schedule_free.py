"""AdamW without a schedule: the average of its weights takes the place of a falling rate (arXiv:2405.15682).

    y = (1 - b1) z + b1 x                     where the gradient g is taken
    v <- b2 v + (1 - b2) g^2
    z <- z - lr (g / (sqrt(v / (1 - b2^t)) + eps) + decay y)
    x <- (1 - c) x + c z                      with c = lr^2 / the sum of lr^2 so far, lr the highest so far

x is the result. Kept are y, in the weights themselves, z and v; x is found from y and z. These are the steps of the
authors' own package, `schedulefree` 1.4. That keeps sums in places that no checkpoint of ours reads, changes gradients,
of which a step that is taken again needs the old ones, and comes back from x to y by arithmetic that rounds: here y
is put aside while the model is x, and comes back as it was.

Held less of: nothing; 8 bytes a trained weight as in AdamW, and 4 more while x is scored or saved, in place of the
gradients, which are gone then.
Costs: nothing.
Refuses: a schedule that falls, and weights in bfloat16, in which an average stops to move after some hundred steps.
"""

from collections.abc import Iterable
from typing import Any

import torch


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """The weights are x from `eval` on, and y from `train` or `step` on; both change nothing when called again."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state.get(weight)
                if state and "y" not in state:
                    state["y"] = weight.detach().clone()
                    weight.lerp_(state["z"], 1 - 1 / group["betas"][0])

    @torch.no_grad()
    def train(self) -> None:
        for weight, state in self.state.items():
            if "y" in state:
                weight.copy_(state.pop("y"))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the trainer has none"
        self.train()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    def _move(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, rate, (beta1, beta2) = self.state[weight], group["lr"], group["betas"]
        if not state:
            state.update(z=weight.clone(), v=torch.zeros_like(weight), steps=0, highest=0.0, summed=0.0)
        state["steps"] += 1
        state["highest"] = max(state["highest"], rate)
        state["summed"] += state["highest"] ** 2
        share = state["highest"] ** 2 / state["summed"] if state["summed"] else 0.0
        state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        length = state["v"].div(1 - beta2 ** state["steps"]).sqrt_().add_(group["eps"])
        direction = torch.div(gradient, length, out=length)
        if group["weight_decay"]:
            direction.add_(weight, alpha=group["weight_decay"])
        weight.lerp_(state["z"], share).add_(direction, alpha=rate * (beta1 * (1 - share) - 1))
        state["z"].sub_(direction, alpha=rate)
