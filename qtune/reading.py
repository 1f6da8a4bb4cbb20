"""What a recipe's data is to a run, read and refused without a plan, a model, or what loads one."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.data.prepare import Prepared, prepare
from qtune.data.sources import Tell
from qtune.evaluate.held_out import HeldOut, refuse_unscorable, scored_examples
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Recipe


@dataclass(frozen=True)
class Read:
    """The rows as the model is to see them, and what both models will be asked."""

    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    held_out: HeldOut


def read(recipe: Recipe, tell: Tell) -> Read:
    """Raises a UserError for rows that could not be trained on, or not be scored afterwards."""
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe, tokenizer, tell)
    held_out = HeldOut.of(prepared, recipe, tokenizer)
    refuse_unscorable(scored_examples(held_out, recipe.evaluate), recipe.evaluate)
    return Read(tokenizer, prepared, held_out)
