"""Greedy answers to many prompts at once, and one answer told while it is made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qtune.errors import OutOfMemory
from qtune.memory.oom_recovery import free_memory, is_out_of_memory, let_go
from qtune.model.loaded import Loaded, can_cache

BATCH_PROMPTS = 32
MOST_WATCHED_TOKENS = 64  # of an answer that is only looked at while it trains; the schema's evaluate.watch says so
NO_MEMORY = "(no answer: memory ran out)"
HALF_A_CHARACTER = "\ufffd"  # what the bytes of a character decode to that is not whole yet


@dataclass(frozen=True)
class Choosing:
    """How each token is chosen: the likeliest at `temperature` 0, else drawn from the likeliest that together have
    `top_p` of the probability. The same `seed` draws the same ones."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def for_transformers(self) -> dict[str, Any]:
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@torch.no_grad()
def answer(
    loaded: Loaded, prompts: Sequence[Sequence[int]], stop_token_ids: Sequence[int], max_new_tokens: int
) -> list[str]:
    """One text per prompt (token ids, BOS included), in the prompts' order, special tokens left out.

    A batch that runs out of memory is answered in halves. Raises OutOfMemory where one row alone does.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    was_training = model.training
    model.eval()
    settings = _settings(loaded, stop_token_ids, max_new_tokens, Choosing())
    texts = [""] * len(prompts)

    def continue_batch(indices: list[int]) -> None:
        ids, mask = left_pad([prompts[i] for i in indices], tokenizer.pad_token_id, loaded.device)
        with loaded.autocast():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for index, row in zip(indices, output[:, ids.shape[1] :], strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True).strip()

    with loaded.passes_together():
        in_pieces(
            batches_of_like_length(prompts),
            continue_batch,
            f"Memory ran out while one held-out row was answered in up to {max_new_tokens} tokens. Lower"
            " evaluate.max_new_tokens, or set evaluate.rows to 0 to leave the answers out.",
        )
    model.train(was_training)
    return texts


def watched_answers(
    loaded: Loaded, prompts: Sequence[Sequence[int]], stop_token_ids: Sequence[int], max_new_tokens: int
) -> list[str]:
    """Short answers in the middle of training, which go on where memory runs out for one."""
    try:
        return answer(loaded, prompts, stop_token_ids, min(max_new_tokens, MOST_WATCHED_TOKENS))
    except OutOfMemory:
        return [NO_MEMORY] * len(prompts)


def _settings(
    loaded: Loaded, stop_token_ids: Sequence[int], max_new_tokens: int, choosing: Choosing
) -> GenerationConfig:
    """Without what a base's generation_config.json would add in silence: beams, or a penalty on repeated words."""
    return GenerationConfig(
        **choosing.for_transformers(),
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=can_cache(loaded.model),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids),
        pad_token_id=loaded.tokenizer.pad_token_id,
    )


@torch.no_grad()
def answer_aloud(
    loaded: Loaded,
    prompt: Sequence[int],
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    choosing: Choosing,
    say: Callable[[str], None],
) -> bool:
    """Answer one prompt of a model in eval mode; `say` hears the text piece by piece as its tokens come.

    The pieces together are what `answer` gives. Returns whether the answer came to its end before `max_new_tokens`.
    """
    torch.manual_seed(choosing.seed)
    ids, mask = left_pad([prompt], 0, loaded.device)
    settings = _settings(loaded, stop_token_ids, max_new_tokens, choosing)
    spoken = Spoken(loaded.tokenizer, say)
    with loaded.autocast():
        loaded.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, streamer=spoken)
    return spoken.ids[-1] in stop_token_ids


class Spoken(BaseStreamer):
    """Token ids as `generate` hands them over, told as text: whole characters, and no special tokens.

    Whitespace is held back until more text follows it, as an answer's ends are stripped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]):
        self._tokenizer, self._say = tokenizer, say
        self._is_prompt, self._told = True, 0
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt (1, T) first, then one token (1,) at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        self._tell(self._text().rstrip(HALF_A_CHARACTER).strip())

    def end(self) -> None:
        self._tell(self._text().strip())

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        return text

    def _tell(self, text: str) -> None:
        if len(text) > self._told:
            self._say(text[self._told :])
            self._told = len(text)


def in_pieces(batches: Iterable[list[int]], act: Callable[[list[int]], None], refusal: str) -> None:
    """`act` on every batch of indices; one that runs out of memory is done again in halves.

    Raises OutOfMemory, which says `refusal`, where a single row is too much.
    """
    waiting = list(batches)
    while waiting:
        indices = waiting.pop(0)
        try:
            act(indices)
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            let_go(fault)
            free_memory()
            if len(indices) == 1:
                raise OutOfMemory(refusal) from None
            middle = len(indices) // 2
            waiting[:0] = [indices[:middle], indices[middle:]]


def batches_of_like_length(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of the prompts, shortest first, in batches: little of a batch is padding."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH_PROMPTS):
        yield order[start : start + BATCH_PROMPTS]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, longest) ids and mask, every prompt ending at the right edge, where generation goes on."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
