"""Everything a GGUF file will hold, gathered and checked before a byte is written."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import torch
from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, Keys
from transformers import PreTrainedTokenizerBase

from qtune.errors import ModelError
from qtune.gguf import writer
from qtune.gguf.layout import EMBEDDING, HEAD, OUTPUT, ROPE_FACTORS, TOKEN_EMBEDDING, Layout
from qtune.gguf.tokenizer import Vocabulary
from qtune.gguf.tokenizer_check import Reference, matching
from qtune.gguf.writer import F32, FILE_TYPE_BY_QUANT, Quant, Stored, TensorEntry, Written, stored, stored_type
from qtune.merge.lora_delta import AdapterWeights
from qtune.merge.merged_tensor import Job
from qtune.merge.merged_weights import Fold, Onto
from qtune.merge.parallel_writer import in_order
from qtune.model import base, lora_inits
from qtune.model.checkpoint import TensorSpec
from qtune.model.tokenizer import load_tokenizer
from qtune.rundir import RunDir

Target = Literal["gguf", "ollama", "adapter-gguf"]


@dataclass(frozen=True)
class Draft:
    """`writer` knows all but the tensors; `jobs` make those of `entries`, some rows each, in order.

    `references` are the texts that its tokenizer was held to. `vocabulary` and `tokenizer` are None for an adapter.
    """

    fold: Fold
    writer: GGUFWriter
    quant: Quant
    onto: Onto
    entries: tuple[TensorEntry, ...]
    jobs: Iterator[Callable[[], Stored]]
    vocabulary: Vocabulary | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    references: tuple[Reference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    def write(self, path: Path, tell: Callable[[str], None]) -> dict[str, Written]:
        """The file, by place what was written; `tell` hears each place as it is begun."""

        def told() -> Iterator[Stored]:
            for place, parts in groupby(in_order(self.jobs), lambda part: part.place):
                tell(place)
                yield from parts

        return writer.write(self.writer, path, self.entries, told())


def model_draft(run: RunDir, fold: Fold, quant: Quant, onto: Onto) -> Draft:
    """The whole model; `fold` is in float32. Raises ModelError for what has no GGUF form."""
    layout = Layout.of(base.read_config(fold.model))
    specs = fold.checkpoint.text_specs()
    names = layout.names(specs)
    tokenizer = load_tokenizer(fold.model)
    rows = specs[EMBEDDING if EMBEDDING in specs else HEAD].shape[0]
    vocabulary, references = matching(tokenizer, rows, fold.lock.stop_token_ids)
    head = OUTPUT if OUTPUT in names.values() else TOKEN_EMBEDDING
    writer = _introduced(run, fold, layout, GGUFType.MODEL)
    writer.add_file_type(FILE_TYPE_BY_QUANT[quant])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    layout.describe(writer, rows)
    vocabulary.write_to(writer)
    entries = {own: _entry(specs[own], place, quant, place == head) for own, place in names.items()}
    factors = layout.rope_factors()
    first = {} if factors is None else {TensorEntry(ROPE_FACTORS, ROPE_FACTORS, tuple(factors.shape), F32): factors}
    jobs: Iterator[Callable[[], Stored]] = chain(
        (partial(stored, *known) for known in first.items()), _jobs(fold, layout, onto, entries)
    )
    notes = _notes(layout, vocabulary)
    return Draft(fold, writer, quant, onto, (*first, *entries.values()), jobs, vocabulary, tokenizer, references, notes)


def base_draft(run: RunDir, fold: Fold) -> Draft:
    """The base without the adapter, as the run held it, in f16. Raises ModelError for what has no GGUF form."""
    return model_draft(run, fold.without_adapter(), "f16", "dequantised")


def adapter_draft(run: RunDir, fold: Fold) -> Draft:
    """A and B alone; `fold` is in float32. Raises ModelError for an adapter that is more than those."""
    layout = Layout.of(base.read_config(fold.model))
    adapter = fold.adapter
    refuse_what_is_no_lora(adapter)
    if why := lora_inits.of_run(fold.lock.recipe).not_onto_original:
        raise ModelError(f"--to adapter-gguf: {why}. Use --to gguf.")
    entries = _lora_entries(adapter, layout.names(fold.checkpoint.text_specs()))
    writer = _introduced(run, fold, layout, GGUFType.ADAPTER)
    describe_lora(writer, adapter)
    onto: Onto = "dequantised" if fold.quantized else "original"
    return Draft(fold, writer, "f32", onto, tuple(entries), _lora_jobs(entries, adapter, layout))


def _entry(spec: TensorSpec, place: str, quant: Quant, is_head: bool) -> TensorEntry:
    return TensorEntry(spec.name, place, spec.shape, stored_type(quant, spec.shape, is_head))


def _jobs(fold: Fold, layout: Layout, onto: Onto, entries: dict[str, TensorEntry]) -> Iterator[Callable[[], Stored]]:
    for shard in fold.checkpoint.shards:
        for spec in shard.tensors:
            own = fold.checkpoint.text.name(spec.name)
            if own is not None and (entry := entries.get(own)):
                order = layout.order(own, spec.shape[0])
                yield from (partial(_stored, entry, job) for job in fold.jobs(shard, spec.name, onto, order))


def _stored(entry: TensorEntry, job: Job) -> Stored:
    return stored(entry, job().rows.float())


def _introduced(run: RunDir, fold: Fold, layout: Layout, kind: str) -> GGUFWriter:
    """A writer that knows whose file this is; a base that is a folder is named without the way to it."""
    writer = GGUFWriter(None, layout.name)
    writer.add_type(kind)
    writer.add_name(fold.lock.name or run.path.resolve().name)
    name = fold.lock.base.name
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(name).name)
    if "/" in name and not Path(name).is_absolute():
        writer.add_base_model_organization(0, name.split("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{name}")
    return writer


def _notes(layout: Layout, vocabulary: Vocabulary) -> tuple[str, ...]:
    """What the user of the file should know, a sentence each."""
    notes = []
    if layout.context_tokens < layout.config.max_position_embeddings:
        notes.append(f"Beyond {layout.context_tokens:,} tokens the base attends to a window, so the file ends there.")
    if not vocabulary.spells_everything:
        notes.append("The tokenizer has no bytes to spell unknown characters with, and llama.cpp rejects those.")
    if "strftime_now" in (vocabulary.chat_template or ""):
        notes.append("The chat template writes the date; in a Modelfile it stays that of this export.")
    return tuple(notes)


# A LoRA alone, to be served beside the GGUF file of its base. llama.cpp scales B @ A by alpha / R with one alpha for
# the whole file. So alpha is the one that gives the first module its scale, which covers rsLoRA; where modules differ
# in alpha, B makes up for it.


def refuse_what_is_no_lora(adapter: AdapterWeights) -> None:
    """Raises ModelError for what a file of A and B cannot say."""
    variants = {variant.name: variant for change in adapter.changes.values() for variant in change.variants}
    faults = [variant.faults["llama.cpp"] for variant in variants.values() if "llama.cpp" in variant.faults]
    if faults:
        raise ModelError(f"--to adapter-gguf: {', and '.join(faults)}. Use --to gguf.")
    if adapter.rows:
        raise ModelError(
            f"--to adapter-gguf: the run trained rows of {', '.join(sorted(adapter.rows))}, and an adapter file holds A"
            " and B alone. Use --to gguf."
        )
    if adapter.replaced:
        raise ModelError(
            f"--to adapter-gguf: the run trained {', '.join(sorted(adapter.replaced))} whole, and an adapter file holds"
            " A and B alone. Use --to gguf."
        )


def describe_lora(writer: GGUFWriter, adapter: AdapterWeights) -> None:
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, _alpha(adapter))


def _lora_entries(adapter: AdapterWeights, names: dict[str, str]) -> list[TensorEntry]:
    """A and B of every module, in float32; `names` are the places of the base's tensors."""
    return [
        TensorEntry(f"{module}.weight", f"{names[f'{module}.weight']}.{part}", tuple(tensor.shape), F32)
        for module, change in adapter.changes.items()
        for part, tensor in (("lora_a", change.a), ("lora_b", change.b))
    ]


def _lora_jobs(
    entries: Iterable[TensorEntry], adapter: AdapterWeights, layout: Layout
) -> Iterator[Callable[[], Stored]]:
    """What makes `entries`: A (R, I), and B (O, R) with its rows where llama.cpp has the base's."""
    return (
        partial(stored, entry, tensor) for entry, tensor in zip(entries, _lora_tensors(adapter, layout), strict=True)
    )


def _lora_tensors(adapter: AdapterWeights, layout: Layout) -> Iterator[torch.Tensor]:
    alpha = _alpha(adapter)
    for module, change in adapter.changes.items():
        rank = change.a.shape[0]
        yield change.a.float()
        yield layout.arranged(f"{module}.weight", change.b.float()) * (change.scale * rank / alpha)


def _alpha(adapter: AdapterWeights) -> float:
    first = next(iter(adapter.changes.values()))
    return first.scale * first.a.shape[0]
