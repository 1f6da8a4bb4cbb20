"""Optimizer steps that are taken whole or not at all.

AdamW goes through the trained weights one after another, in 8 bits or not: what ends it half-way leaves some of them,
and some of its state, a step ahead of the rest. So before each step all of it is copied to the host, and copied back
when the step does not come to its end, be it for want of memory or a second Ctrl-C.

Costs: in host memory, and copied once a step, the trained weights and the optimizer's state. P trained weights take 4P
bytes (2P in bfloat16), their state 8P in AdamW and about 2P in 8 bits. One core copies 10 GB a second: 35 ms for 29
million weights in AdamW, and under 1 % of a step of the tiny model of the tests. From a card it goes into page-locked
memory at the speed of the bus. Paged state is read and written by the processor, and only while the card rests: under
WSL2 a page that the processor touches while the card works ends the process (NVIDIA, CUDA on WSL, "known limitations").
Paged state that is made by a step that fails stays mapped until the process ends.
Refuses: nothing; without host memory for the copy there is no step.
"""

import types
from collections.abc import Callable
from typing import Any

import torch

from qtune import accelerator
from qtune.memory.oom_recovery import Recovery, is_out_of_memory, let_go

ALIGNED_BYTES = 64


def keep_steps_whole(optimizer: torch.optim.Optimizer, recovery: Recovery, where: Callable[[], str]) -> None:
    """Let `optimizer.step()` restore what it has changed when it fails, and try again while memory can be found.

    Raises OutOfMemory, the weights as they were, when none can. Call before a scheduler or a gradient scaler wraps it.
    """
    step_once, before = optimizer.step, HostCopy(optimizer)

    def try_step(args: Any, kwargs: Any) -> tuple[bool, Any]:
        try:
            return True, step_once(*args, **kwargs)
        except BaseException as fault:
            before.put_back()
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
            return False, None

    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        before.take()
        is_first = True
        is_done, result = try_step(args, kwargs)
        while not is_done:
            recovery.after_optimizer_step(where(), is_first)
            is_first = False
            is_done, result = try_step(args, kwargs)
        return result

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


class HostCopy:
    """A copy in host memory of an optimizer's weights and state, taken again and again into one buffer."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._state: dict[torch.Tensor, dict[str, Any]] = {}
        self._tensors: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []

    @property
    def bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies)

    @torch.no_grad()
    def take(self) -> None:
        """Copy the weights and the state as they are now."""
        self._state = {weight: dict(values) for weight, values in self._optimizer.state.items()}
        tensors = self._held()
        if [_layout(tensor) for tensor in tensors] != [_layout(copy) for copy in self._copies]:
            self._copies = []
            self._copies = _room_for(tensors)
        self._tensors = tensors
        accelerator.copy_each(self._copies, tensors)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the weights and the state what they were; state that did not exist is removed."""
        accelerator.copy_each(self._tensors, self._copies)
        state = self._optimizer.state
        for weight in list(state):
            if weight not in self._state:
                del state[weight]
        for weight, values in self._state.items():
            state[weight].clear()
            state[weight].update(values)

    def _held(self) -> list[torch.Tensor]:
        """Weights and state, what several weights share once."""
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        return list({id(held): held for held in (*weights, *state) if isinstance(held, torch.Tensor)}.values())


def _layout(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _room_for(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Places for `tensors` in one page-locked buffer."""
    sizes = [-(-tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES for tensor in tensors]
    places = accelerator.page_locked(sum(sizes), torch.uint8).split(sizes)
    return [
        place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(places, tensors, strict=True)
    ]
