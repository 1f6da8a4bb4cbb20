"""A tiny model of random weights of any causal architecture in transformers, from its configuration's defaults."""

from pathlib import Path
from typing import Any

import torch
from made_bases import byte_level
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

TOKENIZER = byte_level()
VOCABULARY = len(TOKENIZER) + 6  # rows of padding; some types' own tokenizers have a token more
SPREAD = 0.15  # of random weights: transformers' 0.02 leaves little behind the embedding that could leak
WINDOW = 8  # tokens; documents are several times as long
LEAST_LAYERS = 2
# Encoders, encoder-decoders and models that hear or see: no causal language model to tune.
NOT_DECODERS = frozenset((
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert",
    "cpmant", "data2vec-text", "electra", "emu3", "ernie", "fuyu", "gemma4_assistant", "gemma4_unified_assistant",
    "git", "got_ocr2", "marian", "mbart", "megatron-bert", "mllama", "moshi", "moss_transcribe_diarize", "musicgen",
    "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xlnet", "xmod",
))  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")
# Inputs of linears are whole blocks of 64 weights: bitsandbytes' processor kernel misreads others.
SMALL = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings": 512, "n_positions": 512,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "hidden_size_per_layer_input": 64,
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "intermediate_size_mlp": 128, "ffn_hidden_size": 128,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64, "moe_latent_size": 64, "expert_ffn_hidden_size": 64,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_global_key_value_heads": 2, "multi_query": False,
    "head_dim": 16, "global_head_dim": 16, "kv_channels": 16, "rotary_dim": 8,
    "sliding_window": WINDOW, "window_size": WINDOW, "attention_window_size": WINDOW, "attention_chunk_size": WINDOW,
    "keep_window_size": WINDOW,
    "q_lora_rank": 64, "kv_lora_rank": 64, "o_lora_rank": 64, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "index_head_dim": 16, "index_n_heads": 16, "index_topk": 8, "gated_norm_rank": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "zero_expert_num": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_head_dim": 16, "mamba_num_heads": 8, "ssm_state_size": 16, "n_groups": 1, "state_size": 16,
    "time_step_rank": 64, "mamba_dt_rank": 64, "lru_width": 64, "attention_hidden_size": 64, "chunk_size": 16,
    "bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}  # fmt: skip
# What does not follow from the defaults. `layers` is how many it takes to have every kind of layer.
WINDOWED_AND_FULL = ["sliding_attention", "full_attention"]
LINEAR_AND_FULL = ["linear_attention", "full_attention"]
PART = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 64},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "patcher_config": {**PART, "vocab_size": VOCABULARY, "sliding_window": WINDOW},
        "encoder_config": {**PART, "vocab_size": VOCABULARY, "hidden_size_global": 64},
        "decoder_config": {**PART, "vocab_size": VOCABULARY, "hidden_size_global": 64},
        "global_config": PART,
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": WINDOWED_AND_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]} for kind in WINDOWED_AND_FULL
        },
    },
    "ctrl": {"dff": 128},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "layers": 3,
        "head_dim": 16,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 64 for name in ("q_lora_rank", "kv_lora_rank")},
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "gemma3n_text": {"layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 64,
                     "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gemma4_text": {"layers": 4, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"layers": 4, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": LINEAR_AND_FULL},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 64, "linear_num_heads": 2},
    "laguna": {"layer_types": WINDOWED_AND_FULL},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": {"layer_types": WINDOWED_AND_FULL},
    "phi4_multimodal": {
        "vision_config": {**PART, "image_size": 28, "crop_size": 28},
        "audio_config": {
            "hidden_size": 64, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 4,
            "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 64,
        },
    },
    "qwen4_exp_text": {
        "layers": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "hc_lowrank": 64,
    },
    "recurrent_gemma": {"layers": 3},
    "zamba": {"layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4,
              "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4,
               "attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def kinds() -> list[str]:
    """Model types of every causal architecture that transformers has, in its order."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in NOT_DECODERS]


def text_kind(kind: str) -> str:
    """The model type that is made for `kind`: of one that also sees or hears, its text model's."""
    text = getattr(CONFIG_MAPPING[kind], "sub_configs", {}).get("text_config")
    return text.model_type if text is not None else kind


def small_config(kind: str) -> PreTrainedConfig:
    """The architecture's own configuration with few and narrow layers, at least one of every kind that it has."""
    made = CONFIG_MAPPING[kind]
    has = made().to_dict()
    exceptions = dict(EXCEPTIONS.get(kind, {}))
    kinds_of_layers = {key: list(dict.fromkeys(has.get(key) or ())) for key in KINDS_OF_LAYERS}
    layers = exceptions.pop("layers", max(LEAST_LAYERS, *map(len, kinds_of_layers.values())))
    changes: dict[str, Any] = {key: value for key, value in SMALL.items() if key in has}
    changes |= {key: layers for key in LAYERS if key in has}
    if "kv_lora_rank" in has:  # latent attention has keys for every head
        changes["num_key_value_heads"] = changes["num_attention_heads"]
        if has.get("head_dim") == has["qk_rope_head_dim"]:
            changes["head_dim"] = changes["qk_rope_head_dim"]
    changes |= {key: [kinds[i % len(kinds)] for i in range(layers)] for key, kinds in kinds_of_layers.items() if kinds}
    changes |= {
        key: 0.0 for key, value in has.items() if isinstance(value, float) and ("drop" in key or "jitter" in key)
    }
    return made(**{**changes, **exceptions})


def small_model(kind: str) -> PreTrainedModel:
    """In float32, with weights so large that every layer matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D) and name == "weight"
            if is_matrix or (parameter.ndim == 3 and name.endswith("_proj")):
                torch.nn.init.normal_(parameter, 0.0, SPREAD)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:  # transformers loads a 0 there
            module.weight.data[module.padding_idx] = 0
    return model


def save(kind: str, folder: Path) -> None:
    small_model(kind).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


def layers_of(config: PreTrainedConfig) -> int:
    """How many decoder layers a model of `config` has."""
    text = config.get_text_config()
    return int(next(getattr(text, name) for name in LAYERS if getattr(text, name, None)))
