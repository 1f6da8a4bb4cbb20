"""Mistral, which llama.cpp calls a Llama; its newer tokenizers are made by Tekken."""

from qtune.gguf.architectures import Cut, Family

TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FAMILY = Family(
    name="mistral",
    gguf_name="llama",
    rearranged=("q_proj", "k_proj"),
    cuts=(Cut("tekken", (TEKKEN,), takes_whole=True),),
    order=2,
)
