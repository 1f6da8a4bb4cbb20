"""Packing: nothing lost, nothing split, nothing padded."""

import math
import random
import time

import torch
from conftest import byte_tokenizer

from qtune.data.dataset import Examples, ExampleWriter
from qtune.data.packing import collate, pack, packed_rows
from qtune.data.rows import Document, Example
from qtune.data.tokenize import Encoder, tokenize


def written(examples: list[Example]) -> Examples:
    writer = ExampleWriter(None)
    for example in examples:
        writer.add(example)
    return writer.finish()


def test_every_document_is_in_one_pack_and_none_is_over_full() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        size = rng.randint(8, 300)
        lengths = [rng.randint(1, size) for _ in range(rng.randint(1, 60))]
        packs = pack(lengths, size)
        assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in members) <= size for members in packs)
        assert len(packs) <= math.ceil(11 / 9 * math.ceil(sum(lengths) / size)) + 4 or max(lengths) > size // 2
        assert packs == pack(lengths, size)


def test_it_is_best_fit_decreasing() -> None:
    """Against the rule as it is written down: longest first, each into the fullest sequence that still takes it."""
    rng = random.Random(2)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 80))]
        filled: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            room = {n: 50 - sum(lengths[j] for j in members) for n, members in enumerate(filled)}
            fitting = [n for n in room if room[n] >= lengths[i]]
            if fitting:
                filled[min(fitting, key=lambda n: (room[n], n))].append(i)
            else:
                filled.append([i])
        assert pack(lengths, 50) == sorted(tuple(sorted(members)) for members in filled)


def test_a_quarter_of_a_million_rows_take_a_moment() -> None:
    """With one sorted list of sequences the time grew with the square of the rows."""
    rng, start = random.Random(3), time.process_time()
    pack([rng.randint(1, 1500) for _ in range(250_000)], 2048)
    assert time.process_time() - start < 5


def test_it_fills_well() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(20, 600) for _ in range(3000)]
    assert sum(lengths) / (len(pack(lengths, 2048)) * 2048) > 0.99


def test_a_batch_is_one_row_with_positions_that_start_anew() -> None:
    encoder = Encoder.of(byte_tokenizer())
    examples = tokenize([Document(text, "r") for text in ("ab", "c", "defg")], None, encoder)
    rows = packed_rows(written(examples), [(0, 2), (1,)])
    assert rows[0]["seq_lengths"] == [4, 6]
    batch = collate(rows)
    assert batch["document_lengths"] == (4, 6, 3)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 13)
    starts = batch["position_ids"] == 0
    assert torch.equal(batch["labels"] == -100, starts)
    assert torch.equal(batch["labels"][~starts], batch["input_ids"][~starts])
