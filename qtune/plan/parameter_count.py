"""What stands through a whole step, by part: weights, adapter, gradients, optimizer state. Counted, not traced."""

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from qtune.memory import nf4
from qtune.memory.engine import refusals
from qtune.memory.gradient_checkpointing import find_layers
from qtune.memory.memory_tracker import quantization_state, storage_sizes
from qtune.memory.techniques import TECHNIQUES
from qtune.memory.techniques.standing import Layer, Standing
from qtune.memory.weight_streaming import frozen_tensors, layout
from qtune.model import adapter
from qtune.plan import fake_model
from qtune.recipe.schema import Recipe
from qtune.train.optimizers import OPTIMIZERS


def count(config: PreTrainedConfig, recipe: Recipe, compute_dtype: str, is_card: bool) -> Standing:
    """Count a model as deep as `config` says, on a CUDA card if `is_card`.

    Raises ModelError where transformers cannot build it.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    widths = [width or text.hidden_size // heads for width in fake_model.sizes_in_layers(text, "head_dim")]
    key_heads = [count or 1 for count in fake_model.sizes_in_layers(text, "num_key_value_heads")]
    optimizer = OPTIMIZERS[recipe.train.optimizer]
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
        optimizer_bytes=sum(optimizer.state_bytes(p.numel()) for p in trained),
        optimizer_workspace_bytes=optimizer.workspace_bytes([storage_sizes([p]) for p in trained]) if is_card else 0,
        parameters=sum(_elements(p) for p in frozen),
        active_parameters=round(sum(_elements(p) * _active_share(p, config) for p in others)),
        trained_parameters=sum(p.numel() for p in trained),
        head_parameters=text.vocab_size * text.hidden_size,
        attention_width=heads * sum(widths) // len(widths),
        key_value_heads=math.gcd(*key_heads),
        refusals=refusals(model),
        paged_bytes=sum(optimizer.paged_bytes(p.numel()) for p in trained) if is_card else 0,
        left_out=adapter.left_out(causal) if recipe.lora.targets == "all-linear" else {},
        movable={name: each.movable_bytes(model, find_layers(model)) for name, each in TECHNIQUES.items()},
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
