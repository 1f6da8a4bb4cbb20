"""Qwen 3: queries and keys are normalised, and text is cut as Qwen 2 cuts it."""

from qtune.gguf.architectures import Family

FAMILY = Family(name="qwen3", gguf_name="qwen3", order=4)
