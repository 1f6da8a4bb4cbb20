"""Tiny models of many architectures with an adapter whose gradients are not zero, and one pass through them."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from conftest import BOS, END, PAD, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qtune.memory import fused_cross_entropy, fused_layers, mixture_of_experts, packed_attention, packed_mixers
from qtune.memory.engine import Engine
from qtune.memory.expert_loading import quantized_experts
from qtune.memory.nf4 import keep_weights_as_quantised
from qtune.memory.packed_experts import expert_modules
from qtune.memory.techniques import Techniques
from qtune.model.adapter import linear_names
from qtune.model.loaded import Loaded

LAYERS = 4
NO_TOKENIZER: Any = None
SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": BOS,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
SHARED_KEYS = {  # the last two layers read what the first two leave for them
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 262,
}
OF_GEMMA3N = {"hidden_size_per_layer_input": 8, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * LAYERS}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(tiny_config(num_hidden_layers=LAYERS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
    ),
    "gemma3n": lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**SHAPE, **SHARED_KEYS, **OF_GEMMA3N)),
    "gemma4": lambda: Gemma4ForCausalLM(
        Gemma4TextConfig(**SHAPE, **SHARED_KEYS, hidden_size_per_layer_input=8, global_head_dim=32)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, **MULTIPLIERS, logits_scaling=1.0)),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    ),
}
STATE_SPACE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
HYBRIDS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # what mixes tokens by something else than attention: model type, shape
    "gated delta net": ("qwen3_5_text", {**DELTA_NET, "layer_types": ["linear_attention", "full_attention"] * 2}),
    "keywords lost": ("olmo_hybrid", {**DELTA_NET, "layer_types": ["linear_attention", "full_attention"] * 2}),
    "mamba": ("mamba", {"state_size": 16, "time_step_rank": 4, "use_associative_scan": False}),
    "mamba 2": ("bamba", {**STATE_SPACE, "attn_layer_indices": [1, 3]}),
    "mamba 2 beside attention": ("falcon_h1", {**STATE_SPACE, "mamba_d_ssm": 128}),
    "convolution": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "gated recurrence": ("recurrent_gemma", {"lru_width": 64, "attention_window_size": 8}),
    "lightning attention": ("minimax", {**EXPERTS, "layer_types": ["linear_attention", "full_attention"] * 2}),
    "delta attention": (
        "kimi_linear",
        {**EXPERTS, "layer_types": ["linear_attention", "full_attention"] * 2, "num_shared_experts": 1}
        | {"linear_num_heads": 4, "linear_head_dim": 16}
        | {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    ),
    "xlstm": ("xlstm", {"num_blocks": LAYERS, "num_heads": 4}),
    "rwkv": ("rwkv", {"attention_hidden_size": 64}),
}
OLD = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
OWN_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {  # attention that is code of the model's own
    "bloom": ("bloom", {"n_layer": LAYERS, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128}),
    "gptj": ("gptj", {**OLD, "rotary_dim": 8}),
    "gpt_neo": ("gpt_neo", {"num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}),
    "openai-gpt": ("openai-gpt", {**OLD, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "xglm": (
        "xglm",
        {"d_model": 64, "ffn_dim": 128, "num_layers": LAYERS, "attention_heads": 4, "dropout": 0.0}
        | {"attention_dropout": 0.0},
    ),
    "doge": ("doge", {"keep_window_size": 8}),
}
PACK = (23, 9, 1, 30)


@dataclass(frozen=True)
class Pass:
    """What one pass gave: the summed loss in nats, and the gradients by name."""

    nats: float
    gradients: dict[str, torch.Tensor]


def base(kind: str, dtype: torch.dtype = torch.float32, nf4: str | None = None) -> PreTrainedModel:
    """A frozen base with random weights, its attention ours; `nf4` quantises its linears, "double" or "single"."""
    torch.manual_seed(0)
    packed_attention.register()
    model = made(kind)
    if not packed_mixers.runs_as_a_whole(type(model)):
        model.config._attn_implementation = packed_attention.NAME
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:  # biases and norms that do something
            torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.1)
    model = model.to(dtype)
    if nf4 and any(expert_modules(model)):
        model = saved_and_loaded(model, nf4 == "double")
    elif nf4:
        quantize(model, dtype, nf4 == "double")
    keep_weights_as_quantised(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    packed_attention.install(model)
    packed_mixers.install(model)
    fused_layers.install(model)
    fused_cross_entropy.install(model)
    return model


def made(kind: str) -> PreTrainedModel:
    if kind in KINDS:
        return KINDS[kind]()
    model_type, changes = (HYBRIDS | OWN_ATTENTION)[kind]
    shape = {
        name: size for name, size in SHAPE.items() if model_type != "falcon" or name != "head_dim"
    }  # has no setter
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    how = packed_attention.implementation_for(config)
    return AutoModelForCausalLM.from_config(config, attn_implementation=how, dtype=torch.float32)


def quantize(model: PreTrainedModel, dtype: torch.dtype, double: bool) -> None:
    """Replace every linear but the head by bitsandbytes'."""
    linears = [(name, m) for name, m in model.named_modules() if type(m) is torch.nn.Linear]
    for name, linear in linears:
        if linear is not model.get_output_embeddings():
            has_bias = linear.bias is not None
            packed = Linear4bit(linear.in_features, linear.out_features, has_bias, dtype, double, "nf4")
            given = Params4bit(linear.weight.detach(), False, compress_statistics=double, quant_type="nf4")
            packed.weight, packed.bias = given.to("cpu"), linear.bias
            packed.quant_state = packed.weight.quant_state
            model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True


