"""What a checkpoint holds beside the adapter, as tensors and JSON: the optimizer's state and the random numbers."""

import random
from typing import Any

import numpy
import torch

from qtune import accelerator
from qtune.errors import RunFolderError
from qtune.memory import rng_state
from qtune.train.optimizers import OPTIMIZERS

Tensors = dict[str, torch.Tensor]
CONSTANT = {key for each in OPTIMIZERS.values() for key in each.constant_state}  # made again, not saved


def take_optimizer(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> tuple[Tensors, dict[str, Any]]:
    """The state of every weight: tensors as `NAME:KEY`, and by name what is none. `names` are those of the weights.

    What is paged is no copy: it is to be read before the next step, which no card then works at.
    """
    tensors: Tensors = {}
    others: dict[str, Any] = {}
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and key not in CONSTANT:
                tensors[f"{names[weight]}:{key}"] = accelerator.to_host(value.detach()).contiguous()
            elif not isinstance(value, torch.Tensor):
                others.setdefault(names[weight], {})[key] = value
    return tensors, others


@torch.no_grad()
def put_optimizer_back(
    optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], tensors: Tensors, others: dict[str, Any]
) -> None:
    """Give `optimizer` the state that `take_optimizer` took, in memory of its own kind, paged where that is paged.

    A weight without state is one that never had a gradient, such as Phi-4's adapters for pictures, in runs of text.
    Changes the weights' gradients, which must be set anew. Raises RunFolderError for the state of another optimizer.
    """
    held = {name.rpartition(":")[0] for name in tensors} | others.keys()
    _make_state(optimizer, {weight for weight, name in names.items() if name in held or not held})
    if hasattr(optimizer, "eval"):  # as it was taken
        optimizer.eval()
    wanted = {
        f"{names[weight]}:{key}": value
        for weight, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in CONSTANT
    }
    if {name: (value.shape, value.dtype) for name, value in wanted.items()} != {
        name: (value.shape, value.dtype) for name, value in tensors.items()
    }:
        raise RunFolderError(
            "The checkpoint holds the state of another optimizer, or of other weights, than the recipe's."
        )
    accelerator.copy_each(list(wanted.values()), [tensors[name] for name in wanted])
    for weight, state in optimizer.state.items():
        state.update(others.get(names[weight], {}))


def _make_state(optimizer: torch.optim.Optimizer, weights: set[torch.Tensor]) -> None:
    """Have the optimizer make the state of `weights` as in its first step, here one of gradient 0 and rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight) if weight in weights else None
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        for weight in group["params"]:
            weight.grad = None


def take_random(device: torch.device) -> tuple[Tensors, dict[str, Any]]:
    """The state of every generator in this process: torch's as tensors, Python's and numpy's as JSON."""
    noted = rng_state.note(device)
    tensors = {"host": noted.host} | ({} if noted.device is None else {"device": noted.device})
    version, words, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    return tensors, {"python": [version, list(words), gauss], "numpy": [name, list(map(int, keys)), *rest]}


def put_random_back(device: torch.device, tensors: Tensors, others: dict[str, Any]) -> None:
    rng_state.wind_back(rng_state.RandomState(tensors["host"], tensors.get("device")), device)
    version, words, gauss = others["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = others["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
