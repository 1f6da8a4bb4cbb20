"""Greedy answers to many prompts at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qtune.errors import OutOfMemory
from qtune.model.base import autocast
from qtune.train.out_of_memory import free_memory, is_out_of_memory, let_go

BATCH_PROMPTS = 32


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    device: str,
    compute_dtype: str,
) -> list[str]:
    """One text per prompt (token ids, BOS included), in the prompts' order, special tokens left out.

    A batch that runs out of memory is answered in halves. Raises OutOfMemory where one row alone does.
    """
    was_training = model.training
    model.eval()
    settings = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = [""] * len(prompts)

    def continue_batch(indices: list[int]) -> None:
        ids, mask = left_pad([prompts[i] for i in indices], tokenizer.pad_token_id, device)
        with autocast(device, compute_dtype):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for index, row in zip(indices, output[:, ids.shape[1] :], strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True).strip()

    in_pieces(
        batches_of_like_length(prompts),
        continue_batch,
        f"Memory ran out while one held-out row was answered in up to {max_new_tokens} tokens. Lower"
        " evaluate.max_new_tokens, or set evaluate.rows to 0 to leave the answers out.",
    )
    model.train(was_training)
    return texts


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
