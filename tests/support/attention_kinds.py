"""Tiny models of every kind of attention, with transformers' own and with ours."""

import copy
from typing import Any

import torch
from conftest import BOS, END, PAD
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qtune.memory import packed_attention, packed_mixers

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": BOS,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
ROUTED = {**MIXTURE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
INDEXED = {"index_topk": 4, "index_n_heads": 16, "index_head_dim": 8}  # of few heads many choices would be ties
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
KINDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {**WINDOWS, **MIXTURE, "num_local_experts": 4},
    "granite_swa": {**WINDOWS},
    "mimo_v2_flash": {**WINDOWS, **ROUTED, "v_head_dim": 6, "moe_layer_freq": [0, 1]},
    "flint": {**WINDOWS},
    "gemma2": {**WINDOWS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "vaultgemma": {**WINDOWS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "llama4_text": {
        "attention_chunk_size": 4,
        "no_rope_layers": [1, 0],
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        **MIXTURE,
    },
    "deepseek_v3": {**LATENT, **ROUTED},
    "youtu": LATENT,
    "axk2": {**LATENT, **ROUTED, **INDEXED},
    "deepseek_v32": {**LATENT, **ROUTED, **INDEXED},
    "glm_moe_dsa": {**LATENT, **ROUTED, **INDEXED},
    "gemma3_text": WINDOWS,
    "gemma4_text": {**WINDOWS, "global_head_dim": 16, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
}
KINDS["gemma4_text sharing keys"] = {
    **WINDOWS,
    "num_hidden_layers": 4,
    "layer_types": WINDOWS["layer_types"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 262,
    "final_logit_softcapping": 30.0,
}


def made(kind: str, **others: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice, with transformers' own attention and with ours; what is trained is all of it."""
    packed_attention.register()
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim" or "qk_rope_head_dim" not in KINDS[kind]}
    config = AutoConfig.for_model(kind.split()[0], **{**shape, **KINDS[kind], **others})
    plain, ours = (
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name, dtype=torch.float32).eval()
        for name in ("eager", packed_attention.implementation_for(config))
    )
    torch.manual_seed(0)
    for name, parameter in plain.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 1.0 if "sinks" in name else 0.15)
    ours.load_state_dict(plain.state_dict())
    packed_attention.install(ours)
    packed_mixers.install(ours)
    return plain, ours
