"""Packed documents: the same numbers as one at a time, and no token that sees another document."""

import random

import pytest
import torch
from conftest import tiny_config
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qtune.memory import packed_attention
from qtune.memory.packed_attention import bucket_documents

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
    packed_attention.register()
    if kind == "llama":
        config, cls = tiny_config(), LlamaForCausalLM
    elif kind == "qwen3":
        config, cls = Qwen3Config(**SHAPE), Qwen3ForCausalLM
    else:
        config, cls = MistralConfig(**SHAPE, sliding_window=4), MistralForCausalLM
    config._attn_implementation = packed_attention.NAME
    model = cls(config).eval()
    packed_attention.install(model)
    return model


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


WINDOWED = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
}


# Without a padding mask no mask was made at all, so rows longer than the window saw everything: an unpadded prompt,
# and every row of a merge's verification.
@pytest.mark.parametrize("kind", WINDOWED)
def test_rows_longer_than_the_window_are_what_they_are_in_plain_transformers(kind: str) -> None:
    config_class, model_class = WINDOWED[kind]
    config = config_class(**SHAPE, sliding_window=4, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    torch.manual_seed(0)
    plain = model_class._from_config(config, attn_implementation="eager").eval()
    ours = model_class._from_config(config, attn_implementation=packed_attention.NAME).eval()
    ours.load_state_dict(plain.state_dict())
    packed_attention.install(ours)
    ids = torch.randint(6, 262, (1, 21))
    wanted = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    expected, found = (model.generate(ids, output_logits=True, **wanted) for model in (plain, ours))
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        ours(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-4
    )


def test_a_packed_row_costs_no_mask_though_its_window_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(packed_attention, "sdpa_mask", lambda *args, **kwargs: made.append(kwargs))
    model, ids = build("mistral with a sliding window"), torch.randint(6, 262, (1, 21))
    model(**packed(ids, (21,)))
    model(**packed(ids, (9, 12)))
    assert not made
    model(input_ids=ids)
    assert made


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
