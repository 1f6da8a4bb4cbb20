"""Packing: nothing lost, nothing split, nothing padded."""

import math
import random

import torch
from conftest import byte_tokenizer

from qtune.data.formats import Document
from qtune.data.packing import collate, pack, packed_rows
from qtune.data.tokens import Encoder, tokenize


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


def test_it_fills_well() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(20, 600) for _ in range(3000)]
    assert sum(lengths) / (len(pack(lengths, 2048)) * 2048) > 0.99


def test_a_batch_is_one_row_with_positions_that_start_anew() -> None:
    encoder = Encoder.of(byte_tokenizer())
    examples = [tokenize(Document(text, "r"), None, encoder, 99, "drop") for text in ("ab", "c", "defg")]
    rows = packed_rows(examples, [(0, 2), (1,)])
    assert rows[0]["seq_lengths"] == [4, 6]
    batch = collate(rows)
    assert batch["document_lengths"] == (4, 6, 3)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 13)
    starts = batch["position_ids"] == 0
    assert torch.equal(batch["labels"] == -100, starts)
    assert torch.equal(batch["labels"][~starts], batch["input_ids"][~starts])
