"""The embedding table in host memory: `memory.embedding_offload`."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from qtune.memory.techniques import LiveModel, Side, Step, Technique, Techniques
from qtune.memory.techniques.standing import Parts, Standing
from qtune.units import MIB

STAGING_BYTES = 16 * MIB  # page-locked, through which a card is sent rows: a copy of half outlasts its start by far
COPIES = 0.005  # of a step's time: an estimate, not measured on a card yet


PER_LAYER = "embed_tokens_per_layer"  # Gemma 3n and 4: a table with rows for every layer, larger than the first one


def tables_per_layer(model: Any) -> list[Any]:
    """The embeddings of `model` that give each layer an input of its own."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == PER_LAYER]


class HostEmbedding(Technique):
    """On or off. A tied table is the head's, and stays for as long as the head reads it on the device; one with rows
    for each layer goes in any case."""

    name, order, off = "host_embedding", 40, False
    key, setting = "embedding", Literal["auto", "device", "host"]
    description = "Where the embedding table lives; on the host its rows are looked up there."
    is_as_loaded = True
    steps = (
        Step(
            name,
            "embedding in host memory",
            40,
            "only the rows looked up are copied",
            lambda on, standing: on.having(host_embedding=True),
            lambda on, standing: COPIES,
            is_for_host=True,
        ),
    )

    def settled(self, techniques: Techniques, value: str, standing: Standing) -> Techniques:
        return techniques.having(host_embedding=value == "host")

    def is_asked_for(self, value: str) -> bool:
        return value == "host"

    def movable_bytes(self, model: Any, layers: Sequence[Any]) -> int:
        from qtune.memory.memory_tracker import storage_sizes

        return storage_sizes(table.weight for table in tables_per_layer(model))

    def on_device(self, parts: Parts, standing: Standing, techniques: Techniques) -> Parts:
        return {**parts, "embedding": 0, "base": parts["base"] - standing.movable[self.name]}

    def on_host(self, standing: Standing, techniques: Techniques) -> Parts:
        table = standing.head_bytes if standing.is_tied else standing.embedding_bytes
        if standing.is_tied and techniques.head == "host":
            table = 0
        size = table + standing.movable[self.name]
        return {"embedding": size} if size else {}

    def is_in_a_pass(self, techniques: Techniques) -> bool:
        return False

    def stays_on_host(self, weight: str, techniques: Techniques, text: Any) -> bool:
        if weight.endswith(f"{PER_LAYER}.weight"):
            return techniques.host_embedding
        return (
            bool(techniques.host_embedding and weight.endswith("embed_tokens.weight")) and not text.tie_word_embeddings
        )

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        from qtune.memory.embedding_offload import move_embedding_out, move_tables_out

        move_tables_out(tables_per_layer(live.causal), live.device)
        if not (live.is_tied and wanted.head == "host"):  # a tied table goes with the head
            move_embedding_out(live.causal, live.device)

    def live_parts(self, live: LiveModel, techniques: Techniques) -> Iterable[tuple[str, Side, list[Any]]]:
        embedding, head = live.causal.get_input_embeddings(), live.causal.get_output_embeddings()
        tables = [table.weight for table in tables_per_layer(live.causal)]
        if head is None or embedding.weight is not head.weight:
            tables.append(embedding.weight)
        yield "embedding", "host", tables


HOST_EMBEDDING = HostEmbedding()
