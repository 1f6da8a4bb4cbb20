"""The embedding table in host memory: rows are looked up there, and only they cross to the device.

Held less of: the table, 2VH bytes in bfloat16.
Costs: the same bytes of host memory; (T, H) copied to the device once a forward pass, before the first layer.
Refuses: nothing; but a table tied to the output head saves nothing while the head reads it on the device: before that
is quantised, or in host memory too.

Letters: T tokens, H hidden, V vocabulary.
"""

import types

import torch
from transformers import PreTrainedModel

from qtune.memory import memory_tracker
from qtune.memory.output_head import is_on_host


def move_embedding_out(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the input embedding's table in host memory from now on; the rows looked up go to `device`.

    One that the head has taken there already is shared with it; again changes nothing.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if hasattr(embedding, "forward_on_host"):
        return
    on_host = embedding.forward
    if not (is_on_host(head) and embedding.weight is head.weight):
        embedding.weight = torch.nn.Parameter(embedding.weight.detach().to("cpu", copy=True), requires_grad=False)
        memory_tracker.mark([embedding.weight], "embedding", "host")
    embedding.forward_on_host = on_host
    for name, factor in list(embedding.named_buffers(recurse=False)):  # Gemma scales its rows where they are read
        embedding.register_buffer(name, factor.to("cpu"), persistent=False)

    def forward(self: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        rows = on_host(ids.to("cpu"))
        return rows.to(device, non_blocking=True)

    embedding.forward = types.MethodType(forward, embedding)
