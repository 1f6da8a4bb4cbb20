"""The tiled loss: value and gradient of a cross-entropy written by hand, whatever the tile."""

import pytest
import torch
from conftest import byte_tokenizer, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import FORMATS
from qtune.data.packing import collate
from qtune.data.rows import RawRow, as_learned, parse_row
from qtune.data.tokenize import Encoder, tokenize
from qtune.memory import chunked_cross_entropy, fused_cross_entropy, head_logits
from qtune.memory.fused_cross_entropy import positions_before_labels, summed_loss
from qtune.memory.head_logits import MadeOf
from qtune.memory.memory_tracker import LiveBytes
from qtune.recipe.schema import Data

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 32,
    "num_key_value_heads": 1,
}


def rows(tokens: int, hidden: int = 32, vocabulary: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, vocabulary, (1, tokens))
    labels[torch.rand(1, tokens) < 0.3] = -100
    return (
        torch.randn(1, tokens, hidden, dtype=torch.double),
        torch.randn(vocabulary, hidden, dtype=torch.double),
        labels,
    )


def head_of(weight: torch.Tensor) -> torch.nn.Linear:
    head = torch.nn.Linear(*reversed(weight.shape), bias=False)
    head.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    return head


def by_hand(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.T)[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")


def test_a_tile_has_a_multiple_of_128_rows_and_more_where_there_are_many() -> None:
    """One of 130 was computed as 256, and read the head of Llama 3 twice as often as there was need."""
    rows = {
        (vocabulary, tokens): fused_cross_entropy.rows_of_a_tile(tokens, vocabulary)
        for vocabulary in (262, 49_152, 128_256, 262_144)
        for tokens in (0, 9, 1024, 2048, 8192)
    }
    assert all(number % 128 == 0 and number >= 128 for number in rows.values())
    assert [rows[128_256, tokens] for tokens in (9, 1024, 2048, 8192)] == [128, 128, 256, 512]
    assert rows[49_152, 9] == 256


def test_a_tile_is_gone_before_the_next_is_made() -> None:
    vocabulary = 50_000
    tile = fused_cross_entropy.rows_of_a_tile(1, vocabulary)
    hidden, weight = torch.randn(2 * tile, 8), torch.randn(vocabulary, 8)
    with LiveBytes() as counter:
        fused_cross_entropy.of_weight(hidden, weight, torch.zeros(2 * tile, dtype=torch.long), with_gradient=True)
    assert counter.peaks["load"].device_bytes < 1.2 * 4 * tile * vocabulary


def test_of_a_sliced_head_one_tile_and_one_slice_are_there_at_a_time() -> None:
    """The last tile of the first round once waited beside those of the second, and each slice beside the next."""
    tile, vocabulary, wide = 128, 2048, 2048
    hidden, labels = torch.randn(3 * tile, wide), torch.zeros(3 * tile, dtype=torch.long)
    slices = [slice(0, 1024), slice(1024, vocabulary)]
    head = chunked_cross_entropy.SlicedHead(
        slices, lambda times: ((rows, torch.randn(1024, wide)) for rows in slices * times)
    )
    with pytest.MonkeyPatch.context() as patch, LiveBytes() as counter:
        patch.setattr(chunked_cross_entropy, "TILE_BYTES", 4 * tile * 1024)
        chunked_cross_entropy.of_sliced_head(hidden, head, labels, with_gradient=True)
    product, a_slice, logits = 4 * tile * wide, 4 * 1024 * wide, 4 * tile * 1024
    assert counter.peaks["load"].device_bytes < 2 * hidden.nbytes + product + a_slice + 1.2 * logits


@pytest.mark.parametrize("tile_rows", [1, 30, 128])
@pytest.mark.parametrize("tokens", [2, 17, 95, 400])
def test_value_and_gradient(monkeypatch, tokens, tile_rows) -> None:
    monkeypatch.setattr(fused_cross_entropy, "TILE_BYTES", 1)
    for module in (fused_cross_entropy, chunked_cross_entropy):
        monkeypatch.setattr(module, "TILE_ROWS", tile_rows)
    hidden, weight, labels = rows(tokens)
    ours, reference = (hidden.float().requires_grad_(), hidden.clone().requires_grad_())
    loss = summed_loss(ours, head_of(weight), labels)
    (3 * loss.nats).backward()
    expected = by_hand(reference, weight, labels)
    (3 * expected).backward()
    assert loss.nats.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.tokens.item() == (labels[0, 1:] != -100).sum()
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("is_sliced", [False, True])
def test_of_each_token_with_a_weight_of_its_own(monkeypatch, is_sliced: bool) -> None:
    """What a loss of pairs is made of: nats by token, and a gradient whose rows are scaled in the backward pass."""
    monkeypatch.setattr(fused_cross_entropy, "TILE_BYTES", 1)
    hidden, weight, labels = rows(300)
    ours, reference = (hidden.float().requires_grad_(), hidden.clone().requires_grad_())
    if is_sliced:
        parts = [slice(0, 128), slice(128, 300)]
        head = chunked_cross_entropy.SlicedHead(
            parts, lambda times: ((each, weight.float()[each]) for each in parts * times)
        )
        monkeypatch.setattr(fused_cross_entropy, "is_quantized", lambda head: True)
        monkeypatch.setattr(fused_cross_entropy.output_head, "sliced_nf4", lambda *_: head)
    nats = summed_loss(ours, head_of(weight), labels, of_each=True).nats
    is_labelled = labels[0, 1:] != -100
    logits = (reference @ weight.T)[0, :-1][is_labelled]
    expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:][is_labelled], reduction="none")
    torch.testing.assert_close(nats.double(), expected, atol=1e-4, rtol=1e-5)
    weights = torch.randn(len(nats), dtype=torch.double)
    (nats * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=2e-4, rtol=1e-4)


