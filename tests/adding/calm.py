"""A made-up variant of LoRA: s = alpha / R^(2/3), between plain LoRA and rsLoRA, told to peft as another alpha."""

from qtune.model.lora_variants import LoraVariant

CALM = LoraVariant(
    "calm",
    "calm LoRA",
    "Scale by alpha/rank^(2/3).",
    lambda lora: {"lora_alpha": lora.alpha * lora.rank ** (1 / 3)},
    plan_title="calm LoRA",
    scale=lambda alpha, rank: alpha / rank ** (2 / 3),
)
