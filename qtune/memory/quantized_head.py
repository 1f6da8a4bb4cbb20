"""The output head in NF4, dequantised in slices of vocabulary.

Held less of: the head, 2VH bytes in bfloat16, of which 4.13 bits a weight remain; a tied embedding is not touched.
Costs: what `sliced_loss` does. The head is rounded as the layers are, which moves the loss as much as quantising one of
them.
Refuses: heads that the tiled loss cannot stand in for. Saved adapters and merges use the base's own head.

Letters: H hidden, V vocabulary.
"""

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import PreTrainedModel

from qtune.memory import memory_tracker
from qtune.memory.chunked_cross_entropy import SlicedHead
from qtune.memory.nf4 import BLOCK, empty_packed, is_quantized, weight_rows
from qtune.units import MIB

SLICE_BYTES = 16 * MIB  # in float32, of which a slice and its gradient are held at a time


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


def slices(head: Linear4bit, hidden: torch.Tensor) -> list[slice]:
    """Rows of the vocabulary whose weights start and end on a quantisation block, each within `SLICE_BYTES`."""
    rows, columns = head.weight.quant_state.shape
    return memory_tracker.tiles(rows, max(BLOCK, SLICE_BYTES // (columns * 4) // BLOCK * BLOCK), hidden)


def sliced(head: Linear4bit, hidden: torch.Tensor) -> SlicedHead:
    return SlicedHead(slices(head, hidden), lambda rows: weight_rows(head, rows, head.compute_dtype))
