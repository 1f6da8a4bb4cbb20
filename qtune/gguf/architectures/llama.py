"""Llama and what is built like it, SmolLM among them."""

from qtune.gguf.architectures import BYTE_LEVEL, DIGITS, Cut, Family

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FAMILY = Family(
    name="llama",
    gguf_name="llama",
    rearranged=("q_proj", "k_proj"),
    cuts=(
        Cut("gpt-2", (BYTE_LEVEL,)),
        Cut("smollm", (DIGITS, BYTE_LEVEL)),
        Cut("llama-bpe", (LLAMA_3,), takes_whole=True),
        Cut("smaug-bpe", (LLAMA_3,)),
    ),
    order=1,
)
