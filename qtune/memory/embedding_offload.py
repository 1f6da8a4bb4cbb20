"""The embedding table in host memory: rows are looked up there, and only they cross to the device.

Held less of: the table, 2VH bytes in bfloat16; of Gemma 3n and 4 that of every layer's own inputs, too.
Costs: the same bytes of host memory, and for a card 16 MiB that are page-locked; (T, H) copied to the device once a
forward pass, before the first layer, while the processor looks up the rows behind. Where the tokens are on the device,
the processor waits for it to have them.
Refuses: nothing; but a table tied to the output head saves nothing while the head reads it on the device: before that
is quantised, or in host memory too.

Letters: T tokens, H hidden, V vocabulary.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qtune import accelerator
from qtune.accelerator import Copy, CopyStream
from qtune.memory import memory_tracker
from qtune.memory.output_head import is_on_host
from qtune.memory.techniques.embedding_offload import STAGING_BYTES


def move_embedding_out(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the input embedding's table in host memory from now on; the rows looked up go to `device`.

    One that the head has taken there already is shared with it; again changes nothing.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    _move_out(embedding, device, is_there=is_on_host(head) and embedding.weight is head.weight)


def move_tables_out(tables: Sequence[Any], device: torch.device) -> None:
    """The same of embeddings that no head shares."""
    for table in tables:
        _move_out(table, device, is_there=False)


def _move_out(embedding: Any, device: torch.device, is_there: bool) -> None:
    if hasattr(embedding, "forward_on_host"):
        return
    on_host = embedding.forward
    if not is_there:
        embedding.weight = torch.nn.Parameter(embedding.weight.detach().to("cpu", copy=True), requires_grad=False)
        memory_tracker.mark([embedding.weight], "embedding", "host")
    embedding.forward_on_host = on_host
    for name, factor in list(embedding.named_buffers(recurse=False)):  # Gemma scales its rows where they are read
        embedding.register_buffer(name, factor.to("cpu"), persistent=False)

    crossing = None if accelerator.reads_host_memory(device) else RowsToDevice(embedding.weight, device)

    def forward(self: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return on_host(ids) if crossing is None else crossing.send(accelerator.to_host(ids), on_host)

    embedding.forward = types.MethodType(forward, embedding)


class RowsToDevice:
    """Rows like those of `table` on their way to `device`, through two page-locked buffers in turn."""

    def __init__(self, table: torch.Tensor, device: torch.device):
        self._width, self._dtype, self._device = table.shape[-1], table.dtype, device
        self._at_a_time = max(1, STAGING_BYTES // 2 // table[:1].nbytes)
        self._buffers = [accelerator.page_locked(self._at_a_time * self._width, self._dtype) for _ in range(2)]
        self._copies, self._sent = CopyStream(device), dict[int, Copy]()

    def send(self, ids: torch.Tensor, look_up: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """(B, T, H) on the device, of `ids` (B, T) in host memory."""
        rows = torch.empty(ids.numel(), self._width, dtype=self._dtype, device=self._device)
        tiles = zip(ids.flatten().split(self._at_a_time), rows.split(self._at_a_time), strict=True)
        for number, (some, place) in enumerate(tiles):
            turn = number % 2
            if turn in self._sent:
                self._sent[turn].synchronize()  # what its buffer held has left
            staged = self._buffers[turn][: place.numel()].view_as(place).copy_(look_up(some))
            self._sent[turn] = self._copies.copy(place, staged)
        for sent in self._sent.values():
            sent.wait()
        return rows.view(*ids.shape, self._width)
