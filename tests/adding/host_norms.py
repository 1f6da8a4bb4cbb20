"""A made-up technique: the norms of the decoder layers wait in host memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from qtune.memory.techniques import LiveModel, Side, Step, Technique, Techniques
from qtune.memory.techniques.standing import Parts, Standing


def _norms(layers: Sequence[Any]) -> Iterator[Any]:
    return (p for layer in layers for name, p in layer.named_parameters() if name.endswith("norm.weight"))


class HostNorms(Technique):
    name, order, off = "host_norms", 80, False
    key, setting = "norms", Literal["auto", "device", "host"]
    description = "Where the norms wait; host frees little."
    needs_layers = True
    steps = (
        Step(
            name,
            "norms in host memory",
            85,
            "copied in for their turn",
            lambda on, standing: on.having(host_norms=True),
            lambda on, standing: 0.07,
            is_for_host=True,
        ),
    )

    def settled(self, techniques: Techniques, value: str, standing: Standing) -> Techniques:
        return techniques.having(host_norms=value == "host")

    def is_asked_for(self, value: str) -> bool:
        return value == "host"

    def movable_bytes(self, model: Any, layers: Sequence[Any]) -> int:
        from qtune.memory.memory_tracker import storage_sizes

        return storage_sizes(_norms(layers))

    def on_device(self, parts: Parts, standing: Standing, techniques: Techniques) -> Parts:
        return {**parts, "base": parts["base"] - standing.movable[self.name]}

    def on_host(self, standing: Standing, techniques: Techniques) -> Parts:
        return {"norms": standing.movable[self.name]}

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        for norm in _norms(live.layers):
            norm.is_waiting = True
            norm.data = norm.data.to("cpu")  # a card would have to copy it in again

    def live_parts(self, live: LiveModel, techniques: Techniques) -> Iterable[tuple[str, Side, list[Any]]]:
        yield "norms", "host", [norm for norm in _norms(live.layers) if norm.is_waiting]


HOST_NORMS = HostNorms()
