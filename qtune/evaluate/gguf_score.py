"""A GGUF file on a run's held-out rows: the same questions as base and tuned, asked of llama.cpp."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from qtune.data.packing import PackedRow
from qtune.data.rows import NOT_TRAINED
from qtune.evaluate.before_after import Score, marked
from qtune.evaluate.held_out import HeldOut, scored_examples
from qtune.evaluate.held_out_pairs import PairLogs, loss_of
from qtune.gguf.llama_cpp import GgufModel
from qtune.recipe.schema import Evaluate


def score_file(path: Path, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, wanted: Evaluate) -> Score:
    """What `evaluate.before_after.score` gives for a model, of the file `path`, which stops where llama.cpp does.

    Raises ModelError for a file that llama.cpp does not load.
    """
    start = time.monotonic()
    asked = scored_examples(held_out, wanted)
    packs = [*held_out.packs, *(held_out.general or ())]
    longest = max(length for pack in packs for length in pack["seq_lengths"])
    with GgufModel.loaded(path, longest + wanted.max_new_tokens) as model:
        answers = [model.continued(example.prompt_ids, wanted.max_new_tokens) for example in asked]
        pairs = _pairs(model, held_out.packs) if held_out.learned.learns_pairs else ()
        score = marked(
            str(path),
            loss_of(pairs, held_out.base or pairs, held_out.learned) if pairs else _loss(model, held_out.packs),
            _loss(model, held_out.general) if held_out.general else None,
            [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers],
            asked,
            wanted.metric,
            time.monotonic() - start,
        )
    return dataclasses.replace(score, pairs=pairs)


def _loss(model: GgufModel, packs: Iterable[PackedRow]) -> float:
    """Mean negative log-likelihood in nats per trained token, a document at a time."""
    nats = tokens = 0.0
    for ids, labels in _documents(packs):
        targets = torch.tensor(labels[1:])
        nats += cross_entropy(model.logits(ids)[:-1], targets, ignore_index=NOT_TRAINED, reduction="sum").item()
        tokens += (targets != NOT_TRAINED).sum().item()
    return nats / tokens


def _pairs(model: GgufModel, packs: Iterable[PackedRow]) -> tuple[PairLogs, ...]:
    """Log-probabilities of pairs, which are two documents one after another."""
    logs = []
    for ids, labels in _documents(packs):
        each = -cross_entropy(model.logits(ids)[:-1], torch.tensor(ids[1:]), reduction="none")
        of_answer = torch.tensor(labels[1:]) != NOT_TRAINED
        logs.append((each[of_answer].sum().item(), of_answer.sum().item(), each.sum().item(), len(each)))
    return tuple(
        PairLogs(chosen, rejected, tokens, other_tokens, whole, whole_tokens)
        for (chosen, tokens, whole, whole_tokens), (rejected, other_tokens, *_) in zip(
            logs[::2], logs[1::2], strict=True
        )
    )


def _documents(packs: Iterable[PackedRow]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Ids and labels of every document."""
    for pack in packs:
        start = 0
        for length in pack["seq_lengths"]:
            stretch = slice(start, start := start + length)
            yield [int(i) for i in pack["input_ids"][stretch]], [int(i) for i in pack["labels"][stretch]]
