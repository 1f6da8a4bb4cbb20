"""A LoRA alone as a GGUF file, to be served beside the GGUF file of its base.

llama.cpp scales B @ A by alpha / R with one alpha for the whole file. So alpha is the one that gives the first module
its scale, which covers rsLoRA; where modules differ in alpha, B makes up for it.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from gguf import GGUFWriter, Keys

from qtune.errors import ModelError
from qtune.gguf.layout import Layout
from qtune.gguf.writer import F32, Stored, TensorEntry, stored
from qtune.merge.lora_delta import AdapterWeights


def refuse_what_is_no_lora(adapter: AdapterWeights) -> None:
    """Raises ModelError for what a file of A and B cannot say."""
    variants = {variant.name: variant for change in adapter.changes.values() for variant in change.variants}
    faults = [variant.faults["llama.cpp"] for variant in variants.values() if "llama.cpp" in variant.faults]
    if faults:
        raise ModelError(f"--to adapter-gguf: {', and '.join(faults)}. Use --to gguf.")
    if adapter.replaced:
        raise ModelError(
            f"--to adapter-gguf: the run trained {', '.join(sorted(adapter.replaced))} whole, and an adapter file holds"
            " A and B alone. Use --to gguf."
        )


def describe(writer: GGUFWriter, adapter: AdapterWeights) -> None:
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, _alpha(adapter))


def entries(adapter: AdapterWeights, names: dict[str, str]) -> list[TensorEntry]:
    """A and B of every module, in float32; `names` are the places of the base's tensors."""
    return [
        TensorEntry(f"{module}.weight", f"{names[f'{module}.weight']}.{part}", tuple(tensor.shape), F32)
        for module, change in adapter.changes.items()
        for part, tensor in (("lora_a", change.a), ("lora_b", change.b))
    ]


def jobs(entries: Iterable[TensorEntry], adapter: AdapterWeights, layout: Layout) -> Iterator[Callable[[], Stored]]:
    """What makes `entries`: A (R, I), and B (O, R) with its rows where llama.cpp has the base's."""
    return (partial(stored, entry, tensor) for entry, tensor in zip(entries, _tensors(adapter, layout), strict=True))


def _tensors(adapter: AdapterWeights, layout: Layout) -> Iterator[torch.Tensor]:
    alpha = _alpha(adapter)
    for module, change in adapter.changes.items():
        rank = change.a.shape[0]
        yield change.a.float()
        yield layout.arranged(f"{module}.weight", change.b.float()) * (change.scale * rank / alpha)


def _alpha(adapter: AdapterWeights) -> float:
    first = next(iter(adapter.changes.values()))
    return first.scale * first.a.shape[0]
