"""What a checkpoint holds beside the adapter: optimizer state and random numbers, there and back to the bit."""

import json
import random

import bitsandbytes
import numpy
import pytest
import torch

from qtune.errors import RunFolderError
from qtune.train import optimizers
from qtune.train.optimizer_state import put_optimizer_back, put_random_back, take_optimizer, take_random

CPU = torch.device("cpu")
OF_TRANSFORMERS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}
STEPS = 6


class Fitting:
    """Two weights, one large enough for 8 bits and one that is not, and steps on gradients that a seed draws. The rate
    differs from step to step, as a schedule makes it."""

    def __init__(self, kind: str, rate: float = 1e-2):
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((64, 80), (7, 1))]
        self.names = {weight: f"w{i}" for i, weight in enumerate(self.weights)}
        made, settings = optimizers.OPTIMIZERS[kind].made_with(rate, STEPS) or (OF_TRANSFORMERS[kind], {"lr": rate})
        self.optimizer = made(self.weights, **settings, weight_decay=0.01)

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for weight in self.weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.param_groups[0]["lr"] = rate * (1 - number / STEPS)
        self.optimizer.step()
        self.optimizer.param_groups[0]["lr"] = rate

    def be_the_result(self) -> None:
        """As the trainer does before it scores and saves."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()


@pytest.mark.parametrize("kind", optimizers.OPTIMIZERS)
def test_an_optimizer_goes_on_to_the_bit(kind: str) -> None:
    """Stopped after three of six steps; the one that was not stopped was not looked at before its end, either."""
    alone, stopped, resumed = Fitting(kind), Fitting(kind), Fitting(kind)
    for number in range(STEPS):
        alone.step(number)
    for number in range(3):
        stopped.step(number)
    stopped.be_the_result()
    tensors, others = take_optimizer(stopped.optimizer, stopped.names)
    with torch.no_grad():
        for mine, theirs in zip(resumed.weights, stopped.weights, strict=True):
            mine.copy_(theirs)
    weights = [weight.detach().clone() for weight in resumed.weights]
    put_optimizer_back(resumed.optimizer, resumed.names, tensors, json.loads(json.dumps(others)))
    assert all(torch.equal(weight, was) for weight, was in zip(resumed.weights, weights, strict=True))
    assert all(weight.grad is None for weight in resumed.weights)
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [1e-2]
    for number in range(3, STEPS):
        resumed.step(number)
        resumed.be_the_result()
    alone.be_the_result()
    for mine, theirs in zip(resumed.weights, alone.weights, strict=True):
        assert torch.equal(mine, theirs)


def test_eight_bits_are_kept_as_eight_bits_and_paged_memory_stays_paged() -> None:
    stopped, resumed = Fitting("paged_adamw_8bit"), Fitting("paged_adamw_8bit")
    stopped.step(0)
    tensors, others = take_optimizer(stopped.optimizer, stopped.names)
    assert tensors["w0:state1"].dtype == torch.uint8
    assert tensors["w1:state1"].dtype == torch.float32
    assert not any(name.endswith(("qmap1", "qmap2")) for name in tensors)
    put_optimizer_back(resumed.optimizer, resumed.names, tensors, others)
    for mine, theirs in zip(resumed.weights, stopped.weights, strict=True):
        now, before = resumed.optimizer.state[mine], stopped.optimizer.state[theirs]
        assert getattr(now["state1"], "is_paged", False) == getattr(before["state1"], "is_paged", False)
        assert now["step"] == before["step"] == 1


def test_a_weight_that_never_had_a_gradient_has_no_state_after_either() -> None:
    """Phi-4's adapters for pictures in runs of text, of which a run could not be gone on with."""
    stopped, resumed = Fitting("adamw"), Fitting("adamw")
    stopped.weights[1].grad = torch.ones(7, 1)
    stopped.optimizer.step()
    tensors, others = take_optimizer(stopped.optimizer, stopped.names)
    put_optimizer_back(resumed.optimizer, resumed.names, tensors, others)
    assert list(resumed.optimizer.state) == [resumed.weights[1]]
    assert torch.equal(resumed.optimizer.state[resumed.weights[1]]["exp_avg"], tensors["w1:exp_avg"])


@pytest.mark.parametrize("other", ["adamw", "adamw_8bit"])
def test_the_state_of_another_optimizer_is_refused(other: str) -> None:
    stopped, resumed = Fitting("adamw" if other == "adamw_8bit" else "adamw_8bit"), Fitting(other)
    stopped.step(0)
    tensors, others = take_optimizer(stopped.optimizer, stopped.names)
    with pytest.raises(RunFolderError, match="state of another optimizer"):
        put_optimizer_back(resumed.optimizer, resumed.names, tensors, others)


def test_the_state_of_other_weights_is_refused() -> None:
    stopped, resumed = Fitting("adamw"), Fitting("adamw")
    stopped.step(0)
    tensors, others = take_optimizer(stopped.optimizer, stopped.names)
    tensors["w0:exp_avg"] = tensors["w0:exp_avg"][:1]
    with pytest.raises(RunFolderError, match="or of other weights"):
        put_optimizer_back(resumed.optimizer, resumed.names, tensors, others)


def draw() -> list[object]:
    return [
        torch.rand(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.normal(),
    ]


def test_every_generator_is_wound_back() -> None:
    random.gauss(0, 1)  # keeps the second of the pair it drew
    numpy.random.normal()
    tensors, numbers = take_random(CPU)
    drawn = draw()
    assert draw() != drawn
    put_random_back(CPU, tensors, json.loads(json.dumps(numbers)))
    assert draw() == drawn
