"""Live bytes, counted, against sums by hand: views, ties, deaths, sides, phases; the same on fake tensors."""

import ast
import contextlib
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from made_models import LAYERS, adapted, base, batch, forward, one_pass, switched
from torch._subclasses.fake_tensor import FakeTensorMode

from qtune.accelerator import Capability
from qtune.memory import memory_tracker
from qtune.memory.memory_tracker import BLOCK_BYTES, LiveBytes, Peak, block_bytes, quantization_state, storage_sizes
from qtune.memory.techniques import Techniques

KIB = 256  # float32 elements of one KiB


@pytest.fixture(params=["real", "fake"])
def mode(request):
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield request.param


def test_births_and_deaths(mode) -> None:
    with LiveBytes() as counter:
        a = torch.empty(4 * KIB)
        b = a + 1
        assert counter.held() == {"layer workspace": 8 * 1024}
        del a
        assert counter.held() == {"layer workspace": 4 * 1024}
        del b
        assert counter.held() == {}
    assert counter.peaks["load"].device == {"layer workspace": 8 * 1024}


def test_views_and_ties_count_once(mode) -> None:
    with LiveBytes() as counter:
        a = torch.empty(2, 2 * KIB)
        views = [a.view(-1), a[1], a.t(), a.detach(), a.view(torch.uint8)]
        counter.count([a, *views, torch.nn.Parameter(a)], "base")
        assert counter.held() == {"base": 4 * 1024}
        del a
        assert counter.held() == {"base": 4 * 1024}
        del views
        gc.collect()
        assert counter.held() == {}


