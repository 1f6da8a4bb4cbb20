"""Qwen 2 and 2.5: biases on queries, keys and values, and rows that stay where they are."""

from qtune.gguf.architectures import Cut, Family
from qtune.gguf.architectures.llama import LLAMA_3

QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

FAMILY = Family(name="qwen2", gguf_name="qwen2", cuts=(Cut("qwen2", (QWEN_2,)),), order=3)
