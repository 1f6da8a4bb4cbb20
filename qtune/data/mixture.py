"""The rows of all sources in one: which are held out, how many of each are trained on, and what they count for.

They are packed and put into an order together, so a step has rows of all; a function of the seed, as everything here.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy
from numpy.typing import NDArray

from qtune.data.data_report import SourceFigures, SourceRows
from qtune.data.dataset import Examples
from qtune.data.packing import pack_apart
from qtune.data.ragged import Ints, Ragged
from qtune.data.sources import Part
from qtune.errors import DataError
from qtune.recipe.schema import Data, Recipe
from qtune.units import counted


@dataclass(frozen=True)
class Mixture:
    """Rows of all sources: those of each that are trained on and those that are held out, in the order of sources and
    of their files; `ends` says of each source up to which row of the blocks it goes."""

    data: Data
    by_source: tuple[Examples, ...]
    held_out: Examples
    ends: Ints

    @classmethod
    def of(cls, examples: Examples, taken: Sequence[SourceRows], recipe: Recipe) -> "Mixture":
        """`examples` are the rows of all that was `taken`, in its order, and others behind them.

        Raises DataError for a source of which nothing would be left, or that is too small for its share.
        """
        data, seed = recipe.data, recipe.train.seed
        counts = [each.examples for each in taken]
        trained, apart = parted(counts, [each.is_text for each in taken], data, seed)
        weights = weights_of(counts, len(examples), data)
        weighted = Examples(examples.blocks, examples.indices, weights)
        by_source = tuple(weighted.take(rows) for rows in shared_out(trained, examples.tokens, data, seed))
        return cls(data, by_source, examples.take(apart), numpy.cumsum(counts[: len(trained)]))

    @property
    def train(self) -> Examples:
        return reduce(Examples.followed_by, self.by_source)

    def held_out_packs(self, parts: Sequence[Part]) -> tuple[Ragged, tuple[str, ...]]:
        """Those of each source apart, and from which source each is; names are not needed where there is one, or where
        other rows are held out."""
        sources = numpy.searchsorted(self.ends, self.held_out.indices, side="right")
        packs = pack_apart(self.held_out.tokens, sources, self.data.max_tokens if self.data.packing else None)
        is_one = len(self.by_source) == 1 or self.data.held_out is not None
        return packs, () if is_one else tuple(parts[sources[rows[0]]].name for rows in packs)

    def figures(self, parts: Sequence[Part], taken: Sequence[SourceRows]) -> tuple[SourceFigures, ...]:
        """Of each of several sources."""
        held_out = self.held_out.indices
        every = []
        for number, source in enumerate(self.data.sources):
            part, rows, seen = parts[number], self.by_source[number], taken[number]
            start, end = int(self.ends[number]) - seen.examples, int(self.ends[number])
            apart = int(((start <= held_out) & (held_out < end)).sum())
            every.append(
                SourceFigures(
                    name=part.name,
                    format=seen.form.name if seen.form else part.data.format,
                    rows_read=seen.rows,
                    train_rows=len(rows),
                    held_out_rows=apart,
                    left_out_rows=seen.examples - len(rows) - apart,
                    tokens=int(rows.tokens.sum()),
                    trained_tokens=int(rows.trained_tokens.sum()),
                    weight=source.weight,
                )
            )
        return tuple(every)


def weights_of(counts: Sequence[int], rows: int, data: Data) -> NDArray[numpy.float32] | None:
    """(rows,) in float32, of sources with so many rows each, and 1 for those behind them; None where all are alike."""
    weights = [source.weight for source in data.sources]
    if len(set(weights)) < 2:
        return None
    every = numpy.ones(rows, numpy.float32)
    every[: sum(counts[: len(weights)])] = numpy.repeat(weights, counts[: len(weights)])
    return every


def parted(counts: Sequence[int], are_texts: Sequence[bool], data: Data, seed: int) -> tuple[list[Ints], Ints]:
    """The positions to train on of each source, and those that are held out, all in order; `counts` are the usable rows
    of the sources, which stand behind one another, with those of data.held_out last.

    Raises DataError where nothing would be left of a source to train on.
    """
    parts = data.parts
    starts = numpy.cumsum([0, *counts])
    if data.held_out is not None:
        every = [numpy.arange(starts[number], starts[number + 1]) for number in range(len(parts))]
        return every, numpy.arange(starts[len(parts)], starts[-1])
    trained, apart = [], []
    for start, count, is_text, (key, part) in zip(starts[:-1], counts, are_texts, parts.items(), strict=True):
        try:
            drawn = held_out_of(count, is_text, part, seed)
        except DataError as fault:
            raise fault if key == "data" else DataError(f"{key}.train: {part.train}: {fault}") from None
        is_kept = numpy.ones(count, bool)
        is_kept[drawn] = False
        trained.append(start + numpy.flatnonzero(is_kept))
        apart.append(start + numpy.array(drawn, numpy.int64))
    return trained, numpy.concatenate(apart)


def shared_out(trained: Sequence[Ints], tokens: Ints, data: Data, seed: int) -> list[Ints]:
    """Of the positions to train on of each source those that give it its share of all `tokens` (of each position).

    Rows are drawn by the seed until the next would be too much, one at the least, and none twice. Where each source has
    a share, all are the largest that no source runs short of; else those without one are taken whole. Raises DataError
    where a source runs short of its share then.
    """
    shares = [source.share for source in data.sources]
    if not any(shares):
        return list(trained)
    have = [int(tokens[rows].sum()) for rows in trained]
    said = sum(share for share in shares if share)
    if None in shares:
        total = sum(held for held, share in zip(have, shares, strict=True) if not share) / (1 - said)
    else:
        shares = [share / said for share in shares if share]
        total = min(held / share for held, share in zip(have, shares, strict=True) if share)
    taken = []
    for number, (rows, share) in enumerate(zip(trained, shares, strict=True)):
        if share and have[number] < int(share * total):
            whole, others = (1 - said) * total, said - share
            fits = math.floor(1000 * (1 - others) * have[number] / (have[number] + whole)) / 1000
            raise DataError(
                f"data.sources.{number}.share = {share:g}: {data.sources[number].train} has {have[number]:,} tokens to"
                f" train on, and its share beside the others would be {int(share * total):,}. No row is taken twice:"
                f" lower it to {fits:g}, add rows, or give each source a share."
            )
        taken.append(rows if not share else _drawn(rows, tokens, share * total, seed))
    return taken


def _drawn(rows: Ints, tokens: Ints, most: float, seed: int) -> Ints:
    order = rows[random.Random(seed).sample(range(len(rows)), len(rows))]
    count = int(numpy.searchsorted(numpy.cumsum(tokens[order]), most + 0.5, side="right"))
    drawn: Ints = numpy.sort(order[: max(1, count)])
    return drawn


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
