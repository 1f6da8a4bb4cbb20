"""The output head in host memory: slices of its vocabulary visit the device for the loss.

Held less of: the head, 2VH bytes in bfloat16, of which slices of 32 MiB remain while the loss is made. A tied table
goes as one: embedding and head read the same one in host memory.
Costs: 2VH bytes of host memory, page-locked; each slice copied to the device twice a pass; what `sliced_loss` does.
Loss and gradient are those of the head on the device, to rounding: a head of one slice gives them to the bit.
Refuses: heads that the tiled loss cannot stand in for.

Letters: B rows, T tokens, H hidden, V vocabulary.
"""

import types
from typing import Any

import torch
from transformers import PreTrainedModel

from qtune.memory import memory_tracker
from qtune.memory.activation_offload import page_locked
from qtune.memory.chunked_cross_entropy import SlicedHead
from qtune.units import MIB

SLICE_BYTES = 32 * MIB  # a copy of so much takes long enough to be worth its start, and is little on any card


def move_head_out(model: PreTrainedModel, device: torch.device, is_tied: bool) -> None:
    """Keep the head's weight in host memory from now on; one that is there already stays where it is.

    One that `is_tied` is the embedding's from then on too, which has to look its rows up there.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if is_on_host(head):
        return
    weight = head.weight.detach()
    table = page_locked(weight.numel(), weight.dtype).view_as(weight).copy_(weight)
    head.weight = torch.nn.Parameter(table, requires_grad=False)
    if is_tied:
        embedding.weight = head.weight
    memory_tracker.mark([head.weight], "head", "host")
    head.is_on_host = True

    def forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, V), for answers: of the few positions whose next token is asked for."""
        slices = sliced(self, device)
        return torch.cat([torch.nn.functional.linear(hidden, slices.weight(rows)) for rows in slices.parts], dim=-1)

    head.forward = types.MethodType(forward, head)


def is_on_host(head: torch.nn.Module | None) -> bool:
    return getattr(head, "is_on_host", False)


def sliced(head: Any, device: torch.device) -> SlicedHead:
    weight: torch.Tensor = head.weight
    rows, columns = weight.shape

    def copied(part: slice) -> torch.Tensor:
        source = weight[part]
        return torch.empty(source.shape, dtype=source.dtype, device=device).copy_(source, non_blocking=True)

    return SlicedHead(
        memory_tracker.tiles(rows, max(1, SLICE_BYTES // (columns * weight.element_size())), weight), copied
    )
