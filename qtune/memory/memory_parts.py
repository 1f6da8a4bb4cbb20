"""What stands in a live model, by part and by side of the bus: the names that forecast and ledger share."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from qtune.memory.memory_tracker import Side, quantization_state
from qtune.memory.techniques.standing import PAGED_OPTIMIZER

if TYPE_CHECKING:
    from qtune.memory.engine import Engine

STANDING_PARTS = (
    "base",
    "sharded layers",
    "streamed layers",
    "embedding",
    "head",
    "adapter",
    "gradients",
    "optimizer",
    PAGED_OPTIMIZER,
)
PASSING_PARTS = ("batch", "checkpoints", "kept attention", "layer workspace", "dequantised weights", "loss")


def standing_parts(
    model: PeftModel, engine: "Engine | None", optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, Side, list[torch.Tensor]]]:
    """Tensors by part and side. A tensor of a tied pair is the head's."""
    causal = model.get_base_model()
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    trained = [p for p in model.parameters() if p.requires_grad]
    head_weights = [head.weight] if head is not None and not head.weight.requires_grad else []
    moved = list(_moved(engine)) if engine is not None else []
    yield from moved
    elsewhere = {tensor.untyped_storage().data_ptr() for _, _, tensors in moved for tensor in tensors}

    is_moved = {part for part, _, _ in moved}
    if "head" not in is_moved:
        yield "head", "device", [*head_weights, *quantization_state(head_weights)]
    if "embedding" not in is_moved and not any(embedding.weight is weight for weight in head_weights):
        yield "embedding", "device", [embedding.weight]
    apart = {id(embedding.weight), *(id(weight) for weight in head_weights)}
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in apart]
    base = [*frozen, *quantization_state(frozen), *model.buffers()]
    yield "base", "device", [t for t in base if t.untyped_storage().data_ptr() not in elsewhere]
    yield "adapter", "device", list(trained)
    yield "gradients", "device", [p.grad for p in trained if p.grad is not None]
    if optimizer is not None:
        state = optimizer_state(optimizer)
        yield "optimizer", "device", [tensor for tensor in state if not _is_paged(tensor)]
        yield PAGED_OPTIMIZER, "host", [tensor for tensor in state if _is_paged(tensor)]


def _moved(engine: "Engine") -> Iterator[tuple[str, Side, list[torch.Tensor]]]:
    """What the techniques that are on have put elsewhere."""
    for technique in engine.techniques.on():
        yield from technique.live_parts(engine, engine.techniques)


def _is_paged(tensor: torch.Tensor) -> bool:
    """Whether the driver moves it between card and host: bitsandbytes marks such tensors."""
    return getattr(tensor, "is_paged", False)


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of the optimizer's state, accelerate's wrapper looked through."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
