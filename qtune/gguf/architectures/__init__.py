"""Architectures that llama.cpp shares with transformers, a file each. Who adds a file with a `Family` in it has added
one.

What all have in common, a decoder with RoPE and gated MLPs, is in `layout`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

from qtune.registry import registered

BYTE_LEVEL, DIGITS = "byte level", "digits"  # steps of a cut that tokenizer.json names rather than spells
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Cut:
    """How a byte-level tokenizer cuts text before it merges: by these patterns and named steps, one after another.

    `pre` is what llama.cpp calls it (tokenizer.ggml.pre). With `takes_whole` a piece that is a token is taken as it is,
    whatever the merges say.
    """

    pre: str
    steps: tuple[str, ...]
    takes_whole: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture: `name` is its model_type in transformers, `gguf_name` what a GGUF file says.

    `rearranged` are the modules whose rows change places. In what llama.cpp calls `llama`, RoPE turns neighbouring
    channels of a head together, where transformers pairs the first half with the second.
    `cuts` are those of its tokenizers, and `activation` is what its MLPs compute in llama.cpp.
    `place_of` gives a tensor of the checkpoint its name in the file, None where there is no place; it is told how many
    layers there are. Without it the gguf package says so, which has the names of `gguf_name`.
    `faults` are settings of transformers' configuration that llama.cpp would not follow, a clause each.
    `describe` writes what the file says beyond the sizes and the RoPE of all.
    """

    name: str
    gguf_name: str
    rearranged: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    activation: str = "silu"
    place_of: Callable[[str, int], str | None] | None = None
    faults: Callable[[Any], Sequence[str]] = lambda config: ()
    describe: Callable[[GGUFWriter, Any], None] = lambda writer, config: None
    order: int = 100  # in what is said of them; one of which nothing is said comes last

    def places(self, names: Sequence[str], layers: int) -> dict[str, str | None]:
        """By name in the checkpoint, the name in the file; None where there is no place."""
        if self.place_of is not None:
            return {name: self.place_of(name, layers) for name in names}
        arch = next(arch for arch, gguf_name in MODEL_ARCH_NAMES.items() if gguf_name == self.gguf_name)
        known = get_tensor_name_map(arch, layers)
        return {name: known.get_name(name, try_suffixes=SUFFIXES) for name in names}


FAMILIES = registered(__name__, Family)
CUTS = {cut.pre: cut for family in FAMILIES.values() for cut in family.cuts}
