"""What an adapter begins from, a file each: who adds a file with a `LoraInit` in it has added one.

Whatever it is, the base stays as it is published, in files, in the cache and in memory: the adapter that is saved is
added to that base and no other. The recipe's schema asks for names, so nothing heavy is loaded here.

Letters: O output features, I input features, R rank, s scale.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qtune.registry import registered

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Module

Rounded = Callable[[str, "Module"], "tuple[Tensor, Tensor]"]
"""By name and layer: the weight (O, I) that the files have, and the one that the live model computes with."""
Pass = Callable[[Any], object]
"""A forward pass over one packed row."""


class Excluded(NamedTuple):
    """A setting with which an init cannot be: its value, or one of a list of them, and why, as a clause."""

    key: tuple[str, ...]
    value: Any
    why: str


@dataclass(frozen=True)
class LoraInit:
    """`name` is its word for lora.init, and `use` says what it is.

    `by_weights` sets A and B of an attached adapter where the weights it is on are known, before any memory technique
    is on; `by_rows` from passes over training rows, when all are. Neither has a model whose A and B are loaded next.
    `changes_answers`: B A is not nought, so the model answers otherwise than its base before it is trained.
    `not_onto_original` says why it cannot be merged onto weights that were not rounded, as a sentence.
    """

    name: str
    use: str
    by_weights: "Callable[[PeftModel, Rounded], None] | None" = None
    by_rows: "Callable[[PeftModel, Iterable[Any], Pass], None] | None" = None
    excludes: tuple[Excluded, ...] = ()
    changes_answers: bool = False
    not_onto_original: str | None = None
    order: float = 100  # in the list of them; one of which nothing is said comes last


LORA_INITS = registered(__name__, LoraInit)
DEFAULT = "default"
CHANGES_BASE = (
    "it trains on another base than the published one: what it takes out of the weights is missing in the 4 bits that"
    " are left, so its adapter would be wrong on the base that everybody has"
)
REFUSED = {"pissa": f"PiSSA is not done, as {CHANGES_BASE}", "olora": f"OLoRA is not done, as {CHANGES_BASE}"}


def of_run(recipe: Mapping[str, Any]) -> LoraInit:
    """That of a lock's recipe; of a version that had none, or does not know this one, the default."""
    name = recipe.get("lora", {}).get("init", DEFAULT)
    return LORA_INITS.get(name, LORA_INITS[DEFAULT])


def excluded(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Excluded]]:
    """What is written in a recipe and cannot be with the init that is, and the word for that."""
    asked = _value(recipe, ("lora", "init"))
    for init in (each for name, each in LORA_INITS.items() if name == asked):
        for each in init.excludes:
            value = _value(recipe, each.key)
            if value == each.value or (isinstance(value, list) and each.value in value):
                yield init.name, each


def _value(recipe: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        recipe = recipe.get(part) if isinstance(recipe, Mapping) else None
    return recipe
