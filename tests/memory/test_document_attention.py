"""Packed documents: the same numbers as one at a time, and no token that sees another document."""

import random

import pytest
import torch
from conftest import tiny_config
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qtune.memory import document_attention
from qtune.memory.document_attention import bucket_documents

LENGTHS = (5, 9, 3, 17, 1, 30, 30)
SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    document_attention.register()
    if kind == "llama":
        config, cls = tiny_config(), LlamaForCausalLM
    elif kind == "qwen3":
        config, cls = Qwen3Config(**SHAPE), Qwen3ForCausalLM
    else:
        config, cls = MistralConfig(**SHAPE, sliding_window=4), MistralForCausalLM
    config._attn_implementation = document_attention.NAME
    return cls(config).eval()


def packed(ids: torch.Tensor, lengths: tuple[int, ...]) -> dict:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "document_lengths": lengths}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral with a sliding window"])
def test_packed_logits_and_gradients_are_those_of_one_document_at_a_time(kind: str) -> None:
    model = build(kind)
    ids = torch.randint(6, 262, (1, sum(LENGTHS)))
    weights = torch.randn(sum(LENGTHS), 262)

    together = model(**packed(ids, LENGTHS)).logits[0]
    (together * weights).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    apart = torch.cat([model(**packed(part, (part.shape[1],))).logits[0] for part in ids.split(LENGTHS, 1)])
    (apart * weights).sum().backward()

    torch.testing.assert_close(together, apart, atol=2e-6, rtol=1e-5)
    for mine, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=2e-4, rtol=1e-4)


def test_sliding_window_is_what_transformers_own_attention_does() -> None:
    model, ids = build("mistral with a sliding window"), torch.randint(6, 262, (1, 21))
    ours = model(**packed(ids, (21,))).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, model(input_ids=ids).logits, atol=2e-6, rtol=1e-5)


def test_a_change_in_one_document_leaves_the_others_bit_for_bit() -> None:
    model, ids = build("llama"), torch.randint(6, 262, (1, sum(LENGTHS)))
    changed = ids.clone()
    changed[0, 5:14] = 7  # the second document
    before, after = (model(**packed(row, LENGTHS)).logits[0] for row in (ids, changed))
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[14:], after[14:])
    assert not torch.equal(before[5:14], after[5:14])


def test_padded_batches_and_generation_use_ordinary_attention() -> None:
    model, ids = build("llama"), torch.randint(6, 262, (2, 8))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    wanted = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    padded = model.generate(input_ids=ids, attention_mask=mask, **wanted)
    alone = model.generate(input_ids=ids[:1, 3:], attention_mask=mask[:1, 3:], **wanted)
    assert padded[0, 8:].tolist() == alone[0, 5:].tolist()


def test_every_token_is_in_one_bucket_and_padding_is_at_most_double() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lengths = tuple(rng.randint(1, 200) for _ in range(rng.randint(2, 40)))
        buckets, back = bucket_documents(lengths, torch.device("cpu"))
        places = torch.cat([bucket.positions.flatten()[bucket.real] for bucket in buckets])
        assert places[back].tolist() == list(range(sum(lengths)))
        assert sum(bucket.positions.numel() for bucket in buckets) <= 2 * sum(lengths)
