"""DoRA: every row of W + s B A is brought to its learned length (equation 5 of arXiv:2402.09353)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtune.model.lora_variants import LoraVariant

if TYPE_CHECKING:
    from torch import Tensor

MAGNITUDE = "lora_magnitude_vector"  # (O,)


def at_learned_length(changed: "Tensor", parts: "Mapping[str, Tensor]") -> "Tensor":
    from torch.linalg import vector_norm

    length = vector_norm(changed, dim=1, keepdim=True)
    return changed.mul_(parts[MAGNITUDE][:, None] / length)


DORA = LoraVariant(
    "dora",
    "DoRA",
    "Learn magnitude and direction apart (DoRA); a little better, and slower.",
    lambda lora: {"use_dora": True},
    plan_title="DoRA",
    saved_as="use_dora",
    parts=(MAGNITUDE,),
    finished=at_learned_length,
    faults={
        "vLLM": "it is DoRA, which vLLM does not have",
        "SGLang": "it is DoRA, which SGLang does not have",
        "llama.cpp": "the run trained DoRA, which llama.cpp does not have",
    },
    order=20,
)
