"""Inputs of recomputed layers in host memory: `memory.activation_offload`."""

from collections.abc import Sequence
from typing import Any, Literal

from qtune.memory.techniques import LiveModel, Step, Technique, Techniques
from qtune.memory.techniques.standing import Standing

COPIES = 0.03  # of a step's time, for all layers: an estimate, not measured on a card yet


def _cost(techniques: Techniques, standing: Standing) -> float:
    return float(COPIES * techniques.recomputed_layers / max(1, len(standing.layers)))


class HostCheckpoints(Technique):
    """On or off. Its bytes in host memory depend on the batch, so a forecast finds them in a trace."""

    name, order, off = "host_checkpoints", 20, False
    key, setting = "checkpoints", Literal["auto", "device", "host"]
    description = "Where the inputs of recomputed layers wait; host frees 2 bytes x hidden a token and layer."
    needs_layers = True
    steps = (
        Step(
            name,
            "checkpoints in host memory",
            20,
            "copied on a stream of their own",
            lambda on, standing: on.having(host_checkpoints=True),
            _cost,
            is_for_host=True,
        ),
    )

    def settled(self, techniques: Techniques, value: str, standing: Standing) -> Techniques:
        return techniques.having(host_checkpoints=value == "host")

    def refusal(self, model: Any, layers: Sequence[Any]) -> str | None:
        from qtune.memory.packed_mixers import runs_as_a_whole

        if runs_as_a_whole(type(model.get_base_model())):
            return "its attention is code of its own, so its layers run once for each length"
        return None

    def is_asked_for(self, value: str) -> bool:
        return value == "host"

    def is_in_a_pass(self, techniques: Techniques) -> bool:
        return bool(techniques.recomputed_layers)

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        from qtune.memory.activation_offload import HostBuffers

        if live.runner.host is None:
            live.runner.host = HostBuffers()


HOST_CHECKPOINTS = HostCheckpoints()
