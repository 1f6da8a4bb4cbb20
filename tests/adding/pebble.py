"""A GGUF family that llama.cpp does not know: Granite's weights by other names. Copied into qtune/gguf/architectures by
test_a_gguf_family."""

from qtune.gguf.architectures import Cut, Family

WORDS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def place_of(name, layers):
    *path, last, kind = name.split(".")
    if path[:2] == ["model", "layers"]:
        return f"blk.{path[2]}.pebble.{last}.{kind}" if int(path[2]) < layers else None
    return f"{WORDS[last]}.{kind}" if last in WORDS else None


def faults(config):
    return [] if config.logits_scaling == 1 else ["its logits are scaled"]


def describe(writer, config):
    writer.add_residual_scale(config.residual_multiplier)


FAMILY = Family(
    name="granite",
    gguf_name="pebble",
    rearranged=("k_proj",),
    cuts=(Cut("pebble-bpe", (r"\d{3}",)),),
    place_of=place_of,
    faults=faults,
    describe=describe,
)
