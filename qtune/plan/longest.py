"""The longest context that fits: one document in a batch, every open technique on."""

from qtune.plan import ladder
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import Budget
from qtune.plan.trace import Batch
from qtune.recipe.schema import Recipe

MOST_TOKENS = 4_194_304
STEP_TOKENS = 64
TRACES = 12


def longest(recipe: Recipe, forecaster: Forecaster, budget: Budget) -> int:
    """Tokens, a multiple of 64; 0 where not even the shortest fits. As much is streamed as the host has room for."""

    def fits(tokens: int) -> bool:
        techniques = ladder.leanest(recipe, forecaster)
        batch = Batch.of_one_document(tokens)
        techniques = ladder.within_host(techniques, lambda t: forecaster.forecast(t, batch).host_bytes, budget)
        return budget.has_room_for(forecaster.forecast(techniques, batch))

    low, high = 0, STEP_TOKENS
    while high <= MOST_TOKENS and fits(high):  # memory grows at least with the tokens: double, then close in
        low, high = high, high * 4
    for _ in range(TRACES):
        if high - low <= max(STEP_TOKENS, low // 256):
            break
        middle = (low + high) // 2 // STEP_TOKENS * STEP_TOKENS
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
