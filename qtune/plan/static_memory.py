"""What stands through a whole step, by part: weights, adapter, gradients, optimizer state. Counted, not traced."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from qtune.memory import nf4
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_tracker import block_bytes, quantization_state, storage_sizes
from qtune.memory.techniques import Techniques, refusals
from qtune.memory.weight_streaming import frozen_tensors, layout, spread
from qtune.model import adapter
from qtune.plan import fake_model
from qtune.recipe.schema import Recipe

STANDING = "standing"
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256  # bitsandbytes' min_8bit_size, and elements to one scale


@dataclass(frozen=True)
class Layer:
    """One decoder layer's frozen weights: bytes where they stand on the device, and packed for streaming."""

    resident_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Standing:
    """Bytes of a whole model. A tied embedding has no table of its own: the head's is read for it. Gradients are as
    large as the adapter."""

    base_bytes: int
    layers: tuple[Layer, ...]
    embedding_bytes: int
    head_bytes: int
    quantized_head_bytes: int
    largest_bytes: int
    is_tied: bool
    adapter_bytes: int
    optimizer_bytes: int
    parameters: int
    active_parameters: int
    trained_parameters: int
    refusals: dict[str, str]

    def on_device(self, techniques: Techniques) -> dict[str, int]:
        """Parts that stand on the device."""
        streamed = spread(techniques.streamed_layers, len(self.layers))
        slot = max((self.layers[i].packed_bytes for i in streamed), default=0)
        slots = min(2, len(streamed)) * block_bytes(slot)
        head = {"device": self.head_bytes, "host": 0, "nf4": self.quantized_head_bytes}[techniques.head]
        if self.is_tied:  # one table serves both, and stays for the one that still reads it
            embedding_stays = not techniques.host_embedding and techniques.head == "nf4"
            embedding = self.head_bytes if embedding_stays else 0
        else:
            embedding = 0 if techniques.host_embedding else self.embedding_bytes
        return {
            "base": self.base_bytes - sum(self.layers[i].resident_bytes for i in streamed),
            "streamed layers": slots,
            "embedding": embedding,
            "head": head,
            "adapter": self.adapter_bytes,
            "gradients": self.adapter_bytes,
            "optimizer": self.optimizer_bytes,
        }

    def while_loading(self, techniques: Techniques) -> int:
        """Bytes on the device when the last weight has come: the head in 16 bits, one weight before it is quantised."""
        standing = self.on_device(replace(techniques, head="device"))
        return standing["base"] + standing["embedding"] + self.head_bytes + self.largest_bytes

    def on_host(self, techniques: Techniques) -> dict[str, int]:
        """Parts that stand in page-locked or ordinary host memory because of `techniques`."""
        streamed = spread(techniques.streamed_layers, len(self.layers))
        table = self.head_bytes if self.is_tied else self.embedding_bytes
        table_is_head = self.is_tied and techniques.head == "host"
        return {
            "streamed layers": sum(block_bytes(self.layers[i].packed_bytes) for i in streamed),
            "embedding": table if techniques.host_embedding and not table_is_head else 0,
            "head": self.head_bytes if techniques.head == "host" else 0,
        }


def count(config: PreTrainedConfig, recipe: Recipe, compute_dtype: str) -> Standing:
    """Count a model as deep as `config` says. Raises ModelError where transformers cannot build it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model.build(config, recipe, compute_dtype, mode)
    causal = model.get_base_model()
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    trained = list(adapter.trained_parameters(model))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    apart = {id(embedding.weight), id(getattr(head, "weight", None))}
    others = [p for p in frozen if id(p) not in apart]
    with mode:
        packed = _packed_head(head) if head is not None else 0
        layers = tuple(_layer(layer) for layer in find_layers(model))
    return Standing(
        base_bytes=storage_sizes([*others, *quantization_state(others), *model.buffers()]),
        layers=layers,
        embedding_bytes=storage_sizes([embedding.weight]),
        head_bytes=storage_sizes([head.weight]) if head is not None else 0,
        quantized_head_bytes=packed,
        largest_bytes=max((2 * _elements(p) // _stacked(p) for p in others), default=0),
        is_tied=is_tied,
        adapter_bytes=storage_sizes(trained),
        optimizer_bytes=sum(_state_bytes(p.numel(), recipe.train.optimizer) for p in trained),
        parameters=sum(_elements(p) for p in frozen),
        active_parameters=round(sum(_elements(p) * _active_share(p, config) for p in others)),
        trained_parameters=sum(p.numel() for p in trained),
        refusals=refusals(model),
    )


def _layer(layer: torch.nn.Module) -> Layer:
    return Layer(storage_sizes(tensor for tensor, _ in frozen_tensors(layer)), layout(layer)[1])


def _packed_head(head: Any) -> int:
    weight = head.weight
    packed = nf4.empty_packed(tuple(weight.shape), weight.dtype, is_double=True)
    return storage_sizes([packed, *quantization_state([packed])])


def _elements(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _stacked(parameter: torch.nn.Parameter) -> int:
    """How many matrices a parameter holds: of experts one is quantised at a time."""
    state = getattr(parameter, "quant_state", None)
    shape = parameter.shape if state is None else state.shape
    return int(shape[0]) if len(shape) > 2 else 1


def _active_share(parameter: torch.nn.Parameter, config: PreTrainedConfig) -> float:
    """Of a stack of experts, the share that one token visits."""
    state = getattr(parameter, "quant_state", None)
    if len(parameter.shape if state is None else state.shape) < 3:
        return 1.0
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    return (getattr(text, "num_experts_per_tok", None) or experts) / experts


def _state_bytes(elements: int, optimizer: str) -> int:
    """AdamW's two moments: 8 bits each with a float32 scale a block, or 32 bits for small tensors and plain AdamW."""
    if optimizer == "adamw":
        return 2 * block_bytes(4 * elements) + block_bytes(4)
    if elements < EIGHT_BIT_FROM:
        return 2 * block_bytes(4 * elements)
    return 2 * (block_bytes(elements) + block_bytes(4 * -(-elements // EIGHT_BIT_BLOCK)))
