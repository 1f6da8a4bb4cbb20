"""The longest context that fits: one document in a batch, every open technique on."""

from qtune.plan import ladder
from qtune.plan.forecast import Forecaster
from qtune.plan.ladder import MARGIN_FRACTION, Budget
from qtune.plan.trace import Batch
from qtune.recipe.schema import Recipe

MOST_TOKENS = 4_194_304
STEP_TOKENS = 64
FIRST_TOKENS = (1024, 8192)
EXACT_FRACTION, TRACES = 0.005, 10


def longest(recipe: Recipe, forecaster: Forecaster, budget: Budget) -> int:
    """Tokens, a multiple of 64, to half a percent; 0 where not even 64 fit. Streams as much as the host has room for.

    Memory is nearly a straight line in the tokens, so each guess is where the line through the last two meets the
    budget, kept between the longest that fits and the shortest that does not.
    """

    if ladder.has_no_room(recipe, forecaster, budget):
        return 0

    def full_with(tokens: int) -> float:
        return fullness(recipe, forecaster, Batch.of_one_document(tokens), budget)

    fits, too_long = 0, MOST_TOKENS + STEP_TOKENS
    (before, after), guesses = FIRST_TOKENS, 0
    full_before, full = full_with(before), full_with(after)
    while True:
        for tokens, used in ((before, full_before), (after, full)):
            fits, too_long = (max(fits, tokens), too_long) if used <= 1 else (fits, min(too_long, tokens))
        if too_long - fits <= max(STEP_TOKENS, EXACT_FRACTION * fits) or guesses == TRACES:
            return fits
        slope = (full - full_before) / (after - before) if after != before else 0.0
        guess = after + (1 - full) / slope if slope > 0 else (fits + too_long) / 2
        if not fits < guess < too_long:
            guess = (fits + too_long) / 2
        guess = max(fits + STEP_TOKENS, min(too_long - STEP_TOKENS, int(guess) // STEP_TOKENS * STEP_TOKENS))
        before, full_before, after, full, guesses = after, full, guess, full_with(guess), guesses + 1


def fullness(recipe: Recipe, forecaster: Forecaster, batch: Batch, budget: Budget) -> float:
    """Share of the budget that is taken with every open technique on; over 1 it does not fit. Of the device's budget
    and the host's the fuller."""
    found = forecaster.forecast(ladder.leanest(recipe, forecaster, batch, budget), batch)
    on_device = found.needed_bytes / (budget.device_bytes * (1 - MARGIN_FRACTION))
    return max(on_device, found.host_bytes / max(1, budget.host_bytes))
