"""Tiny random bases of every architecture that can be exported, with tokenizers that have merges."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import CHAT_TEMPLATE, SPECIAL
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a model of the heart and of the drug",
    "12 mg of it, 345 ml",
] * 3
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA_3_ROPE},
    "llama linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    },
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 yarn": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3"},
}


def byte_level() -> PreTrainedTokenizerFast:
    """Cut as SmolLM's and the demo base's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320 - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(SPECIAL)
    return _finished(made)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before the text, bytes for what is no token."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [*(f"<0x{number:02X}>" for number in range(256)), *SPECIAL, "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    described = json.loads(made.to_str())  # the trainer calls bytes special, which they are not
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"][:3] != "<0x"]
    return _finished(Tokenizer.from_str(json.dumps(described)), unk_token="<unk>")


def _finished(made: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        **roles,
    )


def make_base(folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> Path:
    """A base in the new `folder`: random weights large enough that every layer matters, three rows of padding.

    `kind` is one of KINDS, or a model_type of transformers.
    """
    tokenizer = tokenizer or byte_level()
    torch.manual_seed(0)
    settings = {
        **SIZES,
        **{f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")},
        "vocab_size": len(tokenizer) + 3,
        "initializer_range": 0.2,
        **KINDS.get(kind, {"model_type": kind}),
        **changes,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
