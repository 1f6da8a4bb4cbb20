"""The copy that an optimizer step is undone from."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qtune import accelerator
from qtune.train.atomic_step import HostCopy


class Copies(TorchDispatchMode):
    """How many tensors each call copies, and `None` where the host waits for the card."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("copy_", "_foreach_copy_"):
            self.order.append(len(args[0]) if name == "_foreach_copy_" else 1)
        return func(*args, **(kwargs or {}))


def test_a_card_copies_in_one_call_and_the_processor_when_it_rests(monkeypatch) -> None:
    """AdamW's state: two tensors a weight, and its count of steps, which torch keeps in host memory as paged state is.
    There were thousands of copies, and those of the processor were made while the card had still to make its own."""
    weights = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    copies = Copies()
    monkeypatch.setattr(accelerator, "is_on_card", lambda tensor: tensor.ndim == 2)
    monkeypatch.setattr(accelerator, "synchronize_cards", lambda: copies.order.append(None))
    before = HostCopy(optimizer)
    with copies:
        before.take()
    assert copies.order == [9, None, 3]
    kept = [weight.detach().clone() for weight in weights]
    optimizer.step()
    copies.order.clear()
    with copies:
        before.put_back()
    assert copies.order == [9, None, 3]
    assert all(map(torch.equal, weights, kept))
    assert all(state["step"] == 1 for state in optimizer.state.values())
