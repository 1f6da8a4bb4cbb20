"""Frozen layers streamed from host memory: `memory.weight_streaming`."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from qtune.memory.techniques import LiveModel, Side, Step, Technique, Techniques, auto_or_count
from qtune.memory.techniques.standing import Parts, Standing

COPIES = 0.10  # of a step's time, for all layers: an estimate, not measured on a card yet
OF_A_LAYER = re.compile(r"\blayers\.(\d+)\..*(weight|_proj)$")


def spread(streamed: int, layers: int) -> list[int]:
    """Indices of `streamed` of `layers` layers, evenly spaced, so that a copy has as long as possible."""
    return [(2 * i + 1) * layers // (2 * streamed) for i in range(streamed)]


def is_in(layers: list[int], weight: str) -> bool:
    """Whether the weight of that name is a matrix of one of `layers`."""
    layer = OF_A_LAYER.search(weight)
    return layer is not None and "norm" not in weight and int(layer[1]) in layers


class StreamedLayers(Technique):
    """Counts decoder layers. Each of them is recomputed, and the others with them."""

    name, order, off = "streamed_layers", 60, 0
    key, setting = "stream_layers", auto_or_count(0)
    description = "Frozen layers that stay in host memory and visit the device; costs copies, not accuracy."
    needs_layers = True
    moves_layers = fills_host = True
    is_as_loaded = True
    steps = (
        Step(
            name,
            "streamed layers",
            50,
            "copied in ahead of their turn, forward and backward",
            lambda on, standing: _streaming(on, len(standing.layers), standing),
            lambda on, standing: COPIES * on.streamed_layers / max(1, len(standing.layers)),
            is_for_host=True,
        ),
    )

    def settled(self, techniques: Techniques, value: int, standing: Standing) -> Techniques:
        return _streaming(techniques, min(value, len(standing.layers)), standing)

    def ruled_out(self, memory: Any) -> str | None:
        kept = memory.keep_layers
        is_kept = kept != "auto" and kept > 0
        return f"a streamed layer is recomputed, and memory.keep_layers = {kept}" if is_kept else None

    def joined(self, wanted: int, now: int) -> int:
        return max(wanted, now)

    def amounts(self, value: int) -> Sequence[int]:
        return range(1, value)

    def amount(self, value: int, standing: Standing) -> str:
        return f", {value} of {len(standing.layers)}"

    def on_device(self, parts: Parts, standing: Standing, techniques: Techniques) -> Parts:
        """Two buffers of one layer's size stand in for the layers."""
        from qtune.memory.memory_tracker import block_bytes

        layers = [standing.layers[i] for i in spread(techniques.streamed_layers, len(standing.layers))]
        slot = max((layer.packed_bytes for layer in layers), default=0)
        return {
            **parts,
            "base": parts["base"] - sum(layer.resident_bytes for layer in layers),
            "streamed layers": min(2, len(layers)) * block_bytes(slot),
        }

    def on_host(self, standing: Standing, techniques: Techniques) -> Parts:
        from qtune.memory.memory_tracker import block_bytes

        streamed = spread(techniques.streamed_layers, len(standing.layers))
        return {"streamed layers": sum(block_bytes(standing.layers[i].packed_bytes) for i in streamed)}

    def is_in_a_pass(self, techniques: Techniques) -> bool:
        return False

    def stays_on_host(self, weight: str, techniques: Techniques, text: Any) -> bool:
        return is_in(spread(techniques.streamed_layers, text.num_hidden_layers), weight)

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        from qtune.memory.weight_streaming import move_out

        move_out(live, wanted)

    def live_parts(self, live: LiveModel, techniques: Techniques) -> Iterable[tuple[str, Side, list[Any]]]:
        stream = live.runner.stream
        if stream is not None:
            yield "streamed layers", "host", stream.homes("host")
            yield "streamed layers", "device", stream.slots


def _streaming(techniques: Techniques, layers: int, standing: Standing) -> Techniques:
    if not layers:
        return techniques.having(streamed_layers=0)
    return techniques.having(streamed_layers=layers, recomputed_layers=len(standing.layers))


STREAMED_LAYERS = StreamedLayers()
