"""Packed documents: the same numbers as one at a time, and no token that sees another document."""

import random
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
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
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qtune.memory import packed_attention
from qtune.memory.documents import bucket_documents
from qtune.memory.packed_attention import document_attention
from qtune.merge.logit_distance import logits_of

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
    "phimoe, in its mask alone": (PhimoeConfig, PhimoeForCausalLM),
}


def windowed(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model that sees four tokens back, with transformers' own attention and with ours."""
    config_class, model_class = WINDOWED[kind]
    packed_attention.register()
    settings = {**SHAPE, "sliding_window": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    plain, ours = (
        model_class._from_config(config_class(**settings), attn_implementation=name).eval()  # each keeps its config
        for name in ("eager", packed_attention.NAME)
    )
    ours.load_state_dict(plain.state_dict())
    assert plain.config._attn_implementation == "eager"
    packed_attention.install(ours)
    return plain, ours


# Without a padding mask no mask was made at all, so rows longer than the window saw everything: an unpadded prompt,
# and every row of a merge's verification.
@pytest.mark.parametrize("kind", WINDOWED)
def test_rows_longer_than_the_window_are_what_they_are_in_plain_transformers(kind: str) -> None:
    plain, ours = windowed(kind)
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


@pytest.mark.parametrize("kind", WINDOWED)
def test_rows_padded_behind_are_within_the_window_without_a_mask(kind: str) -> None:
    """So are the rows of a verification given, and those of lm-eval."""
    plain, ours = windowed(kind)
    rows = [torch.randint(6, 262, (length,)).tolist() for length in (21, 9, 3)]
    for logits, row in zip(logits_of(ours, rows, "cpu"), rows, strict=True):
        alone = plain(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)


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


class Launches(TorchDispatchMode):
    """The kernels that are launched, by name: views move no number, and room is made by none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or "empty" in func.name()):
            self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def by_scattering(rows: list[torch.Tensor], lengths: tuple[int, ...]) -> torch.Tensor:
    """The same pack with gathers of torch's own, whose gradients are added up at their places: (1, T, H, E)."""
    outputs, buckets = [], bucket_documents(lengths, rows[0].device)
    for places in buckets.split(buckets.positions):
        query, key, value = (
            row[0].transpose(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
            for row in rows
        )
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, buckets.real)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [LENGTHS, (40, 40, 40), (8, 7)])
def test_a_pack_is_gathered_both_ways_to_the_bit_and_in_few_launches(
    lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    buckets = bucket_documents(lengths, torch.device("cpu"))  # made once for all layers
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, heads, sum(lengths), 16, generator=generator, dtype=dtype) for heads in (4, 2, 2)]
    weights = torch.randn(1, sum(lengths), 4, 16, generator=generator, dtype=dtype)

    def ours(rows: list[torch.Tensor]) -> torch.Tensor:
        return document_attention(torch.nn.Module(), *rows, None, document_lengths=lengths)[0]

    results, launches = [], []
    for attention in (ours, lambda rows: by_scattering(rows, lengths)):
        leaves = [row.clone().requires_grad_() for row in rows]
        with Launches() as counted:
            output = attention(leaves)
            results.append((output, *torch.autograd.grad(output, leaves, weights)))
        launches.append(counted.names)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not {"index_add", "index_add_", "zeros", "new_zeros"} & set(launches[0])
    assert launches[0].count("index_select") == 2 * 4  # queries, keys, values and the output, both ways
    attended, joined, padded = 2 * len(buckets.shapes), 4 * (len(buckets.shapes) > 1), buckets.padding is not None
    assert len(launches[0]) == attended + 2 * 4 + joined + padded < len(launches[1])


def test_every_token_is_in_one_bucket_and_padding_is_at_most_double() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lengths = tuple(rng.randint(1, 200) for _ in range(rng.randint(2, 40)))
        buckets = bucket_documents(lengths, torch.device("cpu"))
        assert buckets.positions[buckets.real].tolist() == list(range(sum(lengths)))
        assert len(buckets.positions) == sum(documents * longest for documents, longest in buckets.shapes)
        assert len(buckets.positions) <= 2 * sum(lengths)
