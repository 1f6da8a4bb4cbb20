"""A model in memory, and all that it takes to ask it something."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedTokenizerBase

from qtune.distributed import lockstep


def autocast(device: str, compute_dtype: str) -> torch.autocast:
    """The context every forward pass runs in; float32 means no casting at all."""
    kind = device.split(":")[0]
    return torch.autocast(kind, getattr(torch, compute_dtype), enabled=compute_dtype != "float32")


def can_cache(model: Any) -> bool:
    """Whether transformers can go on from what it kept of a prompt: it asks the layers with attention how long that
    was, and where there are none refuses (5.23, `Cache.get_seq_length`)."""
    try:
        DynamicCache(config=model.config.get_text_config()).get_seq_length()
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Loaded:
    """`model` is a transformers model, or a PeftModel: a base with an adapter on it, which can be left out.

    It is on `device` (`cpu`, `cuda:0`) and computes in `compute_dtype`, by torch's name.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: str
    compute_dtype: str

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.compute_dtype)

    def as_base(self) -> AbstractContextManager[None]:
        """Within it the base answers, where there is one beside the tuned model."""
        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()

    def passes_together(self) -> AbstractContextManager[None]:
        """Within it passes are run; of a model of which other ranks hold parts, all of theirs, too: it ends when none
        of them wants one any more. All enter it at the same places of the story. Raises RankLost."""
        return lockstep.passes_together(self.without_peft)

    @property
    def without_peft(self) -> Any:
        """The transformers model itself, in which the adapter stays."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
