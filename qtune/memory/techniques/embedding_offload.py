"""The embedding table in host memory: `memory.embedding_offload`."""

from collections.abc import Iterable
from typing import Any, Literal

from qtune.memory.techniques import LiveModel, Side, Step, Technique, Techniques
from qtune.memory.techniques.standing import Parts, Standing
from qtune.units import MIB

STAGING_BYTES = 16 * MIB  # page-locked, through which a card is sent rows: a copy of half outlasts its start by far
COPIES = 0.005  # of a step's time: an estimate, not measured on a card yet


class HostEmbedding(Technique):
    """On or off. A tied table is the head's, and stays for as long as the head reads it on the device."""

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

    def on_device(self, parts: Parts, standing: Standing, techniques: Techniques) -> Parts:
        return {**parts, "embedding": 0}

    def on_host(self, standing: Standing, techniques: Techniques) -> Parts:
        if standing.is_tied and techniques.head == "host":
            return {}
        return {"embedding": standing.head_bytes if standing.is_tied else standing.embedding_bytes}

    def is_in_a_pass(self, techniques: Techniques) -> bool:
        return False

    def stays_on_host(self, weight: str, techniques: Techniques, text: Any) -> bool:
        return (
            bool(techniques.host_embedding and weight.endswith("embed_tokens.weight")) and not text.tie_word_embeddings
        )

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        from qtune.memory.embedding_offload import move_embedding_out

        if not (live.is_tied and wanted.head == "host"):  # a tied table goes with the head
            move_embedding_out(live.causal, live.device)

    def live_parts(self, live: LiveModel, techniques: Techniques) -> Iterable[tuple[str, Side, list[Any]]]:
        embedding, head = live.causal.get_input_embeddings(), live.causal.get_output_embeddings()
        if head is None or embedding.weight is not head.weight:
            yield "embedding", "host", [embedding.weight]


HOST_EMBEDDING = HostEmbedding()
