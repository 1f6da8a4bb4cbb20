"""What both models are asked, and which rows are answered. It loads no model, so that rows are read without one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.data.packing import PackedRow, packed_rows
from qtune.data.prepared import Prepared
from qtune.data.tokenize import Example
from qtune.evaluate.forgetting import general_packs
from qtune.recipe.schema import Evaluate, Recipe


@dataclass(frozen=True)
class HeldOut:
    """What both models are asked: packed rows for the loss, examples for the score, and general text where wanted."""

    packs: Sequence[PackedRow]
    examples: Sequence[Example]
    stop_token_ids: Sequence[int]
    general: Sequence[PackedRow] | None = None

    @classmethod
    def of(cls, prepared: Prepared, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> "HeldOut":
        """Raises DataError for a text in `evaluate.general` that cannot be measured."""
        packs = packed_rows(prepared.held_out, prepared.held_out_packs)
        general = general_packs(recipe.evaluate.general, tokenizer, recipe.data.max_tokens)
        return cls(packs, prepared.held_out, prepared.stop_token_ids, general)


def scored_examples(held_out: HeldOut, wanted: Evaluate) -> list[Example]:
    """The rows that are answered: those with a prompt, up to `rows`, none without a metric."""
    if wanted.metric == "none":
        return []
    return list(itertools.islice((example for example in held_out.examples if example.prompt_ids), wanted.rows))
