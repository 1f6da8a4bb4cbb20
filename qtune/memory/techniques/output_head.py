"""The output head in host memory, or in NF4 on the device: `memory.output_head`."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from qtune.memory.techniques import LiveModel, Side, Step, Technique, Techniques
from qtune.memory.techniques.standing import Parts, Standing

HEADS = ("device", "host", "nf4")  # each for less memory than the one before, on the device or the host
COPIES = 0.05  # of a step's time, for slices of the head in host memory: an estimate, not measured on a card yet


def _logits_again(techniques: Techniques, standing: Standing) -> float:
    """A third of the head's share of a step with recomputation."""
    return standing.head_parameters / max(1, 3 * standing.active_parameters)


class OutputHead(Technique):
    """Where the head is, one of `HEADS`."""

    name, order, off = "head", 50, "device"
    key, setting = "head", Literal["auto", "16bit", "host", "nf4"]
    description = "Where the output head is; host copies slices of it in for the loss, nf4 rounds it while training."
    steps = (
        Step(
            name,
            "output head in host memory",
            80,
            "slices of it are copied in for the loss, and the logits made twice",
            lambda on, standing: on if on.head == "nf4" else on.having(head="host"),
            lambda on, standing: COPIES + _logits_again(on, standing),
            "host",
            is_for_host=True,
        ),
        Step(
            name,
            "output head in NF4",
            90,
            "where the host has no room; the only one that moves the loss, as it rounds the head while training",
            lambda on, standing: on if on.head == "host" else on.having(head="nf4"),
            _logits_again,
            "nf4",
            is_lossy=True,
        ),
    )

    def settled(self, techniques: Techniques, value: str, standing: Standing) -> Techniques:
        return techniques.having(head="device" if value == "16bit" else value)

    def is_asked_for(self, value: str) -> bool:
        return value != "16bit"

    def refusal(self, model: Any, layers: Sequence[Any]) -> str | None:
        from qtune.memory.fused_cross_entropy import suits
        from qtune.memory.trained_rows import has_rows

        if has_rows(model.get_base_model()):
            return "rows of it are trained (lora.train_tokens), which are read beside the whole table"
        return None if suits(model) else "its head is trained, or does more than scale and cap its logits"

    def joined(self, wanted: str, now: str) -> str:
        return max(wanted, now, key=HEADS.index)

    def on_device(self, parts: Parts, standing: Standing, techniques: Techniques) -> Parts:
        if techniques.head == "host":
            return {**parts, "head": 0}
        embedding_stays = standing.is_tied and not techniques.host_embedding
        table = standing.head_bytes if embedding_stays else parts["embedding"]
        return {**parts, "head": standing.quantized_head_bytes, "embedding": table}

    def on_host(self, standing: Standing, techniques: Techniques) -> Parts:
        return {"head": standing.head_bytes} if techniques.head == "host" else {}

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        from qtune.memory.embedding_offload import move_embedding_out
        from qtune.memory.output_head import move_head_out, quantize_head

        if wanted.head == "nf4":
            quantize_head(live.causal)
            return
        move_head_out(live.causal, live.device, live.is_tied)
        if live.is_tied:
            move_embedding_out(live.causal, live.device)

    def live_parts(self, live: LiveModel, techniques: Techniques) -> Iterable[tuple[str, Side, list[Any]]]:
        if techniques.head == "host":
            yield "head", "host", [live.causal.get_output_embeddings().weight]


OUTPUT_HEAD = OutputHead()
