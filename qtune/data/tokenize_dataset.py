"""The rows of one source, tokenised batch by batch and written away; what is left out is counted by its reason."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qtune.data.chat_template import ChatTemplate
from qtune.data.chunking import Cut, fitted
from qtune.data.data_report import group_dropped
from qtune.data.dataset import ExampleWriter
from qtune.data.rows import Dropped, Example
from qtune.data.scan import Survey
from qtune.data.sources import SHOWN_FAULTS, refuse_bad_rows
from qtune.data.tokenize import Encoder, batches_of, characters_of, tokenize
from qtune.data.worker_pool import spread
from qtune.errors import DataError


@dataclass(frozen=True)
class Tokenised:
    """How many examples a source gave, and all of its rows that were left out, and its texts that were cut."""

    rows: int
    dropped: tuple[Dropped, ...]
    cut: Cut


@dataclass
class Lengths:
    """How long the rows of a source are, before any is cut or dropped; `long` are the first over `max_tokens`."""

    max_tokens: int
    rows: int = 0
    long_rows: int = 0
    shortest: int = 0
    longest: int = 0
    long: list[str] = field(default_factory=list)

    def see(self, row: Example) -> None:
        tokens = len(row.input_ids)
        self.shortest = min(self.shortest, tokens) if self.rows else tokens
        self.longest = max(self.longest, tokens)
        self.rows += 1
        if tokens > self.max_tokens:
            self.long_rows += 1
            if len(self.long) < SHOWN_FAULTS:
                self.long.append(f"{row.place}: has {tokens:,} tokens.")

    def refuse_long_rows(self) -> None:
        if self.long:
            raise DataError(
                "\n".join(self.long) + f"\n{self.long_rows:,} of {self.rows:,} rows have more than data.max_tokens ="
                f" {self.max_tokens:,}, the longest {self.longest:,}. Raise it, or choose data.on_long = "
                '"drop" or "truncate".'
            )


def tokenise(
    found: Survey,
    template: ChatTemplate | None,
    encoder: Encoder,
    writer: ExampleWriter,
    advance: Callable[[int], None],
) -> Tokenised:
    """Every row's tokens, within data.max_tokens, to `writer`, in the source's order.

    Raises DataError where the recipe wants that, or none is left.
    """
    data, lengths = found.data, Lengths(found.data.max_tokens)
    untraceable: list[Dropped] = []
    unfit: list[Dropped] = []
    rows, cut = 0, Cut()
    work = functools.partial(tokenize, template=template, encoder=encoder)
    with contextlib.closing(spread(work, batches_of(found.items(), characters_of))) as every:
        for batch, tokenized in every:
            for item, row in zip(batch, tokenized, strict=True):
                if isinstance(row, Dropped):
                    untraceable.append(row)
                    continue
                lengths.see(row)
                parts = fitted(item, row, data, encoder)
                cut.see(item, len(parts))
                for part in parts:
                    if isinstance(part, Dropped):
                        unfit.append(part)
                    else:
                        rows += 1
                        writer.add(part)
            advance(len(batch))
    if data.on_bad_row == "error":
        refuse_bad_rows(untraceable)
    if data.on_long == "error" and found.has_chats:
        lengths.refuse_long_rows()
    dropped = (*found.dropped, *untraceable, *unfit)
    if not rows:
        raise DataError(_nothing_left_message(found.source.name, dropped, lengths))
    return Tokenised(rows, dropped, cut)


def _nothing_left_message(source: str, dropped: Sequence[Dropped], lengths: Lengths) -> str:
    reason = group_dropped(dropped)[0]
    message = f"{source}: no row can be used. {reason.rows:,} of {len(dropped):,} rows: {reason.reason}."
    if lengths.rows:
        message += f" The shortest row has {lengths.shortest:,} tokens: raise data.max_tokens."
    return message
