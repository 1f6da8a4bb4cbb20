"""SmolLM 3, a Llama with layers that have no RoPE."""

from typing import Any

from qtune.gguf.architectures import Family

ROPE_EVERY = 4  # llama.cpp leaves RoPE out of every fourth layer, whatever the file says


def faults(config: Any) -> list[str]:
    layers = range(1, config.num_hidden_layers + 1)
    if list(config.no_rope_layers) == [int(layer % ROPE_EVERY != 0) for layer in layers]:
        return []
    return [f"no_rope_layers is not every {ROPE_EVERY}th, which llama.cpp takes for granted"]


FAMILY = Family(name="smollm3", gguf_name="smollm3", rearranged=("q_proj", "k_proj"), faults=faults, order=5)
