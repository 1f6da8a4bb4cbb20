"""The output head for less memory on the device: in host memory, or in NF4; the loss takes slices of its vocabulary.

In host memory. Held less of: the head, 2VH bytes in bfloat16, of which two slices of 32 MiB remain while the loss is
made: one is used, the next is copied in. A tied table goes as one: embedding and head read the same one in host memory.
Costs: 2VH bytes of host memory, page-locked; each slice copied to the device twice a pass, on a stream of its own (the
processor reads them where they are); what `chunked_cross_entropy` does. Loss and gradient are
those of the head on the device, to rounding: a head of one slice gives them to the bit.

In NF4. Held less of: the same, of which 4.13 bits a weight remain; a tied embedding is not touched. Costs: what
`chunked_cross_entropy` does; the head is rounded as the layers are, which moves the loss as much as quantising one of
them. Saved adapters and merges use the base's own head.

Refuses: heads that the fused cross-entropy cannot stand in for.

Letters: B rows, T tokens, H hidden, V vocabulary.
"""

import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import PreTrainedModel

from qtune import accelerator
from qtune.accelerator import CopyStream
from qtune.memory import memory_tracker
from qtune.memory.chunked_cross_entropy import SlicedHead
from qtune.memory.nf4 import BLOCK, empty_packed, is_quantized, weight_rows
from qtune.units import MIB

HOST_SLICE_BYTES = 32 * MIB  # a copy of so much takes long enough to be worth its start, and is little on any card
NF4_SLICE_BYTES = 16 * MIB  # in float32, of which a slice and its gradient are held at a time


def move_head_out(model: PreTrainedModel, device: torch.device, is_tied: bool) -> None:
    """Keep the head's weight in host memory from now on; one that is there already stays where it is.

    One that `is_tied` is the embedding's from then on too, which has to look its rows up there.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if is_on_host(head):
        return
    weight = head.weight.detach()
    table = accelerator.page_locked(weight.numel(), weight.dtype).view_as(weight).copy_(weight)
    head.weight = torch.nn.Parameter(table, requires_grad=False)
    if is_tied:
        embedding.weight = head.weight
    memory_tracker.mark([head.weight], "head", "host")
    head.copies_from_host = CopyStream(device)

    def forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, V), for answers: of the few positions whose next token is asked for."""
        visits = sliced_on_host(self, device).visits(1)
        return torch.cat([torch.nn.functional.linear(hidden, weight) for _, weight in visits], dim=-1)

    head.forward = types.MethodType(forward, head)


def is_on_host(head: torch.nn.Module | None) -> bool:
    return hasattr(head, "copies_from_host")


def sliced_on_host(head: Any, device: torch.device) -> SlicedHead:
    weight: torch.Tensor = head.weight
    rows, columns = weight.shape
    parts = memory_tracker.tiles(rows, max(1, HOST_SLICE_BYTES // (columns * weight.element_size())), weight)

    def visits(times: int) -> Iterator[tuple[slice, torch.Tensor]]:
        if accelerator.reads_host_memory(device) and not memory_tracker.stands_for_card():
            return ((rows, weight[rows]) for rows in parts * times)
        return _copied_ahead(weight, parts * times, device, head.copies_from_host)

    return SlicedHead(parts, visits)


def _copied_ahead(
    weight: torch.Tensor, order: Sequence[slice], device: torch.device, copies: CopyStream
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each slice of `weight` in `order`, in one of two buffers; the next is copied into the other while it is used."""
    most = max(rows.stop - rows.start for rows in order)
    buffers = [torch.empty(most, weight.shape[1], dtype=weight.dtype, device=device) for _ in order[:2]]
    places = [buffers[i % 2][: rows.stop - rows.start] for i, rows in enumerate(order)]
    arriving = copies.copy(places[0], weight[order[0]])
    for i, rows in enumerate(order):
        arriving.wait()
        if i + 1 < len(order):
            arriving = copies.copy(places[i + 1], weight[order[i + 1]])
        yield rows, places[i]


def quantize_head(model: PreTrainedModel) -> None:
    """Give `model` a head in NF4 made from its own; one that is quantised stays as it is."""
    head = model.get_output_embeddings()
    if is_quantized(head):
        return
    weight = head.weight
    with unset_fake_temporarily():  # its parameter is a subclass that cannot be made of a fake tensor
        packed = Linear4bit(
            head.in_features, head.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
    if isinstance(weight, FakeTensor):
        packed.weight = empty_packed(tuple(weight.shape), weight.dtype, is_double=True)
    else:
        packed.weight = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4").to(weight.device)
    packed.quant_state = packed.weight.quant_state
    packed.support_avx512bf16_for_cpu = False
    model.set_output_embeddings(packed)


def nf4_slices(head: Linear4bit, hidden: torch.Tensor) -> list[slice]:
    """Rows of the vocabulary whose weights start and end on a quantisation block, each within `NF4_SLICE_BYTES`."""
    rows, columns = head.weight.quant_state.shape
    return memory_tracker.tiles(rows, max(BLOCK, NF4_SLICE_BYTES // (columns * 4) // BLOCK * BLOCK), hidden)


def sliced_nf4(head: Linear4bit, hidden: torch.Tensor) -> SlicedHead:
    parts = nf4_slices(head, hidden)

    def visits(times: int) -> Iterator[tuple[slice, torch.Tensor]]:
        return ((rows, weight_rows(head, rows, head.compute_dtype)) for rows in parts * times)

    return SlicedHead(parts, visits)
