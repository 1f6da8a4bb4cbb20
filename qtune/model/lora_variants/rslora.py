"""rsLoRA: s = alpha / sqrt(R) (arXiv:2312.03732)."""

import math

from qtune.model.lora_variants import LoraVariant

RSLORA = LoraVariant(
    "rslora",
    "rsLoRA",
    "Scale by alpha/sqrt(rank), which keeps high ranks learning (rsLoRA).",
    lambda lora: {"use_rslora": True},
    scale=lambda alpha, rank: alpha / math.sqrt(rank),
    saved_as="use_rslora",
    faults={"SGLang": "it is rsLoRA, which SGLang would scale as LoRA, that is too weakly"},
    order=10,
)
