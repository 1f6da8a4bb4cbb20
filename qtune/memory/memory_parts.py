"""What stands in a live model, by part and by side of the bus: the names that forecast and ledger share."""

from collections.abc import Iterator

import torch
from peft import PeftModel

from qtune.memory.memory_tracker import Side, quantization_state
from qtune.memory.techniques import Engine

STANDING_PARTS = ("base", "streamed layers", "embedding", "head", "adapter", "gradients", "optimizer")
PASSING_PARTS = ("batch", "checkpoints", "layer workspace", "dequantised weights", "loss")


def standing_parts(
    model: PeftModel, engine: Engine | None, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, Side, list[torch.Tensor]]]:
    """Tensors by part and side. A tensor of a tied pair is the head's."""
    causal = model.get_base_model()
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    trained = [p for p in model.parameters() if p.requires_grad]
    head_weights = [head.weight] if head is not None and not head.weight.requires_grad else []
    head_on_host = engine is not None and engine.techniques.head == "host"
    yield "head", "host" if head_on_host else "device", [*head_weights, *quantization_state(head_weights)]
    stream = engine.runner.stream if engine is not None else None
    homes, slots = (stream.homes, stream.slots) if stream is not None else ([], [])
    yield "streamed layers", "host", homes
    yield "streamed layers", "device", slots
    if not any(embedding.weight is weight for weight in head_weights):
        on_host = engine is not None and engine.techniques.host_embedding
        yield "embedding", "host" if on_host else "device", [embedding.weight]
    apart = {id(embedding.weight), *(id(weight) for weight in head_weights)}
    elsewhere = {tensor.untyped_storage().data_ptr() for tensor in (*homes, *slots)}
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in apart]
    base = [*frozen, *quantization_state(frozen), *model.buffers()]
    yield "base", "device", [t for t in base if t.untyped_storage().data_ptr() not in elsewhere]
    yield "adapter", "device", list(trained)
    yield "gradients", "device", [p.grad for p in trained if p.grad is not None]
    if optimizer is not None:
        yield "optimizer", "device", optimizer_state(optimizer)


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of the optimizer's state, accelerate's wrapper looked through."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
