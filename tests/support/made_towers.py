"""Tiny checkpoints of models that also see, as transformers writes them: towers, and a text model under a prefix."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import BOS, END, PAD, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": BOS,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
GEMMA_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
SMALL_TOWER = {**GEMMA_TOWER, "head_dim": 16}
SHARED_KEYS = {  # and an embedding of every layer's own
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 64,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 262,
    "global_head_dim": 32,
}
EXPERTS = {
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 128,
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 64,
}
LLAMA_TOWER = {
    **GEMMA_TOWER,
    "intermediate_size": 128,  # of four patches in one
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3.5": lambda: Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config={**SHAPE, **DELTA_NET}, vision_config=QWEN_TOWER)
    ),
    "gemma3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(text_config={**SHAPE, **WINDOWS}, vision_config=GEMMA_TOWER, mm_tokens_per_image=4)
    ),
    "gemma4": lambda: Gemma4ForConditionalGeneration(
        Gemma4Config(text_config={**SHAPE, **SHARED_KEYS}, vision_config=SMALL_TOWER, audio_config=None)
    ),
    "llama4": lambda: Llama4ForConditionalGeneration(
        Llama4Config(text_config={**SHAPE, **EXPERTS}, vision_config=LLAMA_TOWER)
    ),
    "mistral3": lambda: Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={**SHAPE, "model_type": "mistral"},
            vision_config={**SMALL_TOWER, "model_type": "pixtral"},
        )
    ),
}
TOWERS = {
    "qwen3.5": "model.visual.",
    "gemma3": "vision_tower.",
    "gemma4": "model.vision_tower.",
    "llama4": "vision_model.",
    "mistral3": "vision_tower.",
}
AHEAD = "mtp.layers.0.mlp.up_proj.weight"


def make(kind: str, folder: Path) -> Path:
    """A checkpoint in several files, with a head that guesses ahead in one of its own, in float16 as nothing else."""
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(folder)
    save_file({AHEAD: torch.randn(64, 64).half()}, folder / "mtp.safetensors", {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][AHEAD] = "mtp.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, by its own names."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
