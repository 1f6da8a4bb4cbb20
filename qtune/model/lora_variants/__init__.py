"""What an adapter can be beside plain LoRA, a file each: who adds a file with a `LoraVariant` in it has added one.

Plain LoRA is W + s B A with s = alpha / R. The recipe's schema asks for settings, so nothing heavy is loaded here.

Letters: O output features, I input features, R rank, s scale.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qtune.registry import registered

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = "LoRA"


@dataclass(frozen=True)
class LoraVariant:
    """`name` is its setting in [lora], true or false; `title` is what people call it, `plan_title` what a plan does.

    `peft_settings` are what LoraConfig is told beside the plain ones, by the recipe's [lora]. `scale` is s by the
    recipe's alpha and R, where it is another. `saved_as` is the setting of adapter_config.json that says that an
    adapter is one; without it a saved adapter is plain LoRA, with the alpha that peft was told. `parts` are the tensors
    that a module has beside A and B, named as in the file up to `.weight`, and `finished` makes the weight (rows, I) of
    W + s B A and the same rows of those.

    Where peft's layers run by a forward of their own (`LoraLayer.lora_variant`), the fused path leaves them to it.
    `faults` says by server, or format, why it does not take such an adapter, as a clause.
    """

    name: str
    title: str
    description: str
    peft_settings: Callable[[Any], Mapping[str, Any]]
    plan_title: str = PLAIN
    scale: Callable[[float, int], float] | None = None
    saved_as: str | None = None
    parts: tuple[str, ...] = ()
    finished: "Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None" = None
    faults: Mapping[str, str] = field(default_factory=dict)
    order: float = 100  # in the list of them; one of which nothing is said comes last


LORA_VARIANTS = registered(__name__, LoraVariant)


def of_recipe(lora: Any) -> list[LoraVariant]:
    """What the recipe's [lora] switches on."""
    return [each for name, each in LORA_VARIANTS.items() if getattr(lora, name)]


def plan_title(lora: Any) -> str:
    """What a plan calls the adapter of the recipe's [lora]."""
    return next((each.plan_title for each in reversed(of_recipe(lora)) if each.plan_title != PLAIN), PLAIN)


def saved_in(config: Mapping[str, Any]) -> list[LoraVariant]:
    """What an adapter_config.json says that its adapter is."""
    return [each for each in LORA_VARIANTS.values() if each.saved_as is not None and config.get(each.saved_as)]


def scale_of(variants: Sequence[LoraVariant], alpha: float, rank: int) -> float:
    """s of B A."""
    scales = (each.scale for each in variants if each.scale is not None)
    scale = next(scales, None)
    return alpha / rank if scale is None else scale(alpha, rank)


def faults_of(config: Mapping[str, Any], server: str) -> list[str]:
    """Why a server does not take the adapter that `config`, its adapter_config.json, describes; a clause each."""
    return [each.faults[server] for each in reversed(saved_in(config)) if server in each.faults]
