"""What stands in a model: every storage in one part, whatever is switched on."""

from collections import Counter

import pytest
import torch
from made_models import LAYERS, adapted, base, batch, forward, one_pass, switched, trained

from qtune.memory.memory_parts import STANDING_PARTS, optimizer_state, standing_parts
from qtune.memory.memory_tracker import storage_sizes
from qtune.memory.techniques import Techniques

TECHNIQUES = {
    "nothing": Techniques(),
    "recomputation": Techniques(recomputed_layers=LAYERS, host_checkpoints=True, tile_tokens=16),
    "embedding": Techniques(host_embedding=True),
    "head": Techniques(head="nf4"),
    "embedding and head": Techniques(host_embedding=True, head="nf4"),
    "head on the host": Techniques(head="host"),
    "streaming": Techniques(recomputed_layers=LAYERS, streamed_layers=3),
    "all on the host": Techniques(LAYERS, True, 16, True, "host", LAYERS, 2),
    "all": Techniques(LAYERS, True, 16, True, "nf4", LAYERS, 2),
}


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def places_by_part(model, engine, optimizer=None) -> dict[tuple[str, str], set[int]]:
    return {
        (part, side): {place(tensor) for tensor in tensors}
        for part, side, tensors in standing_parts(model, engine, optimizer)
    }


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
@pytest.mark.parametrize(("kind", "nf4"), [("llama", "double"), ("qwen3", "single"), ("gemma3", None)])
def test_every_parameter_is_in_one_part(kind, nf4, name) -> None:
    model = adapted(base(kind, nf4=nf4))
    engine = switched(model, TECHNIQUES[name])
    for _ in range(2):
        found = places_by_part(model, engine)
        counts = Counter(where for places in found.values() for where in places)
        assert {place(parameter) for parameter in model.parameters()} <= set(counts)
        assert {where: count for where, count in counts.items() if count > 1} == {}
        assert {part for part, _ in found} <= set(STANDING_PARTS)
        forward(model.train(), batch()).backward()  # slots are made, gradients are there


@pytest.mark.parametrize(
    ("name", "kind", "embedding", "head"),
    [
        ("nothing", "llama", "device", 262 * 64 * 4),
        ("nothing", "qwen3", None, 262 * 64 * 4),  # tied: the head's
        ("embedding", "llama", "host", 262 * 64 * 4),
        ("embedding", "qwen3", "host", 262 * 64 * 4),
        ("head", "qwen3", "device", 0),
        ("all", "qwen3", "host", 0),
    ],
)
def test_where_embedding_and_head_are(name, kind, embedding, head) -> None:
    model = adapted(base(kind, nf4="double"))
    engine = switched(model, TECHNIQUES[name])
    sizes = {(part, side): storage_sizes(tensors) for part, side, tensors in standing_parts(model, engine, None)}
    found = [side for part, side in sizes if part == "embedding"]
    assert found == ([embedding] if embedding else [])
    if embedding:
        assert sizes["embedding", embedding] == 262 * 64 * 4
    if head:
        assert sizes["head", "device"] == head
    else:
        assert sizes["head", "device"] < 262 * 64


@pytest.mark.parametrize(("kind", "others"), [("llama", {"embedding": "device"}), ("qwen3", {})])
def test_a_head_on_the_host_takes_a_tied_embedding_with_it(kind, others) -> None:
    model = adapted(base(kind, nf4="double"))
    engine = switched(model, TECHNIQUES["head on the host"])
    found = {part: (side, storage_sizes(tensors)) for part, side, tensors in standing_parts(model, engine, None)}
    table = 262 * 64 * 4
    assert found["head"] == ("host", table)
    assert {part: found[part][0] for part in ("embedding",) if part in found} == others


def test_streamed_layers_are_in_two_places() -> None:
    model = adapted(base("llama", nf4="double"))
    before = {part: storage_sizes(tensors) for part, _, tensors in standing_parts(model, None, None)}
    engine = switched(model, TECHNIQUES["streaming"])
    one_pass(model, batch())
    after = {(part, side): storage_sizes(tensors) for part, side, tensors in standing_parts(model, engine, None)}
    home = max(buffer.nbytes for buffer in engine.runner.stream.homes("host"))
    assert after["streamed layers", "device"] == 2 * -(-home // 512) * 512
    assert after["streamed layers", "host"] >= 3 * home
    assert after["base", "device"] < 0.6 * before["base"]


def test_gradients_and_the_state_of_an_optimizer() -> None:
    model = adapted(base("llama"))
    optimizer = torch.optim.AdamW(trained(model))
    found = {part: tensors for part, _, tensors in standing_parts(model, None, optimizer)}
    assert found["gradients"] == found["optimizer"] == []
    forward(model.train(), batch()).backward()
    optimizer.step()
    found = {part: tensors for part, _, tensors in standing_parts(model, None, optimizer)}
    count = len(trained(model))
    assert (len(found["gradients"]), len(found["optimizer"])) == (count, 3 * count)
    wrapped = type("Wrapped", (), {"optimizer": optimizer})()
    assert len(optimizer_state(wrapped)) == 3 * count


def test_paged_state_is_apart_as_the_driver_moves_it() -> None:
    """bitsandbytes marks it so; torch counts it with nothing."""
    model = adapted(base("llama"))
    optimizer = torch.optim.AdamW(trained(model))
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    paged = optimizer.state[trained(model)[0]]["exp_avg"]
    paged.is_paged = True
    found = places_by_part(model, None, optimizer)
    assert found["paged optimizer", "host"] == {place(paged)}
    assert place(paged) not in found["optimizer", "device"]
    assert len(found["optimizer", "device"]) == len(optimizer_state(optimizer)) - 1


def test_a_trained_head_is_the_adapters() -> None:
    model = adapted(base("llama"))
    model.get_base_model().lm_head.requires_grad_(True)
    found = {part: tensors for part, _, tensors in standing_parts(model, None, None)}
    assert found["head"] == []
    assert any(tensor is model.get_base_model().lm_head.weight for tensor in found["adapter"])
