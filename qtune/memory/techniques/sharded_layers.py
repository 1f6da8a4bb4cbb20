"""Frozen layers of which every rank holds a part: `memory.weight_streaming`."""

from collections.abc import Iterable, Sequence
from typing import Any

from qtune.memory.techniques import LiveModel, Side, Step, Technique, Techniques, auto_or_count
from qtune.memory.techniques.standing import Parts, Standing
from qtune.memory.techniques.weight_streaming import STREAMED_LAYERS, is_in, spread

EXCHANGES = 0.05  # of a step's time, for all layers, where the link is not known: an estimate, not measured on a card
SHARE_BEHIND = 0.02  # of a step's time, for what is exchanged while it computes: an estimate, not measured on a card


class ShardedLayers(Technique):
    """Counts decoder layers. Of each the N ranks hold 1/N, on the device, or in host memory where it is streamed, too.
    Each of them is recomputed, and the others with them. In one process they are streamed."""

    name, order, off = "sharded_layers", 90, 0
    key, setting = "shard_layers", auto_or_count(0)
    description = "Frozen layers of which every rank holds a part; of one process they stay in host memory."
    needs_layers = needs_ranks = True
    moves_layers = fills_host = True
    is_as_loaded = True
    steps = (
        Step(
            name,
            "sharded layers",
            49,
            "gathered ahead of their turn, forward and backward",
            lambda on, standing: _sharded(on, len(standing.layers), standing),
            lambda on, standing: cost(on, standing),
        ),
    )

    def settled(self, techniques: Techniques, value: int, standing: Standing) -> Techniques:
        return _sharded(techniques, min(value, len(standing.layers)), standing)

    def fault(self, value: int, standing: Standing) -> str | None:
        return "needs more than one rank to hold the parts" if value and standing.ranks == 1 else None

    def refusal(self, model: Any, layers: Sequence[Any]) -> str | None:
        is_read = any(getattr(config, "use_dora", False) for config in model.peft_config.values())
        return "DoRA reads the weights of every layer as it begins" if is_read else None

    def ruled_out(self, memory: Any) -> str | None:
        kept = memory.keep_layers
        is_kept = kept != "auto" and kept > 0
        return f"a layer in parts is recomputed, and memory.keep_layers = {kept}" if is_kept else None

    def joined(self, wanted: int, now: int) -> int:
        return max(wanted, now)

    def amounts(self, value: int) -> Sequence[int]:
        return range(1, value)

    def amount(self, value: int, standing: Standing) -> str:
        return f", {value} of {len(standing.layers)} in {standing.ranks} parts"

    def on_device(self, parts: Parts, standing: Standing, techniques: Techniques) -> Parts:
        """Parts stand in for layers, and beside them the two buffers."""
        from qtune.memory.memory_tracker import block_bytes
        from qtune.memory.weight_streaming import part_bytes, shared_bytes

        layers, ranks = standing.layers, standing.ranks
        shared, streamed = _layers_of(techniques, standing)
        visits = [ranks * part_bytes(layers[i].packed_bytes, ranks) for i in shared]
        visits += [layers[i].packed_bytes for i in streamed - shared]
        counted = set(spread(techniques.streamed_layers, len(layers)))  # by the other technique
        return {
            **parts,
            "base": parts["base"] - sum(layers[i].resident_bytes for i in (shared | streamed) - counted),
            "streamed layers": min(2, len(visits)) * block_bytes(max(visits, default=0)),
            "sharded layers": sum(block_bytes(shared_bytes(layers[i].packed_bytes, ranks)) for i in shared - streamed),
        }

    def on_host(self, standing: Standing, techniques: Techniques) -> Parts:
        from qtune.memory.memory_tracker import block_bytes
        from qtune.memory.weight_streaming import shared_bytes

        shared, streamed = _layers_of(techniques, standing)
        whole = sum(block_bytes(standing.layers[i].packed_bytes) for i in streamed - shared)
        sizes = [shared_bytes(standing.layers[i].packed_bytes, standing.ranks) for i in streamed & shared]
        return {"streamed layers": whole + sum(map(block_bytes, sizes))}

    def is_in_a_pass(self, techniques: Techniques) -> bool:
        return False

    def stays_on_host(self, weight: str, techniques: Techniques, text: Any) -> bool:
        """Until it is dealt out, or for good in one process."""
        return is_in(spread(techniques.sharded_layers, text.num_hidden_layers), weight)

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        STREAMED_LAYERS.switch_on(live, wanted)

    def live_parts(self, live: LiveModel, techniques: Techniques) -> Iterable[tuple[str, Side, list[Any]]]:
        stream = live.runner.stream
        if stream is not None:
            yield "sharded layers", "device", stream.homes("device")
            if not techniques.streamed_layers:
                yield from STREAMED_LAYERS.live_parts(live, techniques)


def _layers_of(techniques: Techniques, standing: Standing) -> tuple[set[int], set[int]]:
    """Which layers are in parts, and which have their home in host memory."""
    layers = len(standing.layers)
    shared, streamed = (set(spread(count, layers)) for count in (techniques.sharded_layers, techniques.streamed_layers))
    return (shared, streamed) if standing.ranks > 1 else (set(), shared | streamed)


def _sharded(techniques: Techniques, layers: int, standing: Standing) -> Techniques:
    if not layers or standing.ranks == 1:
        return techniques.having(sharded_layers=0)
    return techniques.having(sharded_layers=layers, recomputed_layers=len(standing.layers))


def cost(techniques: Techniques, standing: Standing) -> float:
    """Of a step's time. What comes over the link while a layer computes is nearly free, and what takes longer is not.

    A pass brings N - 1 of N parts of every layer to each rank, forward and again backward.
    """
    share = techniques.sharded_layers / max(1, len(standing.layers))
    if not standing.link_bytes or not standing.pass_seconds:
        return EXCHANGES * share
    shared, _ = _layers_of(techniques, standing)
    moved = sum(standing.layers[i].packed_bytes for i in shared) * (standing.ranks - 1) / standing.ranks
    exposed = 2 * moved / standing.link_bytes - standing.pass_seconds
    return SHARE_BEHIND * share + max(0.0, exposed / standing.pass_seconds)


SHARDED_LAYERS = ShardedLayers()
