"""The ledger, against sums done by hand."""

import mmap

import torch

from qtune.memory.device import Device, find_device, host_memory, resident_bytes
from qtune.memory.ledger import PARTS, Ledger, storage_bytes
from qtune.model import adapter, base
from qtune.recipe.schema import Lora, Model

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
    parts = dict(ledger.measure(1, model, optimizer).parts)

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
    assert parts["adapter"] == parts["gradients"] == 4 * trained
    assert parts["optimizer"] == 2 * 4 * trained + 4 * 2 * 7 * LAYERS  # two moments, and one step count a tensor
    weights = LAYERS * sum(a * b for a, b in linears)
    packed = weights // 2 + weights // 64 * 4
    embeddings = 2 * VOCABULARY * HIDDEN * 4
    assert packed + embeddings <= parts["base"] <= packed + embeddings + 16_384  # norms, code books, rope


def test_the_parts_sum_to_the_peak_on_the_cpu(tiny_base) -> None:
    ledger = Ledger.begin(Device("cpu", "CPU", *host_memory(), "float32"))
    model = base.load_base(Model(base=str(tiny_base)), "cpu", "float32")
    measured = ledger.measure(1, model, None)
    assert [name for name, _ in measured.parts] == [name for name in PARTS if name != "context"]
    assert sum(size for _, size in measured.parts) <= measured.peak_bytes + 8 * 1024**2
    assert measured.peak_bytes <= measured.total_bytes


def test_ties_and_views_count_once() -> None:
    weight = torch.zeros(100)
    assert storage_bytes([weight, weight[10:], weight.view(10, 10)]) == 400


def test_resident_memory_grows_with_what_is_held() -> None:
    before, _ = resident_bytes()
    with mmap.mmap(-1, 64 * 1024**2) as held:  # fresh pages: the heap may have some to give already
        held.write(b"x" * len(held))
        after, peak = resident_bytes()
    assert after - before > 0.9 * 64 * 1024**2
    assert peak >= after
