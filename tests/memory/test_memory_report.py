"""The ledger, against sums done by hand."""

import mmap

import pytest
import torch

from qtune.hardware import Device, find_device, host_memory, resident_bytes
from qtune.memory.engine import Engine
from qtune.memory.memory_report import HOST, PARTS, REST, Ledger
from qtune.memory.memory_tracker import block_bytes, storage_sizes
from qtune.memory.techniques import Techniques
from qtune.model import adapter, base
from qtune.recipe.schema import Lora, Model
from qtune.units import GIB

HIDDEN, WIDE, LAYERS, VOCABULARY, RANK = 64, 172, 2, 262, 4


def test_parts_are_counted_from_storages(tiny_base) -> None:
    device = find_device()
    ledger = Ledger.begin(device)
    model = adapter.attach(
        base.load_base(Model(base=str(tiny_base), double_quantization=False), "cpu", "float32"), Lora(rank=RANK), 0
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.arange(6, 20)[None], labels=torch.arange(6, 20)[None]).loss.backward()
    optimizer.step()
    parts = dict(ledger.measure("step", 1, model, optimizer=optimizer).parts)

    linears = [
        (HIDDEN, HIDDEN),
        (32, HIDDEN),
        (32, HIDDEN),
        (HIDDEN, HIDDEN),
        (WIDE, HIDDEN),
        (WIDE, HIDDEN),
        (HIDDEN, WIDE),
    ]
    trained = LAYERS * sum(RANK * (a + b) for a, b in linears)
    blocks = LAYERS * sum(block_bytes(4 * RANK * side) for shape in linears for side in shape)
    assert 4 * trained <= parts["adapter"] == parts["gradients"] == blocks
    assert parts["optimizer"] == 2 * blocks + block_bytes(4) * 2 * 7 * LAYERS  # two moments, a step count a tensor
    weights = LAYERS * sum(a * b for a, b in linears)
    packed = weights // 2 + weights // 64 * 4
    assert packed <= parts["base"] <= packed + 40_000  # norms, code books, rope, each in blocks
    assert parts["embedding"] == parts["head"] == block_bytes(VOCABULARY * HIDDEN * 4)


def test_the_parts_sum_to_the_peak_on_the_cpu(tiny_base) -> None:
    ledger = Ledger.begin(Device("cpu", "CPU", *host_memory(), "float32"))
    model = adapter.attach(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), Lora(rank=RANK), 0)
    measured = ledger.measure("load", 0, model)
    assert measured.phase == "load"
    assert {name for name, _ in measured.parts} == {
        *("python and libraries", "base", "embedding", "head", "adapter", REST)
    }
    assert [name for name, _ in measured.parts] == [name for name in PARTS if name in dict(measured.parts)]
    assert sum(size for _, size in measured.parts) <= measured.peak_bytes + 8 * 1024**2
    assert measured.peak_bytes <= measured.total_bytes


def test_a_card_is_asked_what_it_held_before_and_at_its_highest(tiny_base, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up driver: of 8 GiB 6 are taken, half of one by torch's allocator."""
    card = torch.device("cuda:0")
    asked = {card: (2 * GIB, 8 * GIB)}  # free and total, by card
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {card: GIB // 2}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {card: 3 * GIB // 2}.__getitem__)
    started = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", started.append)
    ledger = Ledger.begin(Device("cuda:0", "a card", 8 * GIB, 2 * GIB, "bfloat16"))
    assert ledger.outside_bytes == 6 * GIB - GIB // 2
    asked[card] = (GIB, 8 * GIB)
    model = adapter.attach(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), Lora(rank=RANK), 0)
    measured = ledger.measure("load", 0, model)
    assert (measured.peak_bytes, measured.total_bytes, measured.free_bytes) == (7 * GIB, 8 * GIB, GIB)
    assert measured.parts[0] == ("context", ledger.outside_bytes)
    assert sum(size for _, size in measured.parts) == measured.peak_bytes
    assert started == [card]  # the next measurement is of what comes after this one


def test_what_lives_on_the_host_beside_a_card_is_told_apart_on_the_cpu(tiny_base) -> None:
    model = adapter.attach(base.load_base(Model(base=str(tiny_base)), "cpu", "float32"), Lora(rank=RANK), 0)
    engine, ledger = Engine(model), Ledger.begin(find_device())
    before = dict(ledger.measure("attach", 0, model, engine).parts)
    engine.switch_to(Techniques(LAYERS, streamed_layers=LAYERS, host_embedding=True))
    after = dict(ledger.measure("attach", 0, model, engine).parts)
    assert HOST not in before
    assert "embedding" not in after
    assert after[HOST] > before["embedding"]
    assert after["base"] < before["base"] / 2


def test_ties_and_views_count_once_and_in_blocks() -> None:
    weight = torch.zeros(100)
    assert storage_sizes([weight, weight[10:], weight.view(10, 10)]) == block_bytes(400) == 512


def test_resident_memory_grows_with_what_is_held() -> None:
    before, _ = resident_bytes()
    with mmap.mmap(-1, 64 * 1024**2) as held:  # fresh pages: the heap may have some to give already
        held.write(b"x" * len(held))
        after, peak = resident_bytes()
    assert after - before > 0.9 * 64 * 1024**2
    assert peak >= after
