"""The head in host memory: the loss, gradient and answers of the same head on the device."""

import pytest
import torch
from crossed import crossed
from made_models import adapted, assert_close, assert_equal, base, batch, held_out, one_pass, switched

from qtune import accelerator
from qtune.memory import output_head
from qtune.memory.engine import Engine
from qtune.memory.memory_tracker import LiveBytes
from qtune.memory.techniques import Techniques

HEAD = Techniques(head="host")
KINDS = ["llama", "qwen3", "gemma3"]  # the second and third with a tied table


def passes_and_answers_agree(ours, plain, agree, autocast=None) -> None:
    prompt = {"input_ids": batch()["input_ids"][:, :9], "max_new_tokens": 4, "do_sample": False, "use_cache": True}
    for _ in range(2):
        agree(one_pass(ours, batch(), autocast), one_pass(plain, batch(), autocast))
        assert held_out(ours, batch()) == pytest.approx(held_out(plain, batch()), rel=1e-6)
        assert torch.equal(ours.generate(**prompt), plain.generate(**prompt))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_head_of_one_slice_is_equal_to_the_bit(kind, dtype) -> None:
    plain, ours = adapted(base(kind, dtype)), adapted(base(kind, dtype))
    Engine(plain)
    switched(ours, HEAD)
    passes_and_answers_agree(ours, plain, assert_equal, dtype if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize(("kind", "slice_bytes"), crossed([*KINDS], [1, 100 * 64 * 4]))
def test_slices_give_the_same_to_rounding(kind, slice_bytes, monkeypatch) -> None:
    monkeypatch.setattr(output_head, "HOST_SLICE_BYTES", slice_bytes)
    plain, ours = adapted(base(kind, nf4="double")), adapted(base(kind, nf4="double"))
    Engine(plain)
    switched(ours, HEAD)
    passes_and_answers_agree(ours, plain, lambda one, other: assert_close(one, other, 1e-5))


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor copies slices as a card would have to."""
    monkeypatch.setattr(accelerator, "reads_host_memory", lambda device: False)


@pytest.mark.usefixtures("as_on_a_card")
def test_no_more_than_two_slices_are_on_the_device(monkeypatch) -> None:
    """The next is copied in while one is used; the logits of 16 rows or more stand beside them."""
    monkeypatch.setattr(output_head, "HOST_SLICE_BYTES", 16 * 64 * 4)
    model = adapted(base("llama"))
    with LiveBytes() as counter:
        switched(model, HEAD)
        one_pass(model, batch((63,)))
    hidden, logits = 62 * 64 * 4, 62 * 16 * 4
    assert counter.held("host") == {"head": 262 * 64 * 4}
    # the labelled hidden states, their gradient twice (summed, and as it is handed on), a product, and softmax's own
    assert counter.peaks[counter.phase].device.get("loss", 0) <= 2 * 16 * 64 * 4 + 5 * hidden + 4 * logits + 40_000


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("slice_rows", [300, 100])
def test_copied_slices_are_those_of_the_table(slice_rows, monkeypatch) -> None:
    monkeypatch.setattr(output_head, "HOST_SLICE_BYTES", slice_rows * 64 * 4)
    plain, ours = adapted(base("llama")), adapted(base("llama"))
    Engine(plain)
    switched(ours, HEAD)
    passes_and_answers_agree(ours, plain, lambda one, other: assert_close(one, other, 1e-5))


@pytest.mark.usefixtures("as_on_a_card")
def test_the_next_slice_is_on_its_way_while_one_is_used(monkeypatch) -> None:
    """From one pass over the vocabulary to the next, too: each copy of a card's was waited for at its start."""
    monkeypatch.setattr(output_head, "HOST_SLICE_BYTES", 100 * 64 * 4)
    model = adapted(base("llama"))
    switched(model, HEAD)
    head = model.get_base_model().get_output_embeddings()
    begun: list[int] = []
    copy = accelerator.CopyStream.copy
    monkeypatch.setattr(
        accelerator.CopyStream, "copy", lambda self, *pair: (begun.append(len(pair[1])), copy(self, *pair))[1]
    )
    slices = output_head.sliced_on_host(head, torch.device("cpu"))
    ahead = []
    for number, (rows, weight) in enumerate(slices.visits(2)):
        assert torch.equal(weight, head.weight[rows])
        ahead.append(len(begun) - number - 1)
    assert ahead == [1, 1, 1, 1, 1, 0]
    assert begun == [100, 100, 62] * 2


def test_the_processor_reads_the_table_where_it_is() -> None:
    model = adapted(base("llama"))
    switched(model, HEAD)
    head = model.get_base_model().get_output_embeddings()
    ((_, weight),) = output_head.sliced_on_host(head, torch.device("cpu")).visits(1)
    assert weight.data_ptr() == head.weight.data_ptr()


def test_twice_is_once_and_the_embedding_may_follow() -> None:
    model = adapted(base("llama"))
    engine = switched(model, HEAD)
    head, embedding = model.get_base_model().get_output_embeddings(), model.get_base_model().get_input_embeddings()
    table, forward = head.weight, head.forward
    engine.switch_to(Techniques(head="host", host_embedding=True))
    assert head.weight is table
    assert head.forward == forward
    assert embedding.weight is not table


def test_a_tied_table_is_one_in_host_memory() -> None:
    model = adapted(base("qwen3"))
    engine = switched(model, HEAD)
    causal = model.get_base_model()
    assert causal.get_input_embeddings().weight is causal.get_output_embeddings().weight
    engine.switch_to(Techniques(head="host", host_embedding=True))
    assert causal.get_input_embeddings().weight is causal.get_output_embeddings().weight


def test_slices_cross_to_the_device_asked_for() -> None:
    """torch's meta device stands in for a card."""
    model = base("llama")
    output_head.move_head_out(model, torch.device("meta"), is_tied=False)
    logits = model.get_output_embeddings()(torch.empty(1, 2, 64, device="meta"))
    assert (logits.device.type, logits.shape) == ("meta", (1, 2, 262))