def saved_and_loaded(model: PreTrainedModel, double: bool) -> PreTrainedModel:
    """`model` as it is when it is loaded in NF4, its experts too."""
    with tempfile.TemporaryDirectory() as folder, quantized_experts():
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model.dtype,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=model.dtype,
            ),
            attn_implementation=packed_attention.NAME,
        )


def adapted(model: PreTrainedModel, **lora: Any) -> PeftModel:
    """`model` with an adapter on every linear and on packed experts, of random weights."""
    torch.manual_seed(1)
    packed = mixture_of_experts.expert_targets(model)
    targets = {"target_modules": sorted(linear_names(model)), "target_parameters": packed or None}
    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **targets, **lora})
    mixture_of_experts.register(config, model)
    with_adapter = get_peft_model(model, config)
    for parameter in trained(with_adapter):
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(torch.promote_types(model.dtype, torch.float32))
    return with_adapter


def trained(model: PeftModel) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(lengths: Sequence[int] = PACK, seed: int = 0) -> dict[str, Any]:
    """A packed row of documents; the first token of each has no label, and some others have none."""
    torch.manual_seed(seed)
    tokens = sum(lengths)
    ids = torch.randint(256, (1, tokens))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = torch.where((positions == 0) | (torch.rand(1, tokens) < 0.2), -100, ids)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "document_lengths": tuple(lengths)}


def one_pass(model: PeftModel, inputs: dict[str, Any], autocast: torch.dtype | None = None) -> Pass:
    """Loss and gradients, which are taken from the model again."""
    model.train()
    nats = forward(model, inputs, autocast)
    nats.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Pass(nats.item(), found)


def forward(model: PeftModel, inputs: dict[str, Any], autocast: torch.dtype | None = None) -> torch.Tensor:
    """The summed loss, made in tiles where the head allows it; in float64 from logits that are as exact."""
    if model.dtype == torch.float64:
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, inputs["labels"][0, 1:], reduction="sum")
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        if fused_cross_entropy.suits(model):
            return model(**inputs, fused_loss=True).nats
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, inputs["labels"][0, 1:], reduction="sum")


def held_out(model: PeftModel, inputs: dict[str, Any]) -> float:
    model.eval()
    with torch.no_grad():
        return forward(model, inputs).item()


def switched(model: PeftModel, techniques: Techniques) -> Engine:
    engine = Engine(model)
    engine.switch_to(techniques)
    return engine


def assert_equal(ours: Pass, theirs: Pass) -> None:
    """To the bit."""
    assert ours.nats == theirs.nats
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert torch.equal(ours.gradients[name], gradient), name


def assert_close(ours: Pass, theirs: Pass, tolerance: float) -> None:
    """To `tolerance` of each gradient's norm."""
    assert abs(ours.nats - theirs.nats) <= tolerance * abs(theirs.nats)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert gradient.norm() > 0, name
        apart = (ours.gradients[name] - gradient).norm() / gradient.norm()
        assert apart <= tolerance, f"{name}: {apart:.2e}"


def on_cpu(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase = NO_TOKENIZER) -> Loaded:
    """`model`, which computes in float32, as it is asked something; a loss needs no tokenizer."""
    return Loaded(model, tokenizer, "cpu", "float32")
