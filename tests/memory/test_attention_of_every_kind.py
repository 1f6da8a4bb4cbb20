"""Sinks, caps, chunks, windows, wide values, chosen keys: what transformers' own attention makes, and its gradients."""

from typing import Any

import pytest
import torch
from attention_kinds import KINDS, WINDOWS, made
from transformers import DeepseekV4ForCausalLM, Gemma3nForCausalLM, LlamaForCausalLM, PreTrainedModel

from qtune.memory import nf4, tiled_attention
from qtune.memory.packed_attention import document_attention
from qtune.model import adapter

LENGTHS = (5, 9, 21, 1, 3, 17)


def packed(ids: torch.Tensor, lengths: tuple[int, ...]) -> dict[str, Any]:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "document_lengths": lengths, "use_cache": False}


def gradients(model: PreTrainedModel, logits: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_pack_are_what_they_are_alone_in_plain_transformers(kind: str) -> None:
    plain, ours = made(kind)
    ids, weights = torch.randint(6, 262, (1, sum(LENGTHS))), torch.randn(sum(LENGTHS), 262)
    together = ours(**packed(ids, LENGTHS)).logits[0]
    apart = torch.cat([plain(input_ids=part, use_cache=False).logits[0] for part in ids.split(LENGTHS, 1)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    mine, right = gradients(ours, together, weights), gradients(plain, apart, weights)
    assert mine.keys() == right.keys()
    assert "sinks" not in str(KINDS[kind]) or any("sinks" in name for name in mine)
    for name, gradient in right.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_and_padded_rows_and_answers_are_those_of_plain_transformers(kind: str) -> None:
    plain, ours = made(kind)
    ids = torch.randint(6, 262, (2, 19))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for given in ({}, {"attention_mask": torch.ones_like(ids)}):
        found, expected = (model(input_ids=ids, **given).logits for model in (ours, plain))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wanted = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    wanted["return_dict_in_generate"] = True
    found, expected = (model.generate(ids, attention_mask=mask, **wanted) for model in (ours, plain))
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-5, rtol=1e-4)


def test_what_helps_to_choose_keys_has_no_adapter_and_keeps_its_numbers() -> None:
    """It gets no gradient; and one of its layers is handed numbers of its weight's dtype, which in 4 bits is a byte."""
    _, ours = made("deepseek_v32")
    assert {"wq_b", "wk", "weights_proj"} <= adapter.left_out(ours).keys()
    assert "q_a_proj" in adapter.linear_names(ours)
    assert "weights_proj" in nf4.multiplied_by_hand(type(ours))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Gemma3nForCausalLM, {"prediction_coefs", "correction_coefs"}),  # clamps them
        (DeepseekV4ForCausalLM, {"o_a_proj"}),  # a class of its own, which is many linears in one
        (LlamaForCausalLM, set()),
    ],
)
def test_weights_that_code_clamps_or_divides_are_not_packed(kind: type, names: set[str]) -> None:
    assert nf4.multiplied_by_hand(kind) == names


def test_the_last_logits_of_a_row_are_those_of_the_whole_one() -> None:
    """Gemma 4 asks but those of the layers that share keys, and without a mask they would be taken for the first."""
    shared = {"num_hidden_layers": 4, "layer_types": WINDOWS["layer_types"] * 2, "num_kv_shared_layers": 2}
    _, ours = made("gemma4_text", **shared, hidden_size_per_layer_input=8, vocab_size_per_layer_input=262)
    ids = torch.randint(6, 262, (1, 4))
    whole = ours(input_ids=ids, use_cache=False).logits[:, -3:]
    torch.testing.assert_close(ours(input_ids=ids, use_cache=False, logits_to_keep=3).logits, whole)


def defined(rows: list[torch.Tensor], asked: dict[str, Any]) -> torch.Tensor:
    """(1, S, H, V), as attention is defined, of one document."""
    query, key, value = rows
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * asked["scaling"]
    if cap := asked.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - (asked.get("sliding_window") or length))
    scores = scores.masked_fill(~seen, -torch.inf)
    if (sinks := asked.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(1, -1, length, 1)], -1)
    return (scores.softmax(-1)[..., :length] @ value).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(40,), LENGTHS])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("value_width", [16, 12])
def test_outputs_and_gradients_are_by_definition_in_float64(
    lengths: tuple[int, ...],
    window: int | None,
    has_sinks: bool,
    cap: float | None,
    value_width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiled_attention, "TILE_BYTES", 8 * 4 * 40 * 7)  # several tiles, the last of them smaller
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), width) for heads, width in ((4, 16), (2, 16), (2, value_width))]
    rows = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sinks = torch.randn(4, generator=draw, dtype=torch.float64, requires_grad=True) if has_sinks else None
    asked = {"scaling": 0.3, "softcap": cap, "s_aux": sinks, "sliding_window": window}
    weights = torch.randn(1, sum(lengths), 4, value_width, generator=draw, dtype=torch.float64)
    leaves = [*rows, *([] if sinks is None else [sinks])]

    found, _ = document_attention(torch.nn.Module(), *rows, None, document_lengths=lengths, **asked)
    documents = zip(*(row.split(lengths, 2) for row in rows), strict=True)
    right = torch.cat([defined(list(document), asked) for document in documents], 1)
    torch.testing.assert_close(found, right, atol=1e-12, rtol=1e-12)
    for mine, wanted in zip(*(torch.autograd.grad(x, leaves, weights) for x in (found, right)), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-11, rtol=1e-11)
