"""The embedding looked up in host memory: the same rows, to the bit."""

import pytest
import torch
from made_models import adapted, assert_equal, base, batch, held_out, one_pass, switched

from qtune import accelerator
from qtune.memory import embedding_offload
from qtune.memory.engine import Engine
from qtune.memory.memory_tracker import LiveBytes
from qtune.memory.techniques import Techniques
from qtune.memory.techniques.embedding_offload import HOST_EMBEDDING, tables_per_layer

ON_HOST = Techniques(host_embedding=True)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "granite", "gemma4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equal_to_the_bit(kind, dtype) -> None:
    """Untied, tied, scaled in the embedding, scaled behind it, with rows for every layer."""
    plain, ours = adapted(base(kind, dtype)), adapted(base(kind, dtype))
    Engine(plain)
    switched(ours, ON_HOST)
    autocast = dtype if dtype == torch.bfloat16 else None
    prompt = {"input_ids": batch()["input_ids"][:, :9], "max_new_tokens": 3, "do_sample": False, "use_cache": True}
    for _ in range(2):
        assert_equal(one_pass(ours, batch(), autocast), one_pass(plain, batch(), autocast))
        assert held_out(ours, batch()) == held_out(plain, batch())
        assert torch.equal(ours.generate(**prompt), plain.generate(**prompt))


@pytest.mark.parametrize(("kind", "is_tied"), [("qwen3", True), ("llama", False)])
def test_the_head_keeps_the_table_of_a_tied_pair(kind, is_tied) -> None:
    model = adapted(base(kind))
    causal = model.get_base_model()
    before = causal.get_input_embeddings().weight
    switched(model, ON_HOST)
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    assert torch.equal(embedding.weight, before)
    assert not embedding.weight.requires_grad
    assert embedding.weight is not head.weight
    assert (head.weight is before) == is_tied


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_rows_of_every_layer_are_looked_up_there_too(kind: str) -> None:
    """They were left on the device, and are the larger table: 4.7 GB of Gemma 3n E4B's 16 bits."""
    model = adapted(base(kind))
    with LiveBytes() as counter:
        counter.count(model.parameters(), "base")
        before = counter.held()["base"]
        switched(model, ON_HOST)
        (table,) = tables_per_layer(model)
        assert counter.held("host")["embedding"] >= table.weight.nbytes
        assert counter.held().get("base", 0) <= before - table.weight.nbytes
    assert HOST_EMBEDDING.movable_bytes(model, []) >= table.weight.nbytes


def test_twice_is_once() -> None:
    model = adapted(base("gemma3"))
    engine = switched(model, ON_HOST)
    embedding = model.get_base_model().get_input_embeddings()
    table, forward = embedding.weight, embedding.forward
    engine.switch_to(Techniques(host_embedding=True, recomputed_layers=1))
    assert embedding.weight is table
    assert embedding.forward == forward


def test_what_it_reads_is_beside_it() -> None:
    """Gemma's factor was left on the card: a row in host memory cannot be multiplied by it there."""
    model = adapted(base("gemma3"))
    switched(model, ON_HOST)
    embedding = model.get_base_model().get_input_embeddings()
    factors = dict(embedding.named_buffers(recurse=False))
    assert set(factors) == {"embed_scale"}
    assert all(factor.device.type == "cpu" for factor in factors.values())
    assert set(model.state_dict()) & {"embed_scale"} == set()


def test_rows_cross_to_the_device_asked_for() -> None:
    """torch's meta device stands in for a card."""
    model = base("gemma3")
    embedding_offload.move_embedding_out(model, torch.device("meta"))
    rows = model.get_input_embeddings()(torch.arange(5)[None])
    assert (rows.device.type, rows.shape) == ("meta", (1, 5, 64))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_rows_cross_in_pieces_to_the_bit(kind, rows, monkeypatch) -> None:
    """As to a card, through buffers of so many rows."""
    monkeypatch.setattr(accelerator, "reads_host_memory", lambda device: False)
    monkeypatch.setattr(embedding_offload, "STAGING_BYTES", 2 * rows * 64 * 4)
    plain, ours = adapted(base(kind)), adapted(base(kind))
    Engine(plain)
    switched(ours, ON_HOST)
    for inputs in (batch(), batch((1,)), batch((17, 7))):
        assert_equal(one_pass(ours, inputs), one_pass(plain, inputs))


def test_it_is_counted_on_the_host() -> None:
    model = adapted(base("llama"))
    with LiveBytes() as counter:
        switched(model, ON_HOST)
    assert counter.held("host") == {"embedding": 262 * 64 * 4}
