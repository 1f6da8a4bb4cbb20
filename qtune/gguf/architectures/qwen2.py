"""Qwen 2 and 2.5: biases on queries, keys and values, and rows that stay where they are."""

from qtune.gguf.architectures import Cut, Family

QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FAMILY = Family(name="qwen2", gguf_name="qwen2", cuts=(Cut("qwen2", (QWEN_2,)),), order=3)
