"""The output head in NF4, and the loss from it in tiles of vocabulary.

Held less of: the head, 2VH bytes in bfloat16, of which 4.13 bits a weight remain; a tied embedding is not touched.
Costs: the logits are made twice, once for their normaliser and once for the gradient; the head is dequantised in as
many slices. The head is rounded as the layers are, which moves the loss as much as quantising one of them.
Refuses: heads that the tiled loss cannot stand in for. Saved adapters and merges use the base's own head.

The normaliser of a softmax over slices is kept as a running maximum and sum (Milakov and Gimelshein 2018,
arXiv:1805.02867).

Letters: N labelled tokens, H hidden, V vocabulary, R rows of a vocabulary slice.
"""

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import PreTrainedModel

from qtune.memory import live
from qtune.memory.nf4 import BLOCK, empty_packed, is_quantized, weight_rows

SLICE_BYTES = 16 * 1024**2


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
    return live.tiles(rows, max(BLOCK, SLICE_BYTES // (columns * 4) // BLOCK * BLOCK), hidden)


def of_quantized_head(
    hidden: torch.Tensor, head: Linear4bit, labels: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of `hidden` (N, H) against `labels` (N,), and its gradient (N, H)."""
    dtype = head.compute_dtype
    parts = slices(head, hidden)
    tiles = live.tiles(len(hidden), max(16, SLICE_BYTES // (4 * (parts[0].stop - parts[0].start))), hidden)
    highest = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    total, own = torch.zeros_like(highest), torch.zeros_like(highest)
    for rows in parts:
        weight = weight_rows(head, rows, dtype)
        for tile in tiles:
            logits = (hidden[tile].to(dtype) @ weight.t()).float()
            here, index = _labels_in(labels[tile], rows)
            own[tile] += torch.where(here, logits.gather(1, index[:, None])[:, 0], 0.0)
            higher = torch.maximum(highest[tile], logits.amax(dim=1))
            below = logits.sub_(higher[:, None]).exp_().sum(dim=1)
            total[tile] = total[tile] * (highest[tile] - higher).exp() + below
            highest[tile] = higher
    normaliser = highest + total.log()
    nats = (normaliser - own).sum()
    return nats, _gradient(hidden, head, labels, normaliser, parts, tiles) if with_gradient else None


def _gradient(
    hidden: torch.Tensor,
    head: Linear4bit,
    labels: torch.Tensor,
    normaliser: torch.Tensor,
    parts: list[slice],
    tiles: list[slice],
) -> torch.Tensor:
    """(softmax - one-hot) @ weight, summed over the slices in float32."""
    dtype = head.compute_dtype
    gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for rows in parts:
        weight = weight_rows(head, rows, dtype)
        for tile in tiles:
            p = (hidden[tile].to(dtype) @ weight.t()).float().sub_(normaliser[tile, None]).exp_()
            here, index = _labels_in(labels[tile], rows)
            p.scatter_add_(1, index[:, None], -here[:, None].float())
            gradient[tile] += p.to(dtype) @ weight
    return gradient.to(hidden.dtype)


def _labels_in(labels: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels are rows of this slice, and where in it (0 for the others)."""
    here = (labels >= rows.start) & (labels < rows.stop)
    return here, torch.where(here, labels - rows.start, 0)
