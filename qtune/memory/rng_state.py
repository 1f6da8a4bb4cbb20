"""The random numbers of a pass that is run twice: noted before the first time, wound back for the second."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qtune import accelerator


@dataclass(frozen=True)
class RandomState:
    """The state of torch's generators: the host's, and the card's where there is one."""

    host: torch.Tensor
    device: torch.Tensor | None


def note(device: torch.device) -> RandomState:
    return RandomState(torch.get_rng_state(), accelerator.random_state(device))


def wind_back(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state.host)
    if state.device is not None:
        accelerator.set_random_state(state.device, device)


@contextlib.contextmanager
def rewound(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Run with the random numbers of `state`, then go on with those of now; None changes nothing."""
    if state is None:
        yield
        return
    now = note(device)
    wind_back(state, device)
    try:
        yield
    finally:
        wind_back(now, device)
