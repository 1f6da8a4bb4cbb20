"""Tiny checkpoints whose weights are in FP8 or MXFP4, made by hand as their formats say."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import BOS, END, PAD, byte_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GptOssConfig, GptOssForCausalLM, LlamaForCausalLM, PreTrainedModel

FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def gpt_oss() -> PreTrainedModel:
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=262,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=16,
            bos_token_id=BOS,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


def make(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """What the codes stand for, by name, of `fp8` (blocks of 32 x 32), `fp8 whole` (a scale a tensor) or `mxfp4`."""
    torch.manual_seed(0)
    model = gpt_oss() if kind == "mxfp4" else LlamaForCausalLM(tiny_config())
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    meant = load_file(folder / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in meant.items():
        if kind == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            codes, exponents, meant[name] = _in_mxfp4(tensor)
            stored |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
        elif kind != "mxfp4" and name.endswith("proj.weight"):
            codes, scales, meant[name] = _in_fp8(tensor, None if kind == "fp8 whole" else 32)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            if kind == "fp8 whole":
                stored[name.replace(".weight", ".activation_scale")] = torch.tensor(1.0)
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    how: dict[str, Any] = {"quant_method": "mxfp4" if kind == "mxfp4" else "fp8"}
    if kind == "fp8":
        how["weight_block_size"] = [32, 32]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    return meant


def make_4_bits(folder: Path, kind: str = "nf4", is_double: bool = True) -> Path:
    """A checkpoint that transformers saved from a model that bitsandbytes holds in 4 bits."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).to(torch.bfloat16).save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=is_double,
        bnb_4bit_compute_dtype="bfloat16",
    )
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _in_fp8(weight: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and what they mean; the last blocks may be parts of one."""
    rows, columns = weight.shape
    if block is None:
        scales = weight.float().abs().amax() / 448
        codes = (weight.float() / scales).to(torch.float8_e4m3fn)
        return codes, scales, (codes.float() * scales).bfloat16()
    scales = torch.empty(-(-rows // block), -(-columns // block))
    codes, meant = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape, dtype=torch.bfloat16)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[part].float().abs().amax() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = (codes[part].float() * scales[i, j]).bfloat16()
    return codes, scales, meant


def _in_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of experts (E, I, O): codes (E, O, I / 32, 16), exponents (E, O, I / 32), and what they mean."""
    turned = weight.float().transpose(1, 2)
    groups = turned.reshape(*turned.shape[:2], -1, 32)
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    scaled = groups * (-exponents).exp2()[..., None]
    nearest = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    meant = FP4[nearest] * scaled.sign() * exponents.exp2()[..., None]
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    return (
        packed,
        (exponents + 127).to(torch.uint8),
        meant.reshape(turned.shape).transpose(1, 2).bfloat16().contiguous(),
    )
