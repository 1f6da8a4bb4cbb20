"""MLPs and norms in tiles of tokens: `memory.tiled_mlp`."""

from collections.abc import Callable, Sequence
from typing import Any

from qtune.memory.techniques import LiveModel, Step, Technique, Techniques, auto_or_count
from qtune.memory.techniques.standing import Standing

TILE_TOKENS = 1024  # chosen: a tile holds little beside the checkpoints, and still fills the cores of a card
SMALL_TILE_TOKENS = 256  # chosen: the fewest at which dequantising the weights once a tile is not most of the work
DEQUANTISING = 0.05  # of a step's time with tiles of TILE_TOKENS: an estimate, not measured on a card yet
NOTE = "weights are dequantised once a tile"


def _tiles_of(tokens: int) -> Callable[[Techniques, Standing], Techniques]:
    def up(techniques: Techniques, standing: Standing) -> Techniques:
        is_as_small = 0 < techniques.tile_tokens <= tokens
        return techniques if is_as_small else techniques.having(tile_tokens=tokens)

    return up


def _cost(techniques: Techniques, standing: Standing) -> float:
    return DEQUANTISING * TILE_TOKENS / max(1, techniques.tile_tokens)


class TileTokens(Technique):
    """Counts tokens; a tile of 0 tokens is no tiling."""

    name, order, off = "tile_tokens", 30, 0
    key, setting = "tile_tokens", auto_or_count(0)
    description = "Tokens in one piece of the MLPs and norms; 0 runs them whole, few are leaner and slower."
    needs_layers = True
    steps = (
        Step(name, "MLP and norms in tiles", 30, NOTE, _tiles_of(TILE_TOKENS), _cost),
        Step(name, "smaller tiles", 70, NOTE, _tiles_of(SMALL_TILE_TOKENS), _cost, is_told=False),
    )

    def refusal(self, model: Any, layers: Sequence[Any]) -> str | None:
        from qtune.memory.tiled_mlp import token_wise

        if layers and not token_wise(layers[0])[1]:
            return "its layers have no norm that is known by its name"
        return None

    def amount(self, value: int, standing: Standing) -> str:
        return f" of {value:,} tokens"

    def switch_on(self, live: LiveModel, wanted: Techniques) -> None:
        from qtune.memory.tiled_mlp import run_model_in_tiles

        run_model_in_tiles(live.model, live.layers, live.runner, wanted.tile_tokens)


TILED = TileTokens()