def test_a_row_without_labels_is_zero_and_can_go_backward() -> None:
    hidden, weight, labels = rows(9)
    hidden = hidden.float().requires_grad_()
    loss = summed_loss(hidden, head_of(weight), torch.full_like(labels, -100))
    loss.nats.backward()
    assert loss.nats.item() == loss.tokens.item() == 0
    assert not hidden.grad.any()


def test_without_gradients_none_is_made() -> None:
    hidden, weight, labels = rows(9)
    with torch.no_grad():
        loss = summed_loss(hidden.float(), head_of(weight), labels)
    assert not loss.nats.requires_grad
    assert loss.nats.item() == pytest.approx(by_hand(hidden, weight, labels).item(), rel=1e-5)


def test_positions_that_are_given_are_those_that_would_be_found() -> None:
    hidden, weight, labels = rows(40)
    found = summed_loss(hidden.float(), head_of(weight), labels)
    given = summed_loss(hidden.float(), head_of(weight), labels, positions_before_labels(labels))
    assert torch.equal(given.nats, found.nats)
    assert found.tokens == given.tokens == len(positions_before_labels(labels))


def test_rows_of_a_batch_do_not_predict_across_their_ends() -> None:
    labels = torch.tensor([[5, 6, -100], [7, -100, 8]])
    assert positions_before_labels(labels).tolist() == [0, 4]


def test_an_installed_model_keeps_its_own_forward() -> None:
    model = LlamaForCausalLM(tiny_config()).requires_grad_(False).eval()
    ids = torch.arange(6, 30)[None]
    before = model(input_ids=ids).logits
    fused_cross_entropy.install(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    loss = model(input_ids=ids, labels=ids, fused_loss=True)
    wanted = torch.nn.functional.cross_entropy(before[0, :-1].double(), ids[0, 1:], reduction="sum")
    assert loss.nats.item() == pytest.approx(wanted.item(), rel=1e-6)
    model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)


def test_heads_it_cannot_stand_in_for_are_left_to_trl() -> None:
    plain = LlamaForCausalLM(tiny_config()).requires_grad_(False)
    assert fused_cross_entropy.suits(plain)
    plain.lm_head.requires_grad_(True)
    assert not fused_cross_entropy.suits(plain)


@pytest.mark.parametrize(
    ("kind", "setting", "made"),
    [
        ("llama", {}, MadeOf()),
        ("gemma2", {"final_logit_softcapping": 3.0}, MadeOf(cap=3.0)),
        ("xlstm", {"output_logit_soft_cap": 30.0}, MadeOf(cap=30.0)),
        ("cohere", {"logit_scale": 0.25}, MadeOf(0.25)),
        ("granite", {"logits_scaling": 8.0}, MadeOf(0.125)),
        ("falcon_h1", {"lm_head_multiplier": 0.0195}, MadeOf(0.0195)),
        ("minicpm3", {"dim_model_base": 16}, MadeOf(0.25)),  # of the hidden states
        ("opt", {"word_embed_proj_dim": 64}, MadeOf()),  # which has a projection before the head, or none
        ("opt", {"word_embed_proj_dim": 32}, MadeOf()),
        ("llama4_text", {"num_local_experts": 2}, MadeOf()),  # whose base model is itself
        ("modernbert-decoder", {"pad_token_id": 2, "cls_token_id": 0, "sep_token_id": 1}, None),  # a layer of its own
    ],
)
def test_what_a_model_makes_of_its_head_is_read_from_its_code(kind: str, setting: dict, made: MadeOf | None) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **setting}))
    assert head_logits.made_of(model) == made
    assert fused_cross_entropy.suits(model.requires_grad_(False)) == (made is not None)


