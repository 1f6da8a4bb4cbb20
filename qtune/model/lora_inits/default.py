"""A random, B zero, as LoRA begins (section 4.1 of arXiv:2106.09685)."""

from qtune.model.lora_inits import LoraInit

RANDOM = LoraInit("default", "A at random and B zero, as LoRA does", order=0)