def test_sizes_are_whole_blocks(mode) -> None:
    assert [block_bytes(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    with LiveBytes() as counter:
        small = torch.empty(3)
        odd = torch.empty(129)
        assert counter.held() == {"layer workspace": BLOCK_BYTES + 2 * BLOCK_BYTES}
    assert storage_sizes([small, odd, odd[1:], small.view(3, 1)]) == 3 * BLOCK_BYTES


def test_in_place_work_takes_nothing(mode) -> None:
    with LiveBytes() as counter:
        a = torch.zeros(KIB)
        a.add_(1).mul_(2)
        a[3:] = 5
        assert counter.held() == {"layer workspace": 1024}


def test_what_was_there_before_counts_from_when_it_is_told_or_seen() -> None:
    before = torch.zeros(KIB)
    with LiveBytes() as counter:
        assert counter.held() == {}
        counter.count([before], "base")
        assert counter.held() == {"base": 1024}
        before.view(-1)
        assert counter.held() == {"base": 1024}


def test_marks_move_a_tensor_to_its_part_and_side(mode) -> None:
    with LiveBytes() as counter:
        a = torch.empty(KIB)
        memory_tracker.mark([a], "checkpoints")
        assert counter.held() == {"checkpoints": 1024}
        memory_tracker.mark([a], "checkpoints", "host")
        assert (counter.held(), counter.held("host")) == ({}, {"checkpoints": 1024})
        memory_tracker.mark([a], "embedding", "host")
        assert counter.held("host") == {"embedding": 1024}
        del a
        assert counter.held("host") == {}


def test_without_a_counter_marks_do_nothing() -> None:
    memory_tracker.mark([torch.zeros(3)], "base")
    memory_tracker.enter_phase("loss")
    memory_tracker.note_workspace("loss", 3)
    assert not memory_tracker.stands_for_card()
    with memory_tracker.part_of_new("loss"):
        pass


def test_parts_of_what_is_born_inside_can_be_nested(mode) -> None:
    with LiveBytes() as counter:
        kept = [torch.empty(KIB)]
        with memory_tracker.part_of_new("loss"):
            kept.append(torch.empty(KIB))
            with memory_tracker.part_of_new("batch"):
                kept.append(torch.empty(KIB))
            kept.append(torch.empty(KIB))
        kept.append(torch.empty(KIB))
        assert counter.held() == {"layer workspace": 2048, "loss": 2048, "batch": 1024}


def test_a_fault_inside_ends_the_part_and_the_counter() -> None:
    with pytest.raises(RuntimeError, match="injected"), LiveBytes() as counter, memory_tracker.part_of_new("loss"):
        raise RuntimeError("injected")
    with LiveBytes() as another:
        kept = torch.empty(KIB)
    assert another.held() == {"layer workspace": kept.nbytes}
    assert counter.held() == {}


def test_a_phase_starts_from_what_is_held_and_peaks_where_it_was_highest(mode) -> None:
    with LiveBytes() as counter:
        a = torch.empty(2 * KIB)
        counter.enter_phase("forward")
        b = torch.empty(3 * KIB)
        del b
        memory_tracker.mark([a], "base")
        counter.enter_phase("backward")
        c = torch.empty(KIB)
        counter.enter_phase("forward")  # again: the highest of both
        d = torch.empty(KIB)
        del c, d
    assert counter.peaks["load"].device == {"layer workspace": 2048}
    assert counter.peaks["forward"].device == {"layer workspace": 5 * 1024}
    assert counter.peaks["backward"].device == {"base": 2048, "layer workspace": 1024}
    assert counter.peaks["backward"].device_bytes == 3 * 1024


def test_sides_have_peaks_of_their_own(mode) -> None:
    with LiveBytes() as counter:
        a = torch.empty(KIB)
        memory_tracker.mark([a], "checkpoints", "host")
        b = torch.empty(2 * KIB)
        memory_tracker.mark([b], "checkpoints", "host")
        del a, b
        c = torch.empty(KIB)
        del c
    assert counter.peaks["load"] == Peak({"layer workspace": 2048}, {"checkpoints": 3 * 1024})


def test_workspace_of_a_kernel_is_in_the_peak_and_gone(mode) -> None:
    with LiveBytes() as counter:
        kept = torch.empty(KIB)
        memory_tracker.note_workspace("dequantised weights", 5000)
        assert counter.held() == {"layer workspace": kept.nbytes}
    assert counter.peaks["load"].device == {"layer workspace": 1024, "dequantised weights": 5000}


def test_the_timeline_tells_each_change() -> None:
    with LiveBytes(with_timeline=True) as counter:
        a = torch.empty(KIB)
        counter.enter_phase("forward")
        b = torch.empty(KIB)
    assert counter.timeline == [
        ("load", {"layer workspace": 1024}),
        ("forward", {"layer workspace": 1024}),
        ("forward", {"layer workspace": a.nbytes + b.nbytes}),
    ]


def test_places_tell_who_made_the_largest() -> None:
    with LiveBytes(with_places=True) as counter:
        kept = torch.empty(KIB)
    size, part, shape, dtype, place = counter.largest[0]
    assert (size, part, shape, dtype) == (kept.nbytes, "layer workspace", (KIB,), "float32")
    assert "test_memory_tracker.py" in place


def test_a_backward_pass_is_seen_and_leaves_the_gradients(mode) -> None:
    with LiveBytes() as counter:
        weight = torch.nn.Parameter(torch.ones(KIB))
        (weight.exp() * 2).sum().backward()
        counter.count([weight], "adapter")
        counter.count([weight.grad], "gradients")
        assert counter.held() == {"adapter": 1024, "gradients": 1024}


def test_one_counter_at_a_time() -> None:
    with LiveBytes(), pytest.raises(AssertionError), LiveBytes():
        pass
    with LiveBytes():
        pass


def test_what_a_fake_tensor_cannot_say_is_true_or_one() -> None:
    with FakeTensorMode(), LiveBytes():
        assert bool(torch.zeros(1, dtype=torch.bool))
        assert torch.zeros(1, dtype=torch.long).item() == 1


def test_scales_and_codes_are_found_at_every_depth() -> None:
    for nf4, tensors in (("double", 5), ("single", 2)):
        weight = base("llama", nf4=nf4).model.layers[0].self_attn.q_proj.weight
        assert len(quantization_state([weight])) == tensors
    assert quantization_state([torch.nn.Parameter(torch.zeros(3))]) == []


def test_a_pass_of_a_model_ends_with_its_gradients_and_nothing_else() -> None:
    model = adapted(base("llama", nf4="double"))
    switched(model, Techniques(recomputed_layers=LAYERS, host_checkpoints=True, tile_tokens=16, head_groups=2))
    one_pass(model, batch())
    inputs = batch()
    with LiveBytes() as counter:
        everything = [*model.parameters(), *quantization_state(model.parameters()), *model.buffers()]
        everything += [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        counter.count(everything, "base")
        standing = sum(counter.held().values())
        nats = forward(model.train(), inputs)
        nats.backward()
        del nats
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        counter.count(gradients, "gradients")
        gc.collect()
        held = counter.held()
    assert held["gradients"] == storage_sizes(gradients)
    rest = sum(held.values()) - held["gradients"] - standing
    assert 0 <= rest <= 16 * 1024  # the index of the documents, which is kept for the next pack


@pytest.mark.parametrize(("rows", "on_card"), [(1, 0), (64, 0), (65, 1), (4096, 1)])
def test_a_card_writes_a_dequantised_weight_out_for_many_rows_only(rows: int, on_card: int) -> None:
    """On 8.6 up to 64 rows of this many outputs are multiplied with the weight as it is; on the processor none are."""
    shape = (4096, 1024)
    weight = 2 * 4096 * 1024 + 2 * 4 * 4096 * 1024 // 64  # in bfloat16, and two scales for each 64 of it
    asked = (torch.empty(1, rows, 1024, dtype=torch.bfloat16), None, shape, None, 64)
    with LiveBytes(card=(8, 6)):
        assert memory_tracker.WORKSPACES["bitsandbytes::gemm_4bit"](asked) == ("dequantised weights", on_card * weight)
    assert memory_tracker.WORKSPACES["bitsandbytes::gemm_4bit"](asked) == ("dequantised weights", weight)


@pytest.fixture(scope="module")
def multiplies_as_it_is():
    """bitsandbytes' own rule, out of its source, as that part of it is loaded on a machine with a card alone."""
    path = Path(bitsandbytes.__file__).parent / "backends" / "cuda" / "ops.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    rule = next(node for node in tree.body if getattr(node, "name", "") == "_gemm_4bit_use_custom_cuda")
    card: list[int] = []
    known = {"functools": SimpleNamespace(cache=lambda f: f), "torch": torch, "_gpu_dispatch_props": lambda _: card}
    known["_GEMM_4BIT_CUSTOM_FLOOR_M"] = memory_tracker.FUSED_ANYWHERE
    exec(compile(ast.Module([rule], []), str(path), "exec"), known)

    def asked(capability: Capability, multiprocessors: int, rows: int, shape: tuple[int, int], dtype: Any) -> bool:
        card[:] = [multiprocessors, *capability]
        return known["_gemm_4bit_use_custom_cuda"](0, dtype, rows, *shape)

    return asked


CARDS: dict[Capability, tuple[int, ...]] = {  # multiprocessors of some of each
    (6, 1): (20, 28),
    (7, 5): (30, 40, 72),
    (8, 0): (56, 108),
    (8, 6): (20, 28, 46, 72, 84),
    (8, 7): (16,),
    (8, 9): (20, 24, 46, 58, 76, 128, 142),
    (9, 0): (78, 114, 132),
    (10, 0): (148, 160),
    (10, 3): (148, 160),
    (11, 0): (20,),
    (12, 0): (30, 50, 84, 170, 188),
    (12, 1): (48,),
}


def test_no_weight_that_is_written_out_is_left_out(multiplies_as_it_is) -> None:
    """What we say is multiplied as it is, bitsandbytes does so, on whichever card of that capability."""
    shapes = [(n, k) for n in (256, 1024, 2048, 4096, 8192, 14336, 28672, 128256) for k in (1024, 4096, 8192, 28672)]
    for capability, sizes in CARDS.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for shape in shapes:
                most = memory_tracker.fused_rows(capability, shape, dtype)
                for multiprocessors in sizes:
                    for rows in {1, 4, 5, 6, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, most}:
                        if rows <= most:
                            asked = (capability, multiprocessors, rows, shape, dtype)
                            assert multiplies_as_it_is(*asked), asked


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "rows"),
    [((8, 0), 108, 32), ((8, 6), 84, 128), ((9, 0), 132, 32), ((8, 9), 142, 32)],
)
def test_of_a_wide_weight_as_many_rows_as_the_largest_card_takes(
    multiplies_as_it_is, capability: Capability, multiprocessors: int, rows: int
) -> None:
    """The up projection of Llama-3.1-8B, and those figures that bitsandbytes has for it."""
    assert memory_tracker.fused_rows(capability, (14336, 4096), torch.bfloat16) == rows
    assert multiplies_as_it_is(capability, multiprocessors, rows, (14336, 4096), torch.bfloat16)