@pytest.mark.parametrize("made", [MadeOf(0.25), MadeOf(cap=3.0), MadeOf(2.0, 5.0)])
def test_scaled_and_capped_logits_have_the_loss_and_gradient_of_float64(made: MadeOf) -> None:
    """Of the whole head, and of one in slices."""
    hidden, weight, labels = rows(300)
    hidden, labels = hidden * 0.3, labels.clamp_min(0)
    leaf = hidden.clone().requires_grad_()
    logits = made.scale * (leaf[0, :-1] @ weight.double().t())
    if made.cap is not None:
        logits = made.cap * torch.tanh(logits / made.cap)
    exact = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    (right,) = torch.autograd.grad(exact, leaf)
    ours = hidden.float().requires_grad_()
    loss = summed_loss(ours, head_of(weight), labels, made=made).nats
    loss.backward()
    parts = [slice(0, 100), slice(100, len(weight))]
    head = chunked_cross_entropy.SlicedHead(
        parts, lambda times: ((part, weight[part].float()) for part in parts * times)
    )
    sliced, gradient = chunked_cross_entropy.of_sliced_head(
        hidden[0, :-1].float(), head, labels[0, 1:], with_gradient=True, made=made
    )
    for nats in (loss, sliced):
        assert nats.item() == pytest.approx(exact.item(), rel=1e-6)
    for mine in (ours.grad[0, :-1], gradient):
        torch.testing.assert_close(mine.double(), right[0, :-1], atol=1e-6 * float(right.abs().max()) * 10, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "learned"),
    [({}, ["second<|end|>", "third<|end|>", "alone<|end|>"]), ({"train_on": "last"}, ["third<|end|>", "alone<|end|>"])],
)
def test_the_loss_is_the_mean_over_the_answers_that_are_to_be_learned(settings: dict, learned: list[str]) -> None:
    """From rows with `train` and `weight` to the loss, against a loop in float64 over texts that are named by hand."""
    answers = [("first", {"train": False}), ("second", {"weight": 1}), ("off", {"loss_weight": 0}), ("third", {})]
    turns = [
        turn
        for number, (answer, marks) in enumerate(answers)
        for turn in ({"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": answer, **marks})
    ]
    tokenizer = byte_tokenizer()
    values = [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "content": "alone"}]}]
    read = [parse_row(RawRow(row, f"r:{i}"), FORMATS["messages"], {}, None) for i, row in enumerate(values)]
    items = [as_learned(item, Data(train="x", **settings)) for item in read]
    rows = tokenize(items, ChatTemplate.of(tokenizer), Encoder.of(tokenizer))
    batch = collate([{"input_ids": r.input_ids, "labels": r.labels, "seq_lengths": [len(r.input_ids)]} for r in rows])
    ids = batch["input_ids"][0].tolist()
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, len(ids), 16, dtype=torch.double), torch.randn(len(tokenizer), 16).double()
    loss = summed_loss(hidden.float(), head_of(weight), batch["labels"])
    nats, count, at = 0.0, 0, 0
    for text in learned:
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        at = next(i for i in range(at, len(ids)) if ids[i : i + len(wanted)] == wanted)
        for place in range(at, at + len(wanted)):
            logits = hidden[0, place - 1] @ weight.T
            nats += float(logits.logsumexp(0) - logits[ids[place]])
            count += 1
    assert int(loss.tokens) == count
    assert float(loss.nats) / count == pytest.approx(nats / count, rel=1e-6)


@pytest.mark.parametrize("tile_rows", [1, 30, 128])
def test_tokens_count_for_what_their_weights_say_whatever_the_tile_and_head(monkeypatch, tile_rows: int) -> None:
    """Value, gradient and what they are divided by, against a loop over tokens in float64."""
    monkeypatch.setattr(fused_cross_entropy, "TILE_BYTES", 1)
    for module in (fused_cross_entropy, chunked_cross_entropy):
        monkeypatch.setattr(module, "TILE_ROWS", tile_rows)
    hidden, weight, labels = rows(95)
    token_weights = torch.rand(1, 95) * 3
    reference = hidden.clone().requires_grad_()
    exact, counted = torch.zeros((), dtype=torch.double), 0.0
    for place in range(94):
        label = int(labels[0, place + 1])
        if label != -100:
            logits = reference[0, place] @ weight.T
            counts = float(token_weights[0, place + 1])
            exact = exact + counts * (logits.logsumexp(0) - logits[label])
            counted += counts
    exact.backward()
    ours = hidden.float().requires_grad_()
    loss = summed_loss(ours, head_of(weight), labels, token_weights=token_weights)
    loss.nats.backward()
    parts = [slice(0, 100), slice(100, len(weight))]
    head = chunked_cross_entropy.SlicedHead(
        parts, lambda times: ((part, weight[part].float()) for part in parts * times)
    )
    labelled = positions_before_labels(labels)
    each, gradient = chunked_cross_entropy.of_sliced_head(
        hidden[0, labelled].float(), head, labels[0, labelled + 1], with_gradient=True, of_each=True
    )
    weights = token_weights[0, labelled + 1]
    sliced, gradient = (each * weights).sum(), gradient * weights[:, None]
    assert loss.tokens.item() == pytest.approx(counted, rel=1e-6)
    for nats in (loss.nats, sliced):
        assert nats.item() == pytest.approx(exact.item(), rel=1e-5)
    for mine, right in ((ours.grad, reference.grad), (gradient, reference.grad[0, labelled])):
        torch.testing.assert_close(mine.double(), right, atol=4e-4, rtol=1e-4)
    same = summed_loss(hidden.float(), head_of(weight), labels, token_weights=torch.ones(1, 95))
    assert same.nats.item() == pytest.approx(summed_loss(hidden.float(), head_of(weight), labels).nats.item(), rel=1e-6)
