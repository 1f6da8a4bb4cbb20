"""Rows of the embedding that are trained beside a frozen table: what peft computes, with no copy of the table."""

import pytest
import torch
from made_models import base, batch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from qtune.errors import ModelError
from qtune.memory.engine import refusals
from qtune.model import adapter
from qtune.recipe.schema import Lora

IDS = [7, 30, 255]
KINDS = ["llama", "qwen3", "gemma3"]  # two tables; one; one whose rows are scaled where they are read


def with_rows(kind: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    tokens = ("a", "b", "c")
    return adapter.attach(base(kind, dtype), Lora(rank=4, targets=("q_proj",), train_tokens=tokens), 0, IDS)


def of_peft(kind: str) -> PeftModel:
    causal = base(kind)
    is_tied = causal.get_output_embeddings().weight is causal.get_input_embeddings().weight
    tables = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    rows = dict.fromkeys(tables, IDS)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], trainable_token_indices=rows)
    return get_peft_model(causal, config)


def moved_alike(ours: PeftModel, theirs: PeftModel) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """What is trained, in pairs, all of it somewhere else than where it began."""
    pairs = list(zip(*(adapter.trained_parameters(model) for model in (ours, theirs)), strict=True))
    torch.manual_seed(2)
    for one, other in pairs:
        assert one.shape == other.shape
        one.data += 0.1 * torch.randn_like(one)
        other.data = one.data.clone()
    return pairs


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_pefts_own(kind: str) -> None:
    ours, theirs, inputs = with_rows(kind), of_peft(kind), batch()
    pairs = moved_alike(ours, theirs)
    for place, token in ((2, 7), (5, 30), (28, 7)):  # read, and two of them to be told
        inputs["input_ids"][0, place] = inputs["labels"][0, place] = token
    loss = ours.train()(**inputs, fused_loss=True).nats
    labels = inputs.pop("labels")
    expected = cross_entropy(theirs.train()(**inputs).logits[0, :-1], labels[0, 1:], reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_pefts_own_and_without_the_adapter_the_bases(kind: str) -> None:
    ours, theirs, plain = with_rows(kind), of_peft(kind), base(kind)
    ids = torch.tensor([[*IDS, 3, 4, *IDS, 90]])
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)  # they begin as they were
    moved_alike(ours, theirs)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_read_by_peft_and_by_us(kind: str, tmp_path) -> None:
    ours, ids = with_rows(kind), torch.tensor([[*IDS, 3, 4, 90]])
    moved_alike(ours, of_peft(kind))
    adapter.save(ours, tmp_path, "the/base")
    expected = ours(input_ids=ids).logits
    theirs = PeftModel.from_pretrained(base(kind), tmp_path)
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    read = adapter.load(base(kind), tmp_path)
    assert torch.equal(read(input_ids=ids).logits, expected)
    assert not any(True for _ in adapter.trained_parameters(read))
    again = with_rows(kind)
    adapter.put_back(again, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, expected)


def test_an_adapter_without_rows_is_not_one_with_them(tmp_path) -> None:
    adapter.save(adapter.attach(base("llama"), Lora(rank=4, targets=("q_proj",)), 0), tmp_path, "the/base")
    with pytest.raises(ModelError, match=r"is not the adapter of this recipe .*embed_tokens"):
        adapter.put_back(with_rows("llama"), tmp_path)


def test_a_head_with_trained_rows_stays_where_it_is() -> None:
    assert "rows of it are trained" in refusals(with_rows("qwen3"))["head"]
    assert "head" not in refusals(adapter.attach(base("qwen3"), Lora(rank=4), 0))


def test_a_token_that_has_no_row_is_refused() -> None:
    with pytest.raises(ModelError, match="token 70000 has no row in the embedding, which has 262"):
        adapter.attach(base("llama"), Lora(rank=4, train_tokens=("a",)), 0, [70000])
