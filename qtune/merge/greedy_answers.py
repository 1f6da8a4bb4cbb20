"""What two models answer if each takes the most likely token every time: a sample to read beside the figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from qtune.merge.logit_distance import Row, logits_of
from qtune.model.loaded import can_cache

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 3, 32, 24


@dataclass(frozen=True)
class Greedy:
    """The most likely continuation of one prompt by the live and by the merged model."""

    prompt: str
    live: str
    merged: str
    same: bool


def prompts_of(rows: Sequence[Row]) -> list[Row]:
    """The beginnings of the first rows, all of one length so that they are answered together."""
    chosen = rows[:PROMPTS]
    length = min(min(PROMPT_TOKENS, max(1, len(row) // 2)) for row in chosen)
    return [row[:length] for row in chosen]


def continued(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Row], stop_token_ids: Sequence[int], device: str
) -> list[Row]:
    """What follows each of `prompts`, which have one length, up to the first of the run's stop tokens: the base's own
    settings may know fewer of them."""
    ids, stop = torch.tensor(prompts, device=device), list(stop_token_ids)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        use_cache=can_cache(model),
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
    )
    answers = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [_until(stop, answer) for answer in answers[:, ids.shape[1] :].tolist()]


def _until(stop: Sequence[int], answer: Row) -> Row:
    ends = [place for place, token in enumerate(answer) if token in stop]
    return answer[: ends[0] + 1] if ends else answer


def continued_alike(
    model: PreTrainedModel, prompts: Sequence[Row], answers: Sequence[Row], stop_token_ids: Sequence[int], device: str
) -> list[Row]:
    """What `continued` would give, which is mostly known: one pass tells whether it would be `answers`."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    found = []
    for prompt, answer, logits in zip(prompts, answers, logits_of(model, rows, device), strict=True):
        guessed = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        found.append(answer if guessed == answer else continued(model, [prompt], stop_token_ids, device)[0])
    return found
