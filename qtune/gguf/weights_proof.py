"""Every number of a GGUF file, read from the file and held against what the live model computes with.

A row of the file is what storing the live model's row gives, to the last step of the type it is stored in. Names and
the order of rows are taken as they were written: another order or another place is what llama.cpp's answers show.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, Keys, ReaderTensor
from numpy.typing import NDArray

from qtune.gguf.contents import Draft
from qtune.gguf.layout import ROPE_FACTORS, Layout
from qtune.gguf.writer import BLOCK, ROUNDING, TensorEntry, packed, restored
from qtune.merge.live_weights import layer_called, noise, tuned
from qtune.merge.weights_proof import Trained, Wanted, WeightsProof

SCALE_SLACK = 2.0**-10  # of a block's largest weight: its scale, on a border, may be the next float16


def prove(trained: Trained, draft: Draft, path: Path) -> WeightsProof:
    """Of the file at `path`, made from `draft`: a whole model, or a LoRA alone."""
    reader = GGUFReader(path)
    there = {tensor.name: tensor for tensor in reader.tensors}
    layout = Layout.of(trained.model.config)
    if draft.vocabulary is None:
        return _prove_lora(trained, draft, layout, reader, there)
    counted = {}
    for entry in draft.entries:
        wanted = _wanted(trained, layout, entry)
        found = there.get(entry.place)
        count = wanted.weight.numel()
        counted[entry.source] = count, count if found is None else _strays(entry, wanted, found)
    return WeightsProof.of(counted)


def _wanted(trained: Trained, layout: Layout, entry: TensorEntry) -> Wanted:
    """Row by row as llama.cpp has them."""
    if entry.source == ROPE_FACTORS:
        factors = layout.rope_factors()
        assert factors is not None, "a draft has the factors that its layout has"
        return Wanted(factors)
    wanted = trained.wanted(entry.source)
    noise = None if wanted.noise is None else layout.arranged(entry.source, wanted.noise.cpu())
    return Wanted(layout.arranged(entry.source, wanted.weight.cpu()), noise)


def _strays(entry: TensorEntry, wanted: Wanted, found: ReaderTensor) -> int:
    if (tuple(found.shape[::-1]), found.tensor_type) != (entry.shape, entry.kind):
        return wanted.weight.numel()
    width = entry.shape[-1] if entry.kind.name in ROUNDING else BLOCK
    noise = None if wanted.noise is None else wanted.noise.reshape(-1, width)
    rows = Wanted(wanted.weight.reshape(-1, width), noise)
    restored_rows = _restored(entry, found.data).view(-1, width)
    if entry.kind.name in ROUNDING:
        return rows.strays(restored_rows, partial(_stored_and_restored, entry))
    return rows.strays(restored_rows, partial(_stored_and_restored, entry), _ends_of_blocks, SCALE_SLACK)


def _ends_of_blocks(wanted: torch.Tensor, noise: torch.Tensor) -> Sequence[torch.Tensor]:
    """Where the numbers of a block (B, 32) may end for its noise.

    They are counted in steps from its extremes. So these stay, and what they may differ by is added to what the others
    may, which is four times at the most: theirs and that of a step, and once more from the lower end. Then they go
    along, as two of one size and different signs may change places.
    """
    noise = noise.amax(1, keepdim=True)
    is_extreme = (wanted == wanted.amax(1, keepdim=True)) | (wanted == wanted.amin(1, keepdim=True))
    inner = (4 * noise).expand_as(wanted).masked_fill(is_extreme, 0.0)
    return [wanted + shift for shift in (-inner, inner, -noise, noise)]


def _stored_and_restored(entry: TensorEntry, rows: torch.Tensor) -> torch.Tensor:
    return restored(packed(entry, rows).reshape(len(rows), -1), entry.kind).view(rows.shape)


def _restored(entry: TensorEntry, data: NDArray[Any]) -> torch.Tensor:
    """The numbers of a tensor in their order; copied, as the file is mapped and must not be written to."""
    return restored(np.array(data).reshape(-1).view(np.uint8), entry.kind)


def _prove_lora(
    trained: Trained, draft: Draft, layout: Layout, reader: GGUFReader, there: Mapping[str, ReaderTensor]
) -> WeightsProof:
    """What llama.cpp adds to each weight of the base: alpha / R of B @ A, as peft adds."""
    alpha = reader.fields[Keys.Adapter.LORA_ALPHA].contents()
    places = {entry.source: entry.place.removesuffix(".lora_b") for entry in draft.entries}
    counted = {}
    for source, place in places.items():
        layer = layer_called(trained.model, source.removesuffix(".weight"))
        a, b = (torch.from_numpy(there[f"{place}.lora_{part}"].data.copy()) for part in "ab")
        added = alpha / len(a) * (b @ a)
        counted[source] = added.numel(), _of_layer(layer, layout, source, added).strays(added, torch.Tensor.float)
    return WeightsProof.of(counted)


def _of_layer(layer: torch.nn.Module | None, layout: Layout, source: str, like: torch.Tensor) -> Wanted:
    """What peft adds to the weight of `layer`, in the shape of `like`; the file's alpha and B are rounded too."""
    nothing = torch.zeros_like(like)
    unsure = None if layer is None else noise(layer, nothing)
    if layer is None or unsure is None:
        return Wanted(nothing)
    return Wanted(layout.arranged(source, tuned(layer, nothing).cpu()), 2 * layout.arranged(source, unsure.cpu()))
