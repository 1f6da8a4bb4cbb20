"""Forecasts by formulas that a person can redo, so that what the ladder does with them is tested without a trace."""

from dataclasses import dataclass

from real_steps import recipe_for

from qtune.memory.memory_tracker import Peak
from qtune.memory.techniques import TECHNIQUES, Techniques
from qtune.memory.techniques.standing import Layer, Standing
from qtune.plan.forecast import FIRST_BACKWARD, FORWARD, LAST_BACKWARD, LOSS, Forecaster
from qtune.plan.ladder import Budget, Ladder
from qtune.plan.workload import BatchShape, Work

KIB, ROOMY = 1024, 1 << 40
UNBOUNDED = Budget(ROOMY, ROOMY)
LAYERS, GROUPS = 4, 2
CHECKPOINT, MLP, ATTENTION = 8, 120, 60  # bytes a token of a layer: its input, and what it saves
KEPT = 6  # of that, attention's output
TABLE = 64 * KIB
STANDING = Standing(
    base_bytes=LAYERS * 100 * KIB,
    layers=(Layer(90 * KIB, 90 * KIB),) * LAYERS,
    embedding_bytes=TABLE,
    head_bytes=TABLE,
    quantized_head_bytes=TABLE // 4,
    largest_bytes=8 * KIB,
    is_tied=False,
    adapter_bytes=16 * KIB,
    optimizer_bytes=8 * KIB,
    optimizer_workspace_bytes=0,
    parameters=800 * KIB,
    active_parameters=600 * KIB,
    trained_parameters=4 * KIB,
    head_parameters=32 * KIB,
    attention_width=64,
    key_value_heads=GROUPS,
    refusals={},
    movable=dict.fromkeys(TECHNIQUES, 0),
)


@dataclass
class FormulaPasses:
    """A layer that is recomputed leaves its input, and attention's output where that is not run again; one that is not,
    all it saves. `asked` counts the questions."""

    asked: int = 0
    kept: int = KEPT

    def peaks(self, techniques: Techniques, batch: BatchShape) -> dict[str, Peak]:
        self.asked += 1
        tokens, recomputed = batch.tokens, techniques.recomputed_layers
        waiting = 0 if techniques.host_checkpoints else recomputed * CHECKPOINT * tokens
        kept = (LAYERS - recomputed) * (MLP + ATTENTION) * tokens
        tile = min(tokens, techniques.tile_tokens or tokens)
        again = MLP * tile + ATTENTION * tokens // techniques.head_groups  # a layer while it runs
        attention = max(0, recomputed - techniques.recomputed_attention) * self.kept * tokens
        peaks = {
            FORWARD: _held(waiting + kept, again // 2, attention),
            LOSS: _held(waiting + kept, 4 * tokens, attention),
        }
        if recomputed:
            peaks[LAST_BACKWARD] = _held(waiting + kept, again, attention)
            peaks[FIRST_BACKWARD] = _held(0, again)
        return peaks

    def checkpoint_bytes(self, batch: BatchShape) -> int:
        return CHECKPOINT * batch.tokens

    def moved_bytes(self, techniques: Techniques, batch: BatchShape) -> int:
        return LAYERS * 10 * (MLP + ATTENTION) * batch.tokens


def _held(checkpoints: int, workspace: int, attention: int = 0) -> Peak:
    return Peak({"checkpoints": checkpoints, "kept attention": attention, "layer workspace": workspace})


def ladder_of(
    work: Work,
    budget: Budget = UNBOUNDED,
    memory: dict | None = None,
    standing: Standing = STANDING,
    **train: object,
) -> Ladder:
    recipe = recipe_for("demo", memory, **train)
    return Ladder(Forecaster(recipe, standing, FormulaPasses(), None, 0), work, budget)
