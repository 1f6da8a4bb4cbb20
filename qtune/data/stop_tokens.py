"""What ends an answer: in the rows, for the tokenizer, and where the model is served. They should agree."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qtune.data.chat_template import ChatTemplate

SERVED_BY = ("generation_config.json", "config.json")  # in the order in which transformers and vLLM ask them


@dataclass(frozen=True)
class StopChain:
    """`learned` is the token that ends an answer of the rows, None where nothing does; `served` are those at which
    `served_by` has generation stop, both empty where no file says. `doubts` are sentences, none where all agree."""

    learned: str | None
    tokenizer_eos: str | None
    served: tuple[str, ...]
    served_by: str
    doubts: tuple[str, ...]


def stop_token_ids(template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What ends an answer, the one that is learned first. Documents end with the tokenizer's end of sequence."""
    if template is not None:
        return template.stop_token_ids
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def stop_chain(template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase) -> StopChain:
    """The chain for chats (with a template) or documents."""
    learned = next(iter(stop_token_ids(template, tokenizer)), None)
    served, served_by = _served(Path(tokenizer.name_or_path))
    name = tokenizer.convert_ids_to_tokens
    doubts = []
    if learned is None:
        doubts.append("The tokenizer has no end of sequence, so a document's end cannot be learned.")
    elif served_by and learned not in served:
        doubts.append(
            f"An answer ends with {name(learned)!r}, and {served_by} stops at"
            f" {' and '.join(repr(name(each)) for each in served)}: served with it, the tuned model does not stop. Add"
            f" {learned} to eos_token_id there."
        )
    elif not served_by and learned != tokenizer.eos_token_id:
        doubts.append(
            f"An answer ends with {name(learned)!r}, the tokenizer's end of sequence is {tokenizer.eos_token!r}, and"
            f" no generation_config.json names both. Write one with eos_token_id = {learned}."
        )
    return StopChain(
        learned=None if learned is None else name(learned),
        tokenizer_eos=tokenizer.eos_token,
        served=tuple(name(each) for each in served),
        served_by=served_by,
        doubts=tuple(doubts),
    )


def _served(folder: Path) -> tuple[tuple[int, ...], str]:
    """The ids at which generation stops, and the file that says so."""
    for name in SERVED_BY:
        try:
            ends = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        ids = ends if isinstance(ends, list) else [ends]
        if ids and all(isinstance(each, int) for each in ids):
            return tuple(ids), name
    return (), ""
