"""Which memory techniques are on, as one value, and how a live model is brought to it.

Every technique may be switched on in a model that is running, between two passes; none is switched off again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft import PeftModel

from qtune.memory import fused_cross_entropy
from qtune.memory.activation_offload import HostBuffers
from qtune.memory.attention_head_chunks import group_heads, why_not_grouped
from qtune.memory.embedding_offload import move_embedding_out
from qtune.memory.fused_lora import fuse
from qtune.memory.gradient_checkpointing import LayerRunner, find_layers
from qtune.memory.head_offload import move_head_out
from qtune.memory.quantized_head import quantize_head
from qtune.memory.tiled_mlp import NORM_TILE_TOKENS, run_in_tiles, token_wise
from qtune.memory.weight_streaming import LayerStream, spread

Head = Literal["device", "host", "nf4"]  # where the output head is, each for less memory on the device or the host
HEADS = get_args(Head)


@dataclass(frozen=True)
class Techniques:
    """What is on. `recomputed_layers` and `streamed_layers` count decoder layers; a tile of 0 tokens is no tiling."""

    recomputed_layers: int = 0
    host_checkpoints: bool = False
    tile_tokens: int = 0
    host_embedding: bool = False
    head: Head = "device"
    streamed_layers: int = 0
    head_groups: int = 1

    def on_top_of(self, others: "Techniques") -> "Techniques":
        """These, and of `others` what these do without: nothing is switched off, an amount asked for anew is taken."""
        return Techniques(
            recomputed_layers=max(self.recomputed_layers, others.recomputed_layers),
            host_checkpoints=self.host_checkpoints or others.host_checkpoints,
            tile_tokens=self.tile_tokens or others.tile_tokens,
            host_embedding=self.host_embedding or others.host_embedding,
            head=max(self.head, others.head, key=HEADS.index),
            streamed_layers=max(self.streamed_layers, others.streamed_layers),
            head_groups=self.head_groups if self.head_groups > 1 else others.head_groups,
        )

    @classmethod
    def for_answers(cls, plan: Mapping[str, Any]) -> "Techniques":
        """What a model that only answers needs of a plan's, of whichever version: the weights where they were in
        training. The head is as it was loaded, and what else was on made no difference to the weights."""
        planned = plan["techniques"]
        return cls(host_embedding=planned["host_embedding"], streamed_layers=planned["streamed_layers"])


def refusals(model: PeftModel) -> dict[str, str]:
    """Which techniques `model` does not allow, by field of `Techniques`, each with a sentence on why."""
    found: dict[str, str] = {}
    layers = find_layers(model)
    if not layers:
        why = f"the decoder layers of {type(model.get_base_model()).__name__} cannot be run one by one"
        names = ("recomputed_layers", "host_checkpoints", "tile_tokens", "streamed_layers", "head_groups")
        found |= dict.fromkeys(names, why)
    elif not token_wise(layers[0])[1]:
        found["tile_tokens"] = "its layers have no norm that is known by its name"
    if why_not := next(filter(None, map(why_not_grouped, layers)), None):
        found["head_groups"] = why_not
    if not fused_cross_entropy.suits(model):
        found["head"] = "its head scales, caps or biases the logits, or is trained"
    return found


class Engine:
    """The techniques of one live model."""

    def __init__(self, model: PeftModel):
        self._model = model
        self._layers = find_layers(model)
        self._device = _device_of(model)
        self._is_tied = _is_tied(model)
        self.runner = LayerRunner(self._layers, keeps_random_state=_draws_random_numbers(model))
        self.techniques = Techniques()
        fuse(model)

    def switch_to(self, wanted: Techniques) -> None:
        """Bring the model to `wanted`. What is on stays on, also where `wanted` does without it."""
        causal, now = self._model.get_base_model(), self.techniques
        target = wanted.on_top_of(now)
        if self._layers:
            self.runner.recompute(target.recomputed_layers)
        if target.host_checkpoints and self.runner.host is None:
            self.runner.host = HostBuffers()
        if target.tile_tokens != now.tile_tokens:
            self._tile(target.tile_tokens)
        if target.head_groups != now.head_groups:
            for layer in self._layers:
                group_heads(layer, target.head_groups)
        if target.head == "host":
            move_head_out(causal, self._device, self._is_tied)
        if target.host_embedding or (target.head == "host" and self._is_tied):
            move_embedding_out(causal, self._device)
        if target.head == "nf4":
            quantize_head(causal)
        if target.streamed_layers > now.streamed_layers:
            self.runner.stream_with(
                LayerStream(self._layers, spread(target.streamed_layers, len(self._layers)), self._device)
            )
        self.techniques = target

    def forget_pass(self) -> None:
        """Drop what a pass that did not come to its end has left behind."""
        self.runner.is_recomputing = False
        if self.runner.host is not None:
            self.runner.host.forget()

    def _tile(self, tokens: int) -> None:
        self.runner.ends_in_sum.clear()
        for layer in self._layers:
            mlps, norms = token_wise(layer)
            for mlp in mlps:
                run_in_tiles(mlp, self.runner, tokens, is_tail=True)
            for norm in norms:
                run_in_tiles(norm, self.runner, min(tokens, NORM_TILE_TOKENS), is_tail=False)
        for norm in _norms_beside(self._model, self._layers):
            run_in_tiles(norm, self.runner, min(tokens, NORM_TILE_TOKENS), is_tail=False)


def _device_of(model: torch.nn.Module) -> torch.device:
    """Where the model computes: where its norms are, which no technique moves."""
    small = (parameter for parameter in model.parameters() if parameter.ndim < 2)
    return next(small, next(model.parameters())).device


def _is_tied(model: PeftModel) -> bool:
    """Whether one table is both embedding and output head."""
    causal = model.get_base_model()
    head = causal.get_output_embeddings()
    return head is not None and head.weight is causal.get_input_embeddings().weight


def _norms_beside(model: torch.nn.Module, layers: list) -> list[torch.nn.Module]:
    """The norms that stand in the same module as the list of layers: the last one before the head."""
    for module in model.modules():
        held = [child for child in module.children() if isinstance(child, torch.nn.ModuleList)]
        if any(list(child) == layers for child in held):
            return [child for child in module.children() if type(child).__name__.endswith("Norm")]
    return []


def _draws_random_numbers(model: PeftModel) -> bool:
    """Whether a training pass drops anything out, so that running it again needs the same random numbers.

    By a module, or by a rate in the config that is read where it is used.
    """
    dropped = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    settings = model.get_base_model().config.get_text_config().to_dict()
    rates = [value for name, value in settings.items() if "drop" in name or "jitter" in name]
    return dropped or any(isinstance(rate, float) and rate > 0 for rate in rates)
