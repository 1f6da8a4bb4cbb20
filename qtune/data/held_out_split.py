"""Which rows are held out where the recipe names no file of them."""

import random

from qtune.errors import DataError
from qtune.recipe.schema import Data
from qtune.units import counted


def held_out_of(rows: int, is_text: bool, data: Data, seed: int) -> list[int]:
    """The positions among the usable rows of data.train, in order; at least one where a share was asked for.

    Raises DataError where nothing would be left to train on.
    """
    fraction = data.held_out_fraction
    if fraction == 0:
        return []
    count = max(1, round(fraction * rows))
    if count >= rows:
        raise DataError(
            f"data.held_out_fraction = {fraction:g} leaves nothing to train on: {_there_is(rows, is_text, data)}, or"
            " name a data.held_out file."
        )
    return sorted(random.Random(seed).sample(range(rows), count))


def _there_is(rows: int, is_text: bool, data: Data) -> str:
    if is_text:
        made = f"{counted(rows, 'piece')} of up to data.max_tokens = {data.max_tokens:,}"
        return f"the text makes {made}. Lower that, add text, set data.held_out_fraction = 0"
    return f"usable rows are {rows}. Lower it, add rows"
